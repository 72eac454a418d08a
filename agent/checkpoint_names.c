/* Tells experts from dense weights, by names and shapes alone: no model family is known here.
 *
 *   <prefix>.layers.L.<anything>.experts.E.<part>.weight             one piece of expert E
 *   <prefix>.layers.L.<anything>.experts.E.<part>.weight_scale_inv   the scales of its blocks
 *   everything without a component "experts"                 dense
 *   anything else with a component "experts"                 refused: a layout that this loader would get wrong
 *
 * MoE layers are numbered from 0 in the order of L; layers without experts do not count.  Worker thread. */
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint_internal.h"

/* What checkpoints call the pieces. */
static const struct {
    const char *name;
    enum piece piece;
} piece_table[] = {
    {"gate_proj", PIECE_GATE}, {"w1", PIECE_GATE},        {"up_proj", PIECE_UP},
    {"w3", PIECE_UP},          {"down_proj", PIECE_DOWN}, {"w2", PIECE_DOWN},
};
static const char *const piece_names[PIECES] = {
    "gate projection",
    "up projection",
    "down projection",
    "weight_scale_inv of the gate projection",
    "weight_scale_inv of the up projection",
    "weight_scale_inv of the down projection",
};

/* A tensor that is a piece of an expert. */
struct found {
    const struct safetensors_tensor *tensor;
    size_t prefix; /* length of the name up to "experts" */
    uint32_t layer, expert;
    enum piece piece;
};

struct word {
    const char *at;
    size_t len;
};

static bool word_is(struct word w, const char *text)
{
    return w.len == strlen(text) && memcmp(w.at, text, w.len) == 0;
}

static bool word_number(struct word w, uint32_t *ret_number)
{
    if (w.len == 0 || w.len > 6 || (w.len > 1 && w.at[0] == '0'))
        return false;
    uint32_t number = 0;
    for (size_t i = 0; i < w.len; i++) {
        if (w.at[i] < '0' || w.at[i] > '9')
            return false;
        number = number * 10 + (uint32_t)(w.at[i] - '0');
    }
    *ret_number = number;
    return true;
}

#define WORDS_MAX 32

static size_t words_split(const char *name, struct word *ret_words)
{
    size_t n = 0;
    while (n < WORDS_MAX) {
        size_t len = strcspn(name, ".");
        ret_words[n++] = (struct word){name, len};
        if (name[len] == '\0')
            break;
        name += len + 1;
    }
    return n;
}

enum name_kind { NAME_DENSE, NAME_EXPERT, NAME_STRANGE };

static enum name_kind name_parse(const struct safetensors_tensor *t, struct found *ret_found)
{
    struct word words[WORDS_MAX];
    size_t n = words_split(t->name, words), layers = n, experts = n;
    for (size_t i = 0; i < n; i++) {
        if (word_is(words[i], "layers") && layers == n)
            layers = i;
        if (word_is(words[i], "experts"))
            experts = i;
    }
    if (experts == n)
        return NAME_DENSE;
    struct found f = {.tensor = t};
    if (layers + 1 >= experts || experts + 4 != n)
        return NAME_STRANGE;
    bool scale = word_is(words[experts + 3], "weight_scale_inv");
    if ((!scale && !word_is(words[experts + 3], "weight")) || !word_number(words[layers + 1], &f.layer) ||
        !word_number(words[experts + 1], &f.expert))
        return NAME_STRANGE;
    f.prefix = (size_t)(words[experts].at - t->name);
    for (size_t i = 0; i < sizeof piece_table / sizeof piece_table[0]; i++)
        if (word_is(words[experts + 2], piece_table[i].name)) {
            f.piece = piece_table[i].piece + (scale ? PIECE_GATE_SCALE - PIECE_GATE : 0);
            *ret_found = f;
            return NAME_EXPERT;
        }
    return NAME_STRANGE;
}

static int found_compare(const void *a, const void *b)
{
    const struct found *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    if (x->expert != y->expert)
        return x->expert < y->expert ? -1 : 1;
    return x->piece < y->piece ? -1 : x->piece > y->piece;
}

/* ---- one layer: found[0 .. n) sorted by expert and piece ---- */

static int layer_complete(const struct checkpoint *c, const struct found *found, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++) {
        const struct found *f = &found[i];
        if (f->prefix != found->prefix || memcmp(f->tensor->name, found->tensor->name, f->prefix) != 0)
            return err_set(err, ERR_UNSUPPORTED, "%s: layer %u has two sets of experts, \"%s\" and \"%s\"", c->dir,
                           f->layer, found->tensor->name, f->tensor->name);
        if (i > 0 && found_compare(f - 1, f) == 0)
            return err_set(err, ERR_INVALID, "%s: tensors \"%s\" and \"%s\" are the same part of one expert", c->dir,
                           f[-1].tensor->name, f->tensor->name);
        uint32_t expert = (uint32_t)(i / c->n_pieces);
        enum piece piece = (enum piece)(i % c->n_pieces);
        if (f->expert != expert || f->piece != piece)
            return err_set(err, ERR_INVALID, "%s: layer %u: expert %u has no %s", c->dir, f->layer, expert,
                           piece_names[piece]);
    }
    if (n % c->n_pieces != 0)
        return err_set(err, ERR_INVALID, "%s: layer %u: expert %zu has no %s", c->dir, found->layer, n / c->n_pieces,
                       piece_names[n % c->n_pieces]);
    return 0;
}

static bool is_matrix(const struct safetensors_tensor *t, uint64_t rows, uint64_t columns, const char *dtype)
{
    return t->dims == 2 && t->shape[0] == rows && t->shape[1] == columns && strcmp(t->dtype, dtype) == 0;
}

/* Every expert of a layer has the shapes of its first: gate and up [I, H], down [H, I]; scales of gate and up alike,
 * and as many rows of them as divide I, because those of gate and up lie one under the other. */
static int layer_shapes(const struct checkpoint *c, const struct found *found, size_t n, struct err *err)
{
    const struct safetensors_tensor *first = found->tensor;
    uint64_t inner = first->shape[0], hidden = first->shape[1];
    if (first->dims != 2 || inner == 0 || hidden == 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: layer %u: \"%s\" is no matrix", c->dir, found->layer, first->name);
    for (uint32_t piece = PIECE_GATE_SCALE; piece < c->n_pieces; piece++) {
        const struct safetensors_tensor *t = found[piece].tensor;
        if (t->dims != 2 || t->shape[0] == 0 || t->shape[1] == 0 ||
            (piece != PIECE_DOWN_SCALE && inner % t->shape[0] != 0))
            return err_set(err, ERR_UNSUPPORTED, "%s: layer %u: \"%s\" is no matrix of scales of whole blocks", c->dir,
                           found->layer, t->name);
    }
    for (size_t i = 0; i < n; i++) {
        const struct found *f = &found[i];
        const struct safetensors_tensor *like = first;
        uint64_t rows = inner, columns = hidden;
        if (f->piece == PIECE_DOWN)
            rows = hidden, columns = inner;
        if (f->piece >= PIECE_GATE_SCALE) {
            like = found[f->piece == PIECE_DOWN_SCALE ? PIECE_DOWN_SCALE : PIECE_GATE_SCALE].tensor;
            rows = like->shape[0], columns = like->shape[1];
        }
        if (!is_matrix(f->tensor, rows, columns, like->dtype))
            return err_set(err, ERR_INVALID,
                           "%s: layer %u: the %s of expert %u (\"%s\") is not [%llu, %llu] %s, as \"%s\" demands",
                           c->dir, f->layer, piece_names[f->piece], f->expert, f->tensor->name,
                           (unsigned long long)rows, (unsigned long long)columns, like->dtype, like->name);
    }
    return 0;
}

/* ---- all layers ---- */

static int layers_check(struct checkpoint *c, const struct found *found, size_t n, struct err *err)
{
    uint32_t first_layer = n > 0 ? found->layer : 0;
    for (size_t from = 0; from < n;) {
        size_t to = from;
        while (to < n && found[to].layer == found[from].layer)
            to++;
        int rc = layer_complete(c, found + from, to - from, err);
        if (rc == 0)
            rc = layer_shapes(c, found + from, to - from, err);
        if (rc < 0)
            return rc;
        uint32_t experts = (uint32_t)((to - from) / c->n_pieces);
        if (c->layers == 0)
            c->experts = experts;
        if (experts != c->experts)
            return err_set(err, ERR_INVALID, "%s: layer %u has %u experts, but layer %u has %u", c->dir,
                           found[from].layer, experts, first_layer, c->experts);
        c->layers++;
        from = to;
    }
    if (c->layers == 0)
        return err_set(err, ERR_UNSUPPORTED,
                       "%s: no tensor is named ...layers.L....experts.E.<part>.weight; "
                       "this is no mixture-of-experts checkpoint that this loader knows",
                       c->dir);
    return 0;
}

int checkpoint_classify(struct checkpoint *c, struct err *err)
{
    struct found *found = calloc(c->n_all + 1, sizeof *found);
    c->dense = calloc(c->n_all + 1, sizeof *c->dense);
    c->pieces = calloc(c->n_all + 1, sizeof *c->pieces);
    size_t n = 0;
    bool scaled = false;
    int rc = 0;
    if (!found || !c->dense || !c->pieces)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < c->n_all && rc == 0; i++)
        switch (name_parse(c->all[i], &found[n])) {
        case NAME_DENSE:
            c->dense[c->n_dense++] = c->all[i];
            break;
        case NAME_EXPERT:
            scaled = scaled || found[n].piece >= PIECE_GATE_SCALE;
            n++;
            break;
        case NAME_STRANGE:
            rc =
                err_set(err, ERR_UNSUPPORTED,
                        "%s: tensor \"%s\" belongs to experts, but is not named ...layers.L....experts.E.<part>.weight "
                        "with a part that this loader knows",
                        c->dir, c->all[i]->name);
            break;
        }
    c->n_pieces = scaled ? PIECES : PIECE_GATE_SCALE;
    c->n_recipes = scaled ? RECIPES_MAX : RECIPES_MAX / 2;
    if (rc == 0 && n > 0)
        qsort(found, n, sizeof *found, found_compare);
    if (rc == 0)
        rc = layers_check(c, found, n, err);
    /* Complete and sorted: found[] is [layers][experts][n_pieces]. */
    for (size_t i = 0; i < n && rc == 0; i++)
        c->pieces[i] = found[i].tensor;
    free(found);
    return rc;
}
