/* Members, expert maps, views, models and plans: making, sharing, checking.  Pure, any thread.
 *
 * Reference counts: every object starts with one; the last unref frees it.  Constructors return NULL when memory is
 * out or a shape does not fit the address space. */
#include "common/topology.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "common/digest.h"

static void refs_take(atomic_uint *refs)
{
    unsigned before = atomic_fetch_add_explicit(refs, 1, memory_order_relaxed);
    assert(before > 0);
    (void)before;
}

/* True when this was the last reference: everything that others did with the object happened before. */
static bool refs_drop(atomic_uint *refs)
{
    unsigned before = atomic_fetch_sub_explicit(refs, 1, memory_order_acq_rel);
    assert(before > 0);
    return before == 1;
}

static bool size_mul(size_t a, size_t b, size_t *ret_product)
{
    return !__builtin_mul_overflow(a, b, ret_product);
}

/* ---- expert maps ---- */

static bool map_cells(uint32_t layers, uint32_t ranks, uint32_t slots, size_t *ret_cells)
{
    size_t cells;
    if (!size_mul(layers, ranks, &cells) || !size_mul(cells, slots, &cells) || cells > PTRDIFF_MAX / sizeof(int32_t))
        return false;
    *ret_cells = cells;
    return true;
}

struct expert_map *expert_map_new(uint32_t layers, uint32_t logical, uint32_t ranks, uint32_t slots)
{
    size_t cells;
    if (!map_cells(layers, ranks, slots, &cells))
        return NULL;
    struct expert_map *map = calloc(1, sizeof *map);
    if (!map)
        return NULL;
    atomic_init(&map->refs, 1);
    map->layers = layers;
    map->logical = logical;
    map->ranks = ranks;
    map->slots = slots;
    map->held = malloc(cells ? cells * sizeof *map->held : 1);
    map->live = calloc(cells ? cells : 1, 1);
    if (!map->held || !map->live) {
        expert_map_unref(map);
        return NULL;
    }
    for (size_t i = 0; i < cells; i++)
        map->held[i] = -1;
    return map;
}

struct expert_map *expert_map_copy(const struct expert_map *map)
{
    struct expert_map *copy = expert_map_new(map->layers, map->logical, map->ranks, map->slots);
    if (!copy)
        return NULL;
    size_t cells = (size_t)map->layers * map->ranks * map->slots;
    copy->version = map->version;
    memcpy(copy->held, map->held, cells * sizeof *map->held);
    memcpy(copy->live, map->live, cells);
    return copy;
}

struct expert_map *expert_map_ref(struct expert_map *map)
{
    if (map)
        refs_take(&map->refs);
    return map;
}

void expert_map_unref(struct expert_map *map)
{
    if (!map || !refs_drop(&map->refs))
        return;
    free(map->held);
    free(map->live);
    free(map);
}

struct expert_map *expert_map_select(const struct expert_map *map, const int32_t *from, uint32_t ranks)
{
    struct expert_map *picked = expert_map_new(map->layers, map->logical, ranks, map->slots);
    if (!picked)
        return NULL;
    picked->version = map->version;
    for (uint32_t layer = 0; layer < map->layers; layer++) {
        for (uint32_t rank = 0; rank < ranks; rank++) {
            if (from[rank] < 0)
                continue;
            assert((uint32_t)from[rank] < map->ranks);
            size_t to = expert_map_at(picked, layer, rank, 0);
            size_t at = expert_map_at(map, layer, (uint32_t)from[rank], 0);
            memcpy(picked->held + to, map->held + at, map->slots * sizeof *map->held);
            memcpy(picked->live + to, map->live + at, map->slots);
        }
    }
    return picked;
}

uint32_t expert_map_live_count(const struct expert_map *map, uint32_t layer, int32_t expert, const uint8_t *serving)
{
    uint32_t count = 0;
    for (uint32_t rank = 0; rank < map->ranks; rank++) {
        if (serving && !serving[rank])
            continue;
        size_t at = expert_map_at(map, layer, rank, 0);
        for (uint32_t slot = 0; slot < map->slots; slot++)
            count += map->live[at + slot] && map->held[at + slot] == expert;
    }
    return count;
}

/* Of an expert in one layer, on ranks that serve: live replicas and their entries. */
struct seen {
    uint32_t replicas, entries;
};

/* Invariants of one layer; seen[logical] is scratch. */
static int map_check_layer(const struct expert_map *map, uint32_t layer, const uint8_t *serving, struct seen *seen,
                           struct err *err)
{
    memset(seen, 0, map->logical * sizeof *seen);
    for (uint32_t rank = 0; rank < map->ranks; rank++) {
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            size_t at = expert_map_at(map, layer, rank, slot);
            int32_t held = map->held[at];
            if (held < -1 || (held >= 0 && (uint32_t)held >= map->logical))
                return err_set(err, ERR_INVALID, "layer %u rank %u slot %u holds expert %d, of %u", layer, rank, slot,
                               held, map->logical);
            if (map->live[at] && held < 0)
                return err_set(err, ERR_INVALID, "layer %u rank %u slot %u is live but empty", layer, rank, slot);
            if (!map->live[at] || (serving && !serving[rank]))
                continue;
            seen[held].replicas++;
            seen[held].entries += map->live[at];
        }
    }
    for (uint32_t expert = 0; expert < map->logical; expert++) {
        const struct seen *s = &seen[expert];
        if (!s->replicas)
            return err_set(err, ERR_INVALID, "expert %u of layer %u has no live replica on a serving rank", expert,
                           layer);
        if (s->entries > ENTRIES_MAX && s->entries > s->replicas)
            return err_set(err, ERR_INVALID, "the %u replicas of expert %u of layer %u have %u entries, of at most %u",
                           s->replicas, expert, layer, s->entries, ENTRIES_MAX);
    }
    return 0;
}

uint64_t expert_map_missing(const struct expert_map *map)
{
    size_t row = (size_t)map->ranks * map->slots;
    uint64_t missing = 0;
    uint8_t *has = malloc(map->logical);
    if (!has)
        abort();
    for (uint32_t layer = 0; layer < map->layers; layer++) {
        memset(has, 0, map->logical);
        for (size_t i = layer * row; i < (layer + 1) * row; i++)
            if (map->live[i])
                has[map->held[i]] = 1;
        for (uint32_t e = 0; e < map->logical; e++)
            missing += !has[e];
    }
    free(has);
    return missing;
}

int expert_map_validate(const struct expert_map *map, const uint8_t *serving, struct err *err)
{
    size_t cells;
    if (map->layers == 0 || map->logical == 0 || map->ranks == 0 || map->slots == 0 || map->logical > INT32_MAX ||
        !map_cells(map->layers, map->ranks, map->slots, &cells))
        return err_set(err, ERR_INVALID, "expert map of %u layers, %u experts, %u ranks, %u slots: not a shape",
                       map->layers, map->logical, map->ranks, map->slots);
    struct seen *seen = malloc(map->logical * sizeof *seen);
    if (!seen)
        return err_set(err, ERR_NOMEM, "no memory to check an expert map");
    int rc = 0;
    for (uint32_t layer = 0; layer < map->layers && rc == 0; layer++)
        rc = map_check_layer(map, layer, serving, seen, err);
    free(seen);
    return rc;
}

/* Words: the four dimensions, then one per slot (expert + 1, or 0; from bit 32 on its entries): no dependence on the host's
 * byte order or on how the arrays are stored. */
uint64_t expert_map_digest(const struct expert_map *map)
{
    size_t cells = (size_t)map->layers * map->ranks * map->slots;
    uint64_t sum = digest_mix(map->layers, 0) + digest_mix(map->logical, 1) + digest_mix(map->ranks, 2) +
                   digest_mix(map->slots, 3);
    for (size_t i = 0; i < cells; i++) {
        uint64_t word = (uint32_t)(map->held[i] + 1) | (uint64_t)map->live[i] << 32;
        sum += digest_mix(word, 4 + i);
    }
    return sum;
}

/* ---- views ---- */

struct view *view_new(uint32_t n)
{
    struct view *view = calloc(1, sizeof *view);
    if (!view)
        return NULL;
    atomic_init(&view->refs, 1);
    view->n = n;
    view->members = calloc(n ? n : 1, sizeof *view->members);
    if (!view->members) {
        free(view);
        return NULL;
    }
    return view;
}

struct view *view_ref(struct view *view)
{
    if (view)
        refs_take(&view->refs);
    return view;
}

void view_unref(struct view *view)
{
    if (!view || !refs_drop(&view->refs))
        return;
    expert_map_unref(view->map);
    free(view->members);
    free(view);
}

struct view *view_copy(const struct view *view)
{
    struct view *copy = view_new(view->n);
    if (!copy)
        return NULL;
    copy->epoch = view->epoch;
    copy->manifest_digest = view->manifest_digest;
    copy->kv_bytes = view->kv_bytes;
    memcpy(copy->members, view->members, view->n * sizeof *view->members);
    copy->map = expert_map_ref(view->map);
    return copy;
}

int member_find(const struct member *list, uint32_t n, const struct member *who)
{
    for (uint32_t i = 0; i < n; i++)
        if (list[i].incarnation == who->incarnation && strcmp(list[i].id, who->id) == 0)
            return (int)i;
    return -1;
}

int view_rank(const struct view *view, const char *id)
{
    if (!view)
        return -1;
    for (uint32_t rank = 0; rank < view->n; rank++)
        if (strcmp(view->members[rank].id, id) == 0)
            return (int)rank;
    return -1;
}

bool view_same_members(const struct view *a, const struct view *b)
{
    if (!a || !b || a->n != b->n)
        return a == b;
    for (uint32_t rank = 0; rank < a->n; rank++)
        if (a->members[rank].incarnation != b->members[rank].incarnation ||
            strcmp(a->members[rank].id, b->members[rank].id) != 0)
            return false;
    return true;
}

/* ---- blobs ---- */

struct blob *blob_new(const void *data, size_t len)
{
    if (len > PTRDIFF_MAX - sizeof(struct blob))
        return NULL;
    struct blob *blob = malloc(sizeof *blob + len);
    if (!blob)
        return NULL;
    atomic_init(&blob->refs, 1);
    blob->len = len;
    if (data && len)
        memcpy(blob->data, data, len);
    else
        memset(blob->data, 0, len);
    return blob;
}

struct blob *blob_ref(struct blob *blob)
{
    if (blob)
        refs_take(&blob->refs);
    return blob;
}

void blob_unref(struct blob *blob)
{
    if (blob && refs_drop(&blob->refs))
        free(blob);
}

/* ---- models ---- */

struct model *model_new(uint32_t layers, uint32_t logical, uint32_t slots, uint32_t n_dense)
{
    size_t experts;
    if (!size_mul(layers, logical, &experts))
        return NULL;
    struct model *model = calloc(1, sizeof *model);
    if (!model)
        return NULL;
    atomic_init(&model->refs, 1);
    model->layers = layers;
    model->logical = logical;
    model->slots = slots;
    model->n_dense = n_dense;
    model->dense_digest = calloc(n_dense ? n_dense : 1, sizeof *model->dense_digest);
    model->expert_digest = calloc(experts ? experts : 1, sizeof *model->expert_digest);
    if (!model->dense_digest || !model->expert_digest) {
        model_unref(model);
        return NULL;
    }
    return model;
}

struct model *model_ref(struct model *model)
{
    if (model)
        refs_take(&model->refs);
    return model;
}

void model_unref(struct model *model)
{
    if (!model || !refs_drop(&model->refs))
        return;
    blob_unref(model->manifest);
    free(model->dense_digest);
    free(model->expert_digest);
    free(model);
}

int model_merge(struct model *into, const struct model *from, struct err *err)
{
    if (into->manifest_digest != from->manifest_digest)
        return err_set(err, ERR_CONFLICT, "manifests differ: digest %016llx here, %016llx there",
                       (unsigned long long)into->manifest_digest, (unsigned long long)from->manifest_digest);
    if (into->layers != from->layers || into->logical != from->logical || into->slots != from->slots ||
        into->n_dense != from->n_dense)
        return err_set(
            err, ERR_CONFLICT,
            "models of one manifest differ in shape: %u layers, %u experts, %u slots, %u dense regions here, "
            "%u, %u, %u, %u there",
            into->layers, into->logical, into->slots, into->n_dense, from->layers, from->logical, from->slots,
            from->n_dense);

    /* Compare everything before anything is taken over: on failure `into` is as it was. */
    size_t experts = (size_t)into->layers * into->logical;
    for (uint32_t i = 0; i < into->n_dense; i++)
        if (into->dense_digest[i] && from->dense_digest[i] && into->dense_digest[i] != from->dense_digest[i])
            return err_set(err, ERR_CORRUPT, "dense region %u: digest %016llx here, %016llx there", i,
                           (unsigned long long)into->dense_digest[i], (unsigned long long)from->dense_digest[i]);
    for (size_t i = 0; i < experts; i++)
        if (into->expert_digest[i] && from->expert_digest[i] && into->expert_digest[i] != from->expert_digest[i])
            return err_set(err, ERR_CORRUPT, "expert %zu of layer %zu: digest %016llx here, %016llx there",
                           i % into->logical, i / into->logical, (unsigned long long)into->expert_digest[i],
                           (unsigned long long)from->expert_digest[i]);

    for (uint32_t i = 0; i < into->n_dense; i++)
        if (!into->dense_digest[i])
            into->dense_digest[i] = from->dense_digest[i];
    for (size_t i = 0; i < experts; i++)
        if (!into->expert_digest[i])
            into->expert_digest[i] = from->expert_digest[i];
    return 0;
}

/* ---- plans ---- */

struct plan *plan_new(uint32_t parties, uint32_t n_moves, uint32_t n_retires)
{
    struct plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    atomic_init(&plan->refs, 1);
    plan->parties = parties;
    plan->n_moves = n_moves;
    plan->n_retires = n_retires;
    plan->moves = calloc(n_moves ? n_moves : 1, sizeof *plan->moves);
    plan->retires = calloc(n_retires ? n_retires : 1, sizeof *plan->retires);
    if (!plan->moves || !plan->retires) {
        plan_unref(plan);
        return NULL;
    }
    return plan;
}

struct plan *plan_ref(struct plan *plan)
{
    if (plan)
        refs_take(&plan->refs);
    return plan;
}

void plan_unref(struct plan *plan)
{
    if (!plan || !refs_drop(&plan->refs))
        return;
    expert_map_unref(plan->target);
    expert_map_unref(plan->at_commit);
    free(plan->moves);
    free(plan->retires);
    free(plan->wakes);
    free(plan);
}
