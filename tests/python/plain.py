"""A safetensors file by numpy alone; bf16 as uint16."""
import json
import struct
from pathlib import Path

import numpy

from eep.memory import DTYPES


def load(path) -> dict:
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, t in json.loads(data[8:8 + length]).items():
        if name != "__metadata__":
            size, kind, _ = DTYPES[t["dtype"]]
            begin, end = t["data_offsets"]
            tensors[name] = numpy.frombuffer(data[8 + length + begin:8 + length + end], kind or f"<u{size}").reshape(t["shape"])
    return tensors
