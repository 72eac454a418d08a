"""tests/gpu/compare.py on the host with gloo: the sides serve the same requests, and its table says what each cost."""
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from cluster import BIN, QWEN3, ROOT

try:
    import torch
    import transformers
except ImportError:
    torch = None


@unittest.skipUnless(torch, "torch and transformers are not here")
class Compare(unittest.TestCase):
    def test_eep_against_a_blocking_scheme(self):
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run(
                [sys.executable, str(ROOT / "tests/gpu/compare.py"), "--bin", str(BIN), "--checkpoint", str(QWEN3), "--out", out,
                 "--sides", "quiet,eep,blocking", "--requests", "100", "--max-tokens", "40", "--step-ms", "20", "--settle", "2"],
                capture_output=True, text=True, timeout=400)
            logs = "\n".join(f"{p.name}: {p.read_text()[-800:]}" for p in sorted(Path(out).glob("*.log")))
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr[-2000:] + logs)
            sides = {s["side"]: s for s in json.loads(Path(out, "compare.json").read_text())["sides"]}
            for name, side in sides.items():
                self.assertEqual((side["completed"], side["lost"]), (100, 0), name)
            for name in ("eep", "blocking"):
                side = sides[name]
                self.assertEqual(side["changed"], 0, name)
                self.assertGreater(side["bytes"], 0, name)
                self.assertGreaterEqual(side["memory_peak"], side["memory_before"] * 0.9, name)
            self.assertLess(sides["eep"]["held_s"], sides["blocking"]["held_s"])
            self.assertGreater(sides["blocking"]["pause_s"], sides["blocking"]["held_s"])  # nothing is answered while all stop
            self.assertIn("blocking", Path(out, "compare.txt").read_text())
            self.assertTrue(Path(out, "eep.csv").read_text().startswith("seconds,tokens_per_s\n"))


if __name__ == "__main__":
    unittest.main()
