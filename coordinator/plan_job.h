/* A plan that is to be made: what the planner needs, and what came of it.  The core asks for it (CA_PLAN), anybody
 * makes it on any thread, since planners are pure, and the core gets it back (CE_PLANNED). */
#ifndef EEP_COORDINATOR_PLAN_JOB_H
#define EEP_COORDINATOR_PLAN_JOB_H

#include "coordinator/planner.h"

enum plan_purpose {
    PLAN_OPERATION = 1, /* the running one waits for it */
    PLAN_DRY_RUN,       /* a request wants to see it */
    PLAN_POLICY,        /* would a rebalance be worth it? */
};

struct plan_job {
    struct plan_input in; /* arrays owned, map referenced */
    struct plan_options options;
    bool to_joiners; /* before the commit nothing may move to a rank that serves */
    /* What the core must know again when it has the plan. */
    uint64_t seq;
    enum plan_purpose purpose;
    uint64_t request;                   /* PLAN_DRY_RUN */
    uint64_t epoch, map_version;        /* of the map that it begins with */
    uint32_t kind;                      /* enum op_kind */
    uint32_t from, to;                  /* ranks */
    uint64_t expert_bytes, dense_bytes; /* dense: of all joiners */
    bool automatic;
    double balance; /* PLAN_POLICY: of now */
    /* The result. */
    int code; /* 0, or ERR_* with its sentence in err */
    struct err err;
    struct plan *plan;
};

void plan_job_run(struct plan_job *job);     /* made and validated */
void plan_job_free(struct plan_job *job);    /* takes NULL */
void plan_input_done(struct plan_input *in); /* one whose arrays are owned and whose map is referenced */

/* Once plan is there: bytes that will be sent. */
uint64_t plan_job_bytes(const struct plan_job *job);

#endif
