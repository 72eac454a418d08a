"""The agent's memory as arrays, without a copy: numpy on the host, torch on host or GPU, or any library that reads
`__array_interface__` or `__cuda_array_interface__`.

Lifetime: an array is valid as long as the regions are mapped: until Engine.released() or Engine.detach().  Drop arrays
before that; reading one later is a fault that Python cannot catch.
"""
from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

# dtypes of safetensors: bytes of an element, numpy's name (None: numpy has no such type), torch's name
DTYPES: dict[str, tuple[int, str | None, str]] = {
    "BOOL": (1, "|b1", "bool"), "U8": (1, "|u1", "uint8"), "I8": (1, "|i1", "int8"),
    "F8_E4M3": (1, None, "float8_e4m3fn"), "F8_E5M2": (1, None, "float8_e5m2"), "F8_E8M0": (1, None, "float8_e8m0fnu"),
    "I16": (2, "<i2", "int16"), "U16": (2, "<u2", "uint16"), "F16": (2, "<f2", "float16"), "BF16": (2, None, "bfloat16"),
    "I32": (4, "<i4", "int32"), "U32": (4, "<u4", "uint32"), "F32": (4, "<f4", "float32"),
    "I64": (8, "<i8", "int64"), "U64": (8, "<u8", "uint64"), "F64": (8, "<f8", "float64"), "C64": (8, "<c8", "complex64"),
}


class _CudaBytes:
    """What torch.as_tensor, cupy and others take for bytes on a GPU."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
                                         "strides": None}


@dataclass(frozen=True)
class Array:
    """Memory at a fixed address: `shape` elements of `dtype`, in C order but for the first dimension, whose step may be
    larger (`stride` bytes; 0 = packed)."""

    address: int
    device: int  # -1: host; else the CUDA device ordinal
    dtype: str  # as in safetensors
    shape: tuple[int, ...]
    stride: int = 0
    owner: object = field(default=None, repr=False, compare=False)

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from element to element, per dimension."""
        size = DTYPES[self.dtype][0]
        steps = [size * math.prod(self.shape[i + 1:]) for i in range(len(self.shape))]
        if self.stride and steps:
            steps[0] = self.stride
        return tuple(steps)

    @property
    def span(self) -> int:
        """Bytes from the first to behind the last element."""
        if 0 in self.shape:
            return 0
        return DTYPES[self.dtype][0] + sum((n - 1) * step for n, step in zip(self.shape, self.strides))

    def _interface(self) -> dict:
        size, typestr, _ = DTYPES[self.dtype]
        return {"shape": self.shape, "typestr": typestr or f"<u{size}".replace("<u1", "|u1"),
                "data": (self.address, False), "version": 3, "strides": self.strides}

    @property
    def __array_interface__(self) -> dict:
        if self.device >= 0:
            raise AttributeError("this array lies on a GPU")
        return self._interface()

    @property
    def __cuda_array_interface__(self) -> dict:
        if self.device < 0:
            raise AttributeError("this array lies in host memory")
        return self._interface()

    def numpy(self):
        """A numpy array over this memory.  Types that numpy lacks (BF16, F8_*) come as unsigned integers of their size."""
        if self.device >= 0:
            raise TypeError(f"the array lies on CUDA device {self.device}; numpy reads host memory only")
        import numpy
        return numpy.asarray(self)

    def torch(self, dtype=None):
        """A torch tensor over this memory.  dtype: another type of the same size (U64 counters as torch.int64)."""
        import torch
        size, _, name = DTYPES[self.dtype]
        dtype = dtype or getattr(torch, name)
        if self.span == 0:
            return torch.empty(self.shape, dtype=dtype, device="cpu" if self.device < 0 else f"cuda:{self.device}")
        if self.device < 0:
            flat = torch.frombuffer((ctypes.c_uint8 * self.span).from_address(self.address), dtype=torch.uint8)
        else:
            flat = torch.as_tensor(_CudaBytes(self.address, self.span), device=f"cuda:{self.device}")
            if flat.data_ptr() != self.address:
                raise RuntimeError(f"torch copied memory of CUDA device {self.device} instead of using it in place")
        if any(step % size for step in self.strides):
            raise ValueError(f"slots lie {self.stride} bytes apart, which is no multiple of an element of {self.dtype}")
        return flat.view(dtype).as_strided(self.shape, [step // size for step in self.strides])
