"""An eep-coordinator with TCPStore listeners in a temporary folder, for tests that use PyTorch's own client."""
import atexit
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

BIN = Path(os.environ.get("EEP_BIN", Path(__file__).resolve().parents[2] / "build")).resolve()


class TcpstoreServer:
    """ports: what to listen on (0 = any free one), each with a namespace of its own.  RuntimeError: it did not start, and why."""

    def __init__(self, ports: tuple[int, ...] = (0,), grace_ms: int = 300, options: tuple[str, ...] = ()):
        self._folder = tempfile.TemporaryDirectory(prefix="eep-torch-", ignore_cleanup_errors=True)
        self.dir = Path(self._folder.name)
        self.address = f"unix:{self.dir}/sock"
        listen = [x for i, p in enumerate(ports) for x in ("--tcpstore-listen", f"127.0.0.1:{p}/space{i}")]
        with open(self.dir / "log", "wb") as log:
            self._process = subprocess.Popen(
                [str(BIN / "eep-coordinator"), "--state", str(self.dir / "state"), "--listen", self.address,
                 "--port-file", str(self.dir / "ports"), "--tcpstore-grace-ms", str(grace_ms), *listen, *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        atexit.register(self.stop)
        try:
            self.ports = self._wait(len(ports))
        except BaseException:
            self.stop()
            raise
        self.port = self.ports[0]

    def _wait(self, n: int) -> list[int]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._process.poll() is None:
            path = self.dir / "ports"
            lines = path.read_text().split() if path.exists() else []
            if len(lines) == n + 1:
                return [int(line.rsplit(":", 1)[1]) for line in lines[1:]]
            time.sleep(0.01)
        raise RuntimeError("eep-coordinator did not start: " + self.log())

    def log(self) -> str:
        return (self.dir / "log").read_text()

    def ctl(self, *args: str) -> str:
        return subprocess.run([str(BIN / "eepctl"), "-c", self.address, *args], capture_output=True, text=True, timeout=60,
                              check=True).stdout

    def stop(self) -> int:
        """Its exit status; what it was."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()
        return self._process.returncode
