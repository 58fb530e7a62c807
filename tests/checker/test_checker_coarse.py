"""The coarse arithmetic of backward substitution: every rounding goes up, and it loses little."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import prover
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune import ops
from exactprune.checker import coarse
from exactprune.checker.coarse import Part, Rows
from exactprune.checker.forward import ForwardStep, Points
from exactprune.checker.layers import Linear
from exactprune.checker.network import Op
from exactprune.network import Node, build

SEEDS = st.integers(0, 2**32 - 1)


def number(x, exponent=0):
    return Fraction(float(x)) * Fraction(2) ** int(exponent)


def form(rows, r):
    return [number(x, rows.exponent[r]) for x in rows.values[:, r]]


def random_floats(rng, *shape):
    """Mixed magnitudes and signs, some zero."""
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-40, 20, shape) * (rng.random(shape) < 0.8)


def random_rows(rng, n, rows):
    values = np.clip(np.rint(rng.standard_normal((n, rows)) * 2.0**26), -(2.0**28), 2.0**28)
    return Rows(values, rng.integers(-60, 20, rows))


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_weights_are_limbs_up_to_the_stated_error(seed):
    rng = np.random.default_rng(seed)
    terms = int(rng.choice([1, 50, 800, 4000, 20000]))
    weight = random_floats(rng, 1, 4, 5).astype(rng.choice([np.float32, np.float64])).astype(np.float64)
    cut = coarse.cut_weights(weight, terms)
    error = Fraction(0) if cut.error is None else Fraction(2) ** cut.error
    for place in np.ndindex(weight.shape):
        total = sum(number(limb[place], e) for limb, e in zip(cut.limbs, cut.exponents, strict=True))
        assert abs(total - Fraction(weight[place])) <= error
        assert weight[place] or not total
    most = max(np.abs(limb).max(initial=0.0) for limb in cut.limbs)
    assert most * (2**coarse.BITS + 8) * terms < 2**53, "products would not be exact"


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_gathered_rows_are_above_their_parts(seed):
    """v . y <= v' . y + constant for y >= shift; exactly equal to what it should be where nothing is rounded."""
    rng = np.random.default_rng(seed)
    n, rows = int(rng.integers(1, 6)), 3
    shift = coarse.shift_below(rng.standard_normal(n) * 2.0 ** rng.integers(-5, 5, n)) if rng.random() < 0.5 else None
    column = None if shift is None else shift[:, None]
    parts = [Part(np.rint(rng.standard_normal((n, rows)) * 2.0 ** rng.integers(0, 34)), rng.integers(-300, 300, rows),
                  bool(rng.integers(2)) and shift is not None) for _ in range(rng.integers(1, 4))]
    found, constant, top = coarse.gather(parts, column)
    s = np.zeros(n) if shift is None else shift
    assert (np.abs(found.values) <= 2**coarse.BITS + 8).all() and (found.values == np.rint(found.values)).all()
    for y in s + np.abs(random_floats(rng, 4, n)):
        for r in range(rows):
            truth = sum((number(p.values[j, r], p.exponent[r]) * (Fraction(y[j]) - (Fraction(s[j]) if p.shifted else 0))
                         for p in parts for j in range(n)), Fraction(0))
            have = sum((a * Fraction(b) for a, b in zip(form(found, r), y, strict=True)), Fraction(0))
            assert truth <= have + (0 if constant is None else Fraction(constant[r]))
            assert all(abs(v) <= Fraction(2) ** int(top[r]) * (1 + Fraction(1, 2**20)) for v in form(found, r))


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_support_and_relaxation_are_above(seed):
    rng = np.random.default_rng(seed)
    n, rows, entries = int(rng.integers(1, 6)), 3, int(rng.choice([1, 3]))
    v = random_rows(rng, n, rows)
    ends = np.sort(random_floats(rng, 2, entries, n), axis=0)
    low, high = ends
    index = np.array([2, 0, 1]) if entries == 3 and rng.random() < 0.5 else None
    picked = [coarse._pick(b.T, index) for b in ends]
    bound = coarse.support(v, *picked)
    given_ = None
    if rng.random() < 0.6:
        given_ = (rng.integers(-(2**20), 2**20, (n, rows)), rng.integers(-30, 80, rows), rng.random((n, rows)) < 0.5)
    a, constant = coarse.relax(v, coarse.lines(low, high), index, given_)
    assert (np.abs(a.values) <= 2**coarse.BITS + 8).all()
    for r in range(rows):
        entry = 0 if entries == 1 else r if index is None else int(index[r])
        for t in ([*low[entry]], [*high[entry]], [0.0] * n, [*((low + high)[entry] / 2)]):
            z = [Fraction(float(np.clip(x, low[entry, j], high[entry, j]))) for j, x in enumerate(t)]
            assert sum((x * y for x, y in zip(form(v, r), z, strict=True)), Fraction(0)) <= Fraction(bound[r])
            relu = sum((x * max(y, Fraction(0)) for x, y in zip(form(v, r), z, strict=True)), Fraction(0))
            line = sum((x * y for x, y in zip(form(a, r), z, strict=True)), Fraction(0))
            assert relu <= line + Fraction(constant[r])


def test_a_chord_that_rounds_to_one_is_not_taken_for_an_active_neuron():
    """u / (u - l) = 1.0 in float64 for l = -1e-30: relu(z) - z is up to 1e-30 there, and has to be paid for."""
    bounds = coarse.lines(np.array([[-1e-30]]), np.array([[1.0]]))
    assert bounds.chord[0, 0] == 1.0 and not bounds.active[0]
    _, constant = coarse.relax(Rows(np.array([[2.0**20]]), np.array([0])), bounds, None, None)
    assert constant[0] >= 2.0**20 * 1e-30


@pytest.mark.parametrize("bad", [1e200, np.inf, np.nan])
def test_bounds_beyond_its_range_are_refused(bad):
    v = Rows(np.ones((1, 1)), np.zeros(1, np.int64))
    with pytest.raises(OverflowError):
        coarse.support(v, np.array([[-bad]]), np.array([[bad]]))
    with pytest.raises(OverflowError):
        coarse.lines(np.array([[-bad]]), np.array([[bad]]))


def residual(rng):
    def conv(out, into, stride, source):
        weight = rng.standard_normal((out, into, 3, 3)) / np.sqrt(9 * into)
        return Node("conv", ops.Conv2d(weight, rng.standard_normal(out) * 0.1, (stride, stride), (1, 1, 1, 1)), (source,))

    nodes = [conv(8, 3, 2, -1), Node("r", ops.ReLU(), (0,)), conv(8, 8, 1, 1), Node("r", ops.ReLU(), (2,)), conv(8, 8, 1, 3),
             Node("add", ops.Add(), (4, 1)), Node("r", ops.ReLU(), (5,)), conv(8, 8, 2, 6), Node("r", ops.ReLU(), (7,))]
    return build(nodes, (3, 16, 16), np.float32)


def test_it_loses_little_against_exact_arithmetic():
    """Lemmas rest on lemmas: with 23-bit rows paid for at interval ranges a residual network lost 1e-4 of a neuron's range."""
    rng = np.random.default_rng(3)
    network = residual(rng)
    centre = rng.standard_normal((3, 16, 16))
    bounds = prover.fresh_bounds(network, centre - 0.01, centre + 0.01)
    for layer, size in enumerate((512, 512, 512, 128)):
        bounds.reach(layer)
        some = np.arange(0, size, 40)
        for sign, side in ((1, "upper"), (-1, "lower")):
            signs = np.full(len(some), sign)
            rough = bounds.maximise(layer, some, signs, bounds.domain(layer))
            truth = bounds.maximise(layer, some, signs, bounds.domain(layer), exact=True)
            assert (rough >= truth).all()
            width = bounds.upper[layer][some] - bounds.lower[layer][some]
            assert (rough - truth <= 1e-5 * width).all()
            every = np.arange(size)
            bounds.narrow(layer, every, side, bounds.maximise(layer, every, np.full(size, sign), bounds.domain(layer)))


# -- forward -----------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_forward_values_and_ranges_enclose_exact_ones(seed):
    """Limbs of mixed magnitudes, two layers; and a range that is exactly 0 is found to be 0."""
    rng = np.random.default_rng(seed)
    n, m, count = int(rng.integers(1, 40)), int(rng.integers(1, 5)), 3
    weight, bias = random_floats(rng, m, n) * 2.0 ** rng.integers(-60, 60), random_floats(rng, m)
    zero = int(rng.integers(m))
    low = rng.standard_normal(n)
    high = low + rng.random(n)
    weight[zero], bias[zero] = 0.0, 0.0
    weight[zero, 0] = 2.0 ** rng.integers(-40, 40)
    bias[zero] = -weight[zero, 0] * high[0]  # the product is rounded, so the maximum may be 0 or just beside it
    layer = Linear(Op("Affine", {"weight": weight, "bias": bias}), (n,), (m,))
    step = ForwardStep(layer)
    points = np.clip(low + (high - low) * rng.random((count, n)), low, high)
    found = step.points(Points(points, np.zeros(count)))
    least, most = (b.reshape(-1) for b in step.range(low[None], high[None]))
    for i in range(m):
        w, b = [Fraction(x) for x in weight[i]], Fraction(bias[i])
        for p in range(count):
            truth = sum((a * Fraction(x) for a, x in zip(w, points[p], strict=True)), b)
            assert abs(truth - Fraction(found.values[p, i])) <= Fraction(found.radius[p])
        top, bottom = (sum((a * Fraction(u if (a >= 0) == up else v) for a, v, u in zip(w, low, high, strict=True)), b)
                       for up in (True, False))
        assert Fraction(least[i]) <= bottom and top <= Fraction(most[i])
        assert (most[i] <= 0) == (top <= 0) and (least[i] >= 0) == (bottom >= 0), "signs of a range are exact"
        size = sum((abs(a) for a in w), abs(b)) + 1
        assert Fraction(most[i]) - top <= (size + Fraction(found.values.__abs__().max())) * max(
            1, Fraction(np.abs(weight).max())) * Fraction(1, 2**30)


def test_forward_gives_up_beyond_its_range():
    layer = Linear(Op("Affine", {"weight": np.ones((1, 1)), "bias": np.zeros(1)}), (1,), (1,))
    for bad in (1e200, np.inf, np.nan):
        with pytest.raises(OverflowError):
            ForwardStep(layer).points(Points(np.array([[bad]]), np.zeros(1)))
    huge = Linear(Op("Affine", {"weight": np.full((1, 1), 1e200), "bias": np.zeros(1)}), (1,), (1,))
    with pytest.raises(OverflowError):
        ForwardStep(huge)


def test_a_tiny_weight_beside_a_huge_one_is_not_lost():
    """z = 2**900 * 0 + 2**-900 * 1 > 0: scaling rows to a grid must not underflow to 0."""
    weight = np.array([[2.0**900, 2.0**-900]])
    network = build([Node("a", ops.Affine(weight, np.zeros(1)), (-1,)), Node("r", ops.ReLU(), (0,))], (2,), np.float64)
    bounds = prover.fresh_bounds(network, np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    bounds.reach(0)
    assert 0 < bounds.lower[0][0] <= 2.0**-900 <= bounds.upper[0][0]
    for exact in (False, True):
        found = bounds.maximise(0, np.array([0]), np.array([1]), bounds.domain(0), exact=exact)
        assert found[0] >= 2.0**-900
