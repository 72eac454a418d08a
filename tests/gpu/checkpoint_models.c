/* Lists of tensors from the tables of checkpoint_tables.c, and config.json.  See checkpoint_models.h.  Pure. */
#include "tests/gpu/checkpoint_models.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK 128u

static uint32_t element_bytes(const char *dtype)
{
    return strcmp(dtype, "F32") == 0 ? 4 : strcmp(dtype, "BF16") == 0 ? 2 : 1;
}

static uint64_t dimension(const struct model_cut *cut, uint64_t d)
{
    return d == N_EXPERTS ? cut->experts : d == N_WORDS ? cut->vocabulary : d;
}

static void tensor_add(struct model_list *l, const char *prefix, const struct model_row *row, const char *dtype,
                       const char *name_end, uint32_t block)
{
    struct model_tensor *t = &l->tensors[l->n++];
    *t = (struct model_tensor){.dtype = dtype, .bytes = element_bytes(dtype)};
    for (; t->dims < MODEL_DIMS && row->shape[t->dims]; t->dims++) {
        t->shape[t->dims] = (dimension(&l->cut, row->shape[t->dims]) + block - 1) / block;
        t->bytes *= t->shape[t->dims];
    }
    snprintf(t->name, sizeof t->name, "%s%s%s", prefix, row->name, name_end);
    l->bytes += t->bytes;
}

static void row_add(struct model_list *l, const char *prefix, const struct model_row *row)
{
    bool fp8 = strcmp(row->dtype, "FP8") == 0;
    tensor_add(l, prefix, row, fp8 ? "F8_E4M3" : row->dtype, "", 1);
    if (fp8) /* NAME.weight_scale_inv beside NAME.weight */
        tensor_add(l, prefix, row, "F32", "_scale_inv", BLOCK);
}

static void rows_add(struct model_list *l, const struct model_table *m, enum model_place place, const char *prefix)
{
    for (const struct model_row *row = m->rows; row->place; row++)
        if (row->place == place)
            row_add(l, prefix, row);
}

static void layer_add(struct model_list *l, const struct model_table *m, uint32_t layer)
{
    char prefix[96];
    snprintf(prefix, sizeof prefix, "%s%u.", m->stack, layer);
    if (layer >= l->cut.layers)
        rows_add(l, m, AT_MTP, prefix);
    rows_add(l, m, AT_LAYER, prefix);
    if (layer < l->cut.dense_layers) {
        rows_add(l, m, AT_DENSE, prefix);
        return;
    }
    rows_add(l, m, AT_MOE, prefix);
    for (uint32_t e = 0; m->experts && e < l->cut.experts; e++) {
        snprintf(prefix, sizeof prefix, "%s%u.%s%u.", m->stack, layer, m->experts, e);
        rows_add(l, m, AT_EXPERT, prefix);
    }
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
            "  \"num_nextn_predict_layers\": %u,\n"
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
            cut->mtp_layers, cut->experts % 8 ? 1 : 4, (unsigned long long)cut->vocabulary);
}

static void any_config(const struct model_table *m, const struct model_cut *cut, FILE *f)
{
    fprintf(f, "{\n  \"architectures\": [\"AnyForCausalLM\"],\n  \"model_type\": \"%s\",\n  \"%s\": \"bfloat16\",\n%s",
            m->type, m->nested ? "dtype" : "torch_dtype", m->nested ? "  \"text_config\": {\n" : "");
    fprintf(f,
            "  \"hidden_size\": %llu,\n  \"%s\": %u,\n  \"num_hidden_layers\": %u,\n  \"vocab_size\": %llu%s\n"
            "}\n",
            (unsigned long long)m->hidden, m->experts_key, cut->experts, cut->layers,
            (unsigned long long)cut->vocabulary, m->nested ? "\n  }" : "");
}

static const struct model_table *model_find(const char *name)
{
    for (const struct model_table *m = model_tables; m->name; m++)
        if (strcmp(m->name, name) == 0)
            return m;
    return NULL;
}

void model_names_text(char *text, size_t size)
{
    size_t n = 0;
    for (const struct model_table *m = model_tables; m->name && n < size; m++)
        n += (size_t)snprintf(text + n, size - n, "%s%s", n == 0 ? "" : m[1].name ? ", " : " and ", m->name);
}

static bool cut_complete(const struct model_table *m, const struct model_cut *cut, struct model_cut *ret_cut,
                         char why[400])
{
    struct model_cut c = *cut;
    c.layers = c.layers ? c.layers : m->own.layers;
    c.experts = c.experts ? c.experts : m->own.experts;
    c.vocabulary = c.vocabulary ? c.vocabulary : m->own.vocabulary;
    c.dense_layers = c.dense_layers == UINT32_MAX ? m->own.dense_layers : c.dense_layers;
    c.mtp_layers = c.mtp_layers == UINT32_MAX ? m->own.mtp_layers : c.mtp_layers;
    if ((c.dense_layers > 0 && m->own.dense_layers == 0) || (c.mtp_layers > 0 && m->own.mtp_layers == 0)) {
        snprintf(why, 400, "this model has no %s",
                 c.dense_layers > m->own.dense_layers ? "dense layers" : "layers for multi-token prediction");
        return false;
    }
    if (c.dense_layers >= c.layers) {
        snprintf(why, 400,
                 "of %u layers the first %u are dense, so none has experts; ask for more, or fewer dense ones",
                 c.layers, c.dense_layers);
        return false;
    }
    *ret_cut = c;
    return true;
}

bool model_list_make(const char *model, const struct model_cut *cut, struct model_list *ret_list, char why[400])
{
    const struct model_table *m = model_find(model);
    struct model_list l = {0};
    if (!m) {
        char names[300];
        model_names_text(names, sizeof names);
        snprintf(why, 400, "no model is called '%.64s'; there are %s", model, names);
        return false;
    }
    if (!cut_complete(m, cut, &l.cut, why))
        return false;
    size_t layers = l.cut.layers + l.cut.mtp_layers;
    l.tensors =
        calloc(2 * MODEL_ROWS * (layers + 1) + (m->experts ? 6 * layers * l.cut.experts : 0), sizeof *l.tensors);
    if (!l.tensors) {
        snprintf(why, 400, "out of memory");
        return false;
    }
    rows_add(&l, m, AT_TOP, "");
    size_t first = 0, end = 0;
    for (uint32_t i = 0; i < layers; i++) {
        first = i == l.cut.dense_layers ? l.n : first;
        layer_add(&l, m, i);
        end = i == l.cut.dense_layers ? l.n : end;
    }
    size_t mtp = l.n;
    for (uint32_t i = l.cut.layers; i < layers; i++) /* they came last */
        while (mtp > 0 && strtoul(l.tensors[mtp - 1].name + strlen(m->stack), NULL, 10) >= l.cut.layers)
            l.mtp_bytes += l.tensors[--mtp].bytes;
    rows_add(&l, m, AT_END, "");
    for (size_t i = first; i < end; i++)
        l.expert_bytes += strstr(l.tensors[i].name, ".experts.") ? l.tensors[i].bytes : 0;
    l.dense_bytes = l.bytes - l.mtp_bytes - l.expert_bytes * (l.cut.layers - l.cut.dense_layers);
    l.expert_bytes /= l.cut.experts;
    *ret_list = l;
    return true;
}

void model_list_done(struct model_list *list)
{
    free(list->tensors);
}

void model_config_write(const char *model, const struct model_cut *cut, FILE *file)
{
    const struct model_table *m = model_find(model);
    if (strcmp(m->type, "qwen3_moe") == 0)
        qwen_config(cut, file);
    else if (strcmp(m->type, "deepseek_v3") == 0)
        deepseek_config(cut, file);
    else
        any_config(m, cut, file);
}
