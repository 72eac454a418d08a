"""Writes a tiny DeepSeek-V3 with random weights, and what stock transformers computes of it in float32.

    python3 deepseek.py FOLDER
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

PROMPTS, LENGTH, TOKENS = 4, 12, 24


def split(state: dict) -> dict:
    """Experts apart and by the names that checkpoints have."""
    out = {}
    for name, t in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, w in enumerate(t):
                gate, up = w.chunk(2)
                base = name.removesuffix("gate_up_proj") + f"{e}."
                out[base + "gate_proj.weight"], out[base + "up_proj.weight"] = gate.contiguous(), up.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, w in enumerate(t):
                out[name.removesuffix("down_proj") + f"{e}.down_proj.weight"] = w.contiguous()
        else:
            out[name] = t.contiguous()
    return out


def greedy(model, prompts):
    ids, smallest = prompts, float("inf")
    for _ in range(TOKENS):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        best = logits.topk(2).values
        smallest = min(smallest, (best[:, 0] - best[:, 1]).min().item())
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1]:], smallest


@torch.inference_mode()
def write(folder: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
        topk_group=2, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=24, max_position_embeddings=128, routed_scaling_factor=1.5, initializer_range=0.2)
    for seed in range(20):  # tokens that float32 decides clearly
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(config).eval()
        state = {}
        for name, t in model.state_dict().items():  # in place: what is computed is what bf16 holds
            if name.endswith("e_score_correction_bias"):
                state[name] = t.copy_(torch.randn_like(t) * 0.1).clone()
            else:
                state[name] = t.copy_(t.bfloat16()).bfloat16()
        prompts = torch.randint(0, config.vocab_size, (PROMPTS, LENGTH))
        tokens, gap = greedy(model, prompts)
        if gap > 2e-4:
            break
    else:
        raise RuntimeError("no seed whose tokens are clear")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    save_file(split(state), folder / "model.safetensors")
    save_file({"input_ids": prompts.int(), "greedy_tokens": tokens.int().contiguous(),
               "logits": model(input_ids=prompts, use_cache=False).logits.contiguous()}, folder / "reference.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
