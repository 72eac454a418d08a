/* One layer while the elastic planner works on it: which expert is routed to on which rank, and what each rank carries.
 * Pure.  Not for others; see planner.h.
 *
 * The state is a set of experts per final rank, at most `slots` of them.  Slots do not matter here: what a rank holds
 * now keeps its slot, and what arrives takes the slot of something that is not in the set.  So an expert in the set
 * costs an arrival exactly when the rank does not hold it now, and everything else is free.
 *
 * A replica of e carries weight[e] / count[e].  The search lowers the maximum load by way of phi, the sum of the
 * squared loads, because the change of phi by any of the changes below is known in O(1): heat[e] is the sum of the
 * loads of the ranks that e is on. */
#ifndef EEP_COORDINATOR_PLACE_H
#define EEP_COORDINATOR_PLACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define PLACE_NEVER 1e9 /* a cost that is not paid */

/* What it takes to have an expert on a rank. */
enum place_tier { TIER_HELD = 0, TIER_NODE, TIER_CROSS, TIERS };

struct place_step {
    uint16_t rank, expert;
    bool added;
};

struct place {
    uint32_t ranks, slots, experts, words; /* words of 64 bits in a mask over ranks */
    double cost[TIERS];                    /* 0, 1, X */
    double total, mean;                    /* of the weights; mean is total / ranks */
    double *weight;                        /* [experts] */
    double *share, *less, *more; /* [experts]: of a replica; what it gains, loses with one replica less, more */
    double *heat;                /* [experts] */
    double *load;                /* [ranks] */
    uint16_t *count;             /* [experts] replicas */
    uint16_t *item;              /* [ranks][slots]: the set of a rank, in no order */
    uint16_t *items;             /* [ranks]: its size */
    int32_t *room;               /* [ranks]: empty slots that no arrival has taken; below 0: overwritten */
    double crowd;                /* what an arrival costs more where there is no room */
    uint64_t *on;                /* [experts][words] */
    uint8_t *tier;               /* [experts][ranks] */
    uint16_t *kept, *n_kept;     /* [ranks][slots], [ranks]: what has TIER_HELD there */
    uint32_t arrivals;           /* (rank, expert) pairs in the sets that are not held now */
    struct place_step *log;      /* for place_rewind */
    size_t n_log, cap_log;
    bool rigid;    /* what is held and unique stays where it is */
    bool wide;     /* polishing looks at more ranks */
    bool swap;     /* polishing may replace arrivals */
    uint32_t over; /* polishing may overwrite what is held, up to so many arrivals */
    bool fills;    /* empty slots are to be filled anyway: an arrival there costs nothing */
    uint64_t work; /* candidates looked at: a measure of time that is the same everywhere */
    bool broken;   /* out of memory: the log is incomplete */
    struct split *split; /* shares may be uneven: scratch; NULL = they are even */
    double tried;        /* highest load in the state of the start, from which uneven shares were tried in vain; 0 = not */
};

int place_init(struct place *p, uint32_t ranks, uint32_t slots, uint32_t experts, double cross_cost,
               struct err *err) MUST_CHECK;
void place_done(struct place *p);

/* Empty sets, new weights; all tiers TIER_CROSS, no room.  The caller fills tier (TIER_HELD by place_hold) and room. */
void place_reset(struct place *p, const double *weight);

void place_hold(struct place *p, uint32_t rank, uint32_t expert);   /* is there from now on: TIER_HELD */
void place_add(struct place *p, uint32_t rank, uint32_t expert);    /* not on it yet; there is room */
void place_remove(struct place *p, uint32_t rank, uint32_t expert); /* on it */
void place_rewind(struct place *p, size_t n_log);                   /* undoes what came after */

static inline bool place_on(const struct place *p, uint32_t rank, uint32_t expert)
{
    return p->on[(size_t)expert * p->words + rank / 64] >> (rank % 64) & 1;
}

static inline enum place_tier place_tier(const struct place *p, uint32_t rank, uint32_t expert)
{
    return (enum place_tier)p->tier[(size_t)expert * p->ranks + rank];
}

/* The tier to reckon with. */
static inline enum place_tier place_price(const struct place *p, uint32_t rank, uint32_t expert)
{
    return p->fills && p->room[rank] > 0 ? TIER_HELD : place_tier(p, rank, expert);
}

static inline double place_cost(const struct place *p, uint32_t rank, uint32_t expert)
{
    enum place_tier tier = place_price(p, rank, expert);
    return p->cost[tier] + (tier != TIER_HELD && p->room[rank] <= 0 ? p->crowd : 0);
}

/* Nothing may arrive here. */
static inline bool place_closed(const struct place *p, uint32_t rank)
{
    return p->room[rank] <= 0 && p->crowd >= PLACE_NEVER;
}

static inline bool place_full(const struct place *p, uint32_t rank)
{
    return p->items[rank] == p->slots;
}

uint32_t place_hottest(const struct place *p);
double place_max(const struct place *p);
/* The highest load, or `limit` where that is less and uneven shares, over all that ranks hold or get, come within it. */
double place_peak(struct place *p, double limit);
double place_balance(const struct place *p); /* mean over maximum; 1 for a layer without load */

/* ---- changes of phi ---- */

static inline double phi_add(const struct place *p, uint32_t rank, uint32_t e)
{
    double dy = p->more[e], b = p->share[e] - dy; /* count >= 1 */
    return 2 * (b * p->load[rank] - dy * p->heat[e]) + b * b + p->count[e] * dy * dy;
}

static inline double phi_remove(const struct place *p, uint32_t rank, uint32_t e) /* count >= 2 */
{
    double a = p->share[e], dx = p->less[e];
    return 2 * (dx * (p->heat[e] - p->load[rank]) - a * p->load[rank]) + a * a + (p->count[e] - 1) * dx * dx;
}

static inline double phi_relocate(const struct place *p, uint32_t from, uint32_t to, double share)
{
    return 2 * share * (p->load[to] - p->load[from] + share);
}

/* x on a rank gives way to a further replica of y. */
double phi_replace(const struct place *p, uint32_t rank, uint32_t x, uint32_t y);
/* z on `to` is dropped, x comes there from `from`. */
double phi_evict_relocate(const struct place *p, uint32_t from, uint32_t to, uint32_t x, uint32_t z);

#endif
