/* The tensors of real checkpoints: names, dtypes and shapes as published, for an instrument that writes folders of
 * their size or, as sparse files, only their headers.  Pure. */
#ifndef EEP_TESTS_CHECKPOINT_MODELS_H
#define EEP_TESTS_CHECKPOINT_MODELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* ---- tables (checkpoint_tables.c) ---- */

#define MODEL_DIMS 4
#define N_EXPERTS  UINT64_MAX       /* as a dimension: the number of experts */
#define N_WORDS    (UINT64_MAX - 1) /* the vocabulary */
#define MODEL_ROWS 48

/* Where a tensor is: once before or after the layers, in every layer, in those without or with experts, once for each
 * expert, or in the layers for multi-token prediction beside what every layer with experts has. */
enum model_place { AT_TOP = 1, AT_END, AT_LAYER, AT_DENSE, AT_MOE, AT_EXPERT, AT_MTP };

struct model_row {
    enum model_place place;     /* 0 ends the table */
    const char *name;           /* in a layer: after "...layers.L."; of an expert: after "experts.E." */
    const char *dtype;          /* "FP8": F8_E4M3, and F32 scales of blocks of 128 x 128 beside it */
    uint64_t shape[MODEL_DIMS]; /* up to the first 0 */
};

struct model_cut {
    uint32_t layers, experts, dense_layers, mtp_layers;
    uint64_t vocabulary;
};

struct model_table {
    const char *name, *type;
    const char *stack;       /* "model.layers." */
    const char *experts;     /* "mlp.experts."; NULL: fused ones, which are named in rows AT_MOE */
    const char *experts_key; /* of config.json */
    bool nested;             /* in "text_config", as transformers 5 writes it */
    uint64_t hidden;
    struct model_cut own;
    struct model_row rows[MODEL_ROWS];
};
extern const struct model_table model_tables[]; /* ended by a NULL name */

/* ---- lists ---- */

struct model_tensor {
    char name[104];
    const char *dtype; /* as in safetensors */
    uint32_t dims;
    uint64_t shape[MODEL_DIMS];
    uint64_t bytes;
};

/* In a cut, fields that are 0 are the model's own; dense_layers and mtp_layers: UINT32_MAX for the model's own. */
struct model_list {
    struct model_tensor *tensors; /* in the order of the layers */
    size_t n;
    uint64_t bytes, expert_bytes, dense_bytes, mtp_bytes; /* expert: of one in one layer; dense: without mtp */
    struct model_cut cut;                                 /* with the model's own where it was 0 */
};

/* False, and one sentence in why, for an unknown model or a cut that it cannot have. */
bool model_list_make(const char *model, const struct model_cut *cut, struct model_list *ret_list, char why[400]);
void model_list_done(struct model_list *list);
/* config.json of the model as it was cut. */
void model_config_write(const char *model, const struct model_cut *cut, FILE *file);
/* "qwen3-30b-a3b, deepseek-v3 or ..." */
void model_names_text(char *text, size_t size);

#endif
