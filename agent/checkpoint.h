/* Loads a Hugging Face checkpoint folder (config.json, model.safetensors or sharded with an index) into regions.
 *
 * Tensors are expert or dense by their names and shapes: `...layers.L.<anything>.experts.E.<part>.weight`.  Fuse
 * recipes of design section 7: the gate and up projections of an expert become one part "w13" (gate rows, then up rows,
 * [2I, H]), the down projection "w2" ([H, I]); dense tensors are packed into one dense region, each aligned to 256 bytes.
 * Block scales (`...<part>.weight_scale_inv`) become parts "w13_scale_inv" and "w2_scale_inv" in the same way.
 * Only the bytes that this rank needs are read, by several threads at once.  Worker thread. */
#ifndef EEP_AGENT_CHECKPOINT_H
#define EEP_AGENT_CHECKPOINT_H

#include "agent/weights.h"

struct checkpoint;
int checkpoint_open(const char *dir, struct checkpoint **ret_checkpoint, struct err *err) MUST_CHECK;
void checkpoint_close(struct checkpoint *c);
uint32_t checkpoint_layers(const struct checkpoint *c);  /* MoE layers */
uint32_t checkpoint_experts(const struct checkpoint *c); /* per layer */
/* The manifest of the loader's layout with this many slots per rank; config is config.json as it is. */
int checkpoint_manifest(const struct checkpoint *c, uint32_t slots, struct manifest *ret_m, struct err *err) MUST_CHECK;
/* All dense tensors, and expert held[layer][slot] (map at `rank`) into its slot.  Sets the digests of what it loaded in
 * w->model.  progress may be NULL; a true return cancels (ERR_ABORTED); it is also called while nothing comes from the
 * disk.  Buffers for a GPU (up to 64 MiB of pinned memory) are freed at the end. */
int checkpoint_load(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank,
                    bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err) MUST_CHECK;
/* How many threads read, at most 8; 0 (at first): as many as there are processors, from 4 to 8. */
void checkpoint_readers_set(struct checkpoint *c, unsigned n);
/* Bytes of tensors that loads have read from the files so far. */
uint64_t checkpoint_bytes_read(const struct checkpoint *c);
#endif
