/* See checkpoint_models.h.
 *
 * Qwen3-30B-A3B: 48 layers, all with 128 experts, bf16.  DeepSeek-V3: 61 layers, the first 3 dense, the others with 256
 * routed experts and a shared one, latent attention, fp8 with a scale for each block of 128 x 128; norms, router,
 * embedding and head are bf16.  Its layer for multi-token prediction (model.layers.61) is left out.  Pure. */
#include "tests/gpu/checkpoint_models.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 128u

static void add(struct model_list *l, const char *dtype, uint32_t element, uint64_t rows, uint64_t columns,
                const char *fmt, va_list args)
{
    struct model_tensor *t = &l->tensors[l->n++];
    *t = (struct model_tensor){.dtype = dtype, .dims = columns ? 2 : 1, .shape = {rows, columns}};
    t->bytes = rows * (columns ? columns : 1) * element;
    vsnprintf(t->name, sizeof t->name, fmt, args);
    l->bytes += t->bytes;
}

/* columns = 0: a vector */
__attribute__((format(printf, 4, 5))) static void bf16(struct model_list *l, uint64_t rows, uint64_t columns,
                                                       const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    add(l, "BF16", 2, rows, columns, fmt, args);
    va_end(args);
}

__attribute__((format(printf, 3, 4))) static void f32(struct model_list *l, uint64_t rows, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    add(l, "F32", 4, rows, 0, fmt, args);
    va_end(args);
}

/* NAME.weight, and NAME.weight_scale_inv beside it. */
__attribute__((format(printf, 4, 5))) static void fp8(struct model_list *l, uint64_t rows, uint64_t columns,
                                                      const char *fmt, ...)
{
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    add(l, "F8_E4M3", 1, rows, columns, fmt, args);
    add(l, "F32", 4, (rows + BLOCK - 1) / BLOCK, (columns + BLOCK - 1) / BLOCK, fmt, again);
    va_end(again);
    va_end(args);
    strcat(l->tensors[l->n - 2].name, ".weight"); /* the longest name has 63 bytes */
    strcat(l->tensors[l->n - 1].name, ".weight_scale_inv");
}

static void qwen_layer(struct model_list *l, uint32_t i)
{
    const uint64_t hidden = 2048, inner = 768, queries = 32 * 128, keys = 4 * 128;
    bf16(l, hidden, 0, "model.layers.%u.input_layernorm.weight", i);
    bf16(l, queries, hidden, "model.layers.%u.self_attn.q_proj.weight", i);
    bf16(l, keys, hidden, "model.layers.%u.self_attn.k_proj.weight", i);
    bf16(l, keys, hidden, "model.layers.%u.self_attn.v_proj.weight", i);
    bf16(l, hidden, queries, "model.layers.%u.self_attn.o_proj.weight", i);
    bf16(l, 128, 0, "model.layers.%u.self_attn.q_norm.weight", i);
    bf16(l, 128, 0, "model.layers.%u.self_attn.k_norm.weight", i);
    bf16(l, hidden, 0, "model.layers.%u.post_attention_layernorm.weight", i);
    bf16(l, l->cut.experts, hidden, "model.layers.%u.mlp.gate.weight", i);
    for (uint32_t e = 0; e < l->cut.experts; e++) {
        bf16(l, inner, hidden, "model.layers.%u.mlp.experts.%u.gate_proj.weight", i, e);
        bf16(l, inner, hidden, "model.layers.%u.mlp.experts.%u.up_proj.weight", i, e);
        bf16(l, hidden, inner, "model.layers.%u.mlp.experts.%u.down_proj.weight", i, e);
    }
}

static void deepseek_layer(struct model_list *l, uint32_t i)
{
    const uint64_t hidden = 7168, inner = 2048, dense_inner = 18432, heads = 128;
    const uint64_t q_rank = 1536, kv_rank = 512, nope = 128, rope = 64, value = 128;
    bf16(l, hidden, 0, "model.layers.%u.input_layernorm.weight", i);
    fp8(l, q_rank, hidden, "model.layers.%u.self_attn.q_a_proj", i);
    bf16(l, q_rank, 0, "model.layers.%u.self_attn.q_a_layernorm.weight", i);
    fp8(l, heads * (nope + rope), q_rank, "model.layers.%u.self_attn.q_b_proj", i);
    fp8(l, kv_rank + rope, hidden, "model.layers.%u.self_attn.kv_a_proj_with_mqa", i);
    bf16(l, kv_rank, 0, "model.layers.%u.self_attn.kv_a_layernorm.weight", i);
    fp8(l, heads * (nope + value), kv_rank, "model.layers.%u.self_attn.kv_b_proj", i);
    fp8(l, hidden, heads * value, "model.layers.%u.self_attn.o_proj", i);
    bf16(l, hidden, 0, "model.layers.%u.post_attention_layernorm.weight", i);
    if (i < l->cut.dense_layers) {
        fp8(l, dense_inner, hidden, "model.layers.%u.mlp.gate_proj", i);
        fp8(l, dense_inner, hidden, "model.layers.%u.mlp.up_proj", i);
        fp8(l, hidden, dense_inner, "model.layers.%u.mlp.down_proj", i);
        return;
    }
    bf16(l, l->cut.experts, hidden, "model.layers.%u.mlp.gate.weight", i);
    f32(l, l->cut.experts, "model.layers.%u.mlp.gate.e_score_correction_bias", i);
    for (uint32_t e = 0; e < l->cut.experts; e++) {
        fp8(l, inner, hidden, "model.layers.%u.mlp.experts.%u.gate_proj", i, e);
        fp8(l, inner, hidden, "model.layers.%u.mlp.experts.%u.up_proj", i, e);
        fp8(l, hidden, inner, "model.layers.%u.mlp.experts.%u.down_proj", i, e);
    }
    fp8(l, inner, hidden, "model.layers.%u.mlp.shared_experts.gate_proj", i);
    fp8(l, inner, hidden, "model.layers.%u.mlp.shared_experts.up_proj", i);
    fp8(l, hidden, inner, "model.layers.%u.mlp.shared_experts.down_proj", i);
}

static void qwen_config(const struct model_cut *cut, FILE *f)
{
    fprintf(f,
            "{\n"
            "  \"architectures\": [\"Qwen3MoeForCausalLM\"],\n"
            "  \"model_type\": \"qwen3_moe\",\n"
            "  \"attention_bias\": false,\n"
            "  \"decoder_sparse_step\": 1,\n"
            "  \"head_dim\": 128,\n"
            "  \"hidden_act\": \"silu\",\n"
            "  \"hidden_size\": 2048,\n"
            "  \"intermediate_size\": 6144,\n"
            "  \"max_position_embeddings\": 40960,\n"
            "  \"mlp_only_layers\": [],\n"
            "  \"moe_intermediate_size\": 768,\n"
            "  \"norm_topk_prob\": true,\n"
            "  \"num_attention_heads\": 32,\n"
            "  \"num_experts\": %u,\n"
            "  \"num_experts_per_tok\": %u,\n"
            "  \"num_hidden_layers\": %u,\n"
            "  \"num_key_value_heads\": 4,\n"
            "  \"rms_norm_eps\": 1e-06,\n"
            "  \"rope_theta\": 1000000.0,\n"
            "  \"tie_word_embeddings\": false,\n"
            "  \"torch_dtype\": \"bfloat16\",\n"
            "  \"vocab_size\": %llu\n"
            "}\n",
            cut->experts, cut->experts < 8 ? cut->experts : 8, cut->layers, (unsigned long long)cut->vocabulary);
}

static void deepseek_config(const struct model_cut *cut, FILE *f)
{
    fprintf(f,
            "{\n"
            "  \"architectures\": [\"DeepseekV3ForCausalLM\"],\n"
            "  \"model_type\": \"deepseek_v3\",\n"
            "  \"first_k_dense_replace\": %u,\n"
            "  \"hidden_act\": \"silu\",\n"
            "  \"hidden_size\": 7168,\n"
            "  \"intermediate_size\": 18432,\n"
            "  \"kv_lora_rank\": 512,\n"
            "  \"max_position_embeddings\": 163840,\n"
            "  \"moe_intermediate_size\": 2048,\n"
            "  \"moe_layer_freq\": 1,\n"
            "  \"n_group\": %u,\n"
            "  \"n_routed_experts\": %u,\n"
            "  \"n_shared_experts\": 1,\n"
            "  \"norm_topk_prob\": true,\n"
            "  \"num_attention_heads\": 128,\n"
            "  \"num_experts_per_tok\": %u,\n"
            "  \"num_hidden_layers\": %u,\n"
            "  \"num_key_value_heads\": 128,\n"
            "  \"num_nextn_predict_layers\": 0,\n"
            "  \"q_lora_rank\": 1536,\n"
            "  \"qk_nope_head_dim\": 128,\n"
            "  \"qk_rope_head_dim\": 64,\n"
            "  \"quantization_config\": {\"activation_scheme\": \"dynamic\", \"fmt\": \"e4m3\", \"quant_method\": "
            "\"fp8\",\n"
            "                          \"weight_block_size\": [128, 128]},\n"
            "  \"rms_norm_eps\": 1e-06,\n"
            "  \"rope_theta\": 10000,\n"
            "  \"routed_scaling_factor\": 2.5,\n"
            "  \"scoring_func\": \"sigmoid\",\n"
            "  \"tie_word_embeddings\": false,\n"
            "  \"topk_group\": %u,\n"
            "  \"topk_method\": \"noaux_tc\",\n"
            "  \"torch_dtype\": \"bfloat16\",\n"
            "  \"v_head_dim\": 128,\n"
            "  \"vocab_size\": %llu\n"
            "}\n",
            cut->dense_layers, cut->experts % 8 ? 1 : 8, cut->experts, cut->experts < 8 ? cut->experts : 8, cut->layers,
            cut->experts % 8 ? 1 : 4, (unsigned long long)cut->vocabulary);
}

const char *const model_names[] = {"qwen3-30b-a3b", "deepseek-v3", NULL};

static const struct model {
    struct model_cut own;
    uint64_t hidden;
    uint32_t per_layer, per_expert; /* tensors, at most */
    void (*layer)(struct model_list *l, uint32_t i);
    void (*config)(const struct model_cut *cut, FILE *file);
} models[] = {
    {{48, 128, 0, 151936}, 2048, 9, 3, qwen_layer, qwen_config},
    {{61, 256, 3, 129280}, 7168, 22, 6, deepseek_layer, deepseek_config},
};

static const struct model *model_find(const char *name)
{
    for (size_t i = 0; model_names[i]; i++)
        if (strcmp(model_names[i], name) == 0)
            return &models[i];
    return NULL;
}

static bool cut_complete(const struct model *m, const struct model_cut *cut, struct model_cut *ret_cut, char why[200])
{
    struct model_cut c = *cut;
    c.layers = c.layers ? c.layers : m->own.layers;
    c.experts = c.experts ? c.experts : m->own.experts;
    c.vocabulary = c.vocabulary ? c.vocabulary : m->own.vocabulary;
    c.dense_layers = c.dense_layers == UINT32_MAX ? m->own.dense_layers : c.dense_layers;
    if (c.dense_layers > 0 && m->own.dense_layers == 0) {
        snprintf(why, 200, "this model has no dense layers");
        return false;
    }
    if (c.dense_layers >= c.layers) {
        snprintf(why, 200,
                 "of %u layers the first %u are dense, so none has experts; ask for more, or fewer dense ones",
                 c.layers, c.dense_layers);
        return false;
    }
    *ret_cut = c;
    return true;
}

bool model_list_make(const char *model, const struct model_cut *cut, struct model_list *ret_list, char why[200])
{
    const struct model *m = model_find(model);
    struct model_list l = {0};
    if (!m) {
        snprintf(why, 200, "no model is called '%.64s'; there are %s and %s", model, model_names[0], model_names[1]);
        return false;
    }
    if (!cut_complete(m, cut, &l.cut, why))
        return false;
    l.tensors =
        calloc((size_t)l.cut.layers * (m->per_layer + (size_t)m->per_expert * l.cut.experts) + 3, sizeof *l.tensors);
    if (!l.tensors) {
        snprintf(why, 200, "out of memory");
        return false;
    }
    bf16(&l, l.cut.vocabulary, m->hidden, "model.embed_tokens.weight");
    for (uint32_t i = 0; i < l.cut.layers; i++)
        m->layer(&l, i);
    bf16(&l, m->hidden, 0, "model.norm.weight");
    bf16(&l, l.cut.vocabulary, m->hidden, "lm_head.weight");
    uint64_t experts = 0;
    for (size_t i = 0; i < l.n; i++)
        experts += strstr(l.tensors[i].name, ".experts.") ? l.tensors[i].bytes : 0;
    l.expert_bytes = experts / l.cut.experts / (l.cut.layers - l.cut.dense_layers);
    l.dense_bytes = l.bytes - experts;
    *ret_list = l;
    return true;
}

void model_list_done(struct model_list *list)
{
    free(list->tensors);
}

void model_config_write(const char *model, const struct model_cut *cut, FILE *file)
{
    model_find(model)->config(cut, file);
}
