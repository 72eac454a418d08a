"""The life of the engine:

  attach -> REGIONS: bind -> steps in a view -> LEFT -> RELEASE -> (REGIONS again, as a spare)

The stepping thread (main) owns model, batch and group.  libeep's thread calls `_on_event`, which starts or drops groups and
notes the rest for the stepping thread.
"""
from __future__ import annotations

import gc
import queue
import threading
import time
from pathlib import Path

import torch

import eep
from eep.distributed import Groups, share_gpu

import fp8
from batch import Batch, Plan
from frontend import Frontend
from model import Decode, Runner, moe_blocks, skeleton

IDLE_S = 1.0


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0


class Serving:
    def __init__(self, o, log):
        self.o, self.log = o, log
        self.notes: queue.SimpleQueue[eep.Event | None] = queue.SimpleQueue()
        self.ending = threading.Event()
        self.engine: eep.Engine | None = None
        self.groups: Groups | None = None
        self.ready = threading.Event()  # groups can be prepared
        host, _, port = o.listen.rpartition(":")
        self.frontend = Frontend(host, int(port), self._wake)
        self.host = o.advertise or host
        self.batch = Batch(self.frontend, o.max_batch, o.prefill)
        self.runner: Runner | None = None  # while weights are bound
        self.bound = threading.Event()  # it is there
        self.group, self.rank = None, -1  # of the view in use
        self.view_draining = False
        self.drain: tuple[float, bool] | None = None  # until when; said that it is over
        self.steps_us: list[int] = []
        self.trace = open(o.trace, "w", buffering=1) if o.trace else None

    # ---- other threads ----

    def _wake(self) -> None:
        if self.engine:
            self.engine.wake()

    def stop(self) -> None:
        self.ending.set()
        self.notes.put(None)
        self._wake()

    def _on_event(self, engine: eep.Engine, event: eep.Event) -> None:
        self.log(event.kind.name.lower(), op=event.op, attempt=event.attempt, epoch=event.epoch, why=event.text)
        self.ready.wait()
        if event.kind == eep.EventKind.PREPARE:
            self.groups.prepare(engine, event, self._prepared)
        elif event.kind == eep.EventKind.ABORT:
            self.groups.abort(event.op)
        elif event.kind == eep.EventKind.REVOKE:
            self.groups.revoke()
        self.notes.put(event)
        engine.wake()

    def _prepared(self, group) -> Decode:
        """A group was built, for a view that is prepared or, after a death, for the present one."""
        if not self.bound.wait(self.o.stall_ms / 1000):
            raise TimeoutError("the weights are not bound")
        began = time.monotonic()
        decode = self.runner.prepare(group)
        self.log("prepared", ranks=group.size, graph=self.o.graphs, ms=int((time.monotonic() - began) * 1000))
        return decode

    # ---- between steps ----

    def _note(self, event: eep.Event) -> None:
        kind = eep.EventKind
        if event.kind == kind.REGIONS:
            self._bind()
        elif event.kind == kind.LOAD:
            began = time.monotonic()
            done = fp8.load(self.engine, event, Path(self.o.checkpoint))
            self.log("sealed", layout=fp8.NAME, experts=done, ms=int((time.monotonic() - began) * 1000))
            self._bind()
        elif event.kind == kind.DRAIN:
            self.drain = (time.monotonic() + event.deadline_ms / 1000, False)
        elif event.kind == kind.ABORT:
            self.drain = None
        elif event.kind == kind.RELEASE:
            self._unbind()
            self.engine.released()
        elif event.kind == kind.DETACHED:
            raise eep.EepError(-1, f"detached: {event.text}")

    def _bind(self) -> None:
        began = time.monotonic()
        cuda = self.engine.device >= 0
        dtype = {"auto": torch.bfloat16 if cuda else torch.float32}.get(self.o.dtype) or getattr(torch, self.o.dtype)
        self._unbind()
        self.runner = Runner(self.engine, self.o.max_batch, self.o.prefill, self.o.max_length, dtype,
                             self.o.graphs, self.o.kv_bytes)
        self.batch.cache = self.runner.cache
        self.bound.set()
        self.log("bound", producer=self.engine.model.producer, layers=self.engine.model.layers,
                 experts=self.engine.model.logical, slots=self.engine.model.slots, device=self.runner.device, dtype=dtype,
                 ms=int((time.monotonic() - began) * 1000))

    def _unbind(self) -> None:
        """Nothing may point into the regions after this."""
        self.bound.clear()
        self._leave("leaving")
        self.runner = self.batch.cache = None
        gc.collect()

    def _leave(self, why: str) -> None:
        self.batch.hand_back(why)
        self._drop_group()
        self.rank, self.drain = -1, None

    def _drop_group(self) -> None:
        if self.runner:
            self.runner.leave()  # a graph before the communicators that it uses
        self.groups.drop()
        self.group = None

    def _admit(self) -> None:
        refuse = "starting" if self.rank < 0 else "draining" if self.drain or self.view_draining else None
        self.frontend.refuse = refuse
        if self.drain and not self.drain[1] and (not self.batch.sequences or time.monotonic() >= self.drain[0]):
            self.log("drained", handed_back=len(self.batch.sequences))
            self.batch.hand_back("draining")
            self.engine.drained()
            self.drain = (self.drain[0], True)
        elif not refuse:
            self.batch.admit(self.runner.length, self.runner.vocab)

    # ---- steps ----

    def _switch(self, step: eep.Step) -> None:
        began = time.monotonic()
        view = step.view
        self.group = self.groups.switch(self.engine, view)
        self.rank, self.view_draining = view.rank, view.members[view.rank].draining
        self.runner.view(self.group, view.rank, self.group.made)
        self.group.made = None  # the runner's now
        self.runner.cache.agree(view.kv_bytes)
        self.log("view", epoch=view.epoch, step=step.step, rank=view.rank, ranks=view.n, group=self.group.size, kv_pages=self.runner.cache.usable,
                 held_us=step.held_ns // 1000, switch_us=int((time.monotonic() - began) * 1e6))

    def _agree(self, step: eep.Step, plan: Plan) -> tuple[bool, bool, bool]:
        """What the ranks do in this step, and whether any has work after it; that all are in the same one is checked."""
        e, s = step.view.epoch, step.step
        said = self.group.all_reduce_max([e, -e, s, -s, plan.prefill is not None, bool(plan.decode), plan.more])
        self.groups.met()
        if said[:4] != [e, -e, s, -s]:
            raise RuntimeError(f"this rank is in epoch {e} step {s}, another is not: {said[:4]}")
        return bool(said[4]), bool(said[5]), bool(said[6])

    def _compute(self, step: eep.Step) -> tuple[Plan, int | None, list[int]]:
        if step.view_changed or self.group is None:
            self._switch(step)
        elif step.map_changed:
            self.log("map", step=step.step, version=self.engine.maps.version)
        self.view_draining = step.view.members[step.view.rank].draining
        plan = self.batch.plan()
        prefill, decode, step.any_work = self._agree(step, plan)
        if self.o.busy_us:
            until = time.monotonic() + self.o.busy_us / 1e6
            while time.monotonic() < until:
                pass
        prefilled, decoded = self.runner.run(plan, prefill, decode)
        if self.engine.revoked:
            raise eep.PeerLost("the view was revoked while the step ran")
        return plan, prefilled, decoded

    def _step(self) -> None:
        stream = self.runner.stream
        began = time.monotonic()
        done = None
        with torch.cuda.stream(stream):  # None: no stream, nothing
            with self.engine.step(stream.cuda_stream if stream else None, has_work=bool(self.batch.sequences),
                                  timeout=IDLE_S, peer_timeout=self.o.stall_ms / 1000) as step:
                if step:
                    began = time.monotonic()
                    if step.held_ns:
                        self.log("held", step=step.step, us=step.held_ns // 1000)
                    done = self._compute(step)
                    time.sleep(max(0.0, self.o.step_ms / 1000 - (time.monotonic() - began)))
        if step.result == eep.StepResult.LEFT:
            self.log("left", rank=self.rank, handed_back=len(self.batch.sequences),
                     kv_pages_max=self.runner.cache.most)
            self._leave("leaving")
        elif step.failed:
            self.log("step-failed", level="warn", step=step.step)
            self._drop_group()
        elif done:
            us = int((time.monotonic() - began) * 1e6)
            self.steps_us.append(us)
            if self.trace:
                made = len(done[0].decode) + (done[1] is not None)
                self.trace.write(f"{time.time():.6f},{step.step},{step.view.n},{made},{us},{step.held_ns}\n")
            self.batch.advance(*done)

    def _turn(self) -> None:
        while not self.notes.empty() or not self.runner:
            event = self.notes.get()
            if event is None:
                return
            self._note(event)
        self._admit()
        self._step()

    # ---- life ----

    def run(self) -> int:
        try:
            self._attach()
            while not self.ending.is_set():
                self._turn()
        except Exception as e:
            if not self.ending.is_set():
                self.log("failed", level="error", why=f"{type(e).__name__}: {e}")
                self._end()
                return 1
        self._end()
        return 0

    def _attach(self) -> None:
        if self.o.shared_gpu:
            share_gpu()
        # Where the weights lie is known once attached; the store's address has to be published when attaching.
        self.groups = Groups(self.host, timeout=self.o.stall_ms / 1000)
        words = f"request={self.host}:{self.frontend.port} {self.groups.endpoint}"
        self.engine = eep.attach(self.o.socket, endpoint=words, dispatch=eep.Dispatch[
            "REPLICATED" if self.o.dispatch == "replicated" else "SOURCE_ROUTED"], kv_bytes=self.o.kv_bytes,
            on_event=self._on_event, patience=self.o.attach_ms / 1000, masks=True, **self._layout())
        if self.engine.device >= 0:
            torch.cuda.set_device(self.engine.device)
            self.groups.use_device(torch.device("cuda", self.engine.device), self.o.exchange != "gloo")
        self.ready.set()
        self.log("attached", socket=self.o.socket, endpoint=words, device=self.engine.device)

    def _layout(self) -> dict:
        """Of an engine that makes its own: what the agent cannot know."""
        if self.o.layout == "loader":
            return {}
        blocks = moe_blocks(skeleton((Path(self.o.checkpoint) / "config.json").read_text()))
        return {"seals": fp8.NAME, "moe_layers": len(blocks), "logical_experts": blocks[0].experts.gate_up_proj.shape[0]}

    def _end(self) -> None:
        if self.engine:
            s = self.engine.stats()
            self.log("end", steps=s.steps, flips=s.flips, holds=s.holds, longest_hold_us=s.longest_hold_ns // 1000,
                     step_p50_us=percentile(self.steps_us, 0.5), step_p99_us=percentile(self.steps_us, 0.99),
                     step_max_us=max(self.steps_us, default=0), kv_pages_max=self.runner.cache.most if self.runner else 0)
        self.batch.hand_back("ending")
        self.ready.set()
        if self.engine:
            self._drop_group()
            self.groups.close()
        self.frontend.close()
        self.runner = None
        gc.collect()
        if self.engine:
            self.engine.detach()
