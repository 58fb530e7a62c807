"""Cases that break verifiers: a maximum of 1e-5 that HiGHS calls infeasible, maxima in (0, 2e-6], cancellation, overflow."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_truth import exact_ranges_1d, mlp, random_mlp
from random_networks import case

import exactprune
from exactprune import VerifyOptions, verify
from exactprune.bounds.interval import interval_bounds
from exactprune.bounds.layerwise import crown_bounds
from exactprune.bounds.program import compile_network
from exactprune.claim import Status
from exactprune.domain import Box, uniform
from exactprune.network import Network, Node, build
from exactprune.ops import Affine, Conv2d, MaxPool2d, Pad, ReLU, Reshape
from exactprune.options import DECIDERS

UNIT = Box(np.zeros(1), np.ones(1))


def design_case() -> Network:
    """DESIGN section 2: the maximum of the last pre-activation over [0, 1] is +1e-5, at x = 1."""
    w = np.array([[38.14555740356445], [4.355520725250244], [0.10518612712621689]])
    b = np.array([-5.195638656616211, -4.320352077484131, -0.051050830632448196])
    v = np.array([[1.081760287284851, 3.6640846729278564, 3.692793369293213]])
    return mlp([(w, b), (v, np.array([-35.97267493689556])), (np.ones((1, 1)), np.zeros(1))])


@pytest.mark.parametrize("decider", DECIDERS)
def test_a_maximum_of_one_in_a_hundred_thousand_is_not_inactive(decider: str) -> None:
    network = design_case()
    _, ((low, high),) = exact_ranges_1d(network, UNIT)
    assert low < 0 and 0.9e-5 < high < 1.1e-5
    result = verify(network, UNIT, VerifyOptions(decider=decider))  # type: ignore[arg-type]
    assert result.layers[1].status[0] == Status.UNSTABLE
    assert result.check is not None and result.check["rejected"] == 0


def tiny_maximum(seed: int) -> tuple[Network, int, int]:
    """A network with one input and a neuron whose exact maximum lies in (0, 2e-6]: (network, layer, neuron)."""
    rng = np.random.default_rng([seed, 3])
    sizes = [1, *rng.integers(2, 6, rng.integers(1, 4)).tolist(), 2]
    network = random_mlp(rng, sizes, spread=float(rng.choice([0.0, 1.0])))
    layer = len(network.relus) - 1
    neuron = int(rng.integers(sizes[-2]))
    position = network.nodes[network.relus[layer]].inputs[0]
    for _ in range(20):
        high = exact_ranges_1d(network, UNIT)[layer][neuron][1]
        if 0 < high <= Fraction(2, 10**6):
            return network, layer, neuron
        op = network.nodes[position].op
        assert isinstance(op, Affine)
        bias = op.bias.copy()
        bias[neuron] = float(Fraction(float(bias[neuron])) - high + Fraction(float(rng.random() * 2e-6)))
        nodes = list(network.nodes)
        nodes[position] = replace(nodes[position], op=Affine(op.weight, bias))
        network = replace(network, nodes=tuple(nodes))
    raise AssertionError("no such bias")


def never_inactive(seed: int, decider: str) -> None:
    network, layer, neuron = tiny_maximum(seed)
    program = compile_network(network)
    for bounds in (interval_bounds(program, *program.box(UNIT)), crown_bounds(program, *program.box(UNIT))):
        assert float(bounds[layer].upper[0, neuron]) > 0
    result = verify(network, UNIT, VerifyOptions(decider=decider, time_limit=5))  # type: ignore[arg-type]
    assert result.layers[layer].status[neuron] != Status.INACTIVE, seed
    for verdict, ranges in zip(result.layers, exact_ranges_1d(network, UNIT)):
        for status, (low, high) in zip(verdict.status.tolist(), ranges):
            assert (status != Status.INACTIVE or high <= 0) and (status != Status.ACTIVE or low >= 0)
            assert status != Status.UNSTABLE or low < 0 < high


@pytest.mark.parametrize("seed", range(16))
def test_a_tiny_maximum_is_never_inactive(seed: int) -> None:
    never_inactive(seed, ("auto", "branch-and-bound", "input-split", "milp")[seed % 4])


@pytest.mark.slow
@pytest.mark.parametrize("decider", DECIDERS)
def test_many_tiny_maxima_are_never_inactive(decider: str) -> None:
    for seed in range(100, 400):
        never_inactive(seed, decider)


@pytest.mark.parametrize(("dtype", "big"), [(np.float32, 2.0**24), (np.float64, 2.0**53)])
def test_cancellation_of_a_huge_constant(dtype: type, big: float) -> None:
    """relu(x + M) - relu(0.5) - M is x - 0.5 on [0, 1], and 0 or 1 or garbage in floats."""
    nodes = [Node("a", Affine(np.array([[1.0], [0.0]], dtype), np.array([big, 0.5], dtype)), (-1,)), Node("r", ReLU(), (0,)),
             Node("b", Affine(np.array([[1.0, -1.0]], dtype), np.array([-big], dtype)), (1,)), Node("s", ReLU(), (2,)),
             Node("c", Affine(np.ones((1, 1), dtype), np.zeros(1, dtype)), (3,))]
    network = build(nodes, (1,), dtype)
    ((low, high),) = exact_ranges_1d(network, UNIT)[1]
    assert (low, high) == (Fraction(-1, 2), Fraction(1, 2))
    for decider in DECIDERS:
        result = verify(network, UNIT, VerifyOptions(decider=decider))  # type: ignore[arg-type]
        assert result.layers[1].status[0] in (Status.UNSTABLE, Status.UNKNOWN)
        assert result.layers[1].lower[0] <= -0.5 and result.layers[1].upper[0] >= 0.5
    if dtype is np.float32:
        assert verify(network, UNIT).layers[1].status[0] == Status.UNSTABLE


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_exactly_zero_maximum_that_intervals_show_is_inactive(dtype: type) -> None:
    """z = -relu(x), z = relu(x) - 0 at the edge x <= 0, a neuron that reads nothing."""
    first = np.array([[1.0], [-1.0], [0.3]], dtype), np.array([0.0, 0.0, -0.3], dtype)
    second = np.array([[-1.0, -2.5, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype), np.zeros(3, dtype)
    network = mlp([first, second, (np.ones((1, 3)), np.zeros(1))], dtype)
    result = verify(network, UNIT)
    assert result.layers[0].status.tolist() == [Status.ACTIVE, Status.INACTIVE, Status.INACTIVE if dtype is np.float64 else
                                                result.layers[0].status[2]]
    assert result.layers[1].status.tolist() == [Status.INACTIVE, Status.ACTIVE, Status.INACTIVE]
    exact = exact_ranges_1d(network, UNIT)[0][2]
    assert (result.layers[0].status[2] == Status.INACTIVE) == (exact[1] <= 0)


def test_a_box_that_is_a_point() -> None:
    network = random_mlp(np.random.default_rng(0), [3, 5, 4, 1])
    x = np.array([0.25, -1.5, 3.0])
    result = verify(network, Box(x, x))
    values = network.evaluate_nodes(x[None])
    for verdict, relu in zip(result.layers, network.relus):
        z = values[network.nodes[relu].inputs[0]][0]
        assert verdict.status.tolist() == [Status.ACTIVE if v > 0 else Status.INACTIVE for v in z]


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("exponent", [150, 200, 300])
def test_overflow_ends_in_unknown(exponent: int, decider: str) -> None:
    rng = np.random.default_rng(exponent)
    scale = 10.0**exponent
    network = mlp([(rng.normal(size=(4, 2)) * scale, rng.normal(size=4)), (rng.normal(size=(3, 4)) * scale, rng.normal(size=3)),
                   (rng.normal(size=(3, 3)), rng.normal(size=3)), (np.ones((1, 3)), np.zeros(1))])
    result = verify(network, uniform(-1, 1, (2,)), VerifyOptions(decider=decider, time_limit=5))  # type: ignore[arg-type]
    from exact_regions import exact_ranges

    for verdict, ranges in zip(result.layers, exact_ranges(network, uniform(-1, 1, (2,)))):
        for i, (low, high) in enumerate(ranges):
            assert verdict.status[i] != Status.INACTIVE or high <= 0
            assert verdict.status[i] != Status.ACTIVE or low >= 0
            assert verdict.lower[i] <= low and high <= verdict.upper[i]
            assert verdict.status[i] != Status.UNKNOWN or verdict.reasons[i]


def test_overflow_in_a_padded_max_pool() -> None:
    """Every bound of a window is infinite: no place in the padding may be chosen."""
    weight = np.full((2, 1, 1, 1), 1e300)
    ops = [Conv2d(weight, np.zeros(2)), Conv2d(np.full((2, 2, 1, 1), -1e300), np.zeros(2)),
           MaxPool2d((2, 2), (1, 1), (1, 1, 1, 1)), ReLU(), Reshape((32,)), Affine(np.ones((2, 32)), np.zeros(2)), ReLU(),
           Affine(np.ones((1, 2)), np.zeros(1))]
    nodes = [Node(str(i), op, (i - 1,)) for i, op in enumerate(ops)]
    result = verify(build(nodes, (1, 3, 3), np.float64), uniform(-1, 1, (1, 3, 3)))
    assert all(v.status[i] == Status.UNKNOWN or v.layer == 0 for v in result.layers for i in range(v.status.size))


def test_underflow_is_paid_for() -> None:
    """1e-200 * 1e-200 is 0 in float64 and positive in truth; a cancelling bias must not tip the sign either."""
    small = np.full((1, 1), 1e-200)
    network = mlp([(small, np.zeros(1)), (small, np.zeros(1)), (np.full((1, 1), 1e300), np.array([-1e-150])),
                   (np.ones((1, 1)), np.zeros(1))])
    program = compile_network(network)
    result = verify(network, UNIT)
    for ranges, interval, crown, verdict in zip(exact_ranges_1d(network, UNIT), interval_bounds(program, *program.box(UNIT)),
                                                crown_bounds(program, *program.box(UNIT)), result.layers):
        low, high = ranges[0]
        for bounds in (interval, crown):
            assert float(bounds.lower[0, 0]) <= low and high <= float(bounds.upper[0, 0])
        assert verdict.status[0] != Status.INACTIVE or high <= 0


def test_a_relu_behind_padding_or_a_reshape_can_be_split() -> None:
    """Branch and bound through ReLUs whose input only moves values (found by the hunt: seeds 503, 560, 697, 868)."""
    rng = np.random.default_rng(1)
    ops = [Conv2d(rng.normal(size=(2, 1, 2, 2)), rng.normal(size=2)), Pad(((0, 0), (1, 0), (0, 1)), -0.3), ReLU(), Reshape((32,)),
           Affine(rng.normal(size=(8, 32)), rng.normal(size=8)), ReLU(), Affine(rng.normal(size=(6, 8)), rng.normal(size=6)),
           ReLU(), Affine(rng.normal(size=(1, 6)), rng.normal(size=1))]
    network = build([Node(str(i), op, (i - 1,)) for i, op in enumerate(ops)], (1, 4, 4), np.float64)
    for decider in ("branch-and-bound", "auto"):
        result = verify(network, uniform(-1, 1, (1, 4, 4)), VerifyOptions(decider=decider, time_limit=20))
        assert result.check is not None and result.check["rejected"] == 0


@pytest.mark.parametrize("seed", [0, 20, 40, 400, 860])
def test_extreme_networks_of_the_hunt_raise_nothing(seed: int) -> None:
    """float64 weights up to 1e300: found by the hunt as ShapeError of the LP and as an unreadable certificate."""
    given = case(seed, "huge")
    for decider in ("auto", "milp", "scaling-up", "leo", "lp"):
        result = exactprune.verify(given.network, given.box, VerifyOptions(decider=decider, time_limit=3))
        assert result.totals["neurons"] == given.network.neurons
        assert not np.isnan(np.concatenate([v.lower for v in result.layers])).any()


def test_torch_is_not_set_to_flush_subnormals() -> None:
    assert float(torch.tensor(5e-324, dtype=torch.float64) * 1.0) > 0
