/* The nouns that coordinator, agent and simulator share: members, expert maps, views, models, plans.
 *
 * All of them are immutable once shared, and reference counted (atomically, because a worker thread
 * may hold a plan while the loop lets go of it).  Pure data: no sockets, clocks, protobuf or logs. */
#ifndef EEP_COMMON_TOPOLOGY_H
#define EEP_COMMON_TOPOLOGY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define AGENT_ID_MAX 64    /* bytes with the terminating NUL; [A-Za-z0-9._-]+ */
#define ADDRESS_MAX 128    /* "host:port" or "unix:/path" */
#define ENDPOINT_MAX 256   /* opaque to us: what a router needs to reach the engine */
#define RANKS_MAX 256      /* ranks of a view, parties of an operation */
#define NO_LIMIT UINT64_MAX
#define ENTRIES_MAX 64     /* of an expert in logical_to_physical_map, unless it has more replicas: then one for each */

/* One rank of a view, or one party of an operation. */
struct member {
    char id[AGENT_ID_MAX];
    uint64_t incarnation;          /* random, non-zero, one per process start */
    char address[ADDRESS_MAX];     /* the agent's peer listener (waves) */
    char data_address[ADDRESS_MAX];/* the host transport's listener */
    char endpoint[ENDPOINT_MAX];   /* the engine's own, opaque */
    uint32_t node;                 /* failure and bandwidth domain; equal = same host */
    bool serving;                  /* an engine is attached and takes part in steps */
    bool draining;                 /* a router sends no new request here */
};

/* Place in the list of this agent in this incarnation, or -1: another incarnation of an agent is somebody else. */
int member_find(const struct member *list, uint32_t n, const struct member *who);

/* What every slot of every layer holds, and which slots are routed to.
 * Shapes: held, live [layers][ranks * slots]; physical slot p = rank * slots + slot.
 * Invariant: live implies held >= 0; 0 <= held < logical or held == -1.
 *
 * A live replica gets live / (sum of live over its expert's replicas) of the expert's tokens: the engine's
 * logical_to_physical_map repeats its slot so many times, and the engine picks an entry at random.  All 1: even shares.
 * The sum is at most ENTRIES_MAX, or the number of replicas where that is more. */
struct expert_map {
    atomic_uint refs;
    uint32_t layers, logical, ranks, slots;
    uint64_t version; /* map_version */
    int32_t *held;    /* logical expert whose verified bytes lie there, or -1 */
    uint8_t *live;    /* entries, see above; 0: nothing is routed to it, with held >= 0: dormant */
};

/* All slots empty.  NULL when out of memory. */
struct expert_map *expert_map_new(uint32_t layers, uint32_t logical, uint32_t ranks, uint32_t slots);
struct expert_map *expert_map_copy(const struct expert_map *map); /* a new one with one reference */
struct expert_map *expert_map_ref(struct expert_map *map);        /* takes NULL */
void expert_map_unref(struct expert_map *map);                    /* takes NULL */
static inline size_t expert_map_at(const struct expert_map *m, uint32_t layer, uint32_t rank, uint32_t slot)
{
    return ((size_t)layer * m->ranks + rank) * m->slots + slot;
}
/* A new map whose rank i is rank from[i] of map, or empty where from[i] < 0: renumbering moves no data. */
struct expert_map *expert_map_select(const struct expert_map *map, const int32_t *from, uint32_t ranks);
/* Number of live replicas of an expert on ranks where serving[rank] (NULL: all). */
uint32_t expert_map_live_count(const struct expert_map *map, uint32_t layer, int32_t expert, const uint8_t *serving);
/* Experts, over all layers, without a live replica. */
uint64_t expert_map_missing(const struct expert_map *map);
/* 0 when shapes and invariants hold and every logical expert of every layer has a live replica, and not too many
 * entries, on ranks with serving[rank] (NULL: all ranks). */
int expert_map_validate(const struct expert_map *map, const uint8_t *serving, struct err *err) MUST_CHECK;
/* 64-bit fingerprint of shape and content (not of version): both sides of a wire compare it. */
uint64_t expert_map_digest(const struct expert_map *map);

/* The committed topology. */
struct view {
    atomic_uint refs;
    uint64_t epoch;            /* 0 while it is only proposed */
    uint64_t manifest_digest;
    uint64_t kv_bytes;         /* MIN over ranks of the KV cache bytes available; NO_LIMIT if nobody said */
    uint32_t n;                /* ranks */
    struct member *members;    /* [n], rank order */
    struct expert_map *map;    /* map->ranks == n */
};
struct view *view_new(uint32_t n); /* zeroed members, no map */
struct view *view_ref(struct view *view);
void view_unref(struct view *view);
struct view *view_copy(const struct view *view); /* shares the map */
int view_rank(const struct view *view, const char *id); /* rank of an agent, or -1; takes NULL */
/* Same agents, same incarnations, same order: a change between the two is a change of map only. */
bool view_same_members(const struct view *a, const struct view *b);

/* A byte string with a reference count. */
struct blob {
    atomic_uint refs;
    size_t len;
    uint8_t data[];
};
struct blob *blob_new(const void *data, size_t len);
struct blob *blob_ref(struct blob *blob);
void blob_unref(struct blob *blob);

/* What the weights are: the manifest (encoded; the cores never look inside) and their digests. */
struct model {
    atomic_uint refs;
    struct blob *manifest;      /* encoded struct manifest, see agent/manifest.h */
    uint64_t manifest_digest;
    uint32_t layers, logical, slots;
    uint64_t expert_bytes;      /* all parts of one expert of one layer */
    uint64_t dense_bytes;
    uint32_t n_dense;           /* dense regions */
    bool sealed;                /* filled by an engine, in a layout of its own: no checkpoint has its bytes */
    uint64_t *dense_digest;     /* [n_dense]; 0 = not known here */
    uint64_t *expert_digest;    /* [layers][logical]; 0 = not known here (a rank knows what it loaded) */
};
struct model *model_new(uint32_t layers, uint32_t logical, uint32_t slots, uint32_t n_dense);
struct model *model_ref(struct model *model);
void model_unref(struct model *model);
/* Fills the digests that `into` lacks from `from`.  ERR_CORRUPT, naming the expert, when both know one and
 * differ; ERR_CONFLICT when the manifests differ. */
int model_merge(struct model *into, const struct model *from, struct err *err) MUST_CHECK;

/* One expert of one layer from one slot to another.  Parties are positions in the operation's party list:
 * the old view's ranks first, in order, then the joiners. */
struct move {
    uint32_t layer, expert;
    uint32_t src, src_slot; /* party and slot; src == dst is a local copy */
    uint32_t dst, dst_slot;
    uint32_t round;         /* index into the plan's rounds */
    uint32_t dormant;       /* 1: not routed to when its round is done */
};

/* A slot that stops (a retire) or starts (a wake) being routed to in the map that is announced at the start of a round.
 * Round rounds_before begins with the commit, and the round after the last one is the end. */
struct retire {
    uint32_t layer, party, slot;
    uint32_t round;
};

/* A plan: the target over parties, and how to get there without losing a live replica.
 * Rounds 0 .. rounds_before-1 run before the commit, the others after it.  When somebody joins, round 0 fills only
 * joiners, which do not serve yet: no retire, no wake, no activation before the commit. */
struct plan {
    atomic_uint refs;
    uint32_t parties;
    struct expert_map *target;  /* over parties; what each slot holds and routes when all rounds are done */
    uint32_t n_moves, n_retires;
    struct move *moves;         /* sorted by round */
    struct retire *retires;     /* sorted by round */
    uint32_t rounds_before, rounds_after;
    /* reported, in arrivals (one expert of one layer arriving at a rank); see design: bounds */
    uint64_t bound_hard, bound_fill, arrivals_before, arrivals_after;
    uint32_t n_wakes;
    struct retire *wakes;       /* sorted by round */
    /* Not on the wire. */
    struct expert_map *at_commit; /* over parties: the entries that the commit's map has; NULL: one for each replica */
    uint64_t bound_balance;
    /* mean over layers of the mean load of a rank over the highest */
    double balance_before, balance_at_commit, balance_after, balance_ceiling;
    /* of a window: the mean of its samples' balances now and at the end, 0 = there were none; planned for them jointly */
    double samples_before, samples_after;
    bool joint;
};
struct plan *plan_new(uint32_t parties, uint32_t n_moves, uint32_t n_retires);
struct plan *plan_ref(struct plan *plan);
void plan_unref(struct plan *plan);

#endif
