"""PyTorch's own test/distributed/test_store.py, as it is, with every TCPStore that would open a server of PyTorch's made a
client of an eep-coordinator that is started for it, on its port.

What a test says of its own server process, and not of what the server does, cannot be asked of ours: such a test is told
apart by what it asks for (below), or because it makes no server at all, or because it fails with PyTorch's own server, too.

usage: torch_upstream.py FILE            FILE: test_store.py of a PyTorch checkout, of about the installed release
       torch_upstream.py FILE own|eep    one side alone, one JSON object a test; what the first form runs
"""
import importlib.util
import json
import os
import subprocess
import sys
import unittest
from datetime import timedelta

NOT_OURS = "not ours: "
# What a test asks of the server's process, not of the server.
PROCESS_TESTS = {"test_repr": NOT_OURS + "the text in which a process shows the server inside itself"}


def patch(touched: list) -> None:
    import torch.distributed as dist

    from tcpstore_server import TcpstoreServer

    own = dist.TCPStore
    servers: dict[int, TcpstoreServer] = {}

    def serve(port: int, multi_tenant: bool) -> int:
        if multi_tenant and port in servers:
            return port
        try:
            server = TcpstoreServer((port,))
        except RuntimeError as e:  # as PyTorch's constructor says it
            raise dist.DistNetworkError(
                f"The server socket has failed to listen on any local network address. port: {port}, {e}") from e
        servers[server.port] = server
        return server.port

    class Either(type(own)):
        def __instancecheck__(cls, x):  # PyTorch makes the first anew from what is inside it
            return type.__instancecheck__(own, x)

    class TCPStore(own, metaclass=Either):
        def __init__(self, host_name, port, world_size=None, is_master=False, timeout=timedelta(seconds=300),
                     wait_for_workers=True, multi_tenant=False, master_listen_fd=None, use_libuv=True):
            if master_listen_fd is not None:
                raise unittest.SkipTest(NOT_OURS + "a listening socket is handed over inside the process")
            if is_master and wait_for_workers and (world_size or 1) > 1:
                raise unittest.SkipTest(NOT_OURS + "the server's constructor waits for its clients")
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "1" and os.environ.get("MASTER_PORT") == str(port)
            if is_master and not agent:
                port = serve(port, multi_tenant)
            if port in servers:
                touched.append(port)
            super().__init__(host_name, port, world_size, False, timeout, wait_for_workers, use_libuv=use_libuv)

    for module in list(sys.modules.values()):
        if getattr(module, "TCPStore", None) is own:
            module.TCPStore = TCPStore


class Result(unittest.TestResult):
    def __init__(self, touched: list):
        super().__init__()
        self._touched = touched
        self._before = 0

    def startTest(self, test):
        self._before = len(self._touched)
        super().startTest(test)

    def _say(self, test, outcome: str, why: str = "") -> None:
        lines = why.strip().splitlines()
        print(json.dumps({"test": test.id().split(".", 1)[1], "outcome": outcome, "why": lines[-1] if lines else "",
                          "servers": len(self._touched) - self._before}), flush=True)

    def addSuccess(self, test):
        self._say(test, "passed")

    def addSkip(self, test, reason):
        self._say(test, "skipped", reason)

    def addFailure(self, test, err):
        self._say(test, "failed", f"{err[0].__name__}: {err[1]}".splitlines()[0][:300])

    addError = addFailure


def run_one_side(path: str, side: str) -> None:
    import torch.testing._internal.common_distributed  # noqa: F401  so that it is patched, too

    touched: list[int] = []
    if side == "eep":
        patch(touched)
    spec = importlib.util.spec_from_file_location("test_store", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_store"] = module
    spec.loader.exec_module(module)
    suite = unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromTestCase(c) for c in vars(module).values()
                               if isinstance(c, type) and issubclass(c, unittest.TestCase) and c.__module__ == "test_store")
    suite.run(Result(touched))


def outcomes(path: str, side: str) -> dict:
    child = subprocess.run([sys.executable, os.path.abspath(__file__), path, side], capture_output=True, text=True, timeout=900)
    found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode != 0 or not found:
        sys.exit(f"test_store.py did not run ({side}):\n" + child.stderr[-2000:])
    return {f["test"]: f for f in found}


def main() -> None:
    path = sys.argv[1]
    if len(sys.argv) > 2:
        return run_one_side(path, sys.argv[2])
    own, eep = outcomes(path, "own"), outcomes(path, "eep")
    counts = {"passed": 0, "failed": 0, "not applicable": 0}
    for name, result in eep.items():
        why = result["why"]
        method = name.rsplit(".", 1)[-1]
        if own.get(name, {}).get("outcome") == "failed":
            what, why = "not applicable", "fails with PyTorch's own server here, too: " + own[name]["why"]
        elif method in PROCESS_TESTS:
            what, why = "not applicable", PROCESS_TESTS[method]
        elif result["outcome"] == "skipped":
            what = "not applicable"
        elif result["outcome"] == "passed" and not result["servers"]:
            what, why = "not applicable", "makes no TCPStore server of PyTorch's"
        else:
            what = result["outcome"]
        counts[what] += 1
        print(f"{what:15} {name}{': ' + why if why else ''}")
    print(", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(1 if counts["failed"] or not counts["passed"] else 0)


if __name__ == "__main__":
    main()
