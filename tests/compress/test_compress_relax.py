"""Relaxed neurons: a line is within its gap of the ReLU, and unstable neurons go when the budget covers it, never else."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.claim import LayerVerdict, Status
from exactprune.compress import compress_network
from exactprune.compress.rules.relax import lines_of
from exactprune.domain import uniform
from exactprune.ops import Affine, Conv2d, ReLU


def layer(lower, upper, status=None):
    size = len(lower)
    return LayerVerdict(0, "r", (size,), [Status.UNSTABLE] * size if status is None else status, [0] * size, lower, upper)


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-1e6, -1e-6), high=st.floats(1e-6, 1e6), share=st.fractions(0, 1))
def test_a_line_stays_within_its_gap(low, high, share):
    (slope,), (shift,), (gap,) = (getattr(lines_of(layer([low], [high])), name) for name in ("slope", "shift", "gap"))
    for z in (Fraction(low), Fraction(0), Fraction(high), Fraction(low) + share * (Fraction(high) - Fraction(low))):
        off = abs(max(z, Fraction(0)) - Fraction(slope) * z - Fraction(shift))
        assert off <= Fraction(gap) + Fraction(2.0**-50) * (abs(z) + Fraction(shift))   # the caller adds the rounding
    assert gap <= min(high, -low) / 2 * (1 + 1e-9)


def test_unknown_and_stable_channels_get_no_line():
    given_status = [Status.UNKNOWN, Status.ACTIVE, Status.INACTIVE, Status.UNSTABLE]
    assert lines_of(layer([-1, 0, -2, -1], [1, 2, 0, 1], given_status)).channels.tolist() == [3]


def almost_stable(tools, rng):
    """Neuron 0 exceeds 0 by 1e-4 at most, neuron 1 falls below it by 1e-4 at most, the others are far from stable."""
    weight = rng.standard_normal((6, 4)).astype(np.float32)
    bias = np.zeros(6, np.float32)
    bias[0] = 1e-4 - np.maximum(weight[0], 0).sum()
    bias[1] = -1e-4 - np.minimum(weight[1], 0).sum()
    bias[2:] = -weight[2:].sum(axis=1) / 2
    last = Affine(rng.standard_normal((3, 6)).astype(np.float32), np.zeros(3, np.float32))
    return tools.chain((4,), Affine(weight, bias), ReLU(), last)


@pytest.mark.parametrize(("budget", "gone"), [("exact", set()), ("rounding", set()), (1e-2, {0})])
def test_almost_stable_neurons_need_a_budget(tools, budget, gone):
    rng = np.random.default_rng(0)
    f = almost_stable(tools, rng)
    box = uniform(0, 1, (4,))
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation=budget)
    assert gone <= {r.index for r in rewrite.removals if r.rule == "relax"} <= {0, 1}
    worst = max(np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() for x in box.corners(16, rng))
    assert worst <= Fraction(rewrite.eps) and rewrite.eps <= max(rewrite.budget, 0)


def test_unknown_is_never_relaxed(tools):
    f = almost_stable(tools, np.random.default_rng(0))
    box = uniform(0, 1, (4,))
    (known,) = tools.verdicts(f, box)
    unknown = LayerVerdict(0, "r", (6,), [Status.UNKNOWN] * 6, [0] * 6, known.lower, known.upper, {0: "timed out"})
    assert compress_network(f, box, (unknown,), max_deviation=100.0).network is f


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), budget=st.sampled_from([1e-3, 0.1, 1.0, 100.0]), convolution=st.booleans())
def test_the_budget_is_never_exceeded(tools, seed, budget, convolution):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if convolution:
        f = tools.chain((1, 4, 4), Conv2d(normal(5, 1, 2, 2), normal(5)), ReLU(),
                        Conv2d(normal(3, 5, 2, 2), normal(3), padding=(1,) * 4), ReLU(), Conv2d(normal(2, 3, 2, 2), normal(2)))
    else:
        f = tools.chain((3,), Affine(normal(6, 3), normal(6)), ReLU(), Affine(normal(5, 6), normal(5)), ReLU(),
                        Affine(normal(2, 5), normal(2)))
    box = uniform(0, 1, f.input_shape)
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation=budget)
    assert rewrite.eps <= budget and rewrite.network.parameters <= f.parameters
    for x in np.concatenate([box.sample(2, rng), box.corners(3, rng)]):
        assert np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() <= Fraction(rewrite.eps)


@pytest.mark.slow
def test_the_budget_is_never_exceeded_on_many(tools):
    for seed in range(200):
        test_the_budget_is_never_exceeded.hypothesis.inner_test(tools, seed, (1e-3, 0.1, 1.0, 100.0)[seed % 4], seed % 8 > 3)
