"""The checker's arithmetic and bounds against exact rational evaluation (Fractions), for every operator."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import prover
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune import ops
from exactprune.checker import check, dyadic, witness
from exactprune.checker.bounds import Multipliers
from exactprune.checker.boxes import local_bounds
from exactprune.checker.layers import layers
from exactprune.checker.network import of
from exactprune.network import Node, build

SEEDS = st.integers(0, 2**32 - 1)


def weights(rng, *shape, ill=True):
    """Weights of mixed magnitudes, some zero, some tiny."""
    kind = rng.integers(0, 4) if ill else 0
    w = rng.standard_normal(shape)
    if kind == 1:
        w = w * 10.0 ** rng.integers(-4, 5, shape)
    if kind == 2:
        w = np.where(rng.random(shape) < 0.5, w * 1e-30, w)
    if kind == 3:
        w = rng.integers(-3, 4, shape) / 4.0
    return w


def chain(rng, layout, dtype, ill=True):
    """Affine and ReLU layers."""
    nodes = []
    for n_in, n_out in itertools.pairwise(layout):
        affine = ops.Affine(weights(rng, n_out, n_in, ill=ill), weights(rng, n_out, ill=ill))
        nodes.append(Node("a", affine, (len(nodes) - 1,)))
        nodes.append(Node("r", ops.ReLU(), (len(nodes) - 1,)))
    return build(nodes, (layout[0],), dtype)


def image(rng, dtype):
    """A residual convolutional network with every operator in it."""
    c = 2
    conv = ops.Conv2d(weights(rng, 4, 1, 2, 3), weights(rng, 4), stride=(1, 2), padding=(1, 0, 0, 2), dilation=(1, 1),
                      groups=2)
    nodes = [
        Node("scale", ops.Scale(weights(rng, c, 1, 1), weights(rng, c, 1, 1)), (-1,)),
        Node("conv", conv, (0,)),
        Node("relu", ops.ReLU(), (1,)),
        Node("conv2", ops.Conv2d(weights(rng, 4, 4, 3, 3), weights(rng, 4), padding=(2, 2, 2, 2), dilation=(2, 2)), (2,
                                                                                                                     )),
        Node("add", ops.Add(), (2, 3)),
        Node("relu", ops.ReLU(), (4,)),
        Node("pad", ops.Pad(((0, 0), (1, 0), (0, 1)), 0.3), (5,)),
        Node("max", ops.MaxPool2d((2, 2), (1, 1), (1, 0, 0, 1)), (6,)),
        Node("avg", ops.AvgPool2d((3, 2), (2, 1), (1, 1, 1, 0), bool(rng.integers(2))), (7,)),
        Node("transpose", ops.Transpose((1, 2, 0)), (8,)),
    ]
    size = int(np.prod(build(nodes, (c, 4, 5), dtype).output_shape))
    nodes += [
        Node("flat", ops.Reshape((size,)), (9,)),
        Node("fc", ops.Affine(weights(rng, 3, size), weights(rng, 3)), (10,)),
        Node("relu", ops.ReLU(), (11,)),
        Node("fc2", ops.Affine(weights(rng, 2, 3), weights(rng, 2)), (12,)),
        Node("relu", ops.ReLU(), (13,)),
    ]
    return build(nodes, (c, 4, 5), dtype)


def random_case(seed):
    rng = np.random.default_rng(seed)
    dtype = (np.float32, np.float64)[rng.integers(2)]
    layout = [int(rng.integers(1, 4)), *rng.integers(1, 6, int(rng.integers(1, 4))).tolist()]
    network = image(rng, dtype) if rng.random() < 0.2 else chain(rng, layout, dtype)
    lower = rng.standard_normal(network.input_shape)
    upper = lower + np.where(rng.random(network.input_shape) < 0.1, 0.0, rng.random(network.input_shape) * 2)
    return rng, network, lower, upper


def some_points(rng, lower, upper, count=3):
    corners = np.where(rng.random((count, *lower.shape)) < 0.5, lower, upper)
    inside = np.clip(lower + rng.random((count, *lower.shape)) * (upper - lower), lower, upper)
    return np.concatenate([corners, inside])


def pre_activations(network, points):
    """Exact values, [layer][point] -> list of Fractions."""
    values = [prover.exact_nodes(network, p.reshape(-1)) for p in points]
    return [[v[network.nodes[i].inputs[0]] for v in values] for i in network.relus]


def random_hints(rng, bounds, layer, rows):
    hints = {}
    for k in range(layer):
        shape = (rows, len(bounds.lower[k]))
        values = rng.integers(-(2**12), 2**12, shape)
        hints[k] = Multipliers(values, rng.integers(4, 16, rows), rng.random(shape) < 0.7)
    return hints


# -- arithmetic ------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_products_are_exact(seed, left, right):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 300))

    def big(bits, *shape):
        array = np.empty(shape, object)
        array.flat = [int.from_bytes(rng.bytes(26), "little") % (1 << bits) * int(rng.choice([-1, 1]))
                      for _ in range(array.size)]
        return array

    a, b = big(left, 3, k), big(right, k, 4)
    a, b = dyadic.narrow(a), dyadic.narrow(b)
    found = dyadic.product(a, dyadic.matrix(b, 0, k))
    assert (found == a.astype(object) @ b.astype(object)).all()
    again = dyadic.product(a, dyadic.matrix(np.ascontiguousarray(b.T), 0, k), transpose=True)
    assert (again == found).all()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_floats_are_read_exactly(numbers):
    values, exponent = dyadic.exact_int(np.array(numbers))
    for x, v in zip(numbers, values, strict=True):
        assert Fraction(x) == int(v) * Fraction(2) ** exponent


@given(st.integers(-(2**200), 2**200), st.integers(-1200, 800), st.integers(1, 100))
def test_rounding_to_float_goes_up(value, exponent, divisor):
    found = dyadic.float_up(value, exponent, divisor)
    truth = value * Fraction(2) ** exponent / divisor
    assert found == np.inf or Fraction(found) >= truth
    if -(2.0**900) < truth < 0 or 2.0**-900 < truth < 2.0**900:
        assert abs(Fraction(found) - truth) <= abs(truth) / 2**51 + Fraction(2) ** -1000
    if abs(value) < 2**61 and divisor == 1:
        row = dyadic.Dyadic(np.array([[value]], np.int64), np.array([exponent]))
        with np.errstate(over="ignore"):
            assert Fraction(max(min(float(dyadic.to_float_up(row)[0, 0]), 1e308), -1e308)) >= min(truth,
                                                                                                  Fraction(1e308))


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_float_sums_and_products_round_up(a, b):
    x, y = np.array([a]), np.array([b])
    with np.errstate(over="ignore"):
        total, product = dyadic.add_up(x, y)[0], dyadic.multiply_up(x, y)[0]
    assert total >= Fraction(a) + Fraction(b)
    assert product == np.inf or Fraction(float(max(product, -1e308))) >= min(Fraction(a) * Fraction(b), Fraction(1e308))


@given(SEEDS, st.integers(-1060, 900))
def test_scaling_rounds_up(seed, shift):
    x = np.random.default_rng(seed).standard_normal(5) * 2.0**-shift * 1000 if abs(shift) < 900 else np.array([5e-324,
                                                                                                               -5e-324])
    values = dyadic.scale_up(x, shift)
    assert all(Fraction(float(a)) * Fraction(2) ** shift <= int(v) for a, v in zip(x, values, strict=True))


# -- operators and bounds --------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_bounds_enclose_exact_values(seed):
    """Interval and backward bounds, coarse and exact, with fixed and random multipliers, hold at every point."""
    rng, network, lower, upper = random_case(seed)
    points = some_points(rng, lower, upper)
    truth = pre_activations(network, points)
    bounds = prover.fresh_bounds(network, lower, upper)
    for k, values in enumerate(truth):
        bounds.reach(k)
        most = [max(z[i] for z in values) for i in range(len(values[0]))]
        least = [min(z[i] for z in values) for i in range(len(values[0]))]
        neurons = np.arange(len(most))
        assert all(bounds.lower[k][i] <= least[i] and most[i] <= bounds.upper[k][i] for i in neurons)
        for exact, hinted in itertools.product((False, True), (False, True)):
            hints = random_hints(rng, bounds, k, len(neurons)) if hinted else None
            for sign, side in ((1, "upper"), (-1, "lower")):
                found = bounds.maximise(k, neurons, np.full(len(neurons), sign), bounds.domain(k), hints, exact)
                assert all(found[i] >= (most[i] if sign > 0 else -least[i]) for i in neurons), (k, exact, hinted, sign)
                bounds.narrow(k, neurons, side, found)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_bounds_on_sub_boxes_enclose_exact_values(seed):
    rng, network, lower, upper = random_case(seed)
    bounds = prover.fresh_bounds(network, lower, upper)
    cut = lower + rng.random((2, *lower.shape)) * (upper - lower)
    low, high = np.clip(cut.min(axis=0), lower, upper), np.clip(cut.max(axis=0), lower, upper)
    truth = pre_activations(network, some_points(rng, low, high, 2))
    for k, values in enumerate(truth):
        bounds.reach(k)
        lows, highs = (np.stack([a.reshape(-1), b.reshape(-1)]) for a, b in ((lower, low), (upper, high)))
        region = local_bounds(bounds, k, lows, highs)
        found_low, found_high = (b.copy() for b in region.relu[k])
        rows, neurons = (a.reshape(-1) for a in np.indices(found_low.shape))
        for sign in (1, -1):
            found = bounds.decide(k, neurons, np.full(len(rows), sign), region.rows(rows, 2)).reshape(found_low.shape)
            found_low, found_high = (found_low, found) if sign > 0 else (-found, found_high)
        for z in values:
            assert all(found_low[1, i] <= v <= found_high[1, i] and found_low[0, i] <= v <= found_high[0, i] for i,
                       v in enumerate(z))


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_exact_values_and_signs(seed):
    rng, network, lower, upper = random_case(seed)
    points = some_points(rng, lower, upper, 2)
    bounds = prover.fresh_bounds(network, lower, upper)
    for k, values in enumerate(pre_activations(network, points)):
        numbers, neurons = (a.reshape(-1) for a in np.indices((len(points), len(values[0]))))
        signs = witness.signs(bounds, k, points, numbers, neurons)
        assert signs.tolist() == [(v > 0) - (v < 0) for z in values for v in z]


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_forward_is_exact_for_every_operator(seed):
    rng = np.random.default_rng(seed)
    network = image(rng, np.float64)
    points = rng.standard_normal((2, *network.input_shape))
    net = of(network)
    values = {-1: dyadic.from_float(points)}
    for i, (node, layer) in enumerate(zip(net.nodes, layers(net), strict=True)):
        values[i] = layer.exact(*(values[j] for j in node.inputs))
    for row, point in enumerate(points):
        truth = prover.exact_nodes(network, point.reshape(-1))
        for i in range(len(net.nodes)):
            v = values[i]
            scale = Fraction(2) ** int(v.exponent[row]) / v.divisor
            assert [int(n) * scale for n in v.values[row].reshape(-1)] == truth[i], net.nodes[i].op.kind


# -- claims against the exact maximum in one dimension ---------------------------------------------------------------


def exact_maximum(network, node, lower, upper):
    """Exact (max, min) per neuron of a node of a chain with one input: piecewise linear, so at breakpoints or ends."""
    points = {Fraction(float(lower)), Fraction(float(upper))}
    position = 0
    while True:
        ordered = sorted(points)
        new = set()
        for i in network.relus:
            source = network.nodes[i].inputs[0]
            if source >= node:
                continue
            for a, b in itertools.pairwise(ordered):
                za, zb = (evaluate(network, x)[source] for x in (a, b))
                new |= {a + (b - a) * p / (p - q) for p, q in zip(za, zb, strict=True) if p * q < 0}
        if new <= points or position > len(network.relus):
            break
        points |= new
        position += 1
    values = [evaluate(network, x)[node] for x in points]
    return [max(z) for z in zip(*values, strict=True)], [min(z) for z in zip(*values, strict=True)]


def evaluate(network, x):
    values = {-1: [x]}
    for i, node in enumerate(network.nodes):
        (z,) = (values[j] for j in node.inputs)
        values[i] = prover.EXACT[node.op.kind](node.op, [z], None, None)
    return values


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_no_false_claim_is_accepted_and_true_ones_with_room_are(seed):
    """One input, two layers: what is accepted is true, random multipliers or not; optimal trees prove what has room."""
    rng = np.random.default_rng(seed)
    network = chain(rng, [1, 4, 3], np.float64, ill=False)
    lower, upper = np.zeros(1), np.ones(1)
    most, least = exact_maximum(network, 2, 0.0, 1.0)
    first_most, first_least = exact_maximum(network, 0, 0.0, 1.0)
    bounds = prover.fresh_bounds(network, lower, upper)
    bounds.reach(1)
    lines = [prover.header(network, lower, upper), prover.crown(1, range(3)),
             {"record": "linear", "layer": 1, "neurons": [2, 0, 1], "side": "upper",
              "multipliers": [prover.given(0, [3, 1, 0, 2], rng.integers(4, 12, 3), rng.integers(-999, 999, (3, 4)))]}]
    for i, side in itertools.product(range(3), ("upper", "lower")):
        tree = prover.optimal_tree(network, bounds, i, side)
        wild = [[prover.given(0, range(4), [int(rng.integers(4, 12))], rng.integers(-999, 999, 4))]
                for _ in tree["leaves"]]
        lines += [tree | {"leaves": wild}, tree]
    for claim in ("inactive", "active"):
        final = [prover.verdicts(k, n, **{claim: range(n)}) for k, n in enumerate((4, 3))]
        report = check(network, lower, upper, lines + final)
        assert not report.error
        for k, (tops, lows) in enumerate([(first_most, first_least), (most, least)]):
            for i, (top, low) in enumerate(zip(tops, lows, strict=True)):
                true = top <= 0 if claim == "inactive" else low >= 0
                accepted = i in report.layers[k].accepted
                assert true or not accepted, (k, i, claim)
                if k == 0:
                    assert accepted == true, "an interval bound of the first layer decides exactly"
                if abs(top if claim == "inactive" else low) > 1e-3:
                    assert accepted == true, (k, i, claim)


def design_case():
    w = np.array([[38.14555740356445], [4.355520725250244], [0.10518612712621689]])
    b = np.array([-5.195638656616211, -4.320352077484131, -0.051050830632448196])
    v = np.array([[1.081760287284851, 3.6640846729278564, 3.692793369293213]])
    return lambda c: build([Node("a", ops.Affine(w, b), (-1,)), Node("r", ops.ReLU(), (0,)),
                            Node("b", ops.Affine(v, np.array([c])), (1,)), Node("s", ops.ReLU(), (2,))], (1,),
                           np.float64)


@pytest.mark.parametrize(("shift", "inactive"), [(0.0, False), (-1.1e-5, True), (-9.9e-6, False)])
def test_a_maximum_of_1e_5_is_not_inactive(shift, inactive):
    network = design_case()(-35.97267493689556 + shift)
    top, _ = exact_maximum(network, 2, 0.0, 1.0)
    assert (top[0] <= 0) is inactive
    lower, upper = np.zeros(1), np.ones(1)
    bounds = prover.fresh_bounds(network, lower, upper)
    bounds.reach(1)
    lines = [prover.header(network, lower, upper), prover.crown(1, [0])]
    tree = prover.optimal_tree(network, bounds, 0, "upper", shift=40)
    boxes = prover.grow_boxes(bounds, 1, [(0, "upper")], depth=12)
    assert (boxes is not None) is inactive
    for proof in (tree, boxes):
        final = [*([proof] if proof else []), prover.verdicts(0, 3), prover.verdicts(1, 1, inactive=[0])]
        assert check(network, lower, upper, lines + final).accepted is inactive
    point = {"record": "points", "values": prover.pack([[1.0], [0.0]], "<f8")}
    seen = {"record": "unstable", "layer": 1, "neurons": [0], "positive": [0], "negative": [1]}
    report = check(network, lower, upper, [*lines, point, seen, prover.verdicts(0, 3), prover.verdicts(1, 1,
                                                                                                       unstable=[0])])
    assert report.accepted is not inactive


@pytest.mark.parametrize("m", [2.0**24, 2.0**53])
@pytest.mark.parametrize(("offset", "truth"), [(0.5, "unstable"), (1.0, "inactive"), (1.0 - 2**-40, "unstable"), (0.0,
                                                                                                                  "active")])
def test_cancellation_at_large_constants(m, offset, truth):
    """z = relu(x + M) - relu(offset) - M = x - offset for x in [0, 1]: floats lose it, integers do not."""
    network = build([Node("a", ops.Affine(np.array([[1.0], [0.0]]), np.array([m, offset])), (-1,)), Node("r",
                                                                                                         ops.ReLU(), (0,
                                                                                                                      )),
                     Node("b", ops.Affine(np.array([[1.0, -1.0]]), np.array([-m])), (1,)), Node("s", ops.ReLU(), (2,))],
                    (1,), np.float64)
    lower, upper = np.zeros(1), np.ones(1)
    for claim in ("inactive", "active", "unstable"):
        lines = [prover.header(network, lower, upper), prover.crown(1, [0]),
                 {"record": "points", "values": prover.pack([[1.0], [0.0]], "<f8")},
                 {"record": "unstable", "layer": 1, "neurons": [0], "positive": [0], "negative": [1]},
                 prover.verdicts(0, 2), prover.verdicts(1, 1, **{claim: [0]})]
        report = check(network, lower, upper, lines)
        assert not report.error
        assert report.accepted is (claim == truth)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_maximum_of_exactly_zero_is_inactive(seed):
    """Weights <= 0, bias 0, inputs >= 0: the maximum is 0 and attained; the strict case beside it is refused."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 30))
    w = -np.abs(weights(rng, 3, size))
    v = -np.abs(weights(rng, 2, 3))
    for bias in (0.0, 1e-300):
        network = build([Node("a", ops.Affine(w, np.zeros(3)), (-1,)), Node("r", ops.ReLU(), (0,)),
                         Node("b", ops.Affine(v, np.full(2, bias)), (1,)), Node("s", ops.ReLU(), (2,))], (size,),
                        np.float64)
        lower, upper = np.zeros(size), rng.random(size)
        lines = [prover.header(network, lower, upper), prover.crown(1, range(2)), prover.verdicts(0, 3,
                                                                                                  inactive=range(3)),
                 prover.verdicts(1, 2, inactive=range(2))]
        assert check(network, lower, upper, lines).accepted is (bias == 0.0)
