/* The reference engine's all-to-all: ranks as threads of one process, with real sockets between them.
 *
 * Logits must be the same bits for one rank and for three, whatever lies where, in both kinds of dispatch; a revoke, a
 * silent peer and a peer in another step must each end an exchange in their own way.
 * The engine is a program, not a library, hence the included sources. */
#include "common/clock.h"
#include "tests/engine/decoder.c"
#include "tests/engine/compute_host.c"
#include "tests/engine/dispatch.c"
#include "tests/engine/forward.c"
#include "tests/engine/mesh_build.c"
#include "tests/engine/mesh_exchange.c"
#include "tests/engine/server.c"
#include "tests/engine/source.c"
#include "tests/harness/suite.h"

#include <check.h>
#include <sys/eventfd.h>

#define RANKS_MOST    4
#define PROMPT_TOKENS 16
#define REPLICAS_MAX  8

static int revoke_fd;

/* One rank: a thread, a listener, experts in slots. */
struct rank {
    struct cluster *cluster;
    uint32_t rank;
    struct mesh_lot *lot;
    struct server *server;
    uint64_t id;
    struct mesh *mesh;
    struct decoder decoder;
    uint16_t *w13, *w2; /* [layers][slots] */
    struct eep_maps maps;
    uint64_t *load;
    float *logits; /* [tokens][vocab] */
    pthread_t thread;
    int rc;
    uint32_t flags;
    struct err err;
};
struct cluster {
    struct source source;
    struct safetensors *reference;
    const int32_t *input;
    uint32_t n, slots;
    enum eep_dispatch mode;
    int32_t *p2l; /* [layers][RANKS_MOST * slots] */
    int32_t *l2p, *count;
    struct rank rank[RANKS_MOST];
};

static void nothing(void *user)
{
    (void)user;
}

/* Expert e of layer l: slot (e + 3 l) mod (n slots), and wherever there is room once more, replicas of later ones. */
static void place(struct cluster *c, unsigned seed)
{
    uint32_t layers = c->source.shape.layers, experts = c->source.shape.experts, all = c->n * c->slots;
    size_t width = (size_t)RANKS_MOST * c->slots;
    c->p2l = malloc(layers * width * sizeof *c->p2l);
    c->l2p = malloc((size_t)layers * experts * REPLICAS_MAX * sizeof *c->l2p);
    c->count = calloc((size_t)layers * experts, sizeof *c->count);
    for (size_t i = 0; i < layers * width; i++)
        c->p2l[i] = -1;
    for (uint32_t l = 0; l < layers; l++) {
        for (uint32_t p = 0; p < all; p++) {
            uint32_t e = (p * 7 + 3 * l + seed) % experts;
            size_t at = (size_t)l * experts + e;
            if (c->count[at] == REPLICAS_MAX)
                continue;
            c->p2l[l * width + p] = (int32_t)e;
            c->l2p[at * REPLICAS_MAX + (size_t)c->count[at]++] = (int32_t)p;
        }
        for (uint32_t e = 0; e < experts; e++)
            ck_assert_int_ge(c->count[(size_t)l * experts + e], 1);
    }
}

static int rank_find(void *user, const char *name, struct decoder_tensor *ret_tensor)
{
    struct rank *r = user;
    const struct decoder_config *c = &r->cluster->source.shape;
    uint64_t one = (uint64_t)c->hidden * c->expert_hidden, slots = r->cluster->slots;
    unsigned layer;
    char part[16];
    if (sscanf(name, "layers.%u.experts.%15s", &layer, part) == 2) {
        bool w13 = strcmp(part, "w13") == 0;
        if (!w13 && strcmp(part, "w2") != 0)
            return ERR_NOTFOUND;
        *ret_tensor = (struct decoder_tensor){
            .data = w13 ? r->w13 + layer * slots * 2 * one : r->w2 + layer * slots * one,
            .dtype = "BF16",
            .dims = 3,
            .shape = {slots, w13 ? 2 * c->expert_hidden : c->hidden, w13 ? c->hidden : c->expert_hidden},
            .stride = (w13 ? 2 : 1) * one * 2,
        };
        return 0;
    }
    const struct safetensors_tensor *t = source_find(&r->cluster->source, name);
    if (!t)
        return ERR_NOTFOUND;
    *ret_tensor = (struct decoder_tensor){.data = t->data, .dtype = t->dtype, .dims = t->dims};
    memcpy(ret_tensor->shape, t->shape, sizeof ret_tensor->shape);
    return 0;
}

static void rank_weights(struct rank *r)
{
    struct cluster *c = r->cluster;
    const struct decoder_config *s = &c->source.shape;
    size_t one = (size_t)s->hidden * s->expert_hidden, slots = (size_t)s->layers * c->slots;
    r->w13 = calloc(slots, 2 * one * sizeof *r->w13);
    r->w2 = calloc(slots, one * sizeof *r->w2);
    r->load = calloc(slots, sizeof *r->load);
    for (uint32_t l = 0; l < s->layers; l++) {
        for (uint32_t i = 0; i < c->slots; i++) {
            int32_t e = c->p2l[(size_t)l * RANKS_MOST * c->slots + r->rank * c->slots + i];
            size_t at = ((size_t)l * c->slots + i) * one;
            if (e >= 0)
                ck_assert_int_eq(source_expert(&c->source, DECODER_LAYOUT_ROWS, l, (uint32_t)e, r->w13 + 2 * at,
                                               r->w2 + at, &r->err),
                                 0);
        }
    }
    ck_assert_msg(decoder_bind(c->source.config, rank_find, r, &r->decoder, &r->err) == 0, "%s", r->err.text);
    r->maps = (struct eep_maps){.layers = s->layers,
                                .logical = s->experts,
                                .slots = c->slots,
                                .max_ranks = RANKS_MOST,
                                .max_replicas = REPLICAS_MAX,
                                .version = 1,
                                .physical_to_logical_map = c->p2l,
                                .logical_to_physical_map = c->l2p,
                                .logical_replica_count = c->count,
                                .expert_load = r->load,
                                .device = -1};
}

static bool never(void *user)
{
    (void)user;
    return false;
}

static bool always(void *user)
{
    (void)user;
    return true;
}

static void peers_fill(struct cluster *c, struct mesh_peer *ret_peers)
{
    for (uint32_t i = 0; i < c->n; i++) {
        ret_peers[i] = (struct mesh_peer){.id = c->rank[i].id, .serving = true};
        snprintf(ret_peers[i].address, sizeof ret_peers[i].address, "%s", server_address(c->rank[i].server));
    }
}

static int rank_mesh(struct rank *r, struct mesh_key key)
{
    struct mesh_peer peers[RANKS_MOST];
    peers_fill(r->cluster, peers);
    struct mesh_build b = {.lot = r->lot,
                           .key = key,
                           .peers = peers,
                           .n = r->cluster->n,
                           .self = r->rank,
                           .limit_ms = 10000,
                           .cancelled = never};
    return mesh_build(&b, &r->mesh, &r->err);
}

static void cluster_open(struct cluster *c, const char *dir, uint32_t n, uint32_t slots, enum eep_dispatch mode,
                         unsigned seed)
{
    struct err err = {0};
    char path[256];
    memset(c, 0, sizeof *c);
    c->n = n;
    c->slots = slots;
    c->mode = mode;
    ck_assert_msg(source_open(dir, &c->source, &err) == 0, "%s", err.text);
    snprintf(path, sizeof path, "%s/reference.safetensors", dir);
    ck_assert_msg(safetensors_open(path, &c->reference, &err) == 0, "%s", err.text);
    c->input = (const int32_t *)(const void *)safetensors_find(c->reference, "input_ids")->data;
    place(c, seed);
    for (uint32_t i = 0; i < n; i++) {
        struct rank *r = &c->rank[i];
        r->cluster = c;
        r->rank = i;
        r->id = 100 + i;
        r->lot = mesh_lot_new();
        struct server_options o = {.listen = "127.0.0.1:0", .lot = r->lot, .own_id = r->id, .on_request = nothing};
        ck_assert_msg(server_open(&o, &r->server, &err) == 0, "%s", err.text);
        rank_weights(r);
        r->logits = calloc(PROMPT_TOKENS, r->decoder.config.vocab * sizeof *r->logits);
    }
}

static void cluster_close(struct cluster *c)
{
    for (uint32_t i = 0; i < c->n; i++) {
        struct rank *r = &c->rank[i];
        mesh_free(r->mesh);
        server_close(r->server);
        mesh_lot_free(r->lot);
        decoder_done(&r->decoder);
        free(r->w13);
        free(r->w2);
        free(r->load);
        free(r->logits);
    }
    free(c->p2l);
    free(c->l2p);
    free(c->count);
    safetensors_close(c->reference);
    source_done(&c->source);
}

static void cluster_run(struct cluster *c, void *(*main)(void *))
{
    for (uint32_t i = 0; i < c->n; i++)
        ck_assert_int_eq(pthread_create(&c->rank[i].thread, NULL, main, &c->rank[i]), 0);
    for (uint32_t i = 0; i < c->n; i++)
        pthread_join(c->rank[i].thread, NULL);
}

/* ---- the same bits ---- */

/* Rank 0 has prompt 0 in one step, rank 1 prompt 1 in chunks of three with an own end, the others nothing: dummy steps.
 */
static void *forward_main(void *user)
{
    struct rank *r = user;
    struct cluster *c = r->cluster;
    uint32_t vocab = r->decoder.config.vocab, steps = 6, done = 0;
    struct forward_token tokens[PROMPT_TOKENS];
    struct decoder_kv kv = {0};
    struct compute *compute = NULL;
    struct dispatch d = {
                         .maps = &r->maps,
                         .mode = c->mode,
                         .epoch = 7,
                         .err = &r->err,
                         .wait = {revoke_fd, -1, 20000}};
    r->rc = rank_mesh(r, (struct mesh_key){.op = 3, .attempt = 1});
    d.mesh = r->mesh;
    if (r->rc == 0)
        r->rc = compute_host_open(&r->decoder, &compute, &r->err);
    d.compute = compute;
    if (r->rc == 0)
        r->rc = decoder_kv_init(&r->decoder.config, PROMPT_TOKENS, &kv, &r->err);
    for (uint32_t step = 0; step < steps && r->rc == 0; step++) {
        uint32_t n = r->rank > 1 ? 0 : r->rank == 0 ? PROMPT_TOKENS : 3;
        n = n < PROMPT_TOKENS - done ? n : PROMPT_TOKENS - done;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t at = done + i;
            tokens[i] =
                (struct forward_token){c->input[r->rank * PROMPT_TOKENS + at], at, &kv, r->logits + (size_t)at * vocab};
        }
        d.step = 40 + step;
        d.flags = done + n < PROMPT_TOKENS && r->rank == 1 ? DISPATCH_ANY_WORK : 0;
        r->rc = forward_run(compute, tokens, n, dispatch_moe, &d, &r->err);
        done += n;
        if (r->rc == 0 && ((d.flags & DISPATCH_ANY_WORK) != 0) != (c->n > 1 && step < 5))
            r->rc = err_set(&r->err, ERR_PROTOCOL, "any_work is wrong in step %u", step);
    }
    decoder_kv_done(&kv);
    dispatch_done(&d);
    if (compute)
        compute->close(compute);
    return NULL;
}

static const char *const dirs[] = {"tests/data/qwen3-moe-tiny", "tests/data/mixtral-tiny"};

static void bits_run(struct cluster *c, const char *dir, uint32_t n, uint32_t slots, enum eep_dispatch mode,
                     unsigned seed)
{
    cluster_open(c, dir, n, slots, mode, seed);
    cluster_run(c, forward_main);
    for (uint32_t i = 0; i < n; i++)
        ck_assert_msg(c->rank[i].rc == 0, "rank %u of %u: %s", i, n, c->rank[i].err.text);
}

START_TEST(placement_does_not_matter)
{
    struct cluster one, two, three;
    const char *dir = dirs[_i];
    uint32_t experts = _i ? 8 : 16;
    bits_run(&one, dir, 1, experts, EEP_DISPATCH_SOURCE_ROUTED, 0);
    bits_run(&two, dir, 2, experts / 2, EEP_DISPATCH_SOURCE_ROUTED, 5);
    size_t bytes = (size_t)PROMPT_TOKENS * one.rank[0].decoder.config.vocab * sizeof(float);
    const float *reference = (const float *)(const void *)safetensors_find(one.reference, "logits")->data;
    for (size_t i = 0; i < 2 * bytes / sizeof(float); i++)
        ck_assert(
            fabsf((i < bytes / sizeof(float) ? two.rank[0].logits[i] : two.rank[1].logits[i - bytes / sizeof(float)]) -
                  reference[i]) < 2e-5f);
    ck_assert_int_eq(memcmp(one.rank[0].logits, two.rank[0].logits, bytes), 0);
    for (int mode = EEP_DISPATCH_SOURCE_ROUTED; mode <= EEP_DISPATCH_REPLICATED; mode++) {
        bits_run(&three, dir, 3, experts / 2 - 1, (enum eep_dispatch)mode, 2); /* with replicas */
        ck_assert_int_eq(memcmp(one.rank[0].logits, three.rank[0].logits, bytes), 0);
        ck_assert_int_eq(memcmp(two.rank[1].logits, three.rank[1].logits, bytes), 0);
        uint64_t load = 0, here = 0;
        for (uint32_t i = 0; i < 3 * three.source.shape.layers * three.slots; i++) {
            uint64_t at = three.rank[i % 3].load[i / 3];
            load += at;
            here += at != 0;
        }
        ck_assert_uint_eq(load, 2 * PROMPT_TOKENS * three.source.shape.layers * three.source.shape.top_k);
        ck_assert_uint_gt(here, 3 * three.source.shape.layers);
        cluster_close(&three);
    }
    cluster_close(&one);
    cluster_close(&two);
}
END_TEST

/* Replicated dispatch with maps that differ is found out, not computed wrongly. */
START_TEST(replicated_maps_must_agree)
{
    struct cluster c;
    cluster_open(&c, dirs[0], 2, 9, EEP_DISPATCH_REPLICATED, 0); /* experts 0 and 1 of some layer have two replicas */
    int32_t *other = malloc((size_t)c.source.shape.layers * c.source.shape.experts * REPLICAS_MAX * sizeof *other);
    for (size_t i = 0; i < (size_t)c.source.shape.layers * c.source.shape.experts; i++) {
        for (int32_t k = 0; k < c.count[i]; k++)
            other[i * REPLICAS_MAX + (size_t)k] = c.l2p[i * REPLICAS_MAX + (size_t)(c.count[i] - 1 - k)];
    }
    c.rank[1].maps.logical_to_physical_map = other;
    for (uint32_t i = 0; i < 2; i++)
        ck_assert_int_eq(c.rank[i].rc, 0);
    cluster_run(&c, forward_main);
    ck_assert(c.rank[0].rc == ERR_PROTOCOL || c.rank[1].rc == ERR_PROTOCOL);
    free(other);
    cluster_close(&c);
}
END_TEST

/* ---- ends of an exchange ---- */

static uint32_t odd_step, limit_ms = 20000;
static bool absent[RANKS_MOST], leaves[RANKS_MOST];
static pthread_barrier_t *all_built; /* nobody leaves before; NULL = nobody leaves */

static void *exchange_main(void *user)
{
    struct rank *r = user;
    struct mesh_bytes out[RANKS_MOST] = {{0}}, in[RANKS_MOST] = {{0}};
    r->rc = rank_mesh(r, (struct mesh_key){.epoch = 9});
    if (all_built)
        pthread_barrier_wait(all_built);
    if (r->rc == 0 && leaves[r->rank]) {
        mesh_free(r->mesh);
        r->mesh = NULL;
        return NULL;
    }
    struct mesh_stamp stamp = {9, r->rank == 1 ? 5 + odd_step : 5, 0, MESH_DISPATCH};
    struct mesh_wait wait = {revoke_fd, -1, limit_ms};
    for (uint32_t i = 0; i < r->cluster->n; i++) {
        /* large enough that neither side's buffers hold it all */
        uint8_t *at = mesh_bytes_add(&out[i], (8u << 20) + r->rank);
        memset(at, (int)(16 * r->rank + i), out[i].len);
    }
    if (r->rc == 0 && !absent[r->rank])
        r->rc = mesh_exchange(r->mesh, &stamp, &wait, &r->flags, out, in, &r->err);
    for (uint32_t i = 0; i < r->cluster->n && r->rc == 0 && !absent[r->rank]; i++) {
        if (in[i].len != (8u << 20) + i || in[i].data[0] != 16 * i + r->rank ||
            in[i].data[in[i].len - 1] != 16 * i + r->rank)
            r->rc = err_set(&r->err, ERR_CORRUPT, "not what rank %u sent", i);
    }
    for (uint32_t i = 0; i < r->cluster->n; i++) {
        mesh_bytes_done(&out[i]);
        mesh_bytes_done(&in[i]);
    }
    return NULL;
}

START_TEST(large_messages_pass)
{
    struct cluster c;
    cluster_open(&c, dirs[1], 3, 3, EEP_DISPATCH_SOURCE_ROUTED, 0);
    c.rank[2].flags = 4;
    cluster_run(&c, exchange_main);
    for (uint32_t i = 0; i < c.n; i++) {
        ck_assert_msg(c.rank[i].rc == 0, "%s", c.rank[i].err.text);
        ck_assert_uint_eq(c.rank[i].flags, 4);
    }
    cluster_close(&c);
}
END_TEST

START_TEST(other_step_is_refused)
{
    struct cluster c;
    cluster_open(&c, dirs[1], 2, 4, EEP_DISPATCH_SOURCE_ROUTED, 0);
    odd_step = 1;
    limit_ms = 2000;
    cluster_run(&c, exchange_main);
    ck_assert_int_eq(c.rank[0].rc, ERR_PROTOCOL);
    ck_assert_int_eq(c.rank[1].rc, ERR_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(c.rank[0].err.text, "step 6"));
    cluster_close(&c);
}
END_TEST

static void *revoke_main(void *user)
{
    (void)user;
    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    uint64_t one = 1;
    ck_assert_int_eq(write(revoke_fd, &one, sizeof one), sizeof one);
    return NULL;
}

/* A peer that is silent, or has closed: waited for until the revoke. */
START_TEST(revoke_ends_it)
{
    struct cluster c;
    pthread_t revoker;
    cluster_open(&c, dirs[1], 3, 3, EEP_DISPATCH_SOURCE_ROUTED, 0);
    pthread_barrier_t built;
    pthread_barrier_init(&built, NULL, c.n);
    all_built = &built;
    (_i ? leaves : absent)[2] = true;
    uint64_t began = clock_now_ms();
    pthread_create(&revoker, NULL, revoke_main, NULL);
    cluster_run(&c, exchange_main);
    pthread_join(revoker, NULL);
    ck_assert_int_eq(c.rank[0].rc, ERR_ABORTED);
    ck_assert_int_eq(c.rank[1].rc, ERR_ABORTED);
    ck_assert_uint_ge(clock_now_ms() - began, 290);
    ck_assert_uint_lt(clock_now_ms() - began, 10000);
    pthread_barrier_destroy(&built);
    cluster_close(&c);
}
END_TEST

START_TEST(limit_ends_it)
{
    struct cluster c;
    cluster_open(&c, dirs[1], 2, 4, EEP_DISPATCH_SOURCE_ROUTED, 0);
    absent[1] = true;
    limit_ms = 200;
    cluster_run(&c, exchange_main);
    ck_assert_int_eq(c.rank[0].rc, ERR_TIMEOUT);
    ck_assert_ptr_nonnull(strstr(c.rank[0].err.text, "rank 1"));
    cluster_close(&c);
}
END_TEST

/* ---- building ---- */

START_TEST(build_ends)
{
    struct cluster c;
    struct mesh *mesh;
    struct err err = {0};
    cluster_open(&c, dirs[1], 2, 4, EEP_DISPATCH_SOURCE_ROUTED, 0);
    struct mesh_peer peers[RANKS_MOST];
    peers_fill(&c, peers);
    struct mesh_build b = {.lot = c.rank[0].lot,
                           .key = {.epoch = 2},
                           .peers = peers,
                           .n = 2,
                           .self = 0,
                           .limit_ms = 150,
                           .cancelled = never};
    ck_assert_int_eq(mesh_build(&b, &mesh, &err), ERR_TIMEOUT); /* rank 1 never came */
    b.limit_ms = 20000;
    b.cancelled = always;
    ck_assert_int_eq(mesh_build(&b, &mesh, &err), ERR_ABORTED);
    b.cancelled = never;
    b.limit_ms = 150;
    b.self = 1;
    b.lot = c.rank[1].lot;
    peers[0].id = 999; /* another process has the port now */
    ck_assert_int_eq(mesh_build(&b, &mesh, &err), ERR_TIMEOUT);
    peers[0].serving = false; /* no engine there: nobody to connect to */
    ck_assert_int_eq(mesh_build(&b, &mesh, &err), 0);
    ck_assert(mesh_matches(mesh, peers, 2, 1));
    peers[0].serving = true;
    ck_assert(!mesh_matches(mesh, peers, 2, 1));
    mesh_free(mesh);
    cluster_close(&c);
}
END_TEST

static void setup(void)
{
    revoke_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    odd_step = 0;
    limit_ms = 20000;
    memset(absent, 0, sizeof absent);
    memset(leaves, 0, sizeof leaves);
}

static void teardown(void)
{
    close(revoke_fd);
}

int main(void)
{
    Suite *s = suite_create("reference_mesh");
    TCase *t = tcase_create("mesh");
    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, placement_does_not_matter, 0, 2);
    tcase_add_test(t, replicated_maps_must_agree);
    tcase_add_test(t, large_messages_pass);
    tcase_add_test(t, other_step_is_refused);
    tcase_add_loop_test(t, revoke_ends_it, 0, 2);
    tcase_add_test(t, limit_ends_it);
    tcase_add_test(t, build_ends);
    suite_add_tcase(s, t);
    return suite_run(s);
}
