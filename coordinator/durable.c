/* Copies of what the coordinator must not forget: deep where the struct owns an array, a reference where the thing
 * is immutable (views, models).  Pure. */
#include "coordinator/durable.h"

#include <stdlib.h>
#include <string.h>

/* A copy of an array, NULL for none.  False when out of memory. */
static bool array_copy(void *ret_copy, const void *from, size_t n, size_t size)
{
    void *copy = NULL;
    if (n > 0 && from) {
        copy = calloc(n, size);
        if (!copy)
            return false;
        memcpy(copy, from, n * size);
    }
    memcpy(ret_copy, &copy, sizeof copy);
    return true;
}

int op_record_copy(struct op_record *ret_copy, const struct op_record *from)
{
    struct op_record copy = *from;
    if (!array_copy(&copy.parties, from->parties, from->n, sizeof *from->parties))
        return ERR_NOMEM;
    if (!array_copy(&copy.stays, from->stays, from->n, sizeof *from->stays)) {
        free(copy.parties);
        return ERR_NOMEM;
    }
    plan_ref(copy.plan);
    expert_map_ref(copy.planned_over);
    *ret_copy = copy;
    return 0;
}

void op_record_done(struct op_record *record)
{
    free(record->parties);
    free(record->stays);
    plan_unref(record->plan);
    expert_map_unref(record->planned_over);
    memset(record, 0, sizeof *record);
}

int commit_record_copy(struct commit_record *ret_copy, const struct commit_record *from)
{
    struct commit_record copy = *from;
    if (!array_copy(&copy.old, from->old, from->n_old, sizeof *from->old))
        return ERR_NOMEM;
    view_ref(copy.view);
    *ret_copy = copy;
    return 0;
}

void commit_record_done(struct commit_record *record)
{
    view_unref(record->view);
    free(record->old);
    memset(record, 0, sizeof *record);
}

int durable_copy(struct durable *ret_copy, const struct durable *from)
{
    struct durable copy = {.epoch = from->epoch, .map_version = from->map_version, .op = from->op,
                           .wanted = from->wanted, .paused = from->paused, .paused_ms = from->paused_ms};
    memcpy(copy.paused_why, from->paused_why, sizeof(copy.paused_why));
    int rc = op_record_copy(&copy.open, &from->open);
    if (rc < 0)
        return rc;
    rc = commit_record_copy(&copy.commit, &from->commit);
    if (rc < 0)
        goto done_open;
    rc = op_record_copy(&copy.ended, &from->ended);
    if (rc < 0)
        goto done_commit;
    copy.view = view_ref(from->view);
    copy.model = model_ref(from->model);
    *ret_copy = copy;
    return 0;

done_commit:
    commit_record_done(&copy.commit);
done_open:
    op_record_done(&copy.open);
    return rc;
}

void durable_done(struct durable *durable)
{
    view_unref(durable->view);
    op_record_done(&durable->open);
    commit_record_done(&durable->commit);
    model_unref(durable->model);
    op_record_done(&durable->ended);
    memset(durable, 0, sizeof *durable);
}
