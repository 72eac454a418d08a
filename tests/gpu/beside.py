"""Matrix products of a realistic size beside transfers: how long they take, without and with bytes on their way.

    beside.py load GPU FILE             products on that GPU until SIGTERM; a line "end-of-step-ns duration-us" each
    beside.py report FILE... -- LOG...  FILE i against the transfers in LOG i: of an agent, or A,B of all on that GPU

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
    for line in (line for one in path.split(",") for line in open(one, errors="replace")):
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


def row(name, us, moving):
    print(f"{name:28} {len(us):7} {quantile(us, .5):10.2f} {quantile(us, .99):8.2f} {sum(m[2] for m in moving) / 1e9:8.1f} "
          f"{sum(m[1] - m[0] for m in moving) / 1e9:7.2f}")


def report(files, logs):
    print(f"{'':28} {'steps':>7} {'median ms':>10} {'p99 ms':>8} {'GB':>8} {'s':>7}")
    for gpu, (path, log) in enumerate(zip(files, logs)):
        moving = transfers(log)
        kinds = {"sending": [], "receiving": [], "receiving, below 5 GB/s": []}
        for m in moving:
            rate = m[2] / (m[1] - m[0])
            kinds["sending" if m[2] == 0 else "receiving" if rate >= 5 else "receiving, below 5 GB/s"].append(m)
        steps = [(int(end) - float(us) * 1000, int(end), float(us)) for end, us in map(str.split, open(path))]
        near = {k: [us for begin, end, us in steps if any(begin < b and a < end for a, b, _ in of)] for k, of in kinds.items()}
        row(f"rank {gpu}: alone", [us for begin, end, us in steps if not any(begin < b and a < end for a, b, _ in moving)], [])
        for kind, us in near.items():
            if us:
                row(f"rank {gpu}: {kind}", us, kinds[kind])


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "load":
        load(*sys.argv[2:])
    elif len(sys.argv) > 3 and sys.argv[1] == "report" and "--" in sys.argv:
        cut = sys.argv.index("--")
        report(sys.argv[2:cut], sys.argv[cut + 1:])
    else:
        sys.exit(__doc__)
