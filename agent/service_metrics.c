/* eep-agent's metrics: see service_metrics.h. */
#include "agent/service_metrics.h"

#include <string.h>

#include "agent/gpu_errors.h"

void service_metrics_init(struct service_metrics *m)
{
    memset(m, 0, sizeof *m);
    metrics_histogram_short(&m->pause);
    for (unsigned i = 0; i < METRICS_WORKS; i++)
        metrics_histogram_long(&m->works[i].seconds);
}

void service_metrics_transition(struct service_metrics *m, enum op_role role, enum machine_state to)
{
    if (role < METRICS_ROLES && to == MS_COMPLETE)
        m->completed[role]++;
    else if (role < METRICS_ROLES && to == MS_ABORTED)
        m->aborted[role]++;
}

void service_metrics_flipped(struct service_metrics *m, const struct msg_flipped *flipped)
{
    if (flipped->epoch <= m->flipped_epoch)
        return;
    m->flipped_epoch = flipped->epoch;
    metrics_observe(&m->pause, (double)flipped->hold_ns / 1e9);
}

void service_metrics_work(struct service_metrics *m, const struct worker_result *r)
{
    if (r->kind >= METRICS_WORKS)
        return;
    if (r->code == 0)
        m->works[r->kind].done++;
    else if (r->code == ERR_ABORTED)
        m->works[r->kind].aborted++;
    else
        m->works[r->kind].failed++;
    m->works[r->kind].bytes += r->bytes;
    metrics_observe(&m->works[r->kind].seconds, (double)r->ns / 1e9);
}

/* ---- writing ---- */

static void one(struct metrics_text *t, const char *name, enum metrics_type type, const char *help, double value)
{
    metrics_family(t, name, type, help);
    metrics_value(t, value, NULL);
}

void service_metrics_write_present(const struct agent_status *status, struct metrics_text *t)
{
    one(t, "eep_agent_serving", METRICS_GAUGE, "1: a rank of the view; 0: a spare.", status->view != NULL);
    one(t, "eep_agent_epoch", METRICS_GAUGE, "Epoch of the view that is in use here.", (double)status->applied_epoch);
    one(t, "eep_agent_map_version", METRICS_GAUGE, "Version of the expert map that is in use here.",
        (double)status->map_version);
    one(t, "eep_agent_engine_attached", METRICS_GAUGE, "1: an engine is attached.",
        status->engine && !status->resuming);
    one(t, "eep_agent_coordinator_connected", METRICS_GAUGE, "1: the coordinator has taken this agent.",
        status->welcomed);
    one(t, "eep_agent_operation_running", METRICS_GAUGE, "1: an operation runs here.",
        status->state != MS_NONE && !machine_final(status->state));
}

static void write_works(const struct service_metrics *m, struct metrics_text *t)
{
    metrics_family(t, "eep_agent_work_total", METRICS_COUNTER, "Work of the worker that has ended.");
    for (unsigned i = WORK_ALLOCATE; i < METRICS_WORKS; i++) {
        const char *name = work_kind_name((enum work_kind)i);
        metrics_value(t, (double)m->works[i].done, "work", name, "result", "done", NULL);
        metrics_value(t, (double)m->works[i].aborted, "work", name, "result", "aborted", NULL);
        metrics_value(t, (double)m->works[i].failed, "work", name, "result", "failed", NULL);
    }
    metrics_family(t, "eep_agent_work_bytes_total", METRICS_COUNTER, "Bytes received, loaded or checked by that work.");
    for (unsigned i = WORK_ALLOCATE; i < METRICS_WORKS; i++)
        metrics_value(t, (double)m->works[i].bytes, "work", work_kind_name((enum work_kind)i), NULL);
    metrics_family(t, "eep_agent_work_seconds", METRICS_HISTOGRAM,
                   "How long that work took, without waiting for its turn.");
    for (unsigned i = WORK_ALLOCATE; i < METRICS_WORKS; i++)
        metrics_histogram_write(t, &m->works[i].seconds, "work", work_kind_name((enum work_kind)i));
}

void service_metrics_write_counts(const struct service_metrics *m, struct metrics_text *t)
{
    metrics_family(t, "eep_agent_operations_total", METRICS_COUNTER,
                   "Operations that have ended here, by the role in them.");
    for (unsigned role = ROLE_EXISTING; role < METRICS_ROLES; role++) {
        metrics_value(t, (double)m->completed[role], "role", op_role_name((enum op_role)role), "result", "done", NULL);
        metrics_value(t, (double)m->aborted[role], "role", op_role_name((enum op_role)role), "result", "aborted", NULL);
    }
    metrics_family(t, "eep_agent_pause_seconds", METRICS_HISTOGRAM,
                   "How long the engine was held at the boundary of a change of view.");
    metrics_histogram_write(t, &m->pause, NULL, NULL);
    write_works(m, t);
    metrics_family(t, "eep_agent_gpu_errors_total", METRICS_COUNTER,
                   "Calls of the CUDA driver and of NCCL that have failed.");
    metrics_value(t, (double)gpu_errors(GPU_ERROR_CUDA), "library", "cuda", NULL);
    metrics_value(t, (double)gpu_errors(GPU_ERROR_NCCL), "library", "nccl", NULL);
    one(t, "eep_agent_incarnations_total", METRICS_COUNTER, "Incarnations of this process.", (double)m->incarnations);
    one(t, "eep_agent_coordinator_losses_total", METRICS_COUNTER, "Connections to the coordinator that were lost.",
        (double)m->coordinator_losses);
}
