"""The engine's side of the contract in eep.h, for Python.

Threads as there: `step` and reading the maps belong to one thread, the stepping thread; everything else may be called from
any.  Calls release the interpreter's lock while they wait.  Events come to a callback on libeep's thread, or into a queue
that `events` reads; the callback must not block for long and must not call `detach`.
"""
from __future__ import annotations

import ctypes
import enum
import os
import queue
import select
import sys
import time
import traceback
import weakref
from dataclasses import dataclass
from typing import Callable, Iterator

from . import _lib
from .memory import Array

UNPROFILED = (1 << 64) - 1


class Dispatch(enum.IntEnum):
    """How the engine's dispatch reads the expert map."""
    SOURCE_ROUTED = 1  # the sending rank maps logical to physical; ranks may use different maps for a moment
    REPLICATED = 2  # each rank recomputes the routing of all tokens; all maps agree in every step


class EventKind(enum.IntEnum):
    REGIONS = 1  # weights are mapped: model, tensor and maps work from now on
    LOAD = 2  # cold start of an engine that seals: allocate, fill the slots of load_map, seal
    PREPARE = 3  # build communicators for `view` in the background; answer prepared within deadline_ms, whatever peers do
    ABORT = 4  # drop what was prepared for `op`
    DRAIN = 5  # finish or hand back requests within deadline_ms; answer drained
    REVOKE = 6  # a member of the view is gone: abort the communicators, leave the step
    RELEASE = 7  # this rank has left: drop every array, answer released
    DETACHED = 8  # only detach is left


class StepResult(enum.IntEnum):
    RUN = 1
    IDLE = 2
    LEFT = 3


class PeerLost(ConnectionError):
    """A collective of a step failed since a peer is gone.  Leaves Engine.step as a failed step once the view is revoked."""


@dataclass(frozen=True)
class Member:
    agent: str
    endpoint: str  # the engine's own word, as it attached with it
    serving: bool
    draining: bool


class View:
    """The topology of an epoch, immutable.  It keeps libeep's view for as long as it lives."""

    def __init__(self, pointer):
        raw = pointer.contents
        self._pointer = _lib.lib().eep_view_ref(pointer)
        weakref.finalize(self, _lib.lib().eep_view_unref, self._pointer)
        self.epoch: int = raw.epoch  # 0 while proposed
        self.n: int = raw.n
        self.rank: int = raw.rank  # -1: this rank leaves
        self.kv_bytes: int = raw.kv_bytes
        self.members: tuple[Member, ...] = tuple(
            Member((m.agent or b"").decode(), (m.endpoint or b"").decode(), m.serving, m.draining)
            for m in (raw.members[i] for i in range(raw.n)))

    def physical_to_logical_map(self, layers: int, slots: int) -> Array:
        """[layers, n * slots] when the view was made, -1: nothing routed.  Valid as long as this view is referenced."""
        address = ctypes.cast(self._pointer.contents.physical_to_logical_map, ctypes.c_void_p).value
        return Array(address or 0, -1, "I32", (layers, self.n * slots), owner=self)

    def __repr__(self) -> str:
        return f"View(epoch={self.epoch}, rank={self.rank}, n={self.n})"


@dataclass(frozen=True)
class Event:
    kind: EventKind
    op: int
    attempt: int
    epoch: int
    deadline_ms: int
    view: View | None
    load_map: tuple[tuple[int, ...], ...] | None  # LOAD: [layers][slots] logical experts, -1: leave empty
    text: str


def _event(raw: _lib.Event) -> Event:
    load_map = None
    if raw.load_map:
        load_map = tuple(tuple(raw.load_map[i * raw.load_slots:(i + 1) * raw.load_slots]) for i in range(raw.load_layers))
    return Event(EventKind(raw.kind), raw.op, raw.attempt, raw.epoch, raw.deadline_ms, View(raw.view) if raw.view else None,
                 load_map, (raw.text or b"").decode("utf-8", "replace"))


@dataclass(frozen=True)
class Model:
    layers: int  # MoE layers
    logical: int  # experts per layer
    slots: int  # per rank
    device: int
    config: str | None  # config.json
    producer: str


class Maps:
    """The expert maps, at fixed addresses for the life of the attachment, rewritten at boundaries only.

    Host arrays: physical_to_logical [layers, max_ranks * slots] (rank r's slot s is r * slots + s), logical_to_physical
    [layers, logical, max_replicas], replica_count [layers, logical] (entries of logical_to_physical to choose from; a
    slot that is to get more of the tokens is among them more than once), load [layers, slots] (U64: the engine adds the tokens
    it computed).  `on_device` has the same on the GPU, or is this object itself on the host: what kernels and captured
    graphs read, rewritten in the order of the step's stream.
    """

    def __init__(self, raw: _lib.Maps, device: int | None = None):
        self._raw = raw
        self.layers, self.logical, self.slots = raw.layers, raw.logical, raw.slots
        self.max_ranks, self.max_replicas = raw.max_ranks, raw.max_replicas
        at, prefix = (-1, "") if device is None else (device, "device_")

        def array(name: str, dtype: str, *shape: int) -> Array:
            return Array(getattr(raw, prefix + name), at, dtype, shape)

        self.physical_to_logical = array("physical_to_logical_map", "I32", raw.layers, raw.max_ranks * raw.slots)
        self.logical_to_physical = array("logical_to_physical_map", "I32", raw.layers, raw.logical, raw.max_replicas)
        self.replica_count = array("logical_replica_count", "I32", raw.layers, raw.logical)
        self.load = array("expert_load", "U64", raw.layers, raw.slots)
        self.on_device: Maps = Maps(raw, raw.device) if device is None and raw.device >= 0 else self

    @property
    def version(self) -> int:
        return self._raw.version


@dataclass(frozen=True)
class Stats:
    steps: int
    flips: int
    holds: int
    longest_hold_ns: int
    boundary_syscalls: int
    hold_histogram: tuple[int, ...]  # bucket i: [2^i, 2^(i+1)) ns


class Step:
    """One turn at a boundary.  True in a condition: run it.  The engine sets any_work before the step ends."""

    def __init__(self, result: StepResult, raw: _lib.Step, view: View | None):
        self.result = result
        self.step: int = raw.step
        self.wave: int = raw.wave
        self.view = view
        self.view_changed: bool = raw.view_changed  # first step in it: switch to the prepared communicators now
        self.map_changed: bool = raw.map_changed
        self.held_ns: int = raw.held_ns  # how long this boundary held the engine
        self.any_work = False  # to be set: some rank of the view still has requests
        self.failed = False  # after the block: it was revoked, its requests run again

    def __bool__(self) -> bool:
        return self.result == StepResult.RUN


class _StepContext:
    def __init__(self, engine: "Engine", stream: int | None, has_work: bool, timeout: float | None, peer_timeout: float):
        self._engine, self._stream, self._has_work = engine, stream or None, has_work
        self._timeout_ms = -1 if timeout is None else int(timeout * 1000)
        self._peer_timeout = peer_timeout

    def __enter__(self) -> Step:
        self._step = self._engine.step_begin(self._stream, self._has_work, self._timeout_ms)
        return self._step

    def __exit__(self, kind, error, trace) -> bool:
        if not self._step:
            return False
        if kind is None:
            self._engine.step_end(self._stream, self._step.any_work)
            return False
        # Only a peer's death is a reason to try again; that it is one, the control plane says.
        if not issubclass(kind, Exception):
            return False
        if isinstance(error, PeerLost):
            self._engine.wait_revoked(self._peer_timeout)
            if self._engine.revoked:
                self._engine.step_failed()
                self._step.failed = True
                return True
        return False


class Engine:
    """An attachment to the agent of this GPU.  Made by `attach`; a context manager that detaches."""

    def __init__(self, options: _lib.Options, on_event: Callable[["Engine", Event], None] | None):
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._on_event = on_event
        self._handle = ctypes.c_void_p()
        self._maps: Maps | None = None
        self._view: View | None = None
        self._view_at = 0
        self._raw_step = _lib.Step()
        options.on_event = self._callback = _lib.ON_EVENT(self._event)
        # Straight into place: events may come before this returns.
        _lib.call("eep_attach", ctypes.byref(options), ctypes.byref(self._handle))
        self.device: int = _lib.lib().eep_device(self._handle)

    def _event(self, _user, raw) -> None:
        try:
            event = _event(raw.contents)
            if self._on_event:
                self._on_event(self, event)
            else:
                self._queue.put(event)
                self.wake()
        except BaseException:  # nobody is above us who could take it
            print("eep: the callback for an event failed:", file=sys.stderr)
            traceback.print_exc()

    @property
    def _attached(self) -> ctypes.c_void_p:
        if not self._handle:
            raise _lib.EepError(-1, "not attached any more")
        return self._handle

    # ---- events ----

    def events(self, timeout: float | None = 0) -> Iterator[Event]:
        """The events that have come; waits up to `timeout` seconds (None: for ever) for the first.  Without on_event."""
        try:
            yield self._queue.get(timeout is None or timeout > 0, timeout or None)
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return

    def prepared(self, op: int, attempt: int, why_not: str | None = None) -> None:
        """Answers PREPARE: yes, or why not."""
        _lib.call("eep_prepared", self._attached, op, attempt, 0 if why_not is None else -1,
                  None if why_not is None else why_not.encode()[:200])

    def drained(self) -> None:
        _lib.call("eep_drained", self._attached)

    def released(self) -> None:
        """Answers RELEASE and unmaps the regions: no array over them may be used any more."""
        self._maps = None
        _lib.call("eep_released", self._attached)

    def set_endpoint(self, endpoint: str) -> None:
        _lib.call("eep_set_endpoint", self._attached, endpoint.encode())

    # ---- weights ----

    @property
    def model(self) -> Model:
        """After REGIONS."""
        raw = _lib.Model()
        _lib.call("eep_model_get", self._attached, ctypes.byref(raw))
        return Model(raw.layers, raw.logical, raw.slots, raw.device, raw.config.decode() if raw.config else None,
                     (raw.producer or b"").decode())

    def tensor(self, name: str) -> Array:
        """A tensor by name; an expert part is "layers.<MoE layer>.experts.<part>", [slots, ...].  KeyError: there is none."""
        raw = _lib.Tensor()
        if _lib.lib().eep_tensor_get(self._attached, name.encode(), ctypes.byref(raw)) < 0:
            raise KeyError((_lib.lib().eep_last_error() or b"").decode() or name)
        return Array(raw.data, raw.device, raw.dtype.decode(), tuple(raw.shape[:raw.dims]), raw.stride)

    def region_alloc(self, name: str | None = None, *, bytes: int = 0, layer: int = 0, part: str | None = None,
                     slots: int = 0, dtype: str | None = None, shape: tuple[int, ...] = ()) -> Array:
        """Memory of the agent, for an engine that lays out its own weights (between LOAD and seal).

        Dense: name and bytes; tensors in it are told by tensor_add; the result is bytes (U8).  Expert part: layer, part,
        slots, dtype and the shape of one slot; slots are packed, the result is [slots, *shape].  Blocks until the agent
        has answered; not from the callback.
        """
        raw = _lib.RegionSpec(name=name.encode() if name else None, bytes=bytes)
        result: tuple[str, tuple[int, ...]] = ("U8", (bytes,))
        if part is not None:
            if dtype is None:
                raise ValueError(f"expert part {part} of layer {layer} has no dtype")
            one = Array(0, -1, dtype, tuple(shape)).span
            raw = _lib.RegionSpec(expert=True, layer=layer, part=part.encode(), slots=slots, stride=one, slot_bytes=one,
                                  dtype=dtype.encode(), dims=len(shape), shape=tuple(shape))
            result = (dtype, (slots, *shape))
        data = ctypes.c_void_p()
        _lib.call("eep_region_alloc", self._attached, ctypes.byref(raw), ctypes.byref(data))
        return Array(data.value or 0, self.device, *result)

    def tensor_add(self, region: str, name: str, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        """Names a tensor inside a dense region."""
        sizes = (ctypes.c_uint64 * 6)(*shape)
        _lib.call("eep_tensor_add", self._attached, region.encode(), name.encode(), offset, dtype.encode(), len(shape), sizes)

    def seal(self, config: str | None = None) -> None:
        """All regions are filled; on a GPU, what was copied there must be complete (torch.cuda.synchronize)."""
        _lib.call("eep_seal", self._attached, config.encode() if config else None)

    # ---- maps ----

    @property
    def maps(self) -> Maps | None:
        """None before REGIONS."""
        if self._maps is None:
            raw = _lib.lib().eep_maps_get(self._attached)
            self._maps = Maps(raw.contents) if raw else None
        return self._maps

    # ---- steps ----

    def step(self, stream: int | None = None, *, has_work: bool, timeout: float | None = 1.0,
             peer_timeout: float = 45.0) -> _StepContext:
        """A step as a context:

            with engine.step(stream, has_work=..., timeout=...) as step:
                if step:
                    ...                    # in step.view
                    step.any_work = ...    # agreed between the ranks inside the step

        stream: torch.cuda.Stream.cuda_stream of a stream that is not the default one (whose number is 0 = none); with it
        the work need only be launched when the block ends.  timeout: seconds to wait when idle, None = until woken.
        PeerLost inside the block waits up to peer_timeout seconds for the view to be revoked, then the step has failed
        (step.failed, no exception); otherwise, and with any other exception, the step is left as it is and the exception
        goes on: the engine should end, its peers are told by the agents.
        """
        return _StepContext(self, stream, has_work, timeout, peer_timeout)

    def step_begin(self, stream: int | None, has_work: bool, timeout_ms: int) -> Step:
        raw = self._raw_step
        result = _lib.call("eep_step_begin", self._attached, stream or None, has_work, timeout_ms, ctypes.byref(raw))
        return Step(StepResult(result), raw, self._view_of(raw.view))

    def step_end(self, stream: int | None, any_work: bool) -> None:
        _lib.call("eep_step_end", self._attached, stream or None, any_work)

    def step_failed(self) -> None:
        _lib.call("eep_step_failed", self._attached)

    def _view_of(self, pointer) -> View | None:
        if not pointer:
            return None
        at = ctypes.addressof(pointer.contents)
        if self._view is None or at != self._view_at or self._view.epoch != pointer.contents.epoch:
            self._view, self._view_at = View(pointer), at
        return self._view

    def wake(self) -> None:
        """Ends a wait in step.  Any thread."""
        if self._handle:
            _lib.lib().eep_wake(self._attached)

    @property
    def revoked(self) -> bool:
        return bool(_lib.lib().eep_revoked(self._attached))

    @property
    def revoke_fd(self) -> int:
        """Readable while the current view is revoked."""
        return _lib.lib().eep_revoke_fd(self._attached)

    def wait_revoked(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not self.revoked:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            select.select([self.revoke_fd], [], [], min(left, 0.2))
        return True

    # ---- figures, end ----

    def stats(self) -> Stats:
        raw = _lib.Stats()
        _lib.lib().eep_stats_get(self._attached, ctypes.byref(raw))
        return Stats(raw.steps, raw.flips, raw.holds, raw.longest_hold_ns, raw.boundary_syscalls, tuple(raw.hold_histogram))

    def detach(self) -> None:
        """Says goodbye and unmaps everything.  Not from the callback; again: nothing."""
        self._maps = None
        if self._handle:
            _lib.lib().eep_detach(self._handle)  # events come until it returns, and their callback may answer
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_error) -> None:
        self.detach()


def attach(socket: str | None = None, *, endpoint: str, dispatch: Dispatch = Dispatch.SOURCE_ROUTED,
           kv_bytes: int = UNPROFILED, max_ranks: int = 0, seals: str | None = None, moe_layers: int = 0,
           logical_experts: int = 0, on_event: Callable[[Engine, Event], None] | None = None,
           patience: float = 0, masks: bool = False) -> Engine:
    """Attaches to the agent at `socket` ($EEP_SOCKET).  EepError says why not; with `patience` it is tried for so many
    seconds, since the agent may be starting.

    endpoint: this engine's own word in the view (how routers and peers reach it).  seals: the name of this engine's own
    layout, with moe_layers and logical_experts; None uses the checkpoint loader's.  on_event(engine, event): on libeep's
    thread; without it, read engine.events().  masks: this engine serves on without experts whose replica_count is 0.
    """
    socket = socket or os.environ.get("EEP_SOCKET")
    deadline = time.monotonic() + patience
    while True:
        options = _lib.Options(socket=socket.encode() if socket else None, endpoint=endpoint.encode(), dispatch=dispatch,
                               kv_bytes=kv_bytes, max_ranks=max_ranks, moe_layers=moe_layers,
                               logical_experts=logical_experts, seals=seals.encode() if seals else None, masks=masks)
        try:
            return Engine(options, on_event)
        except _lib.EepError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)
