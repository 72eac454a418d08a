"""A coordinator and agents on loopback in a temporary folder, for tests of the Python package."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("EEP_BIN", ROOT / "build")).resolve()
QWEN3, MIXTRAL = ROOT / "tests/data/qwen3-moe-tiny", ROOT / "tests/data/mixtral-tiny"
PYTHON = next(p for p in (ROOT / "agent/python", ROOT / "python") if p.exists())  # source tree, or a bundle
sys.path.insert(0, str(PYTHON))
if (BIN / "libeep.so").exists():
    os.environ.setdefault("EEP_LIB", str(BIN / "libeep.so"))


class Cluster:
    def __init__(self, agents: int = 1, checkpoint: Path | None = QWEN3, coordinator: tuple[str, ...] = ()):
        self._folder = tempfile.TemporaryDirectory(prefix="eep-python-", ignore_cleanup_errors=True)
        self.dir = Path(self._folder.name)
        self.address = f"unix:{self.dir}/c.sock"
        self.processes: list[subprocess.Popen] = []
        try:
            self._start_all(agents, checkpoint, coordinator)
        except BaseException:
            self.__exit__()
            raise

    def _start_all(self, agents: int, checkpoint: Path | None, coordinator: tuple[str, ...]) -> None:
        self._start("coordinator", "eep-coordinator", "--state", f"{self.dir}/state", "--listen", self.address, "--min-ranks", "1",
                    *coordinator)
        self._wait(lambda: self.ctl("status").returncode == 0)
        for i in range(agents):
            load = ["--checkpoint", str(checkpoint)] if checkpoint else []
            self._start(f"agent-{i}", "eep-agent", "--id", f"gpu{i}", "--coordinator", self.address, "--engine-socket",
                        self.socket(i), *load)
        self._wait(lambda: all(Path(self.socket(i)).exists() for i in range(agents)))

    def socket(self, i: int) -> str:
        return f"{self.dir}/e{i}.sock"

    def _start(self, log: str, program: str, *args: str) -> None:
        with open(self.dir / f"{log}.log", "wb") as out:
            self.processes.append(subprocess.Popen([str(BIN / program), *args], stdout=out, stderr=out))

    def _wait(self, what, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                raise AssertionError("the cluster did not start:\n" + self.logs())
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in self.dir.glob("*.log"))

    def ctl(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(BIN / "eepctl"), "-c", self.address, *args], capture_output=True, text=True, timeout=60)

    def ctl_start(self, *args: str) -> subprocess.Popen:
        return subprocess.Popen([str(BIN / "eepctl"), "-c", self.address, *args], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def engines(self) -> int:
        out = json.loads(self.ctl("-o", "json", "agents").stdout)
        return sum(bool(a.get("engine")) for a in (out["agents"] if isinstance(out, dict) else out))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_error) -> None:
        for p in reversed(self.processes):
            p.send_signal(signal.SIGTERM)
        for p in reversed(self.processes):
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        self._folder.cleanup()
