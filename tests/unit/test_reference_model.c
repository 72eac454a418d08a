/* The reference engine's arithmetic against what transformers computed from the same checkpoints: logits of every
 * position, 48 greedy tokens of every prompt, in both layouts, and independence of the batch, bit for bit.
 * The engine is a program, not a library, hence the included sources. */
#include "tests/engine/compute_host.c"
#include "tests/engine/decoder.c"
#include "tests/engine/forward.c"
#include "tests/engine/source.c"

#include <check.h>

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
};

static uint32_t slot_of(uint32_t expert, uint32_t experts)
{
    return (expert * 5 + 3) % experts; /* a permutation for powers of two */
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
            .data = w13 ? f->w13 + layer * c->experts * 2 * one : f->w2 + layer * c->experts * one,
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
    *ret_tensor = (struct decoder_tensor){.data = t->data, .dtype = t->dtype, .dims = t->dims};
    memcpy(ret_tensor->shape, t->shape, sizeof ret_tensor->shape);
    return 0;
}

static const void *reference_tensor(struct safetensors *file, const char *name, uint64_t bytes)
{
    const struct safetensors_tensor *t = safetensors_find(file, name);
    ck_assert_msg(t != NULL && t->bytes == bytes, "reference tensor %s", name);
    return t->data;
}

static void fixture_open(struct fixture *f, const char *dir, enum decoder_layout layout)
{
    struct err err = {0};
    char path[256];
    memset(f, 0, sizeof *f);
    f->layout = layout;
    ck_assert_msg(source_open(dir, &f->source, &err) == 0, "%s", err.text);
    const struct decoder_config *c = &f->source.shape;
    size_t one = (size_t)c->hidden * c->expert_hidden, all = (size_t)c->layers * c->experts * one;
    f->w13 = malloc(2 * all * sizeof *f->w13);
    f->w2 = malloc(all * sizeof *f->w2);
    for (uint32_t l = 0; l < c->layers; l++) {
        for (uint32_t e = 0; e < c->experts; e++) {
            size_t at = ((size_t)l * c->experts + slot_of(e, c->experts)) * one;
            ck_assert_int_eq(source_expert(&f->source, layout, l, e, f->w13 + 2 * at, f->w2 + at, &err), 0);
        }
    }
    ck_assert_msg(decoder_bind(f->source.config, fixture_find, f, &f->model, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(f->model.layout, layout);
    snprintf(path, sizeof path, "%s/reference.safetensors", dir);
    ck_assert_msg(safetensors_open(path, &f->reference, &err) == 0, "%s", err.text);
    f->input = reference_tensor(f->reference, "input_ids", PROMPTS * PROMPT_TOKENS * 4);
    f->greedy = reference_tensor(f->reference, "greedy_tokens", PROMPTS * GREEDY_TOKENS * 4);
    f->logits = reference_tensor(f->reference, "logits", (uint64_t)PROMPTS * PROMPT_TOKENS * c->vocab * 4);
}

static void fixture_close(struct fixture *f)
{
    decoder_done(&f->model);
    safetensors_close(f->reference);
    source_done(&f->source);
    free(f->w13);
    free(f->w2);
}

/* All experts here; experts in reverse, so that only the order of combination can be what keeps the bits. */
static int local_moe(void *user, uint32_t layer, uint32_t n, const float *h, float *ret_y)
{
    const struct decoder *m = user;
    uint32_t hidden = m->config.hidden, top_k = m->config.top_k, expert[TOP_K_MAX];
    float weight[TOP_K_MAX], scratch[3 * m->config.expert_hidden], out[top_k][hidden];
    for (uint32_t i = 0; i < n; i++) {
        decoder_route(m, layer, h + (size_t)i * hidden, expert, weight);
        for (uint32_t k = top_k; k-- > 0;)
            decoder_expert(m, layer, slot_of(expert[k], m->config.experts), h + (size_t)i * hidden, scratch, out[k]);
        float *y = ret_y + (size_t)i * hidden;
        memset(y, 0, hidden * sizeof *y);
        for (uint32_t k = 0; k < top_k; k++) {
            for (uint32_t j = 0; j < hidden; j++)
                y[j] += weight[k] * out[k][j];
        }
    }
    return 0;
}

static void run(struct fixture *f, const struct forward_token *tokens, uint32_t n)
{
    struct err err = {0};
    struct compute *compute;
    ck_assert_msg(compute_host_open(&f->model, &compute, &err) == 0, "%s", err.text);
    ck_assert_msg(forward_run(compute, tokens, n, local_moe, &f->model, &err) == 0, "%s", err.text);
    compute->close(compute);
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
    fixture_open(&f, dirs[_i / 2], _i % 2 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS);
    uint32_t vocab = f.model.config.vocab;
    float *logits = malloc((size_t)PROMPT_TOKENS * vocab * sizeof *logits), worst = 0;
    struct err err = {0};
    for (uint32_t p = 0; p < PROMPTS; p++) {
        struct decoder_kv kv;
        ck_assert_int_eq(decoder_kv_init(&f.model.config, PROMPT_TOKENS, &kv, &err), 0);
        prefill(&f, p, &kv, logits);
        for (size_t i = 0; i < (size_t)PROMPT_TOKENS * vocab; i++) {
            float d = fabsf(logits[i] - f.logits[(size_t)p * PROMPT_TOKENS * vocab + i]);
            worst = d > worst || isnan(d) ? d : worst;
        }
        decoder_kv_done(&kv);
    }
    ck_assert_msg(worst < TOLERANCE, "logits of %s differ by %g", dirs[_i / 2], (double)worst);
    free(logits);
    fixture_close(&f);
}
END_TEST

START_TEST(greedy_tokens_equal)
{
    struct fixture f;
    fixture_open(&f, dirs[_i / 2], _i % 2 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS);
    uint32_t vocab = f.model.config.vocab;
    float *logits = malloc((size_t)PROMPT_TOKENS * vocab * sizeof *logits);
    struct decoder_kv kv[PROMPTS];
    struct forward_token tokens[PROMPTS];
    struct err err = {0};
    for (uint32_t p = 0; p < PROMPTS; p++) {
        ck_assert_int_eq(decoder_kv_init(&f.model.config, PROMPT_TOKENS + GREEDY_TOKENS, &kv[p], &err), 0);
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
        decoder_kv_done(&kv[p]);
    free(logits);
    fixture_close(&f);
}
END_TEST

/* One token at a time, or the prompt at once, or again after a failed step: the same bits. */
START_TEST(batch_does_not_matter)
{
    struct fixture f;
    fixture_open(&f, dirs[_i], DECODER_LAYOUT_ROWS);
    size_t vocab = f.model.config.vocab, bytes = PROMPT_TOKENS * vocab * sizeof(float);
    float *whole = malloc(bytes), *single = malloc(bytes);
    struct decoder_kv kv, kv1;
    struct err err = {0};
    ck_assert_int_eq(decoder_kv_init(&f.model.config, PROMPT_TOKENS, &kv, &err), 0);
    ck_assert_int_eq(decoder_kv_init(&f.model.config, PROMPT_TOKENS + 3, &kv1, &err), 0);
    prefill(&f, 1, &kv, whole);
    for (uint32_t i = 0; i < PROMPT_TOKENS; i++) {
        struct forward_token t = {f.input[PROMPT_TOKENS + i], i, &kv1, single + i * vocab};
        run(&f, &t, 1);
        run(&f, &t, 1);
    }
    ck_assert_int_eq(memcmp(whole, single, bytes), 0);
    decoder_kv_done(&kv);
    decoder_kv_done(&kv1);
    free(whole);
    free(single);
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

int main(void)
{
    Suite *s = suite_create("reference_model");
    TCase *t = tcase_create("model");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, config_variants);
    tcase_add_loop_test(t, logits_match, 0, 4);
    tcase_add_loop_test(t, greedy_tokens_equal, 0, 4);
    tcase_add_loop_test(t, batch_does_not_matter, 0, 2);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
