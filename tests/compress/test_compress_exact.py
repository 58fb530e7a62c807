"""Level exact: planted redundancy is found, and the smaller network equals the original in rational arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.claim import LayerVerdict, Status
from exactprune.compress import EXACT, compress_network
from exactprune.domain import uniform
from exactprune.errors import DomainError, OptionError
from exactprune.network import INPUT, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Pad, ReLU, Reshape, Scale, Transpose


def check(tools, network, box=None, seed=0):
    """Compress with interval verdicts and compare exactly; the rewrite."""
    box = box or uniform(0, 1, network.input_shape)
    rewrite = compress_network(network, box, tools.verdicts(network, box), max_deviation="exact")
    g = rewrite.network
    assert rewrite.level == EXACT and rewrite.eps == 0
    assert g.input_shape == network.input_shape and g.output_shape == network.output_shape and g.dtype == network.dtype
    assert g.parameters <= network.parameters and g.neurons <= network.neurons and g.macs <= network.macs
    assert tools.same(network, g, box, np.random.default_rng(seed))
    assert network.neurons - g.neurons == sum(r.neurons for r in rewrite.removals)
    again = compress_network(g, box, rewrite.verdicts, max_deviation="exact")
    assert again.removals == () and again.network is g
    return rewrite


def units(rewrite, rule=None):
    return {(r.layer, r.index) for r in rewrite.removals if rule in (None, r.rule)}


# -- dense ---------------------------------------------------------------------------------------------------------


def test_dense_inactive_constant_and_unread(tools):
    rng = np.random.default_rng(0)
    first = tools.constant(tools.killed(tools.affine(rng, 7, 4), 1, 5), 3, 0.5)
    second = tools.unread(tools.affine(rng, 6, 7), 6)
    third = tools.unread(tools.affine(rng, 3, 6), 2)
    rewrite = check(tools, tools.chain((4,), first, ReLU(), second, ReLU(), third))
    assert {(0, 1), (0, 5)} <= units(rewrite, "inactive")
    assert (0, 3) in units(rewrite, "constant")
    assert {(0, 6), (1, 2)} <= units(rewrite, "unread")


def test_removing_a_neuron_makes_earlier_ones_unread(tools):
    rng = np.random.default_rng(1)
    second = tools.affine(rng, 3, 5)
    weight = second.weight.copy()
    weight[1:, 2] = 0                                    # neuron 2 is read by neuron 0 only, which dies
    third = tools.unread(tools.affine(rng, 2, 3), 0)
    network = tools.chain((4,), tools.affine(rng, 5, 4), ReLU(), Affine(weight, second.bias), ReLU(), third)
    rewrite = check(tools, network)
    assert (1, 0) in units(rewrite, "unread") and (0, 2) in units(rewrite, "unread")


def test_a_constant_whose_fold_rounds_is_kept(tools):
    first = Affine(np.array([[0.0], [1.0]], np.float32), np.array([2.0**-30, -0.5], np.float32))
    network = tools.chain((1,), first, ReLU(), Affine(np.array([[1.0, 1.0]], np.float32), np.array([1.0], np.float32)))
    rewrite = check(tools, network)
    assert rewrite.removals == () and rewrite.network is network


def test_constants_fold_jointly_where_no_single_one_does(tools):
    first = Affine(np.array([[0.0], [0.0], [1.0]], np.float32), np.array([2.0**-30, 2.0**-30, -0.5], np.float32))
    last = Affine(np.array([[1.0, -1.0, 1.0]], np.float32), np.array([1.0], np.float32))
    assert units(check(tools, tools.chain((1,), first, ReLU(), last))) == {(0, 0), (0, 1)}


def test_bounds_that_meet_make_a_constant_and_unknown_never_does(tools):
    rng = np.random.default_rng(2)
    network = tools.chain((2,), Affine(np.array([[1, -1], [1, 1]], np.float32), np.array([0.5, 0], np.float32)), ReLU(),
                          tools.affine(rng, 2, 2))
    box = uniform(0.25, 0.25, (2,))

    def verdict(status):
        return (LayerVerdict(0, "r", (2,), [status, Status.UNSTABLE], [1, 0], [0.5, -1], [0.5, 1]),)

    rewrite = compress_network(network, box, verdict(Status.ACTIVE), max_deviation="exact")
    assert units(rewrite, "constant") == {(0, 0)} and tools.same(network, rewrite.network, box, rng)
    assert compress_network(network, box, verdict(Status.UNKNOWN), max_deviation="exact").removals == ()


@pytest.mark.parametrize("status", [Status.UNKNOWN, Status.ACTIVE, Status.UNSTABLE])
def test_only_inactive_goes(tools, status):
    """Identical bounds, other verdicts: an active layer folds into the next (whole numbers: nothing rounds), the others stay."""
    weight = np.array([[1, 2, 4], [1, -1, 1], [2, 1, -1], [1, 1, 3]], np.float32)
    network = tools.chain((3,), Affine(weight, np.ones(4, np.float32)), ReLU(),
                          Affine(np.ones((2, 4), np.float32), np.zeros(2, np.float32)))
    layer = LayerVerdict(0, "r", (4,), [status] * 4, [0] * 4, [-1.0] * 4, [-0.5] * 4, {0: "timed out"})
    rewrite = compress_network(network, uniform(0, 1, (3,)), (layer,), max_deviation="exact")
    assert rewrite.network.parameters == (8 if status == Status.ACTIVE else network.parameters)
    assert (rewrite.network is network) is (status != Status.ACTIVE)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_layer_leaves_the_constant(tools, dead):
    rng = np.random.default_rng(4)
    ops = [tools.affine(rng, 5, 3), ReLU(), tools.affine(rng, 4, 5), ReLU(), tools.affine(rng, 2, 4)]
    ops[2 * dead] = tools.killed(ops[2 * dead], *range(5 - dead))
    rewrite = check(tools, tools.chain((3,), *ops))
    assert rewrite.network.neurons == 0 and rewrite.dead_inputs == ()


def test_dead_inputs_are_reported_and_stay(tools):
    rng = np.random.default_rng(5)
    network = tools.chain((2, 3), Transpose((1, 0)), Reshape((6,)), tools.unread(tools.affine(rng, 4, 6), 1, 4), ReLU(),
                          tools.affine(rng, 2, 4))
    assert check(tools, network).dead_inputs == (2, 3)    # flat (0, 2) and (1, 0): transposed places 4 and 1


def test_shared_neurons_go_only_when_every_reader_lets_them(tools):
    rng = np.random.default_rng(6)
    left, right = tools.unread(tools.affine(rng, 3, 5), 0, 1), tools.unread(tools.affine(rng, 3, 5), 1, 2)
    network = build([Node("a", tools.affine(rng, 5, 4), (INPUT,)), Node("r", ReLU(), (0,)), Node("l", left, (1,)),
                     Node("m", right, (1,)), Node("s", Add(), (2, 3))], (4,), np.float32)
    assert units(check(tools, network)) == {(0, 1)}


# -- convolutions ---------------------------------------------------------------------------------------------------


def conv_net(tools, rng, first, second=None, padding=1):
    second = second or tools.conv(rng, 4, 5, padding=padding)
    height = 6 - 2 * (1 - padding)
    features = 4 * (height // 2)**2
    return tools.chain((2, 6, 6), first, ReLU(), second, ReLU(), MaxPool2d((2, 2), (2, 2)), Reshape((features,)),
                       tools.affine(rng, 3, features))


def test_conv_channel_inactive_everywhere_goes(tools):
    rng = np.random.default_rng(7)
    rewrite = check(tools, conv_net(tools, rng, tools.killed(tools.conv(rng, 5, 2), 0, 3)))
    assert {(0, 0), (0, 3)} <= units(rewrite, "inactive")
    assert {r.neurons for r in rewrite.removals if r.layer == 0} == {36}


def test_conv_channel_inactive_at_some_positions_stays(tools):
    rng = np.random.default_rng(8)
    network = conv_net(tools, rng, tools.conv(rng, 5, 2))
    box = uniform(0, 1, (2, 6, 6))
    layers = list(tools.verdicts(network, box))
    first = layers[0]
    status = np.full(first.status.shape, int(Status.UNSTABLE))
    status[:35] = Status.INACTIVE                         # all of channel 0 but one position
    layers[0] = LayerVerdict(0, first.node, first.shape, status, first.method, first.lower, first.upper)
    rewrite = compress_network(network, box, layers, max_deviation="exact")
    assert (0, 0) not in units(rewrite)


@pytest.mark.parametrize(("padding", "value", "goes"), [(1, 0.5, False), (0, 0.5, True), (1, -0.5, True)])
def test_constant_channel_and_the_zero_padding_border(tools, padding, value, goes):
    rng = np.random.default_rng(9)
    rewrite = check(tools, conv_net(tools, rng, tools.constant(tools.conv(rng, 5, 2), 2, value), padding=padding))
    assert ((0, 2) in units(rewrite)) is goes


def test_constant_channel_behind_an_explicit_pad(tools):
    rng = np.random.default_rng(10)

    def network(pad):
        return tools.chain((2, 4, 4), tools.constant(tools.conv(rng, 3, 2), 1, 0.5), ReLU(),
                           Pad(((0, 0), (1, 1), (1, 1)), pad), tools.conv(rng, 2, 3, padding=0))

    assert units(check(tools, network(0.0))) == set()
    assert units(check(tools, network(0.5)), "constant") == {(0, 1)}


def test_flattened_channel_takes_its_block_of_features_with_it(tools):
    rng = np.random.default_rng(11)
    head = tools.affine(rng, 3, 4 * 9)
    network = tools.chain((2, 3, 3), tools.killed(tools.conv(rng, 4, 2), 1), ReLU(), Transpose((1, 2, 0)),
                          Reshape((36,)), head)
    rewrite = check(tools, network)
    assert units(rewrite) == {(0, 1)}
    (last,) = [n.op for n in rewrite.network.nodes if isinstance(n.op, Affine)]
    assert np.array_equal(last.weight, np.delete(head.weight, np.arange(1, 36, 4), axis=1))


def test_flat_features_reshaped_into_channels_go_together_only(tools):
    rng = np.random.default_rng(12)
    network = tools.chain((3,), tools.killed(tools.affine(rng, 12, 3), 0, 1, 2, 3, 5), ReLU(), Reshape((3, 2, 2)),
                          tools.conv(rng, 2, 3))
    assert units(check(tools, network)) == {(0, 0), (0, 1), (0, 2), (0, 3)}


def test_depthwise_and_grouped_convolutions(tools):
    rng = np.random.default_rng(13)
    network = tools.chain((2, 5, 5), tools.killed(tools.conv(rng, 4, 2), 1, 2), ReLU(),
                          tools.killed(tools.conv(rng, 4, 4, groups=4), 1), ReLU(),
                          tools.conv(rng, 3, 4, k=1, padding=0))
    rewrite = check(tools, network)
    assert {(0, 1), (1, 1)} <= units(rewrite)
    assert (0, 2) not in units(rewrite) or (1, 2) in units(rewrite)
    grouped = tools.chain((2, 5, 5), tools.killed(tools.conv(rng, 4, 2), 0, 1, 2), ReLU(),
                          tools.killed(tools.conv(rng, 6, 4, groups=2), 0, 1, 2), ReLU(),
                          tools.conv(rng, 3, 6, k=1, padding=0))
    rewrite = check(tools, grouped)
    assert {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)} <= units(rewrite)
    assert (0, 2) in units(rewrite)  # one group is left: a plain convolution, so its dead input goes too


def test_dead_convolution_leaves_a_constant_image(tools):
    rng = np.random.default_rng(14)
    network = conv_net(tools, rng, tools.killed(tools.conv(rng, 5, 2), *range(5)))
    rewrite = check(tools, network)
    assert rewrite.network.parameters < 200


def test_average_pool_and_scale(tools):
    rng = np.random.default_rng(15)
    scale = Scale(np.array([1, 2, -1, 0.5], np.float32).reshape(4, 1, 1), np.zeros((4, 1, 1), np.float32))
    network = tools.chain((2, 4, 4), tools.killed(tools.conv(rng, 4, 2), 2), ReLU(), scale,
                          AvgPool2d((2, 2), (2, 2), (1, 1, 1, 1)), Reshape((36,)), tools.affine(rng, 2, 36))
    assert units(check(tools, network)) == {(0, 2)}


# -- residual -------------------------------------------------------------------------------------------------------


def residual(tools, rng, stem, branch, head=None, channels=4):
    head = head or tools.affine(rng, 3, channels * 16)
    return build([Node("stem", stem, (INPUT,)), Node("r0", ReLU(), (0,)), Node("c1", branch[0], (1,)),
                  Node("r1", ReLU(), (2,)), Node("c2", branch[1], (3,)), Node("add", Add(), (4, 1)),
                  Node("r2", ReLU(), (5,)),
                  Node("flat", Reshape((channels * 16,)), (6,)), Node("fc", head, (7,))], (2, 4, 4), np.float32)


def test_a_residual_channel_goes_alone_only_where_the_skip_as_a_mixer_pays(tools):
    rng = np.random.default_rng(16)
    branch = (tools.conv(rng, 5, 4), tools.conv(rng, 4, 5))
    f = residual(tools, rng, tools.killed(tools.conv(rng, 4, 2), 1), branch)
    one = check(tools, f)                                 # the other branch still writes channel 1
    saved, cost = 2 * 9 + 1 + 5 * 9, 4 * 3 + 4            # a row of the stem, a column of the branch; the mixer
    assert (0, 1) in units(one) and one.network.parameters == f.parameters - saved + cost
    small = (tools.conv(rng, 1, 4, k=1, padding=0), tools.conv(rng, 4, 1))
    two = check(tools, residual(tools, rng, tools.killed(tools.conv(rng, 4, 2, k=1, padding=0), 1), small))
    assert (0, 1) not in units(two)                       # 2 + 1 and 1 parameters would go, 4 * 3 + 4 come


def test_a_residual_channel_goes_when_both_branches_lose_it(tools):
    rng = np.random.default_rng(16)
    branch = (tools.conv(rng, 5, 4), tools.conv(rng, 4, 5))
    both = (branch[0], tools.constant(branch[1], 1, 0.0))
    two = check(tools, residual(tools, rng, tools.killed(tools.conv(rng, 4, 2), 1), both))
    assert {(0, 1), (2, 1)} <= units(two)


def test_a_branch_that_is_zero_takes_its_add_with_it(tools):
    rng = np.random.default_rng(17)
    last = tools.conv(rng, 4, 5)
    branch = (tools.conv(rng, 5, 4), Conv2d(last.weight, np.zeros(4, np.float32), padding=(1,) * 4))
    rewrite = check(tools, residual(tools, rng, tools.conv(rng, 4, 2), (tools.killed(branch[0], *range(5)), branch[1])))
    assert not [n for n in rewrite.network.nodes if isinstance(n.op, Add)]


def test_a_channel_that_only_feeds_itself_around_a_skip_goes(tools):
    rng = np.random.default_rng(18)
    first, second = tools.conv(rng, 5, 4), tools.conv(rng, 4, 5)
    weight = second.weight.copy()
    weight[:3, 4] = 0                                     # inner channel 4 writes stream channel 3 only
    inner = first.weight.copy()
    inner[:4, 3] = 0                                      # stream channel 3 is read by inner channel 4 only
    branch = (Conv2d(inner, first.bias, padding=(1,) * 4), Conv2d(weight, second.bias, padding=(1,) * 4))
    head = tools.unread(tools.affine(rng, 3, 64), *range(48, 64))
    rewrite = check(tools, residual(tools, rng, tools.conv(rng, 4, 2), branch, head))
    assert {(0, 3), (1, 4), (2, 3)} <= units(rewrite, "unread")


def test_padded_shortcut_grows_channels(tools):
    rng = np.random.default_rng(19)
    nodes = [Node("stem", tools.killed(tools.conv(rng, 2, 2), 0), (INPUT,)), Node("r0", ReLU(), (0,)),
             Node("pad", Pad(((1, 1), (0, 0), (0, 0))), (1,)),
             Node("c", tools.constant(tools.conv(rng, 4, 2), 0, 0.0), (1,)), Node("add", Add(), (3, 2)),
             Node("r1", ReLU(), (4,)), Node("out", tools.conv(rng, 2, 4), (5,))]
    rewrite = check(tools, build(nodes, (2, 4, 4), np.float32))
    assert (1, 0) in units(rewrite)


# -- random ---------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["dense", "conv", "residual"]))
def test_random_networks(tools, seed, kind):
    rng = np.random.default_rng(seed)
    dead = rng.permutation(4)[:rng.integers(0, 5)]
    if kind == "dense":
        network = tools.chain((3,), tools.killed(tools.affine(rng, 4, 3, 0.3), *dead), ReLU(),
                              tools.affine(rng, 4, 4, 0.5), ReLU(), tools.affine(rng, 4, 4, 0.6), ReLU(),
                              tools.affine(rng, 2, 4, 0.5))
        first = 0
    elif kind == "conv":
        network = tools.chain((1, 4, 4), tools.killed(tools.conv(rng, 4, 1), *dead), ReLU(),
                              tools.conv(rng, 3, 4, stride=2), ReLU(), Reshape((12,)), tools.affine(rng, 2, 12, 0.5))
        first = 0
    else:
        branch = (tools.killed(tools.conv(rng, 4, 4), *dead), tools.conv(rng, 4, 4))
        network = residual(tools, rng, tools.conv(rng, 4, 2), branch)
        first = 1
    rewrite = check(tools, network, seed=seed)
    assert {(first, int(d)) for d in dead} <= units(rewrite)


@pytest.mark.slow
def test_many_random_networks(tools):
    for seed in range(300):
        test_random_networks.hypothesis.inner_test(tools, seed, ("dense", "conv", "residual")[seed % 3])


def test_float16_exact_and_float64_weights(tools):
    rng = np.random.default_rng(20)
    for dtype in (np.float32, np.float64):
        network = tools.chain((3,), tools.constant(tools.killed(tools.affine(rng, 5, 3), 0), 1, 0.25), ReLU(),
                              tools.affine(rng, 2, 5), dtype=dtype)
        assert all(np.array_equal(a, a.astype(np.float16)) for n in network.nodes for _, a in n.op.arrays())
        rewrite = check(tools, network)
        assert units(rewrite) >= {(0, 0), (0, 1)}
        if dtype == np.float32:                           # what stays is bit for bit what it was
            assert set(rewrite.network.nodes[0].op.weight.ravel()) <= set(network.nodes[0].op.weight.ravel())


# -- misuse ---------------------------------------------------------------------------------------------------------


def test_bad_input(tools):
    rng = np.random.default_rng(21)
    network = tools.chain((3,), tools.affine(rng, 4, 3), ReLU(), tools.affine(rng, 2, 4))
    box = uniform(0, 1, (3,))
    layers = tools.verdicts(network, box)
    with pytest.raises(DomainError, match=r"Box\.reshaped"):
        compress_network(network, uniform(0, 1, (4,)), layers)
    with pytest.raises(OptionError, match="one per layer"):
        compress_network(network, box, ())
    with pytest.raises(OptionError, match="one per layer"):
        compress_network(network, box, (*layers, *layers))
