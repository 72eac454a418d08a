"""libeep by ctypes: the structs of eep.h, its functions, its errors.  Nothing here is for engines: see engine.py.

The structs repeat eep.h field by field; tests/python/test_layout.py compares both with a compiler.
"""
from __future__ import annotations

import ctypes as c
import os
from pathlib import Path

__all__ = ["EepError", "lib", "call"]


class EepError(RuntimeError):
    """A call of libeep failed.  `code` is the negative code, the text is libeep's sentence."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Member(c.Structure):
    _fields_ = [("agent", c.c_char_p), ("endpoint", c.c_char_p), ("serving", c.c_bool), ("draining", c.c_bool)]


class View(c.Structure):
    _fields_ = [("epoch", c.c_uint64), ("n", c.c_uint32), ("rank", c.c_int32), ("kv_bytes", c.c_uint64),
                ("members", c.POINTER(Member)), ("physical_to_logical_map", c.POINTER(c.c_int32))]


class Event(c.Structure):
    _fields_ = [("kind", c.c_int), ("op", c.c_uint64), ("attempt", c.c_uint64), ("epoch", c.c_uint64),
                ("deadline_ms", c.c_uint32), ("view", c.POINTER(View)), ("load_map", c.POINTER(c.c_int32)),
                ("load_layers", c.c_uint32), ("load_slots", c.c_uint32), ("text", c.c_char_p)]


ON_EVENT = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(Event))


class Options(c.Structure):
    _fields_ = [("socket", c.c_char_p), ("endpoint", c.c_char_p), ("dispatch", c.c_int), ("kv_bytes", c.c_uint64),
                ("max_ranks", c.c_uint32), ("moe_layers", c.c_uint32), ("logical_experts", c.c_uint32),
                ("seals", c.c_char_p), ("on_event", ON_EVENT), ("user", c.c_void_p), ("masks", c.c_bool)]


class Model(c.Structure):
    _fields_ = [("layers", c.c_uint32), ("logical", c.c_uint32), ("slots", c.c_uint32), ("device", c.c_int),
                ("config", c.c_char_p), ("producer", c.c_char_p)]


class Tensor(c.Structure):
    _fields_ = [("data", c.c_void_p), ("device", c.c_int), ("dtype", c.c_char_p), ("dims", c.c_uint32),
                ("shape", c.c_uint64 * 6), ("stride", c.c_uint64)]


class RegionSpec(c.Structure):
    _fields_ = [("name", c.c_char_p), ("expert", c.c_bool), ("bytes", c.c_uint64), ("layer", c.c_uint32),
                ("part", c.c_char_p), ("slots", c.c_uint32), ("stride", c.c_uint64), ("slot_bytes", c.c_uint64),
                ("dtype", c.c_char_p), ("dims", c.c_uint32), ("shape", c.c_uint64 * 6)]


class Maps(c.Structure):
    _fields_ = [("layers", c.c_uint32), ("logical", c.c_uint32), ("slots", c.c_uint32), ("max_ranks", c.c_uint32),
                ("max_replicas", c.c_uint32), ("version", c.c_uint64),
                ("physical_to_logical_map", c.c_void_p), ("logical_to_physical_map", c.c_void_p),
                ("logical_replica_count", c.c_void_p), ("expert_load", c.c_void_p), ("device", c.c_int),
                ("device_physical_to_logical_map", c.c_void_p), ("device_logical_to_physical_map", c.c_void_p),
                ("device_logical_replica_count", c.c_void_p), ("device_expert_load", c.c_void_p)]


class Step(c.Structure):
    _fields_ = [("step", c.c_uint64), ("wave", c.c_uint64), ("view", c.POINTER(View)), ("view_changed", c.c_bool),
                ("map_changed", c.c_bool), ("held_ns", c.c_uint64)]


class Stats(c.Structure):
    _fields_ = [("steps", c.c_uint64), ("flips", c.c_uint64), ("holds", c.c_uint64), ("longest_hold_ns", c.c_uint64),
                ("boundary_syscalls", c.c_uint64), ("hold_histogram", c.c_uint64 * 40)]


_EEP = c.c_void_p
_U64 = c.c_uint64
# name: (result, arguments)
_FUNCTIONS = {
    "eep_view_ref": (c.POINTER(View), [c.POINTER(View)]),
    "eep_view_unref": (None, [c.POINTER(View)]),
    "eep_attach": (c.c_int, [c.POINTER(Options), c.POINTER(_EEP)]),
    "eep_detach": (None, [_EEP]),
    "eep_last_error": (c.c_char_p, []),
    "eep_strerror": (c.c_char_p, [c.c_int]),
    "eep_device": (c.c_int, [_EEP]),
    "eep_model_get": (c.c_int, [_EEP, c.POINTER(Model)]),
    "eep_tensor_get": (c.c_int, [_EEP, c.c_char_p, c.POINTER(Tensor)]),
    "eep_region_alloc": (c.c_int, [_EEP, c.POINTER(RegionSpec), c.POINTER(c.c_void_p)]),
    "eep_tensor_add": (c.c_int, [_EEP, c.c_char_p, c.c_char_p, _U64, c.c_char_p, c.c_uint32, c.POINTER(_U64)]),
    "eep_seal": (c.c_int, [_EEP, c.c_char_p]),
    "eep_prepared": (c.c_int, [_EEP, _U64, _U64, c.c_int, c.c_char_p]),
    "eep_drained": (c.c_int, [_EEP]),
    "eep_released": (c.c_int, [_EEP]),
    "eep_set_endpoint": (c.c_int, [_EEP, c.c_char_p]),
    "eep_maps_get": (c.POINTER(Maps), [_EEP]),
    "eep_step_begin": (c.c_int, [_EEP, c.c_void_p, c.c_bool, c.c_int, c.POINTER(Step)]),
    "eep_step_end": (c.c_int, [_EEP, c.c_void_p, c.c_bool]),
    "eep_step_failed": (c.c_int, [_EEP]),
    "eep_wake": (None, [_EEP]),
    "eep_revoke_fd": (c.c_int, [_EEP]),
    "eep_revoked": (c.c_bool, [_EEP]),
    "eep_stats_get": (None, [_EEP, c.POINTER(Stats)]),
}


def _candidates() -> list[str]:
    if os.environ.get("EEP_LIB"):
        return [os.environ["EEP_LIB"]]
    here = Path(__file__).resolve().parent
    # python/eep of an unpacked bundle; agent/python/eep of a source tree that was built; an installed library
    near = [here.parents[1] / "lib" / "libeep.so.0", here.parents[2] / "build" / "libeep.so"]
    return [str(path) for path in near if path.exists()] + ["libeep.so.0"]


def _load() -> c.CDLL:
    why = []
    for name in _candidates():
        try:
            found = c.CDLL(name)
        except OSError as e:
            why.append(str(e))
            continue
        for function, (result, arguments) in _FUNCTIONS.items():
            entry = getattr(found, function)
            entry.restype, entry.argtypes = result, arguments
        return found
    raise ImportError("libeep was not found; set EEP_LIB to libeep.so: " + "; ".join(why))


_lib: c.CDLL | None = None


def lib() -> c.CDLL:
    """libeep, loaded at the first use: $EEP_LIB, the bundle's or the source tree's, or the system's."""
    global _lib
    if _lib is None:
        _lib = _load()
    return _lib


def call(name: str, *args) -> int:
    """Calls a function that returns 0, a positive value, or a negative code, which is raised."""
    code = getattr(lib(), name)(*args)
    if code < 0:
        text = lib().eep_last_error()
        raise EepError(code, text.decode("utf-8", "replace") if text else name)
    return code
