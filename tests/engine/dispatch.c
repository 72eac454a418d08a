/* Routing, exchange and combination.  See dispatch.h.  Stepping thread.
 *
 *   source-routed:  rank of the token --(slot, expert, h) of its choices--> rank of the slot --outputs--> back
 *   replicated:     rank of the token --all its h--> every rank, which routes them itself and computes its own share */
#include "tests/engine/dispatch.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* On the wire an item is followed by its h. */

static int ranks_resize(struct dispatch *d)
{
    uint32_t n = mesh_size(d->mesh);
    if (n == d->ranks)
        return 0;
    for (uint32_t r = n; r < d->ranks; r++) {
        mesh_bytes_done(&d->out[r]);
        mesh_bytes_done(&d->in[r]);
    }
    struct mesh_bytes *out = realloc(d->out, n * sizeof *out);
    if (out)
        d->out = out;
    struct mesh_bytes *in = realloc(d->in, n * sizeof *in);
    if (in)
        d->in = in;
    uint32_t *counts = realloc(d->counts, n * sizeof *counts);
    if (counts)
        d->counts = counts;
    if (!out || !in || !counts) {
        d->ranks = n < d->ranks ? n : d->ranks;
        return err_set(d->err, ERR_NOMEM, "out of memory for %u ranks", n);
    }
    for (uint32_t r = d->ranks; r < n; r++)
        d->out[r] = d->in[r] = (struct mesh_bytes){0};
    d->ranks = n;
    return 0;
}

static struct compute_maps maps_now(const struct dispatch *d)
{
    return (struct compute_maps){d->maps, mesh_self(d->mesh), d->step};
}

/* The rank that computes a choice. */
static int rank_of(struct dispatch *d, uint32_t layer, const struct choice *c, uint32_t *ret_rank)
{
    uint32_t rank = c->physical < 0 ? UINT32_MAX : (uint32_t)c->physical / d->maps->slots;
    if (rank >= mesh_size(d->mesh) || !mesh_peers(d->mesh)[rank].serving)
        return err_set(d->err, ERR_CORRUPT,
                       "expert %u of layer %u is mapped to slot %d by map %" PRIu64
                       ", which no serving rank of the view has",
                       c->expert, layer, c->physical, d->maps->version);
    *ret_rank = rank;
    return 0;
}

static void *room(struct dispatch *d, struct mesh_bytes *bytes, size_t size, const char *what)
{
    void *at = mesh_bytes_add(bytes, size ? size : 1);
    if (!at)
        err_set(d->err, ERR_NOMEM, "out of memory for %s", what);
    return at;
}

static const struct choice *choice_at(const struct dispatch *d, uint32_t token, uint32_t k)
{
    return (const struct choice *)(const void *)d->choices.data + (size_t)token * d->compute->model->config.top_k + k;
}

/* Source-routed: each choice goes into the message of its rank. */
static int send_choices(struct dispatch *d, uint32_t layer, uint32_t n, const float *h)
{
    uint32_t hidden = d->compute->model->config.hidden, rank;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < d->compute->model->config.top_k; k++) {
            const struct choice *c = choice_at(d, i, k);
            int rc = rank_of(d, layer, c, &rank);
            if (rc)
                return rc;
            uint8_t *at = room(d, &d->out[rank], sizeof(struct item) + hidden * sizeof *h, "the tokens of a rank");
            if (!at)
                return ERR_NOMEM;
            memcpy(at, &(struct item){(uint32_t)c->physical % d->maps->slots, c->expert}, sizeof(struct item));
            memcpy(at + sizeof(struct item), h + (size_t)i * hidden, hidden * sizeof *h);
        }
    return 0;
}

/* Routes the own tokens, and says to the others what they need of them. */
static int route_own(struct dispatch *d, uint32_t layer, uint32_t n, const float *h)
{
    const struct decoder_config *c = &d->compute->model->config;
    const struct compute_maps maps = maps_now(d);
    size_t bytes = (size_t)n * c->hidden * sizeof *h;
    d->choices.len = 0;
    struct choice *choices = room(d, &d->choices, (size_t)n * c->top_k * sizeof *choices, "choices");
    if (!choices)
        return ERR_NOMEM;
    int rc = d->compute->route(d->compute, layer, &maps, maps.self, h, n, choices, d->err);
    if (rc == 0 && d->mode != EEP_DISPATCH_REPLICATED)
        rc = send_choices(d, layer, n, h);
    for (uint32_t r = 0; d->mode == EEP_DISPATCH_REPLICATED && r < d->ranks && n && rc == 0; r++) {
        uint8_t *at = room(d, &d->out[r], bytes, "the tokens of a rank");
        if (at)
            memcpy(at, h, bytes);
        else
            rc = ERR_NOMEM;
    }
    return rc;
}

static int item_add(struct dispatch *d, uint32_t source, const struct item *item, const uint8_t *h)
{
    size_t size = d->compute->model->config.hidden * sizeof(float);
    void *at = room(d, &d->items, sizeof *item, "items"), *to = room(d, &d->hidden, size, "items");
    if (!at || !to)
        return ERR_NOMEM;
    memcpy(at, item, sizeof *item);
    memcpy(to, h, size);
    d->counts[source]++;
    return 0;
}

static int collect_routed(struct dispatch *d, uint32_t source)
{
    size_t size = sizeof(struct item) + d->compute->model->config.hidden * sizeof(float);
    if (d->in[source].len % size != 0)
        return err_set(d->err, ERR_PROTOCOL, "rank %u sent %zu bytes of tokens", source, d->in[source].len);
    int rc = 0;
    for (size_t at = 0; at < d->in[source].len && rc == 0; at += size) {
        struct item item;
        memcpy(&item, d->in[source].data + at, sizeof item);
        if (item.slot >= d->maps->slots)
            return err_set(d->err, ERR_PROTOCOL, "a token for slot %u of %u", item.slot, d->maps->slots);
        rc = item_add(d, source, &item, d->in[source].data + at + sizeof item);
    }
    return rc;
}

static int collect_replicated(struct dispatch *d, uint32_t layer, uint32_t source)
{
    const struct decoder_config *c = &d->compute->model->config;
    const struct compute_maps maps = maps_now(d);
    size_t size = c->hidden * sizeof(float);
    if (d->in[source].len % size != 0)
        return err_set(d->err, ERR_PROTOCOL, "rank %u sent %zu bytes of tokens", source, d->in[source].len);
    uint32_t n = (uint32_t)(d->in[source].len / size), rank;
    d->routed.len = 0;
    struct choice *choices = room(d, &d->routed, (size_t)n * c->top_k * sizeof *choices, "choices");
    if (!choices)
        return ERR_NOMEM;
    int rc = d->compute->route(d->compute, layer, &maps, source, (const float *)(const void *)d->in[source].data, n,
                               choices, d->err);
    for (size_t i = 0; i < (size_t)n * c->top_k && rc == 0; i++) {
        rc = rank_of(d, layer, &choices[i], &rank);
        struct item item = {(uint32_t)choices[i].physical % d->maps->slots, choices[i].expert};
        if (rc == 0 && rank == maps.self)
            rc = item_add(d, source, &item, d->in[source].data + i / c->top_k * size);
    }
    return rc;
}

/* All that this rank has to compute, at once; each source gets its results in the order in which it asked. */
static int compute_all(struct dispatch *d, uint32_t layer)
{
    const struct compute_maps maps = maps_now(d);
    size_t size = d->compute->model->config.hidden * sizeof(float), at = 0;
    int rc = 0;
    d->items.len = d->hidden.len = d->results.len = 0;
    for (uint32_t r = 0; r < d->ranks && rc == 0; r++) {
        d->counts[r] = 0;
        rc = d->mode == EEP_DISPATCH_REPLICATED ? collect_replicated(d, layer, r) : collect_routed(d, r);
    }
    uint32_t n = (uint32_t)(d->items.len / sizeof(struct item));
    float *results = rc || n == 0 ? NULL : room(d, &d->results, n * size, "results");
    if (rc || n == 0)
        return rc;
    if (!results)
        return ERR_NOMEM;
    rc = d->compute->experts(d->compute, layer, &maps, (const struct item *)(const void *)d->items.data,
                             (const float *)(const void *)d->hidden.data, n, results, d->err);
    for (uint32_t r = 0; r < d->ranks && rc == 0; r++) {
        void *to = d->counts[r] ? room(d, &d->out[r], d->counts[r] * size, "results") : NULL;
        if (to)
            memcpy(to, d->results.data + at, d->counts[r] * size);
        else if (d->counts[r])
            rc = ERR_NOMEM;
        at += d->counts[r] * size;
    }
    return rc;
}

/* The outputs of a rank lie in the order in which this rank asked: by token, then by choice. */
static int combine(struct dispatch *d, uint32_t layer, uint32_t n, float *ret_y)
{
    uint32_t hidden = d->compute->model->config.hidden, rank = 0;
    size_t taken[d->ranks], size = hidden * sizeof *ret_y;
    float out[hidden];
    memset(taken, 0, sizeof taken);
    for (uint32_t i = 0; i < n; i++) {
        float *y = ret_y + (size_t)i * hidden;
        memset(y, 0, size);
        for (uint32_t k = 0; k < d->compute->model->config.top_k; k++) {
            const struct choice *c = choice_at(d, i, k);
            int rc = rank_of(d, layer, c, &rank);
            if (rc)
                return rc;
            if (taken[rank] + size > d->in[rank].len)
                return err_set(d->err, ERR_PROTOCOL,
                               "rank %u computed less of layer %u than it was asked: its map differs", rank, layer);
            memcpy(out, d->in[rank].data + taken[rank], size);
            taken[rank] += size;
            for (uint32_t j = 0; j < hidden; j++)
                y[j] += c->weight * out[j];
        }
    }
    for (uint32_t r = 0; r < d->ranks; r++) {
        if (taken[r] != d->in[r].len)
            return err_set(d->err, ERR_PROTOCOL, "rank %u computed more of layer %u than it was asked: its map differs",
                           r, layer);
    }
    return 0;
}

static int exchange(struct dispatch *d, uint32_t layer, enum mesh_phase phase)
{
    struct mesh_stamp stamp = {d->epoch, d->step, layer, phase};
    return mesh_exchange(d->mesh, &stamp, &d->wait, &d->flags, d->out, d->in, d->err);
}

static void out_clear(struct dispatch *d)
{
    for (uint32_t r = 0; r < d->ranks; r++)
        d->out[r].len = 0;
}

int dispatch_moe(void *user, uint32_t layer, uint32_t n, const float *h, float *ret_y)
{
    struct dispatch *d = user;
    int rc = ranks_resize(d);
    if (rc)
        return rc;
    out_clear(d);
    if ((rc = route_own(d, layer, n, h)) || (rc = exchange(d, layer, MESH_DISPATCH)))
        return rc;
    out_clear(d);
    rc = compute_all(d, layer);
    if (rc == 0)
        rc = exchange(d, layer, MESH_RETURN);
    return rc ? rc : combine(d, layer, n, ret_y);
}

void dispatch_done(struct dispatch *d)
{
    for (uint32_t r = 0; r < d->ranks; r++) {
        mesh_bytes_done(&d->out[r]);
        mesh_bytes_done(&d->in[r]);
    }
    free(d->out);
    free(d->in);
    free(d->counts);
    mesh_bytes_done(&d->choices);
    mesh_bytes_done(&d->routed);
    mesh_bytes_done(&d->items);
    mesh_bytes_done(&d->hidden);
    mesh_bytes_done(&d->results);
    d->counts = NULL;
    d->out = d->in = NULL;
    d->ranks = 0;
}
