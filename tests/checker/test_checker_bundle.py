"""Bundles: a true claim is accepted; whatever is changed, and whatever wrong hints say, no false deviation is accepted."""

from __future__ import annotations

import copy
import gzip
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import prover
import pytest
from exact_evaluation import exact_extremes
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import case

from exactprune import ops
from exactprune.checker import CheckError
from exactprune.checker.bundle import check_bundle, check_records, read
from exactprune.checker.difference import Difference
from exactprune.checker.engine import proved
from exactprune.checker.network import of
from exactprune.io.npz import save_npz
from exactprune.network import INPUT, Node, build

LOWER, UPPER = np.zeros(4), np.ones(4)


def numbers(rng, *shape):
    """Multiples of 1/8: sums of a few products are exact in float32."""
    return (rng.integers(-8, 9, shape) / 8).astype(np.float32)


def chain(shape, *given, dtype=np.float32):
    return build([Node(f"n{i}", op, (i - 1,)) for i, op in enumerate(given)], shape, dtype)


def certificate(network, lower, upper, crown=False):
    """Header, bounds by CROWN if wanted, and every neuron called unknown."""
    lines = [prover.header(network, lower, upper)]
    for k, position in enumerate(network.relus):
        size = int(np.prod(network.shapes[position]))
        lines += [prover.crown(k, range(size))] if crown and k else []
        lines.append(prover.verdicts(k, size))
    return lines


def bundle(f, g, hints, level="exact", eps=0.0, lower=LOWER, upper=UPPER, crown=False):
    proof = certificate(f, lower, upper, crown)
    head = {"record": "bundle", "format": "exactprune-bundle/1", "original": f.sha256, "compressed": g.sha256,
            "domain": proof[0]["domain"], "dtype": f.dtype.name, "level": level, "eps": eps, "allowed": 1.0, "tool": {}}
    box = {"record": "domain", "lower": prover.pack(lower, "<f8"), "upper": prover.pack(upper, "<f8")}
    return [head, box, {"record": "rewrite", "rule": "remove", "text": "words"}, *hints, *proof]


def relation(node, of, units, ratios=None, axis=0):
    packed = None if ratios is None else prover.pack(np.asarray(ratios, float), "<f8")
    return {"record": "relation", "node": node, "of": of, "axis": axis, "units": [int(u) for u in units],
            "ratios": packed}


def duplicate(of, kept, gone, ratios):
    return {"record": "duplicate", "of": of, "axis": 0, "gone": list(gone), "kept": list(kept),
            "ratios": prover.pack(np.asarray(ratios, float), "<f8")}


def line(of, units, slopes):
    return {"record": "line", "of": of, "axis": 0, "units": list(units),
            "slopes": prover.pack(np.asarray(slopes, float), "<f8")}


@pytest.fixture(scope="module")
def dense():
    """f: unit 0 dead, 1 = 2 * unit 2, 3 = -unit 2, 4 and 5 active, 6 constant, 7 unstable; g without 0, 1, 3..6."""
    rng = np.random.default_rng(0)
    weight, bias = numbers(rng, 8, 4), numbers(rng, 8)
    weight[2], bias[2] = [1, -1, 0.5, -0.25], -0.125
    bias[0], weight[1], bias[1], weight[3], bias[3] = -9, 2 * weight[2], 2 * bias[2], -weight[2], -bias[2]
    bias[4:6], weight[6], bias[6] = 5, 0, 0.5
    out, shift = numbers(rng, 3, 8), numbers(rng, 3)
    f = chain((4,), ops.Affine(weight, bias), ops.ReLU(), ops.Affine(out, shift))
    merged = out[:, 4] @ np.eye(3, dtype=np.float32)
    # units of g: f's 2 and 7, and three linear ones that carry units 3, 4 and 5
    lines = np.array([-weight[2] + 3, weight[4], weight[5]], np.float32)
    first = ops.Affine(np.concatenate([weight[[2, 7]], lines]),
                       np.concatenate([bias[[2, 7]], [-bias[2], bias[4], bias[5]]]).astype(np.float32))
    columns = np.stack([out[:, 2] + 2 * out[:, 1] + out[:, 3], out[:, 7], out[:, 3], merged, out[:, 5]], axis=1)
    # lines[0] is unit 3's pre-activation plus 3 * (the sum of inputs): one more unit of g takes that away again
    extra = ops.Affine(np.concatenate([first.weight, np.full((1, 4), 3, np.float32)]), np.append(first.bias, np.float32(0)))
    g = chain((4,), extra, ops.ReLU(), ops.Affine(np.concatenate([columns, -out[:, 3:4]], axis=1),
                                                  shift + out[:, 6] / 2))
    hints = [duplicate(1, [2, 2], [1, 3], [2.0, -1.0]), relation(1, 1, [2, 7, -1, -1, -1, -1])]
    return f, g, hints


def test_an_identity_is_accepted_as_exact(dense):
    f, g, hints = dense
    report = check_records(f, g, bundle(f, g, hints))
    assert report.accepted and report.error == "" and report.deviation == 0.0 and report.rewrites == 1
    assert report.as_dict()["accepted"] and report.certificate.accepted


def test_files_are_read_by_the_checker_itself(dense, tmp_path):
    f, g, hints = dense
    save_npz(f, tmp_path / "f.npz")
    save_npz(g, tmp_path / "g.npz")
    content = "".join(json.dumps(r) + "\n" for r in bundle(f, g, hints)).encode()
    (tmp_path / "b").write_bytes(gzip.compress(content))
    assert check_bundle(tmp_path / "f.npz", tmp_path / "g.npz", tmp_path / "b").accepted
    assert "compressed network" in check_bundle(tmp_path / "f.npz", tmp_path / "f.npz", tmp_path / "b").error
    assert "original network" in check_bundle(tmp_path / "g.npz", tmp_path / "g.npz", tmp_path / "b").error
    for damaged in (content, gzip.compress(content)[:-9], gzip.compress(content[:-5]), b"", gzip.compress(b"{}\n")):
        (tmp_path / "b").write_bytes(damaged)
        report = check_bundle(tmp_path / "f.npz", tmp_path / "g.npz", tmp_path / "b")
        assert not report.accepted and report.error


def changed(network, position, field, index, to):
    array = getattr(network.nodes[position].op, field).copy()
    array[index] = to(array[index])
    nodes = [replace(n, op=replace(n.op, **{field: array})) if i == position else n for i, n in enumerate(network.nodes)]
    return build(nodes, network.input_shape, network.dtype)


def up(value):
    return np.nextafter(value, np.float32(9))


@pytest.mark.parametrize("place", [(0, "weight", (2, 1)), (0, "bias", (2,)), (2, "weight", (1, 7)), (2, "bias", (0,))])
def test_one_bit_in_f_is_too_much_for_exact(dense, place):
    f, g, hints = dense
    other = changed(f, *place, up)
    assert "compressed" not in check_records(other, g, bundle(f, g, hints)).error   # the hash alone gives it away
    report = check_records(other, g, bundle(other, g, hints))
    assert not report.accepted and 0 < report.deviation < 1e-4


@pytest.mark.parametrize("place", [(0, "weight", (1, 1)), (0, "bias", (0,)), (2, "weight", (1, 4)), (2, "bias", (0,))])
def test_one_bit_in_g_is_too_much_for_exact(dense, place):
    f, g, hints = dense
    other = changed(g, *place, up)
    report = check_records(f, other, bundle(f, other, hints))
    assert not report.accepted and 0 < report.deviation < 1e-4
    assert "proved to be at most" in report.error
    again = bundle(f, other, hints, "certified", report.deviation)
    assert check_records(f, other, again).accepted
    assert not check_records(f, other, bundle(f, other, hints, "certified", np.nextafter(report.deviation, 0))).accepted


HINTS = {
    "swapped units": lambda h: [h[0], relation(1, 1, [7, 2, -1, -1, -1, -1])],
    "a unit that is unstable taken as linear": lambda h: [h[0], relation(1, 1, [-1, 7, -1, -1, -1, -1])],
    "another ratio": lambda h: [duplicate(1, [2, 2], [1, 3], [2.5, -1.0]), h[1]],
    "another ratio of a relation": lambda h: [h[0], relation(1, 1, [2, 7, -1, -1, -1, -1], [1.5, 1, 1, 1, 1, 1])],
    "a duplicate that is none": lambda h: [duplicate(1, [2, 7], [1, 3], [2.0, -1.0]), h[1]],
    "no duplicates": lambda h: h[1:],
}


@pytest.mark.parametrize("name", HINTS)
def test_wrong_hints_cost_the_proof(dense, name):
    f, g, hints = dense
    report = check_records(f, g, bundle(f, g, HINTS[name](hints)))
    assert not report.accepted and report.deviation > 1e-3
    assert report.deviation >= worst(f, g, LOWER, UPPER)


MALFORMED = {
    "no relation": lambda b: b.pop(4),
    "relation twice": lambda b: b.insert(4, copy.deepcopy(b[4])),
    "duplicates twice": lambda b: b.insert(3, copy.deepcopy(b[3])),
    "relation too short": lambda b: b[4]["units"].pop(),
    "unit out of range": lambda b: b[4]["units"].__setitem__(0, 8),
    "unit below -1": lambda b: b[4]["units"].__setitem__(0, -2),
    "axis out of range": lambda b: b[4].update(axis=1),
    "relation to an affine map": lambda b: b[4].update(of=0),
    "relation of an affine map": lambda b: b[4].update(node=0),
    "relation of no node": lambda b: b[4].update(node=3),
    "negative ratio": lambda b: b[4].update(ratios=prover.pack(-np.ones(6), "<f8")),
    "zero ratio": lambda b: b[3].update(ratios=prover.pack(np.zeros(2), "<f8")),
    "too many ratios": lambda b: b[3].update(ratios=prover.pack(np.ones(3), "<f8")),
    "NaN ratio": lambda b: b[3].update(ratios=prover.pack(np.full(2, np.nan), "<f8")),
    "unit gone twice": lambda b: b[3].update(gone=[1, 1]),
    "multiple of itself": lambda b: b[3].update(kept=[1, 2]),
    "unknown record": lambda b: b.insert(3, {"record": "trust me"}),
    "nameless record": lambda b: b.insert(3, [1]),
    "field too many": lambda b: b[4].update(extra=1),
    "field missing": lambda b: b[4].pop("axis"),
    "no header": lambda b: b.pop(0),
    "no domain": lambda b: b.pop(1),
    "other format": lambda b: b[0].update(format="exactprune-bundle/2"),
    "other dtype": lambda b: b[0].update(dtype="float64"),
    "unknown level": lambda b: b[0].update(level="lossless"),
    "exact with eps": lambda b: b[0].update(eps=1e-9),
    "negative eps": lambda b: b[0].update(level="certified", eps=-1.0),
    "eps in words": lambda b: b[0].update(level="certified", eps="1"),
    "eps true": lambda b: b[0].update(level="certified", eps=True),
    "other original": lambda b: b[0].update(original="0" * 64),
    "other domain": lambda b: b[0].update(domain="0" * 64),
    "larger box": lambda b: b[1].update(upper=prover.pack(2 * UPPER, "<f8")),
    "empty box": lambda b: b[1].update(upper=prover.pack(-UPPER, "<f8")),
    "NaN box": lambda b: b[1].update(upper=prover.pack(np.full(4, np.nan), "<f8")),
    "flat box": lambda b: b[1].update(upper=prover.pack(np.ones((2, 2)), "<f8")),
    "no certificate": lambda b: [b.pop() for _ in range(2)],
    "no verdicts": lambda b: b.pop(),
    "a false verdict": lambda b: b[-1].update(inactive=[7], unknown=[0, 1, 2, 3, 4, 5, 6]),
    "hints after the certificate": lambda b: b.append(b.pop(4)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bundles_are_rejected(dense, name):
    f, g, hints = dense
    given = copy.deepcopy(bundle(f, g, hints))
    assert check_records(f, g, copy.deepcopy(given)).accepted
    MALFORMED[name](given)
    report = check_records(f, g, given)
    assert not report.accepted and report.error and not report.as_dict()["accepted"]


def test_a_larger_box_is_not_covered(dense):
    f, g, hints = dense
    report = check_records(f, g, bundle(f, g, hints, lower=-9 * UPPER, upper=9 * UPPER))
    assert not report.accepted and report.deviation >= worst(f, g, -9 * UPPER, 9 * UPPER) > 0


def test_networks_of_another_interface_are_rejected(dense):
    f, _, _ = dense
    other = chain((4,), ops.Affine(np.zeros((2, 4), np.float32), np.zeros(2, np.float32)))
    assert "input and output shapes" in check_records(f, other, bundle(f, other, [])).error


def test_a_network_equals_itself_without_thought():
    """Every operator, related unit by unit, at level exact."""
    for seed in range(20):
        drawn = case(seed)
        f, box = drawn.network, drawn.box
        report = check_records(f, f, bundle(f, f, identity(f), lower=box.lower, upper=box.upper))
        assert report.accepted or "leave the range" in report.error, (seed, report.error)


def identity(f):
    kinds = {i: type(n.op).__name__ for i, n in enumerate(f.nodes)}
    return [relation(i, i, range(f.shapes[i][0])) for i, kind in kinds.items() if kind in ("ReLU", "MaxPool2d")]


def test_zero_is_read_at_channels_and_padding():
    """A dead channel leaves a padded convolution, a residual sum and a max pool; one bit in what stays is seen."""
    rng = np.random.default_rng(3)

    def conv(m, n):
        return ops.Conv2d(numbers(rng, m, n, 3, 3), numbers(rng, m), padding=(1, 1, 1, 1))

    first, second, third = conv(4, 1), conv(4, 4), conv(2, 4)
    for op in (first, second):
        op.bias.setflags(write=True)
        op.bias[2] = -1000
    head = ops.Affine(numbers(rng, 2, 8), numbers(rng, 2))

    def network(a, b, c):
        nodes = [Node("a", a, (INPUT,)), Node("b", ops.ReLU(), (0,)), Node("c", b, (1,)), Node("d", ops.ReLU(), (2,)),
                 Node("e", ops.Add(), (1, 3)), Node("f", ops.MaxPool2d((2, 2), (2, 2)), (4,)), Node("g", c, (5,)),
                 Node("h", ops.Reshape((8,)), (6,)), Node("i", head, (7,))]
        return build(nodes, (1, 4, 4), np.float32)

    kept = [0, 1, 3]
    f = network(first, second, third)
    cut = [replace(first, weight=first.weight[kept], bias=first.bias[kept]),
           replace(second, weight=second.weight[np.ix_(kept, kept)], bias=second.bias[kept]),
           replace(third, weight=third.weight[:, kept])]
    g = network(*cut)
    hints = [relation(1, 1, kept), relation(3, 3, kept), relation(5, 5, kept)]
    box = {"lower": np.zeros((1, 4, 4)), "upper": np.ones((1, 4, 4))}
    report = check_records(f, g, bundle(f, g, hints, **box))
    assert report.accepted and report.deviation == 0
    bad = changed(g, 2, "weight", (0, 1, 0, 2), lambda w: w + np.float32(2.0**-20))
    report = check_records(f, bad, bundle(f, bad, hints, **box))
    assert not report.accepted and report.deviation >= worst(f, bad, **box) > 0
    swapped = check_records(f, g, bundle(f, g, [relation(1, 1, [1, 0, 3]), *hints[1:]], **box))
    assert not swapped.accepted and swapped.deviation > 0.1


# -- no false deviation ------------------------------------------------------------------------------------------------


def output_of(network, points):
    """Exact outputs (points, outputs): those of a ReLU layer put on top of the network."""
    shape = network.shapes[-1]
    top = build([*network.nodes, Node("top", ops.ReLU(), (len(network.nodes) - 1,))], network.input_shape, network.dtype)
    assert top.shapes[-1] == shape
    return [exact_extremes(top, point[None])[-1][0] for point in points]


def worst(f, g, lower, upper, count=24, seed=0):
    """The largest exact abs(f - g) at random points and corners."""
    rng = np.random.default_rng(seed)
    points = lower + rng.random((count, *lower.shape)) * (upper - lower)
    points[: count // 2] = np.where(rng.random((count // 2, *lower.shape)) < 0.5, lower, upper)
    points = np.clip(points, lower, upper)
    return max(abs(a - b) for x, y in zip(output_of(f, points), output_of(g, points), strict=True)
               for a, b in zip(x, y, strict=True))


def nudged(rng, f):
    """f with some weights scaled, zeroed or moved by little."""
    nodes = []
    for node in f.nodes:
        arrays = {}
        for name, array in node.op.arrays():
            noise = rng.choice([0.0, 1e-6, 1e-2]) * rng.standard_normal(array.shape)
            arrays[name] = (array * (1 + noise * (rng.random(array.shape) < 0.5))).astype(array.dtype)
        nodes.append(replace(node, op=replace(node.op, **arrays)) if arrays and rng.random() < 0.7 else node)
    return build(nodes, f.input_shape, f.dtype)


def random_hints(rng, f):
    """Relations, duplicates and lines that are right, nearly right, or nonsense."""
    hints = []
    for i, node in enumerate(f.nodes):
        count = f.shapes[i][0]
        if isinstance(node.op, ops.ReLU) and rng.random() < 0.5 and count > 1:
            kept, gone = rng.permutation(count)[:2].tolist()
            hints.append(duplicate(i, [kept], [gone], [float(rng.choice([1.0, 0.7, -1.0, -0.3]))]))
        if isinstance(node.op, ops.ReLU) and rng.random() < 0.5:
            units = np.flatnonzero(rng.random(count) < 0.5).tolist()
            hints.append(line(i, units, rng.choice([0.0, 1.0, 0.4, -0.2], len(units))))
    for i, node in enumerate(f.nodes):
        units = np.arange(f.shapes[i][0])
        if isinstance(node.op, ops.ReLU):
            if rng.random() < 0.3:
                units = rng.permutation(units)
            if rng.random() < 0.5:
                units = np.where(rng.random(units.shape) < 0.4, -1, units)
            hints.append(relation(i, i, units, rng.choice([1.0, 1.0, 0.5, 3.7], len(units)) if rng.random() < 0.3 else None))
        elif isinstance(node.op, ops.MaxPool2d):
            hints.append(relation(i, i, rng.permutation(units) if rng.random() < 0.2 else units))
    return hints


@given(st.integers(0, 10**9))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_hints_never_prove_too_little(seed):
    rng = np.random.default_rng(seed)
    drawn = case(seed)
    f, box = drawn.network, drawn.box
    g, hints = nudged(rng, f), random_hints(rng, f)
    tight = bool(rng.random() < 0.5)
    claim = ("exact", 0.0) if rng.random() < 0.5 else ("certified", 1e-300)
    report = check_records(f, g, bundle(f, g, hints, *claim, lower=box.lower, upper=box.upper, crown=tight))
    if not np.isnan(report.deviation):
        assert Fraction(report.deviation) >= worst(f, g, box.lower, box.upper, count=8), seed
    else:
        assert report.error and not report.accepted


def one_changed(rng, f):
    """f with one number of one array changed by much."""
    places = [(i, name) for i, node in enumerate(f.nodes) for name, array in node.op.arrays() if array.size]
    position, name = places[rng.integers(len(places))]
    array = getattr(f.nodes[position].op, name)
    return changed(f, position, name, np.unravel_index(rng.integers(array.size), array.shape),
                   lambda v: array.dtype.type(v * 1.5 + np.abs(array).mean() / 4))


@given(st.integers(0, 10**9))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_number_that_differs_is_seen(seed):
    """With the right hints, so that weights are compared as they are."""
    rng, drawn = np.random.default_rng(seed), case(seed)
    f, box = drawn.network, drawn.box
    g = one_changed(rng, f)
    report = check_records(f, g, bundle(f, g, identity(f), lower=box.lower, upper=box.upper))
    if not np.isnan(report.deviation):
        assert Fraction(report.deviation) >= worst(f, g, box.lower, box.upper, count=8), seed
    else:
        assert report.error and not report.accepted


def test_random_hints_reach_a_deviation_most_of_the_time():
    """The property above is not empty."""
    found = []
    for seed in range(15):
        rng, drawn = np.random.default_rng(seed), case(seed)
        g, hints = nudged(rng, drawn.network), random_hints(rng, drawn.network)
        box = {"lower": drawn.box.lower, "upper": drawn.box.upper}
        found.append(check_records(drawn.network, g, bundle(drawn.network, g, hints, **box)).deviation)
    assert np.isfinite(found).mean() > 0.6 and np.sum(np.nan_to_num(found) > 0) > 5


def test_without_rounding_and_with_it_agree(dense):
    f, g, _ = dense
    other = changed(g, 0, "weight", (1, 1), up)
    bounds = proved(of(f), LOWER, UPPER, certificate(f, LOWER, UPPER))[1]
    found = []
    for exact in (True, False):
        proof = Difference(bounds, of(other), exact)
        proof.add_duplicates(1, 0, np.array([1, 3]), np.array([2, 2]), np.array([2.0, -1.0]))
        proof.relate(1, 1, 0, np.array([2, 7, -1, -1, -1, -1]), np.ones(6))
        found.append(proof.deviation())
    assert 0 < found[0] <= found[1] <= found[0] * (1 + 1e-9)


def test_a_relation_that_is_not_there_is_misuse_not_a_traceback(dense):
    f, g, _ = dense
    bounds = proved(of(f), LOWER, UPPER, certificate(f, LOWER, UPPER))[1]
    with pytest.raises(CheckError, match="not related"):
        Difference(bounds, of(g), True).deviation()
    with pytest.raises(CheckError, match="first record"):
        read(iter([{"record": "header"}]))


# -- small cases, each with a deviation that is known ------------------------------------------------------------------


def deviation(f, g, hints, lower, upper, eps=0.0):
    box = {"lower": np.asarray(lower, float), "upper": np.asarray(upper, float)}
    return check_records(f, g, bundle(f, g, hints, "certified", eps, **box)).deviation


def affine(weight, bias):
    return ops.Affine(np.array(weight, np.float32), np.array(bias, np.float32))


def test_a_linear_unit_that_cuts_is_paid_for():
    f = chain((1,), affine([[1]], [2]), ops.ReLU(), affine([[1]], [0]))
    for shift, cut in ((1.0, 0.0), (0.75, 0.25)):  # on [-1, 1], relu(x + shift) + 2 - shift is x + 2 but where it cuts
        g = chain((1,), affine([[1]], [shift]), ops.ReLU(), affine([[1]], [2 - shift]))
        assert deviation(f, g, [relation(1, 1, [-1])], [-1], [1]) == cut


def test_a_linear_unit_that_f_does_not_have_counts():
    f = chain((1,), affine([[1]], [0]), ops.ReLU(), affine([[1]], [0]))
    g = chain((1,), affine([[1], [1]], [0, 2]), ops.ReLU(), affine([[1, 0.5]], [0]))
    assert deviation(f, g, [relation(1, 1, [0, -1])], [-1], [1]) == 1.5


def test_bits_that_are_cut_off_are_paid_for():
    f = chain((2,), affine([[0, 0]], [0]))
    g = chain((2,), affine([[1, 2.0**-70]], [-1]))
    assert deviation(f, g, [], [1, 0], [1, 1]) == 2.0**-70
    assert 2.0**-70 <= deviation(f, g, [], [1, 0], [1, 1], eps=1e-300) <= 2.0**-57


def test_a_constant_channel_is_missed_at_the_border():
    """Folding a channel that is 1 into the bias of a padded convolution changes the border."""
    lower, upper = np.zeros((1, 3, 3)), np.ones((1, 3, 3))
    first = ops.Conv2d(np.array([1, 0], np.float32).reshape(2, 1, 1, 1), np.array([0, 1], np.float32))

    def network(padding, weight, bias, op):
        conv = ops.Conv2d(weight, np.array([bias], np.float32), padding=(padding,) * 4)
        return chain((1, 3, 3), op, ops.ReLU(), conv, ops.ReLU())

    alone = replace(first, weight=first.weight[:1], bias=first.bias[:1])
    weight = np.ones((1, 2, 3, 3), np.float32)
    for padding, wrong in ((0, 0.0), (1, 5.0)):  # at a corner 4 of 9 taps see the channel
        f, g = network(padding, weight, 1, first), network(padding, weight[:, :1], 10, alone)
        hints = [relation(1, 1, [0]), relation(3, 3, [0])]
        assert deviation(f, g, hints, lower, upper) == wrong
        assert Fraction(wrong) >= worst(f, g, lower, upper)


@pytest.mark.parametrize("slope", [0.0, 1.0, 0.5])
def test_lines_cost_their_distance(slope):
    """f = relu(x) on [-1, 3], g = slope * x as a linear unit: the distance is largest at -1, 0 or 3."""
    f = chain((1,), affine([[1]], [0]), ops.ReLU(), affine([[1]], [0]))
    g = chain((1,), affine([[slope]], [9]), ops.ReLU(), affine([[1]], [-9]))
    found = deviation(f, g, [line(1, [0], [slope]), relation(1, 1, [-1])], [-1], [3])
    assert np.isclose(found, max(slope, 3 * (1 - slope)), rtol=1e-15) and found >= max(slope, 3 * (1 - slope))
    if 0 < slope < 1:                      # without the line relu(x) and slope * x are taken to be unrelated
        assert deviation(f, g, [relation(1, 1, [-1])], [-1], [3]) > 3 * (1 - slope)


def test_the_kink_of_a_line_counts():
    """0.75 x + 0.75 is the chord of relu on [-1, 3]: equal at both ends, 0.75 off at 0."""
    f = chain((1,), affine([[1]], [0]), ops.ReLU(), affine([[1]], [0]))
    g = chain((1,), affine([[0.75]], [9]), ops.ReLU(), affine([[1]], [-8.25]))
    assert np.isclose(deviation(f, g, [line(1, [0], [0.75]), relation(1, 1, [-1])], [-1], [3]), 0.75, rtol=1e-15)


def two_branches(of_first, of_second):
    nodes = [Node("a", affine([[1]], [0]), (INPUT,)), Node("b", ops.ReLU(), (0,)), Node("c", affine([[-1]], [1]), (INPUT,)),
             Node("d", ops.ReLU(), (2,)), Node("e", ops.Add(), (of_first, of_second))]
    return build(nodes, (1,), np.float32)


def test_a_sum_of_other_branches_is_another_sum():
    """relu(x) + relu(1 - x) is 1 on [0, 1], 2 relu(x) goes from 0 to 2."""
    f, g = two_branches(1, 3), two_branches(1, 1)
    assert deviation(f, f, [relation(1, 1, [0]), relation(3, 3, [0])], [0], [1]) == 0
    assert deviation(f, two_branches(3, 1), [relation(1, 1, [0]), relation(3, 3, [0])], [0], [1]) == 0
    assert deviation(f, g, [relation(1, 1, [0])], [0], [1]) == 1


def test_an_operand_that_is_not_zero_cannot_leave_a_sum():
    f = two_branches(1, 3)
    g = build([f.nodes[0], f.nodes[1]], (1,), np.float32)
    for low, found in ((1.0, 0.0), (0.0, 1.0)):          # relu(1 - x) is 0 from 1 on
        assert deviation(f, g, [relation(1, 1, [0])], [low], [2]) == found


def test_scales_are_compared_in_both_numbers():
    def network(scale, shift):
        op = ops.Scale(np.array([scale, 1], np.float32), np.array([shift, 0], np.float32))
        return chain((2,), op, ops.ReLU(), affine([[1, 1]], [0]))

    for scale, shift, found in ((2, 1, 0.0), (2, 1.25, 0.25), (2.5, 1, 0.5)):
        assert deviation(network(2, 1), network(scale, shift), [relation(1, 1, [0, 1])], [0, 0], [1, 1]) == found
