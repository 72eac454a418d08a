/* The reference engine's arithmetic against what transformers computed from the same checkpoints: logits of every
 * position, 48 greedy tokens of every prompt, in both layouts, and independence of the batch and of where an expert lies,
 * bit for bit.  By the host, and where there is a GPU (or the driver of tests/fakecuda) by its kernels.
 * The engine is a program, not a library, hence the included sources. */
#include "tests/engine/compute_host.c"
#include "tests/engine/decoder.c"
#include "tests/engine/forward.c"
#include "tests/engine/source.c"
#include "tests/harness/suite.h"

#include <check.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef HAVE_CUDA
#include "agent/cuda_driver.h"
#endif

#define PROMPTS       8
#define PROMPT_TOKENS 16
#define GREEDY_TOKENS 48
#define TOLERANCE     2e-5f /* the contract is 1e-4; this is what float32 with care gives, with room */

/* A checkpoint as one rank would hold it that has a slot for every expert: expert e lies in slot slot_of(e). */
struct fixture {
    struct source source;
    struct safetensors *reference;
    struct decoder model;
    enum decoder_layout layout;
    uint16_t *w13, *w2; /* [layers][experts][...] */
    const int32_t *input, *greedy;
    const float *logits;
    struct compute *compute;
    struct eep_maps maps; /* one rank */
    bool reversed;        /* the experts in another order: what a slot holds is another expert */
#ifdef HAVE_CUDA
    struct cuda_device *gpu;
    CUdeviceptr memory[512];
    unsigned n_memory;
#endif
};

static bool on_gpu; /* of the present test case */

/* What the kernels read: a copy on the device, or the thing itself. */
static const void *placed(struct fixture *f, const void *data, size_t bytes)
{
#ifdef HAVE_CUDA
    struct err err = {.text = ""};
    if (on_gpu) {
        CUdeviceptr *at = &f->memory[f->n_memory++];
        ck_assert_uint_le(f->n_memory, sizeof f->memory / sizeof f->memory[0]);
        ck_assert_int_eq(f->gpu->driver.cuMemAlloc(at, bytes), CUDA_SUCCESS);
        ck_assert_msg(compute_write(0, (void *)(uintptr_t)*at, data, bytes, &err) == 0, "%s", err.text);
        return (const void *)(uintptr_t)*at;
    }
#endif
    (void)f, (void)bytes;
    return data;
}

static uint32_t slot_of(const struct fixture *f, uint32_t expert, uint32_t experts)
{
    return f->reversed ? experts - 1 - expert : (expert * 5 + 3) % experts; /* a permutation for powers of two */
}

static int fixture_find(void *user, const char *name, struct decoder_tensor *ret_tensor)
{
    struct fixture *f = user;
    const struct decoder_config *c = &f->source.shape;
    uint64_t one = (uint64_t)c->hidden * c->expert_hidden;
    bool rows = f->layout == DECODER_LAYOUT_ROWS;
    unsigned layer;
    char part[16];
    if (sscanf(name, "layers.%u.experts.%15s", &layer, part) == 2) {
        bool w13 = strcmp(part, rows ? "w13" : "w13t") == 0;
        if (!w13 && strcmp(part, rows ? "w2" : "w2t") != 0)
            return ERR_NOTFOUND;
        uint64_t wide = w13 ? 2 * (uint64_t)c->expert_hidden : c->expert_hidden;
        bool wide_first = w13 == rows;
        *ret_tensor = (struct decoder_tensor){
            .data = placed(f, w13 ? f->w13 + layer * c->experts * 2 * one : f->w2 + layer * c->experts * one,
                           (w13 ? 2 : 1) * one * 2 * c->experts),
            .dtype = "BF16",
            .dims = 3,
            .shape = {c->experts, wide_first ? wide : c->hidden, wide_first ? c->hidden : wide},
            .stride = (w13 ? 2 : 1) * one * 2,
        };
        return 0;
    }
    const struct safetensors_tensor *t = source_find(&f->source, name);
    if (!t)
        return ERR_NOTFOUND;
    *ret_tensor = (struct decoder_tensor){.data = placed(f, t->data, t->bytes), .dtype = t->dtype, .dims = t->dims};
    memcpy(ret_tensor->shape, t->shape, sizeof ret_tensor->shape);
    return 0;
}

static const void *reference_tensor(struct safetensors *file, const char *name, uint64_t bytes)
{
    const struct safetensors_tensor *t = safetensors_find(file, name);
    ck_assert_msg(t != NULL && t->bytes == bytes, "reference tensor %s", name);
    return t->data;
}

/* One rank with every expert, once. */
static void fixture_map(struct fixture *f)
{
    const struct decoder_config *c = &f->source.shape;
    size_t n = (size_t)c->layers * c->experts;
    int32_t *held = malloc(n * sizeof *held), *physical = malloc(n * sizeof *physical), *count = malloc(n * sizeof *count);
    uint64_t *load = calloc(n, sizeof *load);
    for (size_t i = 0; i < n; i++) {
        uint32_t expert = (uint32_t)(i % c->experts), slot = slot_of(f, expert, c->experts);
        held[i - expert + slot] = (int32_t)expert;
        physical[i] = (int32_t)slot;
        count[i] = 1;
    }
    f->maps = (struct eep_maps){.layers = c->layers, .logical = c->experts, .slots = c->experts, .max_ranks = 1,
                                .max_replicas = 1, .version = 1, .device = on_gpu ? 0 : -1,
                                .physical_to_logical_map = held, .logical_to_physical_map = physical,
                                .logical_replica_count = count, .expert_load = load};
    if (!on_gpu)
        return;
    union {
        const void *from;
        int32_t *map;
        uint64_t *load;
    } at;
    at.from = placed(f, held, n * sizeof *held);
    f->maps.device_physical_to_logical_map = at.map;
    at.from = placed(f, physical, n * sizeof *physical);
    f->maps.device_logical_to_physical_map = at.map;
    at.from = placed(f, count, n * sizeof *count);
    f->maps.device_logical_replica_count = at.map;
    at.from = placed(f, load, n * sizeof *load);
    f->maps.device_expert_load = at.load;
}

static void fixture_open(struct fixture *f, const char *dir, enum decoder_layout layout, bool reversed)
{
    struct err err = {0};
    char path[256];
    memset(f, 0, sizeof *f);
    f->layout = layout;
    f->reversed = reversed;
#ifdef HAVE_CUDA
    if (on_gpu)
        ck_assert_msg(cuda_device_open("0", &f->gpu, &err) == 0, "%s", err.text);
#endif
    ck_assert_msg(source_open(dir, &f->source, &err) == 0, "%s", err.text);
    const struct decoder_config *c = &f->source.shape;
    size_t one = (size_t)c->hidden * c->expert_hidden, all = (size_t)c->layers * c->experts * one;
    f->w13 = malloc(2 * all * sizeof *f->w13);
    f->w2 = malloc(all * sizeof *f->w2);
    for (uint32_t l = 0; l < c->layers; l++) {
        for (uint32_t e = 0; e < c->experts; e++) {
            size_t at = ((size_t)l * c->experts + slot_of(f, e, c->experts)) * one;
            ck_assert_int_eq(source_expert(&f->source, layout, l, e, f->w13 + 2 * at, f->w2 + at, &err), 0);
        }
    }
    ck_assert_msg(decoder_bind(f->source.config, fixture_find, f, &f->model, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(f->model.layout, layout);
    fixture_map(f);
    int rc = on_gpu ? compute_cuda_open(&f->model, 0, PROMPTS, PROMPT_TOKENS, &f->compute, &err)
                    : compute_host_open(&f->model, &f->compute, &err);
    ck_assert_msg(rc == 0, "%s", err.text);
    snprintf(path, sizeof path, "%s/reference.safetensors", dir);
    ck_assert_msg(safetensors_open(path, &f->reference, &err) == 0, "%s", err.text);
    f->input = reference_tensor(f->reference, "input_ids", PROMPTS * PROMPT_TOKENS * 4);
    f->greedy = reference_tensor(f->reference, "greedy_tokens", PROMPTS * GREEDY_TOKENS * 4);
    f->logits = reference_tensor(f->reference, "logits", (uint64_t)PROMPTS * PROMPT_TOKENS * c->vocab * 4);
}

static void fixture_close(struct fixture *f)
{
    f->compute->close(f->compute);
#ifdef HAVE_CUDA
    for (unsigned i = 0; i < f->n_memory; i++)
        f->gpu->driver.cuMemFree(f->memory[i]);
    cuda_device_close(f->gpu);
#endif
    free(f->maps.physical_to_logical_map);
    free(f->maps.logical_to_physical_map);
    free(f->maps.logical_replica_count);
    free(f->maps.expert_load);
    decoder_done(&f->model);
    safetensors_close(f->reference);
    source_done(&f->source);
    free(f->w13);
    free(f->w2);
}

/* All experts here; computed last to first, so that only the order of combination can be what keeps the bits. */
static int local_moe(void *user, uint32_t layer, uint32_t n, const float *h, float *ret_y)
{
    struct fixture *f = user;
    struct err err = {.text = ""};
    const struct compute_maps maps = {&f->maps, 0, 1};
    uint32_t hidden = f->model.config.hidden, top_k = f->model.config.top_k, all = n * top_k;
    struct choice choices[all];
    struct item items[all];
    float *in = malloc(2 * (size_t)all * hidden * sizeof *in), *out = in + (size_t)all * hidden;
    int rc = f->compute->route(f->compute, layer, &maps, 0, h, n, choices, &err);
    for (uint32_t i = 0; i < all && rc == 0; i++) {
        items[all - 1 - i] = (struct item){(uint32_t)choices[i].physical, choices[i].expert};
        memcpy(in + (size_t)(all - 1 - i) * hidden, h + (size_t)(i / top_k) * hidden, hidden * sizeof *h);
    }
    if (rc == 0)
        rc = f->compute->experts(f->compute, layer, &maps, items, in, all, out, &err);
    ck_assert_msg(rc == 0, "%s", err.text);
    memset(ret_y, 0, (size_t)n * hidden * sizeof *ret_y);
    for (uint32_t i = 0; i < all; i++)
        for (uint32_t j = 0; j < hidden; j++)
            ret_y[(size_t)(i / top_k) * hidden + j] += choices[i].weight * out[(size_t)(all - 1 - i) * hidden + j];
    free(in);
    return 0;
}

static void run(struct fixture *f, const struct forward_token *tokens, uint32_t n)
{
    struct err err = {0};
    ck_assert_msg(forward_run(f->compute, tokens, n, local_moe, f, &err) == 0, "%s", err.text);
}

static void kv_open(struct fixture *f, uint32_t positions, struct decoder_kv *ret_kv)
{
    struct err err = {0};
    ck_assert_msg(f->compute->kv_init(f->compute, positions, ret_kv, &err) == 0, "%s", err.text);
}

static void prefill(struct fixture *f, uint32_t prompt, struct decoder_kv *kv, float *logits)
{
    struct forward_token tokens[PROMPT_TOKENS];
    for (uint32_t i = 0; i < PROMPT_TOKENS; i++)
        tokens[i] = (struct forward_token){f->input[prompt * PROMPT_TOKENS + i], i, kv,
                                           logits + (size_t)i * f->model.config.vocab};
    run(f, tokens, PROMPT_TOKENS);
}

static const char *const dirs[] = {"tests/data/qwen3-moe-tiny", "tests/data/mixtral-tiny"};

START_TEST(logits_match)
{
    struct fixture f;
    fixture_open(&f, dirs[_i / 2], _i % 2 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS, false);
    uint32_t vocab = f.model.config.vocab;
    float *logits = malloc((size_t)PROMPT_TOKENS * vocab * sizeof *logits), worst = 0;
    for (uint32_t p = 0; p < PROMPTS; p++) {
        struct decoder_kv kv;
        kv_open(&f, PROMPT_TOKENS, &kv);
        prefill(&f, p, &kv, logits);
        for (size_t i = 0; i < (size_t)PROMPT_TOKENS * vocab; i++) {
            float d = fabsf(logits[i] - f.logits[(size_t)p * PROMPT_TOKENS * vocab + i]);
            worst = d > worst || isnan(d) ? d : worst;
        }
        f.compute->kv_done(f.compute, &kv);
    }
    ck_assert_msg(worst < TOLERANCE, "logits of %s differ by %g", dirs[_i / 2], (double)worst);
    free(logits);
    fixture_close(&f);
}
END_TEST

START_TEST(greedy_tokens_equal)
{
    struct fixture f;
    fixture_open(&f, dirs[_i / 2], _i % 2 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS, false);
    uint32_t vocab = f.model.config.vocab;
    float *logits = malloc((size_t)PROMPT_TOKENS * vocab * sizeof *logits);
    struct decoder_kv kv[PROMPTS];
    struct forward_token tokens[PROMPTS];
    for (uint32_t p = 0; p < PROMPTS; p++) {
        kv_open(&f, PROMPT_TOKENS + GREEDY_TOKENS, &kv[p]);
        prefill(&f, p, &kv[p], logits);
        tokens[p] = (struct forward_token){decoder_argmax(logits + (size_t)(PROMPT_TOKENS - 1) * vocab, vocab),
                                           PROMPT_TOKENS, &kv[p], logits + (size_t)p * vocab};
    }
    /* the logits buffer holds PROMPT_TOKENS rows, more than PROMPTS */
    for (uint32_t step = 0; step < GREEDY_TOKENS; step++) {
        for (uint32_t p = 0; p < PROMPTS; p++)
            ck_assert_msg(tokens[p].token == f.greedy[p * GREEDY_TOKENS + step], "%s prompt %u token %u: %d, not %d",
                          dirs[_i / 2], p, step, tokens[p].token, f.greedy[p * GREEDY_TOKENS + step]);
        if (step + 1 == GREEDY_TOKENS)
            break;
        run(&f, tokens, PROMPTS); /* all sequences in one batch */
        for (uint32_t p = 0; p < PROMPTS; p++) {
            tokens[p].token = decoder_argmax(tokens[p].logits, vocab);
            tokens[p].position++;
        }
    }
    for (uint32_t p = 0; p < PROMPTS; p++)
        f.compute->kv_done(f.compute, &kv[p]);
    free(logits);
    fixture_close(&f);
}
END_TEST

/* One token at a time, or the prompt at once, or again after a failed step, and the experts in other slots: the same bits. */
START_TEST(batch_and_place_do_not_matter)
{
    struct fixture f, g;
    fixture_open(&f, dirs[_i / 2], _i % 2 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS, false);
    fixture_open(&g, dirs[_i / 2], _i % 2 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS, true);
    size_t vocab = f.model.config.vocab, bytes = PROMPT_TOKENS * vocab * sizeof(float);
    float *whole = malloc(bytes), *single = malloc(bytes);
    struct decoder_kv kv, kv1;
    kv_open(&f, PROMPT_TOKENS, &kv);
    kv_open(&g, PROMPT_TOKENS + 3, &kv1);
    prefill(&f, 1, &kv, whole);
    for (uint32_t i = 0; i < PROMPT_TOKENS; i++) {
        struct forward_token t = {f.input[PROMPT_TOKENS + i], i, &kv1, single + i * vocab};
        run(&g, &t, 1);
        run(&g, &t, 1);
    }
    ck_assert_int_eq(memcmp(whole, single, bytes), 0);
    f.compute->kv_done(f.compute, &kv);
    g.compute->kv_done(g.compute, &kv1);
    free(whole);
    free(single);
    fixture_close(&g);
    fixture_close(&f);
}
END_TEST

/* A token for an expert that the slot does not hold is noticed; a slot that routes to nothing is in its grace. */
START_TEST(a_slot_with_another_expert_is_noticed)
{
    struct fixture f;
    struct err err = {.text = ""};
    fixture_open(&f, dirs[0], DECODER_LAYOUT_ROWS, false);
    const struct compute_maps maps = {&f.maps, 0, 1};
    uint32_t hidden = f.model.config.hidden;
    float *h = calloc(2 * hidden, sizeof *h);
    struct item item = {slot_of(&f, 3, f.model.config.experts), 3};
    ck_assert_msg(f.compute->experts(f.compute, 1, &maps, &item, h, 1, h + hidden, &err) == 0, "%s", err.text);
    item.expert = 4;
    ck_assert_int_eq(f.compute->experts(f.compute, 1, &maps, &item, h, 1, h + hidden, &err), ERR_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "a token for expert 4"));
    free(h);
    fixture_close(&f);
}
END_TEST

/* A slot that stands three times among four entries gets three quarters of the tokens. */
START_TEST(entries_are_shares)
{
    struct fixture f;
    struct err err = {0};
    enum { TOKENS = 2000 };
    on_gpu = false;
    fixture_open(&f, dirs[0], DECODER_LAYOUT_ROWS, false);
    const struct decoder_config *c = &f.model.config;
    struct eep_maps maps = f.maps;
    int32_t *entries = calloc((size_t)c->experts * 4, sizeof *entries), *count = calloc(c->experts, sizeof *count);
    float *h = calloc((size_t)TOKENS * c->hidden, sizeof *h);
    struct choice *choices = calloc((size_t)TOKENS * c->top_k, sizeof *choices);
    uint32_t often = 0, seldom = 0;
    for (uint32_t e = 0; e < c->experts; e++) {
        count[e] = 4;
        for (uint32_t i = 0; i < 4; i++)
            entries[4 * e + i] = (int32_t)(e + (i == 1 ? c->experts : 0));
    }
    maps.max_replicas = 4;
    maps.logical_to_physical_map = entries;
    maps.logical_replica_count = count;
    const struct compute_maps now = {&maps, 0, 1};
    for (uint32_t i = 0; i < TOKENS * c->hidden; i++)
        h[i] = (float)((i * 2654435761u >> 8) % 2001) / 1000 - 1;
    ck_assert_msg(f.compute->route(f.compute, 0, &now, 0, h, TOKENS, choices, &err) == 0, "%s", err.text);
    for (uint32_t i = 0; i < TOKENS * c->top_k; i++) {
        ck_assert_uint_eq((uint32_t)choices[i].physical % c->experts, choices[i].expert);
        ++*((uint32_t)choices[i].physical < c->experts ? &often : &seldom);
    }
    ck_assert_msg(often > 2.7 * seldom && often < 3.3 * seldom, "%u and %u tokens", often, seldom);
    free(choices);
    free(h);
    free(entries);
    free(count);
    fixture_close(&f);
}
END_TEST

START_TEST(config_variants)
{
    struct decoder_config c;
    struct err err = {0};
    const char *old = "{\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"vocab_size\":10,"
                      "\"max_position_embeddings\":32,\"num_experts\":6,\"num_experts_per_tok\":2,"
                      "\"intermediate_size\":99,\"moe_intermediate_size\":24,\"rope_theta\":5000,"
                      "\"norm_topk_prob\":false,\"tie_word_embeddings\":true}";
    ck_assert_msg(decoder_config_parse(old, &c, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(c.experts, 6);
    ck_assert_uint_eq(c.expert_hidden, 24);
    ck_assert_uint_eq(c.kv_heads, 4);
    ck_assert_uint_eq(c.head_dim, 16);
    ck_assert(c.rope_theta > 4999.0f && c.rope_theta < 5001.0f);
    ck_assert(!c.norm_topk && c.tie_embeddings);
    ck_assert_int_eq(decoder_config_parse("{", &c, &err), ERR_INVALID);
    ck_assert_int_eq(decoder_config_parse("{\"hidden_size\":-1}", &c, &err), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "hidden_size"));
}
END_TEST

static void use_gpu(void)
{
    on_gpu = true;
}

static void use_host(void)
{
    on_gpu = false;
}

/* In a process of its own: a context does not survive the forks of the tests. */
static bool gpu_there(void)
{
#ifdef HAVE_CUDA
    int status = 1;
    struct gpu first;
    size_t n = 0;
    pid_t pid = fork();
    if (pid == 0)
        _exit(gpu_list(&first, 1, &n, NULL) < 0 || n == 0 ? 1 : 0);
    waitpid(pid, &status, 0);
    return status == 0 && kernels_image();
#else
    return false;
#endif
}

static void add(Suite *s, const char *name, SFun setup)
{
    TCase *t = tcase_create(name);
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, logits_match, 0, 4);
    tcase_add_loop_test(t, greedy_tokens_equal, 0, 4);
    tcase_add_loop_test(t, batch_and_place_do_not_matter, 0, 4);
    tcase_add_test(t, a_slot_with_another_expert_is_noticed);
    suite_add_tcase(s, t);
}

int main(void)
{
    Suite *s = suite_create("reference_model");
    TCase *t = tcase_create("config");
    tcase_add_test(t, config_variants);
    tcase_add_test(t, entries_are_shares);
    suite_add_tcase(s, t);
    add(s, "host", use_host);
    if (gpu_there())
        add(s, "GPU", use_gpu);
    else
        puts("the kernels are not tested: there is no GPU, or no cuda.h or nvcc in this build");
    return suite_run(s);
}
