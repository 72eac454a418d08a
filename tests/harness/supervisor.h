/* Looks at a cluster and starts again what has ended, as a supervisor on every host would do it; for tests that kill.
 *
 * Whom a test has killed is known as ended already (its pid is 0): a daemon that ends by itself is a mistake, and so is
 * an engine that is killed by a signal.  A mistake is told by `fail`, which does not return.  Not thread safe. */
#ifndef EEP_TESTS_HARNESS_SUPERVISOR_H
#define EEP_TESTS_HARNESS_SUPERVISOR_H

#include "tests/harness/cluster.h"

struct supervisor {
    struct cluster *cluster; /* its agents are gpu0 .. of options.agents */
    void (*fail)(void *user, const char *text) __attribute__((noreturn));
    void *user;
    unsigned heal_ms, operation_ms; /* until all is whole again; until an operation has ended; then it fails */
    char out[65536];                /* what eepctl said last */
};

struct look {
    unsigned ranks, attached; /* attached: agents that are connected and have an engine */
    bool running, degraded, all_connected;
    int rank[CLUSTER_AGENTS_MAX]; /* of gpu0 .., -1 = none */
};

__attribute__((format(printf, 2, 3), noreturn)) void supervisor_fail(struct supervisor *s, const char *fmt, ...);
bool supervisor_look(struct supervisor *s, struct look *ret_look); /* false: no answer */
void supervisor_restart(struct supervisor *s);
/* Until every agent is there with its engine, no operation runs and every expert is served. */
void supervisor_heal(struct supervisor *s);
/* Heals for the last time and ends the feeder: every request must have been answered rightly. */
void supervisor_end(struct supervisor *s);
/* `eepctl scale --to`, tried again while a repair is under way or the coordinator is away; supervises meanwhile. */
void supervisor_scale(struct supervisor *s, const char *to);
long supervisor_completed(struct supervisor *s); /* requests, by the feeder's status file; -1: there is none */
void supervisor_progress(struct supervisor *s);  /* until one more is completed; supervises meanwhile */
/* Waits for a command that was started as `name`, supervising; its exit code.  What it said is in s->out. */
int supervisor_wait(struct supervisor *s, pid_t *pid, const char *name);
/* What a sanitizer or an assertion has said in the logs. */
void supervisor_read_logs(struct supervisor *s);

#endif
