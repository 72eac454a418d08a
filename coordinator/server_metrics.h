/* What eep-coordinator counts for its metrics (docs/metrics.md), at its edge: operations from the records that go to
 * the journal, calls as they are carried out, times of the disk.  Numbers of the present are asked for when they are
 * read. Loop thread. */
#ifndef EEP_COORDINATOR_SERVER_METRICS_H
#define EEP_COORDINATOR_SERVER_METRICS_H

#include "common/control_methods.h"
#include "common/metrics.h"
#include "coordinator/durable.h"

#define METRICS_KINDS    6  /* enum op_kind, from 1 */
#define METRICS_OUTCOMES 4  /* enum op_outcome, from 1 */
#define METRICS_PHASES   24 /* phases that have been met */

struct server_metrics {
    uint64_t operations[METRICS_KINDS][METRICS_OUTCOMES];
    uint64_t bytes_moved, bytes_planned;
    struct {
        char name[20];
        struct metrics_histogram seconds;
    } phases[METRICS_PHASES];
    unsigned n_phases;
    struct metrics_histogram pause;     /* longest hold of a rank, of each operation that is done */
    struct metrics_histogram journal;   /* submission to sync */
    struct metrics_histogram store;     /* a store call on the loop */
    struct metrics_histogram disk_wait; /* an answer's wait for the disk */
    uint64_t calls[CONTROL_METHODS], tcpstore_commands, refused;
};

void server_metrics_init(struct server_metrics *m);
/* An operation has ended. */
void server_metrics_operation(struct server_metrics *m, const struct op_record *ended, uint64_t bytes_planned);
/* A call was carried out, or waits for something else than the loop. */
void server_metrics_call(struct server_metrics *m, enum control_method method, uint64_t ns);

#endif
