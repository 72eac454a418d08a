/* Uneven splits: how the tokens of an expert are shared out over its replicas, for no bytes at all.  Pure,
 * deterministic.
 *
 * With even shares the coldest rank that holds a replica gets as much of the expert as the hottest.  Here every
 * expert's load fills up the ranks that hold it like water, coldest first, given what they carry besides; in turn for
 * all experts until nothing changes, which lowers the sum of the squared loads to its least, and with it the highest.
 * The shares become whole numbers of entries, at most ENTRIES_MAX of an expert: what fits into the map of every engine.
 */
#ifndef EEP_COORDINATOR_SPLIT_H
#define EEP_COORDINATOR_SPLIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

/* Scratch, kept from layer to layer; all zero at first. */
struct split {
    uint32_t ranks, experts, samples;
    /* Experts that are on several ranks; the replicas of the nth are at[start[n]] up to at[start[n + 1]]. */
    uint32_t n, places, n_added;
    uint32_t *expert, *start, *order; /* order: of the n, heaviest first */
    uint32_t *first;                  /* [experts] */
    struct split_added *added;
    struct split_at {
        uint32_t rank, entries;
        size_t cell; /* of the map */
        double part; /* of the expert's load */
    } * at;
    const double *weight; /* [samples][experts], the caller's */
    double *scale;        /* [samples]: weight to load; 0 = a sample without load */
    double *load;         /* [samples][ranks], in means of the sample */
    struct split_base *base;
    double *fixed; /* [ranks] */
    size_t cap_ranks, cap_experts, cap_at, cap_samples;
};
void split_done(struct split *s);

/* A layer's map: entries into live, which says what is routed to before: at least one replica of everything on the
 * parties of `which`.  wake: what is held there but dormant may be routed to as well, and what gets nothing becomes
 * dormant.  Where that lowers the highest load (with samples: raises the mean of their balances) against even shares;
 * else all that is live has one entry.  0, or ERR_NOMEM with live as it was. */
struct split_map {
    uint32_t parties, slots, experts;
    const int32_t *held;  /* [parties * slots] */
    uint8_t *live;        /* the same */
    const uint8_t *which; /* [parties] */
    const double *weight; /* [samples][experts] */
    uint32_t samples;     /* at least 1 */
    bool wake;
};
int split_map(struct split *s, const struct split_map *map) MUST_CHECK;

/* For a search: begin, add every place where an expert may be, with the part that it gets at first; then
 * the highest load, in means, when all are shared out as well as can be, before that is made whole numbers.  It looks
 * no further when it is within the limit, or cannot be. */
int split_begin(struct split *s, uint32_t ranks, uint32_t experts, size_t places, const double *weight,
                uint32_t samples) MUST_CHECK; /* places: there will be at most so many */
void split_add(struct split *s, uint32_t expert, uint32_t rank, size_t cell, double part);
void split_fix(struct split *s, uint32_t expert, uint32_t rank, double part); /* a place that keeps its part */
void split_end(struct split *s);                                              /* all are added */
double split_highest(struct split *s, double limit);
/* The same in whole numbers: at[].entries.  live: of each cell, what gets one entry where there is no question. */
void split_round(struct split *s, const uint8_t *live);
/* The highest load now; of several samples one over the mean of their balances. */
double split_peak(const struct split *s);

#endif
