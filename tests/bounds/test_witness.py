"""Witnesses: every one confirmed in rationals, none of an impossible sign, and those found that are known to exist."""

import os
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.bounds.forward import Forward, exact_preactivations
from exactprune.bounds.witness import Witnesses, WitnessSearch, greedy_cover
from exactprune.claim import Method
from exactprune.domain import Box, uniform
from exactprune.errors import DomainError, OptionError, ShapeError
from exactprune.network import Network, Node, build
from exactprune.ops import Add, Affine, Conv2d, MaxPool2d, Op, ReLU, Reshape

SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", Path(__file__).parents[2].parent / "shared"))


def chain(rng: np.random.Generator, sizes: tuple[int, ...], spread: float = 0.0) -> Network:
    nodes: list[Node] = []
    for a, b in pairwise(sizes):
        weight = rng.normal(size=(b, a)) * 10.0 ** rng.uniform(-spread, spread, size=(b, a)) / np.sqrt(a)
        nodes.append(Node("affine", Affine(weight, rng.normal(size=b)), (len(nodes) - 1,)))
        nodes.append(Node("relu", ReLU(), (len(nodes) - 1,)))
    return build(nodes, (sizes[0],), np.float64)


def affine(weight: list[list[float]], bias: list[float], *more: tuple[list[list[float]], list[float]]) -> Network:
    nodes: list[Node] = []
    for w, b in [(weight, bias), *more]:
        nodes.append(Node("affine", Affine(np.array(w), np.array(b)), (len(nodes) - 1,)))
        nodes.append(Node("relu", ReLU(), (len(nodes) - 1,)))
    return build(nodes, (len(weight[0]),), np.float64)


def convolutional(rng: np.random.Generator) -> Network:
    ops: list[tuple[Op, tuple[int, ...]]] = [
        (Conv2d(rng.normal(size=(4, 1, 3, 3)), rng.normal(size=4), padding=(1, 1, 1, 1)), (-1,)), (ReLU(), (0,)),
        (Conv2d(rng.normal(size=(4, 4, 3, 3)), rng.normal(size=4), padding=(1, 1, 1, 1)), (1,)), (Add(), (1, 2)),
        (ReLU(), (3,)), (MaxPool2d((2, 2), (2, 2)), (4,)), (Reshape((64,)), (5,)),
        (Affine(rng.normal(size=(9, 64)) / 8, rng.normal(size=9)), (6,)), (ReLU(), (7,)),
    ]
    return build([Node(f"n{i}", op, inputs) for i, (op, inputs) in enumerate(ops)], (1, 8, 8), np.float64)


def confirm(network: Network, box: Box, found: Witnesses) -> int:
    """Every recorded sign in exact arithmetic; returns how many there are."""
    assert box.contains(found.points.reshape(-1, *network.input_shape)).all()
    used, count = set(), 0
    sides = (1, found.positive, found.positive_method), (-1, found.negative, found.negative_method)
    for sign, rows, methods in sides:
        for k, row in enumerate(rows):
            assert ((row >= 0) == (methods[k] > 0)).all()
            for point in np.unique(row[row >= 0]):
                neurons = np.flatnonzero(row == point)
                values = exact_preactivations(network, found.points[point], k, neurons)
                assert all(v * sign > 0 for v in values)
                used.add(int(point))
                count += len(neurons)
    assert used == set(range(len(found.points)))
    return count


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 2.0, 4.0]), st.sampled_from([(1, 3, 3), (2, 6, 5, 4), (6, 8, 3)]))
def test_every_witness_is_confirmed_exactly(seed: int, spread: float, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    network = chain(rng, sizes, spread)
    lower = rng.normal(size=sizes[0])
    box = Box(lower, lower + rng.random(sizes[0]) * 10.0 ** rng.integers(-9, 1))
    search = WitnessSearch(network, box, seed=seed)
    found = search.sample(64) + search.corners() + search.ascent(rounds=1, steps=5)
    assert confirm(network, box, search.snapshot()) == found


def test_convolutions_and_residuals_too() -> None:
    network = convolutional(np.random.default_rng(0))
    box = uniform(-1, 1, network.input_shape)
    search = WitnessSearch(network, box)
    found = search.sample(64) + search.corners() + search.ascent(rounds=2)
    assert confirm(network, box, search.snapshot()) == found
    assert search.missing() + found == 2 * network.neurons


def test_finds_every_sign_that_a_fine_grid_shows() -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        network = chain(rng, (2, 6, 6, 6))
        box = uniform(-2, 2, (2,))
        axis = np.linspace(-2, 2, 201)
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        search = WitnessSearch(network, box)
        search.sample(256)
        search.ascent(rounds=3)
        for k, z in enumerate(Forward(network).preactivations(grid)):
            positive, negative = search.lacking(k)
            assert not (positive & (z > 1e-6).any(dim=0).numpy()).any()
            assert not (negative & (z < -1e-6).any(dim=0).numpy()).any()


def test_corners_decide_the_first_layer_exactly() -> None:
    rng = np.random.default_rng(2)
    network = chain(rng, (40, 60, 3))
    center = rng.normal(size=40)
    box = Box(center - 0.3, center + 0.3)
    search = WitnessSearch(network, box)
    search.corners()
    op = network.nodes[0].op
    assert isinstance(op, Affine)
    positive, negative = search.lacking(0)
    for i in range(60):
        ends = [(Fraction(w) * Fraction(a), Fraction(w) * Fraction(b))
                for w, a, b in zip(op.weight[i], box.lower, box.upper)]
        assert positive[i] == (sum(map(max, ends), Fraction(op.bias[i])) <= 0)
        assert negative[i] == (sum(map(min, ends), Fraction(op.bias[i])) >= 0)
    assert 0 < positive.sum() + negative.sum() < 120


def test_corners_of_a_convolution_share_points() -> None:
    network = convolutional(np.random.default_rng(3))
    search = WitnessSearch(network, uniform(-1, 1, network.input_shape))
    search.corners()
    op = network.nodes[0].op
    assert isinstance(op, Conv2d)
    reach = replace(op, weight=np.abs(op.weight), bias=np.zeros(4)).evaluate(np.ones((1, 1, 8, 8)))[0]
    bias = np.broadcast_to(op.bias[:, None, None], reach.shape)
    positive, negative = search.lacking(0)
    assert (positive == (bias + reach <= 0).reshape(-1)).all() and (negative == (bias - reach >= 0).reshape(-1)).all()
    assert len(search.snapshot().points) < 100


def gated(n: int) -> Network:
    """z = relu(s . x - n + 1/2) - 1/4: positive near one corner of [-1, 1]^n only, and of gradient 0 elsewhere."""
    signs = [float(s) for s in np.random.default_rng(0).choice([-1, 1], n)]
    return affine([signs], [0.5 - n], ([[1.0]], [-0.25]))


def test_ascent_passes_dead_gradients() -> None:
    search = WitnessSearch(gated(60), uniform(-1, 1, (60,)))
    search.sample(1024)
    assert search.lacking(1)[0].all()
    only = [(np.zeros(1, bool), np.zeros(1, bool)), (np.ones(1, bool), np.zeros(1, bool))]
    assert search.ascent(only, rounds=1) >= 1
    assert not search.lacking(1)[0].any()
    assert search.snapshot().positive_method[1][0] == Method.ASCENT


def test_tiny_maximum_is_confirmed_by_rationals_only() -> None:
    """The maximum 2^-60 of z at x = 1 is below every float64 error bound."""
    network = affine([[1.0], [1.0]], [0.0, 2.0**-60], ([[-1.0, 1.0], [1.0, -1.0]], [0.0, 0.0]))
    box = uniform(1, 1, (1,))
    assert exact_preactivations(network, np.ones(1), 1, [0, 1]) == [Fraction(2) ** -60, -(Fraction(2) ** -60)]
    big = affine([[1.0], [1.0]], [0.0, 0.0], ([[3.0, -3.0]], [2.0**-60]))
    with_exact, without = WitnessSearch(big, box), WitnessSearch(big, box, exact_limit=0)
    assert with_exact.try_points(np.ones((1, 1))) == 3 and not with_exact.lacking(1)[0].any()
    assert without.try_points(np.ones((1, 1))) == 2 and without.lacking(1)[0].all()


def test_zero_is_no_witness_of_either_sign() -> None:
    search = WitnessSearch(affine([[0.0, 0.0]], [0.0]), uniform(-1, 1, (2,)))
    assert search.sample(64) + search.corners() + search.ascent(rounds=1) == 0
    assert all(mask.all() for mask in search.lacking(0))
    assert search.snapshot().points.shape == (0, 2)


def test_points_outside_the_box_are_left_out() -> None:
    search = WitnessSearch(affine([[1.0]], [0.0]), uniform(-1, 0, (1,)))
    assert search.try_points(np.array([[np.nextafter(0, 1)], [5.0], [np.nan], [np.inf]])) == 0
    assert search.data(np.array([[5.0], [np.nan]])) == 0
    assert search.data(np.array([[-7.0]])) == 1
    assert search.snapshot().points.tolist() == [[-1.0]]


def test_rule_out_and_open_masks_limit_the_work() -> None:
    rng = np.random.default_rng(4)
    network = chain(rng, (6, 10, 4))
    search = WitnessSearch(network, uniform(-1, 1, (6,)))
    chosen = np.arange(10) < 5
    search.rule_out(0, chosen, ~chosen)
    assert search.lacking(0)[0].tolist() == (~chosen).tolist() and search.lacking(0)[1].tolist() == chosen.tolist()
    search.sample(256)
    found = search.snapshot()
    assert (found.positive[0][chosen] == -1).all() and (found.negative[0][~chosen] == -1).all()
    nothing = [(np.zeros(n, bool), np.zeros(n, bool)) for n in (10, 4)]
    assert search.ascent(nothing) == 0


def test_seeds_differ() -> None:
    network, box = chain(np.random.default_rng(5), (5, 20)), uniform(-0.3, 0.4, (5,))
    points = [WitnessSearch(network, box, seed=seed).random_points(8) for seed in (0, 0, 1)]
    assert torch.equal(points[0], points[1]) and not torch.equal(points[0], points[2])


@pytest.mark.parametrize("sizes", [(5, 20, 20), (50, 20, 20)])
def test_equal_seeds_give_equal_witnesses(sizes: tuple[int, ...]) -> None:
    network = chain(np.random.default_rng(5), sizes)
    box = uniform(-0.3, 0.4, sizes[:1])

    def found(seed: int) -> Witnesses:
        search = WitnessSearch(network, box, seed=seed)
        search.sample(16)
        search.ascent(rounds=2)
        return search.snapshot()

    first, again = found(0), found(0)
    assert (first.points == again.points).all()
    assert all((a == b).all() for a, b in zip(first.positive + first.negative, again.positive + again.negative))


def test_small_memory_changes_chunks_not_soundness() -> None:
    network = chain(np.random.default_rng(6), (20, 30, 30))
    box = uniform(0, 1, (20,))
    search = WitnessSearch(network, box, memory=1 << 12)
    found = search.sample(100) + search.corners() + search.ascent(rounds=1, steps=3)
    assert confirm(network, box, search.snapshot()) == found > 0


def test_recorded_points_have_few_bits() -> None:
    network = chain(np.random.default_rng(7), (30, 40, 40))
    search = WitnessSearch(network, uniform(0, 1, (30,)))
    search.sample(256)
    search.ascent(rounds=1)
    scaled = search.snapshot().points * 2.0**14
    assert (scaled == np.round(scaled)).all()


def test_snapshot_is_immutable_and_later_finds_do_not_change_it() -> None:
    network = chain(np.random.default_rng(8), (10, 20, 20))
    search = WitnessSearch(network, uniform(-1, 1, (10,)))
    search.try_points(np.zeros((1, 10)))
    early = search.snapshot()
    with pytest.raises(ValueError, match="read-only"):
        early.positive[0][0] = 3
    search.sample(128)
    assert len(early.points) == 1 and search.snapshot().unstable(0).sum() > early.unstable(0).sum()
    assert (search.snapshot().method(0)[search.snapshot().unstable(0)] == Method.SAMPLE).all()


def test_greedy_cover_covers_every_column_once() -> None:
    rng = np.random.default_rng(9)
    covers = torch.tensor(rng.random((20, 60)) < 0.2)
    covers[rng.integers(0, 20, 60), np.arange(60)] = True
    chosen = greedy_cover(covers)
    assert sorted(int(c) for _, columns in chosen for c in columns) == list(range(60))
    assert all(bool(covers[row, columns].all()) for row, columns in chosen)


def test_misuse_is_named() -> None:
    network = chain(np.random.default_rng(0), (3, 4))
    with pytest.raises(DomainError, match="3"):
        WitnessSearch(network, uniform(0, 1, (5,)))
    with pytest.raises(OptionError, match="memory"):
        WitnessSearch(network, uniform(0, 1, (3,)), memory=0)
    with pytest.raises(ShapeError, match="3"):
        WitnessSearch(network, uniform(0, 1, (3,))).try_points(np.zeros((2, 4)))
    with pytest.raises(OptionError, match="layers"):
        WitnessSearch(network, uniform(0, 1, (3,))).try_points(np.zeros((2, 3)), layers=7)


@pytest.mark.parametrize(("file", "oracle", "rounds"), [
    ("mnist-net_256x2.onnx", "mnist256x2__whole", 2),
    ("mnist-net_256x2.onnx", "mnist256x2__eps0.03", 3),
    ("mnist-net_256x2.onnx", "mnist256x2__eps0.05", 3),
    ("ACASXU_run2a_1_1_batch_2000.onnx", "acas1_1__p1", 3),
    ("ACASXU_run2a_1_1_batch_2000.onnx", "acas1_1__p3", 3),
])
def test_oracles(file: str, oracle: str, rounds: int) -> None:
    """Every neuron that the oracle knows to be unstable is found; cheap sources contradict none of the stable ones."""
    path = SHARED / "oracles" / "stability" / f"{oracle}.npz"
    if not path.exists():
        pytest.skip(f"{path} is missing; set EXACTPRUNE_SHARED")
    from exactprune.io import load

    truth = np.load(path)
    network = load(SHARED / "nets" / file)
    search = WitnessSearch(network, Box(truth["box_lo"].reshape(network.input_shape),
                                        truth["box_hi"].reshape(network.input_shape)))
    status = [truth[f"L{k}_status"] for k in range(len(network.relus))]
    search.sample(1024)
    search.corners()
    found = search.snapshot()
    assert all((found.positive[k][s == 1] == -1).all() and (found.negative[k][s == 2] == -1).all()
               for k, s in enumerate(status))
    search.ascent([(s == 3, s == 3) for s in status], rounds=rounds)
    found = search.snapshot()
    assert [int((s == 3).sum()) for s in status] == [int(found.unstable(k)[s == 3].sum()) for k, s in enumerate(status)]
