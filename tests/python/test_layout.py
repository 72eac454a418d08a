"""The structs of eep/_lib.py against eep.h, as a C compiler lays them out."""
import ctypes
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from cluster import ROOT

from eep import _lib
from eep.engine import EventKind, StepResult

STRUCTS = {"eep_member": _lib.Member, "eep_view": _lib.View, "eep_event": _lib.Event, "eep_options": _lib.Options,
           "eep_model": _lib.Model, "eep_tensor": _lib.Tensor, "eep_region_spec": _lib.RegionSpec, "eep_maps": _lib.Maps,
           "eep_step": _lib.Step, "eep_stats": _lib.Stats}
HEADER = ROOT / "agent/libeep/eep.h"
CC = shutil.which(os.environ.get("CC", "gcc"))


def compiled(lines: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "layout.c"), Path(folder, "layout")
        source.write_text("#include <stddef.h>\n#include <stdio.h>\n#include \"eep.h\"\nint main(void)\n{\n" + "\n".join(lines) +
                          "\nreturn 0;\n}\n")
        subprocess.run([CC, "-I", str(HEADER.parent), "-o", str(program), str(source)], check=True)
        return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout


@unittest.skipUnless(CC and HEADER.exists(), "no C compiler, or no eep.h")
class Layout(unittest.TestCase):
    def test_structs(self):
        lines, ours = [], []
        for name, struct in STRUCTS.items():
            lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
            ours.append(f"{name} {ctypes.sizeof(struct)}")
            for field, _ in struct._fields_:
                member = getattr(struct, field)
                lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof(struct {name}, {field}), '
                             f"sizeof(((struct {name} *)0)->{field}));")
                ours.append(f"{name}.{field} {member.offset} {member.size}")
        self.assertEqual(compiled(lines).split("\n")[:-1], ours)

    def test_enums(self):
        names = [f"EEP_EVENT_{kind.name}" for kind in EventKind] + [f"EEP_STEP_{result.name}" for result in StepResult]
        values = [*EventKind, *StepResult]
        out = compiled([f'printf("%d\\n", {name});' for name in names])
        self.assertEqual([int(x) for x in out.split()], [int(v) for v in values])

    def test_every_function_is_in_the_header(self):
        text = HEADER.read_text()
        for name in _lib._FUNCTIONS:
            self.assertIn(f"{name}(", text)
