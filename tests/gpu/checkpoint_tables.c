/* Real mixture-of-experts checkpoints, a row for a tensor.  Names, dtypes and shapes are those of the published
 * folders; see checkpoint_models.h.  Pure. */
#include "tests/gpu/checkpoint_models.h"

#define BF16 "BF16"
#define F32  "F32"
#define U8   "U8"

#define EMBEDDING(stem, hidden)                                                                                        \
    {                                                                                                                  \
        AT_TOP, stem "embed_tokens.weight", BF16,                                                                      \
        {                                                                                                              \
            N_WORDS, hidden                                                                                            \
        }                                                                                                              \
    }
#define NORMS(hidden)                                                                                                  \
    {AT_LAYER, "input_layernorm.weight", BF16, {hidden}},                                                              \
    {                                                                                                                  \
        AT_LAYER, "post_attention_layernorm.weight", BF16,                                                             \
        {                                                                                                              \
            hidden                                                                                                     \
        }                                                                                                              \
    }
#define HEAD(stem, hidden)                                                                                             \
    {AT_END, stem "norm.weight", BF16, {hidden}},                                                                      \
    {                                                                                                                  \
        AT_END, "lm_head.weight", BF16,                                                                                \
        {                                                                                                              \
            N_WORDS, hidden                                                                                            \
        }                                                                                                              \
    }
/* Queries, keys, values and output of grouped attention. */
#define ATTENTION(dtype, hidden, queries, keys)                                                                        \
    {AT_LAYER, "self_attn.q_proj.weight", dtype, {queries, hidden}},                                                   \
        {AT_LAYER, "self_attn.k_proj.weight", dtype, {keys, hidden}},                                                  \
        {AT_LAYER, "self_attn.v_proj.weight", dtype, {keys, hidden}},                                                  \
    {                                                                                                                  \
        AT_LAYER, "self_attn.o_proj.weight", dtype,                                                                    \
        {                                                                                                              \
            hidden, queries                                                                                            \
        }                                                                                                              \
    }
#define ATTENTION_BIAS(queries, keys)                                                                                  \
    {AT_LAYER, "self_attn.q_proj.bias", BF16, {queries}}, {AT_LAYER, "self_attn.k_proj.bias", BF16, {keys}},           \
    {                                                                                                                  \
        AT_LAYER, "self_attn.v_proj.bias", BF16,                                                                       \
        {                                                                                                              \
            keys                                                                                                       \
        }                                                                                                              \
    }
#define ATTENTION_NORMS(q, k)                                                                                          \
    {AT_LAYER, "self_attn.q_norm.weight", BF16, {q}},                                                                  \
    {                                                                                                                  \
        AT_LAYER, "self_attn.k_norm.weight", BF16,                                                                     \
        {                                                                                                              \
            k                                                                                                          \
        }                                                                                                              \
    }
/* Latent attention with low ranks 1536 and 512, heads of 128 + 64. */
#define LATENT(dtype, hidden, heads)                                                                                   \
    {AT_LAYER, "self_attn.q_a_proj.weight", dtype, {1536, hidden}},                                                    \
        {AT_LAYER, "self_attn.q_a_layernorm.weight", BF16, {1536}},                                                    \
        {AT_LAYER, "self_attn.q_b_proj.weight", dtype, {heads * 192, 1536}},                                           \
        {AT_LAYER, "self_attn.kv_a_proj_with_mqa.weight", dtype, {576, hidden}},                                       \
        {AT_LAYER, "self_attn.kv_a_layernorm.weight", BF16, {512}},                                                    \
        {AT_LAYER, "self_attn.kv_b_proj.weight", dtype, {heads * 256, 512}},                                           \
    {                                                                                                                  \
        AT_LAYER, "self_attn.o_proj.weight", dtype,                                                                    \
        {                                                                                                              \
            hidden, heads * 128                                                                                        \
        }                                                                                                              \
    }
/* Gate, up and down projection. */
#define MLP(place, stem, dtype, hidden, inner)                                                                         \
    {place, stem "gate_proj.weight", dtype, {inner, hidden}}, {place, stem "up_proj.weight", dtype, {inner, hidden}},  \
    {                                                                                                                  \
        place, stem "down_proj.weight", dtype,                                                                         \
        {                                                                                                              \
            hidden, inner                                                                                              \
        }                                                                                                              \
    }
#define ROUTER(name, hidden)                                                                                           \
    {                                                                                                                  \
        AT_MOE, name ".weight", BF16,                                                                                  \
        {                                                                                                              \
            N_EXPERTS, hidden                                                                                          \
        }                                                                                                              \
    }
#define CORRECTION(name)                                                                                               \
    {                                                                                                                  \
        AT_MOE, name, F32,                                                                                             \
        {                                                                                                              \
            N_EXPERTS                                                                                                  \
        }                                                                                                              \
    }
#define MTP(hidden)                                                                                                    \
    {AT_MTP, "embed_tokens.weight", BF16, {N_WORDS, hidden}}, {AT_MTP, "enorm.weight", BF16, {hidden}},                \
        {AT_MTP, "hnorm.weight", BF16, {hidden}}, {AT_MTP, "eh_proj.weight", BF16, {hidden, 2 * hidden}},              \
        {AT_MTP, "shared_head.norm.weight", BF16, {hidden}},                                                           \
    {                                                                                                                  \
        AT_MTP, "shared_head.head.weight", BF16,                                                                       \
        {                                                                                                              \
            N_WORDS, hidden                                                                                            \
        }                                                                                                              \
    }

const struct model_table model_tables[] = {
    {"qwen3-30b-a3b",
     "qwen3_moe",
     "model.layers.",
     "mlp.experts.",
     "num_experts",
     false,
     2048,
     {48, 128, 0, 0, 151936},
     {EMBEDDING("model.", 2048), NORMS(2048), ATTENTION(BF16, 2048, 4096, 512), ATTENTION_NORMS(128, 128),
      ROUTER("mlp.gate", 2048), MLP(AT_EXPERT, "", BF16, 2048, 768), HEAD("model.", 2048)}},
    {"deepseek-v3",
     "deepseek_v3",
     "model.layers.",
     "mlp.experts.",
     "n_routed_experts",
     false,
     7168,
     {61, 256, 3, 1, 129280},
     {EMBEDDING("model.", 7168), NORMS(7168), LATENT("FP8", 7168, 128), MLP(AT_DENSE, "mlp.", "FP8", 7168, 18432),
      ROUTER("mlp.gate", 7168), CORRECTION("mlp.gate.e_score_correction_bias"), MLP(AT_EXPERT, "", "FP8", 7168, 2048),
      MLP(AT_MOE, "mlp.shared_experts.", "FP8", 7168, 2048), MTP(7168), HEAD("model.", 7168)}},
    {"deepseek-v2",
     "deepseek_v2",
     "model.layers.",
     "mlp.experts.",
     "n_routed_experts",
     false,
     5120,
     {60, 160, 1, 0, 102400},
     {EMBEDDING("model.", 5120), NORMS(5120), LATENT(BF16, 5120, 128), MLP(AT_DENSE, "mlp.", BF16, 5120, 12288),
      ROUTER("mlp.gate", 5120), MLP(AT_EXPERT, "", BF16, 5120, 1536),
      MLP(AT_MOE, "mlp.shared_experts.", BF16, 5120, 3072), HEAD("model.", 5120)}},
    {"kimi-k2",
     "kimi_k2",
     "model.layers.",
     "mlp.experts.",
     "n_routed_experts",
     false,
     7168,
     {61, 384, 1, 0, 163840},
     {EMBEDDING("model.", 7168), NORMS(7168), LATENT("FP8", 7168, 64), MLP(AT_DENSE, "mlp.", "FP8", 7168, 18432),
      ROUTER("mlp.gate", 7168), CORRECTION("mlp.gate.e_score_correction_bias"), MLP(AT_EXPERT, "", "FP8", 7168, 2048),
      MLP(AT_MOE, "mlp.shared_experts.", "FP8", 7168, 2048), HEAD("model.", 7168)}},
    {"glm-4.5",
     "glm4_moe",
     "model.layers.",
     "mlp.experts.",
     "n_routed_experts",
     false,
     5120,
     {92, 160, 3, 1, 151552},
     {EMBEDDING("model.", 5120), NORMS(5120), ATTENTION(BF16, 5120, 12288, 1024), ATTENTION_BIAS(12288, 1024),
      ATTENTION_NORMS(128, 128), MLP(AT_DENSE, "mlp.", BF16, 5120, 12288), ROUTER("mlp.gate", 5120),
      CORRECTION("mlp.gate.e_score_correction_bias"), MLP(AT_EXPERT, "", BF16, 5120, 1536),
      MLP(AT_MOE, "mlp.shared_experts.", BF16, 5120, 1536), MTP(5120), HEAD("model.", 5120)}},
    {"gpt-oss-120b",
     "gpt_oss",
     "model.layers.",
     NULL,
     "num_local_experts",
     false,
     2880,
     {36, 128, 0, 0, 201088},
     {EMBEDDING("model.", 2880),
      NORMS(2880),
      ATTENTION(BF16, 2880, 4096, 512),
      ATTENTION_BIAS(4096, 512),
      {AT_LAYER, "self_attn.o_proj.bias", BF16, {2880}},
      {AT_LAYER, "self_attn.sinks", BF16, {64}},
      ROUTER("mlp.router", 2880),
      {AT_MOE, "mlp.router.bias", BF16, {N_EXPERTS}},
      {AT_MOE, "mlp.experts.gate_up_proj_blocks", U8, {N_EXPERTS, 5760, 90, 16}},
      {AT_MOE, "mlp.experts.gate_up_proj_scales", U8, {N_EXPERTS, 5760, 90}},
      {AT_MOE, "mlp.experts.gate_up_proj_bias", BF16, {N_EXPERTS, 5760}},
      {AT_MOE, "mlp.experts.down_proj_blocks", U8, {N_EXPERTS, 2880, 90, 16}},
      {AT_MOE, "mlp.experts.down_proj_scales", U8, {N_EXPERTS, 2880, 90}},
      {AT_MOE, "mlp.experts.down_proj_bias", BF16, {N_EXPERTS, 2880}},
      HEAD("model.", 2880)}},
    {"mixtral-8x7b",
     "mixtral",
     "model.layers.",
     "block_sparse_moe.experts.",
     "num_local_experts",
     false,
     4096,
     {32, 8, 0, 0, 32000},
     {EMBEDDING("model.", 4096),
      NORMS(4096),
      ATTENTION(BF16, 4096, 4096, 1024),
      ROUTER("block_sparse_moe.gate", 4096),
      {AT_EXPERT, "w1.weight", BF16, {14336, 4096}},
      {AT_EXPERT, "w2.weight", BF16, {4096, 14336}},
      {AT_EXPERT, "w3.weight", BF16, {14336, 4096}},
      HEAD("model.", 4096)}},
    {"qwen2-57b-a14b",
     "qwen2_moe",
     "model.layers.",
     "mlp.experts.",
     "num_experts",
     false,
     3584,
     {28, 64, 0, 0, 151936},
     {EMBEDDING("model.", 3584),
      NORMS(3584),
      ATTENTION(BF16, 3584, 3584, 512),
      ATTENTION_BIAS(3584, 512),
      ROUTER("mlp.gate", 3584),
      MLP(AT_EXPERT, "", BF16, 3584, 2560),
      MLP(AT_MOE, "mlp.shared_expert.", BF16, 3584, 20480),
      {AT_MOE, "mlp.shared_expert_gate.weight", BF16, {1, 3584}},
      HEAD("model.", 3584)}},
    {"olmoe-1b-7b",
     "olmoe",
     "model.layers.",
     "mlp.experts.",
     "num_experts",
     false,
     2048,
     {16, 64, 0, 0, 50304},
     {EMBEDDING("model.", 2048), NORMS(2048), ATTENTION(BF16, 2048, 2048, 2048), ATTENTION_NORMS(2048, 2048),
      ROUTER("mlp.gate", 2048), MLP(AT_EXPERT, "", BF16, 2048, 1024), HEAD("model.", 2048)}},
    {"minimax-m2",
     "minimax_m2",
     "model.layers.",
     "block_sparse_moe.experts.",
     "num_local_experts",
     false,
     3072,
     {62, 256, 0, 0, 200064},
     {EMBEDDING("model.", 3072),
      NORMS(3072),
      ATTENTION("FP8", 3072, 6144, 1024),
      ATTENTION_NORMS(6144, 1024),
      ROUTER("block_sparse_moe.gate", 3072),
      CORRECTION("block_sparse_moe.e_score_correction_bias"),
      {AT_EXPERT, "w1.weight", "FP8", {1536, 3072}},
      {AT_EXPERT, "w2.weight", "FP8", {3072, 1536}},
      {AT_EXPERT, "w3.weight", "FP8", {1536, 3072}},
      HEAD("model.", 3072)}},
    {"qwen3-vl-30b-a3b",
     "qwen3_vl_moe",
     "model.language_model.layers.",
     NULL,
     "num_experts",
     true,
     2048,
     {48, 128, 0, 0, 151936},
     {{AT_TOP, "model.visual.blocks.0.attn.qkv.weight", BF16, {3456, 1152}},
      {AT_TOP, "model.visual.patch_embed.proj.bias", BF16, {1152}},
      EMBEDDING("model.language_model.", 2048),
      NORMS(2048),
      ATTENTION(BF16, 2048, 4096, 512),
      ATTENTION_NORMS(128, 128),
      ROUTER("mlp.gate", 2048),
      {AT_MOE, "mlp.experts.gate_up_proj", BF16, {N_EXPERTS, 2048, 1536}},
      {AT_MOE, "mlp.experts.down_proj", BF16, {N_EXPERTS, 768, 2048}},
      HEAD("model.language_model.", 2048)}},
    {0},
};
