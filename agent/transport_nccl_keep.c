/* A communicator for the next group: the one that the last group has left, when the new parties are the same or fewer.
 *
 * Making a communicator takes NCCL a second and more, and a scale-down's parties are those of the operation before, or
 * a part of them.  All parties must do the same, so they say by a word what they still have, and by another one how
 * shrinking went; whenever one of them cannot, all make a new one.  Nothing here waits but by control_wait.  Worker
 * thread. */
#include <stdlib.h>
#include <string.h>

#include "agent/transport_nccl_internal.h"

#define WORD_KEY    0u /* what is kept: nccl_keep.key, 0 = nothing that will do */
#define WORD_SHRUNK 1u
#define SHRUNK      1u /* values of the second */
#define NOT_SHRUNK  2u
#define SLEEP_US    500u

static const struct nccl_party *party_find(const struct nccl_keep *keep, const struct nccl_party *who)
{
    for (uint32_t i = 0; i < keep->n; i++)
        if (keep->parties[i].incarnation == who->incarnation && strcmp(keep->parties[i].id, who->id) == 0)
            return &keep->parties[i];
    return NULL;
}

/* Whether what is kept will do for the group's parties, whose ranks in it are noted. */
static bool keep_fits(struct transport_group *group, const struct nccl_keep *keep)
{
    struct nccl_keep *who = &group->who;
    if (who->n > keep->n || (who->n < keep->n && !NCCL_HAS_SHRINK(&group->nccl->shared->library)))
        return false;
    for (uint32_t i = 0; i < who->n; i++) {
        const struct nccl_party *p = party_find(keep, &who->parties[i]);
        if (!p)
            return false;
        who->parties[i].rank = p->rank;
    }
    return true;
}

/* Ranks of the parent that are no parties; the others move up. */
static int shrink_ranks(struct transport_group *group, const struct nccl_keep *parent, int *ret_excluded)
{
    bool stays[RANKS_MAX] = {0};
    uint32_t rank[RANKS_MAX] = {0}, next = 0;
    int n = 0;
    for (uint32_t i = 0; i < group->who.n; i++)
        stays[group->who.parties[i].rank] = true;
    for (uint32_t r = 0; r < parent->n; r++) {
        if (stays[r])
            rank[r] = next++;
        else
            ret_excluded[n++] = (int)r;
    }
    for (uint32_t i = 0; i < group->who.n; i++)
        group->who.parties[i].rank = rank[group->who.parties[i].rank];
    return n;
}

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 3)
/* 1: it is there; 0: NCCL could not, here or at another party; negative: a party or the caller has ended. */
static int shrink_settle(struct transport_group *group, ncclComm_t comm, const struct transport_call *call,
                         struct err *err)
{
    const struct nccl_library *nccl = &group->nccl->shared->library;
    for (;;) {
        ncclResult_t state = ncclSuccess;
        if (!comm || nccl->ncclCommGetAsyncError(comm, &state) != ncclSuccess ||
            (state != ncclSuccess && state != ncclInProgress) ||
            control_word_said(group->control, WORD_SHRUNK, NOT_SHRUNK))
            return 0;
        if (state == ncclSuccess)
            return 1;
        int rc = control_wait(group->control, SLEEP_US, call, err);
        if (rc < 0)
            return rc;
    }
}

static int shrink(struct transport_group *group, const struct nccl_kept *kept, ncclComm_t *ret_comm,
                  const struct transport_call *call, struct err *err)
{
    const struct nccl_library *nccl = &group->nccl->shared->library;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    int excluded[RANKS_MAX], n = shrink_ranks(group, &kept->who, excluded);
    ncclResult_t result = nccl->ncclCommShrink(kept->gear.comm, excluded, n, ret_comm, &config, NCCL_SHRINK_DEFAULT);
    if (result != ncclSuccess && result != ncclInProgress)
        return 0;
    int rc = shrink_settle(group, kept->gear.comm, call, err); /* the parent's state is that of the shrinking */
    return rc > 0 ? shrink_settle(group, *ret_comm, call, err) : rc;
}
#else
static int shrink(struct transport_group *group, const struct nccl_kept *kept, ncclComm_t *ret_comm,
                  const struct transport_call *call, struct err *err)
{
    int excluded[RANKS_MAX];
    (void)ret_comm, (void)call, (void)err;
    return shrink_ranks(group, &kept->who, excluded) <
           0; /* not in this build: keep_fits does not let it come to this */
}
#endif

/* Only a communicator goes; its connections have done their part. */
static void comm_drop(struct nccl_shared *shared, ncclComm_t comm)
{
    if (comm)
        nccl_ending_start(shared, &(struct nccl_gear){.comm = comm}, NULL, NULL);
}

/* All parties have it, and nobody lets go before all have said so. */
static int inherit_shrunk(struct transport_group *group, struct nccl_kept *kept, const struct transport_call *call,
                          struct err *err)
{
    struct nccl_shared *shared = group->nccl->shared;
    uint64_t words[RANKS_MAX];
    ncclComm_t comm = NULL;
    int rc = shrink(group, kept, &comm, call, err);
    bool done = rc > 0;
    if (rc >= 0)
        rc = control_word(group->control, WORD_SHRUNK, done ? SHRUNK : NOT_SHRUNK, words, call, err);
    for (uint32_t i = 0; i < group->n && rc == 0; i++)
        done = done && words[i] == SHRUNK;
    if (rc == 0 && done) {
        group->gear = kept->gear;
        group->gear.comm = comm;
        group->nccl->counts.shrunk++;
        comm_drop(shared, kept->gear.comm);
        free(kept);
        return 0;
    }
    comm_drop(shared, comm);
    nccl_kept_drop(shared, kept);
    return rc;
}

int nccl_group_inherit(struct transport_group *group, const struct transport_call *call, struct err *err)
{
    struct nccl_shared *shared = group->nccl->shared;
    struct nccl_kept *kept = nccl_kept_take(shared);
    uint64_t words[RANKS_MAX], mine = kept && keep_fits(group, &kept->who) ? kept->who.key : 0;
    int rc = control_word(group->control, WORD_KEY, mine, words, call, err);
    bool all = rc == 0 && mine != 0;
    for (uint32_t i = 0; i < group->n && all; i++)
        all = words[i] == mine;
    if (!all) {
        nccl_kept_drop(shared, kept);
        for (uint32_t i = 0; i < group->n; i++)
            group->who.parties[i].rank = i;
        return rc;
    }
    control_close(kept->control, 0); /* everybody has taken theirs by now; those who are no parties let go of it */
    kept->control = NULL;
    if (group->n < kept->who.n) {
        rc = inherit_shrunk(group, kept, call, err);
    } else {
        group->gear = kept->gear;
        group->nccl->counts.reused++;
        free(kept);
    }
    if (!group->gear.comm)
        for (uint32_t i = 0; i < group->n; i++)
            group->who.parties[i].rank = i;
    return rc;
}
