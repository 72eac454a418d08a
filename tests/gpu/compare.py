"""Three ways from 2 to 4 ranks under the same requests, one after the other, with the same model: what each costs.

  eep       `eepctl scale --to 4`, transports as named ("eep" alone: the first of --transports)
  blocking  all ranks stop, one sender, EPLB from scratch, layer by layer (plain_engine.py)
  restart   all engines end, four start and load the checkpoint (plain_engine.py)

    PYTHONPATH=agent/python python3 tests/gpu/compare.py --bin build --checkpoint DIR --out OUT                 (host memory, gloo)
    python3 tests/gpu/compare.py --bin bin --checkpoint DIR --out OUT --memory cuda --transports cuda_peer,nccl

It writes compare.json, compare.txt (the table, also printed), and for each side SIDE.csv: tokens a second, time 0 being the
command.  Exit status 1: a side failed, a request was lost, or a token differs from those of the run that is not scaled.

  pause     the longest time in which no request got a token, from the command until 2 s after its end; beside it the same of
            the seconds before the command
  in all    from the command until all is in place: experts filled, all ranks stepping
  bytes     that came to ranks: over the network, from peers' memory, or for restart from the checkpoint
  memory    on a GPU: used on all GPUs, above what was used before the side began; on the host: of the processes, shared
            pages once
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = next(p for p in (ROOT / "agent/python", ROOT / "python") if p.exists())  # source tree, or a bundle
ENGINE = PYTHON / "examples/torch_engine"
sys.path.insert(0, str(ENGINE))

from load import Load

AFTER_S = 2.0  # how long behind the end of the operation a pause counts as its


class Memory:
    """Samples what is used, by a thread."""

    def __init__(self, gpus: int, processes):
        self._gpus, self._processes = gpus, processes
        self.samples: list[tuple[float, int]] = []
        self._ending = threading.Event()
        self._zero = self._used() if gpus else 0
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _used(self) -> int:
        if self._gpus:
            import torch
            return sum(total - free for free, total in map(torch.cuda.mem_get_info, range(self._gpus)))
        used = 0
        for p in self._processes():
            try:
                with open(f"/proc/{p.pid}/smaps_rollup") as f:
                    used += sum(int(line.split()[1]) for line in f if line.startswith("Pss:")) * 1024
            except OSError:
                pass  # it has ended
        return used

    def _main(self) -> None:
        while not self._ending.wait(0.02 if self._gpus else 0.25):
            self.samples.append((time.time(), self._used() - self._zero))

    def end(self) -> None:
        self._ending.set()
        self._thread.join()

    def at(self, begin: float, end: float) -> list[int]:
        return [used for when, used in self.samples if begin <= when <= end] or [0]


class Side:
    """Processes in a folder of their own.  start: on 2 ranks, serving; scale: to 4, returns what is known of it."""

    def __init__(self, o, name: str):
        self.o, self.name = o, name
        self.dir = Path(tempfile.mkdtemp(prefix=f"eep-compare-{name}-", dir=o.scratch))
        self.processes: list[subprocess.Popen] = []
        self.gpus = 0 if o.memory == "host" else o.gpus
        self.shared = ["--shared-gpu"] if 0 < self.gpus < 4 else []

    def _start(self, log: str, command: list, **env: str) -> subprocess.Popen:
        with open(self.o.out / f"{self.name}-{log}.log", "ab") as f:
            p = subprocess.Popen([str(c) for c in command], stdout=f, stderr=f, env={**os.environ, **env})
        self.processes.append(p)
        return p

    def wait(self, what: str, done, seconds: float = 180):
        deadline = time.monotonic() + seconds
        while not (found := done()):
            dead = [p for p in self.processes if p.poll() is not None]
            if dead:
                raise RuntimeError(f"{self.name}: {' '.join(dead[0].args[:4])} ended with {dead[0].returncode} while waiting for {what}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no {what} after {seconds:.0f} s")
            time.sleep(0.02)
        return found

    def _memory(self, i: int) -> str:
        return "host" if self.o.memory == "host" else f"cuda:{i % self.gpus}"

    def _common(self) -> list:
        return ["--max-batch", self.o.max_batch, "--prefill", 32, "--max-length", self.o.prompt + self.o.max_tokens, "--step-ms", self.o.step_ms]

    def end_all(self) -> None:
        for p in reversed(self.processes):
            p.send_signal(signal.SIGTERM)
        for p in reversed(self.processes):
            try:
                p.wait(20)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        self.processes.clear()

    def close(self) -> None:
        self.end_all()
        shutil.rmtree(self.dir, ignore_errors=True)


class Eep(Side):
    def __init__(self, o, name: str, transport: str):
        super().__init__(o, name)
        self.transport = transport
        self.address = f"unix:{self.dir}/c.sock"
        self.ctl_words = f"{o.bin / 'eepctl'} -c {self.address}"

    def ctl(self, *args: str, check: bool = True) -> dict:
        said = subprocess.run([*self.ctl_words.split(), "-o", "json", *args], capture_output=True, text=True, timeout=200)
        if check and said.returncode != 0:
            raise RuntimeError(f"eepctl {' '.join(args)}: exit status {said.returncode}: {said.stdout}{said.stderr}")
        return json.loads(said.stdout) if said.stdout.startswith(("{", "[")) else {}

    def start(self) -> None:
        self._start("coordinator", [self.o.bin / "eep-coordinator", "--listen", self.address, "--state", self.dir / "state",
                                    "--tcpstore-listen", "127.0.0.1:0/engines", "--port-file", self.dir / "ports"])
        self.wait("coordinator", lambda: (self.dir / "ports").exists() and self.ctl("status", check=False))
        store = (self.dir / "ports").read_text().split("\n")[1].partition("/")[0]
        for i in range(4):
            self._start(f"agent-{i}", [self.o.bin / "eep-agent", "--id", f"gpu{i}", "--coordinator", self.address, "--engine-socket",
                                       self.dir / f"e{i}.sock", "--checkpoint", self.o.checkpoint, "--memory", self._memory(i),
                                       "--transport", self.transport, *self.shared])
            self._start(f"engine-{i}", [sys.executable, ENGINE, "--socket", self.dir / f"e{i}.sock", "--attach-ms", 60000, *self.shared,
                                        *self._common(), *self.o.engine_options.split()], EEP_TCPSTORE=store)
        self.wait("engines", lambda: sum(bool(a["engine"]) for a in self.ctl("agents")["agents"]) == 4)
        self.ctl("scale", "--to", "2", "--timeout", "150")

    def scale(self) -> dict:
        self.ctl("scale", "--to", "4", "--timeout", "150")
        last = self.ctl("history")["operations"][0]
        return {"bytes": last["bytes"], "held_s": last["hold_ns_max"] / 1e9}


class Plain(Side):
    def start(self) -> None:
        self._members = self.dir / "members.json"
        self.ctl_words = f"sh -c 'cat {self._members}'"
        self._members.write_text("{}")
        self._begin([0, 1], spares=[2, 3])

    def _begin(self, members: list[int], spares: list[int] = []) -> None:
        import torch.distributed as dist
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=200))
        for i in members + spares:
            self._start(f"engine-{i}", [sys.executable, Path(__file__).with_name("plain_engine.py"), "--store", f"127.0.0.1:{self.store.port}",
                                        "--name", f"e{i}", "--checkpoint", self.o.checkpoint, "--memory", self._memory(i),
                                        "--slots", self.o.slots, "--eepctl", self.o.bin / "eepctl", *self.shared, *self._common()])
        self._view(0, members)
        for i in spares:
            self._said(f"spare/e{i}")

    def _said(self, key: str) -> dict:
        self.wait(key, lambda: self.store.check([key]))
        return json.loads(self.store.get(key))

    def _view(self, n: int, members: list[int]) -> list[dict]:
        self.store.set(f"view/{n}", json.dumps({"members": [f"e{i}" for i in members]}))
        said = [self._said(f"up/{n}/e{i}") for i in members]
        new = self._members.with_suffix(".new")
        new.write_text(json.dumps({"view": {"members": [{"serving": True, "draining": False, "endpoint": f"request=127.0.0.1:{s['port']}"}
                                                        for s in said]}}))
        new.rename(self._members)
        return said


class Blocking(Plain):
    def scale(self) -> dict:
        said = self._view(1, [0, 1, 2, 3])
        reports = [self._said(f"report/1/e{i}") for i in range(4)]
        return {"bytes": sum(r["bytes_received"] for r in reports), "held_s": max(s.get("stopped_s", 0) for s in said),
                **{k: max(r[k] for r in reports) for k in reports[0] if k != "bytes_received"}}


class Restart(Plain):
    def scale(self) -> dict:
        self._members.write_text("{}")
        self.end_all()
        ended = time.monotonic()
        before, self.store = self.store, None
        del before
        self._begin([0, 1, 2, 3])
        said = [self._said(f"up/0/e{i}") for i in range(4)]
        return {"bytes": sum(s["bytes_read"] for s in said), "start_s": time.monotonic() - ended, "load_s": max(s["load_s"] for s in said)}


class Quiet(Plain):
    """Not scaled: whose tokens all others must have."""

    def scale(self) -> dict:
        return {"bytes": 0}


def longest_silence(times: list[float], begin: float, end: float) -> float:
    inside = [begin] + [t for t in times if begin < t < end] + [end]
    return max(b - a for a, b in zip(inside, inside[1:]))


def load_of(side: Side, requests: int, tokens: int) -> Load:
    o = side.o
    return Load(argparse.Namespace(ctl=side.ctl_words, requests=requests, concurrency=o.concurrency, prompt=o.prompt, max_tokens=tokens,
                                   vocab=o.vocab, seed=1, limit=o.limit, bin=0.2, csv=None, tokens=None, compare=None))


def measure(side: Side, tokens: list | None) -> dict:
    memory = Memory(side.gpus, lambda: list(side.processes))
    try:
        began = time.monotonic()
        side.start()
        print(f"{side.name}: serving on 2 ranks after {time.monotonic() - began:.1f} s", flush=True)
        load_of(side, 8, 8).run()  # kernels are loaded, caches made
        load = load_of(side, side.o.requests, side.o.max_tokens)
        thread = threading.Thread(target=load.run)
        thread.start()
        time.sleep(side.o.settle)
        begin = time.time()
        result = side.scale()
        end = time.time()
        thread.join()
    finally:
        memory.end()
        side.close()
    return summary(side, load, memory, begin, end, result, tokens)


def summary(side: Side, load: Load, memory: Memory, begin: float, end: float, result: dict, tokens: list | None) -> dict:
    times = [when for when, _ in load.arrivals]
    last = max(times, default=end)
    if last < end:
        raise RuntimeError(f"all requests were done {end - last:.1f} s before the ranks were there: give more --requests, or --step-ms")
    until = min(max(end + AFTER_S, next((t for t in times if t > end), end)), last)
    settled = begin - side.o.settle / 2  # the first seconds are prompts
    with open(side.o.out / f"{side.name}.csv", "w") as f:
        f.write("seconds,tokens_per_s\n")
        for i in range(int((times[0] - begin) / 0.2), int((last - begin) / 0.2) + 1) if times else ():
            f.write(f"{i * 0.2:.1f},{sum(i * 0.2 <= t - begin < i * 0.2 + 0.2 for t in times) / 0.2:.1f}\n")
    return {
        "side": side.name, "completed": load.done, "lost": len(load.prompts) - load.done, "moved": sum(m > 0 for m in load.moved),
        "changed": None if tokens is None else sum(a != b for a, b in zip(load.tokens, tokens)),
        "total_s": end - begin, "pause_s": longest_silence(times, begin, until), "silence_before_s": longest_silence(times, settled, begin),
        "request_gap_s": max((gap for when, gap in load.gaps if begin < when <= until), default=0),
        "tokens_per_s_before": sum(settled <= t < begin for t in times) / (begin - settled),
        "memory_before": memory.at(settled, begin)[-1], "memory_peak": max(memory.at(begin, until)), "memory_after": memory.at(begin, until)[-1],
        **result, "tokens": load.tokens}


def table(results: list[dict], memory: str) -> str:
    lines = [f"{'':18}{'pause s':>9}{'before s':>9}{'gap s':>8}{'in all s':>9}{'bytes GiB':>11}{'memory GiB before':>19}{'peak':>8}{'after':>8}"
             f"{'lost':>6}{'moved':>7}{'changed':>9}"]
    for r in results:
        g = {k: r[k] / 2**30 for k in ("bytes", "memory_before", "memory_peak", "memory_after")}
        lines.append(f"{r['side']:18}{r['pause_s']:9.3f}{r['silence_before_s']:9.3f}{r['request_gap_s']:8.3f}{r['total_s']:9.2f}{g['bytes']:11.3f}"
                     f"{g['memory_before']:19.2f}{g['memory_peak']:8.2f}{g['memory_after']:8.2f}{r['lost']:6}{r['moved']:7}"
                     f"{'-' if r['changed'] is None else r['changed']:>9}")
        parts = [f"{k[:-2]} {r[k]:.3f} s" for k in r if k.endswith("_s") and k not in
                 ("pause_s", "silence_before_s", "request_gap_s", "total_s", "tokens_per_s_before")]
        lines[-1] += f"   {', '.join(parts)}" if parts else ""
    return "\n".join(lines)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="2 to 4 ranks: eep, a blocking scheme, a restart; pause, time, bytes, memory.")
    p.add_argument("--bin", type=Path, required=True, help="a build folder, or bin of a bundle")
    p.add_argument("--checkpoint", type=Path, required=True, help="Qwen3-MoE, as Hugging Face names it")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--scratch", help="where sockets and state go (default: a temporary folder)")
    p.add_argument("--memory", choices=("host", "cuda"), default="host")
    p.add_argument("--transports", default="host", help="a side of eep for each, with --memory cuda of cuda_peer, nccl (default %(default)s)")
    p.add_argument("--sides", default="quiet,eep,blocking,restart")
    p.add_argument("--engine-options", default="", help="more for the engines of eep")
    p.add_argument("--requests", type=int, default=96)
    p.add_argument("--concurrency", type=int, default=16)
    p.add_argument("--prompt", type=int, default=32)
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--max-batch", type=int, default=8)
    p.add_argument("--step-ms", type=float, default=0)
    p.add_argument("--settle", type=float, default=4, help="seconds of serving before the command")
    p.add_argument("--limit", type=float, default=150, help="seconds of one side's requests at most")
    o = p.parse_args()
    o.bin, o.checkpoint, o.out = o.bin.resolve(), o.checkpoint.resolve(), o.out.resolve()
    o.out.mkdir(parents=True, exist_ok=True)
    config = json.loads((o.checkpoint / "config.json").read_text())
    o.vocab, o.slots = config["vocab_size"], -(-(config.get("num_experts") or config["num_local_experts"]) // 2)
    if o.memory == "cuda":
        import torch
        o.gpus = min(4, torch.cuda.device_count())
    return o


def main() -> int:
    o = options()
    lib = next((p for p in (o.bin / "libeep.so", o.bin.parent / "lib/libeep.so.0") if p.exists()), None)
    if lib:
        os.environ.setdefault("EEP_LIB", str(lib))
    os.environ["PYTHONPATH"] = f"{PYTHON}:{os.environ.get('PYTHONPATH', '')}"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.pop("EEP_TCPSTORE", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way of close, so that nothing is left running
    results, tokens, failed = [], None, False
    for name in o.sides.split(","):
        transports = o.transports.split(",") if name == "eep" else [""]
        for transport in transports:
            label = f"eep-{transport}" if name == "eep" and len(transports) > 1 else name
            side = Eep(o, label, transport) if name == "eep" else {"blocking": Blocking, "restart": Restart, "quiet": Quiet}[name](o, label)
            try:
                result = measure(side, tokens)
            except Exception as e:
                print(f"{label}: {type(e).__name__}: {e}", flush=True)
                failed = True
                continue
            made = result.pop("tokens")
            if name == "quiet":
                tokens = made
            # A request that is begun anew elsewhere may round otherwise in bf16: of what eep is compared with, that is told.
            failed |= bool(result["lost"] or (result["changed"] and result["side"].startswith("eep")))
            results.append(result)
            (o.out / "compare.json").write_text(json.dumps({"memory": o.memory, "gpus": getattr(o, "gpus", 0), "sides": results}, indent=1))
            print(table(results[-1:], o.memory), flush=True)
    text = table(results, o.memory)
    (o.out / "compare.txt").write_text(text + "\n")
    print("\n" + text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
