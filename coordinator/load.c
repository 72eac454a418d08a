/* Samples of expert load.  See load.h; pure. */
#include "coordinator/load.h"

#include <stdlib.h>
#include <string.h>

void load_init(struct load_history *l, uint64_t horizon_ns, uint32_t samples)
{
    *l = (struct load_history){.horizon_ns = horizon_ns};
    l->samples = samples < 1 ? 1 : samples > LOAD_SAMPLES_MAX ? LOAD_SAMPLES_MAX : samples;
}

static void load_drop(struct load_history *l, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        free(l->v[i].tokens);
    l->n -= n;
    memmove(l->v, l->v + n, l->n * sizeof *l->v);
}

void load_done(struct load_history *l)
{
    load_drop(l, l->n);
}

/* The sample that a window of now belongs to.  NULL: no memory. */
static struct load_sample *load_open(struct load_history *l, uint64_t now_ns, uint64_t window_ns)
{
    if (l->n && now_ns < l->v[l->n - 1].begun_ns + l->horizon_ns / l->samples)
        return &l->v[l->n - 1];
    double *tokens = calloc((size_t)l->layers * l->logical, sizeof *tokens);
    if (!tokens)
        return NULL;
    uint32_t old = l->n == l->samples;
    while (old < l->n && l->v[old].ended_ns + l->horizon_ns < now_ns)
        old++;
    load_drop(l, old);
    uint64_t begun_ns = now_ns > window_ns ? now_ns - window_ns : 0;
    if (l->n && begun_ns < l->v[l->n - 1].ended_ns)
        begun_ns = l->v[l->n - 1].ended_ns;
    l->v[l->n] = (struct load_sample){.begun_ns = begun_ns, .tokens = tokens};
    return &l->v[l->n++];
}

bool load_add(struct load_history *l, const struct expert_map *map, uint32_t rank, const struct msg_load *window,
              uint64_t now_ns)
{
    if (!map || rank >= map->ranks || window->layers != map->layers || window->slots != map->slots)
        return false;
    if (l->layers != map->layers || l->logical != map->logical)
        load_drop(l, l->n);
    l->layers = map->layers;
    l->logical = map->logical;
    struct load_sample *s = load_open(l, now_ns, window->window_ms * UINT64_C(1000000));
    if (!s)
        return false;
    for (uint32_t layer = 0; layer < map->layers; layer++) {
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            int32_t e = map->held[expert_map_at(map, layer, rank, slot)];
            double tokens = (double)window->tokens[(size_t)layer * map->slots + slot];
            if (e < 0)
                continue;
            s->tokens[(size_t)layer * l->logical + (size_t)e] += tokens;
            s->total += tokens;
        }
    }
    s->ended_ns = now_ns;
    s->windows++;
    return true;
}

uint32_t load_samples(const struct load_history *l)
{
    bool thin = l->n > 1 && l->v[l->n - 1].total < l->v[l->n - 2].total / 2;
    return l->n && l->v[0].total > 0 ? l->n - thin : 0;
}

double *load_matrix(const struct load_history *l)
{
    uint32_t n = load_samples(l);
    size_t cells = (size_t)l->layers * l->logical;
    double *matrix = n ? malloc(n * cells * sizeof *matrix) : NULL, total = 0;
    for (uint32_t i = 0; i < n; i++)
        total += l->v[i].total;
    for (uint32_t i = 0; matrix && i < n; i++) {
        double scale = l->v[i].total > 0 ? total / n / l->v[i].total : 0;
        for (size_t k = 0; k < cells; k++)
            matrix[i * cells + k] = l->v[i].tokens[k] * scale;
    }
    return matrix;
}

double *load_sum(const struct load_history *l)
{
    uint32_t n = load_samples(l);
    size_t cells = (size_t)l->layers * l->logical;
    double *sum = n ? calloc(cells, sizeof *sum) : NULL;
    for (uint32_t i = 0; sum && i < n; i++)
        for (size_t k = 0; k < cells; k++)
            sum[k] += l->v[i].tokens[k];
    return sum;
}

static double layer_balance(const struct expert_map *map, uint32_t layer, const double *weight, double *share)
{
    double total = 0, peak = 0;
    memset(share, 0, map->logical * sizeof *share);
    for (uint32_t rank = 0; rank < map->ranks; rank++)
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            size_t at = expert_map_at(map, layer, rank, slot);
            if (map->live[at])
                share[map->held[at]] += map->live[at];
        }
    for (uint32_t e = 0; e < map->logical; e++) {
        total += weight[e];
        share[e] = share[e] > 0 ? weight[e] / share[e] : 0;
    }
    for (uint32_t rank = 0; rank < map->ranks; rank++) {
        double mine = 0;
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            size_t at = expert_map_at(map, layer, rank, slot);
            mine += map->live[at] ? share[map->held[at]] * map->live[at] : 0;
        }
        peak = mine > peak ? mine : peak;
    }
    return peak > 0 ? total / map->ranks / peak : 1;
}

double load_balance(const struct expert_map *map, const double *load)
{
    double *share = calloc(map->logical, sizeof *share), sum = 0;
    if (!share)
        return 1; /* nothing is moved for want of a number */
    for (uint32_t layer = 0; layer < map->layers; layer++)
        sum += layer_balance(map, layer, load + (size_t)layer * map->logical, share);
    free(share);
    return sum / map->layers;
}
