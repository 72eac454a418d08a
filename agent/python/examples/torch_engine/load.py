"""Requests for engines of a cluster, and what became of them: tokens over time as CSV, all tokens as JSON.

    python3 load.py --ctl "eepctl -c unix:/run/eep/c.sock" --requests 200 --csv out.csv --tokens out.json [--compare other.json]

Prompts are random by --seed, so two runs have the same requests.  Requests that an engine hands back or refuses go on
elsewhere.  Exit status 1: a request was lost, or (--compare) its tokens differ from those of the other run.
"""
from __future__ import annotations

import argparse
import json
import random
import selectors
import shlex
import socket
import subprocess
import sys
import threading
import time


class View:
    """Whom requests may be sent to, asked of eepctl again and again by a thread."""

    def __init__(self, ctl: str):
        self._command = [*shlex.split(ctl), "-o", "json", "status"]
        self.members: list[str] = []  # host:port
        self.ranks = 0
        threading.Thread(target=self._main, daemon=True).start()

    def _main(self) -> None:
        while True:
            said = subprocess.run(self._command, capture_output=True, text=True)
            try:
                members = (json.loads(said.stdout).get("view") or {}).get("members", [])
                self.ranks = len(members)
                self.members = [w[8:] for m in members if m["serving"] and not m["draining"]
                                for w in m["endpoint"].split() if w.startswith("request=")]
            except (ValueError, KeyError):
                pass
            time.sleep(0.1)


class Load:
    def __init__(self, o):
        self.o = o
        r = random.Random(o.seed)
        self.prompts = [[r.randrange(o.vocab) for _ in range(o.prompt)] for _ in range(o.requests)]
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.moved = [0] * len(self.prompts)
        self.waiting = list(range(len(self.prompts)))[::-1]
        self.running: dict[int, str] = {}  # request: host:port
        self.done = 0
        self.lost: list[str] = []
        self.links: dict[str, socket.socket] = {}
        self.received: dict[str, bytes] = {}
        self.selector = selectors.DefaultSelector()
        self.view = View(o.ctl)
        self.arrivals: list[tuple[float, int]] = []  # when, ranks
        self.gaps: list[tuple[float, float]] = []  # when, seconds since that request's token before
        self.last: dict[int, float] = {}

    def _send(self, request: int) -> bool:
        load = {a: 0 for a in self.view.members}
        for a in self.running.values():
            load[a] = load.get(a, 0) + (a in load)
        for address in sorted(self.view.members, key=lambda a: load[a]):
            try:
                if address not in self.links:
                    host, _, port = address.rpartition(":")
                    self.links[address] = socket.create_connection((host, int(port)), 5)
                    self.received[address] = b""
                    self.selector.register(self.links[address], selectors.EVENT_READ, address)
                words = {"id": f"{request}.{len(self.tokens[request])}", "prompt": self.prompts[request] + self.tokens[request],
                         "max_tokens": self.o.max_tokens - len(self.tokens[request])}
                self.links[address].sendall(json.dumps(words).encode() + b"\n")
                self.running[request] = address
                return True
            except OSError:
                self._drop(address)
        return False

    def _drop(self, address: str) -> None:
        if address in self.links:
            self.selector.unregister(self.links[address])
            self.links.pop(address).close()
        for request in [q for q, a in self.running.items() if a == address]:
            self._again(request)

    def _again(self, request: int) -> None:
        del self.running[request]
        self.moved[request] += 1
        self.waiting.append(request)

    def _line(self, words: dict) -> None:
        request = int(words["id"].split(".")[0])
        if "token" in words:
            now = time.time()
            self.tokens[request].append(words["token"])
            self.arrivals.append((now, self.view.ranks))
            if request in self.last:
                self.gaps.append((now, now - self.last[request]))
            self.last[request] = now
        elif words.get("done"):
            self.done += 1
            del self.running[request]
            if len(self.tokens[request]) != self.o.max_tokens:
                self.lost.append(f"request {request} ended after {len(self.tokens[request])} tokens")
        elif words.get("handback") or words.get("refused") in ("draining", "starting", "leaving", "ending"):
            self._again(request)
        else:
            self.lost.append(f"request {request}: {words}")
            del self.running[request]

    def run(self) -> None:
        deadline = time.monotonic() + self.o.limit
        while self.done + len(self.lost) < len(self.prompts) and time.monotonic() < deadline:
            while self.waiting and len(self.running) < self.o.concurrency and self._send(self.waiting[-1]):
                self.waiting.pop()
            for key, _ in self.selector.select(0.05):
                try:
                    data = key.fileobj.recv(1 << 16)
                except OSError:
                    data = b""
                if not data:
                    self._drop(key.data)
                    continue
                *lines, self.received[key.data] = (self.received[key.data] + data).split(b"\n")
                for line in lines:
                    self._line(json.loads(line))

    def write_csv(self) -> None:
        """seconds,ranks,tokens per second, in steps of --bin seconds."""
        begin, end = self.arrivals[0][0], self.arrivals[-1][0]
        bins = [[0, 0, 0.0] for _ in range(int((end - begin) / self.o.bin) + 1)]
        for when, ranks in self.arrivals:
            b = bins[int((when - begin) / self.o.bin)]
            b[0], b[1] = b[0] + 1, ranks
        for when, gap in self.gaps:
            b = bins[int((when - begin) / self.o.bin)]
            b[2] = max(b[2], gap)
        with open(self.o.csv, "w") as f:
            f.write(f"# begin={begin:.3f}\nseconds,ranks,tokens_per_s,longest_gap_ms\n")
            for i, (n, ranks, gap) in enumerate(bins):
                f.write(f"{i * self.o.bin:.3f},{ranks},{n / self.o.bin:.1f},{gap * 1000:.1f}\n")

    def report(self) -> bool:
        if not self.arrivals:
            print("no token came")
            return False
        seconds = self.arrivals[-1][0] - self.arrivals[0][0]
        gaps = sorted(g for _, g in self.gaps)
        print(f"requests: {len(self.prompts)}, {self.done} completed, {len(self.prompts) - self.done} lost, "
              f"{sum(m > 0 for m in self.moved)} moved to another rank")
        print(f"tokens: {len(self.arrivals)} in {seconds:.2f} s, {len(self.arrivals) / max(seconds, 1e-9):.1f} a second; "
              f"gap of one request: median {gaps[len(gaps) // 2] * 1000:.1f} ms, p99 {gaps[int(len(gaps) * 0.99)] * 1000:.1f}, "
              f"longest {gaps[-1] * 1000:.1f}")
        for line in self.lost[:5]:
            print(line)
        good = self.done == len(self.prompts) and not self.lost
        if self.o.compare:
            with open(self.o.compare) as f:
                other = json.load(f)
            changed = [i for i, t in enumerate(self.tokens) if t != other["tokens"][i]]
            unmoved = sum(not self.moved[i] for i in changed)
            print(f"tokens against {self.o.compare}: {len(self.tokens) - len(changed)} of {len(self.tokens)} requests equal; "
                  f"of those that differ {unmoved} stayed on one rank and {len(changed) - unmoved} were moved")
            good = good and not changed
        with open(self.o.tokens, "w") as f:
            json.dump({"tokens": self.tokens, "moved": self.moved}, f)
        self.write_csv()
        return good


def main() -> int:
    p = argparse.ArgumentParser(description="Sends requests to the engines of a view, and says what became of them.")
    p.add_argument("--ctl", required=True, help='command and address, e.g. "eepctl -c unix:/run/eep/c.sock"')
    p.add_argument("--requests", type=int, default=100)
    p.add_argument("--concurrency", type=int, default=16)
    p.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--vocab", type=int, default=512, help="prompts are of tokens below this")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--limit", type=float, default=300, help="seconds at most")
    p.add_argument("--bin", type=float, default=0.2, help="seconds of a line of the CSV")
    p.add_argument("--csv", required=True)
    p.add_argument("--tokens", required=True)
    p.add_argument("--compare", help="--tokens of another run with the same requests")
    load = Load(p.parse_args())
    load.run()
    return 0 if load.report() else 1


if __name__ == "__main__":
    sys.exit(main())
