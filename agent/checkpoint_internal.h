/* What the files of the checkpoint loader share: checkpoint.c (files, index), checkpoint_config.c (config.json),
 * checkpoint_names.c (what a tensor's name says), checkpoint_experts.c (that every expert is whole),
 * checkpoint_layout.c (the manifest), checkpoint_load.c (the bytes) with checkpoint_readers.c (the threads that read).
 * Worker thread. */
#ifndef EEP_AGENT_CHECKPOINT_INTERNAL_H
#define EEP_AGENT_CHECKPOINT_INTERNAL_H

#include <jansson.h>

#include "agent/checkpoint.h"
#include "agent/safetensors.h"

/* How many different tensors an expert can have. */
#define TAILS_MAX 32u

/* A tensor that every expert has, by the end of its name: after "experts.E.", or after "experts." where one tensor
 * holds all experts of a layer (fused: its first dimension counts them). */
struct tail {
    const char *text; /* borrowed from a tensor's name */
    bool fused;
};

/* A part of a slot: the tensors of one or two tails, one under the other. */
struct part {
    char name[32];
    uint32_t tails[2]; /* indices */
    uint32_t n;
};

/* What config.json says that the loader compares; 0 = nothing. */
struct checkpoint_config {
    char *text; /* as it is */
    char model_type[64];
    uint32_t hidden_layers, experts;
    char experts_key[32]; /* where the number of experts was found */
};

struct checkpoint {
    char *dir;
    struct checkpoint_config config;
    struct safetensors **files;
    size_t n_files;
    const struct safetensors_tensor **all; /* every tensor, borrowed from the files; by name */
    size_t n_all;
    const struct safetensors_tensor **dense; /* those that belong to no expert; by name */
    size_t n_dense;
    const struct safetensors_tensor **apart; /* those that are not loaded: layers for multi-token prediction */
    size_t n_apart;
    uint32_t apart_layers;
    uint32_t layers, experts;
    uint32_t *layer_numbers;                  /* [layers]: L of the names, ascending */
    const struct safetensors_tensor **pieces; /* [layers][experts][n_tails]; a fused one stands at all experts */
    struct tail tails[TAILS_MAX];
    uint32_t n_tails;
    struct part parts[SLOT_EXTENTS_MAX];
    uint32_t n_parts;
    uint64_t bytes_read;
    unsigned n_readers; /* 0: as readers_start chooses */
};

/* The bytes of one expert in a tensor, and their shape. */
struct piece {
    const struct safetensors_tensor *tensor;
    uint64_t from, bytes;
    uint32_t dims;
    const uint64_t *shape;
};

static inline struct piece checkpoint_piece(const struct checkpoint *c, uint32_t layer, uint32_t expert, uint32_t tail)
{
    const struct safetensors_tensor *t = c->pieces[((size_t)layer * c->experts + expert) * c->n_tails + tail];
    bool fused = c->tails[tail].fused;
    uint64_t bytes = fused ? t->bytes / c->experts : t->bytes;
    return (struct piece){
        .tensor = t,
        .from = fused ? expert * bytes : 0,
        .bytes = bytes,
        .dims = fused ? t->dims - 1 : t->dims,
        .shape = fused ? t->shape + 1 : t->shape,
    };
}

/* ---- JSON (checkpoint_config.c) ---- */
int checkpoint_config_read(const char *path, struct checkpoint_config *ret_config, struct err *err) MUST_CHECK;
void checkpoint_config_done(struct checkpoint_config *config);
/* A text file of at most max bytes without a NUL in it, and JSON of it that is an object without duplicate keys. */
int checkpoint_json_read(const char *path, size_t max, char **ret_text, json_t **ret_json, struct err *err) MUST_CHECK;

/* ---- names (checkpoint_names.c) ---- */
enum name_kind {
    NAME_DENSE,
    NAME_EXPERT, /* ...layers.L.<anything>.experts.E.<tail> */
    NAME_FUSED,  /* ...layers.L.<anything>.experts.<tail> */
    NAME_APART,  /* for multi-token prediction, by its name alone */
    NAME_STRANGE /* has a component "experts", and is none of these */
};
struct name {
    const struct safetensors_tensor *tensor;
    enum name_kind kind;
    bool has_layer;
    size_t stack; /* has_layer: length of the name up to and with "layers." */
    uint32_t layer;
    size_t prefix; /* expert, fused: length of the name up to and with "experts." */
    uint32_t expert;
    const char *tail;
    uint32_t tail_index; /* in c->tails */
};
struct name name_parse(const struct safetensors_tensor *t);
void checkpoint_tails_sort(struct checkpoint *c);
/* Makes c->parts from c->tails, which are sorted: w13 of gate and up, w2, and so on. */
int checkpoint_parts_make(struct checkpoint *c, struct err *err) MUST_CHECK;

/* Splits c->all into dense, apart and pieces, and checks that every expert is whole.  checkpoint_experts.c */
int checkpoint_classify(struct checkpoint *c, struct err *err) MUST_CHECK;

#endif
