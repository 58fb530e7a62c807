"""The big-M arrays: no point of the network is lost, and their optimum is the network's.

Completeness: the values of a real forward pass, put into the columns, satisfy every row. Exactness: the optimum
agrees with an enumeration of phase patterns by another solver.
"""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from exact_truth import extremum_by_phases, interval_bounds, mlp, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from exactprune.domain import Box, uniform
from exactprune.errors import OptionError, ShapeError
from exactprune.formulations.arrays import TINY, Kind, MilpArrays, RowKind, power_of_two_below, scaled
from exactprune.formulations.bigm import BigM, build
from exactprune.formulations.lowering import windows
from exactprune.network import INPUT, Network, Node
from exactprune.network import build as build_network
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose


def sampled_bounds(network: Network, box: Box, margin: float, rng: np.random.Generator) -> tuple[list, list]:
    """Bounds that enclose many sampled points (enough for tests that use those points), widened by ``margin``."""
    values = network.evaluate_nodes(np.concatenate([box.sample(200, rng), box.corners(200, rng)]), np.float64)
    z_hat = [values[network.nodes[r].inputs[0]].reshape(400, -1) for r in network.relus]
    return [z.min(0) - margin for z in z_hat], [z.max(0) + margin for z in z_hat]


def columns_of_point(model: BigM, x: np.ndarray) -> np.ndarray:
    """The columns' values at the network's own values for one input."""
    network, columns = model.network, model.arrays.columns
    values = network.evaluate_nodes(x[None], np.float64)
    y = np.zeros(columns.kind.size)
    for place, (kind, layer, index) in enumerate(zip(columns.kind, columns.layer, columns.index)):
        if kind == Kind.INPUT:
            natural = x.ravel()[index]
        elif kind == Kind.POOL:
            natural = values[layer].ravel()[index]
        elif kind == Kind.CHOICE:
            continue
        else:
            z_hat = values[network.nodes[network.relus[layer]].inputs[0]].ravel()[index]
            natural = {Kind.Z: max(z_hat, 0), Kind.SLACK: max(-z_hat, 0), Kind.PHASE: float(z_hat > 0),
                       Kind.ACTIVE: z_hat}[Kind(kind)]
        y[place] = (natural - columns.shift[place]) / columns.scale[place]
    _choose(model, values, y)
    return y


def _choose(model: BigM, values: dict[int, np.ndarray], y: np.ndarray) -> None:
    """Each max pool's choice goes to a place that attains the maximum. (Windows that overlap share no choice
    column.)"""
    columns = model.arrays.columns
    for position in set(columns.layer[columns.kind == Kind.POOL]):
        op, source = model.network.nodes[position].op, model.network.nodes[position].inputs[0]
        assert isinstance(op, MaxPool2d)
        places = windows(model.network.shape_of(source), op.kernel, op.stride, op.padding, op.dilation)
        places = places.reshape(prod(places.shape[:3]), -1)
        choices = np.flatnonzero((columns.kind == Kind.CHOICE) & (columns.layer == position))
        for output in columns.index[(columns.kind == Kind.POOL) & (columns.layer == position)]:
            mine = [c for c in choices if columns.index[c] in places[output]]
            y[max(mine, key=lambda c: values[source].ravel()[columns.index[c]])] = 1.0


def violation(arrays: MilpArrays, y: np.ndarray) -> float:
    rows = arrays.A @ y
    return max(np.max(arrays.row_lower - rows, initial=0), np.max(rows - arrays.row_upper, initial=0),
               np.max(arrays.col_lower - y, initial=0), np.max(y - arrays.col_upper, initial=0))


def milp_optimum(arrays: MilpArrays) -> float:
    """By scipy, as another way to the solver."""
    constraint = optimize.LinearConstraint(arrays.A, arrays.row_lower, arrays.row_upper) if arrays.A.shape[0] else ()
    found = optimize.milp(-arrays.c, integrality=arrays.integrality, constraints=constraint,
                          bounds=optimize.Bounds(arrays.col_lower, arrays.col_upper))
    assert found.status == 0, found.message
    return arrays.offset - found.fun


def chain(ops: list[Op], shape: tuple[int, ...]) -> Network:
    return build_network([Node(f"n{i}", op, (i - 1,)) for i, op in enumerate(ops)], shape, np.float64)


def residual(rng: np.random.Generator) -> Network:
    def conv(out: int, into: int) -> Conv2d:
        return Conv2d(rng.normal(size=(out, into, 3, 3)) / 3, rng.normal(size=out) / 3, padding=(1, 1, 1, 1))

    ops: list[tuple[Op, tuple[int, ...]]] = [
        (conv(2, 1), (INPUT,)), (ReLU(), (0,)), (conv(2, 2), (1,)), (Add(), (2, 0)), (ReLU(), (3,)),
        (MaxPool2d((2, 2), (2, 2)), (4,)), (Scale(rng.normal(size=(2, 1, 1)), rng.normal(size=(2, 1, 1))), (5,)),
        (Pad(((0, 0), (1, 0), (0, 1)), 0.25), (6,)), (Transpose((1, 2, 0)), (7,)), (Reshape((2, 3, 3)), (8,)),
        (AvgPool2d((2, 2), (1, 1)), (9,)), (Reshape((8,)), (10,)),
        (Affine(rng.normal(size=(3, 8)), rng.normal(size=3)), (11,)), (ReLU(), (12,)),
        (Affine(rng.normal(size=(2, 3)), rng.normal(size=2)), (13,)),
    ]
    return build_network([Node(f"n{i}", op, inputs) for i, (op, inputs) in enumerate(ops)], (1, 4, 4), np.float64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("binaries", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_every_point_of_the_network_is_feasible(kind: str, binaries: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = residual(rng) if kind == "residual" else random_mlp(rng, [6, 12, 10, 4], spread=1.0)
    box = Box(rng.uniform(-1, 0, network.input_shape), rng.uniform(0, 1, network.input_shape))
    low, high = sampled_bounds(network, box, 0.5, rng)
    last = len(network.relus) - 1
    model = build(network, box, low, high, target=last, binaries=binaries)
    assert model.arrays.binaries == 0 or binaries or kind == "residual"
    for x in box.sample(20, rng):
        y = columns_of_point(model, x)
        assert violation(model.arrays, y) < 1e-9
        np.testing.assert_allclose(model.point(y), x, atol=1e-12)
        z_hat = network.evaluate_nodes(x[None], np.float64)[network.nodes[network.relus[last]].inputs[0]].ravel()
        for neuron in range(z_hat.size):
            c, offset = model.objective(neuron)
            assert c @ y + offset == pytest.approx(z_hat[neuron], abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_that_of_the_network(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = random_mlp(rng, [3, 4, 3, 2])
    box = uniform(-1, 1, (3,))
    network = Network((*network.nodes, Node("r", ReLU(), (len(network.nodes) - 1,))), (3,), np.dtype(float))
    low, high = interval_bounds(network, box)
    for layer, sign in ((1, 1), (2, -1)):
        model = build(network, box, low, high, target=layer)
        c, offset = model.objective(0)
        expected = extremum_by_phases(network, box, layer, 0, sign)
        assert milp_optimum(model.arrays.with_objective(sign * c, sign * offset)) == pytest.approx(expected, abs=1e-6)
        relaxed = build(network, box, low, high, target=layer, binaries=False).arrays
        triangle = milp_optimum(relaxed.with_objective(*(sign * part for part in
                                build(network, box, low, high, target=layer, binaries=False).objective(0))))
        assert triangle >= expected - 1e-7
        assert milp_optimum(model.arrays.relaxed().with_objective(sign * c, sign * offset)) == pytest.approx(
            triangle, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_max_pool_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = chain(
        [
            Conv2d(rng.normal(size=(2, 1, 2, 2)), rng.normal(size=2)),
            MaxPool2d((2, 2), (1, 1)),
            Reshape((8,)),
            Affine(rng.normal(size=(2, 8)), rng.normal(size=2)),
            ReLU(),
        ],
        (1, 4, 4),
    )
    box = uniform(-1, 1, (1, 4, 4))
    model = build(network, box, [], [], target=0)
    c, offset = model.objective(0)
    best = milp_optimum(model.arrays.with_objective(c, offset))
    points = np.concatenate([box.corners(4000, rng), box.sample(1000, rng)])
    seen = network.evaluate_nodes(points, np.float64)[3][:, 0].max()
    assert best >= seen - 1e-9
    found = optimize.milp(
        -c,
        integrality=model.arrays.integrality,
        constraints=optimize.LinearConstraint(model.arrays.A, model.arrays.row_lower, model.arrays.row_upper),
        bounds=optimize.Bounds(model.arrays.col_lower, model.arrays.col_upper),
    )
    value = network.evaluate_nodes(model.point(found.x)[None], np.float64)[3][0, 0]
    assert value == pytest.approx(best, abs=1e-6)


def test_what_is_stable_or_unread_has_no_columns() -> None:
    weight = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0], [0.5, 0.5], [1.0, 2.0]])
    network = mlp([(weight, np.array([5.0, 0.0, -3.0, 0.0, 0.0])), (np.array([[1.0, 1, 1, 1, 0.0]]), np.zeros(1)),
                   (np.eye(1), np.zeros(1))])
    box = Box(np.array([-1.0, 0.5]), np.array([1.0, 0.5]))
    low, high = interval_bounds(network, box)
    model = build(network, box, low, high, target=1)
    columns = model.arrays.columns
    assert list(columns.index[columns.kind == Kind.INPUT]) == [0], "the second input is fixed"
    assert list(columns.index[columns.kind == Kind.PHASE]) == [1, 3], "0 is active, 2 inactive, 4 unread"
    assert model.arrays.binaries == 2
    assert milp_optimum(model.arrays.with_objective(*model.objective(0))) == pytest.approx(6.5 + 0.5 + 0.75)


def test_many_active_neurons_become_columns_of_their_own() -> None:
    rng = np.random.default_rng(3)
    network = random_mlp(rng, [200, 10, 150, 1])
    first = network.nodes[0].op
    assert isinstance(first, Affine)
    network = mlp([(first.weight, first.bias + 100), *((n.op.weight, n.op.bias) for n in network.nodes[2::2]
                                                       if isinstance(n.op, Affine))])
    network = Network((*network.nodes, Node("r", ReLU(), (len(network.nodes) - 1,))), (200,), np.dtype(float))
    box = uniform(-1, 1, (200,))
    low, high = interval_bounds(network, box)
    model = build(network, box, low, high, target=2)
    assert (model.arrays.columns.kind == Kind.ACTIVE).sum() == 10
    x = box.sample(1, rng)[0]
    assert violation(model.arrays, columns_of_point(model, x)) < 1e-9
    single = build(network, box, low, high, target=1, neurons=np.array([0]))
    assert not (single.arrays.columns.kind == Kind.ACTIVE).any(), "one reader: substituted"


def test_phases_fix_columns() -> None:
    network = random_mlp(np.random.default_rng(0), [2, 4, 1, 1])
    box = uniform(-1, 1, (2,))
    low, high = interval_bounds(network, box)
    model = build(network, box, low, high, target=1)
    neurons = model.arrays.columns.where(Kind.PHASE, 0)[1]
    bottom, top = model.phases({(0, int(neurons[0])): True, (0, int(neurons[1])): False, (7, 7): True})
    for neuron, kind in ((neurons[0], Kind.SLACK), (neurons[1], Kind.Z)):
        columns, index = model.arrays.columns.where(kind, 0)
        assert top[columns[index == neuron]] == 0
    phase, index = model.arrays.columns.where(Kind.PHASE, 0)
    assert (bottom[phase[index == neurons[0]]], top[phase[index == neurons[1]]]) == (1, 0)


class TestMisuse:
    network = random_mlp(np.random.default_rng(0), [2, 3, 2, 1])
    box = uniform(-1, 1, (2,))

    @pytest.mark.parametrize(("low", "high", "words"), [
        ([], [], "bounds of 0 ReLU layers given, 1 needed"),
        ([np.zeros(2)], [np.ones(2)], "bounds of 2 and 2 neurons, the layer has 3"),
        ([np.array([0, np.nan, 0])], [np.ones(3)], "neuron 1: bounds nan"),
        ([np.array([0, 0, -np.inf])], [np.ones(3)], "neuron 2: bounds -inf"),
        ([np.array([2.0, 0, 0])], [np.ones(3)], "neuron 0: bounds 2.0 and 1.0"),
    ])
    def test_bounds(self, low: list, high: list, words: str) -> None:
        with pytest.raises(ShapeError, match=words):
            build(self.network, self.box, low, high, target=1)

    def test_nothing_asked(self) -> None:
        with pytest.raises(OptionError, match="target layer"):
            build(self.network, self.box, [], [])

    def test_layer_that_does_not_exist(self) -> None:
        with pytest.raises(OptionError, match="the network has 2"):
            build(self.network, self.box, [], [], target=5)

    def test_neuron_that_was_not_named(self) -> None:
        model = build(self.network, self.box, [], [], target=0, neurons=np.array([1]))
        with pytest.raises(OptionError, match="neuron 0 of ReLU layer 0"):
            model.objective(0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scaled_rows_are_a_relaxation_without_tiny_coefficients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(4, 6)) * 10.0 ** rng.uniform(-12, 6, size=(4, 6)) * (rng.random((4, 6)) < 0.7)
    y = rng.random(6)
    value = matrix @ y
    kept, low, high, factor = scaled(sparse.csr_array(matrix), value.copy(), value.copy())
    assert np.all(np.abs(kept.data) >= TINY)
    largest = abs(kept).max(axis=1).toarray().ravel()
    assert np.all((largest == 0) | ((largest >= 1) & (largest < 2)))
    assert np.all(np.log2(factor) == np.round(np.log2(factor)))
    slack = 1e-12 * np.abs(matrix).sum(axis=1) * factor
    assert np.all(kept @ y >= low - slack)
    assert np.all(kept @ y <= high + slack)


def test_power_of_two_below() -> None:
    given_values = np.array([0.0, 1.0, 1.5, 2.0, 3.99, 0.3, np.inf, np.nan, 2.0**-1000])
    np.testing.assert_array_equal(power_of_two_below(given_values), [1, 1, 1, 2, 2, 0.25, 1, 1, 2.0**-1000])


def test_rows_say_what_they_are() -> None:
    network = random_mlp(np.random.default_rng(0), [2, 4, 1, 1])
    low, high = interval_bounds(network, uniform(-1, 1, (2,)))
    arrays = build(network, uniform(-1, 1, (2,)), low, high, target=1).arrays
    assert set(arrays.rows.kind) == {RowKind.DEFINITION, RowKind.PHASE}
    assert "integers" in repr(arrays)
