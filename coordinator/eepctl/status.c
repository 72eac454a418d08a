/* eepctl status and eepctl agents: how the cluster stands. */
#include <string.h>

#include "coordinator/eepctl/client.h"
#include "coordinator/eepctl/table.h"

static const char *state_name(Pb__AgentState state)
{
    switch (state) {
    case PB__AGENT_STATE__SPARE: return "spare";
    case PB__AGENT_STATE__SERVING: return "serving";
    case PB__AGENT_STATE__JOINING: return "joining";
    case PB__AGENT_STATE__LEAVING: return "leaving";
    case PB__AGENT_STATE__LOST: return "lost";
    default: return "?";
    }
}

static const char *state_paint(Pb__AgentState state)
{
    switch (state) {
    case PB__AGENT_STATE__SERVING: return ctl_paint(stdout, PAINT_GOOD);
    case PB__AGENT_STATE__JOINING:
    case PB__AGENT_STATE__LEAVING: return ctl_paint(stdout, PAINT_BUSY);
    case PB__AGENT_STATE__LOST: return ctl_paint(stdout, PAINT_BAD);
    default: return "";
    }
}

static const char *paint_end(Pb__AgentState state)
{
    return *state_paint(state) ? ctl_paint(stdout, PAINT_END) : "";
}

static const Pb__Agent *agent_find(const Pb__AgentsReply *agents, const char *id)
{
    for (size_t i = 0; i < agents->n_agents; i++) {
        if (strcmp(agents->agents[i]->member->id, id) == 0)
            return agents->agents[i];
    }
    return NULL;
}

static void print_members(const Pb__ViewStatus *view, const Pb__AgentsReply *agents)
{
    struct table table;
    table_init(&table, (const char *const[]){"RANK", "AGENT", "STATE", "ENGINE", "ENDPOINT", "EPOCH", NULL});
    for (size_t r = 0; r < view->n_members; r++) {
        const Pb__Member *m = view->members[r];
        const Pb__Agent *a = agent_find(agents, m->id);
        table_cell(&table, "%zu", r);
        table_cell(&table, "%s", m->id);
        if (a && !a->connected && a->state != PB__AGENT_STATE__LOST)
            table_cell(&table, "%s%s, away: lost in %.1f s%s", ctl_paint(stdout, PAINT_BAD), state_name(a->state),
                       (double)a->lease_left_ms / 1e3, ctl_paint(stdout, PAINT_END));
        else
            table_cell(&table, "%s%s%s%s", a ? state_paint(a->state) : "", a ? state_name(a->state) : "unknown",
                       m->draining ? ", draining" : "", a ? paint_end(a->state) : "");
        table_cell(&table, "%s", a && a->engine ? "attached" : "none");
        table_cell(&table, "%s", m->endpoint);
        table_cell(&table, "%llu", (unsigned long long)(a ? a->applied_epoch : 0));
    }
    table_print(&table, stdout);
    table_done(&table);
}

static void print_status(const Pb__StatusReply *s, const Pb__AgentsReply *agents)
{
    if (s->view->epoch)
        printf("cluster %s: %zu ranks, epoch %llu, map version %llu, %u spare agents, commit %s\n", s->cluster,
               s->view->n_members, (unsigned long long)s->view->epoch, (unsigned long long)s->view->map_version,
               s->spares, s->commit_state);
    else
        printf("cluster %s: no view yet, %u spare agents; `eepctl scale --to N` starts it\n", s->cluster, s->spares);
    if (s->has_layers && s->has_logical && s->has_slots)
        printf("model: %u MoE layers of %u experts, %u slots per rank\n", s->layers, s->logical, s->slots);
    if (*s->view->degraded) {
        char since[32];
        printf("degraded: %s", s->view->degraded);
        putchar('\n');
        if (s->degraded_awaits && *s->degraded_awaits)
            printf("  awaited: %s, since %s ago", s->degraded_awaits,
                   ctl_duration(s->degraded_for_ms * 1000000, since, sizeof since));
        if (s->has_gives_up_in_ms)
            printf(", for %s more, then the view is given up\n",
                   ctl_duration(s->gives_up_in_ms * 1000000, since, sizeof since));
        else if (s->degraded_awaits && *s->degraded_awaits)
            printf(", without limit; if it does not come back, `eepctl restart` gives the view up\n");
    }
    if (s->has_wanted && s->view->epoch && s->wanted > s->view->n_members)
        printf("%u ranks were asked for\n", s->wanted);
    if (s->paused) {
        char at[32];
        ctl_wall_time(s->paused_ms, at, sizeof at);
        printf("operations are paused since %s%s%s; `eepctl resume` ends that\n", at, *s->paused ? ": " : "", s->paused);
    }
    if (s->view->n_members) {
        putchar('\n');
        print_members(s->view, agents);
    }
    if (s->op && s->op->op) {
        putchar('\n');
        ctl_print_operation(s->op, stdout);
    }
}

static int status_show(struct ctl *ctl, struct err *err)
{
    Pb__StatusReply *status;
    Pb__AgentsReply *agents;
    int rc = client_ask(ctl, CONTROL_STATUS, (ProtobufCMessage **)&status, err);
    if (rc < 0)
        return rc;
    rc = client_ask(ctl, CONTROL_AGENTS, (ProtobufCMessage **)&agents, err);
    if (rc < 0) {
        rpc_unpack_free(&status->base);
        return rc;
    }
    if (ctl->output == CTL_JSON) {
        json_t *members = json_array();
        for (size_t r = 0; r < status->view->n_members; r++) {
            const Pb__Agent *a = agent_find(agents, status->view->members[r]->id);
            if (a)
                json_array_append_new(members, ctl_json(&a->base));
        }
        json_t *all = ctl_json(&status->base);
        json_object_set_new(all, "members", members);
        ctl_print_json(all);
    } else {
        print_status(status, agents);
    }
    rpc_unpack_free(&status->base);
    rpc_unpack_free(&agents->base);
    return 0;
}

int cmd_status(struct ctl *ctl, int argc, char **argv)
{
    return ctl_show(ctl,
                    "Shows the committed view, its members, and the operation that runs or ran last.\v"
                    "Examples:\n"
                    "  eepctl status\n"
                    "  eepctl status --watch\n"
                    "  eepctl status -o json | jq .view.epoch\n",
                    argc, argv, status_show);
}

static int agents_show(struct ctl *ctl, struct err *err)
{
    Pb__AgentsReply *agents;
    int rc = client_ask(ctl, CONTROL_AGENTS, (ProtobufCMessage **)&agents, err);
    if (rc < 0)
        return rc;
    if (ctl->output == CTL_JSON) {
        ctl_print_json(ctl_json(&agents->base));
    } else {
        struct table table;
        table_init(&table, (const char *const[]){"AGENT", "STATE", "RANK", "CONNECTED", "LEASE", "ENGINE", "NODE", "ADDRESS",
                                                 "EPOCH", "INCARNATION", NULL});
        for (size_t i = 0; i < agents->n_agents; i++) {
            const Pb__Agent *a = agents->agents[i];
            table_cell(&table, "%s", a->member->id);
            table_cell(&table, "%s%s%s", state_paint(a->state), state_name(a->state), paint_end(a->state));
            if (a->rank >= 0)
                table_cell(&table, "%d", a->rank);
            else
                table_cell(&table, "-");
            table_cell(&table, "%s", a->connected ? "yes" : "no");
            if (a->state == PB__AGENT_STATE__LOST)
                table_cell(&table, "ended");
            else
                table_cell(&table, "%.1f s", (double)a->lease_left_ms / 1e3);
            table_cell(&table, "%s", a->engine ? "attached" : "none");
            table_cell(&table, "%u", a->member->node);
            table_cell(&table, "%s", a->member->address);
            table_cell(&table, "%llu", (unsigned long long)a->applied_epoch);
            table_cell(&table, "%016llx", (unsigned long long)a->member->incarnation);
        }
        table_print(&table, stdout);
        table_done(&table);
    }
    rpc_unpack_free(&agents->base);
    return 0;
}

int cmd_agents(struct ctl *ctl, int argc, char **argv)
{
    return ctl_show(ctl,
                    "Lists every agent that the coordinator knows, spares included.\v"
                    "Examples:\n"
                    "  eepctl agents\n"
                    "  eepctl agents --watch=5\n"
                    "  eepctl agents -o json | jq -r '.agents[] | select(.state == \"spare\").member.id'\n",
                    argc, argv, agents_show);
}
