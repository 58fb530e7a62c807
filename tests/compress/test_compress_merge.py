"""Merging and folding stably active neurons: planted low rank is found, the certified deviation holds."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.claim import LayerVerdict, Status
from exactprune.compress import Kind, compress_network
from exactprune.compress.budget import budget_of, largest_output
from exactprune.compress.deviation import evaluate_with_error, propagate
from exactprune.domain import Box, uniform
from exactprune.errors import OptionError
from exactprune.network import INPUT, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Pad, ReLU, Reshape, Transpose


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def active(rng, k, n, rank=None):
    """Affine with ``k`` outputs that are positive on [0, 1]^n; its weight has the given rank up to rounding."""
    weight = normal(rng, k, n) if rank is None else normal(rng, k, rank) @ normal(rng, rank, n)
    return Affine(weight, (np.minimum(weight, 0).astype(np.float64).sum(axis=1) * -1.01 + 0.1).astype(np.float32))


def mixed(rng, k, n, dead_sign, rank=None):
    """The active neurons above and two unstable ones."""
    op, other = active(rng, k, n, rank), normal(rng, 2, n)
    return Affine(np.concatenate([op.weight, other]), np.concatenate([op.bias, dead_sign * other.sum(axis=1) / 2]))


def verify(tools, f, rewrite, box, points=4, seed=0):
    """The certified deviation holds exactly at points and corners; the largest one seen."""
    rng = np.random.default_rng(seed)
    worst = Fraction(0)
    for x in np.concatenate([box.sample(points, rng), box.corners(points, rng)]):
        gap = np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max()
        worst = max(worst, gap)
    assert worst <= Fraction(rewrite.eps), (float(worst), rewrite.eps)
    assert rewrite.network.input_shape == f.input_shape and rewrite.network.output_shape == f.output_shape
    assert rewrite.network.parameters <= f.parameters and rewrite.network.dtype == f.dtype
    assert rewrite.eps <= rewrite.budget
    return float(worst)


def compress(tools, f, box=None, **options):
    box = box or uniform(0, 1, f.input_shape)
    rewrite = compress_network(f, box, tools.verdicts(f, box), **options)
    return rewrite, verify(tools, f, rewrite, box)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_few_outputs_bound_the_units(tools, dtype):
    rng = np.random.default_rng(0)
    f = tools.chain((6,), mixed(rng, 12, 6, -1), ReLU(), Affine(normal(rng, 2, 14), normal(rng, 2)), dtype=dtype)
    rewrite, worst = compress(tools, f, max_deviation=1e-4 if dtype == np.float32 else 1e-10)
    assert rewrite.network.neurons == 2 + 2                    # 12 active neurons, 2 outputs
    assert rewrite.level.kind is Kind.CERTIFIED and 0 < worst <= rewrite.eps <= 50 * worst
    assert {r.rule for r in rewrite.removals} == {"merge"} and len(rewrite.removals) == 12
    assert (rewrite.verdicts[0].status == Status.ACTIVE).sum() == 2 and list(rewrite.origin[0][1]) == [12, 13, -1, -1]


def test_planted_rank_in_either_factor(tools):
    rng = np.random.default_rng(1)
    wide = Affine(normal(rng, 20, 3) @ normal(rng, 3, 17), normal(rng, 20))
    for first, second in ((mixed(rng, 15, 8, -1, rank=3), Affine(normal(rng, 20, 17), normal(rng, 20))),
                          (mixed(rng, 15, 8, -1), wide)):
        f = tools.chain((8,), first, ReLU(), second, ReLU(), Affine(normal(rng, 3, 20), normal(rng, 3)))
        rewrite, _ = compress(tools, f, max_deviation=1e-3)
        assert rewrite.network.shapes[0] == (3 + 2,)


def test_rounding_budget_is_met_and_reported(tools):
    rng = np.random.default_rng(2)
    f = tools.chain((10,), mixed(rng, 30, 10, -1), ReLU(), Affine(normal(rng, 3, 32), normal(rng, 3)))
    rewrite, _ = compress(tools, f)
    box = uniform(0, 1, (10,))
    value, witness = largest_output(f, box)
    assert box.contains(witness[None]).all() and Fraction(value) <= np.abs(tools.exact(f, witness)).max()
    assert rewrite.reach == value and rewrite.budget == value * 2.0**-20 and 0 < rewrite.eps <= rewrite.budget
    assert rewrite.network.parameters < f.parameters / 3
    corners = box.corners(2000, np.random.default_rng(1))
    assert value >= np.abs(f.evaluate(corners, np.float64)).max() * 0.999


def test_new_units_stay_active_on_the_domain(tools):
    rng = np.random.default_rng(3)
    f = tools.chain((5,), mixed(rng, 9, 5, -1), ReLU(), Affine(normal(rng, 2, 11), normal(rng, 2)))
    rewrite, _ = compress(tools, f, max_deviation=1e-3)
    first = rewrite.network.nodes[0].op
    for unit in np.flatnonzero(rewrite.origin[0][1] == -1):
        weights = [Fraction(float(w)) for w in first.weight[unit]]
        low = Fraction(float(first.bias[unit])) + sum(min(w, 0) for w in weights)
        high = Fraction(float(first.bias[unit])) + sum(max(w, 0) for w in weights)
        assert low >= 0 and rewrite.verdicts[0].lower[unit] <= low and high <= rewrite.verdicts[0].upper[unit]


def test_constant_neurons_cost_no_unit(tools):
    rng = np.random.default_rng(4)
    op = mixed(rng, 8, 6, -1)
    weight = op.weight.copy()
    weight[:8] *= np.float32(1e-9)                              # "active neurons that are constants but for noise"
    f = tools.chain((6,), Affine(weight, op.bias), ReLU(), Affine(normal(rng, 3, 10), normal(rng, 3)))
    rewrite, _ = compress(tools, f)
    assert rewrite.network.neurons == 2


def test_a_layer_that_is_all_active_folds_or_loses_its_relu(tools):
    rng = np.random.default_rng(5)
    narrow = tools.chain((4,), active(rng, 30, 4), ReLU(), Affine(normal(rng, 5, 30), normal(rng, 5)), ReLU(),
                         Affine(normal(rng, 2, 5), normal(rng, 2)))
    rewrite, _ = compress(tools, narrow, max_deviation=1e-3)
    assert "fold" in {r.rule for r in rewrite.removals} and rewrite.network.nodes[0].op.weight.shape == (5, 4)
    low = Affine(normal(rng, 20, 1) @ normal(rng, 1, 30), normal(rng, 20))
    thin = tools.chain((40,), active(rng, 30, 40), ReLU(), low, ReLU(), Affine(normal(rng, 2, 20), normal(rng, 2)))
    rewrite, _ = compress(tools, thin, max_deviation=1e-2)
    assert rewrite.network.parameters < 40 + 1 + 20 + 20 + 60 and rewrite.network.neurons <= 20


def test_an_all_active_layer_read_twice(tools):
    rng = np.random.default_rng(6)
    nodes = [Node("a", active(rng, 9, 3), (INPUT,)), Node("r", ReLU(), (0,)),
             Node("b", Affine(normal(rng, 2, 9), normal(rng, 2)), (1,)),
             Node("c", Affine(normal(rng, 2, 9), normal(rng, 2)), (1,)), Node("d", ReLU(), (3,)),
             Node("e", Add(), (2, 4))]
    rewrite, _ = compress(tools, build(nodes, (3,), np.float32), max_deviation=1e-3)
    assert rewrite.network.neurons <= 2 and rewrite.removals


def test_exact_writes_no_new_weight(tools):
    rng = np.random.default_rng(7)
    f = tools.chain((6,), mixed(rng, 12, 6, -1), ReLU(), Affine(normal(rng, 2, 14), normal(rng, 2)))
    rewrite, worst = compress(tools, f, max_deviation="exact")
    assert rewrite.network is f and worst == 0 and rewrite.level.kind is Kind.EXACT


def test_unknown_is_never_merged(tools):
    rng = np.random.default_rng(8)
    f = tools.chain((6,), mixed(rng, 12, 6, -1), ReLU(), Affine(normal(rng, 2, 14), normal(rng, 2)))
    box = uniform(0, 1, (6,))
    (layer,) = tools.verdicts(f, box)
    hidden = type(layer)(0, layer.node, layer.shape, np.zeros(14), np.zeros(14), layer.lower, layer.upper)
    assert compress_network(f, box, (hidden,), max_deviation=1.0).network is f


@pytest.mark.filterwarnings("error")
def test_bounds_that_are_infinite_lead_to_nothing(tools):
    rng = np.random.default_rng(15)
    f = tools.chain((6,), mixed(rng, 12, 6, -1), ReLU(), Affine(normal(rng, 2, 14), normal(rng, 2)))
    layer = LayerVerdict(0, "r", (14,), np.zeros(14), np.zeros(14), np.full(14, -np.inf), np.full(14, np.inf))
    assert compress_network(f, uniform(0, 1, (6,)), (layer,), max_deviation=1.0).network is f


def test_the_chain_of_rewrites_is_json_and_adds_up(tools):
    rng = np.random.default_rng(16)
    f = tools.chain((6,), tools.killed(mixed(rng, 12, 6, -1), 0), ReLU(), mixed(rng, 8, 14, -1), ReLU(),
                    Affine(normal(rng, 2, 10), normal(rng, 2)))
    rewrite, _ = compress(tools, f, max_deviation=1e-2)
    chain = json.loads(json.dumps(rewrite.rewrites))
    assert [step["rule"] for step in chain] == [step.rule for step in rewrite.steps]
    assert {"remove", "merge"} <= {step["rule"] for step in chain}
    assert rewrite.eps >= sum(step["level"]["eps"] for step in chain) * (1 - 1e-12)
    layers = [units for _, units in rewrite.origin]
    assert [len(u) for u in layers] == [s[0] for s in (rewrite.network.shapes[i] for i in rewrite.network.relus)]
    gone = {(r.layer, r.index) for r in rewrite.removals}
    assert not gone & {(layer, int(u)) for layer, units in rewrite.origin for u in units}


# -- convolutions ---------------------------------------------------------------------------------------------------


def active_conv(rng, m, n, k, padding=0):
    weight = normal(rng, m, n, k, k)
    bias = -1.01 * np.minimum(weight, 0).astype(np.float64).sum(axis=(1, 2, 3)) + 0.1
    return Conv2d(weight, bias.astype(np.float32), padding=(padding,) * 4)


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_merge_where_nothing_pads_after_them(tools, padding):
    rng = np.random.default_rng(9)
    features = 2 * (3 + 2 * padding)**2
    f = tools.chain((1, 5, 5), active_conv(rng, 30, 1, 2, padding), ReLU(),
                    Conv2d(normal(rng, 2, 30, 2, 2), normal(rng, 2)), ReLU(), Reshape((features,)),
                    Affine(normal(rng, 2, features), normal(rng, 2)))
    rewrite, _ = compress(tools, f, max_deviation=1e-2)
    assert rewrite.network.shapes[0][0] <= 4 and {r.rule for r in rewrite.removals} == {"merge"}
    assert sum(r.neurons for r in rewrite.removals) == 30 * (4 + 2 * padding)**2


def test_channels_do_not_merge_before_a_max_pool(tools):
    rng = np.random.default_rng(10)
    f = tools.chain((1, 4, 4), active_conv(rng, 12, 1, 1), ReLU(), MaxPool2d((2, 2), (2, 2)),
                    Conv2d(normal(rng, 2, 12, 1, 1), normal(rng, 2)))
    assert compress(tools, f, max_deviation=0.1)[0].network.parameters == f.parameters


@pytest.mark.parametrize("unstable", [0, 2])
@pytest.mark.parametrize("between", [[], [Pad(((0, 0), (1, 0), (0, 1)))], [AvgPool2d((2, 2), (1, 1), (1, 1, 1, 1))]])
def test_a_constant_channel_carries_constants_through_zero_padding(tools, unstable, between):
    rng = np.random.default_rng(14)
    conv, other = active_conv(rng, 14, 2, 1), np.array([[1, -1], [1, -0.5]], np.float32)[:unstable, :, None, None]
    first = Conv2d(np.concatenate([conv.weight, other]),
                   np.concatenate([conv.bias, np.zeros(unstable, np.float32)]))
    f = tools.chain((2, 4, 4), first, ReLU(), *between, Conv2d(normal(rng, 3, 14 + unstable, 3, 3), normal(rng, 3),
                                                              padding=(1,) * 4))
    rewrite, worst = compress(tools, f, max_deviation=1e-3)
    assert rewrite.network.shapes[0][0] == unstable + 2 + 1 and worst > 0


def test_channels_merge_through_average_pool_and_flatten(tools):
    rng = np.random.default_rng(11)
    conv = active_conv(rng, 20, 2, 1)
    unstable = np.array([1, -1], np.float32).reshape(1, 2, 1, 1)
    some = Conv2d(np.concatenate([conv.weight, unstable]), np.append(conv.bias, np.float32(0.0)))
    f = tools.chain((2, 4, 4), some, ReLU(), AvgPool2d((2, 2), (2, 2)), Transpose((2, 0, 1)), Reshape((84,)),
                    Affine(normal(rng, 3, 84), normal(rng, 3)))
    rewrite, _ = compress(tools, f, max_deviation=1e-3)
    assert rewrite.network.shapes[0][0] == 2 + 1              # two input channels: two units, and the unstable channel


# -- random ---------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), budget=st.sampled_from(["rounding", 1e-5, 1e-2]), spread=st.integers(-4, 4))
def test_certified_deviation_holds(tools, seed, budget, spread):
    rng = np.random.default_rng(seed)
    n, k, m = rng.integers(1, 7, 3) + 1
    scale = np.float32(10.0)**rng.integers(-abs(spread), abs(spread) + 1, (k + 2, 1)).astype(np.float32)
    first = mixed(rng, int(k), int(n), -1, rank=int(rng.integers(1, 4)))
    second = mixed(rng, int(m), int(k) + 2, -1)
    first = Affine(first.weight * scale, first.bias * scale[:, 0])
    f = tools.chain((int(n),), first, ReLU(), second, ReLU(), Affine(normal(rng, 2, int(m) + 2), normal(rng, 2)))
    low = rng.random(n) * 0.5
    box = Box(low, low + rng.random(n) * 0.5 * (rng.random(n) > 0.2))
    compress(tools, f, box, max_deviation=budget)


@pytest.mark.slow
def test_certified_deviation_holds_on_many(tools):
    for seed in range(300):
        test_certified_deviation_holds.hypothesis.inner_test(tools, seed, ("rounding", 1e-5, 1e-2)[seed % 3], seed % 9 - 4)


@pytest.mark.parametrize("budget", [1e-3, 1e20])
def test_products_that_overflow_are_no_offers(tools, budget):
    rng = np.random.default_rng(0)
    first = Affine(np.abs(normal(rng, 6, 4)) * np.float32(1e25), np.ones(6, np.float32))
    f = tools.chain((4,), first, ReLU(), Affine(normal(rng, 5, 6) * np.float32(1e20), normal(rng, 5)), ReLU(),
                    Affine(normal(rng, 2, 5) * np.float32(1e-30), normal(rng, 2)))
    box = uniform(0, 1, (4,))
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation=budget)
    assert rewrite.eps <= budget and rewrite.network.parameters <= f.parameters


# -- building stones ------------------------------------------------------------------------------------------------


def test_propagate_bounds_what_a_shift_does(tools):
    rng = np.random.default_rng(12)
    f = tools.chain((2, 4, 4), tools.conv(rng, 3, 2), ReLU(), MaxPool2d((2, 2), (2, 2)), Reshape((12,)),
                    tools.affine(rng, 3, 12))
    shift = rng.random((3, 4, 4)) / 8
    bound = propagate(f, 0, shift[None])[0]
    moved = tools.chain((3, 4, 4), *(n.op for n in f.nodes[1:]))
    for _ in range(20):
        z = rng.standard_normal((3, 4, 4))
        gap = tools.exact(moved, z) - tools.exact(moved, z + shift * rng.choice([-1, 1], shift.shape))
        assert (np.abs(gap.astype(float)) <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("scale", [1.0, 1e10])
def test_evaluation_error_is_a_bound(tools, scale):
    rng = np.random.default_rng(13)
    conv = Conv2d(normal(rng, 3, 2, 3, 3), normal(rng, 3) * np.float32(scale), padding=(1,) * 4)
    f = tools.chain((2, 4, 4), conv, ReLU(), AvgPool2d((3, 3), (1, 1), (1,) * 4, False), Reshape((48,)),
                    Affine(normal(rng, 3, 48), normal(rng, 3)))
    x = rng.random((5, 2, 4, 4))
    values, errors = evaluate_with_error(f, x)
    for point, value, error in zip(x, values, errors):
        true = tools.exact(f, point)
        assert all(abs(Fraction(v) - t) <= Fraction(e) for v, e, t in zip(value.tolist(), error.tolist(), true))


@pytest.mark.parametrize("bad", ["lots", -1.0, float("nan"), float("inf"), None])
def test_budget_refuses(tools, bad):
    f = tools.chain((2,), tools.affine(np.random.default_rng(0), 2, 2))
    with pytest.raises(OptionError, match="give exact, rounding, or a finite number"):
        budget_of(f, uniform(0, 1, (2,)), bad)
