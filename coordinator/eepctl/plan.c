/* eepctl plan: a planner on a file.  Asks no coordinator. */
#include <string.h>

#include "coordinator/eepctl/ctl.h"
#include "coordinator/plan_json.h"

enum { KEY_POLICY = 256, KEY_INPUT };

struct plan_arguments {
    enum plan_policy policy;
    const char *input;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct plan_arguments *o = state->input;
    switch (key) {
    case KEY_POLICY:
        if (strcmp(arg, "eplb") && strcmp(arg, "elastic"))
            argp_error(state, "unknown policy '%s': it is eplb or elastic", arg);
        o->policy = strcmp(arg, "eplb") ? PLAN_ELASTIC : PLAN_EPLB;
        return 0;
    case KEY_INPUT:
        o->input = arg;
        return 0;
    case ARGP_KEY_END:
        if (!o->input)
            argp_error(state, "--input FILE is required: the load, the present map and the target");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static double number(const json_t *out, const char *key)
{
    return json_number_value(json_object_get(out, key));
}

static void print_summary(const json_t *out, enum plan_policy policy)
{
    if (policy == PLAN_EPLB) {
        printf("balance %.4f; -o json shows the placement\n", number(out, "balance_after"));
        return;
    }
    const json_t *bounds = json_object_get(out, "bounds");
    printf(
        "arrivals: %.0f before the commit, %.0f in all (at least %.0f; %.0f for the balance; %.0f fill every slot)\n",
        number(out, "arrivals_before_commit"), number(out, "arrivals_total"), number(bounds, "hard"),
        number(bounds, "balance"), number(bounds, "fill"));
    printf("rounds: %.0f before the commit, %.0f after\n", number(out, "rounds_before_commit"),
           number(out, "rounds_after_commit"));
    printf("balance: %.4f now, %.4f at the commit, %.4f after (%.4f is the most)\n", number(out, "balance_before"),
           number(out, "balance_at_commit"), number(out, "balance_after"), number(out, "balance_ceiling"));
}

int cmd_plan(struct ctl *ctl, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"policy", KEY_POLICY, "POLICY", 0,
         "elastic (default): the fewest bytes from the present map; eplb: from scratch", 0},
        {"input", KEY_INPUT, "FILE", 0, "the problem as JSON; - is standard input", 0},
        {0},
    };
    const struct argp argp = {
        .options = options,
        .parser = parse,
        .doc = "Runs a planner offline, and shows what would move.  The fields are in docs/placement.md.\v"
               "Examples:\n"
               "  eepctl plan --input problem.json\n"
               "  eepctl plan --policy eplb --input problem.json -o json\n",
    };
    struct plan_arguments o = {.policy = PLAN_ELASTIC};
    ctl_parse(ctl, &argp, argc, argv, &o);
    json_error_t where;
    struct err err = {0};
    json_t *input = strcmp(o.input, "-") ? json_load_file(o.input, JSON_REJECT_DUPLICATES, &where)
                                         : json_loadf(stdin, JSON_REJECT_DUPLICATES, &where),
           *out = NULL;
    if (!input) {
        if (where.line > 0)
            err_set(&err, ERR_INVALID, "%s: line %d: %s", o.input, where.line, where.text);
        else
            err_set(&err, ERR_INVALID, "%s: %s", o.input, where.text);
        return ctl_fail(&err);
    }
    int rc = plan_json(o.policy, input, &out, &err);
    json_decref(input);
    if (rc < 0) {
        err_wrap(&err, "%s", o.input);
        return ctl_fail(&err);
    }
    if (ctl->output == CTL_JSON) {
        json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
        putchar('\n');
    } else {
        print_summary(out, o.policy);
    }
    json_decref(out);
    return CTL_OK;
}
