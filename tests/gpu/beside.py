"""Matrix products of a realistic size beside transfers: how long they take, without and with bytes on their way.

    beside.py load GPU FILE             products on that GPU until SIGTERM; a line "end-of-step-ns duration-us" each
    beside.py load cpu FILE             the same of small ones by the CPU alone, to try this without a GPU
    beside.py report FILE... -- LOG...  FILE i against the transfers in LOG i: of an agent, or A,B of all on that GPU; objects of
                                        JSON, one a line

A step is STEP_PRODUCTS products of [TOKENS, HIDDEN] x [HIDDEN, INNER] in bf16 and back, as a decoder's forward pass has them,
waited for as an engine waits at its boundary.  Needs PyTorch with CUDA for `load`, nothing for `cpu` and `report`."""
import calendar
import glob
import json
import os
import re
import signal
import sys
import time

TOKENS, HIDDEN, INNER, STEP_PRODUCTS = 2048, 4096, 14336, 12
WARM_UP = 50


def products_cpu():
    """A step of some hundred microseconds, and what waits for it."""
    n = 12
    a = [[float(i * n + k) for k in range(n)] for i in range(n)]
    return lambda: [[sum(x * y for x, y in zip(row, column)) for column in zip(*a)] for row in a]


def products_gpu(gpu):
    import torch

    torch.cuda.set_device(int(gpu))
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(HIDDEN, INNER, device="cuda", dtype=torch.bfloat16) / 64
    down = torch.randn(INNER, HIDDEN, device="cuda", dtype=torch.bfloat16) / 128

    def step():
        y = x
        for _ in range(STEP_PRODUCTS):
            y = (y @ up) @ down
        torch.cuda.synchronize()
    return step


def load(gpu, path):
    step = products_cpu() if gpu == "cpu" else products_gpu(gpu)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    n = 0
    with open(path, "w") as out:
        while not stop:
            begin = time.time_ns()
            step()
            end = time.time_ns()
            n += 1
            if n > WARM_UP:
                out.write(f"{end} {(end - begin) / 1000:.1f}\n")


def limits(folder):
    """Of the operations in real_size.sh's folder that had a limit: MiB/s."""
    found = {}
    for path in glob.glob(os.path.join(folder, "step-*.json")):
        with open(path) as step, open(path.replace("step-", "op-")) as op:
            found[str(json.load(op)["op"])] = json.load(step).get("limit_mib_s")
    return {op: limit for op, limit in found.items() if limit}


def transfers(path):
    """[begin, end] in ns of what moved bytes in this agent, the bytes, and what it was."""
    limit = limits(os.path.dirname(path.split(",")[0]))
    found = []
    for line in (line for one in path.split(",") for line in open(one, errors="replace")):
        if "event=work " not in line or not re.search(r"work=(WEIGHTS|FILL) ", line):
            continue
        at = re.match(r"time=(\S+)\.(\d+)Z", line)
        op, us, size = (int(re.search(rf" {key}=(\d+)", line).group(1)) for key in ("op", "us", "bytes"))
        end = calendar.timegm(time.strptime(at.group(1), "%Y-%m-%dT%H:%M:%S")) * 10**9 + int(at.group(2)) * 10**6
        kind = ("receiving" if size else "sending") + (f", limit {limit[str(op)]} MiB/s" if str(op) in limit else "")
        if us > 1000:
            found.append((end - us * 1000, end, size, kind))
    return found


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] / 1000 if values else None


def row(gpu, beside, us, moving):
    print(json.dumps({"name": "steps", "gpu": gpu, "beside": beside, "steps": len(us), "median_ms": quantile(us, .5),
                      "p99_ms": quantile(us, .99), "gb": sum(m[2] for m in moving) / 1e9,
                      "seconds": sum(m[1] - m[0] for m in moving) / 1e9}))


def near(step, moving):
    return any(step[0] < m[1] and m[0] < step[1] for m in moving)


def report(files, logs):
    for gpu, (path, log) in enumerate(zip(files, logs)):
        moving = transfers(log)
        steps = [(int(end) - float(us) * 1000, int(end), float(us)) for end, us in map(str.split, open(path))]
        row(gpu, "alone", [s[2] for s in steps if not near(s, moving)], [])
        for kind in sorted({m[3] for m in moving}):
            of = [m for m in moving if m[3] == kind]
            us = [s[2] for s in steps if near(s, of)]
            if us:
                row(gpu, kind, us, of)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "load":
        load(*sys.argv[2:])
    elif len(sys.argv) > 3 and sys.argv[1] == "report" and "--" in sys.argv:
        cut = sys.argv.index("--")
        report(sys.argv[2:cut], sys.argv[cut + 1:])
    else:
        sys.exit(__doc__)
