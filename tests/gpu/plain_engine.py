"""The side that eep is compared with: the example engine's model, batching and requests, without eep.

It owns its weights, loads them from a checkpoint, and comes to more ranks in one of two ways:

  restart   it does not: whoever wants more ranks ends all engines and starts new ones
  blocking  the scheme of the first elastic engines: all ranks stop; new groups; rank 0 sends the dense weights to the new ranks,
            one after the other; EPLB places all experts from scratch; layer by layer, all ranks exchange what moved through a
            staging buffer of one layer; then they go on.  New ranks were started before, and wait with memory allocated.

What such engines do besides is left out, in their favour: no memory profiling, no graphs captured anew, the planner is the fast
one of eepctl, and requests in progress keep their cache.

    python3 plain_engine.py --store HOST:PORT --name e0 --checkpoint DIR ...      (started by compare.py)

Keys of the store: view/N {"members": [names]} from compare.py; up/N/NAME and report/N/NAME from here.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

PYTHON = next(p for p in (Path(__file__).resolve().parents[2] / "agent/python", Path(__file__).resolve().parents[2] / "python")
              if p.exists())
sys.path[:0] = [str(PYTHON), str(PYTHON / "examples/torch_engine")]

import torch
import torch.distributed as dist
from safetensors import safe_open

from batch import Batch
from eep.distributed import Group, Peers, share_gpu
from frontend import Frontend
from model import Runner

TYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


class Tensor:
    """What the example takes for eep.Array."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def torch(self, _dtype=None) -> torch.Tensor:
        return self._tensor


class Weights:
    """What the example's model takes for eep.Engine: model, device, maps, tensor.  Experts as Qwen3-MoE names them."""

    def __init__(self, folder: Path, device: torch.device, slots: int, max_ranks: int):
        self.device = -1 if device.index is None else device.index
        self._where, self._slots, self.bytes_read = device, slots, 0
        self._files = [safe_open(f, "pt") for f in sorted(folder.glob("*.safetensors")) if f.name != "reference.safetensors"]
        self._at = {name: f for f in self._files for name in f.keys()}
        config = (folder / "config.json").read_text()
        numbers = sorted({int(n.split(".")[2]) for n in self._at if ".mlp.experts." in n})
        self.prefix = [f"model.layers.{n}.mlp.experts." for n in numbers]
        logical = 1 + max(int(n.split(".")[5]) for n in self._at if ".mlp.experts." in n)
        self.model = SimpleNamespace(config=config, layers=len(numbers), logical=logical, slots=slots, producer="plain", device=self.device)
        self.dense = {n: self._empty(n) for n in self._at if ".mlp.experts." not in n}
        gate, down = self.prefix[0] + "0.gate_proj.weight", self.prefix[0] + "0.down_proj.weight"
        (i, h), kind = self._shape(gate)
        self.parts = [{"w13": torch.empty(slots, 2 * i, h, dtype=kind, device=device),
                       "w2": torch.empty(slots, *self._shape(down)[0], dtype=kind, device=device)} for _ in numbers]
        self.physical_to_logical = torch.full((len(numbers), max_ranks * slots), -1)  # on the host
        table = {"logical_to_physical": torch.full((len(numbers), logical, max_ranks * slots), -1, dtype=torch.int32),
                 "replica_count": torch.zeros(len(numbers), logical, dtype=torch.int32),
                 "load": torch.zeros(len(numbers), slots, dtype=torch.int64)}
        self._tables = {k: t.to(device) for k, t in table.items()}
        self.maps = SimpleNamespace(slots=slots, **{k: Tensor(t) for k, t in self._tables.items()})
        self.maps.on_device = self.maps

    def _shape(self, name: str) -> tuple[list[int], torch.dtype]:
        part = self._at[name].get_slice(name)
        return part.get_shape(), TYPES[part.get_dtype()]

    def _empty(self, name: str) -> torch.Tensor:
        shape, kind = self._shape(name)
        return torch.empty(shape, dtype=kind, device=self._where)

    def tensor(self, name: str) -> Tensor:
        if ".experts." in name and name.startswith("layers."):
            return Tensor(self.parts[int(name.split(".")[1])][name.rpartition(".")[2]])
        return Tensor(self.dense[name])

    def _read(self, name: str, to: torch.Tensor) -> None:
        to.copy_(self._at[name].get_tensor(name))
        self.bytes_read += to.nbytes

    def load(self, rank: int) -> None:
        """From the checkpoint: the dense weights, and the experts that the map gives this rank."""
        for name, t in self.dense.items():
            self._read(name, t)
        for layer, parts in enumerate(self.parts):
            for slot, expert in enumerate(self.physical_to_logical[layer, rank * self._slots:(rank + 1) * self._slots].tolist()):
                gate, up = parts["w13"][slot].chunk(2)
                base = f"{self.prefix[layer]}{expert}."
                self._read(base + "gate_proj.weight", gate)
                self._read(base + "up_proj.weight", up)
                self._read(base + "down_proj.weight", parts["w2"][slot])

    def linear_map(self, ranks: int) -> torch.Tensor:
        """Every expert in turn, again and again."""
        return (torch.arange(ranks * self._slots) % self.model.logical).expand(self.model.layers, -1)

    def set_map(self, physical_to_logical: torch.Tensor) -> None:
        self.physical_to_logical = physical_to_logical
        to, count = (torch.zeros_like(self._tables[k], device="cpu") for k in ("logical_to_physical", "replica_count"))
        to.fill_(-1)
        for layer, experts in enumerate(physical_to_logical.tolist()):
            for physical, expert in enumerate(experts):
                to[layer, expert, int(count[layer, expert])] = physical
                count[layer, expert] += 1
        self._tables["logical_to_physical"].copy_(to)
        self._tables["replica_count"].copy_(count)


def exchange(group: Group, sent: list[tuple[int, int, torch.Tensor]], received: list[tuple[int, int, torch.Tensor]]) -> None:
    """Point to point, all at once: (peer, tag, tensor) each.  What torch's batch_isend_irecv does."""
    pg, grouped = group.process_group, group.device.type == "cuda"
    if grouped:
        pg._start_coalescing(group.device)
    works = [pg.send([t.view(torch.uint8)], peer, tag) for peer, tag, t in sent]
    works += [pg.recv([t.view(torch.uint8)], peer, tag) for peer, tag, t in received]
    if grouped:
        works = [pg._end_coalescing(group.device)]
    for work in works if sent or received else ():
        work.wait()
    if grouped:
        torch.cuda.synchronize()


class Plain:
    def __init__(self, o):
        self.o = o
        host, _, port = o.store.rpartition(":")
        self.store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=600))
        self.device = torch.device("cpu") if o.memory == "host" else torch.device(o.memory)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if o.shared_gpu:
            share_gpu()
        self.frontend = Frontend("127.0.0.1", 0, lambda: None)
        self.batch = Batch(self.frontend, o.max_batch, o.prefill)
        self.weights = Weights(Path(o.checkpoint), self.device, o.slots, o.max_ranks)
        self.runner = Runner(self.weights, o.max_batch, o.prefill, o.max_length, torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.batch.cache = self.runner.cache
        self.group: Group | None = None
        self.members: list[str] = []
        self.wanted = 0  # the view that rank 0 was told of

    def say(self, key: str, **words) -> None:
        self.store.set(f"{key}/{self.o.name}", json.dumps(words))

    def _complete(self) -> None:
        """Copies outside of the runner's stream are complete."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _make_group(self, n: int) -> None:
        self.members = json.loads(self.store.get(f"view/{n}"))["members"]
        rank = self.members.index(self.o.name)
        before = self.group
        self.group = Group(dist.PrefixStore(f"group/{n}", self.store), Peers(tuple(self.members), rank, ()), self.device,
                           self.device.type == "cuda", "127.0.0.1", timedelta(seconds=300))
        if before:
            before.close()
        self.runner.view(self.group, rank)

    def _watch(self) -> None:
        while True:
            n = self.view + 1
            self.store.wait([f"view/{n}"], timedelta(seconds=3600))
            self.wanted = n
            while self.view < n:
                time.sleep(0.01)

    # ---- scaling by stopping ----

    def scale(self, n: int) -> None:
        """All ranks of view n call it, with no step running."""
        times, began = {}, time.monotonic()

        def lap(name: str) -> None:
            nonlocal began
            times[name], began = time.monotonic() - began, time.monotonic()
        old = json.loads(self.store.get(f"view/{n - 1}"))["members"]
        self._make_group(n)
        lap("group_s")
        moved = self._send_dense(len(old))
        lap("dense_s")
        before, after = self._plan(len(old))
        lap("plan_s")
        moved += self._exchange_experts(before, after)
        lap("exchange_s")
        self.weights.set_map(after)
        self._complete()
        self.group.all_reduce_max([0])
        lap("maps_s")
        self.say(f"report/{n}", bytes_received=moved, **times)

    def _send_dense(self, old: int) -> int:
        rank, tensors = self.group.rank, list(self.weights.dense.values())
        for to in range(old, self.group.size):
            if rank == 0:
                exchange(self.group, [(to, i, t) for i, t in enumerate(tensors)], [])
            elif rank == to:
                exchange(self.group, [], [(0, i, t) for i, t in enumerate(tensors)])
            self.group.all_reduce_max([0])  # one after the other
        return sum(t.nbytes for t in tensors) if rank >= old else 0

    def _plan(self, old: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The map before, with nothing on the new ranks, and EPLB's from scratch; rank 0 makes it of everybody's load."""
        w, slots, ranks = self.weights, self.o.slots, self.group.size
        load = self.group.all_gather(w.maps.load.torch())[:old].cpu()  # [rank, layer, slot]
        told = f"plan/{ranks}"
        if self.group.rank == 0:
            experts = torch.zeros(w.model.layers, w.model.logical, dtype=torch.int64)
            experts.scatter_add_(1, w.physical_to_logical, load.transpose(0, 1).reshape(w.model.layers, -1))
            with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
                json.dump({"load": experts.tolist(), "physical": ranks * slots, "gpus": ranks}, f)
                f.flush()
                said = subprocess.run([self.o.eepctl, "plan", "--policy", "eplb", "--input", f.name, "-o", "json"],
                                      capture_output=True, text=True, check=True)
            self.store.set(told, json.dumps([w.physical_to_logical.tolist(), json.loads(said.stdout)["phy2log"]]))
        before, after = (torch.tensor(m) for m in json.loads(self.store.get(told)))
        return torch.cat([before, torch.full((before.shape[0], ranks * slots - before.shape[1]), -1)], 1), after

    def _exchange_experts(self, before: torch.Tensor, after: torch.Tensor) -> int:
        slots, me, moved = self.o.slots, self.group.rank, 0
        staging = {part: torch.empty_like(t) for part, t in self.weights.parts[0].items()}
        for layer, parts in enumerate(self.weights.parts):
            was, now = before[layer].tolist(), after[layer].tolist()
            holders: dict[int, dict[int, int]] = {}  # expert: rank: slot of it there
            for physical, expert in enumerate(was):
                if expert >= 0:
                    holders.setdefault(expert, {}).setdefault(physical // slots, physical % slots)
            sent, received, staged, asked = [], [], [], {}
            for physical, expert in enumerate(now):
                rank, slot = divmod(physical, slots)
                if was[physical] == expert:
                    continue
                if rank in holders[expert]:  # no need of a peer
                    if rank == me:
                        for part, t in parts.items():
                            staging[part][slot].copy_(t[holders[expert][rank]])
                        staged.append(slot)
                    continue
                sources = sorted(holders[expert])
                source = sources[asked.get(expert, 0) % len(sources)]
                asked[expert] = asked.get(expert, 0) + 1
                for i, (part, t) in enumerate(parts.items()):
                    if source == me:
                        sent.append((rank, 2 * physical + i, t[holders[expert][source]]))
                    if rank == me:
                        received.append((source, 2 * physical + i, staging[part][slot]))
                        moved += t[0].nbytes
                if rank == me:
                    staged.append(slot)
            exchange(self.group, sent, received)
            for part, t in parts.items():
                for slot in staged:
                    t[slot].copy_(staging[part][slot])
        return moved

    # ---- life ----

    def step(self) -> None:
        self.batch.admit(self.runner.length, self.runner.vocab)
        plan = self.batch.plan()
        prefill, decode, wanted = self.group.all_reduce_max([plan.prefill is not None, bool(plan.decode), self.wanted])
        if prefill or decode:
            began = time.monotonic()
            with torch.cuda.stream(self.runner.stream):
                done = self.runner.run(plan, bool(prefill), bool(decode))
            self.batch.advance(plan, *done)
            time.sleep(max(0.0, self.o.step_ms / 1000 - (time.monotonic() - began)))
        else:
            time.sleep(0.002)
        if wanted > self.view:
            stopped = time.monotonic()
            self.scale(wanted)
            self.view = wanted
            self.say(f"up/{wanted}", port=self.frontend.port, stopped_s=time.monotonic() - stopped)

    def run(self) -> None:
        self.view = 0
        members = json.loads(self.store.get("view/0"))["members"]
        if self.o.name in members:
            w = self.weights
            w.set_map(w.linear_map(len(members)))
            began = time.monotonic()
            w.load(members.index(self.o.name))
            self._complete()
            loaded = time.monotonic() - began
            self._make_group(0)
            self.say("up/0", port=self.frontend.port, load_s=loaded, bytes_read=w.bytes_read)
        else:
            self.say("spare", port=self.frontend.port)
            self.store.wait(["view/1"], timedelta(seconds=3600))
            self.view = 1
            self.scale(1)
            self.say("up/1", port=self.frontend.port)
        self.frontend.refuse = None
        if self.group.rank == 0:
            threading.Thread(target=self._watch, daemon=True).start()
        while True:
            self.step()


def main() -> None:
    p = argparse.ArgumentParser(description="The example engine without eep: what eep is compared with.")
    p.add_argument("--store", required=True, help="HOST:PORT of compare.py's TCPStore")
    p.add_argument("--name", required=True)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--memory", default="host", help="host or cuda:N")
    p.add_argument("--shared-gpu", action="store_true", help="several ranks use one GPU: each calls itself a host to nccl")
    p.add_argument("--slots", type=int, required=True, help="experts of a layer on this rank")
    p.add_argument("--max-ranks", type=int, default=4)
    p.add_argument("--eepctl", required=True)
    p.add_argument("--max-batch", type=int, default=8)
    p.add_argument("--prefill", type=int, default=32)
    p.add_argument("--max-length", type=int, default=256)
    p.add_argument("--step-ms", type=float, default=0)
    o = p.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            Plain(o).run()
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # it ends by a signal, or has failed


if __name__ == "__main__":
    main()
