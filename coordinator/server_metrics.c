/* eep-coordinator's metrics: see server_metrics.h. */
#include "coordinator/server_metrics.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "coordinator/server_internal.h"
#include "coordinator/store_edge.h"

static const char *const outcomes[METRICS_OUTCOMES] = {NULL, "done", "aborted", "failed"};

void server_metrics_init(struct server_metrics *m)
{
    metrics_histogram_short(&m->pause);
    metrics_histogram_short(&m->journal);
    metrics_histogram_short(&m->store);
    metrics_histogram_short(&m->disk_wait);
}

static void phase_observe(struct server_metrics *m, const char *name, double seconds)
{
    unsigned i = 0;
    while (i < m->n_phases && strcmp(m->phases[i].name, name) != 0)
        i++;
    if (i == METRICS_PHASES)
        return;
    if (i == m->n_phases) {
        snprintf(m->phases[i].name, sizeof m->phases[i].name, "%s", name);
        metrics_histogram_long(&m->phases[i].seconds);
        m->n_phases++;
    }
    metrics_observe(&m->phases[i].seconds, seconds);
}

void server_metrics_operation(struct server_metrics *m, const struct op_record *ended, uint64_t bytes_planned)
{
    if (ended->kind < METRICS_KINDS && ended->outcome < METRICS_OUTCOMES)
        m->operations[ended->kind][ended->outcome]++;
    m->bytes_moved += ended->bytes;
    m->bytes_planned += bytes_planned;
    for (uint32_t i = 0; i < ended->n_phases; i++)
        phase_observe(m, ended->phases[i].phase, (double)ended->phases[i].ns / 1e9);
    if (ended->outcome == OUTCOME_DONE)
        metrics_observe(&m->pause, (double)ended->hold_ns_max / 1e9);
}

static bool is_store(enum control_method method)
{
    return method >= CONTROL_KV_SET && method <= CONTROL_BARRIER_SHOW;
}

void server_metrics_call(struct server_metrics *m, enum control_method method, uint64_t ns)
{
    m->calls[method]++;
    if (is_store(method))
        metrics_observe(&m->store, (double)ns / 1e9);
}

/* ---- writing ---- */

static void one(struct metrics_text *t, const char *name, enum metrics_type type, const char *help, double value)
{
    metrics_family(t, name, type, help);
    metrics_value(t, value, NULL);
}

static void write_agents(const struct server *s, struct metrics_text *t, uint64_t now_ns)
{
    static const char *const names[] = {NULL, "spare", "serving", "joining", "leaving", "lost"};
    unsigned states[sizeof names / sizeof names[0]] = {0}, connected = 0, attached = 0, missing = 0;
    struct agent_info a;
    for (size_t i = 0; coordinator_agent(s->core, now_ns, i, &a); i++) {
        states[a.state]++;
        connected += a.connected;
        if (a.rank >= 0 && a.engine)
            attached++;
        else if (a.rank >= 0)
            missing++;
    }
    metrics_family(t, "eep_agents", METRICS_GAUGE, "Agents that the coordinator knows, by state.");
    for (size_t i = 1; i < sizeof names / sizeof names[0]; i++)
        metrics_value(t, states[i], "state", names[i], NULL);
    one(t, "eep_agents_connected", METRICS_GAUGE, "Agents with a connection.", connected);
    metrics_family(t, "eep_rank_engines", METRICS_GAUGE, "Ranks of the view, by whether an engine is attached.");
    metrics_value(t, attached, "state", "attached", NULL);
    metrics_value(t, missing, "state", "missing", NULL);
}

static double balance(const struct server *s, const struct coordinator_status *status)
{
    const struct load_history *load = coordinator_load(s->core);
    const struct expert_map *map = status->view ? status->view->map : NULL;
    bool fits = map && load->layers == map->layers && load->logical == map->logical;
    double *sum = fits ? load_sum(load) : NULL, value = sum ? load_balance(map, sum) : 1;
    free(sum);
    return value;
}

static void write_view(const struct server *s, struct metrics_text *t, const struct coordinator_status *status)
{
    one(t, "eep_epoch", METRICS_GAUGE, "Epoch of the committed view; 0: none yet.",
        status->view ? (double)status->view->epoch : 0);
    one(t, "eep_map_version", METRICS_GAUGE, "Highest version of the expert map.", (double)status->map_version);
    one(t, "eep_ranks", METRICS_GAUGE, "Ranks of the committed view.", status->view ? status->view->n : 0);
    one(t, "eep_ranks_wanted", METRICS_GAUGE, "Ranks that an operator asked for last; 0: none yet.", status->wanted);
    one(t, "eep_view_degraded", METRICS_GAUGE, "1: the view does not serve everything.", status->degraded[0] != '\0');
    one(t, "eep_experts_masked", METRICS_GAUGE, "Experts, over all layers, that are served without until they have been read again.",
        (double)status->masked);
    one(t, "eep_operations_paused", METRICS_GAUGE, "1: an operator has paused operations.", status->paused);
    one(t, "eep_expert_balance", METRICS_GAUGE,
        "Mean load of a rank over the highest, mean of all layers, under the load kept; 1: even, or no load.",
        balance(s, status));
}

static void write_operations(const struct server *s, struct metrics_text *t, const struct coordinator_status *status)
{
    const struct server_metrics *m = &s->metrics;
    metrics_family(t, "eep_operations_total", METRICS_COUNTER, "Operations that have ended.");
    for (unsigned kind = OP_START; kind <= OP_REBALANCE; kind++)
        for (unsigned i = OUTCOME_DONE; i < METRICS_OUTCOMES; i++)
            metrics_value(t, (double)m->operations[kind][i], "kind", op_kind_name((enum op_kind)kind), "result",
                          outcomes[i], NULL);
    one(t, "eep_operation_running", METRICS_GAUGE, "1: an operation runs.", status->op_running);
    metrics_family(t, "eep_operation_bytes", METRICS_GAUGE, "Bytes of the running operation; 0 without one.");
    metrics_value(t, status->op_running ? (double)status->op.bytes_done : 0, "state", "moved", NULL);
    metrics_value(t, status->op_running ? (double)status->op.bytes_planned : 0, "state", "planned", NULL);
    one(t, "eep_moved_bytes_total", METRICS_COUNTER, "Bytes that ended operations have moved.", (double)m->bytes_moved);
    one(t, "eep_planned_bytes_total", METRICS_COUNTER, "Bytes that ended operations had planned to move.",
        (double)m->bytes_planned);
    metrics_family(t, "eep_operation_phase_seconds", METRICS_HISTOGRAM, "Time that ended operations spent in a phase.");
    for (unsigned i = 0; i < m->n_phases; i++)
        metrics_histogram_write(t, &m->phases[i].seconds, "phase", m->phases[i].name);
    metrics_family(t, "eep_operation_pause_seconds", METRICS_HISTOGRAM,
                   "The longest that an engine was held at a boundary, in each operation that is done.");
    metrics_histogram_write(t, &m->pause, NULL, NULL);
}

static void write_store(const struct server *s, struct metrics_text *t)
{
    const struct server_metrics *m = &s->metrics;
    metrics_family(t, "eep_calls_total", METRICS_COUNTER, "Calls of operators, routers and tools.");
    for (unsigned i = 0; i < CONTROL_METHODS; i++)
        metrics_value(t, (double)m->calls[i], "call", pb__control__descriptor.methods[i].name, "service",
                      is_store((enum control_method)i) ? "store" : "cluster", NULL);
    metrics_family(t, "eep_store_call_seconds", METRICS_HISTOGRAM,
                   "What carrying out a store call took, without waiting for keys, barriers or the disk.");
    metrics_histogram_write(t, &m->store, NULL, NULL);
    metrics_family(t, "eep_store_disk_wait_seconds", METRICS_HISTOGRAM,
                   "How long an answer of the store has waited for the disk; answers that had to.");
    metrics_histogram_write(t, &m->disk_wait, NULL, NULL);
    one(t, "eep_tcpstore_commands_total", METRICS_COUNTER, "Commands of TCPStore clients.",
        (double)m->tcpstore_commands);
    one(t, "eep_store_keys", METRICS_GAUGE, "Keys in the store.", (double)store_count(s->edge->store, ""));
    one(t, "eep_store_used_bytes", METRICS_GAUGE, "Memory of the store that is in use.",
        (double)store_used(s->edge->store));
    one(t, "eep_store_budget_bytes", METRICS_GAUGE, "Memory that the store may use.",
        (double)store_budget(s->edge->store));
}

static void write_connections(const struct server *s, struct metrics_text *t)
{
    unsigned roles[RPC_ROLE_PEER + 1] = {0};
    const struct session *session, *next;
    HASH_ITER(hh, s->sessions, session, next)
    {
        if (session->role <= RPC_ROLE_PEER)
            roles[session->role]++;
    }
    metrics_family(t, "eep_connections", METRICS_GAUGE, "Connections past their handshake, by role.");
    for (unsigned role = RPC_ROLE_AGENT; role <= RPC_ROLE_READER; role++)
        metrics_value(t, roles[role], "role", rpc_role_name((enum rpc_role)role), NULL);
    one(t, "eep_connections_held_bytes", METRICS_GAUGE,
        "Memory of what connections receive and have not sent, and of their open calls.", (double)s->held.used);
    one(t, "eep_connections_budget_bytes", METRICS_GAUGE, "Memory that this may take.", (double)s->held.limit);
    one(t, "eep_connections_cut_total", METRICS_COUNTER,
        "Connections that were cut off because they held most of it when it was used up.", (double)s->held.cuts);
    one(t, "eep_connections_refused_total", METRICS_COUNTER, "Connections that ended before their handshake.",
        (double)s->metrics.refused);
}

void server_metrics_write(const struct server *s, struct metrics_text *t)
{
    uint64_t now_ns = clock_now_ns();
    struct coordinator_status status;
    coordinator_status(s->core, now_ns, &status);
    write_view(s, t, &status);
    write_agents(s, t, now_ns);
    write_operations(s, t, &status);
    write_store(s, t);
    write_connections(s, t);
    metrics_family(t, "eep_journal_write_seconds", METRICS_HISTOGRAM,
                   "A write of the journal, from its submission to the end of its sync.");
    metrics_histogram_write(t, &s->metrics.journal, NULL, NULL);
}
