/* What the engines' experts were asked for of late: samples of tokens per logical expert over a horizon.  Pure.
 *
 * Agents report windows of tokens per slot.  Windows are summed into samples of horizon / samples each; a sample in
 * which nothing was counted is not kept, so that an idle night does not make the load of the evening forgotten at once:
 * what is older than the horizon is dropped only when a newer sample is there.  Memory: samples x layers x experts
 * numbers. Nothing of it is durable: a restarted coordinator counts anew. */
#ifndef EEP_COORDINATOR_LOAD_H
#define EEP_COORDINATOR_LOAD_H

#include "common/msg.h"

#define LOAD_SAMPLES_MAX 64

struct load_sample {
    uint64_t begun_ns, ended_ns; /* of the windows in it */
    uint32_t windows;
    double total;
    double *tokens; /* [layers][logical] */
};

struct load_history {
    uint32_t layers, logical;
    uint32_t samples; /* kept at most, the newest included; 1 to LOAD_SAMPLES_MAX */
    uint64_t horizon_ns;
    uint32_t n; /* oldest first; the last one is still open */
    struct load_sample v[LOAD_SAMPLES_MAX];
};

void load_init(struct load_history *load, uint64_t horizon_ns, uint32_t samples);
void load_done(struct load_history *load);

/* The window of `rank` of the map that it was counted under.  Slots that hold nothing are left out.  Another shape than
 * that of the samples so far drops them.  False: it does not fit the map, or there is no memory; nothing has changed.
 */
bool load_add(struct load_history *load, const struct expert_map *map, uint32_t rank, const struct msg_load *window,
              uint64_t now_ns);

/* Samples that say something: an open one that has not half of the tokens of the one before is left out. */
uint32_t load_samples(const struct load_history *load);
/* [load_samples][layers][logical], each sample scaled to the mean of their totals, so that a busy one does not speak
 * louder when they are looked at together.  The caller frees it; NULL: no samples, or no memory. */
double *load_matrix(const struct load_history *load);
/* [layers][logical] tokens in all samples.  The caller frees it; NULL: nothing has been counted, or no memory. */
double *load_sum(const struct load_history *load);
/* Mean over layers of the mean load of a rank over the highest, of what is routed to in the map.  1 without load.
 * load is [layers][logical]. */
double load_balance(const struct expert_map *map, const double *load);

#endif
