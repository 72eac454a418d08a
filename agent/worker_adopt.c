/* Weights of the last process: their memory is adopted, and proved to be what it should be.  Worker thread, but the call
 * itself. */
#include <unistd.h>

#include "agent/weights.h"
#include "agent/worker_internal.h"

int worker_job_adopt(struct worker *w, struct job *job, struct err *err)
{
    struct worker_result found = {.bad = 0};
    struct weights *weights;
    if (w->weights)
        return err_set(err, ERR_CONFLICT, "this agent holds weights already; others cannot be adopted");
    int rc = weights_adopt(w->config.memory, job->work.model, job->fds, job->n_fds, &weights, err);
    if (rc < 0)
        return rc;
    w->weights = weights; /* nobody looks before the caller goes on */
    rc = worker_job_verify(w, job, &found, err);
    if (rc == 0 && found.bad)
        rc = err_set(err, ERR_CORRUPT, "%llu of what was kept is not what it was: %.200s", (unsigned long long)found.bad,
                     found.text);
    w->weights = NULL;
    if (rc < 0) {
        weights_free(weights);
        return rc;
    }
    job->bytes = found.bytes;
    worker_weights_set(w, weights);
    return 0;
}

int worker_adopt(struct worker *w, struct model *model, int *fds, size_t n, struct expert_map *map, uint32_t self,
                 uint64_t *ret_bytes, struct err *err)
{
    struct job job = {
        .kind = JOB_ADOPT, .work = {.model = model, .map = map, .self = self}, .fds = fds, .n_fds = n};
    int rc = worker_call(w, &job, err);
    for (size_t i = 0; i < n; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (rc == 0)
        *ret_bytes = job.bytes;
    return rc;
}
