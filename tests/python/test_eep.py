"""The package against a real coordinator and agent, on host memory: attach, events, tensors, maps, steps, sealing."""
import threading
import time
import unittest

from cluster import QWEN3, Cluster
from engines import Small

import eep
from eep.memory import Array

try:
    import numpy
except ImportError:
    numpy = None


def until(what, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(what())


class Attaching(unittest.TestCase):
    def test_no_agent(self):
        with self.assertRaises(eep.EepError) as e:
            eep.attach("/nonexistent/agent.sock", endpoint="x")
        self.assertIn("/nonexistent/agent.sock", str(e.exception))
        self.assertLess(e.exception.code, 0)

    def test_detached_twice_and_used_after(self):
        with Cluster() as c:
            engine = eep.attach(c.socket(0), endpoint="x")
            self.assertEqual(engine.device, -1)
            self.assertIsNone(engine.maps)
            engine.detach()
            engine.detach()
            with self.assertRaises(eep.EepError):
                engine.drained()

    def test_a_callback_that_fails_does_not_end_the_engine(self):
        def broken(engine, event):
            raise ValueError("a mistake in the callback, printed by this test")
        with Cluster() as c, eep.attach(c.socket(0), endpoint="x", on_event=broken) as engine:
            scale = c.ctl_start("scale", "--to", "1", "--timeout", "2")  # REGIONS and PREPARE come; nobody answers
            self.assertTrue(until(lambda: engine.maps is not None))
            scale.communicate()
            self.assertEqual(engine.model.layers, 4)


class Serving(unittest.TestCase):
    """One cluster for all: 1 rank, then 2, then 1."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(agents=2)

        def body(engine, step):
            maps = engine.maps
            if numpy:
                maps.load.numpy()[0, 0] += 7
            return True
        cls.engines = [Small(cls.cluster, i, body) for i in range(2)]
        cls.engines[0].has_work = True
        until(lambda: cls.cluster.engines() == 2)
        done = cls.cluster.ctl("scale", "--to", "1")
        assert done.returncode == 0, done.stdout + done.stderr + cls.cluster.logs()
        cls.first = next(e for e in cls.engines if e.regions.is_set())

    @classmethod
    def tearDownClass(cls):
        for e in cls.engines:
            e.__exit__()
        cls.cluster.__exit__()

    def test_1_model_and_config(self):
        model = self.first.engine.model
        self.assertEqual((model.layers, model.logical, model.device, model.producer), (4, 16, -1, "loader"))
        self.assertIn('"qwen3_moe"', model.config)

    def test_2_names(self):
        with self.assertRaises(KeyError) as e:
            self.first.engine.tensor("no.such.tensor")
        self.assertIn("no.such.tensor", str(e.exception))
        norm = self.first.engine.tensor("model.norm.weight")
        self.assertEqual((norm.dtype, norm.shape, norm.device, norm.stride), ("BF16", (128,), -1, 0))

    @unittest.skipUnless(numpy, "numpy is not here")
    def test_3_weights_without_a_copy_by_numpy(self):
        from plain import load
        engine = self.first.engine
        checkpoint = load(QWEN3 / "model.safetensors")
        norm = engine.tensor("model.norm.weight")
        self.assertEqual(norm.numpy().__array_interface__["data"][0], norm.address)
        numpy.testing.assert_array_equal(norm.numpy(), checkpoint["model.norm.weight"])
        w13, maps = engine.tensor("layers.2.experts.w13"), engine.maps
        self.assertEqual(w13.numpy().__array_interface__["data"][0], w13.address)
        found = set()
        rank, n = self.first.views[-1][1:]
        for slot in range(maps.slots):
            expert = int(maps.physical_to_logical.numpy()[2, rank * maps.slots + slot])
            if expert < 0:
                continue
            found.add(expert)
            name = f"model.layers.2.mlp.experts.{expert}."
            numpy.testing.assert_array_equal(w13.numpy()[slot], numpy.concatenate(
                [checkpoint[name + "gate_proj.weight"], checkpoint[name + "up_proj.weight"]]))
        if n == 1:
            self.assertEqual(found, set(range(16)))

    @unittest.skipUnless(numpy, "numpy is not here")
    def test_4_maps_agree(self):
        maps = self.first.engine.maps
        self.assertIs(maps.on_device, maps)
        p2l, l2p, count = maps.physical_to_logical.numpy(), maps.logical_to_physical.numpy(), maps.replica_count.numpy()
        self.assertEqual(l2p.shape, (4, 16, maps.max_replicas))
        self.assertTrue((count >= 1).all())
        for layer in range(4):
            for expert in range(16):
                for r in range(count[layer, expert]):
                    self.assertEqual(p2l[layer, l2p[layer, expert, r]], expert)
        self.assertGreaterEqual(maps.version, 1)

    @unittest.skipUnless(numpy, "numpy is not here")
    def test_5_load_counters_are_the_agents(self):
        load = self.first.engine.maps.load.numpy()
        before = int(load[0, 0])
        self.assertTrue(until(lambda: int(load[0, 0]) > before))
        self.assertEqual(load.dtype, numpy.uint64)
        self.assertEqual(int(load[1].sum()), 0)

    def test_6_views_come_and_go(self):
        c, (a, b) = self.cluster, self.engines
        done = c.ctl("scale", "--to", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(until(lambda: a.views and b.views and a.views[-1][2] == 2 and b.views[-1][2] == 2))
        self.assertEqual({a.views[-1][1], b.views[-1][1]}, {0, 1})
        self.assertIn(eep.EventKind.PREPARE, a.seen)
        self.assertEqual(c.ctl("verify").returncode, 0)
        done = c.ctl("scale", "--to", "1", "--remove", "gpu0")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(until(lambda: eep.EventKind.RELEASE in a.seen))
        self.assertIn(eep.StepResult.LEFT, a.results)
        stats = b.engine.stats()
        self.assertGreater(stats.steps, 0)
        self.assertGreaterEqual(stats.flips, 1)
        self.assertEqual(len(stats.hold_histogram), 40)
        type(self).first = b

    def test_7_a_step_that_is_not_revoked_is_not_failed(self):
        engine = self.first.engine
        self.assertFalse(engine.revoked)
        began = time.monotonic()
        self.assertFalse(engine.wait_revoked(0.1))
        self.assertLess(time.monotonic() - began, 5)


class Steps(unittest.TestCase):
    def test_what_an_exception_does(self):
        """PeerLost without a revoke, and any other exception, go on to the caller; the step may be ended after that."""
        raised = []

        def body(engine, step):
            error = (eep.PeerLost("a peer"), ValueError("a mistake"))[len(raised) % 2]
            raised.append(error)
            raise error
        with Cluster() as c, eep.attach(c.socket(0), endpoint="x") as engine:
            scale = c.ctl_start("scale", "--to", "1")
            regions = False
            while scale.poll() is None or len(raised) < 2:
                for event in engine.events(0 if regions else 0.1):
                    regions |= event.kind == eep.EventKind.REGIONS
                    if event.kind == eep.EventKind.PREPARE:
                        engine.prepared(event.op, event.attempt)
                if not regions:
                    continue
                try:
                    with engine.step(has_work=True, timeout=0.1, peer_timeout=0.05) as step:
                        if step:
                            body(engine, step)
                except (eep.PeerLost, ValueError) as e:
                    self.assertIs(e, raised[-1])
                    self.assertFalse(step.failed)
                    engine.step_end(None, False)
            self.assertGreaterEqual(len(raised), 2)

    def test_a_dead_peer_fails_the_step(self):
        """The other engine goes without a word: the view is revoked, the step fails, a repair commits, steps go on."""
        with Cluster(agents=2) as c:
            lost = threading.Event()
            failed = []

            def body(engine, step):
                if lost.is_set() and step.view.n == 2 and not failed:
                    failed.append(step.step)
                    raise eep.PeerLost("no answer from the other rank")
                return True
            with Small(c, 0, body) as a:
                b = Small(c, 1, body)
                a.has_work = True
                self.assertTrue(until(lambda: c.engines() == 2))
                done = c.ctl("scale", "--to", "2")
                self.assertEqual(done.returncode, 0, done.stderr + c.logs())
                lost.set()
                c.processes[2].kill()  # gpu1's agent, and so its rank
                self.assertTrue(until(lambda: failed and len(a.views) >= 2 and a.seen[-1] is not None, 40), c.logs())
                self.assertIn(eep.EventKind.REVOKE, a.seen)
                self.assertGreater(a.views[-1][0], a.views[0][0])
                b.stop.set()
                b.engine.wake()
                b._thread.join(10)
                b.engine.detach()


@unittest.skipUnless(numpy, "numpy is not here")
class Sealing(unittest.TestCase):
    def test_own_layout_is_loaded_and_moved(self):
        """An engine fills regions of its own layout, seals them, and a joiner gets them, byte for byte."""
        def value(layer, expert):
            return numpy.arange(6, dtype=numpy.float32).reshape(2, 3) + 100 * layer + expert

        class Sealer(Small):
            def answer(self, event):
                if event.kind == eep.EventKind.LOAD:
                    self.seen.append(event.kind)
                    slots = len(event.load_map[0])
                    dense = self.engine.region_alloc("dense", bytes=64)
                    dense.numpy()[:] = numpy.arange(64, dtype=numpy.uint8)
                    self.engine.tensor_add("dense", "table", 16, "I32", (4, 3))
                    for layer, row in enumerate(event.load_map):
                        part = self.engine.region_alloc(layer=layer, part="w", slots=slots, dtype="F32", shape=(2, 3))
                        for slot, expert in enumerate(row):
                            if expert >= 0:
                                part.numpy()[slot] = value(layer, expert)
                    self.engine.seal('{"made": "by a test"}')
                    self.regions.set()
                else:
                    super().answer(event)
        options = dict(seals="test-layout", moe_layers=2, logical_experts=4)
        with Cluster(agents=2, checkpoint=None, coordinator=("--slots", "4")) as c, Sealer(c, 0, **options) as a, Sealer(
                c, 1, **options) as b:
            self.assertTrue(until(lambda: c.engines() == 2))
            for n in (1, 2):
                done = c.ctl("scale", "--to", str(n))
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr + c.logs())
            self.assertEqual(c.ctl("verify").returncode, 0)
            self.assertEqual([e.seen.count(eep.EventKind.LOAD) for e in (a, b)].count(1), 1)
            self.assertTrue(until(lambda: b.views and a.views and a.views[-1][2] == b.views[-1][2] == 2))
            for e in (a, b):
                rank = e.views[-1][1]
                self.assertEqual(e.engine.model.config, '{"made": "by a test"}')
                table = e.engine.tensor("table")
                numpy.testing.assert_array_equal(table.numpy().view(numpy.uint8).reshape(-1), numpy.arange(16, 64))
                maps, held = e.engine.maps, 0
                for layer in range(2):
                    part = e.engine.tensor(f"layers.{layer}.experts.w").numpy()
                    for slot in range(maps.slots):
                        expert = int(maps.physical_to_logical.numpy()[layer, rank * maps.slots + slot])
                        if expert >= 0:
                            held += 1
                            numpy.testing.assert_array_equal(part[slot], value(layer, expert))
                self.assertGreater(held, 0)


class Interfaces(unittest.TestCase):
    def test_strides(self):
        a = Array(4096, -1, "BF16", (3, 2, 5), 64)
        self.assertEqual(a.strides, (64, 10, 2))
        self.assertEqual(a.span, 2 * 64 + 10 + 4 * 2 + 2)
        self.assertEqual(Array(4096, -1, "F32", (0, 2)).span, 0)

    def test_which_interface(self):
        host, gpu = Array(4096, -1, "F32", (2,)), Array(4096, 1, "BF16", (2, 2), 8)
        self.assertFalse(hasattr(host, "__cuda_array_interface__"))
        self.assertFalse(hasattr(gpu, "__array_interface__"))
        self.assertEqual(gpu.__cuda_array_interface__, {"shape": (2, 2), "typestr": "<u2", "data": (4096, False),
                                                        "version": 3, "strides": (8, 2)})
        with self.assertRaises(TypeError):
            gpu.numpy()


if __name__ == "__main__":
    unittest.main()
