"""Opposite neurons: of z and -t z one becomes linear, where that pays, within the certified deviation."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.claim import LayerVerdict, Status
from exactprune.compress import compress_network
from exactprune.domain import uniform
from exactprune.ops import Affine, Conv2d, ReLU


def mirrored(op, ratio):
    """Every unit and, after them, -ratio times every unit."""
    factor = np.float32(-ratio)
    return replace(op, weight=np.concatenate([op.weight, factor * op.weight]),
                   bias=np.concatenate([op.bias, factor * op.bias]))


def compress(tools, f, budget):
    box = uniform(-1, 1, f.input_shape)
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation=budget)
    rng = np.random.default_rng(0)
    for x in np.concatenate([box.sample(3, rng), box.corners(3, rng)]):
        assert np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() <= Fraction(rewrite.eps)
    assert rewrite.eps <= rewrite.budget
    return rewrite


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_pairs_share_few_linear_units(tools, ratio):
    rng = np.random.default_rng(0)
    first = mirrored(Affine(normal(rng, 9, 5), normal(rng, 9) / 8), ratio)
    f = tools.chain((5,), first, ReLU(), Affine(normal(rng, 2, 18), normal(rng, 2)))
    rewrite = compress(tools, f, "rounding")
    assert rewrite.network.neurons == 9 + 2 and {r.rule for r in rewrite.removals} == {"opposite"}


def test_a_single_pair_is_left_alone(tools):
    rng = np.random.default_rng(1)
    f = tools.chain((5,), mirrored(Affine(normal(rng, 1, 5), normal(rng, 1) / 8), 1.0), ReLU(),
                    Affine(normal(rng, 2, 2), normal(rng, 2)))
    assert compress(tools, f, "rounding").network is f


def test_unknown_pairs_are_left_alone(tools):
    rng = np.random.default_rng(0)
    f = tools.chain((5,), mirrored(Affine(normal(rng, 9, 5), normal(rng, 9) / 8), 1.0), ReLU(),
                    Affine(normal(rng, 2, 18), normal(rng, 2)))
    box = uniform(-1, 1, (5,))
    (known,) = tools.verdicts(f, box)
    layer = LayerVerdict(0, "r", (18,), [Status.UNKNOWN] * 18, [0] * 18, known.lower, known.upper)
    assert compress_network(f, box, (layer,), max_deviation=1e-3).network is f


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), budget=st.sampled_from(["rounding", 1e-3, 1.0]), padding=st.integers(-1, 1))
def test_random_pairs(tools, seed, budget, padding):
    rng = np.random.default_rng(seed)
    ratio = float(rng.choice([1.0, 0.5, 0.7]))
    if padding < 0:
        first, last, shape = Affine(normal(rng, 5, 3), normal(rng, 5)), Affine(normal(rng, 1, 10), normal(rng, 1)), (3,)
    else:
        first, shape = Conv2d(normal(rng, 5, 1, 2, 1), normal(rng, 5)), (1, 3, 3)
        last = Conv2d(normal(rng, 1, 10, 2, 2), normal(rng, 1), padding=(padding,) * 4)
    compress(tools, tools.chain(shape, mirrored(first, ratio), ReLU(), last), budget)


@pytest.mark.slow
def test_many_random_pairs(tools):
    for seed in range(200):
        test_random_pairs.hypothesis.inner_test(tools, seed, ("rounding", 1e-3, 1.0)[seed % 3], seed // 3 % 3 - 1)
