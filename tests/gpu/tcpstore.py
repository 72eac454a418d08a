#!/usr/bin/env python3
"""PyTorch's own TCPStore client against eep-coordinator: one check a sub-command.

usage: tcpstore.py job BACKEND RANKS HOST PORT    a process group (gloo or nccl) of RANKS processes
       tcpstore.py bench HOST PORT PROGRAM ADDRESS    get, add, check and the polling barrier, against PyTorch's own server:
                                          with its client in Python, and with one in C (bench_tcpstore; ADDRESS: of eep)
Exit status 0: as it should be; 77: PyTorch or its back end is not here.
"""
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

try:
    import torch
    import torch.distributed as dist
except ImportError as e:
    print(f"PyTorch is not here: {e}")
    sys.exit(77)


def connect(host, port, timeout=30):
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))


def polling_barrier(store, rank, size, name):
    """As engines do it: every rank sets a key, and asks for everybody's until all are there."""
    store.set(f"arrival_{name}_{rank}", b"1")
    arrived = set()
    while len(arrived) < size:
        for i in range(size):
            if i not in arrived and store.check([f"arrival_{name}_{i}"]):
                arrived.add(i)


def rank_main(backend, rank, size, host, port):
    if backend == "nccl":  # ranks that share a GPU
        os.environ.setdefault("NCCL_HOSTID", f"rank{rank}")
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = connect(host, port)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    device = "cuda" if backend == "nccl" else "cpu"
    x = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(x)
    assert x[0].item() == size * (size + 1) / 2, x[0].item()
    half = dist.new_group(list(range(size // 2)))
    if rank < size // 2:
        y = torch.ones(1, device=device)
        dist.all_reduce(y, group=half)
        assert y.item() == size // 2
    dist.barrier()
    dist.destroy_process_group()


def check_job(backend, size, host, port):
    if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        print("no GPU, or no NCCL in this PyTorch")
        sys.exit(77)
    begin = time.time()
    ranks = [subprocess.Popen([sys.executable, __file__, "rank", backend, str(i), str(size), host, str(port)])
             for i in range(size)]
    codes = [r.wait(300) for r in ranks]
    assert not any(codes), codes
    print(f"{backend}, {size} ranks: passed in {time.time() - begin:.1f} s")


def rate(calls, stores, seconds=2.0):
    """Calls a second of all the processes that hold these stores."""
    n, end = 0, time.perf_counter() + seconds
    begin = time.perf_counter()
    while time.perf_counter() < end:
        for _ in range(100):
            calls(stores)
        n += 100
    return n / (time.perf_counter() - begin)


def bench_client(host, port, what):
    store = connect(host, port)
    store.set("k", "v" * 100)
    calls = {"get": lambda s: s.get("k"), "add": lambda s: s.add("n", 1), "check": lambda s: s.check(["k"])}
    print(rate(calls[what], store))


def bench_rates(host, port, what, clients):
    procs = [subprocess.Popen([sys.executable, __file__, "bench-client", host, str(port), what],
                              stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    return sum(float(p.communicate()[0]) for p in procs)


def bench_barrier(host, port, size):
    stores = [connect(host, port) for _ in range(size)]
    times = []
    for round_ in range(5):
        begin = time.perf_counter()
        threads = [threading.Thread(target=polling_barrier, args=(s, i, size, f"{port}-{round_}"))
                   for i, s in enumerate(stores)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * 1000


def bench(host, port, program, address):
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if os.access(program, os.X_OK):
        subprocess.run([program, f"{host}:{port}", address, f"127.0.0.1:{own.port}"], check=True)
        print(flush=True)
    else:
        print(f"{program} is not here: only with PyTorch's client")
    print("| calls a second | eep, TCPStore's protocol | PyTorch's own server | ratio |\n|---|---|---|---|")
    for clients in (1, 4):
        for what in ("get", "add", "check"):
            ours = bench_rates(host, port, what, clients)
            theirs = bench_rates("127.0.0.1", own.port, what, clients)
            print(f"| {what}, {clients} client{'s' if clients > 1 else ''} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")
    for size in (8, 32):
        ours, theirs = bench_barrier(host, port, size), bench_barrier("127.0.0.1", own.port, size)
        print(f"| polling barrier of {size} threads, ms | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |")


def main():
    what, args = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if what == "job":
        check_job(args[0], int(args[1]), args[2], int(args[3]))
    elif what == "rank":
        rank_main(args[0], int(args[1]), int(args[2]), args[3], int(args[4]))
    elif what == "bench":
        bench(args[0], int(args[1]), args[2], args[3])
    elif what == "bench-client":
        bench_client(args[0], int(args[1]), args[2])
    else:
        print(__doc__)
        sys.exit(2)


if __name__ == "__main__":
    main()
