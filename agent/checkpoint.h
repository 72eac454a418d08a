/* Loads a Hugging Face checkpoint folder (config.json, model.safetensors or sharded with an index) into regions.
 *
 * Tensors are expert or dense by their names and shapes, no model family is known:
 * `...layers.L.<anything>.experts.E.<tail>` is a tensor of expert E, `...layers.L.<anything>.experts.<tail>` one of all
 * experts of that layer (its first dimension); the rest is dense, shared experts and leading dense layers too.  Layers
 * from num_hidden_layers of config.json on, and what "mtp..." names, is for multi-token prediction: apart, not loaded.
 *
 * Fuse recipes of design section 7: gate and up projection of an expert (gate_proj and up_proj, or w1 and w3) become
 * one part "w13" (gate rows, then up rows, [2I, H]), the down projection "w2" ([H, I]); what stands beside the weights
 * becomes parts in the same way ("w13_scale_inv" of weight_scale_inv, "w13_bias" of bias).  Any other tensor of an
 * expert is a part with the checkpoint's own name ("gate_up_proj_blocks"), with an expert's own bytes and shape.  Dense
 * tensors are packed into one dense region, each aligned to 256 bytes. Only the bytes that this rank needs are read, by
 * several threads at once.  Worker thread. */
#ifndef EEP_AGENT_CHECKPOINT_H
#define EEP_AGENT_CHECKPOINT_H

#include "agent/weights.h"

struct checkpoint;
int checkpoint_open(const char *dir, struct checkpoint **ret_checkpoint, struct err *err) MUST_CHECK;
void checkpoint_close(struct checkpoint *c);
uint32_t checkpoint_layers(const struct checkpoint *c);  /* MoE layers */
uint32_t checkpoint_experts(const struct checkpoint *c); /* per layer */

/* What is in the folder.  Strings and arrays are the checkpoint's own. */
struct checkpoint_info {
    const char *model_type;        /* of config.json; "" when it has none */
    uint32_t hidden_layers;        /* of config.json; 0 when it has none */
    const uint32_t *layer_numbers; /* [checkpoint_layers]: L of the names, ascending */
    size_t files;
    uint64_t bytes;        /* of all tensors */
    uint64_t expert_bytes; /* all parts of one expert of one layer; the largest, where layers differ */
    size_t dense_tensors;
    uint64_t dense_bytes;  /* without the gaps of the alignment */
    uint32_t apart_layers; /* for multi-token prediction: none of these is loaded */
    size_t apart_tensors;
    uint64_t apart_bytes;
};
void checkpoint_info(const struct checkpoint *c, struct checkpoint_info *ret_info);
/* The manifest of the loader's layout with this many slots per rank; config is config.json as it is. */
int checkpoint_manifest(const struct checkpoint *c, uint32_t slots, struct manifest *ret_m, struct err *err) MUST_CHECK;
/* Its digest: the same for whoever has that checkpoint and so many slots. */
int checkpoint_manifest_digest(const struct checkpoint *c, uint32_t slots, uint64_t *ret_digest, struct err *err) MUST_CHECK;
/* All dense tensors, and expert held[layer][slot] (map at `rank`) into its slot.  Sets the digests of what it loaded in
 * w->model.  progress may be NULL; a true return cancels (ERR_ABORTED); it is also called while nothing comes from the
 * disk.  Buffers for a GPU (up to 64 MiB of pinned memory) are freed at the end. */
int checkpoint_load(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank,
                    bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err) MUST_CHECK;
/* Bytes that such a load reads. */
uint64_t checkpoint_load_bytes(const struct checkpoint *c, const struct expert_map *map, uint32_t rank);
/* The experts of map->held[layer][slot] at `rank` alone, into regions that are there already; w->model must know their
 * digests and is not changed.  ERR_CORRUPT, naming the expert, when the file has another; what lies in the slots is void
 * after any error. */
int checkpoint_reload(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank,
                      bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err) MUST_CHECK;
uint64_t checkpoint_reload_bytes(const struct checkpoint *c, const struct expert_map *map, uint32_t rank);
/* Bytes [offset, offset + len) of one expert as a slot holds them, part after part; nothing is compared.  ERR_INVALID for
 * a range or an expert that is not there. */
int checkpoint_expert_read(const struct checkpoint *c, uint32_t layer, uint32_t expert, uint64_t offset, void *ret_data,
                           size_t len, struct err *err) MUST_CHECK;
uint64_t checkpoint_expert_bytes(const struct checkpoint *c, uint32_t layer);
/* How many threads read, at most 8; 0 (at first): as many as there are processors, from 4 to 8. */
void checkpoint_readers_set(struct checkpoint *c, unsigned n);
/* Bytes of tensors that loads have read from the files so far. */
uint64_t checkpoint_bytes_read(const struct checkpoint *c);
#endif
