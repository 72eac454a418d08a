"""A layout of the engine's own: experts in fp8 (e4m3) with a scale for each output channel, made from a bf16 checkpoint.

  load    at a cold start (LOAD): regions of the agent's memory, filled and quantised expert by expert, sealed
  linear  what the layout computes

Ranks that join get the sealed bytes from their peers: they read no weights and quantise nothing.  An expert's bytes depend on
that expert alone.  The name changes whenever the bytes would.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

import eep

NAME = "torch-fp8-e4m3-channel-1"
EXPERT = re.compile(r"(.*\.layers\.(\d+)\..*experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
MOST = torch.finfo(torch.float8_e4m3fn).max
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}


def quantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., rows, columns] in fp8, and a float32 scale for each row."""
    scale = w.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / MOST
    return (w.float() / scale).to(torch.float8_e4m3fn), scale.squeeze(-1)


def weight(w: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """As the arithmetic wants it."""
    return w.to(dtype) if scale is None else w.to(dtype) * scale[..., None].to(dtype)


def grouped_linear(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """bf16 on a GPU: rows [offsets[s - 1], offsets[s]) of x by slot s.  In fp8, each row of x has a scale of its own, so that
    its numbers do not depend on who else is there."""
    if scale is None:
        return torch._grouped_mm(x, w.transpose(1, 2), offs=offsets)
    q, rows = quantise(x)
    return torch._scaled_grouped_mm(q, w.transpose(1, 2), rows, scale, offs=offsets, out_dtype=torch.bfloat16)


class _Checkpoint:
    def __init__(self, folder: Path):
        files = [safe_open(f, "pt") for f in sorted(folder.glob("*.safetensors")) if f.name != "reference.safetensors"]
        if not files:
            raise ValueError(f"{folder} has no weights, and a cold start reads them: --checkpoint")
        self._at = {name: f for f in files for name in f.keys()}
        experts = {m[0]: m for m in map(EXPERT.fullmatch, self._at) if m}
        self.dense = [n for n in self._at if n not in experts]
        layers = sorted({int(m[2]) for m in experts.values()})
        self._name = {(layers.index(int(m[2])), int(m[3]), m[4]): name for name, m in experts.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._at[name].get_tensor(name)

    def _part(self, layer: int, expert: int, *names: str) -> torch.Tensor:
        return self.read(next(self._name[layer, expert, n] for n in names if (layer, expert, n) in self._name))

    def parts(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        gate, up = self._part(layer, expert, "gate_proj", "w1"), self._part(layer, expert, "up_proj", "w3")
        return {"w13": torch.cat([gate, up]), "w2": self._part(layer, expert, "down_proj", "w2")}


def _load_dense(engine: eep.Engine, checkpoint: _Checkpoint) -> None:
    tensors, offset = {}, 0
    for name in checkpoint.dense:
        t = checkpoint.read(name)
        tensors[name] = (offset, t)
        offset += -(-t.nbytes // 256) * 256
    region = engine.region_alloc("dense", bytes=offset).torch()
    for name, (at, t) in tensors.items():
        engine.tensor_add("dense", name, at, DTYPES[t.dtype], tuple(t.shape))
        region[at:at + t.nbytes].copy_(t.contiguous().view(-1).view(torch.uint8))


def load(engine: eep.Engine, event: eep.Event, folder: Path) -> int:
    """Answers LOAD; the number of experts that were quantised."""
    checkpoint, done = _Checkpoint(folder), 0
    _load_dense(engine, checkpoint)
    for layer, slots in enumerate(event.load_map):
        into: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for part, w in checkpoint.parts(layer, 0).items():
            spec = dict(layer=layer, slots=len(slots))
            into[part] = (engine.region_alloc(part=part, dtype="F8_E4M3", shape=tuple(w.shape), **spec).torch(),
                          engine.region_alloc(part=part + "_scale", dtype="F32", shape=(w.shape[0],), **spec).torch())
        for slot, expert in enumerate(slots):
            if expert < 0:
                continue
            for part, w in checkpoint.parts(layer, expert).items():
                q, scale = into[part]
                q[slot], scale[slot] = quantise(w.to(q.device))
            done += 1
    if engine.device >= 0:
        torch.cuda.synchronize()
    engine.seal((folder / "config.json").read_text())
    return done
