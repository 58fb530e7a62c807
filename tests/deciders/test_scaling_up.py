"""ISA as arrays and as a Pyomo model, against exact enumeration and each other."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from exact_truth import exact_ranges_1d, exact_status, interval_bounds, random_1d, random_mlp

from exactprune.claim import Status
from exactprune.deciders import leo, scaling_up
from exactprune.deciders.highs import solve
from exactprune.deciders.outcome import preactivation
from exactprune.domain import Box, uniform
from exactprune.errors import SolverError
from exactprune.formulations.scaling_up import isa_arrays, isa_pyomo
from exactprune.network import Network, Node
from exactprune.network import build as build_network
from exactprune.ops import Affine, Conv2d, MaxPool2d, ReLU, Reshape

TOLERANCE = 1e-5


def agree(seeds: range, **options) -> None:
    """Every neuron that the bounds leave unstable gets its true status."""
    for seed in seeds:
        network, box = random_1d(np.random.default_rng(seed))
        low, high = interval_bounds(network, box)
        ranges = exact_ranges_1d(network, box)
        for layer in scaling_up.decide(network, box, low, high, **options):
            asked = np.flatnonzero((low[layer.layer] < 0) & (high[layer.layer] > 0))
            assert [s.neuron for s in layer] == asked.tolist()
            for s in layer:
                least, most = ranges[s.layer][s.neuron]
                near = min(abs(float(least)), abs(float(most))) < TOLERANCE
                assert s.status is exact_status(least, most) or near, (seed, s, float(least), float(most))
                for point, sign in ((s.positive, 1), (s.negative, -1)):
                    if point is not None:
                        assert box.contains(point[None])[0]
                        assert sign * preactivation(network, point, s.layer)[s.neuron] > 0


def test_agrees_with_exact_enumeration() -> None:
    agree(range(200))


@pytest.mark.parametrize(
    "options", [{"stop_at_first": False}, {"inject": False}, {"stop_at_first": False, "inject": False}], ids=str
)
def test_the_search_s_settings_do_not_change_verdicts(options: dict) -> None:
    agree(range(20), **options)


@pytest.mark.slow
def test_agrees_with_exact_enumeration_at_length() -> None:
    agree(range(200, 2400))


def test_pyomo_agrees_with_exact_enumeration() -> None:
    pytest.importorskip("pyomo")
    agree(range(6), solver="appsi_highs")


@pytest.mark.slow
def test_pyomo_agrees_with_exact_enumeration_at_length() -> None:
    pytest.importorskip("pyomo")
    agree(range(6, 400), solver="appsi_highs")


def conv_pool(rng: np.random.Generator) -> Network:
    ops = [Conv2d(rng.normal(size=(2, 1, 2, 2)), rng.normal(size=2)), ReLU(), MaxPool2d((2, 2), (1, 1)), Reshape((8,)),
           Affine(rng.normal(size=(3, 8)), rng.normal(size=3)), ReLU(), Affine(rng.normal(size=(1, 3)), np.zeros(1))]
    return build_network([Node(f"n{i}", op, (i - 1,)) for i, op in enumerate(ops)], (1, 4, 4), np.float64)


def sampled(network: Network, box: Box, rng: np.random.Generator) -> tuple[list, list]:
    values = network.evaluate_nodes(np.concatenate([box.sample(300, rng), box.corners(300, rng)]), np.float64)
    z_hat = [values[network.nodes[r].inputs[0]].reshape(600, -1) for r in network.relus]
    return [z.min(0) - 2 for z in z_hat], [z.max(0) + 2 for z in z_hat]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("seed", range(3))
def test_the_two_formulations_have_one_optimum(kind: str, seed: int) -> None:
    pyo = pytest.importorskip("pyomo.environ")
    rng = np.random.default_rng(seed)
    network = conv_pool(rng) if kind == "conv" else random_mlp(rng, [4, 6, 5, 1])
    box = uniform(-1, 1, network.input_shape)
    low, high = sampled(network, box, rng) if kind == "conv" else interval_bounds(network, box)
    open_now = [np.flatnonzero((a < 0) & (b > 0)) for a, b in zip(low, high, strict=True)]
    active, inactive = {k: v[::2] for k, v in enumerate(open_now)}, {k: v[1::2] for k, v in enumerate(open_now)}
    first = solve(isa_arrays(network, box, low, high, active, inactive).arrays, "max")
    m = isa_pyomo(network, box, low, high, active, inactive)
    solver = pyo.SolverFactory("appsi_highs")
    solver.solve(m)
    assert pyo.value(m.newly_seen) == pytest.approx(first.objective, abs=1e-6)
    assert first.dual_bound == pytest.approx(first.objective, abs=1e-6)
    assert first.objective <= sum(map(len, active.values())) + sum(map(len, inactive.values()))
    point = isa_arrays(network, box, low, high, active, inactive).bigm.point(first.x)
    shown = sum(int((preactivation(network, point, k)[v] > -1e-6).sum()) for k, v in active.items())
    shown += sum(int((preactivation(network, point, k)[v] < 1e-6).sum()) for k, v in inactive.items())
    assert shown >= round(first.objective)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_leo_on_several_inputs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, box = random_mlp(rng, [6, 8, 6, 1], bias=1.5), uniform(-1, 1, (6,))
    low, high = interval_bounds(network, box)
    other = leo.decide(network, box, low, high)
    for layer in scaling_up.decide(network, box, low, high, samples=box.sample(50, rng)):
        statuses = {s.neuron: s.status for s in other[layer.layer]}
        assert {s.neuron: s.status for s in layer}.items() <= statuses.items()


def test_only_what_is_asked() -> None:
    network, box = random_mlp(np.random.default_rng(3), [3, 8, 6, 1]), uniform(-1, 1, (3,))
    low, high = interval_bounds(network, box)
    open_first = np.flatnonzero((low[0] < 0) & (high[0] > 0))[:2]
    first, second = scaling_up.decide(
        network, box, low, high, ask_positive={0: open_first}, ask_negative={0: open_first[:1]}
    )
    assert [s.neuron for s in first] == open_first.tolist()
    assert len(second) == 0
    assert first.suggestions[0].status is Status.UNSTABLE
    assert first.suggestions[1].negative is None


def test_published_reading_believes_the_solver() -> None:
    """z_hat = 3 relu(x) - 3 relu(x) is 0 everywhere: the phase is free, so the published method sees both states."""
    network = build_network([
        Node("a", Affine(np.array([[1.0], [1.0]]), np.zeros(2)), (-1,)), Node("r", ReLU(), (0,)),
        Node("b", Affine(np.array([[3.0, -3.0]]), np.zeros(1)), (1,)), Node("s", ReLU(), (2,)),
        Node("c", Affine(np.ones((1, 1)), np.zeros(1)), (3,))], (1,), np.float64)
    box = uniform(-1, 1, (1,))
    low, high = interval_bounds(network, box)
    published = scaling_up.decide(network, box, low, high, confirm=False)[1].suggestions[0]
    assert published.status is Status.UNSTABLE and published.positive is None
    confirmed = scaling_up.decide(network, box, low, high)[1].suggestions[0]
    assert confirmed.status in (Status.INACTIVE, Status.UNKNOWN)


def test_time_and_cancel_end_as_unknown() -> None:
    network, box = random_mlp(np.random.default_rng(0), [5, 10, 10, 1]), uniform(-1, 1, (5,))
    low, high = interval_bounds(network, box)
    for layer in scaling_up.decide(network, box, low, high, time_limit=0.0):
        assert all(s.status is Status.UNKNOWN and "time limit" in s.reason for s in layer)
    cancel = threading.Event()
    cancel.set()
    for layer in scaling_up.decide(network, box, low, high, cancel=cancel):
        assert all(s.status is Status.UNKNOWN and "cancelled" in s.reason for s in layer)


def test_a_solver_that_is_not_there() -> None:
    pytest.importorskip("pyomo")
    network, box = random_mlp(np.random.default_rng(0), [2, 3, 1]), uniform(-1, 1, (2,))
    low, high = interval_bounds(network, box)
    with pytest.raises(SolverError, match="cannot find the solver 'glpk'"):
        scaling_up.decide(network, box, low, high, solver="glpk")
