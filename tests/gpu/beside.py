"""Matrix products of a realistic size beside transfers: how long they take, without and with bytes on their way.

    beside.py load GPU FILE             products on that GPU until SIGTERM; a line "end-of-step-ns duration-us" each
    beside.py report FILE... -- LOG...  FILE i against the transfers in LOG i (an agent's): medians and p99

A step is STEP_PRODUCTS products of [TOKENS, HIDDEN] x [HIDDEN, INNER] in bf16 and back, as a decoder's forward pass has them,
waited for as an engine waits at its boundary.  Needs PyTorch with CUDA for `load`, nothing for `report`."""
import calendar
import re
import signal
import sys
import time

TOKENS, HIDDEN, INNER, STEP_PRODUCTS = 2048, 4096, 14336, 12
WARM_UP = 50


def load(gpu, path):
    import torch

    torch.cuda.set_device(int(gpu))
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(HIDDEN, INNER, device="cuda", dtype=torch.bfloat16) / 64
    down = torch.randn(INNER, HIDDEN, device="cuda", dtype=torch.bfloat16) / 128
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    n = 0
    with open(path, "w") as out:
        while not stop:
            begin = time.time_ns()
            y = x
            for _ in range(STEP_PRODUCTS):
                y = (y @ up) @ down
            torch.cuda.synchronize()
            end = time.time_ns()
            n += 1
            if n > WARM_UP:
                out.write(f"{end} {(end - begin) / 1000:.1f}\n")


def transfers(path):
    """[begin, end] in ns of what moved bytes in this agent, and the bytes."""
    found = []
    for line in open(path, errors="replace"):
        if "event=work " not in line or not re.search(r"work=(WEIGHTS|FILL) ", line):
            continue
        at = re.match(r"time=(\S+)\.(\d+)Z", line)
        us, size = (int(re.search(rf" {key}=(\d+)", line).group(1)) for key in ("us", "bytes"))
        end = calendar.timegm(time.strptime(at.group(1), "%Y-%m-%dT%H:%M:%S")) * 10**9 + int(at.group(2)) * 10**6
        if us > 1000:
            found.append((end - us * 1000, end, size))
    return found


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] / 1000 if values else float("nan")


def report(files, logs):
    print(f"{'':12} {'steps':>7} {'median ms':>10} {'p99 ms':>8}   {'beside':>7} {'median ms':>10} {'p99 ms':>8} {'GB':>7} {'s':>6}")
    for gpu, (path, log) in enumerate(zip(files, logs)):
        moving = transfers(log)
        alone, beside = [], []
        for line in open(path):
            end, us = line.split()
            end, us = int(end), float(us)
            begin = end - us * 1000
            near = any(begin < b and a < end for a, b, _ in moving)
            (beside if near else alone).append(us)
        print(f"rank {gpu:<7} {len(alone):7} {quantile(alone, .5):10.2f} {quantile(alone, .99):8.2f}   {len(beside):7} "
              f"{quantile(beside, .5):10.2f} {quantile(beside, .99):8.2f} {sum(m[2] for m in moving) / 1e9:7.1f} "
              f"{sum(m[1] - m[0] for m in moving) / 1e9:6.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "load":
        load(*sys.argv[2:])
    elif len(sys.argv) > 3 and sys.argv[1] == "report" and "--" in sys.argv:
        cut = sys.argv.index("--")
        report(sys.argv[2:cut], sys.argv[cut + 1:])
    else:
        sys.exit(__doc__)
