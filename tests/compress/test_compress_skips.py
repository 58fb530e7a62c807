"""Sums of layers and mixers in a row: skips as mixers where that pays, and affine maps with no ReLU between become one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from exactprune.compress import Kind, compress_network
from exactprune.compress.skips import skips, split, worthwhile
from exactprune.compress.surroundings import linear_hubs, surroundings
from exactprune.domain import uniform
from exactprune.network import INPUT, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, ReLU, Reshape


def normal(rng, *shape):
    return (np.rint(64 * rng.standard_normal(shape)) / 64).astype(np.float32)


def affine(rng, outputs, inputs):
    return Affine(normal(rng, outputs, inputs), normal(rng, outputs))


def layer(rng, active, unstable, n, high=1.0):
    """Affine on inputs from 0 to ``high`` whose first outputs are stably active and the others switch."""
    weight = normal(rng, active + unstable, n)
    least, most = np.minimum(weight, 0) * high, np.maximum(weight, 0) * high
    on = np.arange(len(weight)) < active
    bias = np.where(on, 0.5 - least.sum(axis=1), -(least + most).sum(axis=1) / 2)
    return Affine(weight, bias.astype(np.float32))


def as_conv(op, kernel=1, **settings):
    return Conv2d(op.weight.reshape(len(op.bias), -1, kernel, kernel), op.bias, **settings)


def compress(tools, f, deviation="rounding"):
    box = uniform(0, 1, f.input_shape)
    verdicts = tools.verdicts(f, box)
    rewrite = compress_network(f, box, verdicts, max_deviation=deviation)
    rng = np.random.default_rng(0)
    for x in np.concatenate([box.sample(2, rng), box.corners(2, rng)]):
        assert np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() <= Fraction(rewrite.eps)
    assert rewrite.network.parameters <= f.parameters and tools.accepted(f, box, verdicts, rewrite)
    return rewrite


def units(network):
    return [network.shapes[i][0] for i in network.relus]


# -- sums of layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [False, True])
def test_two_layers_whose_sum_only_a_mixer_reads_merge_on_their_own(tools, spatial):
    rng = np.random.default_rng(0)
    ops = [layer(rng, 16, 4, 12), layer(rng, 15, 5, 12), affine(rng, 3, 20), affine(rng, 2, 3)]
    head = [Node("o", ops[3], (6,))]
    if spatial:
        ops = [as_conv(op) for op in ops]
        head = [Node("p", AvgPool2d((2, 2), (2, 2)), (6,)), Node("o", ops[3], (7,)), Node("f", Reshape((2,)), (8,))]
    f = build([Node("a", ops[0], (INPUT,)), Node("ra", ReLU(), (0,)), Node("b", ops[1], (INPUT,)), Node("rb", ReLU(), (2,)),
               Node("s", Add(), (1, 3)), Node("m", ops[2], (4,)), Node("rm", ReLU(), (5,)), *head],
              (12, 2, 2) if spatial else (12,), np.float32)
    rewrite = compress(tools, f)
    left = dict(zip((layer for layer, _ in rewrite.origin), units(rewrite.network), strict=True))
    assert left[0] <= 4 + 3 and left[1] <= 5 + 3 and "skip" in {step.rule for step in rewrite.steps}


@pytest.mark.parametrize("spatial", [False, True])
def test_an_identity_skip_no_longer_ties_two_layers(tools, spatial):
    rng = np.random.default_rng(1)
    first = layer(rng, 18, 2, 16)
    high = np.maximum(first.weight, 0).sum(axis=1) + np.maximum(first.bias, 0)
    inner = layer(rng, 0, 6, 20, high)
    most = np.maximum(inner.weight, 0) @ high + inner.bias
    back = normal(rng, 20, 6) / 64
    lift = np.where(np.arange(20) < 17, 1 - np.minimum(back, 0) @ most, -high / 2).astype(np.float32)
    ops = [first, inner, Affine(back, lift), affine(rng, 3, 20), affine(rng, 2, 3)]
    ops = [as_conv(op) for op in ops] if spatial else ops
    f = build([Node("a", ops[0], (INPUT,)), Node("ra", ReLU(), (0,)), Node("b", ops[1], (1,)), Node("rb", ReLU(), (2,)),
               Node("c", ops[2], (3,)), Node("s", Add(), (4, 1)), Node("rs", ReLU(), (5,)), Node("m", ops[3], (6,)),
               Node("rm", ReLU(), (7,)), Node("o", ops[4], (8,))], (16, 1, 1) if spatial else (16,), np.float32)
    rewrite = compress(tools, f)
    assert units(rewrite.network)[2] <= 3 + 3 and units(rewrite.network)[0] <= 2 + 6 + 6
    assert "skip" in {step.rule for step in rewrite.steps}


def test_a_skip_stays_where_a_mixer_does_not_pay(tools):
    rng = np.random.default_rng(2)
    f = build([Node("a", layer(rng, 0, 9, 5), (INPUT,)), Node("ra", ReLU(), (0,)), Node("b", affine(rng, 9, 9), (1,)),
               Node("s", Add(), (2, 1)), Node("rs", ReLU(), (3,)), Node("o", affine(rng, 2, 9), (4,))],
              (5,), np.float32)
    rewrite = compress(tools, f)
    assert [s.source for s in skips(f)] == [1] and rewrite.network is f


def test_what_pays_is_found_by_leaving_out(tools):
    sizes = {(0, 1, 2): (9, 5), (1, 2): (8, 5), (0, 2): (9, 5), (2,): (8, 5), (1,): (9, 5), (): (10, 5)}
    assert worthwhile([0, 1, 2], lambda some: sizes[tuple(some)]) == [2]
    assert worthwhile([0, 1, 2], lambda some: (len(some), 5)) == []
    assert worthwhile([0], lambda some: (1 - len(some), len(some))) == []  # fewer parameters, more multiplications
    assert worthwhile([], lambda some: (0, 0)) == []


# -- mixers in a row ---------------------------------------------------------------------------------------------------


def whole(rng, *shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


def test_affine_maps_in_a_row_become_one_exactly_where_nothing_rounds(tools):
    rng = np.random.default_rng(3)
    f = tools.chain((5,), Affine(whole(rng, 30, 5), whole(rng, 30)), Affine(whole(rng, 8, 30), whole(rng, 8)), ReLU(),
                    Affine(whole(rng, 20, 8), whole(rng, 20)), Affine(whole(rng, 4, 20), whole(rng, 4)))
    rewrite = compress(tools, f, "exact")
    assert rewrite.network.parameters == 8 * 6 + 4 * 9 and rewrite.level.kind is Kind.EXACT
    assert [step.rule for step in rewrite.steps if step.rule != "dependence"] == ["fold", "fold"]


def test_affine_maps_in_a_row_are_certified_where_something_rounds(tools):
    rng = np.random.default_rng(4)
    ops = [Affine(rng.standard_normal((m, n)).astype(np.float32), normal(rng, m)) for n, m in ((5, 30), (30, 8), (8, 2))]
    f = tools.chain((5,), ops[0], ops[1], ReLU(), ops[2])
    rewrite = compress(tools, f)
    assert rewrite.network.parameters == 8 * 6 + 2 * 9 and 0 < rewrite.eps <= rewrite.budget
    assert compress(tools, f, "exact").network is f


def test_a_pair_of_low_rank_is_kept_as_a_pair(tools):
    rng = np.random.default_rng(5)
    middle = whole(rng, 20, 2) @ whole(rng, 2, 30)
    f = tools.chain((30,), Affine(middle, whole(rng, 20)), Affine(normal(rng, 30, 20), normal(rng, 30)), ReLU(),
                    Affine(normal(rng, 2, 30), normal(rng, 2)))
    for deviation in ("exact", "rounding"):                               # rows of whole numbers: found at exact as well
        rewrite = compress(tools, f, deviation)
        assert [s[0] for s in rewrite.network.shapes][:2] == [2, 30]


@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_compose_where_one_has_a_kernel_of_one(tools, bias):
    rng = np.random.default_rng(6)
    wide = Conv2d(whole(rng, 12, 2, 1, 1), whole(rng, 12) * np.float32(bias))
    kernel = Conv2d(whole(rng, 3, 12, 3, 3), whole(rng, 3), (2, 2), (1, 1, 0, 0))
    last = Affine(whole(rng, 2, 12), whole(rng, 2))
    f = tools.chain((2, 4, 4), wide, kernel, ReLU(), Reshape((12,)), last)
    rewrite = compress(tools, f, "exact")                                 # a bias before padding is seen by some windows only
    assert (rewrite.network.shapes[0][0] == 3) is not bias
    after = tools.chain((2, 4, 4), Conv2d(whole(rng, 12, 2, 3, 3), whole(rng, 12), (2, 2), (1, 1, 0, 0)),
                        Conv2d(whole(rng, 3, 12, 1, 1), whole(rng, 3)), ReLU(), Reshape((12,)), last)
    assert compress(tools, after, "exact").network.nodes[0].op.parameters == 3 * 2 * 9 + 3


def test_a_sum_of_mixers_is_folded_mixer_by_mixer(tools):
    rng = np.random.default_rng(7)
    nodes = [Node("a", Affine(whole(rng, 5, 6), whole(rng, 5)), (INPUT,)), Node("r", ReLU(), (0,)),
             Node("b", Affine(whole(rng, 40, 5), whole(rng, 40)), (1,)),
             Node("c", Affine(whole(rng, 40, 6), whole(rng, 40)), (INPUT,)),
             Node("s", Add(), (2, 3)), Node("d", Affine(whole(rng, 3, 40), whole(rng, 3)), (4,)), Node("e", ReLU(), (5,)),
             Node("o", Affine(whole(rng, 2, 3), whole(rng, 2)), (6,))]
    f = build(nodes, (6,), np.float32)
    assert linear_hubs(f) == [4] and surroundings(f, 4).feeders == (2, 3)
    rewrite = compress(tools, f, "exact")
    assert sum(n.op.parameters for n in rewrite.network.nodes) <= 5 * 7 + 3 * 6 + 3 * 7 + 2 * 4


def test_what_is_no_layer_of_its_own(tools):
    rng = np.random.default_rng(8)
    f = build([Node("a", tools.conv(rng, 3, 2), (INPUT,)), Node("r", ReLU(), (0,)), Node("p", MaxPool2d((2, 2), (2, 2)), (1,)),
               Node("b", tools.conv(rng, 3, 3), (2,)), Node("s", Add(), (3, 2)), Node("q", ReLU(), (4,))], (2, 4, 4), np.float32)
    assert surroundings(f, 1) is None and surroundings(f, 1, homogeneous=True) is None  # a pool, and read by an addition
    assert surroundings(f, 5) is None and linear_hubs(f) == []            # the output
    assert [s.operand for s in skips(f)] == [1]


def test_splitting_changes_nothing(tools):
    from exactprune.compress.rewrite import start

    rng = np.random.default_rng(9)
    f = build([Node("a", tools.conv(rng, 3, 3), (INPUT,)), Node("s", Add(), (0, INPUT)), Node("r", ReLU(), (1,)),
               Node("t", Add(), (2, INPUT)), Node("o", tools.conv(rng, 2, 3), (3,))], (3, 3, 3), np.float32)
    box = uniform(0, 1, f.input_shape)
    state = start(f, tools.verdicts(f, box))
    for chosen in ([], [0], [1, 2], [0, 1, 2]):
        g = split(state, chosen).network
        assert len(g.nodes) == len(f.nodes) + len(chosen) and tools.same(f, g, box, rng, 1)


def test_a_max_pool_finds_its_channels_where_its_relu_went(tools):
    rng = np.random.default_rng(10)
    first = as_conv(layer(rng, 5, 0, 2))
    bias = first.bias.copy()
    bias[[0, 2]] = -1000                                                  # what is left is stably active, so the ReLU goes
    f = tools.chain((2, 4, 4), Conv2d(first.weight, bias), ReLU(), MaxPool2d((2, 2), (2, 2)), Reshape((20,)),
                    Affine(normal(rng, 2, 20), normal(rng, 2)))
    rewrite = compress(tools, f, "exact")
    assert not rewrite.network.relus and rewrite.network.shapes[0] == (3, 4, 4)
