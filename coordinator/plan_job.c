/* See plan_job.h.  Pure; any thread. */
#include "coordinator/plan_job.h"

#include <stdlib.h>

static int job_check(struct plan_job *job)
{
    const struct plan *plan = job->plan;
    for (uint32_t i = 0; job->to_joiners && i < plan->n_moves; i++)
        if (plan->moves[i].round < plan->rounds_before && !job->in.joining[plan->moves[i].dst])
            return err_set(&job->err, ERR_INVALID, "before the commit it moves expert %u to a rank that serves",
                           plan->moves[i].expert);
    return 0;
}

void plan_job_run(struct plan_job *job)
{
    job->code = plan_make_window(&job->in, &job->options, &job->plan, &job->err);
    if (job->code == 0)
        job->code = plan_validate(&job->in, job->plan, &job->err);
    if (job->code == 0)
        job->code = job_check(job);
}

void plan_input_done(struct plan_input *in)
{
    expert_map_unref((struct expert_map *)(uintptr_t)in->now);
    free((double *)(uintptr_t)in->load);
    free((double *)(uintptr_t)in->samples);
    free((void *)(uintptr_t)in->leaving);
    free((void *)(uintptr_t)in->joining);
    free((void *)(uintptr_t)in->node);
    *in = (struct plan_input){0};
}

void plan_job_free(struct plan_job *job)
{
    if (!job)
        return;
    plan_input_done(&job->in);
    plan_unref(job->plan);
    free(job);
}

uint64_t plan_job_bytes(const struct plan_job *job)
{
    uint64_t bytes = job->dense_bytes;
    for (uint32_t i = 0; i < job->plan->n_moves; i++)
        if (job->plan->moves[i].src != job->plan->moves[i].dst) /* else a copy within a rank */
            bytes += job->expert_bytes;
    return bytes;
}
