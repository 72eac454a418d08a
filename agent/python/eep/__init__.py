"""eep: an inference engine in Python takes part in elastic expert parallelism.

    import eep

    engine = eep.attach(endpoint="...")            # $EEP_SOCKET: the agent of this GPU
    for event in engine.events(timeout=None): ...  # REGIONS, PREPARE, DRAIN, REVOKE, RELEASE, ...
    w13 = engine.tensor("layers.0.experts.w13").torch()   # the agent's memory, no copy
    with engine.step(has_work=True) as step:
        if step: ...                               # run the step in step.view

It needs libeep.so ($EEP_LIB names it) and no compiler.  numpy and torch are used where they are asked for, not before.
eep.distributed (needs torch) makes process groups for views.  docs/python.md walks through an engine.
"""
from ._lib import EepError
from .engine import (Dispatch, Engine, Event, EventKind, Maps, Member, Model, PeerLost, Stats, Step, StepResult, View,
                     attach)
from .memory import Array

__version__ = "0.1.0"
__all__ = ["Array", "Dispatch", "EepError", "Engine", "Event", "EventKind", "Maps", "Member", "Model", "PeerLost",
           "Stats", "Step", "StepResult", "View", "attach"]
