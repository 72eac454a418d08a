/* The manifest: which regions of memory make up the weights of one rank.  Bytes, not formats.
 *
 *   dense region:  one run of bytes that every rank holds alike (dense_group: who may copy from whom)
 *   expert region: one part of one MoE layer: `slots` slots of `stride` bytes, the first `slot_bytes` of each in use;
 *                  an expert slot is the same slot number in all expert regions of its layer
 *   tensor:        a name for a range of a dense region or for the array of an expert region, for engines
 *
 * The encoding (manifest_encode) is canonical; its digest must be the same on all ranks.  Pure. */
#ifndef EEP_AGENT_MANIFEST_H
#define EEP_AGENT_MANIFEST_H

#include <stdbool.h>

#include "common/topology.h"

#define REGION_NAME_MAX 128
#define TENSOR_DIMS_MAX 6

enum region_kind { REGION_DENSE = 1, REGION_EXPERT };

struct region {
    enum region_kind kind;
    char name[REGION_NAME_MAX]; /* "dense", "layers.3.experts.w13" */
    uint64_t bytes;             /* of the whole region; expert: slots * stride */
    uint32_t layer;             /* expert: index among the MoE layers, 0-based */
    char part[32];              /* expert: "w13", "w2", or the engine's own word */
    uint32_t slots;
    uint64_t stride, slot_bytes;
    uint32_t dense_group;
};
struct tensor {
    char name[REGION_NAME_MAX * 2];
    uint32_t region;            /* index */
    uint64_t offset;            /* in the region */
    char dtype[16];             /* as in safetensors: "BF16", "F32", "F8_E4M3" ... */
    uint32_t dims;
    uint64_t shape[TENSOR_DIMS_MAX]; /* expert regions: of one slot */
};
#define MANIFEST_LOADER "loader" /* the producer whose bytes are those of a checkpoint */

struct manifest {
    char producer[64];          /* MANIFEST_LOADER or the engine's word: layouts of two producers never match by chance */
    uint32_t layers, logical, slots; /* MoE layers, experts per layer, slots per rank */
    uint32_t n_regions, n_tensors;
    struct region *regions;
    struct tensor *tensors;
    char *config;               /* the model's own description (config.json), for engines; may be NULL */
};
void manifest_done(struct manifest *m);
/* Every shape and range in bounds, expert regions complete for every layer, sizes without overflow. */
int manifest_validate(const struct manifest *m, struct err *err) MUST_CHECK;
int manifest_encode(const struct manifest *m, struct blob **ret_blob, struct err *err) MUST_CHECK;
/* Checks everything (the blob came over a wire); ERR_CORRUPT or ERR_LIMIT. */
int manifest_decode(const struct blob *blob, struct manifest *ret_m, struct err *err) MUST_CHECK;
uint64_t manifest_digest(const struct blob *blob);
uint64_t manifest_expert_bytes(const struct manifest *m); /* all parts of one expert of one layer */
uint64_t manifest_dense_bytes(const struct manifest *m);
/* A model of this manifest that knows no digests yet. */
int manifest_model(const struct manifest *m, struct model **ret_model, struct err *err) MUST_CHECK;

#endif
