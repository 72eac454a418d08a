"""A stock transformers MoE model over the agent's weights, with expert-parallel experts.

  bind        the model is built on the meta device; every parameter becomes a view of the agent's memory
  Experts     takes the place of a block's `experts` module: same call, but the experts lie on all ranks
  attention   one attention function for transformers (`attn_implementation="eep"`), over a paged cache
  Runner      two shapes of a pass, both fixed: a chunk of one prompt, and one token of every row
  Decode      the latter, which may be captured in a CUDA graph, once for each group

Nothing here knows a model family: routers, norms, attention projections and shared experts are the stock modules.
"""
from __future__ import annotations

import json
import threading

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import eep

import fp8
from batch import Plan

# Names in checkpoints that transformers renames when it loads them: (in the module, in the checkpoint)
RENAMED = ((".mlp.", ".block_sparse_moe."),)
PAGE = 16  # tokens


class Pass:
    """What a forward pass is about: rows of the batch, positions [rows, tokens], which of them are real, and the group whose
    ranks take part.  rehearsal: what is computed is thrown away, and no load is counted."""

    def __init__(self, cache: "Cache", group, rows: slice, positions: torch.Tensor, valid: torch.Tensor, rehearsal: bool = False):
        self.cache, self.group, self.valid, self.rehearsal = cache, group, valid, rehearsal
        self.table = cache.table[rows]
        # what is not real goes where nobody reads it: into page 0
        self.positions = positions.masked_fill(~valid, cache.length)
        at = positions.masked_fill(~valid, 0)
        self.page = self.table.gather(1, at // PAGE).masked_fill(~valid, 0)
        self.offset = at % PAGE
        self.mask = torch.arange(cache.length, device=positions.device) <= self.positions[:, None, :, None]


class Cache:
    """Keys and values: [pages, kv heads, PAGE, dim] each per layer, and which pages a row has.  The stepping thread's."""

    def __init__(self, config, rows: int, length: int, budget: int, dtype: torch.dtype, device: torch.device):
        """budget: bytes, all of it memory that is used from now on; UNPROFILED: as many as all rows can need."""
        per_row = -(-length // PAGE)
        self.length = per_row * PAGE
        if hasattr(config, "kv_lora_rank"):  # latent attention, its keys and values in full
            heads, sizes = config.num_attention_heads, (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
        else:
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            heads, sizes = config.num_key_value_heads, (dim, dim)
        self.page_bytes = config.num_hidden_layers * heads * PAGE * sum(sizes) * dtype.itemsize
        pages = min(rows * per_row + 1, budget // self.page_bytes)
        if pages < 2:
            raise ValueError(f"{budget} bytes of KV cache hold no page of {PAGE} tokens: two have {2 * self.page_bytes} bytes")
        self._layers = [tuple(torch.zeros(pages, heads, PAGE, size, dtype=dtype, device=device) for size in sizes)
                        for _ in range(config.num_hidden_layers)]
        self.table = torch.zeros(rows, per_row, dtype=torch.int64, device=device)
        self._free = list(range(pages - 1, 0, -1))
        self._of: dict[int, list[int]] = {}  # row: pages
        self.pages = self.usable = pages - 1  # that are there; that may be used
        self.most = 0  # that were used at once

    def agree(self, budget: int) -> None:
        """No rank uses more than the one that has least: the budget of the view.  What is used already stays."""
        self.usable = min(self.pages, budget // self.page_bytes - 1)

    def fits(self, tokens: int) -> bool:
        return -(-tokens // PAGE) <= self.usable

    def reserve(self, row: int, tokens: int) -> bool:
        """Pages for all that a sequence can become, so that none is ever stopped half-way; False: not now."""
        n, used = -(-tokens // PAGE), self.pages - len(self._free)
        if used + n > self.usable:
            return False
        self._of[row] = [self._free.pop() for _ in range(n)]
        self.table[row] = torch.tensor(self._of[row] + [0] * (self.table.shape[1] - n))
        self.most = max(self.most, used + n)
        return True

    def release(self, row: int) -> None:
        self._free += self._of.pop(row)

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor, p: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [rows, heads, tokens, dim], and returns all of the rows: [rows, heads, length, dim].  A kernel for paged
        attention would read them where they lie."""
        out = []
        for store, x in zip(self._layers[layer], (key, value)):
            store[p.page, :, p.offset] = x.transpose(1, 2)
            out.append(store[p.table].transpose(1, 2).flatten(2, 3))
        return out[0], out[1]


_now = threading.local()  # .p: this thread's pass; a graph is captured by another thread while steps go on


def attention(module, query, key, value, attention_mask, scaling=None, **_):
    """[rows, heads, tokens, dim] each; queries of the heads that share keys become more tokens of one head."""
    p = _now.p
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
    """What all layers share: the maps, and this rank's number in the view.  All of it lies at fixed addresses, so what a graph
    has captured reads the present values."""

    def __init__(self, maps: eep.Maps):
        maps = maps.on_device
        self.slots = maps.slots
        self.logical_to_physical = maps.logical_to_physical.torch()
        self.replica_count = maps.replica_count.torch()
        self.load = maps.load.torch(torch.int64)
        self.rank = torch.zeros((), dtype=torch.int32, device=self.load.device)


class Experts(torch.nn.Module):
    """All experts of a layer: the tokens of all ranks are gathered with the physical slots that their owners chose, every
    rank computes what lies in its slots, and each (token, choice) has its own output on the way back.  So the sum is taken
    by the token's owner, in the router's order, and is the same for every placement."""

    def __init__(self, dispatch: Dispatch, layer: int, engine: eep.Engine, act_fn):
        super().__init__()
        self.dispatch, self.layer, self.act_fn = dispatch, layer, act_fn
        part = f"layers.{layer}.experts."
        self.w13, self.w2 = engine.tensor(part + "w13").torch(), engine.tensor(part + "w2").torch()
        self.scale13 = self.scale2 = None
        if self.w13.dtype == torch.float8_e4m3fn:
            self.scale13, self.scale2 = engine.tensor(part + "w13_scale").torch(), engine.tensor(part + "w2_scale").torch()

    def _weights(self, slot, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(fp8.weight(w[slot], None if scale is None else scale[slot], dtype)
                     for w, scale in ((self.w13, self.scale13), (self.w2, self.scale2)))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        d, p = self.dispatch, _now.p
        tokens, k = chosen.shape
        hidden = x.shape[1]
        physical = self.route(chosen, p.valid.reshape(-1))
        weights = self.without_masked(physical, weights)
        packet = torch.cat([x.contiguous().view(torch.uint8), physical.view(torch.uint8)], 1)
        packets = p.group.all_gather(packet)
        cut = packet.shape[1] - 4 * k
        xs = packets[..., :cut].contiguous().view(x.dtype).view(-1, hidden)
        slot = packets[..., cut:].contiguous().view(torch.int32).view(-1) - d.rank * d.slots
        slot = slot.masked_fill((slot < 0) | (slot >= d.slots), d.slots)  # those of others: behind all of ours
        order = torch.argsort(slot, stable=True)
        ends = torch.searchsorted(slot[order], torch.arange(d.slots, dtype=slot.dtype, device=x.device), right=True)
        if not p.rehearsal:
            d.load[self.layer] += torch.diff(ends, prepend=ends.new_zeros(1))
        out = torch.zeros(order.shape[0], hidden, dtype=x.dtype, device=x.device)
        out[order] = self.compute(xs[order // k], ends)
        back = p.group.all_to_all(out.view(p.group.size, tokens * k, hidden))
        y = back.sum(0).view(tokens, k, hidden)  # one rank computed it, the others sent zeros
        return (y * weights[..., None].to(y.dtype)).sum(1)

    def route(self, chosen: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Logical experts to physical slots, the map's entries in turn; -1 for tokens that are padding, and for experts that
        are masked."""
        d = self.dispatch
        count = d.replica_count[self.layer][chosen].clamp(min=1)
        turn = torch.arange(chosen.shape[0], device=chosen.device)[:, None] + d.rank
        physical = d.logical_to_physical[self.layer][chosen, turn % count]
        return physical.masked_fill(~valid[:, None], -1)

    @staticmethod
    def without_masked(physical: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weights of the experts that are left add up to what those of all had.  Nothing is changed when none is masked."""
        left = weights.masked_fill(physical < 0, 0)
        return left * (weights.sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1e-20))

    def compute(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x: [rows, hidden], sorted by slot; slot s has the rows [ends[s - 1], ends[s]).  Zeros for rows of no slot."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            offsets = ends.to(torch.int32)
            gate, up = fp8.grouped_linear(x, self.w13, self.scale13, offsets).chunk(2, -1)
            y = fp8.grouped_linear((self.act_fn(gate) * up).contiguous(), self.w2, self.scale2, offsets)
            ours = torch.arange(x.shape[0], device=x.device) < ends[-1]
            return y.masked_fill(~ours[:, None], 0)
        if x.is_cuda:  # float32 is for tests: every row gets a copy of its expert, and nothing waits for the host
            slot = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device), right=True)
            mine = slot.clamp(max=self.w13.shape[0] - 1)
            w13, w2 = self._weights(mine, x.dtype)
            gate, up = torch.bmm(w13, x[..., None]).squeeze(-1).chunk(2, -1)
            y = torch.bmm(w2, (self.act_fn(gate) * up)[..., None]).squeeze(-1)
            return y.masked_fill((slot != mine)[:, None], 0)
        y, begin = torch.zeros_like(x), 0
        for slot, end in enumerate(ends.tolist()):
            if end > begin:
                w13, w2 = self._weights(slot, x.dtype)
                gate, up = F.linear(x[begin:end], w13).chunk(2, -1)
                y[begin:end] = F.linear(self.act_fn(gate) * up, w2)
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


def moe_blocks(model) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(getattr(m, "experts", None), "gate_up_proj")]


def skeleton(config: str):
    """The stock model of a config.json, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)), attn_implementation="eep",
                                                dtype=torch.bfloat16).eval()


def bind(engine: eep.Engine):
    """(model, dispatch): the model that the agent's config.json names, no byte of its weights copied."""
    device = torch.device("cpu" if engine.device < 0 else f"cuda:{engine.device}")
    model = skeleton(engine.model.config)
    dispatch = Dispatch(engine.maps)
    blocks = moe_blocks(model)
    if len(blocks) != engine.model.layers:
        raise ValueError(f"the model has {len(blocks)} MoE layers, the weights have {engine.model.layers}")
    for layer, block in enumerate(blocks):
        block.experts = Experts(dispatch, layer, engine, block.experts.act_fn)
    _bind_all(model, engine)
    for name, module in list(model.named_modules()):  # tables that are computed, not loaded
        if "inv_freq" in module._buffers:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=model.config).to(device))
    return model, dispatch


class Decode:
    """One token of every row, for one group: `input` [rows, (position, token, real)] gives `logits`, both at fixed addresses.

    On a GPU with `captured`, the pass is a CUDA graph with its collectives in it.  It is made by the thread that builds the
    group, during PREPARE, while steps go on in the group before; all ranks of the new group do so.  Maps may change under
    it.  The graph must be dropped before its group is closed.

    Captured or not, the passes are rehearsed before that: what a first pass waits for is waited for beside the steps."""

    def __init__(self, runner: "Runner", group, captured: bool, stream=None):
        self.runner, self.group, self.stream = runner, group, stream
        self.input = torch.zeros(runner.rows, 3, dtype=torch.int64).to(runner.device)  # complete for every stream
        self.logits: torch.Tensor | None = None
        self._graph = None
        with torch.inference_mode():
            if not stream:  # the host has no graphs; the rehearsal is the same
                self._rehearse()
                return
            with torch.cuda.stream(stream):
                self._rehearse()
                stream.synchronize()
                if not captured:
                    return
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")  # what other threads do is theirs
                try:
                    self.logits = self._pass()
                finally:
                    graph.capture_end()
                stream.synchronize()
                self._graph = graph

    def _rehearse(self) -> None:
        """Both kinds of pass, of padding alone: communicators connect, kernels are loaded, workspaces made."""
        r = self.runner
        self._pass(rehearsal=True)
        nothing = torch.zeros(1, r.chunk, dtype=torch.int64).to(r.device)
        r.head(r.forward(nothing, Pass(r.cache, self.group, slice(0, 1), nothing, nothing.bool(), True))[0, -1:])

    def _pass(self, rehearsal: bool = False) -> torch.Tensor:
        r = self.runner
        p = Pass(r.cache, self.group, slice(0, r.rows), self.input[:, :1], self.input[:, 2:].bool(), rehearsal)
        return r.head(r.forward(self.input[:, 1:2], p)[:, 0])

    @torch.inference_mode()
    def __call__(self, rows: dict[int, tuple[int, int]]) -> torch.Tensor:
        """Logits [rows, vocabulary], until the next call; rows: {row: (position, token)}."""
        self.input.copy_(torch.tensor([[*rows.get(r, (0, 0)), int(r in rows)] for r in range(self.runner.rows)]))
        if self._graph:
            self._graph.replay()
        else:
            self.logits = self._pass()
        return self.logits


class Runner:
    """Runs passes.  Their shapes never change, so a row's numbers do not depend on who else is in the batch."""

    def __init__(self, engine: eep.Engine, rows: int, chunk: int, length: int, dtype: torch.dtype, graphs: bool = False,
                 kv_bytes: int = eep.engine.UNPROFILED):
        self.model, self.dispatch = bind(engine)
        self.device = self.dispatch.load.device
        self.length = min(length, self.model.config.max_position_embeddings)
        self.rows, self.chunk, self.dtype, self.graphs = rows, chunk, dtype, graphs
        self.cache = Cache(self.model.config, rows, self.length, kv_bytes, dtype, self.device)
        self.vocab = self.model.config.vocab_size
        self.group, self.decode = None, None  # of the view in use
        cuda = self.device.type == "cuda"
        # Not the default stream, whose number says "none".  Graphs are captured on one of two others, which the graph in use
        # was not: what cuBLAS keeps for a stream is read by that graph's replays.
        self.stream, *self._aside = [torch.cuda.Stream(self.device) for _ in range(3)] if cuda else [None]
        if cuda:  # kernels that round alike whatever the batch; float32 that is no tf32
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(dtype != torch.float32)

    def prepare(self, group) -> Decode:
        """For a group that was just built, by the thread that built it."""
        used = self.decode.stream if self.decode else None
        return Decode(self, group, self.graphs, next((s for s in self._aside if s is not used), None))

    def view(self, group, rank: int, decode: Decode | None = None) -> None:
        """From now on in this group, whose decode was prepared or is made now."""
        self.dispatch.rank.fill_(rank)
        if self.decode is None or self.decode.group is not group:
            self.group, self.decode = group, decode or self.prepare(group)

    def leave(self) -> None:
        """The group is of no use any more."""
        self.group = self.decode = None

    def wait(self) -> None:
        """Everything that was launched is complete."""
        if self.stream:
            self.stream.synchronize()

    def forward(self, tokens: torch.Tensor, p: Pass) -> torch.Tensor:
        _now.p = p
        # Padding takes part with position 0: it is computed and thrown away.
        positions = p.positions.masked_fill(~p.valid, 0)
        with Upcast() if self.dtype == torch.float32 else torch.no_grad():
            return self.model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        with Upcast() if self.dtype == torch.float32 else torch.no_grad():
            return self.model.lm_head(hidden)

    @torch.inference_mode()
    def prefill(self, row: int, begin: int, tokens: list[int], every: bool = False) -> torch.Tensor:
        """Logits after the last of up to `chunk` tokens of a row that begin at a position (every: after each)."""
        n = len(tokens)
        at = torch.arange(self.chunk, device=self.device)[None]
        p = Pass(self.cache, self.group, slice(row, row + 1), at + begin, at < n)
        hidden = self.forward(torch.tensor([tokens + [0] * (self.chunk - n)]).to(self.device), p)[0]
        return self.head(hidden[:n] if every else hidden[max(n - 1, 0):max(n, 1)])

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
