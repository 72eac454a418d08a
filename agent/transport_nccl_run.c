/* Operations of NCCL in batches: one ncclGroup each, one stream, several in flight, completion by events.
 *
 * Batches keep their order on the stream.  So that no two parties wait for each other in a circle, an operation has the
 * same batch on both sides: a party in batch b waits only for parties that are in b or come to it without any batch
 * after b.  Nothing here waits for NCCL or the GPU but by looking, sleeping (control_wait) and looking again; the first
 * sleeps are short, since a launch takes 20 microseconds, and a batch may take a minute.  Worker thread. */
#include <stdlib.h>
#include <string.h>

#include "agent/transport_nccl_internal.h"

#define SLEEP_FIRST_US 20u
#define SLEEP_LAST_US  1000u
#define ABORT_LIMIT_MS 3000u

/* ---- operations ---- */

int nccl_ops_init(struct nccl_ops *ops, uint32_t parties, struct err *err)
{
    *ops = (struct nccl_ops){
        .out = calloc(parties, sizeof *ops->out),
        .in = calloc(parties, sizeof *ops->in),
    };
    return ops->out && ops->in ? 0 : err_set(err, ERR_NOMEM, "out of memory");
}

void nccl_ops_done(struct nccl_ops *ops)
{
    free(ops->v);
    free(ops->out);
    free(ops->in);
    *ops = (struct nccl_ops){0};
}

int nccl_ops_add(struct nccl_ops *ops, const struct nccl_op *op, struct err *err)
{
    if (ops->n == ops->cap) {
        size_t cap = ops->cap ? ops->cap * 2 : 256;
        struct nccl_op *v = realloc(ops->v, cap * sizeof *v);
        if (!v)
            return err_set(err, ERR_NOMEM, "out of memory");
        ops->v = v;
        ops->cap = cap;
    }
    ops->v[ops->n++] = *op;
    if (op->batch >= ops->batches)
        ops->batches = op->batch + 1;
    struct control_plan *plan = op->send ? &ops->out[op->peer] : &ops->in[op->peer];
    plan->bytes += op->len;
    plan->shape = (plan->shape ^ op->len ^ (uint64_t)op->batch << 44) * 0x9e3779b97f4a7c15u;
    plan->shape ^= plan->shape >> 29;
    return 0;
}

/* ---- waiting ---- */

static uint64_t sleep_next(uint64_t us)
{
    return us * 3 / 2 < SLEEP_LAST_US ? us * 3 / 2 : SLEEP_LAST_US;
}

static int run_check(struct transport_group *group, ncclResult_t result, struct err *err, const char *what)
{
    int rc = nccl_check(&group->nccl->shared->library, group->gear.comm, result, err, "%s", what);
    group->gpu_failed |= rc < 0;
    return rc;
}

int nccl_settle(struct transport_group *group, const char *what, const struct transport_call *call, struct err *err)
{
    const struct nccl_library *nccl = &group->nccl->shared->library;
    for (uint64_t us = SLEEP_FIRST_US;; us = sleep_next(us)) {
        ncclResult_t state = ncclSuccess;
        int rc = run_check(group, nccl->ncclCommGetAsyncError(group->gear.comm, &state), err, what);
        if (rc == 0)
            rc = run_check(group, state, err, what);
        if (rc < 0 || state != ncclInProgress)
            return rc;
        rc = control_wait(group->control, us, call, err);
        if (rc < 0)
            return rc;
    }
}

int nccl_reach(struct transport_group *group, CUevent event, const struct transport_call *call, struct err *err)
{
    const struct nccl_shared *shared = group->nccl->shared;
    const struct cuda_driver *cu = &shared->device->driver;
    for (uint64_t us = SLEEP_FIRST_US;; us = sleep_next(us)) {
        CUresult result = cu->cuEventQuery(event);
        if (result == CUDA_SUCCESS)
            return 0;
        if (result != CUDA_ERROR_NOT_READY) {
            group->gpu_failed = true;
            return cuda_check(cu, result, err, "wait for the GPU to finish a transfer");
        }
        ncclResult_t state = ncclSuccess;
        if (group->gear.comm && shared->library.ncclCommGetAsyncError(group->gear.comm, &state) == ncclSuccess) {
            int rc = run_check(group, state, err, "go on with a transfer");
            if (rc < 0)
                return rc;
        }
        int rc = control_wait(group->control, us, call, err);
        if (rc < 0)
            return rc;
    }
}

/* ---- running ---- */

struct run {
    struct transport_group *group;
    const struct transport_call *call;
    const struct nccl_op **order; /* [ops->n], sorted by batch */
    size_t *starts;               /* [batches + 1] into order */
    uint32_t *busy;               /* [n_busy] batches that have operations here */
    uint32_t n_busy;
};

/* Counting sort: within a batch the order stays, which is what NCCL pairs sends and receives by. */
static int run_sort(struct run *r, const struct nccl_ops *ops, struct err *err)
{
    r->order = calloc(ops->n + 1, sizeof *r->order);
    r->starts = calloc((size_t)ops->batches + 2, sizeof *r->starts);
    r->busy = calloc((size_t)ops->batches + 1, sizeof *r->busy);
    if (!r->order || !r->starts || !r->busy)
        return err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < ops->n; i++)
        r->starts[ops->v[i].batch + 2]++;
    for (uint32_t b = 0; b < ops->batches; b++) {
        if (r->starts[b + 2] > 0)
            r->busy[r->n_busy++] = b;
        r->starts[b + 2] += r->starts[b + 1];
    }
    for (size_t i = 0; i < ops->n; i++) /* moves starts[b + 1] from the batch's begin to its end */
        r->order[r->starts[ops->v[i].batch + 1]++] = &ops->v[i];
    return 0;
}

static int run_launch(struct run *r, uint32_t k, struct err *err)
{
    struct transport_group *group = r->group;
    const struct nccl_library *nccl = &group->nccl->shared->library;
    const struct cuda_driver *cu = &group->nccl->shared->device->driver;
    int rc = run_check(group, nccl->ncclGroupStart(), err, "begin a group of transfers");
    if (rc < 0)
        return rc;
    ncclComm_t comm = group->gear.comm;
    cudaStream_t stream = group->gear.stream;
    for (size_t i = r->starts[r->busy[k]]; i < r->starts[r->busy[k] + 1] && rc == 0; i++) {
        const struct nccl_op *op = r->order[i];
        int rank = (int)group->who.parties[op->peer].rank;
        ncclResult_t result = op->send ? nccl->ncclSend(op->at, op->len, ncclUint8, rank, comm, stream)
                                       : nccl->ncclRecv(op->at, op->len, ncclUint8, rank, comm, stream);
        rc = run_check(group, result, err, op->send ? "queue a send" : "queue a receive");
    }
    struct err second = {0};
    int end = run_check(group, nccl->ncclGroupEnd(), &second, "launch a group of transfers");
    if (rc == 0 && end < 0)
        rc = err_set(err, end, "%s", second.text);
    if (rc == 0)
        rc = nccl_settle(group, "launch a group of transfers", r->call, err);
    if (rc == 0) {
        rc = cuda_check(cu, cu->cuEventRecord(group->gear.events[k % GROUPS_IN_FLIGHT], group->gear.stream), err,
                        "mark the end of a group of transfers");
        group->gpu_failed |= rc < 0;
    }
    return rc;
}

static uint64_t run_bytes_in(const struct run *r, uint32_t k)
{
    uint64_t bytes = 0;
    for (size_t i = r->starts[r->busy[k]]; i < r->starts[r->busy[k] + 1]; i++)
        bytes += r->order[i]->send ? 0 : r->order[i]->len;
    return bytes;
}

int nccl_run_batches(struct transport_group *group, const struct nccl_ops *ops, const struct transport_call *call,
                     uint64_t *ret_bytes, struct err *err)
{
    struct run r = {.group = group, .call = call};
    uint64_t received = 0;
    int rc = run_sort(&r, ops, err);
    for (uint32_t launched = 0, reached = 0; rc == 0 && reached < r.n_busy;) {
        if (launched < r.n_busy && launched - reached < group->nccl->tuning.in_flight) {
            rc = run_launch(&r, launched++, err);
            continue;
        }
        rc = nccl_reach(group, group->gear.events[reached % GROUPS_IN_FLIGHT], call, err);
        if (rc < 0)
            break;
        received += run_bytes_in(&r, reached++);
        control_progress(group->control, received, call);
    }
    free(r.order);
    free(r.starts);
    free(r.busy);
    if (rc == 0)
        *ret_bytes = received;
    return rc;
}

int nccl_run(struct transport_group *group, const char *doing, const struct nccl_ops *ops,
             const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    control_begin(group->control, doing);
    for (uint32_t i = 0; i < group->n; i++)
        if (ops->out[i].bytes > 0 || ops->in[i].bytes > 0)
            control_watch(group->control, i);
    uint64_t received = 0;
    int rc = control_agree(group->control, ops->out, ops->in, call, err);
    if (rc == 0)
        rc = nccl_run_batches(group, ops, call, &received, err);
    if (rc == 0)
        rc = control_finish(group->control, call, err);
    if (rc == 0)
        *ret_bytes = received;
    return rc;
}

/* ---- failure ---- */

int nccl_group_fail(struct transport_group *group, int rc, struct err *err)
{
    const char *who = group->gpu_failed && group->control ? control_culprit(group->control) : NULL;
    if (who && err) {
        char why[ERR_TEXT_MAX];
        memcpy(why, err->text, sizeof why);
        rc = err_set(err, ERR_UNREACHABLE, "party %s is gone: it closed the connection; %.300s", who, why);
    }
    group->broken = true;
    control_close(group->control, rc); /* the others give up as well */
    group->control = NULL;
    struct nccl_shared *shared = group->nccl->shared;
    if (group->gpu_failed && group->gear.stream && cuda_health(NULL) == 0) { /* NCCL's own words do not say it */
        CUresult state = shared->device->driver.cuStreamQuery(group->gear.stream);
        if (state != CUDA_ERROR_NOT_READY)
            (void)!cuda_check(&shared->device->driver, state, NULL, "go on after NCCL's error: %.160s",
                              err ? err->text : "");
    }
    if (cuda_health(NULL) < 0) { /* an abort would call CUDA; this process is about to end */
        group->gear = (struct nccl_gear){0};
        return rc;
    }
    nccl_ending_start(shared, &group->gear, NULL, NULL);
    group->gear = (struct nccl_gear){0};
    if (!nccl_endings_wait(shared, true, ABORT_LIMIT_MS) && err) {
        char why[ERR_TEXT_MAX];
        memcpy(why, err->text, sizeof why);
        rc = err_set(err, rc, "%.350s; and NCCL's abort has not returned within %u ms", why, ABORT_LIMIT_MS);
    }
    return rc;
}
