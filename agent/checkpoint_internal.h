/* What the files of the checkpoint loader share: checkpoint.c (files, index, config), checkpoint_names.c (which tensor
 * is what), checkpoint_layout.c (the manifest), checkpoint_load.c (the bytes)
 * with checkpoint_readers.c (the threads that read).  Worker thread. */
#ifndef EEP_AGENT_CHECKPOINT_INTERNAL_H
#define EEP_AGENT_CHECKPOINT_INTERNAL_H

#include "agent/checkpoint.h"
#include "agent/safetensors.h"

/* The pieces of an expert as checkpoints store them; the scales only where weights are quantised in blocks. */
enum piece { PIECE_GATE, PIECE_UP, PIECE_DOWN, PIECE_GATE_SCALE, PIECE_UP_SCALE, PIECE_DOWN_SCALE, PIECES };

/* The fuse recipes: a part of a slot is its pieces, one under the other. */
struct recipe {
    const char *part;
    enum piece pieces[2];
    uint32_t n;
};
#define RECIPES_MAX 4u
extern const struct recipe checkpoint_recipes[RECIPES_MAX];

struct checkpoint {
    char *dir;
    char *config; /* config.json, as it is */
    struct safetensors **files;
    size_t n_files;
    const struct safetensors_tensor **all; /* every tensor, borrowed from the files; by name */
    size_t n_all;
    const struct safetensors_tensor **dense; /* those that belong to no expert; by name */
    size_t n_dense;
    uint32_t layers, experts;
    const struct safetensors_tensor **pieces; /* [layers][experts][n_pieces] */
    uint32_t n_pieces;                        /* PIECES, or without the scales */
    uint32_t n_recipes;                       /* RECIPES_MAX, or without the scales */
    uint64_t bytes_read;
    unsigned n_readers; /* 0: as readers_start chooses */
};

static inline const struct safetensors_tensor *checkpoint_piece(const struct checkpoint *c, uint32_t layer,
                                                                uint32_t expert, enum piece piece)
{
    return c->pieces[((size_t)layer * c->experts + expert) * c->n_pieces + piece];
}

/* Splits c->all into dense and pieces, and checks that no expert lacks any.  checkpoint_names.c */
int checkpoint_classify(struct checkpoint *c, struct err *err) MUST_CHECK;

#endif
