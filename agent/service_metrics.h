/* What eep-agent counts for its metrics (docs/metrics.md), at its edge: from the core's actions and the worker's
 * results. One for all incarnations of a process, so that counters only rise.  Loop thread. */
#ifndef EEP_AGENT_SERVICE_METRICS_H
#define EEP_AGENT_SERVICE_METRICS_H

#include "agent/core.h"
#include "agent/worker.h"
#include "common/metrics.h"

#define METRICS_ROLES (ROLE_REMOVING + 1)
#define METRICS_WORKS (WORK_RELOAD + 1)

struct service_metrics {
    uint64_t completed[METRICS_ROLES], aborted[METRICS_ROLES]; /* operations, by the role in them */
    struct {
        uint64_t done, aborted, failed, bytes;
        struct metrics_histogram seconds;
    } works[METRICS_WORKS]; /* by kind */
    struct metrics_histogram pause;
    uint64_t flipped_epoch; /* FLIPPED is said again after a reconnect */
    uint64_t incarnations, coordinator_losses;
};

void service_metrics_init(struct service_metrics *m);
void service_metrics_transition(struct service_metrics *m, enum op_role role, enum machine_state to);
void service_metrics_flipped(struct service_metrics *m, const struct msg_flipped *flipped);
void service_metrics_work(struct service_metrics *m, const struct worker_result *result);

void service_metrics_write_present(const struct agent_status *status, struct metrics_text *t);
void service_metrics_write_counts(const struct service_metrics *m, struct metrics_text *t);

#endif
