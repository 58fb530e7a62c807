"""Level float: computed values in any order of summation stay within the bound of the exact ones."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.compress import Kind, compress_network, measured
from exactprune.compress.floating import float_level, forward_error
from exactprune.domain import uniform
from exactprune.ops import Affine, AvgPool2d, Conv2d, MaxPool2d, ReLU, Reshape


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def dense(tools, rng):
    return tools.chain((6,), Affine(normal(rng, 9, 6), normal(rng, 9)), ReLU(), Affine(normal(rng, 7, 9), normal(rng, 7)), ReLU(),
                       Affine(normal(rng, 2, 7), normal(rng, 2)))


def conv(tools, rng):
    return tools.chain((2, 4, 4), Conv2d(normal(rng, 3, 2, 3, 3), normal(rng, 3), padding=(1,) * 4), ReLU(),
                       MaxPool2d((2, 2), (1, 1)), AvgPool2d((2, 2), (1, 1)), Reshape((12,)),
                       Affine(normal(rng, 2, 12), normal(rng, 2)))


def in_order(network, x, order):
    """A plain float32 run of affine layers and ReLUs that sums one product after the other, in a given order."""
    for node in network.nodes:
        if isinstance(node.op, ReLU):
            x = np.maximum(x, np.float32(0))
            continue
        total = node.op.bias.copy()
        for j in order(len(x)):
            total = (total + node.op.weight[:, j] * x[j]).astype(np.float32)
        x = total
    return x


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), convolution=st.booleans())
def test_computed_values_stay_within_the_bound(tools, seed, convolution):
    rng = np.random.default_rng(seed)
    f = (conv if convolution else dense)(tools, rng)
    box = uniform(-1, 2, f.input_shape)
    bound = forward_error(f, box, tools.verdicts(f, box))
    for x in np.concatenate([box.sample(3, rng), box.corners(3, rng)]).astype(np.float32):
        true = tools.exact(f, x)
        runs = [f.evaluate(x)]
        if not convolution:
            runs += [in_order(f, x, lambda n: np.arange(n)), in_order(f, x, rng.permutation)]
        for computed in runs:
            off = [abs(Fraction(float(a)) - b) for a, b in zip(computed.ravel(), true.ravel(), strict=True)]
            assert all(a <= Fraction(float(b)) for a, b in zip(off, bound.ravel(), strict=True))


def test_the_bound_is_met_by_a_single_rounding(tools):
    """1 + 2^-24 rounds to 1: the error is 2^-24, and the bound at most a few times that."""
    f = tools.chain((1,), Affine(np.float32([[1.0]]), np.float32([2.0**-24])))
    (bound,) = forward_error(f, uniform(0, 1, (1,)), ())
    assert float(f.evaluate(np.float32([1.0]))[0]) == 1.0
    assert 2.0**-24 <= bound <= 4 * 2.0**-24


def test_float_level_adds_up_and_is_no_claim_without_a_proof(tools):
    rng = np.random.default_rng(0)
    f = dense(tools, rng)
    box = uniform(0, 1, f.input_shape)
    known = tools.verdicts(f, box)
    rewrite = compress_network(f, box, known, max_deviation=0.1)
    level = float_level(f, rewrite.network, box, known, rewrite.verdicts, rewrite.level)
    assert level is not None and level.kind is Kind.FLOAT and level.eps > rewrite.eps
    for x in box.sample(50, rng).astype(np.float32):
        assert np.abs(f.evaluate(x) - rewrite.network.evaluate(x)).max() <= level.eps
    assert float_level(f, rewrite.network, box, known, rewrite.verdicts, measured(0.0, 10)) is None


@pytest.mark.parametrize("scale", [1e20, 1e38])
def test_nothing_is_claimed_where_a_sum_can_overflow(tools, scale):
    f = tools.chain((3,), Affine(np.full((2, 3), scale, np.float32), np.zeros(2, np.float32)), ReLU(),
                    Affine(np.full((1, 2), scale, np.float32), np.zeros(1, np.float32)))
    box = uniform(0, 1, (3,))
    known = tools.verdicts(f, box)
    assert float_level(f, f, box, known, known, compress_network(f, box, known).level) is None
