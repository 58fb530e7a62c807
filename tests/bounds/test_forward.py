"""The float64 forward pass against numpy, and its error bounds and exact values against Fractions throughout."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.bounds.forward import (
    Forward,
    _cone,
    certain_sign,
    exact_cost,
    exact_preactivation,
    exact_preactivations,
    gamma,
)
from exactprune.domain import Box, uniform
from exactprune.errors import DomainError, ExactPruneError, OptionError, ShapeError
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose


def fractions(array: np.ndarray) -> np.ndarray:
    result = np.empty(array.shape, dtype=object)
    result.reshape(-1)[:] = [Fraction(float(v)) for v in array.reshape(-1)]
    return result


def exact_nodes(network: Network, x: np.ndarray) -> list[np.ndarray]:
    """Every ReLU layer's pre-activation by the operators' own numpy code on arrays of Fractions."""
    values = {INPUT: fractions(x.reshape(1, *network.input_shape))}
    found = []
    for i, node in enumerate(network.nodes):
        op = replace(node.op, **{name: fractions(a) for name, a in node.op.arrays()})
        if isinstance(op, Pad):
            op = replace(op, value=Fraction(float(op.value)))
        if isinstance(op, ReLU):
            found.append(values[node.inputs[0]].reshape(-1))
        values[i] = exact_op(op, [values[j] for j in node.inputs])
    return found


def exact_op(op: Op, given: list[np.ndarray]) -> np.ndarray:
    """The operator's own evaluate, with padding done here: its 0.0 would turn sums of Fractions into floats."""
    if isinstance(op, ReLU):
        return np.maximum(given[0], Fraction(0))
    if not isinstance(op, Conv2d | AvgPool2d):
        return op.evaluate(*given)
    top, left, bottom, right = op.padding
    padded = np.pad(given[0], ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=Fraction(0))
    bare = replace(op, padding=(0, 0, 0, 0)).evaluate(padded)
    if isinstance(op, Conv2d):
        return bare
    return bare * int(np.prod(op.kernel)) / op.divisors(given[0].shape[1:]).astype(object)


def every_op(rng: np.random.Generator, spread: float = 0.0, dtype: type = np.float32) -> Network:
    """All operators in one network, a residual block and odd settings included."""

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) * 10.0 ** rng.uniform(-spread, spread, size=shape)

    ops: list[tuple[Op, tuple[int, ...]]] = [
        (Scale(draw(2, 1, 1), draw(2, 1, 1)), (-1,)),
        (Pad(((0, 0), (1, 0), (0, 2)), -0.3), (0,)),
        (Conv2d(draw(4, 1, 2, 3), draw(4), (1, 2), (1, 0, 0, 1), (2, 1), 2), (1,)),
        (ReLU(), (2,)),
        (Conv2d(draw(4, 4, 3, 3), draw(4), padding=(1, 1, 1, 1)), (3,)),
        (Add(), (3, 4)),
        (ReLU(), (5,)),
        (MaxPool2d((2, 2), (1, 1), (1, 0, 0, 1)), (6,)),
        (AvgPool2d((3, 2), (2, 1), (1, 0, 1, 1), False), (7,)),
        (AvgPool2d((2, 2), (1, 2), (0, 1, 1, 0), True), (8,)),
        (Transpose((2, 0, 1)), (9,)),
    ]
    nodes = [Node(f"n{i}", op.astype(dtype), inputs) for i, (op, inputs) in enumerate(ops)]
    size = int(np.prod(build(nodes, (2, 5, 6), dtype).output_shape))
    tail = [Reshape((size,)), Affine(draw(7, size), draw(7)), ReLU(), Affine(draw(2, 7), draw(2))]
    nodes += [Node(f"t{i}", op.astype(dtype), (10 + i,)) for i, op in enumerate(tail)]
    return build(nodes, (2, 5, 6), dtype, name="every-op")


def chain(rng: np.random.Generator, sizes: tuple[int, ...], spread: float) -> Network:
    nodes: list[Node] = []
    for a, b in pairwise(sizes):
        weight = rng.normal(size=(b, a)) * 10.0 ** rng.uniform(-spread, spread, size=(b, a))
        nodes.append(Node("affine", Affine(weight, rng.normal(size=b)), (len(nodes) - 1,)))
        nodes.append(Node("relu", ReLU(), (len(nodes) - 1,)))
    return build(nodes, (sizes[0],), np.float64, name="chain")


def cancelling() -> Network:
    """relu(x + M) - relu(0.5) - M at M = 2^53: float64 rounds x away, the truth is x - 0.5."""
    big = 2.0**53
    nodes = [Node("a", Affine(np.array([[1.0], [0.0]]), np.array([big, 0.5])), (-1,)), Node("r", ReLU(), (0,)),
             Node("b", Affine(np.array([[1.0, -1.0]]), np.array([-big])), (1,)), Node("s", ReLU(), (2,))]
    return build(nodes, (1,), np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_op_agrees_with_numpy(dtype: type) -> None:
    rng = np.random.default_rng(0)
    network = every_op(rng, dtype=dtype)
    x = rng.normal(size=(5, 2, 5, 6))
    nodes = network.astype(np.float64).evaluate_nodes(x)
    found = Forward(network).preactivations(x)
    assert len(found) == 3
    for z, relu in zip(found, network.relus):
        expected = nodes[network.nodes[relu].inputs[0]].reshape(5, -1)
        np.testing.assert_allclose(z.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_stops_early_with_the_same_values(last: int) -> None:
    rng = np.random.default_rng(1)
    forward = Forward(every_op(rng))
    x = rng.normal(size=(3, 60))
    all_layers, some = forward.preactivations(x), forward.preactivations(x, last)
    assert len(some) == last + 1
    assert all(torch.equal(a, b) for a, b in zip(some, all_layers))
    assert forward.width(last) <= forward.width()


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_op_against_fractions(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    network = every_op(rng, spread)
    forward = Forward(network)
    box = uniform(-1.5, 1.5, network.input_shape)
    x = box.sample(2, rng)
    values, errors = forward.with_errors(x)
    for row, point in enumerate(x):
        for k, truth in enumerate(exact_nodes(network, point)):
            assert exact_preactivations(network, point, k, range(len(truth))) == list(truth)
            wrong = [abs(Fraction(float(z)) - t) for z, t in zip(values[k][row], truth)]
            assert all(w <= Fraction(float(e)) for w, e in zip(wrong, errors[k][row]))
            assert all(w <= Fraction(float(e)) for w, e in zip(wrong, forward.box_errors(box)[k]))


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_of_exact_arithmetic_is_no_less_than_the_products_of_the_cone(seed: int) -> None:
    network = every_op(np.random.default_rng(seed))
    for k, relu in enumerate(network.relus):
        position = network.nodes[relu].inputs[0]
        size = int(np.prod(network.shapes[position]))
        most = 0
        for neuron in range(size):
            needed = _cone(network, position, np.array([neuron]))
            most = max(most, sum(len(out) * int(np.prod(network.nodes[i].op.weight.shape[1:]))
                                 for i, out in needed.items() if i >= 0 and hasattr(network.nodes[i].op, "weight")))
        assert most <= exact_cost(network, k) <= network.macs + 1000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 2.0, 4.0]), st.sampled_from([(1, 3, 3, 2), (4, 6, 5), (30, 8, 3)]))
def test_error_bounds_hold_on_ill_scaled_networks(seed: int, spread: float, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    network = chain(rng, sizes, spread)
    forward = Forward(network)
    box = uniform(-1, 2, network.input_shape)
    x = np.concatenate([box.sample(1, rng), box.corners(1, rng)])
    values, errors = forward.with_errors(x)
    signs, whole = forward.signs(x), forward.box_errors(box)
    for row, point in enumerate(x):
        for k, truth in enumerate(exact_nodes(network, point)):
            for i, t in enumerate(truth):
                wrong = abs(Fraction(float(values[k][row, i])) - t)
                assert wrong <= Fraction(float(errors[k][row, i])) and wrong <= Fraction(float(whole[k][i]))
                assert errors[k][row, i] <= 1.000001 * whole[k][i]
                assert int(signs[k][row, i]) in (0, (t > 0) - (t < 0))


def test_another_order_of_summation_stays_within_the_bound() -> None:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(4, 300)) * 10.0 ** rng.uniform(-6, 6, size=(4, 300))
    network = build([Node("a", Affine(weight, np.zeros(4)), (-1,)), Node("r", ReLU(), (0,))], (300,), np.float64)
    x = rng.random((1, 300))
    (z,), (error,) = Forward(network).with_errors(x)
    for _ in range(20):
        order = rng.permutation(300)
        other = np.add.reduce(weight[:, order] * x[:, order], axis=1)
        assert (np.abs(other - z.numpy()[0]) <= 2 * error.numpy()[0]).all()


def test_the_bound_is_not_vacuous() -> None:
    network = chain(np.random.default_rng(2), (784, 256, 256), 0.0)
    errors = Forward(network).box_errors(uniform(0, 1, (784,)))
    assert float(errors[0].min()) > 1e-14 and float(errors[-1].max()) < 1e-7


def test_cancellation_is_left_open_by_floats_and_settled_by_rationals() -> None:
    network = cancelling()
    assert int(Forward(network).signs(np.array([[0.75]]))[1][0, 0]) == 0
    assert exact_preactivation(network, np.array([0.75]), 1, 0) == Fraction(1, 4)
    assert exact_preactivation(network, np.array([0.25]), 1, 0) == Fraction(-1, 4)


def test_overflow_is_never_certain() -> None:
    weight = np.full((1, 2), 1e308)
    nodes = [Node("a", Affine(weight, np.zeros(1)), (-1,)), Node("r", ReLU(), (0,)),
             Node("b", Affine(np.array([[-1e308]]), np.zeros(1)), (1,)), Node("s", ReLU(), (2,))]
    signs = Forward(build(nodes, (2,), np.float64)).signs(np.array([[1.5, 1.5]]))
    assert [int(s[0, 0]) for s in signs] == [0, 0]


def test_underflow_is_paid_for() -> None:
    nodes = [Node("a", Affine(np.array([[1e-200]]), np.zeros(1)), (-1,)), Node("r", ReLU(), (0,))]
    network = build(nodes, (1,), np.float64)
    assert int(Forward(network).signs(np.array([[1e-200]]))[0][0, 0]) == 0
    assert exact_preactivation(network, np.array([1e-200]), 0, 0) > 0


def test_certain_sign_of_nan_and_infinity_is_open() -> None:
    value = torch.tensor([float("nan"), float("inf"), 1.0, -1.0, 1.0, 0.0])
    error = torch.tensor([0.0, 1.0, float("nan"), 0.5, 1.0, 0.0])
    assert certain_sign(value, error).tolist() == [0, 0, 0, -1, 0, 0]


def test_gamma_is_an_upper_bound() -> None:
    for n in (1, 7, 1000, 10**6):
        assert Fraction(gamma(n)) >= n * Fraction(2) ** -53 / (1 - n * Fraction(2) ** -53)


def test_network_without_relus_has_no_preactivations() -> None:
    network = build([Node("a", Affine(np.ones((1, 2)), np.zeros(1)), (-1,))], (2,), np.float64)
    assert Forward(network).preactivations(np.zeros((3, 2))) == []
    assert Forward(network).box_errors(uniform(0, 1, (2,))) == []


def test_gradients_flow_through_every_op() -> None:
    rng = np.random.default_rng(3)
    forward = Forward(every_op(rng))
    x = torch.tensor(rng.normal(size=(2, 60)), requires_grad=True)
    slope = torch.autograd.grad(forward.preactivations(x)[-1].sum(), x)[0]
    assert float(slope.abs().sum()) > 0
    moved = x.detach() + 1e-7 * slope
    gain = forward.preactivations(moved)[-1].sum() - forward.preactivations(x.detach())[-1].sum()
    assert float(gain) == pytest.approx(1e-7 * float((slope**2).sum()), rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_stays_within_the_bounds() -> None:
    rng = np.random.default_rng(4)
    network = every_op(rng, 2.0)
    x = rng.normal(size=(8, 60))
    cpu, error = Forward(network).with_errors(x)
    for a, b, e in zip(cpu, Forward(network, "cuda").preactivations(x), error):
        assert bool(((a - b.cpu()).abs() <= 2 * e).all())


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda f: f.preactivations(np.zeros((2, 5))), ShapeError, "60"),
    (lambda f: f.preactivations(np.zeros(60)), ShapeError, "batch"),
    (lambda f: f.preactivations(np.zeros((1, 60)), 3), OptionError, "3 ReLU layers"),
    (lambda f: f.preactivations(np.zeros((1, 60)), -1), OptionError, "count from 0"),
    (lambda f: f.box_errors(Box(np.zeros(3), np.ones(3))), DomainError, "60"),
    (lambda f: exact_preactivation(f.network, np.zeros(5), 0, 0), ShapeError, "60"),
    (lambda f: exact_preactivation(f.network, np.full(60, np.nan), 0, 0), DomainError, "NaN"),
    (lambda f: exact_preactivation(f.network, np.zeros(60), 9, 0), OptionError, "count from 0"),
])
def test_misuse_is_named(call, error: type[ExactPruneError], words: str) -> None:
    forward = Forward(every_op(np.random.default_rng(0)))
    with pytest.raises(error, match=words):
        call(forward)


def test_the_cost_of_exact_arithmetic_of_a_neuron_between_convolutions() -> None:
    """Two 3x3 convolutions without padding: 9 positions of 2 channels of 9 products each, and 2 x 9 more."""
    nodes = [Node("a", Conv2d(np.ones((2, 1, 3, 3), np.float32), np.zeros(2, np.float32)), (INPUT,)), Node("r", ReLU(), (0,)),
             Node("b", Conv2d(np.ones((5, 2, 3, 3), np.float32), np.zeros(5, np.float32)), (1,)), Node("s", ReLU(), (2,))]
    network = build(nodes, (1, 20, 20), np.dtype(np.float32))
    assert [exact_cost(network, k) for k in (0, 1)] == [9, 9 * 2 * 9 + 18]
