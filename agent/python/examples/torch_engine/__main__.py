"""An engine in PyTorch: serves a stock transformers MoE model over eep, while ranks come and go.

    PYTHONPATH=agent/python python3 agent/python/examples/torch_engine --socket /run/eep/a0.sock

On the host with gloo, on a GPU with nccl (or gloo: --exchange).  This file: options and logs.  serve.py: the engine's
life; model.py: the model; fp8.py: a layout of its own; batch.py: sequences; frontend.py: requests.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

try:
    import eep
except ImportError:  # run from a source tree or an unpacked bundle
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import eep


def log(event: str, level: str = "info", **words) -> None:
    def quoted(value) -> str:
        text = str(value).replace("\n", " ")
        return text if text and " " not in text and '"' not in text else '"' + text.replace('"', "'") + '"'
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
    pairs = "".join(f" {k}={quoted(v)}" for k, v in words.items())
    print(f"time={stamp} level={level} daemon=torch-engine event={event}{pairs}", file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="torch_engine", description="Serves a mixture-of-experts model over libeep, in PyTorch.")
    p.add_argument("--socket", default=os.environ.get("EEP_SOCKET"), help="the agent's engine socket (default: $EEP_SOCKET)")
    p.add_argument("--listen", default="127.0.0.1:0", help="requests; port 0 = any (default %(default)s)")
    p.add_argument("--advertise", help="host to publish instead of the one listened on")
    p.add_argument("--dispatch", choices=("source", "replicated"), default="source",
                   help="when maps change: rank by rank, or on all ranks between two steps (default %(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the arithmetic; weights stay as they are (default: bfloat16 on a GPU)")
    p.add_argument("--exchange", choices=("auto", "gloo", "nccl"), default="auto", help="the all-to-all (default: nccl on a GPU)")
    p.add_argument("--shared-gpu", action="store_true", help="several ranks use one GPU: each calls itself a host to nccl")
    p.add_argument("--graphs", action="store_true",
                   help="decode by a CUDA graph, captured anew for each group (on the host: the same without a graph)")
    p.add_argument("--max-batch", type=int, default=8, help="sequences at once (default %(default)s)")
    p.add_argument("--prefill", type=int, default=16, help="tokens of one prompt per step (default %(default)s)")
    p.add_argument("--max-length", type=int, default=256, help="tokens of a sequence (default %(default)s)")
    p.add_argument("--kv-bytes", type=int, default=eep.engine.UNPROFILED, 
                   help="for keys and values on this rank; no rank uses more than the least of them (default: all that a batch needs)")
    p.add_argument("--step-ms", type=float, default=0, help="a step takes at least this long, sleeping (default 0)")
    p.add_argument("--busy-us", type=float, default=0, help="a step begins with this much spinning (default 0)")
    p.add_argument("--stall-ms", type=float, default=45000, help="how long a lost peer's revoke is waited for (default %(default)s)")
    p.add_argument("--attach-ms", type=float, default=10000, help="how long to try to attach (default %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="of torch on the host (default %(default)s)")
    p.add_argument("--layout", choices=("loader", "fp8"), default="loader",
                   help="of the weights: the agent's loader's, or experts in fp8 that this engine makes and seals (default %(default)s)")
    p.add_argument("--checkpoint", metavar="DIR", help="with --layout fp8: config.json, and the weights where a cold start comes here")
    p.add_argument("--trace", metavar="FILE", help="write a line for each step: time, step, ranks, tokens, microseconds")
    o = p.parse_args()
    if not o.socket:
        p.error("no engine socket: give --socket or set EEP_SOCKET")
    if o.layout == "fp8" and not (o.checkpoint and os.path.exists(os.path.join(o.checkpoint, "config.json"))):
        p.error("--layout fp8 needs --checkpoint with a folder that has a config.json")
    return o


def main() -> int:
    o = options()
    # Signals go to a thread that waits for them: the stepping thread may be inside libeep or torch.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    # Streams that wait for different peers (the group in use, the next one) must not share a queue of the GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import torch
    torch.set_num_threads(o.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    from serve import Serving
    serving = Serving(o, log)

    def wait_for_signal() -> None:
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        serving.stop()
    threading.Thread(target=wait_for_signal, daemon=True, name="signals").start()
    return serving.run()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # gloo's and nccl's threads have nothing to say any more
