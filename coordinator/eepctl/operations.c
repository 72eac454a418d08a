/* eepctl watch, abort and history: operations that exist already. */
#include "coordinator/eepctl/client.h"
#include "coordinator/eepctl/table.h"

struct op_options {
    uint64_t op;
    uint32_t timeout_ms, max;
    bool phases;
};

enum { KEY_TIMEOUT = 256 };

static error_t op_parse(int key, char *arg, struct argp_state *state)
{
    struct op_options *o = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (o->op)
            return ARGP_ERR_UNKNOWN;
        o->op = ctl_parse_u64(state, "OPERATION", arg);
        return 0;
    case KEY_TIMEOUT:
        o->timeout_ms = ctl_parse_seconds_ms(state, "--timeout", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int cmd_watch(struct ctl *ctl, int argc, char **argv)
{
    struct op_options options = {0};
    const struct argp_option own[] = {
        {"timeout", KEY_TIMEOUT, "SECONDS", 0, "stop waiting after so long (exit status 5)", 0},
        {0},
    };
    const struct argp argp = {
        .options = own,
        .parser = op_parse,
        .args_doc = "[OPERATION]",
        .doc = "Follows an operation to its end: the one that runs, or the last one, if none is named.\v"
               "Examples:\n"
               "  eepctl watch\n"
               "  eepctl watch 17 --timeout 60\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    return ctl_follow(ctl, options.op, options.timeout_ms);
}

int cmd_abort(struct ctl *ctl, int argc, char **argv)
{
    struct op_options options = {0};
    const struct argp argp = {
        .parser = op_parse,
        .args_doc = "[OPERATION]",
        .doc = "Aborts the running operation; the old membership serves on.  An operation whose commit is decided "
               "cannot be aborted.\v"
               "Examples:\n"
               "  eepctl abort\n"
               "  eepctl abort 17   only if it is operation 17 that runs\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    struct err err;
    Pb__AbortRequest request = PB__ABORT_REQUEST__INIT;
    Pb__OperationReply *reply;
    request.op = options.op;
    if (client_call(ctl, CONTROL_ABORT, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(ctl_json(&reply->base));
    else if (*reply->text)
        printf("operation %llu: %s\n", (unsigned long long)reply->op, reply->text);
    else
        printf("operation %llu: %s\n", (unsigned long long)reply->op, ctl_outcome(reply->outcome));
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}

static error_t history_parse(int key, char *arg, struct argp_state *state)
{
    struct op_options *o = state->input;
    if (key == 'p') {
        o->phases = true;
        return 0;
    }
    if (key != 'n')
        return ARGP_ERR_UNKNOWN;
    o->max = ctl_parse_u32(state, "--max", arg, 1, 1000);
    return 0;
}

static void phases_cell(struct table *table, const Pb__OpRecord *r)
{
    char text[1024] = "", took[32];
    for (size_t i = 0, used = 0; i < r->n_phases && used + 1 < sizeof text; i++) {
        int n = snprintf(text + used, sizeof text - used, "%s%s %s", used ? ", " : "", r->phases[i]->phase,
                         ctl_duration(r->phases[i]->ns, took, sizeof took));
        used += n > 0 ? (size_t)n : 0;
    }
    table_cell(table, "%s", text);
}

int cmd_history(struct ctl *ctl, int argc, char **argv)
{
    struct op_options options = {.max = 20};
    const struct argp_option own[] = {{"max", 'n', "N", 0, "at most so many, newest first (default 20)", 0},
                                      {"phases", 'p', 0, 0, "with the time spent in each phase", 0},
                                      {0}};
    const struct argp argp = {
        .options = own,
        .parser = history_parse,
        .doc = "Lists operations that have ended, newest first.\v"
               "Examples:\n"
               "  eepctl history\n"
               "  eepctl history --phases\n"
               "  eepctl history -n 100 -o json\n",
    };
    ctl_parse(ctl, &argp, argc, argv, &options);
    struct err err;
    Pb__OperationsRequest request = PB__OPERATIONS_REQUEST__INIT;
    Pb__OperationsReply *reply;
    request.max = options.max;
    if (client_call(ctl, CONTROL_OPERATIONS, &request.base, CLIENT_CALL_MS, (ProtobufCMessage **)&reply, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON) {
        ctl_print_json(ctl_json(&reply->base));
    } else {
        struct table table;
        table_init(&table, (const char *const[]){"OPERATION", "KIND", "RANKS", "OUTCOME", "STARTED", "TOOK", "MOVED",
                                                 "PAUSE", "WHY", options.phases ? "PHASES" : NULL, NULL});
        for (size_t i = 0; i < reply->n_operations; i++) {
            const Pb__OpRecord *r = reply->operations[i];
            char started[32], took[32], moved[32], pause[32];
            ctl_wall_time(r->started_ms, started, sizeof started);
            table_cell(&table, "%llu", (unsigned long long)r->op);
            table_cell(&table, "%s", ctl_kind(r->kind));
            table_cell(&table, "%u", r->target);
            table_cell(&table, "%s", ctl_outcome(r->outcome));
            table_cell(&table, "%s", started);
            table_cell(&table, "%s", r->ended_ms >= r->started_ms
                                         ? ctl_duration((r->ended_ms - r->started_ms) * 1000000, took, sizeof took)
                                         : "");
            table_cell(&table, "%s", ctl_bytes(r->bytes, moved, sizeof moved));
            table_cell(&table, "%s", r->hold_ns_max ? ctl_duration(r->hold_ns_max, pause, sizeof pause) : "none");
            table_cell(&table, "%s", r->why);
            if (options.phases)
                phases_cell(&table, r);
        }
        table_print(&table, stdout);
        table_done(&table);
    }
    rpc_unpack_free(&reply->base);
    return CTL_OK;
}
