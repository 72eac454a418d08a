"""torch over the agent's memory, groups for views, and the example engine's model: logits against the reference's."""
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

from cluster import BIN, MIXTRAL, PYTHON, QWEN3, Cluster
from engines import Small

import eep

try:
    import torch
    from eep.distributed import Groups, Peers, word
except ImportError:
    torch = None
try:
    import transformers
except ImportError:
    transformers = None

sys.path.insert(0, str(PYTHON / "examples/torch_engine"))


@unittest.skipUnless(torch, "torch is not here")
class Tensors(unittest.TestCase):
    def test_views_of_the_agents_memory(self):
        with Cluster() as c, Small(c) as s:
            self.assertEqual(c.ctl("scale", "--to", "1").returncode, 0)
            norm = s.engine.tensor("model.norm.weight")
            t = norm.torch()
            self.assertEqual((t.dtype, t.data_ptr(), tuple(t.shape)), (torch.bfloat16, norm.address, (128,)))
            w13 = s.engine.tensor("layers.1.experts.w13")
            t = w13.torch()
            self.assertEqual((t.data_ptr(), t.stride()[0] * 2), (w13.address, w13.stride))
            load = s.engine.maps.load
            counters = load.torch(torch.int64)
            counters[2] += 5
            self.assertEqual(load.torch(torch.int64)[2].tolist(), [5] * s.engine.maps.slots)
            self.assertEqual(counters.data_ptr(), load.address)
            del t, counters

    def test_slots_apart(self):
        backing = torch.arange(24, dtype=torch.int32)
        a = eep.Array(backing.data_ptr(), -1, "I32", (3, 2, 2), 8 * 4, owner=backing)
        self.assertEqual(a.torch().tolist(), [[[8 * i, 8 * i + 1], [8 * i + 2, 8 * i + 3]] for i in range(3)])


@unittest.skipUnless(torch, "torch is not here")
class Meeting(unittest.TestCase):
    """Groups of threads in one process, which meet in the first one's store."""

    def _all(self, n, body):
        groups = [Groups(timeout=20) for _ in range(n)]
        ids, stores = tuple(g.id for g in groups), tuple(word(g.endpoint, "store") for g in groups)
        results, errors = [None] * n, []

        def main(r):
            try:
                results[r] = body(r, groups[r]._make(Peers(ids, r, stores), "test"))
            except Exception as e:
                errors.append(e)
        threads = [threading.Thread(target=main, args=(r,)) for r in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        self.assertEqual(errors, [])
        return results

    def test_exchanges(self):
        def body(r, group):
            x = torch.full((2, 3), float(r), dtype=torch.bfloat16)
            sent = torch.tensor([[10 * r + to] for to in range(group.size)], dtype=torch.int32)
            total = torch.full((1,), r + 1)
            torch.distributed.all_reduce(total, group=group.process_group)
            return group.all_gather(x), group.all_to_all(sent), group.all_reduce_max([r, -r]), total.item()
        for r, (gathered, received, most, total) in enumerate(self._all(3, body)):
            self.assertEqual(gathered[:, 0, 0].tolist(), [0, 1, 2])
            self.assertEqual(received.flatten().tolist(), [r, 10 + r, 20 + r])
            self.assertEqual((most, total), ([2, 0], 6))

    def test_a_peer_that_goes(self):
        gone = threading.Barrier(2)

        def body(r, group):
            if r == 1:
                group.close()
                del group
                gone.wait()
                return None
            gone.wait()
            with self.assertRaises(eep.PeerLost):
                group.all_gather(torch.zeros(1))
            return True
        self.assertEqual(self._all(2, body)[0], True)

    def test_words(self):
        self.assertEqual(word("request=1.2.3.4:5 id=ab store=h:6", "store"), "h:6")
        self.assertEqual(word("idle", "id"), "")


@unittest.skipUnless(torch and transformers, "torch and transformers are not here")
class Logits(unittest.TestCase):
    """The stock model over the agent's memory, on one rank."""

    def _compare(self, folder):
        from safetensors.torch import load_file

        from model import Runner
        reference = load_file(folder / "reference.safetensors")
        with Cluster(checkpoint=folder) as c, Small(c) as s:
            self.assertEqual(c.ctl("scale", "--to", "1").returncode, 0)
            groups = Groups()
            runner = Runner(s.engine, rows=2, chunk=16, length=128, dtype=torch.float32)
            runner.view(groups._make(Peers((groups.id,), 0, ("",)), "alone"), 0)
            for row in range(2):
                self.assertTrue(runner.cache.reserve(row, 128))
            before = runner.dispatch.load.sum().item()
            for row, prompt in enumerate(reference["input_ids"][:2].tolist()):
                logits = runner.prefill(row, 0, prompt, every=True)
                torch.testing.assert_close(logits, reference["logits"][row], rtol=0, atol=2e-5)
            top_k = runner.model.config.num_experts_per_tok
            self.assertEqual(runner.dispatch.load.sum().item() - before, 2 * 16 * top_k * runner.model.config.num_hidden_layers)
            tokens = [[int(reference["greedy_tokens"][row][0])] for row in range(2)]
            for position in range(16, 24):
                logits = runner.decode({row: (position, tokens[row][-1]) for row in range(2)})
                for row in range(2):
                    tokens[row].append(int(logits[row].argmax()))
            self.assertEqual(tokens, reference["greedy_tokens"][:2, :9].tolist())
            embed = s.engine.tensor("model.embed_tokens.weight")
            self.assertEqual(runner.model.model.embed_tokens.weight.data_ptr(), embed.address)
            runner = None

    def test_masked(self):
        """Weights of experts that are not in the map go to the others that a token chose."""
        from model import Experts
        weights = torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.5, 0.5]])
        physical = torch.tensor([[3, 4], [-1, 7], [-1, -1]])
        got = Experts.without_masked(physical, weights)
        torch.testing.assert_close(got, torch.tensor([[0.5, 0.25], [0, 0.875], [0, 0]]), rtol=0, atol=0)
        whole = torch.rand(64, 8)
        self.assertTrue(torch.equal(Experts.without_masked(torch.zeros(64, 8, dtype=torch.int64), whole), whole))

    def test_qwen3_moe(self):
        self._compare(QWEN3)

    def test_mixtral(self):
        self._compare(MIXTRAL)


class _Client:
    closed = False

    def __init__(self):
        self.said = []

    def say(self, words):
        self.said.append(words)


@unittest.skipUnless(torch and transformers, "torch and transformers are not here")
class KvCache(unittest.TestCase):
    def _batch(self, pages, rows=4):
        import queue
        import types

        from batch import Batch
        from model import PAGE, Cache
        config = transformers.AutoConfig.from_pretrained(QWEN3)
        page = config.num_hidden_layers * config.num_key_value_heads * PAGE * 2 * config.head_dim * 4
        frontend = types.SimpleNamespace(requests=queue.SimpleQueue(), flush=lambda: None)
        batch = Batch(frontend, rows, 16)
        batch.cache = Cache(config, rows, 128, (pages + 1) * page, torch.float32, torch.device("cpu"))
        return batch, frontend, page

    def _ask(self, frontend, id, tokens):
        from frontend import Request
        r = Request(_Client(), id, [1] * 4, tokens - 4)
        frontend.requests.put(r)
        return r

    def test_requests_wait_for_pages_in_order(self):
        batch, frontend, page = self._batch(pages=8)
        self.assertEqual(sum(t.nbytes for pair in batch.cache._layers for t in pair), 9 * page)
        for id, tokens in (("a", 64), ("b", 64), ("c", 64), ("d", 16)):
            self._ask(frontend, id, tokens)
        batch.admit(128, 512)
        self.assertEqual([s.request.id for s in batch.sequences], ["a", "b"])
        self.assertTrue(batch.plan().more)
        batch._end(batch.sequences[0])
        batch.admit(128, 512)
        self.assertEqual([s.request.id for s in batch.sequences], ["b", "c"])  # d is smaller, but came later
        waiting = batch.waiting
        batch.hand_back("leaving")
        self.assertEqual(waiting.client.said, [{"id": "d", "refused": "leaving"}])
        self.assertEqual((len(batch.cache._free), batch.cache.most), (8, 8))

    def test_the_agreed_size_counts(self):
        batch, frontend, page = self._batch(pages=8)
        batch.cache.agree(5 * page)  # four pages, and the one for what is not real
        a, b = self._ask(frontend, "a", 64), self._ask(frontend, "b", 80)
        batch.admit(128, 512)
        self.assertEqual([s.request.id for s in batch.sequences], ["a"])
        batch._end(batch.sequences[0])
        batch.admit(128, 512)
        self.assertEqual(b.client.said, [{"id": "b", "refused": "too long for the KV cache"}])
        batch.cache.agree(eep.engine.UNPROFILED)
        self.assertEqual(batch.cache.usable, 8)

    def test_too_small(self):
        with self.assertRaisesRegex(ValueError, "hold no page of 16 tokens"):
            self._batch(pages=0)

    def test_two_ranks_use_what_the_smaller_has(self):
        """16 requests of 5 pages each, 8 at once would be let in by rows; the smaller rank has room for two."""
        import re
        example = PYTHON / "examples/torch_engine"
        page = 4 * 2 * 16 * 64 * 4
        with Cluster(agents=2) as c:
            for i, pages in enumerate((40, 13)):
                with open(c.dir / f"engine-{i}.log", "ab") as log:
                    c.processes.append(subprocess.Popen(
                        [sys.executable, str(example), "--socket", c.socket(i), "--attach-ms", "60000", "--kv-bytes", str(pages * page)],
                        stderr=log, env={**os.environ, "PYTHONPATH": str(PYTHON)}))
            c._wait(lambda: c.engines() == 2, 120)
            self.assertEqual(c.ctl("scale", "--to", "2").returncode, 0, c.logs())
            load = subprocess.run([sys.executable, str(example / "load.py"), "--ctl", f"{BIN / 'eepctl'} -c {c.address}", "--requests", "16",
                                   "--concurrency", "16", "--max-tokens", "40", "--limit", "120", "--csv", f"{c.dir}/a.csv", "--tokens",
                                   f"{c.dir}/a.json"], capture_output=True, text=True)
            self.assertEqual(load.returncode, 0, load.stdout + load.stderr + c.logs())
            for p in c.processes[-2:]:
                p.terminate()
                p.wait(20)
            for i in range(2):
                said = (c.dir / f"engine-{i}.log").read_text()
                self.assertEqual(set(re.findall("kv_pages=([0-9]+)", said)), {"12"}, said)
                self.assertEqual(max(map(int, re.findall("kv_pages_max=([0-9]+)", said))), 10, said)


@unittest.skipUnless(torch and transformers, "torch and transformers are not here")
class Graphs(unittest.TestCase):
    """Decoding as with CUDA graphs, which on the host are rehearsed but not captured: made by all ranks while a view is
    prepared and steps go on, and still right when maps change under them."""

    def test_demo(self):
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "demo.log")
            env = {**os.environ, "EEP_BIN": str(BIN), "TERM": "dumb",
                   "EEP_ENGINE": f"{sys.executable} {PYTHON / 'examples/torch_engine'} --graphs 2>>{trace}"}
            done = subprocess.run([str(BIN / "tests/eep-demo"), "--model", str(QWEN3), "--sequence", "2,3,2", "--settle-ms", "500",
                                   "--concurrency", "6", "--step-ms", "5"], env=env, capture_output=True, text=True, timeout=300)
            said = trace.read_text() if trace.exists() else ""
            self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr[-2000:] + said[-2000:])
            self.assertIn("good: ", done.stdout)
            for ranks in (2, 3):
                self.assertRegex(said, f"event=prepared ranks={ranks} graph=True")
            self.assertRegex(said, "event=map ")


@unittest.skipUnless(torch and transformers, "torch and transformers are not here")
class Fp8(unittest.TestCase):
    """An engine quantises what it loads and seals it; others, which see no weights, get the bytes.  Tokens are those of the
    same quantised model on one rank."""

    def test_quantised(self):
        import fp8
        w = torch.randn(3, 8, 32).bfloat16()
        q, scale = fp8.quantise(w)
        self.assertEqual((q.dtype, tuple(scale.shape)), (torch.float8_e4m3fn, (3, 8)))
        torch.testing.assert_close(fp8.weight(q, scale, torch.float32), w.float(), rtol=1 / 16, atol=1e-2)
        for e in range(3):  # of that expert alone
            alone = fp8.quantise(w[e])
            self.assertTrue(torch.equal(alone[0].view(torch.uint8), q[e].view(torch.uint8)) and torch.equal(alone[1], scale[e]))

    def test_sealed_and_scaled(self):
        example = PYTHON / "examples/torch_engine"
        with tempfile.TemporaryDirectory() as bare, Cluster(agents=3, checkpoint=None, coordinator=("--slots", "16")) as c:
            Path(bare, "config.json").write_text((QWEN3 / "config.json").read_text())

            def engine(i, folder):
                with open(c.dir / f"engine-{i}.log", "ab") as log:
                    c.processes.append(subprocess.Popen(
                        [sys.executable, str(example), "--socket", c.socket(i), "--attach-ms", "60000", "--layout", "fp8",
                         "--checkpoint", str(folder)], stderr=log, env={**os.environ, "PYTHONPATH": str(PYTHON)}))

            def load(name, *more):
                return subprocess.Popen([sys.executable, str(example / "load.py"), "--ctl", f"{BIN / 'eepctl'} -c {c.address}",
                                         "--requests", "24", "--concurrency", "6", "--max-tokens", "40", "--limit", "120", "--csv",
                                         f"{c.dir}/{name}.csv", "--tokens", f"{c.dir}/{name}.json", *more], stdout=subprocess.PIPE, text=True)
            engine(0, QWEN3)
            c._wait(lambda: c.engines() == 1, 120)
            done = c.ctl("scale", "--to", "1")
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr + c.logs())
            for i in (1, 2):
                engine(i, bare)
            c._wait(lambda: c.engines() == 3, 120)
            quiet = load("quiet")
            said = quiet.communicate(timeout=150)[0]
            self.assertEqual(quiet.returncode, 0, said + c.logs())
            busy = load("busy", "--compare", f"{c.dir}/quiet.json")
            for n in (3, 2):
                time.sleep(0.5)
                done = c.ctl("scale", "--to", str(n))
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr + c.logs())
            said = busy.communicate(timeout=150)[0]
            self.assertEqual(busy.returncode, 0, said + c.logs())
            self.assertEqual(c.ctl("verify").returncode, 0)
            self.assertIn("event=sealed layout=torch-fp8-e4m3-channel-1 experts=64", (c.dir / "engine-0.log").read_text())
            for i in (1, 2):
                said = (c.dir / f"engine-{i}.log").read_text()
                self.assertIn("event=bound producer=torch-fp8-e4m3-channel-1", said)
                self.assertNotIn("event=sealed", said)

    def test_without_a_config(self):
        done = subprocess.run([sys.executable, str(PYTHON / "examples/torch_engine"), "--socket", "x", "--layout", "fp8"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("--layout fp8 needs --checkpoint", done.stderr)


@unittest.skipUnless(torch and transformers, "torch and transformers are not here")
class Death(unittest.TestCase):
    """An engine of two is killed under load and started again: every request completes, with the tokens of a quiet run."""

    def test_killed_under_load(self):
        example = PYTHON / "examples/torch_engine"

        def engine(c, i):
            log = open(c.dir / f"engine-{i}.log", "ab")
            p = subprocess.Popen([sys.executable, str(example), "--socket", c.socket(i), "--attach-ms", "60000"], stderr=log,
                                 env={**os.environ, "PYTHONPATH": str(PYTHON)})
            log.close()
            c.processes.append(p)
            return p

        def load(c, name, *more):
            return subprocess.Popen([sys.executable, str(example / "load.py"), "--ctl", f"{BIN / 'eepctl'} -c {c.address}",
                                     "--requests", "16", "--concurrency", "8", "--max-tokens", "40", "--limit", "120", "--csv", f"{c.dir}/{name}.csv",
                                     "--tokens", f"{c.dir}/{name}.json", *more], stdout=subprocess.PIPE, text=True)
        with Cluster(agents=2) as c:
            engines = [engine(c, i) for i in range(2)]
            c._wait(lambda: c.engines() == 2, 120)
            done = c.ctl("scale", "--to", "2")
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            quiet = load(c, "quiet")
            self.assertEqual((quiet.wait(150), quiet.communicate()[0])[0], 0, c.logs())
            busy = load(c, "busy", "--compare", f"{c.dir}/quiet.json")
            time.sleep(2)
            engines[1].kill()
            engine(c, 1)
            said = busy.communicate(timeout=180)[0]
            self.assertEqual(busy.returncode, 0, said + c.logs())
            self.assertIn("event=step-failed", (c.dir / "engine-0.log").read_text())


@unittest.skipUnless(torch and transformers, "torch and transformers are not here")
class DeepSeek(unittest.TestCase):
    """A tiny DeepSeek-V3, random by a seed: what stock transformers computes of it, and the demo with all its ranks."""

    def test_demo(self):
        from deepseek import write
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            env = {**os.environ, "EEP_BIN": str(BIN), "TERM": "dumb",
                   "EEP_ENGINE": f"{sys.executable} {PYTHON / 'examples/torch_engine'} --dtype float32"}
            done = subprocess.run([str(BIN / "tests/eep-demo"), "--model", folder, "--sequence", "2,3,2", "--settle-ms", "500",
                                   "--concurrency", "6"], env=env, capture_output=True, text=True, timeout=300)
            self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr[-2000:])
            self.assertIn("good: ", done.stdout)


if __name__ == "__main__":
    unittest.main()
