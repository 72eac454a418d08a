/* eepctl health: may requests be sent to this cluster?  For readiness probes: one sentence, and the exit status. */
#include <stdarg.h>
#include <string.h>

#include "coordinator/eepctl/client.h"

struct health {
    bool ready;
    char why[512];
};

static struct health verdict(bool ready, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static struct health verdict(bool ready, const char *fmt, ...)
{
    struct health h = {.ready = ready};
    va_list args;
    va_start(args, fmt);
    vsnprintf(h.why, sizeof h.why, fmt, args);
    va_end(args);
    return h;
}

/* A rank without its engine, or whose agent is away: the others wait for it in their next step. */
static const char *rank_missing(const Pb__Agent *agent)
{
    if (!agent->connected)
        return "its agent is away";
    return agent->engine ? NULL : "no engine is attached";
}

static struct health judge(const Pb__StatusReply *s, const Pb__AgentsReply *agents)
{
    if (!s->view->epoch)
        return verdict(false, "there is no view yet; `eepctl scale --to N` starts it");
    if (*s->view->degraded)
        return verdict(false, "%s", s->view->degraded);
    for (size_t i = 0; i < agents->n_agents; i++) {
        const Pb__Agent *a = agents->agents[i];
        const char *missing = a->rank >= 0 ? rank_missing(a) : NULL;
        if (missing)
            return verdict(false, "rank %d (%s): %s", a->rank, a->member->id, missing);
    }
    return verdict(true, "%zu ranks, epoch %llu", s->view->n_members, (unsigned long long)s->view->epoch);
}

static int ask(struct ctl *ctl, struct health *ret_health, struct err *err)
{
    Pb__StatusReply *status;
    Pb__AgentsReply *agents;
    int rc = client_ask(ctl, CONTROL_STATUS, (ProtobufCMessage **)&status, err);
    if (rc < 0)
        return rc;
    rc = client_ask(ctl, CONTROL_AGENTS, (ProtobufCMessage **)&agents, err);
    if (rc == 0) {
        *ret_health = judge(status, agents);
        rpc_unpack_free(&agents->base);
    }
    rpc_unpack_free(&status->base);
    return rc;
}

int cmd_health(struct ctl *ctl, int argc, char **argv)
{
    const struct argp argp = {
        .doc = "Says whether the cluster serves: a view that is whole, every rank's agent connected, every engine "
               "attached.  An "
               "operation that runs, or a pause of operations, changes nothing of that.\v"
               "Exit status: 0 ready, 1 not ready, 3 the coordinator cannot be reached.\n"
               "\n"
               "Examples:\n"
               "  eepctl health\n"
               "  until eepctl health; do sleep 1; done\n"
               "  eepctl health -o json | jq .ready\n",
    };
    struct health health;
    struct err err = {0};
    ctl_parse(ctl, &argp, argc, argv, NULL);
    if (ask(ctl, &health, &err) < 0)
        return ctl_fail(&err);
    if (ctl->output == CTL_JSON)
        ctl_print_json(json_pack("{s:b, s:s}", "ready", health.ready, "why", health.why));
    else
        printf("%s: %s\n", health.ready ? "ready" : "not ready", health.why);
    return health.ready ? CTL_OK : CTL_FAILED;
}
