/* The weights of this rank: a manifest, the memory of its regions, and the digests to verify them by.
 * Worker thread, except where a function says otherwise. */
#ifndef EEP_AGENT_WEIGHTS_H
#define EEP_AGENT_WEIGHTS_H

#include "agent/manifest.h"
#include "agent/memory.h"

struct weights {
    struct memory_backend *memory;
    struct manifest manifest;
    struct memory_region *regions; /* [manifest.n_regions] */
    struct model *model;
};
/* Allocates every region of the model's manifest. */
int weights_allocate(struct memory_backend *memory, struct model *model, struct weights **ret_weights, struct err *err) MUST_CHECK;
/* The same with memory that is there already, one descriptor a region; those that were adopted are the weights' own and
 * become -1 in fds, also on failure. */
int weights_adopt(struct memory_backend *memory, struct model *model, int *fds, size_t n, struct weights **ret_weights, struct err *err) MUST_CHECK;
void weights_free(struct weights *w); /* takes NULL */

/* One run of bytes: what transports move and engines map. */
struct extent {
    struct memory_region *region;
    size_t offset, len;
};
/* The byte ranges of one expert slot, in manifest order; at most max.  Returns how many. */
size_t weights_slot(struct weights *w, uint32_t layer, uint32_t slot, struct extent *ret_extents, size_t max);
size_t weights_dense(struct weights *w, struct extent *ret_extents, size_t max);
#define SLOT_EXTENTS_MAX 16

/* Bytes [offset, offset + len) of a slot, part after part: out of the memory, and into it.  ERR_INVALID for a range or a
 * slot that is not there. */
int weights_slot_read(struct weights *w, uint32_t layer, uint32_t slot, uint64_t offset, void *ret_data, size_t len, struct err *err) MUST_CHECK;
int weights_slot_write(struct weights *w, uint32_t layer, uint32_t slot, uint64_t offset, const void *data, size_t len, struct err *err) MUST_CHECK;
uint64_t weights_slot_bytes(struct weights *w, uint32_t layer); /* 0: no such layer */

/* Many of them in one pass over the memory: a GPU is waited for once. */
struct weights_place {
    uint32_t layer, slot;
};
int weights_slot_digests(struct weights *w, const struct weights_place *places, size_t n, uint64_t *ret_digests, struct err *err) MUST_CHECK;
int weights_dense_digests(struct weights *w, uint64_t *ret_digests, struct err *err) MUST_CHECK; /* [n_dense] */

/* digest(slot) = sum over parts of the digest of the part's bytes, words counted on across the parts */
int weights_slot_digest(struct weights *w, uint32_t layer, uint32_t slot, uint64_t *ret_digest, struct err *err) MUST_CHECK;
/* In a model 0 stands for "not known", so a digest that happens to be 0 is kept as 1. */
static inline uint64_t weights_digest_known(uint64_t digest)
{
    return digest ? digest : 1;
}
int weights_dense_digest(struct weights *w, uint32_t dense_index, uint64_t *ret_digest, struct err *err) MUST_CHECK;
/* ERR_CORRUPT with layer, expert, slot when the slot does not hold `expert`. */
int weights_slot_verify(struct weights *w, uint32_t layer, uint32_t slot, uint32_t expert, struct err *err) MUST_CHECK;
/* The same for bytes that were digested as they came: `digest` is their sum. */
int weights_slot_check(const struct weights *w, uint32_t layer, uint32_t slot, uint32_t expert, uint64_t digest, struct err *err) MUST_CHECK;
int weights_dense_check(const struct weights *w, uint32_t dense_index, uint64_t digest, struct err *err) MUST_CHECK;

#endif
