"""torch.distributed for views: one process group per view, the next one built in the background during PREPARE.

    groups = Groups(host="127.0.0.1", device=torch.device("cpu"))
    engine = eep.attach(endpoint=f"request=... {groups.endpoint}", on_event=on_event)
    # on_event: PREPARE -> groups.prepare(engine, event), ABORT -> groups.abort(event.op), REVOKE -> groups.revoke()
    with engine.step(...) as step:
        if step.view_changed:
            group = groups.switch(engine, step.view)
        group.all_gather(...); group.all_to_all(...); group.all_reduce_max(...)

No default group is made: torch.distributed.init_process_group is not called, and groups of any size come and go.  Ranks of a
group are the serving members of the view, in the view's order.  A group has gloo for the host, and on a GPU nccl as well.

They meet in a TCPStore: the coordinator's (`--tcpstore-listen`; $EEP_TCPSTORE or `store`, "host:port"), else that of the
first serving member, each of which serves one.  A store is needed while a group is built, never later.
"""
from __future__ import annotations

import hashlib
import os
import secrets
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable

# A rank whose peer dies is told so by its agent; NCCL's watchdog must not end the process meanwhile.
os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")

import torch
import torch.distributed as dist

from .engine import Engine, Event, PeerLost, View

CLOSE_AFTER_S = 2.0


def word(endpoint: str, key: str) -> str:
    """The value of "key=value" in an endpoint's words, or ""."""
    return next((w[len(key) + 1:] for w in endpoint.split() if w.startswith(key + "=")), "")


def share_gpu() -> None:
    """For several ranks on one GPU, before the first group: NCCL takes two ranks of one host on one GPU for a mistake, so
    each process calls itself a host.  They then talk by sockets."""
    os.environ.setdefault("NCCL_HOSTID", f"eep-{os.getpid()}")


@dataclass(frozen=True)
class Peers:
    """The serving members of a view, by the ids of their processes, and which of them we are."""

    ids: tuple[str, ...]
    self: int
    stores: tuple[str, ...]

    def same(self, other: "Peers") -> bool:
        return (self.ids, self.self) == (other.ids, other.self)


class Group:
    """The communicators of one view.  Collectives raise PeerLost when a peer is gone."""

    def __init__(self, store: dist.Store, peers: Peers, device: torch.device, nccl: bool, host: str, timeout: timedelta):
        self.peers, self.rank, self.size = peers, peers.self, len(peers.ids)
        self.device = device
        self.made: object = None  # what the caller of Groups.prepare made for this group
        self._gloo = self._nccl = None
        self._process_group: dist.ProcessGroup | None = None
        self._store = store
        if self.size == 1:
            return
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timeout
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank, self.size, options)
        if nccl:
            self._nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.size,
                                               dist.ProcessGroupNCCL.Options())
            self._warm()

    def _warm(self) -> None:
        """NCCL connects at the first use; that is to happen now, and not in the step that switches."""
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            x = torch.zeros(self.size * 16, dtype=torch.uint8, device=self.device)
            self._nccl._allgather_base(x, x[:16].clone()).wait()
            self._nccl.alltoall_base(torch.empty_like(x), x, [], []).wait()
            torch.cuda.current_stream().synchronize()

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The same communicators for torch.distributed's own functions (`group=`)."""
        if self._process_group is None:
            kinds = dist.ProcessGroup.BackendType
            group = dist.ProcessGroup(self._store, self.rank, self.size)
            group._set_default_backend(kinds.NCCL if self._nccl else kinds.GLOO)
            group._register_backend(torch.device("cpu"), kinds.GLOO, self._gloo)
            if self._nccl:
                group._register_backend(torch.device("cuda"), kinds.NCCL, self._nccl)
            self._process_group = group
        return self._process_group

    def _run(self, what: str, backend, *tensors) -> None:
        try:
            getattr(backend, what)(*tensors).wait()
        except RuntimeError as e:  # gloo: a connection that ended, a time-out; nccl: aborted
            raise PeerLost(f"{what} failed on rank {self.rank} of {self.size}: {e}") from e

    def _move(self, what: str, out: torch.Tensor, x: torch.Tensor, *more) -> None:
        """As bytes, since gloo does not know every type; through host memory where only gloo is there for a GPU's tensors."""
        out, x = out.view(torch.uint8).view(-1), x.contiguous().view(torch.uint8).view(-1)
        if x.is_cuda and self._nccl is None:
            staged = torch.empty(out.shape, dtype=torch.uint8)
            self._run(what, self._gloo, staged, x.cpu(), *more)
            out.copy_(staged)
        else:
            self._run(what, self._nccl if x.is_cuda else self._gloo, out, x, *more)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape], from every rank its x, which all have one shape."""
        if self.size == 1:
            return x[None]
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._move("_allgather_base", out, x)
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x[r] goes to rank r; row r of the result came from rank r."""
        if self.size == 1:
            return x
        out = torch.empty_like(x)
        self._move("alltoall_base", out, x, [], [])
        return out

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """Of host integers, element by element."""
        if self.size == 1:
            return values
        x = torch.tensor(values, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._run("allreduce", self._gloo, [x], options)
        return x.tolist()

    def abort(self) -> None:
        """Ends collectives that hang on a peer.  Any thread.  (gloo's end by themselves when the peer's process is gone.)"""
        nccl = self._nccl
        if nccl is not None:  # it returns when no graph uses the communicator any more, so not here
            threading.Thread(target=nccl.abort, daemon=True, name="abort").start()

    def close(self) -> None:
        """Returns at once.  NCCL's part goes a while later: its proxies may still carry what a slower peer waits for.  A CUDA
        graph that uses the group must have been dropped."""
        self._process_group = self._gloo = self.made = None
        nccl, self._nccl = self._nccl, None
        if nccl is not None:
            late = threading.Timer(CLOSE_AFTER_S, nccl.abort)
            late.daemon = True
            late.start()


class _Build:
    """A group that is being built by a thread of its own, or waits to be adopted."""

    def __init__(self, groups: "Groups", peers: Peers, key: str, make: Callable[[Group], object] | None, op: int = 0,
                 answer: Callable[[str | None], None] | None = None):
        self.peers, self.op = peers, op
        self.group: Group | None = None
        self._making: Group | None = None  # it is there, what is made for it is not
        self.why: str | None = None  # it is not there, or shall not be used
        self.silent = False  # no answer is owed any more
        self.done = threading.Event()
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._main, args=(groups, key, make, answer), daemon=True, name=f"group {key}")
        self.thread.start()

    def _main(self, groups: "Groups", key: str, make: Callable[[Group], object] | None,
              answer: Callable[[str | None], None] | None) -> None:
        group, why = None, None
        try:
            if self.peers.self >= 0:
                group = groups._make(self.peers, key)
                with self._lock:
                    self._making = group if self.why is None else None
                if make and self._making:
                    group.made = make(group)
        except Exception as e:  # whatever torch raises is a group that was not built
            why = f"{type(e).__name__}: {e}"
        with self._lock:
            self._making, self.why = None, self.why or why
            if self.why is None:
                self.group, group = group, None
        if group:
            group.close()
        self.done.set()
        if answer and not self.silent:
            answer(self.why)

    def take(self) -> Group | None:
        with self._lock:
            group, self.group = self.group, None
        return group

    def drop(self, why: str) -> None:
        with self._lock:
            self.why = self.why or why
            group, self.group = self.group, None
            if self._making:  # it may wait there for a peer that is gone
                self._making.abort()
        if group:
            group.close()


class Groups:
    """Builds, keeps and drops the groups of views.  `prepare`, `abort`, `revoke` are for the callback for events, `switch`
    for the stepping thread."""

    def __init__(self, host: str = "127.0.0.1", device: torch.device = torch.device("cpu"), nccl: bool | None = None,
                 store: str | None = None, timeout: float = 45.0):
        self.id = secrets.token_hex(8)  # of this process: a successor on the same port is somebody else
        self.device, self.host = device, host
        self._nccl = device.type == "cuda" if nccl is None else nccl
        self._timeout = timedelta(seconds=timeout)
        self._address = store or os.environ.get("EEP_TCPSTORE", "")
        self._own = None if self._address else dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._lock = threading.Lock()
        self._prepared: _Build | None = None
        self._make_more: Callable[[Group], object] | None = None
        self._group: Group | None = None
        self._before: Group | None = None  # of the view before, until all have met in the present one
        self._threads: list[threading.Thread] = []

    def use_device(self, device: torch.device, nccl: bool = True) -> None:
        """Where the engine computes, known once it is attached; before the first group."""
        self.device, self._nccl = device, nccl and device.type == "cuda"

    @property
    def endpoint(self) -> str:
        """Words for the engine's endpoint, by which peers find and know this process."""
        return f"id={self.id}" + (f" store={self.host}:{self._own.port}" if self._own else "")

    def peers(self, view: View) -> Peers:
        serving = [r for r, m in enumerate(view.members) if m.serving]
        # The view may be older than this process's latest word, but it is us.
        ids = tuple(self.id if r == view.rank else word(view.members[r].endpoint, "id") for r in serving)
        stores = tuple(word(view.members[r].endpoint, "store") for r in serving)
        return Peers(ids, serving.index(view.rank) if view.rank in serving else -1, stores)

    def _make(self, peers: Peers, key: str) -> Group:
        if len(peers.ids) == 1:
            store: dist.Store = dist.HashStore()
        else:
            host, _, port = (self._address or peers.stores[0]).rpartition(":")
            if not host:
                raise ValueError("no store to meet in: set EEP_TCPSTORE, or give every engine a store of its own")
            store = dist.TCPStore(host, int(port), is_master=False, timeout=self._timeout, wait_for_workers=False)
        store = dist.PrefixStore(f"{key}/{hashlib.sha256(' '.join(peers.ids).encode()).hexdigest()[:16]}", store)
        return Group(store, peers, self.device, self._nccl, self.host, self._timeout)

    def prepare(self, engine: Engine, event: Event, make: Callable[[Group], object] | None = None) -> None:
        """Answers PREPARE when the group is there, from a thread of its own; at once where this rank needs none.

        make(group): what else is needed before steps can run in it, such as graphs; called by that thread on every rank of the
        group, and kept in `group.made`.  An exception is the answer.  It is called for the groups of repairs too."""
        self._drop_prepared(None, silent=True)
        self._make_more = make
        build = _Build(self, self.peers(event.view), f"eep/{event.op}.{event.attempt}", make, event.op,
                       lambda why: engine.prepared(event.op, event.attempt, why))
        with self._lock:
            self._prepared = build
            self._threads = [t for t in self._threads if t.is_alive()] + [build.thread]

    def _drop_prepared(self, op: int | None, silent: bool, why: str = "aborted") -> None:
        with self._lock:
            build = self._prepared
            if build is None or (op is not None and build.op != op):
                return
            self._prepared = None
        build.silent |= silent
        build.drop(why)

    def abort(self, op: int) -> None:
        self._drop_prepared(op, silent=True)

    def revoke(self) -> None:
        """What was prepared may count on the member that is gone; what is in use shall not hang."""
        self._drop_prepared(None, silent=False, why="the view was revoked")
        with self._lock:
            group = self._group
        if group:
            group.abort()

    def switch(self, engine: Engine, view: View) -> Group:
        """The group for `view`, decided alike on all its ranks: the prepared one where one was prepared for exactly these
        processes, else the present one where they are the same and nothing was revoked (only maps changed), else a new one
        (a repair).  PeerLost: revoked meanwhile."""
        peers = self.peers(view)
        with self._lock:
            build, present = self._prepared, self._group
        group = build.take() if build and build.peers.same(peers) else None
        if group:
            with self._lock:
                self._prepared = None
        elif present and present.peers.same(peers):
            return present
        else:
            group = self._repair(engine, peers, view.epoch)
        with self._lock:
            self._group = group
            before, self._before = self._before, present
        if before:
            before.close()
        return group

    def _repair(self, engine: Engine, peers: Peers, epoch: int) -> Group:
        build = _Build(self, peers, f"eep/epoch{epoch}", self._make_more)
        while not build.done.wait(0.02):
            if engine.revoked:
                build.drop("the view was revoked")
                raise PeerLost(f"the view of epoch {epoch} was revoked while its group was built")
        group = build.take()
        if group is None:
            raise PeerLost(f"no group for epoch {epoch}: {build.why}")
        return group

    def met(self) -> None:
        """All ranks have met in the group in use, so nobody needs the one before it any more."""
        with self._lock:
            before, self._before = self._before, None
        if before:
            before.close()

    def drop(self) -> None:
        """The group in use is of no use any more: a step failed in it, or this rank left."""
        self.met()
        with self._lock:
            group, self._group = self._group, None
        if group:
            group.close()

    def close(self) -> None:
        """Before Engine.detach: nothing answers after it."""
        self._drop_prepared(None, silent=True)
        self.drop()
        for thread in self._threads:
            thread.join(self._timeout.total_seconds())
