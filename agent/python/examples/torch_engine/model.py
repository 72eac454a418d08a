"""A stock transformers MoE model over the agent's weights, with expert-parallel experts.

  bind        the model is built on the meta device; every parameter becomes a view of the agent's memory
  Experts     takes the place of a block's `experts` module: same call, but the experts lie on all ranks
  attention   one attention function for transformers (`attn_implementation="eep"`), over a cache with a row per sequence
  Runner      two shapes of a pass, both fixed: a chunk of one prompt, and one token of every row

Nothing here knows a model family: routers, norms, attention projections and shared experts are the stock modules.
"""
from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import eep

from batch import Plan

# Names in checkpoints that transformers renames when it loads them: (in the module, in the checkpoint)
RENAMED = ((".mlp.", ".block_sparse_moe."),)


class Pass:
    """What a forward pass is about: rows of the cache, positions [rows, tokens], and which of them are real."""

    def __init__(self, cache: "Cache", rows: slice, positions: torch.Tensor, valid: torch.Tensor):
        self.cache, self.rows, self.valid = cache, rows, valid
        # what is not real goes where nobody reads it
        self.positions = torch.where(valid, positions, torch.full_like(positions, cache.length))
        self.mask = torch.arange(cache.length, device=positions.device) <= self.positions[:, None, :, None]


class Cache:
    """Keys and values: [rows, kv heads, length + 1, dim] per layer, made when their shapes are first seen."""

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor, p: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._layers:
            self._layers[layer] = tuple(
                x.new_zeros(self.rows, x.shape[1], self.length + 1, x.shape[3]) for x in (key, value))
        out = []
        for store, x in zip(self._layers[layer], (key, value)):
            rows = store[p.rows]
            index = p.positions[:, None, :, None].expand(x.shape)
            rows.scatter_(2, index, x)
            out.append(rows[:, :, :self.length])
        return out[0], out[1]


_current: Pass | None = None  # of the stepping thread


def attention(module, query, key, value, attention_mask, scaling=None, **_):
    """[rows, heads, tokens, dim] each; queries of the heads that share keys become more tokens of one head."""
    p = _current
    key, value = p.cache.update(module.layer_idx, key, value, p)
    rows, heads, tokens, dim = query.shape
    shared = heads // key.shape[1]
    mask = p.mask.repeat(1, 1, shared, 1) if tokens > 1 else p.mask
    out = F.scaled_dot_product_attention(query.reshape(rows, -1, shared * tokens, dim), key, value, attn_mask=mask,
                                         scale=scaling)
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register("eep", attention)


class Upcast(TorchFunctionMode):
    """Arithmetic in float32 on weights that stay what they are in the agent's memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].dtype != args[1].dtype:
            args = (args[0], args[1].to(args[0].dtype), *args[2:])
        out = function(*args, **(kwargs or {}))
        return out.float() if function is F.embedding else out


class Dispatch:
    """What all layers share: the maps, the group of the view, and which tokens of the pass are real."""

    def __init__(self, maps: eep.Maps):
        maps = maps.on_device
        self.slots = maps.slots
        self.logical_to_physical = maps.logical_to_physical.torch()
        self.replica_count = maps.replica_count.torch()
        self.load = maps.load.torch(torch.int64)
        self.group, self.rank = None, -1  # of the view in use; the rank in the view
        self.valid: torch.Tensor | None = None


class Experts(torch.nn.Module):
    """All experts of a layer: the tokens of all ranks are gathered with the physical slots that their owners chose, every
    rank computes what lies in its slots, and each (token, choice) has its own output on the way back.  So the sum is taken
    by the token's owner, in the router's order, and is the same for every placement."""

    def __init__(self, dispatch: Dispatch, layer: int, w13: torch.Tensor, w2: torch.Tensor, act_fn):
        super().__init__()
        self.dispatch, self.layer, self.w13, self.w2, self.act_fn = dispatch, layer, w13, w2, act_fn

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        d = self.dispatch
        tokens, k = chosen.shape
        hidden = x.shape[1]
        packet = torch.cat([x.contiguous().view(torch.uint8), self.route(chosen).view(torch.uint8)], 1)
        packets = d.group.all_gather(packet)
        cut = packet.shape[1] - 4 * k
        xs = packets[..., :cut].contiguous().view(x.dtype).view(-1, hidden)
        slot = packets[..., cut:].contiguous().view(torch.int32).view(-1) - d.rank * d.slots
        slot = torch.where((slot >= 0) & (slot < d.slots), slot, d.slots)  # those of others: behind all of ours
        order = torch.argsort(slot, stable=True)
        ends = torch.searchsorted(slot[order], torch.arange(d.slots, dtype=slot.dtype, device=x.device), right=True)
        d.load[self.layer] += torch.diff(ends, prepend=ends.new_zeros(1))
        out = torch.zeros(order.shape[0], hidden, dtype=x.dtype, device=x.device)
        out[order] = self.compute(xs[order // k], ends)
        back = d.group.all_to_all(out.view(d.group.size, tokens * k, hidden))
        y = back.sum(0).view(tokens, k, hidden)  # one rank computed it, the others sent zeros
        return (y * weights[..., None].to(y.dtype)).sum(1)

    def route(self, chosen: torch.Tensor) -> torch.Tensor:
        """Logical experts to physical slots, replicas in turn; -1 for tokens that are padding."""
        d = self.dispatch
        count = d.replica_count[self.layer][chosen].clamp(min=1)
        turn = torch.arange(chosen.shape[0], device=chosen.device)[:, None] + d.rank
        physical = d.logical_to_physical[self.layer][chosen, turn % count]
        if not chosen.is_cuda and bool(((physical < 0) & d.valid[:, None]).any()):
            raise RuntimeError(f"the map of MoE layer {self.layer} has no slot for an expert that a token chose")
        return torch.where(d.valid[:, None], physical, -1)

    def compute(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x: [rows, hidden], sorted by slot; slot s has the rows [ends[s - 1], ends[s]).  Zeros for rows of no slot."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            offsets = ends.to(torch.int32)
            gate, up = torch._grouped_mm(x, self.w13.transpose(1, 2), offs=offsets).chunk(2, -1)
            y = torch._grouped_mm((self.act_fn(gate) * up).contiguous(), self.w2.transpose(1, 2), offs=offsets)
            ours = torch.arange(x.shape[0], device=x.device) < ends[-1]
            return torch.where(ours[:, None], y, 0)
        y, begin = torch.zeros_like(x), 0
        for slot, end in enumerate(ends.tolist()):
            if end > begin:
                gate, up = F.linear(x[begin:end], self.w13[slot].to(x.dtype)).chunk(2, -1)
                y[begin:end] = F.linear(self.act_fn(gate) * up, self.w2[slot].to(x.dtype))
            begin = end
        return y


def _find(engine: eep.Engine, name: str) -> eep.Array:
    for module, checkpoint in (("", ""), *RENAMED):
        try:
            return engine.tensor(name.replace(module, checkpoint) if module else name)
        except KeyError:
            pass
    raise KeyError(f"the weights have no tensor {name}")


def _bind_all(model, engine: eep.Engine) -> None:
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, meta in [*model.named_parameters(), *model.named_buffers()]:
        if not meta.is_meta:
            continue
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._non_persistent_buffers_set:
            continue
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        tensor = _find(engine, source).torch()
        if tensor.shape != meta.shape:
            raise ValueError(f"tensor {source} is {list(tensor.shape)}, the model wants {list(meta.shape)}")
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


def bind(engine: eep.Engine):
    """(model, dispatch): the model that the agent's config.json names, no byte of its weights copied."""
    described = json.loads(engine.model.config)
    config = AutoConfig.for_model(**described)
    device = torch.device("cpu" if engine.device < 0 else f"cuda:{engine.device}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eep", dtype=torch.bfloat16).eval()
    dispatch = Dispatch(engine.maps)
    layer = 0
    for module in list(model.modules()):
        if hasattr(getattr(module, "experts", None), "gate_up_proj"):
            part = f"layers.{layer}.experts."
            module.experts = Experts(dispatch, layer, engine.tensor(part + "w13").torch(), engine.tensor(part + "w2").torch(),
                                     module.experts.act_fn)
            layer += 1
    if layer != engine.model.layers:
        raise ValueError(f"the model has {layer} MoE layers, the weights have {engine.model.layers}")
    _bind_all(model, engine)
    for name, module in list(model.named_modules()):  # tables that are computed, not loaded
        if "inv_freq" in module._buffers:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=config).to(device))
    return model, dispatch


class Runner:
    """Runs passes.  Their shapes never change, so a row's numbers do not depend on who else is in the batch."""

    def __init__(self, engine: eep.Engine, rows: int, chunk: int, length: int, dtype: torch.dtype):
        self.model, self.dispatch = bind(engine)
        self.device = self.dispatch.load.device
        self.length = min(length, self.model.config.max_position_embeddings)
        self.rows, self.chunk, self.dtype = rows, chunk, dtype
        self.cache = Cache(rows, self.length)
        self.vocab = self.model.config.vocab_size
        cuda = self.device.type == "cuda"
        # not the default stream, whose number says "none"
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        if cuda:  # kernels that round alike whatever the batch; float32 that is no tf32
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(dtype != torch.float32)

    def view(self, group, rank: int) -> None:
        self.dispatch.group, self.dispatch.rank = group, rank

    def wait(self) -> None:
        """Everything that was launched is complete."""
        if self.stream:
            self.stream.synchronize()

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, p: Pass) -> torch.Tensor:
        global _current
        _current, self.dispatch.valid = p, p.valid.reshape(-1)
        # Padding takes part with position 0: it is computed and thrown away.
        positions = torch.where(p.valid, p.positions, 0)
        with Upcast() if self.dtype == torch.float32 else torch.no_grad():
            return self.model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with Upcast() if self.dtype == torch.float32 else torch.no_grad():
            return self.model.lm_head(hidden)

    def _grid(self, values: list[list[int]], width: int) -> torch.Tensor:
        return torch.tensor([v + [0] * (width - len(v)) for v in values], dtype=torch.int64).to(self.device)

    @torch.inference_mode()
    def prefill(self, row: int, begin: int, tokens: list[int], every: bool = False) -> torch.Tensor:
        """Logits after the last of up to `chunk` tokens of a row that begin at a position (every: after each)."""
        n = len(tokens)
        at = torch.arange(self.chunk, device=self.device)[None]
        p = Pass(self.cache, slice(row, row + 1), at + begin, at < n)
        hidden = self._forward(self._grid([tokens], self.chunk), p)[0]
        return self._head(hidden[:n] if every else hidden[max(n - 1, 0):max(n, 1)])

    @torch.inference_mode()
    def decode(self, rows: dict[int, tuple[int, int]]) -> torch.Tensor:
        """Logits [rows, vocabulary]; rows: {row: (position, token)}."""
        grid = [list(rows.get(r, (0, 0))) for r in range(self.rows)]
        values = self._grid([[p, t, int(r in rows)] for r, (p, t) in enumerate(grid)], 3)
        p = Pass(self.cache, slice(0, self.rows), values[:, :1], values[:, 2:].bool())
        return self._head(self._forward(values[:, 1:2], p)[:, 0])

    def run(self, plan: Plan, prefill: bool, decode: bool) -> tuple[int | None, list[int]]:
        """The passes of a step, which are the same on all ranks, and this rank's tokens: after its prompt (None: it has not
        ended), of every row.  A rank with nothing to do in a pass takes part, with padding."""
        prefilled, decoded = None, []
        if prefill:
            s = plan.prefill
            logits = self.prefill(s.row if s else 0, s.done if s else 0, plan.chunk)
            if s and s.left == len(plan.chunk):
                prefilled = int(logits[-1].argmax())
        if decode:
            rows = {row: (s.done, s.tokens[s.done]) for row, s in plan.decode.items()}
            decoded = self.decode(rows).argmax(-1).tolist()
        self.wait()
        return prefilled, decoded
