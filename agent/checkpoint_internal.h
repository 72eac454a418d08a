/* What the files of the checkpoint loader share: checkpoint.c (files, index, config), checkpoint_names.c (which tensor
 * is what), checkpoint_load.c (the layout, and the bytes).  Worker thread. */
#ifndef EEP_AGENT_CHECKPOINT_INTERNAL_H
#define EEP_AGENT_CHECKPOINT_INTERNAL_H

#include "agent/checkpoint.h"
#include "agent/safetensors.h"

/* The pieces of an expert as checkpoints store them. */
enum piece { PIECE_GATE, PIECE_UP, PIECE_DOWN, PIECES };

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
    const struct safetensors_tensor **pieces; /* [layers][experts][PIECES] */
    uint64_t bytes_read;
};

static inline const struct safetensors_tensor *checkpoint_piece(const struct checkpoint *c, uint32_t layer,
                                                                uint32_t expert, enum piece piece)
{
    return c->pieces[((size_t)layer * c->experts + expert) * PIECES + piece];
}

/* Splits c->all into dense and pieces, and checks that no expert lacks any.  checkpoint_names.c */
int checkpoint_classify(struct checkpoint *c, struct err *err) MUST_CHECK;

#endif
