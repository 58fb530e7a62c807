"""Forward redundancy: planted neurons that nothing sees go at level exact, near misses stay, the checker believes nothing.

Truth: f and g are piecewise linear, so they are equal on a segment iff they are at all their kinks and between them; both are
evaluated in rationals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

import exactprune
from exactprune.checker.bundle import check_bundle, check_records
from exactprune.claim import LayerVerdict, Status
from exactprune.compress import compress_network
from exactprune.compress.bundle import bundle
from exactprune.compress.rules.forward import candidates, forward_redundant
from exactprune.domain import uniform
from exactprune.io import save
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, ReLU
from exactprune.options import VerifyOptions


@dataclass(frozen=True)
class Weights:
    """A chain of affine layers and ReLUs with small integers; float64 arrays."""

    weight: list[np.ndarray]
    bias: list[np.ndarray]

    def network(self) -> Network:
        ops = [op for w, b in zip(self.weight, self.bias, strict=True)
               for op in (Affine(w.astype(np.float32), b.astype(np.float32)), ReLU())]
        nodes = [Node(f"n{i}", op, (i - 1,)) for i, op in enumerate(ops[:-1])]
        return build(nodes, (self.weight[0].shape[1],), np.float32)

    def ranges(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Interval bounds of every pre-activation on [0, 1]."""
        low, high, found = np.zeros(self.weight[0].shape[1]), np.ones(self.weight[0].shape[1]), []
        for w, b in zip(self.weight, self.bias, strict=True):
            p, n = np.maximum(w, 0), np.minimum(w, 0)
            found.append((p @ low + n @ high + b, p @ high + n @ low + b))
            low, high = (np.maximum(e, 0) for e in found[-1])
        return found


def small(rng, *shape, top=3):
    return rng.integers(-top, top + 1, shape).astype(float)


def planted(rng, layer, inputs=4, widths=(6, 6, 5), short=0.0):
    """Neuron 0 of ``layer`` is active on about half of the box; wherever it is, its guard 1, z_1 = z_0 + s, turns all its
    readers off, which without the guard can be on. ``short``: share that is taken off what the guard weighs, for near misses."""
    while True:
        sizes = [inputs, *widths, 2]
        net = Weights([small(rng, m, n) for n, m in pairwise(sizes)], [small(rng, m, top=2) for m in sizes[1:]])
        weight, bias, after = net.weight[layer], net.bias[layer], net.weight[layer + 1]
        weight[0] = rng.choice([-2, -1, 1, 2], weight.shape[1])
        low, high = net.ranges()[layer]
        bias[0] -= np.round((low[0] + high[0]) / 2)
        guard = int(rng.integers(1, 3))
        weight[1], bias[1] = weight[0], bias[0] + guard
        read = rng.random(len(after)) < 0.6
        read[0] = True
        after[:, 0], after[:, 1] = np.where(read, rng.choice([-3, -2, -1, 1, 2, 3], len(after)), 0), 0
        low, high = (np.maximum(e, 0) for e in net.ranges()[layer])
        rest = after.copy()
        rest[:, 0] = 0
        most = np.maximum(rest, 0) @ high + np.minimum(rest, 0) @ low + net.bias[layer + 1]
        needed = np.floor(np.maximum(np.maximum(after[:, 0], 0), most / guard)) + 1
        if low[0] < high[0] and (most[read] > 1).all():
            after[:, 1] = np.where(read, -np.floor(needed * (1 - short)), 0)
            f = net.network()
            z = f.evaluate_nodes(uniform(0, 1, (inputs,)).sample(100, rng), np.float64)[2 * layer]
            if (z[:, 0] > 0).any() and (z[:, 0] < 0).any():
                return f


def without(f: Network, layer: int, unit: int) -> Network:
    nodes = list(f.nodes)
    at = f.relus[layer] + 1
    weight = nodes[at].op.weight.copy()
    weight[:, unit] = 0
    nodes[at] = replace(nodes[at], op=Affine(weight, nodes[at].op.bias))
    return replace(f, nodes=tuple(nodes))


def kinks(f: Network, a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    """Where a chain may bend on the segment from a to b, as parameters in [0, 1]: between two of them it is linear."""
    stops = [Fraction(0), Fraction(1)]
    for relu in f.relus:
        values = {t: values_at(f, a, b, t, relu - 1) for t in stops}
        more = []
        for s, t in pairwise(stops):
            for p, q in zip(values[s], values[t], strict=True):
                if p * q < 0:
                    more.append(s + (t - s) * p / (p - q))
        stops = sorted({*stops, *more})
    return stops


def values_at(f: Network, a, b, t, until: int) -> list[Fraction]:
    x = [p + t * (q - p) for p, q in zip(a, b, strict=True)]
    for node in f.nodes[: until + 1]:
        if isinstance(node.op, ReLU):
            x = [max(v, Fraction(0)) for v in x]
        else:
            x = [sum((Fraction(float(w)) * v for w, v in zip(row, x, strict=True)), Fraction(float(c)))
                 for row, c in zip(node.op.weight, node.op.bias, strict=True)]
    return x


def equal_on_segments(f: Network, g: Network, rng, count: int) -> bool:
    """f = g at every point of some segments through the unit box (all of it, for one input)."""
    n = f.input_shape[0]
    for k in range(count):
        ends = [[Fraction(int(i), 16) for i in rng.integers(0, 17, n)] for _ in range(2)]
        a, b = ends if n > 1 or k else ([Fraction(0)], [Fraction(1)])
        stops = sorted({*kinks(f, a, b), *kinks(g, a, b)})
        stops += [(s + t) / 2 for s, t in pairwise(stops)]
        if any(values_at(f, a, b, t, len(f.nodes) - 1) != values_at(g, a, b, t, len(g.nodes) - 1) for t in stops):
            return False
    return True


def check_planted(tools, seed: int) -> None:
    rng, layer = np.random.default_rng(seed), seed % 2
    f = planted(rng, layer, inputs=1 + seed % 4)
    box = uniform(0, 1, f.input_shape)
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation="exact")
    gone = {(r.layer, r.index): r.rule for r in rewrite.removals}
    assert gone.get((layer, 0)) == "forward" and str(rewrite.level) == "exact"
    assert rewrite.network.parameters < f.parameters
    assert equal_on_segments(f, rewrite.network, rng, 3)
    assert tools.same(f, rewrite.network, box, rng)


def test_planted_neurons_go(tools):
    for seed in range(10):
        check_planted(tools, seed)


@pytest.mark.slow
def test_planted_neurons_go_in_many(tools):
    for seed in range(10, 300):
        check_planted(tools, seed)


def test_near_misses_stay(tools):
    """A guard that is a little too light: removing the neuron changes the output somewhere, and nothing is removed."""
    misses = 0
    for seed in range(42):
        rng, layer = np.random.default_rng(seed), seed % 2
        f = planted(rng, layer, short=(0.05, 0.2, 0.5)[seed % 3])
        box = uniform(0, 1, f.input_shape)
        other, x = without(f, layer, 0), np.concatenate([box.sample(500, rng), box.corners(500, rng)])
        if np.array_equal(f.evaluate(x, np.float64), other.evaluate(x, np.float64)):
            continue
        misses += 1
        cleared = forward_redundant(f, box, tools.verdicts(f, box))
        assert 0 not in cleared.units.get(layer, np.zeros(0))
        assert np.array_equal(f.evaluate(x, np.float64), cleared.network.evaluate(x, np.float64))  # small integers: no rounding
    assert misses >= 5


def test_neurons_that_are_unknown_stay(tools):
    f = planted(np.random.default_rng(0), 0)
    box = uniform(0, 1, f.input_shape)
    known = tools.verdicts(f, box)
    assert 0 in candidates(f, box, known)[0]
    status = np.where(np.arange(6) == 0, Status.UNKNOWN, known[0].status)
    unknown = LayerVerdict(0, known[0].node, (6,), status, known[0].method, known[0].lower, known[0].upper, {0: "timed out"})
    assert 0 not in forward_redundant(f, box, (unknown, *known[1:])).units.get(0, ())


def test_a_neuron_that_the_output_or_a_sum_reads_stays(tools):
    last = Affine(np.ones((2, 3), np.float32), np.zeros(2, np.float32))
    first = Affine(np.array([[2], [1], [-1]], np.float32), np.array([-1, -0.5, 0.5], np.float32))
    f = tools.chain((1,), first, ReLU(), last)
    nodes = [Node("a", first, (INPUT,)), Node("r", ReLU(), (0,)), Node("b", first, (INPUT,)), Node("s", Add(), (1, 2)),
             Node("t", ReLU(), (3,)), Node("o", last, (4,))]
    box = uniform(0, 1, (1,))
    for net in (f, build(nodes, (1,), np.float32)):
        assert candidates(net, box, tools.verdicts(net, box)) == {}


# -- the checker ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tools):
    """Networks with a planted neuron, verified, compressed and judged; one of them needs a proof that is stored."""
    for seed in range(40):
        f = planted(np.random.default_rng(seed), 1)
        box = uniform(0, 1, f.input_shape)
        known = exactprune.verify(f, box, VerifyOptions(time_limit=20))
        rewrite = compress_network(f, box, known.layers, max_deviation="exact")
        found = bundle(f, box, rewrite, known.records, known.layers)
        forward = [r for r in found.records if r["record"] == "forward"]
        if forward and any(r["trees"] for r in forward):
            return f, rewrite, found
    raise AssertionError("no network needed a proof")


def test_the_checker_accepts_from_files_alone(bundled, tmp_path):
    f, rewrite, found = bundled
    assert found.report.accepted and str(found.level) == "exact" and found.report.deviation == 0
    save(f, tmp_path / "f.onnx")
    save(rewrite.network, tmp_path / "g.onnx")
    (tmp_path / "g.certificate").write_bytes(found.data)
    assert check_bundle(tmp_path / "f.onnx", tmp_path / "g.onnx", tmp_path / "g.certificate").accepted
    assert check_bundle(tmp_path / "f.onnx", tmp_path / "g.onnx", tmp_path / "g.certificate", exact=True).accepted


def nothing_known(f: Network, box) -> list[dict]:
    """A certificate in which every neuron is unknown."""
    sizes = [f.shapes[i][0] for i in f.relus]
    layers = [{"node": i, "name": f.nodes[i].name, "neurons": n} for i, n in zip(f.relus, sizes, strict=True)]
    head = {"record": "header", "format": "exactprune-certificate/1", "network": f.sha256, "domain": box.sha256,
            "dtype": f.dtype.name, "input_shape": list(f.input_shape), "layers": layers, "tool": {"test": "1"}}
    none = {"inactive": [], "active": [], "unstable": []}
    return [head, *({"record": "verdicts", "layer": k, **none, "unknown": list(range(n))} for k, n in enumerate(sizes))]


def changed(lines, change):
    return [change(r) if r["record"] == "forward" else r for r in lines]


@pytest.mark.parametrize("change", [
    lambda r: {**r, "trees": []}, lambda r: {**r, "units": [2]}, lambda r: {**r, "units": [0, 0]},
    lambda r: {**r, "units": [0, 2, 3, 4, 5]}, lambda r: {**r, "layer": 0}, lambda r: {**r, "layer": 2},
    lambda r: {**r, "layer": 9}, lambda r: {**r, "units": [99]}, lambda r: {k: v for k, v in r.items() if k != "trees"},
    lambda r: {**r, "more": 1}, lambda r: {**r, "trees": r["trees"] * 2}, lambda r: {**r, "trees": [{}]},
    lambda r: {**r, "trees": [{**t, "unit": 3} for t in r["trees"]]},
    lambda r: {**r, "trees": [{**t, "side": "lower"} for t in r["trees"]]},
    lambda r: {**r, "trees": [{**t, "leaves": [[] for _ in t["leaves"]]} for t in r["trees"]]}])
def test_what_is_not_proved_is_rejected(bundled, change):
    f, rewrite, found = bundled
    report = check_records(f, rewrite.network, iter(changed(found.records, change)))
    assert not report.accepted and report.error


def test_without_the_record_the_claim_falls(bundled):
    f, rewrite, found = bundled
    report = check_records(f, rewrite.network, iter([r for r in found.records if r["record"] != "forward"]))
    assert not report.accepted and not report.deviation <= 0


def test_a_near_miss_is_rejected_whatever_the_hints(tools, bundled):
    """The checker on networks in which removal changes the output: the proof of the sound one, and none."""
    _, _, sound = bundled
    (record,) = [r for r in sound.records if r["record"] == "forward"]
    rejected = 0
    for seed in range(60):
        f = planted(np.random.default_rng(seed), 1, short=0.6)
        box = uniform(0, 1, f.input_shape)
        other, x = without(f, 1, 0), np.random.default_rng(0).random((1000, *f.input_shape))
        if np.array_equal(f.evaluate(x, np.float64), other.evaluate(x, np.float64)):
            continue
        cleared = forward_redundant(f, box, tools.verdicts(f, box))
        rewrite = compress_network(other, box, tools.verdicts(other, box), max_deviation="exact")
        for trees in (record["trees"], []):
            claim = {"record": "forward", "layer": 1, "units": [0], "trees": trees}
            with_claim = replace(rewrite, cleared=replace(cleared, network=other, records=(claim,), units={1: np.array([0])}))
            found = bundle(f, box, with_claim, nothing_known(f, box), tools.verdicts(f, box))
            assert found.level is None and not found.report.accepted and found.report.error.startswith("forward: neuron 0")
            rejected += 1
        if rejected >= 6:
            return
    raise AssertionError("no near miss was tried")


def test_float64_networks(tools):
    f = planted(np.random.default_rng(3), 1).astype(np.float64)
    box = uniform(0, 1, f.input_shape)
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation="exact")
    assert ("forward", 1, 0) in {(r.rule, r.layer, r.index) for r in rewrite.removals}
    assert equal_on_segments(f, rewrite.network, np.random.default_rng(0), 2)
