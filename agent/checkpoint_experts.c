/* Puts every tensor where it belongs, and sees to it that every expert of every layer is whole: that all have the same
 * tensors, and within a layer of the same types and shapes.
 *
 * MoE layers are numbered from 0 in the order of L; layers without experts do not count.  Layers from num_hidden_layers
 * on, of the stack that has the experts, are apart: they are for multi-token prediction.  Worker thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint_internal.h"
#include "agent/dtype.h"

#define EXPERTS_MAX 1000000u

/* The tensors of experts. */
struct found {
    struct name *names;
    size_t n;
    size_t singles; /* without the fused ones */
    uint32_t n_single_tails;
};

static const char *tail_of(const struct checkpoint *c, const struct name *name)
{
    return c->tails[name->tail_index].text;
}

/* By layer; then the fused ones; then by expert and tail. */
static int found_compare(const void *a, const void *b)
{
    const struct name *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    if (x->kind != y->kind)
        return x->kind == NAME_FUSED ? -1 : 1;
    if (x->expert != y->expert)
        return x->expert < y->expert ? -1 : 1;
    return x->tail_index < y->tail_index ? -1 : x->tail_index > y->tail_index;
}

/* ---- dense, apart, experts ---- */

static int strange(const struct checkpoint *c, const struct safetensors_tensor *t, struct err *err)
{
    return err_set(err, ERR_UNSUPPORTED,
                   "%s: tensor \"%s\" belongs to experts, but is named neither ...layers.L....experts.E.<part> nor "
                   "...layers.L....experts.<part>",
                   c->dir, t->name);
}

/* The stack of layers that has experts: there is one. */
static int stack_find(const struct checkpoint *c, const struct name *names, const struct name **ret_stack,
                      struct err *err)
{
    const struct name *stack = NULL;
    for (size_t i = 0; i < c->n_all; i++) {
        const struct name *name = &names[i];
        if (name->kind == NAME_STRANGE)
            return strange(c, name->tensor, err);
        if (name->kind != NAME_EXPERT && name->kind != NAME_FUSED)
            continue;
        if (stack && (stack->stack != name->stack || memcmp(stack->tensor->name, name->tensor->name, name->stack) != 0))
            return err_set(err, ERR_UNSUPPORTED, "%s: two stacks of layers have experts, \"%s\" and \"%s\"", c->dir,
                           stack->tensor->name, name->tensor->name);
        stack = name;
    }
    if (!stack)
        return err_set(err, ERR_UNSUPPORTED,
                       "%s: no tensor is named ...layers.L....experts.E.<part> or ...layers.L....experts.<part>; "
                       "this is no mixture-of-experts checkpoint that this loader knows",
                       c->dir);
    *ret_stack = stack;
    return 0;
}

static bool is_beyond(const struct checkpoint *c, const struct name *name, const struct name *stack)
{
    return c->config.hidden_layers > 0 && name->has_layer && name->layer >= c->config.hidden_layers &&
           name->stack == stack->stack && memcmp(name->tensor->name, stack->tensor->name, stack->stack) == 0;
}

/* Keeps the experts in names[0 .. found.n), and their tails in c->tails. */
static int sort_out(struct checkpoint *c, struct found *found, struct err *err)
{
    const struct name *at = NULL;
    int rc = stack_find(c, found->names, &at, err);
    if (rc < 0)
        return rc;
    const struct name stack = *at; /* names move */
    uint32_t last = UINT32_MAX;
    for (size_t i = 0; i < c->n_all; i++) {
        struct name name = found->names[i];
        if (name.kind == NAME_APART || is_beyond(c, &name, &stack)) {
            c->apart[c->n_apart++] = name.tensor;
            c->apart_layers += name.has_layer && name.layer != last; /* sorted by name: those of a layer are together */
            last = name.has_layer ? name.layer : last;
        } else if (name.kind == NAME_DENSE) {
            c->dense[c->n_dense++] = name.tensor;
        } else {
            uint32_t k = 0;
            while (k < c->n_tails &&
                   (c->tails[k].fused != (name.kind == NAME_FUSED) || strcmp(c->tails[k].text, name.tail) != 0))
                k++;
            if (k == TAILS_MAX)
                return err_set(err, ERR_UNSUPPORTED, "%s: \"%s\": experts have more than %u different tensors", c->dir,
                               name.tensor->name, TAILS_MAX);
            if (k == c->n_tails)
                c->tails[c->n_tails++] = (struct tail){name.tail, name.kind == NAME_FUSED};
            found->singles += name.kind == NAME_EXPERT;
            found->names[found->n++] = name;
        }
    }
    return 0;
}

static void found_sort(struct checkpoint *c, struct found *found)
{
    checkpoint_tails_sort(c);
    for (size_t i = 0; i < found->n; i++) {
        struct name *name = &found->names[i];
        while (c->tails[name->tail_index].fused != (name->kind == NAME_FUSED) || strcmp(tail_of(c, name), name->tail))
            name->tail_index++;
    }
    qsort(found->names, found->n, sizeof *found->names, found_compare);
    for (uint32_t k = 0; k < c->n_tails; k++)
        found->n_single_tails += !c->tails[k].fused;
}

/* ---- every expert of every layer has every tail ---- */

/* A tail that most experts do not have is the odd one; else it is the one that lacks it. */
static int hole(const struct checkpoint *c, const struct found *found, const struct name *near, uint32_t expert,
                uint32_t tail, struct err *err)
{
    size_t have = 0, layers = 0;
    const struct name *one = NULL;
    for (size_t i = 0; i < found->n; i++) {
        layers += i == 0 || found->names[i].layer != found->names[i - 1].layer;
        have += found->names[i].tail_index == tail;
        if (found->names[i].tail_index == tail)
            one = &found->names[i];
    }
    if (one && have * 2 < layers * (c->tails[tail].fused ? 1 : c->experts))
        return err_set(err, ERR_INVALID, "%s: \"%s\": most experts have no tensor \"%s\"", c->dir, one->tensor->name,
                       c->tails[tail].text);
    if (c->tails[tail].fused)
        return err_set(err, ERR_INVALID, "%s: layer %u has no tensor \"%.*s%s\", as other layers have", c->dir,
                       near->layer, (int)near->prefix, near->tensor->name, c->tails[tail].text);
    return err_set(err, ERR_INVALID, "%s: layer %u: expert %u has no tensor \"%.*s%u.%s\"", c->dir, near->layer, expert,
                   (int)near->prefix, near->tensor->name, expert, c->tails[tail].text);
}

/* One layer's found[0 .. n): in this order, the fused tails, then each expert with its tails. */
static int layer_whole(const struct checkpoint *c, const struct found *found, const struct name *layer, size_t n,
                       struct err *err)
{
    size_t i = 0;
    for (size_t k = 1; k < n; k++) {
        const struct name *a = &layer[k - 1], *b = &layer[k];
        if (a->prefix != b->prefix || memcmp(a->tensor->name, b->tensor->name, a->prefix) != 0)
            return err_set(err, ERR_UNSUPPORTED, "%s: layer %u has two sets of experts, \"%s\" and \"%s\"", c->dir,
                           a->layer, a->tensor->name, b->tensor->name);
    }
    for (uint32_t tail = 0; tail < c->n_tails; tail++)
        if (c->tails[tail].fused && (i == n || layer[i].kind != NAME_FUSED || layer[i++].tail_index != tail))
            return hole(c, found, layer, 0, tail, err);
    for (uint32_t expert = 0; found->n_single_tails && expert < c->experts; expert++)
        for (uint32_t tail = 0; tail < c->n_tails; tail++) {
            if (c->tails[tail].fused)
                continue;
            if (i == n || layer[i].expert != expert || layer[i].tail_index != tail)
                return hole(c, found, layer, expert, tail, err);
            i++;
        }
    return 0; /* names are unique, so there is no other */
}

/* How many experts a layer has: those it numbers, or else the first dimension of its first fused tensor. */
static uint32_t layer_experts(const struct name *layer, size_t n)
{
    const struct name *last = &layer[n - 1];
    if (last->kind == NAME_EXPERT)
        return last->expert + 1;
    return last->tensor->dims > 0 && last->tensor->shape[0] <= EXPERTS_MAX ? (uint32_t)last->tensor->shape[0] : 0;
}

/* ---- shapes ---- */

static bool alike(const struct safetensors_tensor *a, const struct safetensors_tensor *b)
{
    return strcmp(a->dtype, b->dtype) == 0 && a->dims == b->dims &&
           memcmp(a->shape, b->shape, a->dims * sizeof a->shape[0]) == 0;
}

static const char *shape_text(const struct safetensors_tensor *t, char text[160])
{
    int n = snprintf(text, 160, "%s [", t->dtype);
    for (uint32_t d = 0; d < t->dims; d++)
        n += snprintf(text + n, (size_t)(160 - n), "%s%llu", d ? ", " : "", (unsigned long long)t->shape[d]);
    snprintf(text + n, (size_t)(160 - n), "]");
    return text;
}

static int unlike(const struct checkpoint *c, const struct safetensors_tensor *t, const struct safetensors_tensor *like,
                  const char *why, struct err *err)
{
    char a[160], b[160];
    return err_set(err, ERR_INVALID, "%s: \"%s\" is %s, but \"%s\" is %s; %s", c->dir, t->name, shape_text(t, a),
                   like->name, shape_text(like, b), why);
}

static int piece_shape(const struct checkpoint *c, const struct name *name, struct err *err)
{
    const struct safetensors_tensor *t = name->tensor;
    uint64_t bytes;
    if (t->bytes == 0)
        return err_set(err, ERR_INVALID, "%s: \"%s\" is empty", c->dir, t->name);
    if (name->kind != NAME_FUSED)
        return 0;
    if (t->dims == 0 || c->experts == 0)
        return err_set(err, ERR_INVALID, "%s: \"%s\" has no first dimension of 1 to %u experts", c->dir, t->name,
                       EXPERTS_MAX);
    if (t->shape[0] != c->experts)
        return err_set(err, ERR_INVALID,
                       "%s: the first dimension of \"%s\" is %llu, and not %u, the number of experts in a layer",
                       c->dir, t->name, (unsigned long long)t->shape[0], c->experts);
    if (!dtype_bytes(dtype_bits(t->dtype), t->dims - 1, t->shape + 1, &bytes))
        return err_set(err, ERR_UNSUPPORTED, "%s: an expert's share of \"%s\" is no whole number of bytes", c->dir,
                       t->name);
    return 0;
}

/* Within a layer experts are alike, and gate is like up where one part is made of them. */
static int layer_shapes(const struct checkpoint *c, const struct name *layer, size_t n, struct err *err)
{
    const struct safetensors_tensor *first[TAILS_MAX] = {NULL};
    for (size_t i = 0; i < n; i++) {
        const struct safetensors_tensor *t = layer[i].tensor, **at = &first[layer[i].tail_index];
        int rc = piece_shape(c, &layer[i], err);
        if (rc < 0)
            return rc;
        if (*at && !alike(t, *at))
            return unlike(c, t, *at, "the experts of a layer must be alike", err);
        *at = *at ? *at : t;
    }
    for (uint32_t i = 0; i < c->n_parts; i++) {
        const struct part *p = &c->parts[i];
        if (p->n == 2 && !alike(first[p->tails[1]], first[p->tails[0]]))
            return unlike(c, first[p->tails[1]], first[p->tails[0]], "gate and up projection must be alike", err);
    }
    return 0;
}

/* ---- all layers ---- */

static int layers_check(struct checkpoint *c, const struct found *found, struct err *err)
{
    for (size_t from = 0, to; from < found->n; from = to) {
        const struct name *layer = &found->names[from];
        for (to = from; to < found->n && found->names[to].layer == layer->layer;)
            to++;
        uint32_t experts = layer_experts(layer, to - from);
        if (c->layers == 0)
            c->experts = experts;
        if (experts != c->experts && found->n_single_tails)
            return err_set(err, ERR_INVALID, "%s: layer %u has %u experts, but layer %u has %u", c->dir, layer->layer,
                           experts, c->layer_numbers[0], c->experts);
        int rc = layer_whole(c, found, layer, to - from, err);
        if (rc == 0)
            rc = layer_shapes(c, layer, to - from, err);
        if (rc < 0)
            return rc;
        c->layer_numbers[c->layers++] = layer->layer;
    }
    if (c->layers == 0)
        return err_set(err, ERR_INVALID,
                       "%s: config.json says num_hidden_layers %u, and no layer below that has experts", c->dir,
                       c->config.hidden_layers);
    return 0;
}

/* Complete and sorted: fused tails first, then [experts][single tails] of each layer. */
static int pieces_fill(struct checkpoint *c, const struct found *found, struct err *err)
{
    c->pieces = calloc((size_t)c->layers * c->experts * c->n_tails + 1, sizeof *c->pieces);
    if (!c->pieces)
        return err_set(err, ERR_NOMEM, "out of memory");
    uint32_t layer = 0;
    for (size_t i = 0; i < found->n; i++) {
        const struct name *name = &found->names[i];
        layer += name->layer != c->layer_numbers[layer];
        const struct safetensors_tensor **at = &c->pieces[(size_t)layer * c->experts * c->n_tails + name->tail_index];
        for (uint32_t e = 0; e < c->experts; e++)
            if (name->kind == NAME_FUSED || e == name->expert)
                at[(size_t)e * c->n_tails] = name->tensor;
    }
    return 0;
}

int checkpoint_classify(struct checkpoint *c, struct err *err)
{
    struct found found = {.names = calloc(c->n_all + 1, sizeof *found.names)};
    c->dense = calloc(c->n_all + 1, sizeof *c->dense);
    c->apart = calloc(c->n_all + 1, sizeof *c->apart);
    c->layer_numbers = calloc(c->n_all + 1, sizeof *c->layer_numbers);
    int rc = 0;
    if (!found.names || !c->dense || !c->apart || !c->layer_numbers)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < c->n_all && rc == 0; i++)
        found.names[i] = name_parse(c->all[i]);
    if (rc == 0)
        rc = sort_out(c, &found, err);
    if (rc == 0) {
        found_sort(c, &found);
        rc = checkpoint_parts_make(c, err);
    }
    if (rc == 0)
        rc = layers_check(c, &found, err);
    if (rc == 0)
        rc = pieces_fill(c, &found, err);
    free(found.names);
    return rc;
}
