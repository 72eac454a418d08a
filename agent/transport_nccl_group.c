/* Making a group: the parties connect beside NCCL, party 0 makes NCCL's unique id, all create the communicator without
 * blocking, and every pair exchanges a word, so that all connections are there before the first real transfer.
 *
 * NCCL's id is made here and not with the group's own secret (which the coordinator carries), because making it starts
 * a thread and a listener of NCCL that live until every party has come: an operation given up before that would leave
 * both behind.  It goes over connections on which each side has proved that it knows the group's secret.  It is in no
 * log, and wiped after use.  A communicator of the group before may serve instead: transport_nccl_keep.c.  Worker
 * thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/transport_nccl_internal.h"
#include "common/digest.h"

_Static_assert(sizeof(ncclUniqueId) == CONTROL_SECRET_BYTES, "the secret is NCCL's unique id");

static int group_gear(struct transport_group *group, struct err *err)
{
    const struct cuda_driver *cu = &group->nccl->shared->device->driver;
    struct nccl_gear *gear = &group->gear;
    int rc = cuda_check(cu, cu->cuStreamCreate(&gear->stream, CU_STREAM_NON_BLOCKING), err, "make a stream for NCCL");
    for (size_t i = 0; i < GROUPS_IN_FLIGHT && rc == 0; i++)
        rc = cuda_check(cu, cu->cuEventCreate(&gear->events[i], CU_EVENT_DISABLE_TIMING), err, "make an event");
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemAlloc(&gear->warm, 2 * sizeof(uint64_t) * group->n), err,
                        "allocate %u words on the GPU", 2 * group->n);
    return rc;
}

static int group_communicator(struct transport_group *group, const struct transport_call *call, struct err *err)
{
    const struct nccl_library *nccl = &group->nccl->shared->library;
    ncclUniqueId id;
    int rc = 0;
    if (group->self == 0)
        rc = nccl_check(nccl, NULL, nccl->ncclGetUniqueId(&id), err, "make NCCL's unique id");
    if (rc == 0)
        rc = control_secret(group->control, (uint8_t *)&id, call, err);
    if (rc < 0)
        return rc;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t result = nccl->ncclCommInitRankConfig(&group->gear.comm, (int)group->n, id, (int)group->self, &config);
    explicit_bzero(&id, sizeof id);
    rc = nccl_check(nccl, NULL, result, err, "create a communicator of %u parties", group->n);
    group->gpu_failed |= rc < 0;
    return rc == 0 ? nccl_settle(group, "create a communicator", call, err) : rc;
}

static uint64_t warm_word(uint32_t from, uint32_t to)
{
    return 0x6565700000000000u | (uint64_t)from << 20 | to;
}

/* Every pair exchanges a word, and looks whether it is the right one. */
static int group_warm(struct transport_group *group, const struct transport_call *call, struct err *err)
{
    const struct cuda_driver *cu = &group->nccl->shared->device->driver;
    uint32_t n = group->n;
    size_t row = sizeof(uint64_t) * n;
    uint64_t words[2 * RANKS_MAX] = {0};
    for (uint32_t i = 0; i < n; i++)
        words[i] = warm_word(group->self, i);
    struct nccl_ops ops;
    uint64_t received = 0;
    int rc = nccl_ops_init(&ops, n, err);
    uint8_t *at = (uint8_t *)(uintptr_t)group->gear.warm;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        if (i == group->self)
            continue;
        rc = nccl_ops_add(&ops, &(struct nccl_op){at + sizeof(uint64_t) * i, sizeof(uint64_t), i, 0, true}, err);
        if (rc == 0)
            rc = nccl_ops_add(&ops, &(struct nccl_op){at + row + sizeof(uint64_t) * i, sizeof(uint64_t), i, 0, false},
                              err);
    }
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemcpyHtoDAsync(group->gear.warm, words, 2 * row, group->gear.stream), err,
                        "fill the words of the first exchange");
    if (rc == 0)
        rc = nccl_run_batches(group, &ops, call, &received, err);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemcpyDtoHAsync(words, group->gear.warm + row, row, group->gear.stream), err,
                        "read the words of the first exchange");
    if (rc == 0)
        rc = cuda_check(cu, cu->cuStreamSynchronize(group->gear.stream), err, "read the words of the first exchange");
    for (uint32_t i = 0; i < n && rc == 0; i++)
        if (i != group->self && words[i] != warm_word(i, group->self))
            rc =
                err_set(err, ERR_CORRUPT, "the first exchange over NCCL brought wrong bytes from party %u of %u", i, n);
    nccl_ops_done(&ops);
    return rc;
}

static int group_make(struct transport_group *group, const struct transport_call *call, struct err *err)
{
    control_begin(group->control, "creating the group");
    for (uint32_t i = 0; i < group->n; i++)
        control_watch(group->control, i);
    int rc = nccl_group_inherit(group, call, err);
    bool inherited = group->gear.comm != NULL;
    if (rc == 0 && !inherited)
        rc = group_gear(group, err);
    if (rc == 0 && !inherited && group->n > 1) {
        rc = group_communicator(group, call, err);
        group->nccl->counts.made += rc == 0;
    }
    if (rc == 0 && group->n > 1)
        rc = group_warm(group, call, err);
    if (rc == 0)
        rc = control_finish(group->control, call, err);
    return rc;
}

/* For keeping: the key is made of the group's id, which no other group has, and tells nothing of it. */
static void group_who(struct transport_group *group, const struct blob *id, const struct member *parties)
{
    struct nccl_keep *who = &group->who;
    *who = (struct nccl_keep){.ms = group->nccl->keep_ms, .n = group->n};
    if (id && group->n > 1)
        who->key = digest_bytes(id->data, id->len, group->n) | 1;
    for (uint32_t i = 0; i < group->n && i < RANKS_MAX; i++) {
        who->parties[i].incarnation = parties[i].incarnation;
        snprintf(who->parties[i].id, sizeof who->parties[i].id, "%s", parties[i].id);
    }
}

int nccl_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                      uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                      struct err *err)
{
    struct transport_nccl *nccl = (struct transport_nccl *)self;
    int rc = nccl_endings_check(nccl->shared, err); /* what does not end could still write into our slots */
    if (rc == 0)
        rc = cuda_device_use(nccl->shared->device, err);
    if (rc < 0)
        return rc;
    struct transport_group *group = calloc(1, sizeof *group);
    if (!group)
        return err_set(err, ERR_NOMEM, "out of memory");
    *group = (struct transport_group){.nccl = nccl, .n = n, .self = self_party};
    group_who(group, id, parties);
    rc = control_open(nccl->mesh, id, parties, n, self_party, call, &group->control, err);
    if (rc < 0) {
        free(group);
        return rc;
    }
    rc = group_make(group, call, err);
    if (rc < 0) {
        rc = nccl_group_fail(group, rc, err);
        free(group);
        return rc;
    }
    *ret_group = group;
    return 0;
}

void nccl_group_destroy(struct transport_group *group)
{
    if (!group)
        return;
    if (!group->broken) {
        control_end(group->control);
        nccl_ending_start(group->nccl->shared, &group->gear, group->control, &group->who);
    }
    free(group);
}
