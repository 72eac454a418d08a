"""PyTorch's own TCPStore client, unmodified, over the coordinator's TCPStore port: every call, by itself and under many
clients, and what is built on it: process groups, rendezvous, torchrun."""
import os
import random
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

try:
    import torch.distributed as dist
except ImportError:
    dist = None

from tcpstore_server import TcpstoreServer

HOST = "127.0.0.1"
MIB = 1 << 20
# Of one rank: joins as its arguments say, sums over all, and over a group of the first two.
RANK = """
import sys
import torch
import torch.distributed as dist
how, host, port, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
if how == "store":
    store = dist.PrefixStore("job", dist.TCPStore(host, port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
elif how == "env":
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=size)
x = torch.full((1000,), float(dist.get_rank() + 1))
dist.all_reduce(x)
assert x[0].item() == dist.get_world_size() * (dist.get_world_size() + 1) / 2, x[0].item()
pair = dist.new_group([0, 1])
if dist.get_rank() < 2:
    y = torch.ones(1)
    dist.all_reduce(y, group=pair)
    assert y.item() == 2
dist.barrier()
dist.destroy_process_group()
"""


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


@unittest.skipUnless(dist and dist.is_available(), "needs PyTorch")
class TcpstoreCase(unittest.TestCase):
    def setUp(self):
        self.server = TcpstoreServer((0, 0))

    def tearDown(self):
        self.assertEqual(self.server.stop(), 0)

    def connect(self, space: int = 0, timeout: float = 30):
        return dist.TCPStore(HOST, self.server.ports[space], is_master=False, timeout=seconds(timeout))

    def in_threads(self, n: int, work) -> list:
        with ThreadPoolExecutor(max_workers=n) as pool:
            return [f.result(120) for f in [pool.submit(work, i) for i in range(n)]]

    def later(self, call, *args) -> None:
        timer = threading.Timer(0.2, call, args)
        timer.start()
        self.addCleanup(timer.join)


class Calls(TcpstoreCase):
    def test_values_are_bytes_of_any_kind(self):
        a, b = self.connect(), self.connect()
        values = {"text": b"value", "empty": b"", "every byte": bytes(range(256)) * 5000, "NUL": b"\0\0", "grün/ключ/鍵": "ü鍵".encode(),
                  "-key": b"7", "a b\tc\n": b" ", "k" * 8000: b"long key"}
        for key, value in values.items():
            a.set(key, value)
        for key, value in values.items():
            self.assertEqual(b.get(key), value)
        a.set("text", "again")
        self.assertEqual(b.get("text"), b"again")
        self.assertEqual(b.num_keys(), len(values))

    def test_a_value_as_long_as_it_may_be_and_one_byte_more(self):
        a, b = self.connect(), self.connect()
        big = random.Random(1).randbytes(8 * MIB)
        a.set("big", big)
        self.assertEqual(b.get("big"), big)
        with self.assertRaises(dist.DistError):
            a.set("big", big + b"x")
            a.get("big")
        self.assertEqual(b.get("big"), big)
        self.assertIn("at most 8388608 are allowed", self.server.log())

    def test_compare_set(self):
        s = self.connect()
        self.assertEqual(s.compare_set("k", "wrong", "x"), b"wrong")  # missing: the expectation comes back
        self.assertFalse(s.check(["k"]))
        self.assertEqual(s.compare_set("k", "", "first"), b"first")
        self.assertEqual(s.compare_set("k", "wrong", "x"), b"first")
        self.assertEqual(s.compare_set("k", "first", "second"), b"second")
        self.assertEqual(s.get("k"), b"second")
        self.assertEqual(s.compare_set("k", "second", ""), b"")
        self.assertEqual(s.compare_set("k", "", "third"), b"third")  # an empty one is met by empty, too

    def test_counters(self):
        a, b = self.connect(), self.connect()
        self.assertEqual(a.add("n", 5), 5)
        self.assertEqual(b.add("n", -12), -7)
        self.assertEqual(a.get("n"), b"-7")
        a.set("n", "41")
        self.assertEqual(b.add("n", 1), 42)
        a.set("n", str(2**63 - 2))
        self.assertEqual(b.add("n", 1), 2**63 - 1)
        with self.assertRaises(dist.DistError):
            b.add("n", 1)  # beyond 64 bits
        self.assertEqual(a.get("n"), str(2**63 - 1).encode())
        a.set("text", "no number")
        c = self.connect()
        with self.assertRaises(dist.DistError):
            c.add("text", 1)
        self.assertEqual(a.get("text"), b"no number")

    def test_append_and_many_at_once(self):
        a, b = self.connect(), self.connect()
        a.append("new", "ab")
        b.append("new", "cd")
        self.assertEqual(a.get("new"), b"abcd")
        keys = [f"m{i}" for i in range(3000)]
        a.multi_set(keys, [f"value {i}" for i in range(3000)])
        self.assertEqual(b.multi_get(keys), [f"value {i}".encode() for i in range(3000)])
        self.assertEqual(b.multi_get(["m1", "new", "m1"]), [b"value 1", b"abcd", b"value 1"])
        self.later(a.set, "late", "1")
        self.assertEqual(b.multi_get(["m0", "late"]), [b"value 0", b"1"])  # it waits for what is missing
        self.assertEqual(a.num_keys(), 3002)

    def test_check_delete_and_count(self):
        a, b = self.connect(), self.connect()
        self.assertEqual(a.num_keys(), 0)
        a.multi_set(["x", "y"], ["1", "2"])
        self.assertTrue(b.check(["x", "y"]))
        self.assertTrue(b.check([]))
        self.assertFalse(b.check(["x", "none"]))
        self.assertTrue(b.delete_key("x"))
        self.assertFalse(a.delete_key("x"))
        self.assertFalse(a.check(["x"]))
        self.assertEqual(a.num_keys(), 1)
        dist.TCPStore(HOST, self.server.port, 4, False)  # announces itself
        self.assertEqual(a.num_keys(), 2)

    def test_list_keys(self):
        s = self.connect()
        if not hasattr(s, "list_keys"):
            self.skipTest("this PyTorch has no list_keys")
        s.multi_set(["b", "a/c", "ü"], ["", "1", "2"])
        self.assertEqual(sorted(s.list_keys()), ["a/c", "b", "ü"])

    def test_another_port_is_another_namespace(self):
        a, b = self.connect(0), self.connect(1)
        a.set("k", "a")
        b.set("k", "b")
        self.assertEqual(a.get("k"), b"a")
        self.assertTrue(b.delete_key("k"))
        self.assertTrue(a.check(["k"]))
        self.assertIn("tcpstore/space0//k", self.server.ctl("kv", "list", "tcpstore/"))

    def test_prefixes_in_prefixes(self):
        s = self.connect()
        outer = dist.PrefixStore("outer", s)
        inner = dist.PrefixStore("inner", outer)
        inner.set("k", "v")
        self.assertEqual(s.get("outer/inner/k"), b"v")
        self.assertEqual(inner.add("n", 2), 2)
        self.assertEqual(outer.get("inner/n"), b"2")
        inner.multi_set(["x", "y"], ["1", "2"])
        self.assertEqual(outer.multi_get(["inner/y", "inner/x"]), [b"2", b"1"])
        inner.append("x", "1")
        inner.wait(["x", "y", "k"], seconds(1))
        self.assertEqual(inner.compare_set("x", "11", "z"), b"z")
        self.assertTrue(inner.delete_key("x"))
        self.assertFalse(s.check(["outer/inner/x"]))

    def test_clones_and_who_comes_back(self):
        a = self.connect()
        a.set("k", "v")
        b = a.clone() if hasattr(a, "clone") else self.connect()
        del a
        time.sleep(0.6)  # longer than the grace time: the clone keeps the namespace
        self.assertEqual(b.get("k"), b"v")
        del b
        c = self.connect()  # within the grace time
        self.assertTrue(c.check(["k"]))
        del c
        time.sleep(1)
        self.assertEqual(self.connect().num_keys(), 0)

    @unittest.skipUnless(dist and hasattr(dist.TCPStore, "queue_push"), "this PyTorch has no queues")
    def test_queues(self):
        a, b = self.connect(), self.connect()
        self.assertEqual(a.queue_len("q"), 0)
        with self.assertRaisesRegex(dist.QueueEmptyError, "empty"):
            a.queue_pop("q", block=False)
        for i in range(3):
            a.queue_push("q", str(i))
        self.assertTrue(b.check(["q"]))
        b.wait(["q"], seconds(1))
        self.assertEqual(b.queue_len("q"), 3)
        self.assertEqual([b.queue_pop("q") for _ in range(3)], [b"0", b"1", b"2"])
        self.assertFalse(a.check(["q"]))
        self.assertEqual(a.num_keys(), 0)
        self.later(a.queue_push, "q", bytes(range(256)))
        self.assertEqual(b.queue_pop("q"), bytes(range(256)))
        b.set_timeout(seconds(0.2))
        with self.assertRaisesRegex(dist.DistStoreError, "timeout"):
            b.queue_pop("q")
        a.queue_push("q", "after")
        self.assertEqual(b.queue_pop("q"), b"after")

    @unittest.skipUnless(dist and hasattr(dist.TCPStore, "barrier"), "this PyTorch has no barrier")
    def test_barriers(self):
        stores = [self.connect() for _ in range(8)]
        order = []

        def arrive(i):
            if i == 0:
                time.sleep(0.3)
                order.append("last")
            stores[i].barrier("b", 8, seconds(20))
            order.append("released")

        self.in_threads(8, arrive)
        self.assertEqual(order[0], "last")
        with self.assertRaisesRegex(dist.DistStoreError, "timeout|timed out"):
            stores[0].barrier("lonely", 2, seconds(0.2))
        stores[0].set("k", "v")  # the connection is as it was
        self.assertEqual(stores[1].get("k"), b"v")


class Waits(TcpstoreCase):
    def test_each_call_has_its_own_time(self):
        s = self.connect()
        self.assertEqual(s.timeout, seconds(30))
        for timeout, call in ((0.2, lambda: s.wait(["never"], seconds(0.2))), (0.3, lambda: s.get("never")),
                              (0.3, lambda: s.wait(["never"])), (0.3, lambda: s.multi_get(["never"]))):
            if timeout == 0.3:
                s.set_timeout(seconds(0.3))
            begin = time.monotonic()
            with self.assertRaisesRegex(dist.DistStoreError, f"timeout after {int(timeout * 1000)}ms.*never"):
                call()
            self.assertGreaterEqual(time.monotonic() - begin, timeout - 0.02)
        s.set("k", "v")  # the connection is as it was, four cancelled waits later
        self.assertEqual(s.get("k"), b"v")

    def test_a_wait_for_several_ends_with_the_last(self):
        a, b = self.connect(), self.connect()
        a.set("x", "1")

        def set_rest():
            b.set("y", "1")
            time.sleep(0.2)
            b.set("z", "1")

        begin = time.monotonic()
        self.later(set_rest)
        a.wait(["x", "y", "z"], seconds(20))
        self.assertGreaterEqual(time.monotonic() - begin, 0.35)
        with self.assertRaisesRegex(dist.DistStoreError, "timeout"):
            a.wait(["x", "none", "z"], seconds(0.2))

    def test_one_that_dies_while_it_waits_harms_nobody(self):
        code = ("import sys, torch.distributed as dist\n"
                "s = dist.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=False)\n"
                "s.set('here', '1')\ns.get('never')\n")
        child = subprocess.Popen([sys.executable, "-c", code, str(self.server.port)], stderr=subprocess.DEVNULL)
        s = self.connect(timeout=60)
        s.wait(["here"])
        child.kill()
        child.wait()
        s.set("never", "1")
        self.assertEqual(self.connect().get("never"), b"1")

    def test_all_wake_at_once(self):
        stores = [self.connect() for _ in range(48)]
        self.later(stores[0].set, "go", "1")
        self.assertEqual(self.in_threads(47, lambda i: stores[i + 1].get("go")), [b"1"] * 47)


class ManyClients(TcpstoreCase):
    CLIENTS, ROUNDS = 32, 40

    def setUp(self):
        super().setUp()
        self.keeper = self.connect()  # PyTorch's client may take seconds to connect, longer than the grace time

    def test_additions_and_swaps_are_atomic(self):
        def work(i):
            s, swapped = self.connect(), 0
            results = [s.add("sum", 1) for _ in range(self.ROUNDS)]
            while swapped < 5:
                before = s.get("swaps") if s.check(["swaps"]) else b""
                after = f"{i}-{swapped}-{before.count(b';')};".encode() + before
                swapped += s.compare_set("swaps", before, after) == after
            s.append("appended", f"{i};")
            return results

        results = [r for each in self.in_threads(self.CLIENTS, work) for r in each]
        self.assertEqual(sorted(results), list(range(1, self.CLIENTS * self.ROUNDS + 1)))
        self.assertEqual(self.keeper.get("swaps").count(b";"), 5 * self.CLIENTS)
        self.assertEqual(sorted(self.keeper.get("appended").split(b";")[:-1]), sorted(str(i).encode() for i in range(self.CLIENTS)))

    @unittest.skipUnless(dist and hasattr(dist.TCPStore, "queue_push"), "this PyTorch has no queues")
    def test_a_value_goes_to_one_taker(self):
        def work(i):
            s = self.connect()
            if i % 2 == 0:
                for k in range(self.ROUNDS):
                    s.queue_push("q", f"{i}-{k}")
                return []
            return [s.queue_pop("q") for _ in range(self.ROUNDS)]

        taken = [v for each in self.in_threads(self.CLIENTS, work) for v in each]
        self.assertEqual(sorted(taken), sorted(f"{i}-{k}".encode() for i in range(0, self.CLIENTS, 2) for k in range(self.ROUNDS)))

    def test_polling_barriers_one_after_another(self):
        """As engines do it: every rank sets a key of its own, and asks for everybody's until all are there."""
        def work(i):
            s = self.connect()
            for r in range(3):
                s.set(f"arrival/{r}/{i}", b"1")
                missing = set(range(self.CLIENTS))
                while missing:
                    missing -= {k for k in missing if s.check([f"arrival/{r}/{k}"])}
            return True

        self.assertTrue(all(self.in_threads(self.CLIENTS, work)))

    def test_connections_that_come_and_go(self):
        self.keeper.set("k", "v")
        for _ in range(300):
            self.assertEqual(self.connect().get("k"), b"v")
        self.assertEqual(self.keeper.num_keys(), 1)


class Jobs(TcpstoreCase):
    SIZE = 3

    def run_ranks(self, how: str, **env: str) -> None:
        port = str(self.server.port)
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, how, HOST, port, str(i), str(self.SIZE)], stderr=subprocess.PIPE,
                                  text=True, env=dict(os.environ, RANK=str(i), WORLD_SIZE=str(self.SIZE), MASTER_ADDR=HOST,
                                                      MASTER_PORT=port, **env)) for i in range(self.SIZE)]
        for rank in ranks:
            text = rank.communicate(timeout=120)[1]
            self.assertEqual(rank.returncode, 0, text)

    def test_the_same_job_twice(self):
        self.run_ranks("store")
        time.sleep(1)  # longer than the grace time
        self.assertEqual(self.server.ctl("kv", "list", "tcpstore/").count("\n"), 1)  # its title alone
        self.run_ranks("store")

    def test_rendezvous_by_the_environment(self):
        self.run_ranks("env", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")

    def test_rendezvous_by_an_address(self):
        self.run_ranks("tcp", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")

    def test_torchrun(self):
        """torchrun's rendezvous, and its workers, over our store: no server of PyTorch's anywhere."""
        script = self.server.dir / "rank.py"
        script.write_text(RANK)
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"{HOST}:{self.server.port}", "--rdzv-conf", "is_host=0", "--rdzv-id", "job", str(script), "env",
             HOST, "0", "0", "0"], capture_output=True, text=True, timeout=180)
        self.assertEqual(run.returncode, 0, run.stderr[-3000:])


if __name__ == "__main__":
    unittest.main()
