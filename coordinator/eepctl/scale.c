/* eepctl scale: to another number of ranks, while serving.  The request carries an idempotency key always, so that it
 * can be sent again when the coordinator goes away before it answers. */
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/rand.h"
#include "common/topology_wire.h"
#include "coordinator/eepctl/client.h"

#define WAIT_AGENTS_DEFAULT_MS 600000

enum {
    KEY_TO = 256,
    KEY_REMOVE,
    KEY_WAIT_AGENTS,
    KEY_DRY_RUN,
    KEY_NO_WAIT,
    KEY_TIMEOUT,
    KEY_DEADLINE,
    KEY_ID,
    KEY_ENGINE
};

static const struct argp_option common_options[] = {
    {"dry-run", KEY_DRY_RUN, 0, 0, "show the plan and change nothing", 0},
    {"no-wait", KEY_NO_WAIT, 0, 0, "return when the operation is accepted", 0},
    {"timeout", KEY_TIMEOUT, "SECONDS", 0, "stop waiting after so long; the operation goes on (exit status 5)", 0},
    {"deadline", KEY_DEADLINE, "SECONDS", 0, "roll back unless it is committed by then", 0},
    {"operation-id", KEY_ID, "KEY", 0,
     "idempotency key: the same key again joins the operation instead of starting another", 0},
    {0},
};

static error_t common_parse(int key, char *arg, struct argp_state *state)
{
    struct scale_options *o = state->input;
    switch (key) {
    case KEY_DRY_RUN:
        o->dry_run = true;
        return 0;
    case KEY_NO_WAIT:
        o->no_wait = true;
        return 0;
    case KEY_TIMEOUT:
        o->timeout_ms = ctl_parse_seconds_ms(state, "--timeout", arg);
        return 0;
    case KEY_DEADLINE:
        o->deadline_ms = ctl_parse_seconds_ms(state, "--deadline", arg);
        return 0;
    case KEY_ID:
        if (!*arg || strlen(arg) > 127)
            argp_error(state, "--operation-id must have 1 to 127 bytes");
        o->key = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

const struct argp scale_common_argp = {.options = common_options, .parser = common_parse};

/* Of a scale and of a drain; a rebalance asks no engine for anything. */
static const struct argp_option engine_options[] = {
    {"on-engine-timeout", KEY_ENGINE, "abort|continue", 0,
     "when an engine has not prepared or is not drained by its deadline: roll back, or go on without it (default: as "
     "eep-coordinator --on-prepare-timeout and --on-drain-timeout say)",
     0},
    {0},
};

error_t scale_engine_parse(int key, char *arg, struct argp_state *state)
{
    struct scale_options *o = state->input;
    if (key != KEY_ENGINE)
        return common_parse(key, arg, state);
    o->engine_continue = strcmp(arg, "continue") == 0;
    o->engine_abort = strcmp(arg, "abort") == 0;
    if (!o->engine_continue && !o->engine_abort)
        argp_error(state, "--on-engine-timeout is '%s': it must be abort or continue", arg);
    return 0;
}

size_t scale_options_all(const struct argp_option *more, struct argp_option *ret_all)
{
    const struct argp_option *parts[] = {more, common_options, engine_options};
    size_t n = 0;
    for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++)
        for (const struct argp_option *o = parts[p]; o && o->name; o++)
            ret_all[n++] = *o;
    ret_all[n] = (struct argp_option){0};
    return n;
}

static const struct argp_option scale_only_options[] = {
    {"to", KEY_TO, "N", 0, "ranks wanted", -1},
    {"remove", KEY_REMOVE, "AGENT", 0, "an agent that shall leave (repeatable)", -1},
    {"wait-for-agents", KEY_WAIT_AGENTS, "SECONDS", OPTION_ARG_OPTIONAL,
     "wait for spare agents if there are too few (default 600 s)", -1},
    {0},
};

static error_t scale_parse(int key, char *arg, struct argp_state *state)
{
    struct scale_options *o = state->input;
    switch (key) {
    case KEY_TO:
        o->target = ctl_parse_u32(state, "--to", arg, 1, 256);
        o->has_target = true;
        return 0;
    case KEY_REMOVE:
        if (o->n_remove == sizeof o->remove / sizeof o->remove[0])
            argp_error(state, "too many --remove");
        o->remove[o->n_remove++] = arg;
        return 0;
    case KEY_WAIT_AGENTS:
        o->wait_agents_ms = arg ? ctl_parse_seconds_ms(state, "--wait-for-agents", arg) : WAIT_AGENTS_DEFAULT_MS;
        return 0;
    case ARGP_KEY_END:
        if (!o->has_target && !o->n_remove)
            argp_error(state, "--to N says how many ranks are wanted");
        return 0;
    default:
        return scale_engine_parse(key, arg, state);
    }
}

static int scale_call(struct ctl *ctl, const Pb__ScaleRequest *request, Pb__ScaleReply **ret_reply, struct err *err)
{
    uint64_t lost = 0;
    int rc;
    if ((rc = client_connect(ctl, err)) < 0)
        return rc; /* it was never there: say so at once */
    for (;;) {
        rc = client_call(ctl, CONTROL_SCALE, &request->base, CLIENT_CALL_MS, (ProtobufCMessage **)ret_reply, err);
        if (rc != ERR_UNREACHABLE)
            return rc;
        client_drop(ctl);
        if (!lost)
            lost = clock_now_ms();
        else if (clock_now_ms() - lost >= CTL_LOST_MS)
            return rc;
        ctl_sleep_ms(CTL_RETRY_MS); /* the key makes a second sending harmless */
    }
}

/* A drain that may wait (it has made its key itself, so that no conflict is about that) waits for what is in its way.
 */
static int scale_accepted(struct ctl *ctl, const struct scale_options *o, bool own_key, const Pb__ScaleRequest *request,
                          Pb__ScaleReply **ret_reply, struct err *err)
{
    uint64_t began = clock_now_ms();
    bool said = false;
    for (;;) {
        int rc = scale_call(ctl, request, ret_reply, err);
        bool wait = rc == ERR_CONFLICT && o->drain && own_key && !o->no_wait && !o->dry_run;
        if (!wait || (o->timeout_ms && clock_now_ms() - began >= o->timeout_ms))
            return rc;
        if (!said)
            fprintf(stderr, "eepctl: waits, because %s\n", err->text);
        said = true;
        ctl_sleep_ms(CTL_RETRY_MS);
    }
}

static json_t *reply_json(const Pb__ScaleReply *reply)
{
    json_t *value = ctl_json(&reply->base);
    struct plan *plan;
    struct err err;
    if (reply->plan && plan_from_pb(reply->plan, &plan, &err) == 0) {
        json_object_set_new(value, "plan", ctl_plan_json(plan)); /* its tables are packed on the wire */
        plan_unref(plan);
    }
    return value;
}

int scale_run(struct ctl *ctl, struct scale_options *o)
{
    struct err err;
    Pb__ScaleRequest request = PB__SCALE_REQUEST__INIT;
    Pb__ScaleReply *reply = NULL;
    char key[40];
    bool own_key = !o->key;
    if (own_key) {
        uint64_t random;
        if (rand_u64(&random, &err) < 0)
            return ctl_fail(&err);
        snprintf(key, sizeof key, "eepctl-%016llx", (unsigned long long)random);
        o->key = key;
    }
    request.has_target = o->has_target;
    request.target = o->target;
    request.key = (char *)o->key;
    request.remove = (char **)o->remove;
    request.n_remove = o->n_remove;
    request.dry_run = o->dry_run;
    request.wait_agents_ms = o->wait_agents_ms;
    request.timeout_ms = o->deadline_ms;
    request.has_rebalance = o->rebalance;
    request.rebalance = o->rebalance;
    request.has_mib_s = o->mib_s != 0;
    request.mib_s = o->mib_s;
    request.has_drain = request.drain = o->drain;
    request.has_on_engine_timeout = o->engine_abort || o->engine_continue;
    request.on_engine_timeout =
        o->engine_continue ? PB__SCALE_REQUEST__ENGINE_TIMEOUT__CONTINUE : PB__SCALE_REQUEST__ENGINE_TIMEOUT__ABORT;
    if (scale_accepted(ctl, o, own_key, &request, &reply, &err) < 0)
        return ctl_fail(&err);

    int status = CTL_OK;
    uint64_t op = reply->op;
    if (o->dry_run || o->no_wait) {
        if (ctl->output == CTL_JSON) {
            ctl_print_json(reply_json(reply));
        } else {
            if (*reply->text)
                printf("%s\n", reply->text);
            if (!o->dry_run)
                printf("operation %llu\n", (unsigned long long)op);
            if (reply->summary)
                ctl_print_plan(reply->summary, stdout);
        }
        if (reply->outcome == PB__OP_OUTCOME__ABORTED)
            status = CTL_ABORTED;
        else if (reply->outcome == PB__OP_OUTCOME__FAILED)
            status = CTL_FAILED;
    } else if (!op) { /* nothing to do: as many ranks as there are */
        if (ctl->output == CTL_JSON)
            ctl_print_json(ctl_json(&reply->base));
        else
            printf("%s\n", *reply->text ? reply->text : "nothing to do");
    } else {
        status = ctl_follow(ctl, op, o->timeout_ms);
    }
    rpc_unpack_free(&reply->base);
    return status;
}

int cmd_scale(struct ctl *ctl, int argc, char **argv)
{
    struct scale_options options = {0};
    struct argp_option all[SCALE_OPTIONS_MAX];
    (void)scale_options_all(scale_only_options, all);
    const struct argp argp = {
        .options = all,
        .parser = scale_parse,
        .doc = "Changes the number of ranks while requests are served, and waits until it is done.  Ctrl-C stops the "
               "waiting, not the operation.\v"
               "Examples:\n"
               "  eepctl scale --to 8\n"
               "  eepctl scale --to 3 --remove gpu1           the rank that leaves is gpu1\n"
               "  eepctl scale --to 8 --dry-run -o json       what would move\n"
               "  eepctl scale --to 8 --wait-for-agents=120   wait for spare agents\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    return scale_run(ctl, &options);
}
