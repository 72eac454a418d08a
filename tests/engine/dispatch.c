/* Routing, exchange and combination.  See dispatch.h.  Stepping thread.
 *
 *   source-routed:  rank of the token --(slot, expert, h) of its choices--> rank of the slot --outputs--> back
 *   replicated:     rank of the token --all its h--> every rank, which routes them itself and computes its own share */
#include "tests/engine/dispatch.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/digest.h"

#define TOP_K_ROOM 64

struct item { /* followed by h */
    uint32_t slot, expert;
};

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
    if (!out || !in) {
        d->ranks = n < d->ranks ? n : d->ranks;
        return err_set(d->err, ERR_NOMEM, "out of memory for %u ranks", n);
    }
    for (uint32_t r = d->ranks; r < n; r++)
        d->out[r] = d->in[r] = (struct mesh_bytes){0};
    d->ranks = n;
    return 0;
}

/* The physical slot that computes this choice: spread over the replicas, the same on every rank that asks. */
static int pick(struct dispatch *d, uint32_t layer, uint32_t expert, uint32_t source, uint32_t token,
                uint32_t *ret_physical)
{
    const struct eep_maps *maps = d->maps;
    size_t at = (size_t)layer * maps->logical + expert;
    int32_t count = maps->logical_replica_count[at];
    if (count < 1 || (uint32_t)count > maps->max_replicas)
        return err_set(d->err, ERR_CORRUPT, "expert %u of layer %u has %d replicas in map %" PRIu64, expert, layer,
                       count, maps->version);
    uint64_t seed = digest_mix(((uint64_t)source << 32) | token, d->step);
    int32_t physical = maps->logical_to_physical_map[at * maps->max_replicas + seed % (uint32_t)count];
    uint32_t rank = physical < 0 ? UINT32_MAX : (uint32_t)physical / maps->slots;
    if (rank >= mesh_size(d->mesh) || !mesh_peers(d->mesh)[rank].serving)
        return err_set(d->err, ERR_CORRUPT,
                       "expert %u of layer %u is mapped to slot %d, which no serving rank of the view has", expert,
                       layer, physical);
    *ret_physical = (uint32_t)physical;
    return 0;
}

static struct dispatch_choice *choice_at(struct dispatch *d, uint32_t token, uint32_t k)
{
    return (struct dispatch_choice *)(void *)d->choices.data + (size_t)token * d->model->config.top_k + k;
}

/* Routes the own tokens.  Source-routed: puts each choice into the message of its rank. */
static int route_own(struct dispatch *d, uint32_t layer, uint32_t n, const float *h)
{
    uint32_t top_k = d->model->config.top_k, hidden = d->model->config.hidden, expert[TOP_K_ROOM], physical;
    float weight[TOP_K_ROOM];
    d->choices.len = 0;
    if (n && !mesh_bytes_add(&d->choices, (size_t)n * top_k * sizeof(struct dispatch_choice)))
        return err_set(d->err, ERR_NOMEM, "out of memory for the choices of %u tokens", n);
    for (uint32_t i = 0; i < n; i++) {
        const float *hi = h + (size_t)i * hidden;
        decoder_route(d->model, layer, hi, expert, weight);
        for (uint32_t k = 0; k < top_k; k++) {
            int rc = pick(d, layer, expert[k], mesh_self(d->mesh), i, &physical);
            if (rc)
                return rc;
            uint32_t rank = physical / d->maps->slots;
            *choice_at(d, i, k) = (struct dispatch_choice){expert[k], rank, weight[k]};
            if (d->mode == EEP_DISPATCH_REPLICATED)
                continue;
            uint8_t *at = mesh_bytes_add(&d->out[rank], sizeof(struct item) + hidden * sizeof *h);
            if (!at)
                return err_set(d->err, ERR_NOMEM, "out of memory for the tokens of rank %u", rank);
            memcpy(at, &(struct item){physical % d->maps->slots, expert[k]}, sizeof(struct item));
            memcpy(at + sizeof(struct item), hi, hidden * sizeof *h);
        }
    }
    for (uint32_t r = 0; d->mode == EEP_DISPATCH_REPLICATED && r < d->ranks; r++) {
        uint8_t *at = n ? mesh_bytes_add(&d->out[r], (size_t)n * hidden * sizeof *h) : NULL;
        if (at)
            memcpy(at, h, (size_t)n * hidden * sizeof *h);
        else if (n)
            return err_set(d->err, ERR_NOMEM, "out of memory for the tokens of rank %u", r);
    }
    return 0;
}

static int compute(struct dispatch *d, uint32_t layer, uint32_t slot, uint32_t expert, const float *h,
                   struct mesh_bytes *out)
{
    const struct eep_maps *maps = d->maps;
    uint32_t hidden = d->model->config.hidden;
    float scratch[3 * d->model->config.expert_hidden], result[hidden];
    if (slot >= d->model->slots)
        return err_set(d->err, ERR_PROTOCOL, "a token for slot %u of %u", slot, d->model->slots);
    /* A retired slot may still be asked for during its grace; one that holds another expert never. */
    int32_t held = maps->physical_to_logical_map[(size_t)layer * maps->max_ranks * maps->slots +
                                                 (size_t)mesh_self(d->mesh) * maps->slots + slot];
    if (held >= 0 && (uint32_t)held != expert)
        return err_set(d->err, ERR_CORRUPT, "a token for expert %u in slot %u of layer %u, which holds expert %d",
                       expert, slot, layer, held);
    decoder_expert(d->model, layer, slot, h, scratch, result);
    __atomic_fetch_add(&maps->expert_load[(size_t)layer * maps->slots + slot], 1, __ATOMIC_RELAXED);
    uint8_t *at = mesh_bytes_add(out, hidden * sizeof *result);
    if (!at)
        return err_set(d->err, ERR_NOMEM, "out of memory for an expert's output");
    memcpy(at, result, hidden * sizeof *result);
    return 0;
}

static int compute_routed(struct dispatch *d, uint32_t layer, uint32_t source)
{
    uint32_t hidden = d->model->config.hidden;
    size_t size = sizeof(struct item) + hidden * sizeof(float);
    float h[hidden];
    if (d->in[source].len % size != 0)
        return err_set(d->err, ERR_PROTOCOL, "rank %u sent %zu bytes of tokens", source, d->in[source].len);
    for (size_t at = 0; at < d->in[source].len; at += size) {
        struct item item;
        memcpy(&item, d->in[source].data + at, sizeof item);
        memcpy(h, d->in[source].data + at + sizeof item, sizeof h);
        int rc = compute(d, layer, item.slot, item.expert, h, &d->out[source]);
        if (rc)
            return rc;
    }
    return 0;
}

static int compute_replicated(struct dispatch *d, uint32_t layer, uint32_t source)
{
    uint32_t hidden = d->model->config.hidden, expert[TOP_K_ROOM], physical;
    size_t size = hidden * sizeof(float);
    float h[hidden], weight[TOP_K_ROOM];
    if (d->in[source].len % size != 0)
        return err_set(d->err, ERR_PROTOCOL, "rank %u sent %zu bytes of tokens", source, d->in[source].len);
    for (uint32_t i = 0; i < d->in[source].len / size; i++) {
        memcpy(h, d->in[source].data + i * size, size);
        decoder_route(d->model, layer, h, expert, weight);
        for (uint32_t k = 0; k < d->model->config.top_k; k++) {
            int rc = pick(d, layer, expert[k], source, i, &physical);
            if (rc == 0 && physical / d->maps->slots == mesh_self(d->mesh))
                rc = compute(d, layer, physical % d->maps->slots, expert[k], h, &d->out[source]);
            if (rc)
                return rc;
        }
    }
    return 0;
}

/* The outputs of a rank lie in the order in which this rank asked: by token, then by choice. */
static int combine(struct dispatch *d, uint32_t layer, uint32_t n, float *ret_y)
{
    uint32_t hidden = d->model->config.hidden;
    size_t taken[d->ranks], size = hidden * sizeof *ret_y;
    float out[hidden];
    memset(taken, 0, sizeof taken);
    for (uint32_t i = 0; i < n; i++) {
        float *y = ret_y + (size_t)i * hidden;
        memset(y, 0, size);
        for (uint32_t k = 0; k < d->model->config.top_k; k++) {
            const struct dispatch_choice *c = choice_at(d, i, k);
            if (taken[c->rank] + size > d->in[c->rank].len)
                return err_set(d->err, ERR_PROTOCOL,
                               "rank %u computed less of layer %u than it was asked: its map differs", c->rank, layer);
            memcpy(out, d->in[c->rank].data + taken[c->rank], size);
            taken[c->rank] += size;
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
    for (uint32_t r = 0; r < d->ranks; r++) {
        rc = d->mode == EEP_DISPATCH_REPLICATED ? compute_replicated(d, layer, r) : compute_routed(d, layer, r);
        if (rc)
            return rc;
    }
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
    mesh_bytes_done(&d->choices);
    d->out = d->in = NULL;
    d->ranks = 0;
}
