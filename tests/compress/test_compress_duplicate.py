"""Proportional neurons: planted ones are found whatever their status, exactly where nothing rounds, else certified."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.compress import EXACT, Kind, compress_network
from exactprune.domain import uniform
from exactprune.ops import AvgPool2d, MaxPool2d, ReLU, Reshape


def planted(op, source, target, ratio, noise=0.0):
    """The mixer with output unit ``target`` equal to ``ratio`` times ``source``."""
    weight, bias = op.weight.copy(), op.bias.copy()
    weight[target], bias[target] = weight[source] * ratio, bias[source] * ratio
    weight[target].flat[0] += noise
    return replace(op, weight=weight, bias=bias)


def unstable(tools, rng, m, n):
    """Random units none of which is stable on [-1, 1]."""
    op = tools.affine(rng, m, n)
    return replace(op, weight=op.weight + np.float32(0.0625), bias=op.bias / np.float32(16))


def compress(tools, f, **options):
    box = uniform(-1, 1, f.input_shape)
    rewrite = compress_network(f, box, tools.verdicts(f, box), **options)
    rng = np.random.default_rng(0)
    worst = max(np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max()
                for x in np.concatenate([box.sample(3, rng), box.corners(3, rng)]))
    assert worst <= Fraction(rewrite.eps) and rewrite.network.output_shape == f.output_shape
    return rewrite


def gone(rewrite):
    return {(r.layer, r.index) for r in rewrite.removals if r.rule == "duplicate"}


def test_exact_duplicates_and_multiples_go_at_level_exact(tools):
    rng = np.random.default_rng(0)
    first = planted(planted(unstable(tools, rng, 6, 4), 0, 3, 1.0), 1, 5, 0.5)
    f = tools.chain((4,), first, ReLU(), tools.affine(rng, 3, 6), ReLU(), tools.affine(rng, 2, 3))
    rewrite = compress(tools, f, max_deviation="exact")
    assert gone(rewrite) == {(0, 3), (0, 5)} and rewrite.level == EXACT


def test_three_copies_become_one(tools):
    rng = np.random.default_rng(1)
    first = planted(planted(unstable(tools, rng, 5, 4), 1, 2, 1.0), 1, 4, 2.0)
    rewrite = compress(tools, tools.chain((4,), first, ReLU(), tools.affine(rng, 3, 5)), max_deviation="exact")
    assert gone(rewrite) == {(0, 2), (0, 4)} and rewrite.network.shapes[0] == (3,)


def test_the_larger_of_two_stays_where_only_that_ratio_is_a_float(tools):
    rng = np.random.default_rng(6)
    f = tools.chain((4,), planted(unstable(tools, rng, 5, 4), 3, 1, 3.0), ReLU(), tools.affine(rng, 3, 5))
    assert gone(compress(tools, f, max_deviation="exact")) == {(0, 1)}


def test_negative_multiples_and_rounding_sums_stay_at_level_exact(tools):
    rng = np.random.default_rng(2)
    f = tools.chain((4,), planted(unstable(tools, rng, 4, 4), 0, 2, -1.0), ReLU(), tools.affine(rng, 3, 4))
    assert compress(tools, f, max_deviation="exact").network is f
    last = tools.affine(rng, 3, 4)
    weight = last.weight.copy()
    weight[:, 0], weight[:, 2] = 1.0, 2.0**-30               # the sum is no float32
    f = tools.chain((4,), planted(unstable(tools, rng, 4, 4), 0, 2, 1.0), ReLU(), replace(last, weight=weight))
    assert compress(tools, f, max_deviation="exact").network is f
    rewrite = compress(tools, f)
    assert gone(rewrite) == {(0, 2)} and rewrite.level.kind is Kind.CERTIFIED and 0 < rewrite.eps <= rewrite.budget


def test_almost_duplicates_need_a_budget(tools):
    rng = np.random.default_rng(3)
    first = planted(unstable(tools, rng, 5, 4), 0, 2, 1.0, noise=2.0**-14)
    f = tools.chain((4,), first, ReLU(), tools.affine(rng, 3, 5))
    assert compress(tools, f, max_deviation="exact").network is f
    assert gone(compress(tools, f)) == set()
    rewrite = compress(tools, f, max_deviation=1e-2)
    assert gone(rewrite) == {(0, 2)} and 2.0**-20 < rewrite.eps <= 1e-2


@pytest.mark.parametrize("pool", [None, MaxPool2d((2, 2), (2, 2)), AvgPool2d((2, 2), (2, 2), (1, 1, 1, 1))])
def test_channels_through_padding_and_pools(tools, pool):
    rng = np.random.default_rng(4)
    first = planted(tools.conv(rng, 5, 2), 1, 3, 2.0)
    behind = [tools.conv(rng, 3, 5)] if pool is None else [pool, tools.conv(rng, 3, 5)]
    f = tools.chain((2, 4, 4), first, ReLU(), *behind)
    assert gone(compress(tools, f, max_deviation="exact")) == {(0, 3)}


def test_channels_through_flatten(tools):
    rng = np.random.default_rng(5)
    first = planted(tools.conv(rng, 4, 2), 0, 2, 1.0)
    f = tools.chain((2, 3, 3), first, ReLU(), Reshape((36,)), tools.affine(rng, 3, 36))
    rewrite = compress(tools, f, max_deviation="exact")
    assert gone(rewrite) == {(0, 2)} and rewrite.network.nodes[-1].op.weight.shape == (3, 27)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ratio=st.sampled_from([1.0, 0.5, 3.0, 1 / 3, 0.1]),
       budget=st.sampled_from(["exact", "rounding", 1e-3]))
def test_random_networks_with_multiples(tools, seed, ratio, budget):
    rng = np.random.default_rng(seed)
    first = planted(unstable(tools, rng, 6, 4), 0, int(rng.integers(1, 6)), np.float32(ratio))
    second = planted(tools.affine(rng, 5, 6), 1, 3, np.float32(ratio))
    f = tools.chain((4,), first, ReLU(), second, ReLU(), tools.affine(rng, 2, 5))
    rewrite = compress(tools, f, max_deviation=budget)
    if budget != "exact":
        assert any(r.layer == 0 for r in rewrite.removals)


@pytest.mark.slow
def test_many_random_networks_with_multiples(tools):
    for seed in range(200):
        ratio = (1.0, 0.5, 3.0, 1 / 3, 0.1)[seed % 5]
        test_random_networks_with_multiples.hypothesis.inner_test(tools, seed, ratio, ("exact", "rounding", 1e-3)[seed % 3])
