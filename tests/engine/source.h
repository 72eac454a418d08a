/* The engine's own reading of a checkpoint folder: what it needs to fill a layout of its own.
 * The agent's loader is another thing, on purpose: an engine that seals owes it nothing.  Any one thread. */
#ifndef EEP_TESTS_ENGINE_SOURCE_H
#define EEP_TESTS_ENGINE_SOURCE_H

#include "agent/safetensors.h"
#include "tests/engine/decoder.h"

struct source {
    char *config; /* config.json as it is */
    struct decoder_config shape;
    struct safetensors **file;
    size_t n_files;
};
int source_open(const char *dir, struct source *ret_source, struct err *err) MUST_CHECK;
void source_done(struct source *s);
const struct safetensors_tensor *source_find(const struct source *s, const char *name); /* or NULL */
/* Tensors that belong to no expert, one after the other; NULL after the last. */
const struct safetensors_tensor *source_dense(const struct source *s, size_t *cursor);
/* One expert as the layout wants it; the buffers hold 2I * H and H * I elements. */
int source_expert(const struct source *s, enum decoder_layout layout, uint32_t layer, uint32_t expert,
                  uint16_t *ret_w13, uint16_t *ret_w2, struct err *err) MUST_CHECK;

#endif
