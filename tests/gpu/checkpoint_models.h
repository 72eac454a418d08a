/* The tensors of two real checkpoints: names, dtypes and shapes as published, for an instrument that writes folders of
 * their size.  Pure. */
#ifndef EEP_TESTS_CHECKPOINT_MODELS_H
#define EEP_TESTS_CHECKPOINT_MODELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct model_tensor {
    char name[96];
    const char *dtype; /* "BF16", "F8_E4M3", "F32" */
    uint32_t dims;
    uint64_t shape[2];
    uint64_t bytes;
};

/* How much of a model is wanted; fields that are 0 are the model's own.  dense_layers: UINT32_MAX for the model's own. */
struct model_cut {
    uint32_t layers, experts, dense_layers;
    uint64_t vocabulary;
};

struct model_list {
    struct model_tensor *tensors; /* in the order of the layers */
    size_t n;
    uint64_t bytes, expert_bytes, dense_bytes;
    struct model_cut cut; /* with the model's own where it was 0 */
};

/* NULL-terminated names for help texts: "qwen3-30b-a3b", "deepseek-v3". */
extern const char *const model_names[];
/* False, and one sentence in why, for an unknown model or a cut that it cannot have. */
bool model_list_make(const char *model, const struct model_cut *cut, struct model_list *ret_list, char why[200]);
void model_list_done(struct model_list *list);
/* config.json of the model as it was cut. */
void model_config_write(const char *model, const struct model_cut *cut, FILE *file);

#endif
