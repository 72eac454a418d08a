"""The shortest engine in Python, and a thread to run it in."""
import threading

from cluster import Cluster

import eep


class Small:
    """Attaches, answers everything, and runs steps until told to stop.  `seen`: kinds of events, in order."""

    def __init__(self, cluster: Cluster, i: int = 0, body=None, **options):
        self.seen: list[eep.EventKind] = []
        self.views: list[tuple[int, int, int]] = []  # epoch, rank, ranks
        self.results: set[eep.StepResult] = set()
        self.error: BaseException | None = None
        self.regions, self.stop = threading.Event(), threading.Event()
        self.has_work = False
        self._body = body or (lambda engine, step: False)
        self.engine = eep.attach(cluster.socket(i), endpoint=f"engine {i}", **options)
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def answer(self, event: eep.Event) -> None:
        self.seen.append(event.kind)
        if event.kind == eep.EventKind.REGIONS:
            self.regions.set()
        elif event.kind == eep.EventKind.PREPARE:
            self.engine.prepared(event.op, event.attempt)
        elif event.kind == eep.EventKind.DRAIN:
            self.engine.drained()
        elif event.kind == eep.EventKind.RELEASE:
            self.regions.clear()
            self.engine.released()

    def _main(self) -> None:
        try:
            while not self.stop.is_set():
                for event in self.engine.events(0 if self.regions.is_set() else 0.1):
                    self.answer(event)
                if self.regions.is_set():
                    with self.engine.step(has_work=self.has_work, timeout=0.2) as step:
                        self.results.add(step.result)
                        if step:
                            if step.view_changed:
                                self.views.append((step.view.epoch, step.view.rank, step.view.n))
                            step.any_work = bool(self._body(self.engine, step))
        except BaseException as e:
            self.error = e

    def __enter__(self) -> "Small":
        return self

    def __exit__(self, *_error) -> None:
        self.stop.set()
        self.engine.wake()
        self._thread.join(10)
        assert not self._thread.is_alive(), "the engine's thread hangs"
        self.engine.detach()
        if self.error:
            raise self.error
