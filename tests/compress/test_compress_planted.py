"""Every planted redundancy is found: dead, doubled and low-rank stably active units, dense, convolutional and residual.

Networks are generic (normal weights on a grid, unstable units) but for what is planted, so the number of units that may
stay is known: the unstable ones that are no copies, and as many linear units as the rank of the stably active ones. A
small dose runs always, ``-m slow`` runs 1,000 networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

from exactprune.claim import Status
from exactprune.compress import compress_network
from exactprune.domain import uniform
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, Conv2d, ReLU, Reshape


@dataclass(frozen=True)
class Planted:
    """How many units of a layer are what; ``rank`` is that of the active ones' weights."""

    unstable: int
    dead: int
    doubled: int
    active: int
    rank: int

    @property
    def units(self) -> int:
        return self.unstable + self.dead + self.doubled + self.active

    @property
    def needed(self) -> int:
        """So many units may stay."""
        return self.unstable + min(self.rank, self.active)


def draw(rng: np.random.Generator, low_rank: bool) -> Planted:
    active = int(rng.integers(4, 9)) if low_rank else 0
    rank = int(rng.integers(1, 4)) if low_rank else 0
    return Planted(int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.integers(1, 4)), active, rank)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers rounded to multiples of 1/64, so that sums of a few weights are weights again."""
    return np.rint(64 * rng.standard_normal(shape)) / 64


def rows(rng: np.random.Generator, plan: Planted, inputs: int, high: np.ndarray | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (units, inputs) and biases (units,), float32, on inputs from 0 to ``high``: shuffled."""
    generic = normal(rng, plan.unstable, inputs)
    half = -(generic * high).sum(axis=1) / 2  # 0 lies in the middle of the range
    dead = normal(rng, plan.dead, inputs)
    copied = rng.integers(0, plan.unstable, plan.doubled)
    factor = np.exp2(rng.integers(-2, 3, plan.doubled))
    first, second = rng.integers(-8, 9, (plan.active, plan.rank)) / 8, rng.integers(-8, 9, (plan.rank, inputs)) / 8
    active = first @ second  # the rank is exact in float32
    weight = np.concatenate([generic, dead, generic[copied] * factor[:, None], active]).astype(np.float32)
    bias = np.concatenate([half, np.full(plan.dead, -4096), half[copied] * factor,
                           0.5 - (np.minimum(active, 0) * high).sum(axis=1)]).astype(np.float32)
    order = rng.permutation(plan.units)
    return weight[order], bias[order]


def generic(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(rng, outputs, inputs).astype(np.float32), normal(rng, outputs).astype(np.float32)


def dense(rng: np.random.Generator) -> tuple[Network, int, Planted]:
    plan, inputs = draw(rng, True), int(rng.integers(5, 9))
    second = int(rng.integers(4, 7))
    nodes = [Node("a", Affine(*rows(rng, plan, inputs)), (INPUT,)), Node("b", ReLU(), (0,)),
             Node("c", Affine(*generic(rng, second, plan.units)), (1,)), Node("d", ReLU(), (2,)),
             Node("e", Affine(*generic(rng, 3, second)), (3,))]
    return build(nodes, (inputs,), np.float32), 1, plan


def convolutional(rng: np.random.Generator) -> tuple[Network, int, Planted]:
    plan, channels = draw(rng, True), int(rng.integers(1, 3))
    weight, bias = rows(rng, plan, channels * 4)
    after, offset = generic(rng, 3, plan.units * 4)
    nodes = [Node("a", Conv2d(weight.reshape(-1, channels, 2, 2), bias), (INPUT,)), Node("b", ReLU(), (0,)),
             Node("c", Conv2d(after.reshape(3, -1, 2, 2), offset), (1,)), Node("d", ReLU(), (2,)),
             Node("r", Reshape((12,)), (3,)), Node("e", Affine(*generic(rng, 2, 12)), (4,))]
    return build(nodes, (channels, 4, 4), np.float32), 1, plan


def residual(rng: np.random.Generator) -> tuple[Network, int, Planted]:
    plan, channels = draw(rng, False), 2
    weight, bias = rows(rng, plan, channels * 9)
    after, offset = generic(rng, channels, plan.units)
    nodes = [Node("a", Conv2d(weight.reshape(-1, channels, 3, 3), bias, padding=(1, 1, 1, 1)), (INPUT,)),
             Node("b", ReLU(), (0,)), Node("c", Conv2d(after.reshape(channels, -1, 1, 1), offset), (1,)),
             Node("s", Add(), (2, INPUT)), Node("d", ReLU(), (3,)), Node("r", Reshape((18,)), (4,)),
             Node("e", Affine(*generic(rng, 2, 18)), (5,))]
    return build(nodes, (channels, 3, 3), np.float32), 1, plan


def projection(rng: np.random.Generator) -> tuple[Network, int, Planted]:
    """A residual block with a projection shortcut: the planted rows read the branch and what it came from, side by side."""
    plan, channels, inner = draw(rng, True), int(rng.integers(1, 3)), int(rng.integers(2, 4))
    branch = Conv2d(generic(rng, inner, channels * 9)[0].reshape(inner, channels, 3, 3), generic(rng, 1, inner)[0][0],
                    (2, 2), (1, 1, 1, 1))
    most = np.ceil(np.maximum(branch.weight, 0).sum(axis=(1, 2, 3)) + np.maximum(branch.bias, 0))  # of a branch's channel
    high = np.append(most, np.ones(channels))
    weight, bias = rows(rng, plan, inner + channels, high)
    main, short = weight[:, :inner, None, None], weight[:, inner:, None, None]
    part = np.rint(64 * rng.standard_normal(plan.units)).astype(np.float32) / 64
    after = Conv2d(generic(rng, 2, plan.units * 4)[0].reshape(2, -1, 2, 2), np.zeros(2, np.float32))
    nodes = [Node("p", Conv2d(short, part, (2, 2)), (INPUT,)), Node("a", branch, (INPUT,)), Node("b", ReLU(), (1,)),
             Node("c", Conv2d(main, bias - part), (2,)), Node("s", Add(), (3, 0)), Node("d", ReLU(), (4,)),
             Node("f", after, (5,))]
    middle = build(nodes, (channels, 4, 4), np.float32).evaluate(np.full((channels, 4, 4), 0.5))
    nodes[6] = Node("f", replace(after, bias=np.rint(-middle.reshape(2)).astype(np.float32)), (5,))  # switches near the middle
    nodes += [Node("g", ReLU(), (6,)), Node("r", Reshape((2,)), (7,)), Node("e", Affine(*generic(rng, 2, 2)), (8,))]
    return build(nodes, (channels, 4, 4), np.float32), 5, plan


def whole(rng: np.random.Generator, *shape: int, most: int = 2) -> np.ndarray:
    return rng.integers(-most, most + 1, shape).astype(np.float64)


def odd(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (2 * rng.integers(-4, 4, shape) + 1).astype(np.float64)


def rank(matrix: np.ndarray) -> int:
    """Of a matrix of floats, read exactly, by elimination in rationals."""
    rows, found = [[Fraction(float(v)) for v in row] for row in matrix], 0
    for column in range(matrix.shape[1]):
        pivot = next((r for r in rows[found:] if r[column]), None)
        if pivot is not None:
            rows.remove(pivot)
            rows = rows[:found] + [pivot] + [[a - b * r[column] / pivot[column] for a, b in zip(r, pivot, strict=True)]
                                             for r in rows[found:]]
            found += 1
    return found


def spread(weight: np.ndarray, high: np.ndarray, active: int) -> np.ndarray:
    """Biases for inputs from 0 to ``high``: the first ``active`` neurons are stably active, the others switch."""
    least, most = np.minimum(weight, 0) @ high, np.maximum(weight, 0) @ high
    return np.where(np.arange(len(weight)) < active, 1 - least, np.rint(-(least + most) / 2))


@dataclass(frozen=True)
class Two:
    """Two layers of active and unstable neurons, the active ones first, and what reads the second."""

    w1: np.ndarray
    w2: np.ndarray
    w3: np.ndarray
    active: tuple[int, int]
    network: Network

    @property
    def needed(self) -> tuple[int, int]:
        """The fewest units of both layers that keep the unstable ones.

        Behind layer 2 only P = W3[:, A2] W2[A2, :] of its active neurons is seen, so r2 = rank P units are enough and no fewer
        are; they read rows V2 that span the rows of P, whichever they are. Of layer 1's active neurons A1 what is seen
        is [W2[U2, A1]; V2[:, A1]] W1[A1, :], and its rank is that of [W2[U2, A1]; P[:, A1]] W1[A1, :] for every such V2. More
        units in layer 2 can only make its rows span more.
        """
        k1, k2 = self.active
        p = self.w3[:, :k2] @ self.w2[:k2]
        seen = np.concatenate([self.w2[k2:, :k1], p[:, :k1]]) @ self.w1[:k1]
        return len(self.w1) - k1 + rank(seen), len(self.w2) - k2 + rank(p)

    @property
    def single(self) -> tuple[int, int]:
        """The same where each layer is looked at by itself."""
        k1, k2 = self.active
        return len(self.w1) - k1 + rank(self.w2[:, :k1] @ self.w1[:k1]), len(self.w2) - k2 + rank(self.w3[:, :k2] @ self.w2[:k2])


def two_layers(rng: np.random.Generator) -> Two:
    """Low rank in the composition W3 W2 W1 and in no product of two: the rest lies where what reads it does not look."""
    inputs, outputs = int(rng.integers(8, 11)), int(rng.integers(3, 5))
    u1, u2, r2, r1 = (int(rng.integers(*ends)) for ends in ((2, 4), (2, 4), (1, 3), (1, 3)))
    q, k2 = u2 + r2, outputs + int(rng.integers(4, 7))
    k1 = q + int(rng.integers(3, 6))
    c, e = whole(rng, q, k1 - q, most=1), whole(rng, outputs, k2 - outputs, most=1)
    seen = np.concatenate([np.eye(q), c], axis=1)                         # all that is looked at of layer 1's active neurons
    w3 = np.concatenate([np.eye(outputs), e], axis=1)                     # and of layer 2's
    unseen = np.concatenate([-e, np.eye(k2 - outputs)])
    through = np.concatenate([whole(rng, r2, q) @ seen, whole(rng, r2, u1)], axis=1)
    active2 = whole(rng, k2, r2) @ through + unseen @ whole(rng, k2 - outputs, k1 + u1, most=1)
    w2 = np.concatenate([active2, np.concatenate([whole(rng, u2, q) @ seen, odd(rng, u2, u1)], axis=1)])
    hidden = np.concatenate([-c, np.eye(k1 - q)]) @ whole(rng, k1 - q, inputs, most=1)
    w1 = np.concatenate([whole(rng, k1, r1) @ whole(rng, r1, inputs) + hidden, odd(rng, u1, inputs)])
    w3 = np.concatenate([w3, odd(rng, outputs, u2)], axis=1)
    b1 = spread(w1, np.ones(inputs), k1)
    b2 = spread(w2, np.maximum(w1, 0).sum(axis=1) + np.maximum(b1, 0), k2)
    arrays = (w1 / 8, b1 / 8), (w2 / 8, b2 / 64), (w3, np.ones(outputs))
    ops = [Affine(*(a.astype(np.float32) for a in pair)) for pair in arrays]
    nodes = [Node("a", ops[0], (INPUT,)), Node("b", ReLU(), (0,)), Node("c", ops[1], (1,)), Node("d", ReLU(), (2,)),
             Node("e", ops[2], (3,))]
    return Two(w1, w2, w3, (k1, k2), build(nodes, (inputs,), np.float32))


def dependent(rng: np.random.Generator, spatial: bool) -> tuple[Network, int]:
    """Stably active rows that are whole combinations of other rows, biases left out; how many units have to stay."""
    inputs, unstable, extra = 8 if spatial else int(rng.integers(4, 9)), int(rng.integers(2, 4)), int(rng.integers(1, 5))
    base = np.concatenate([np.eye(3), whole(rng, 3, inputs - 3, most=4)], axis=1)[rng.permutation(3)]
    active = np.concatenate([base, np.rint(whole(rng, extra, 3)) @ base])
    active = active[np.abs(active).any(axis=1)]
    weight = np.concatenate([active, odd(rng, unstable, inputs) / 4])
    bias = spread(weight, np.ones(inputs), len(active)) + rng.integers(0, 4, len(weight)) * (np.arange(len(weight)) < len(active))
    order, outputs = rng.permutation(len(weight)), int(rng.integers(2, 9))
    weight, bias = (weight[order] / 8).astype(np.float32), (bias[order] / 8).astype(np.float32)
    after, head = (np.rint(64 * rng.standard_normal(s)) / 64 for s in ((outputs, len(weight)), (2, outputs)))
    offsets = np.ones(outputs, np.float32), np.zeros(2, np.float32)
    if not spatial:
        nodes = [Node("a", Affine(weight, bias), (INPUT,)), Node("b", ReLU(), (0,)),
                 Node("c", Affine(after.astype(np.float32), offsets[0]), (1,)), Node("d", ReLU(), (2,)),
                 Node("e", Affine(head.astype(np.float32), offsets[1]), (3,))]
        return build(nodes, (inputs,), np.float32), unstable + 3
    nodes = [Node("a", Conv2d(weight.reshape(-1, 2, 2, 2), bias), (INPUT,)), Node("b", ReLU(), (0,)),
             Node("c", Conv2d(after.astype(np.float32)[:, :, None, None], offsets[0], (2, 2)), (1,)), Node("d", ReLU(), (2,)),
             Node("r", Reshape((4 * outputs,)), (3,)), Node("e", Affine(np.tile(head, 4).astype(np.float32), offsets[1]), (4,))]
    return build(nodes, (2, 4, 4), np.float32), unstable + 3


FAMILIES = (dense, convolutional, residual, projection)


def units_left(f: Network, g: Network, layer: int) -> int:
    return g.shapes[layer][0] if len(g.relus) == len(f.relus) else 0


def check(tools, seed: int) -> None:
    """The claim holds in rationals, and everything planted is found."""
    rng = np.random.default_rng([seed, 5])
    f, layer, plan = FAMILIES[seed % len(FAMILIES)](rng)
    box = uniform(0, 1, f.input_shape)
    verdicts = tools.verdicts(f, box)
    rewrite = compress_network(f, box, verdicts, max_deviation="rounding")
    for x in np.concatenate([box.sample(1, rng), box.corners(2, rng)]):
        assert np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() <= Fraction(rewrite.eps), seed
    assert rewrite.eps <= rewrite.budget
    assert units_left(f, rewrite.network, layer) <= plan.needed, (seed, plan)


@pytest.mark.parametrize("seed", range(12))
def test_everything_planted_is_found(tools, seed):
    check(tools, seed)


def check_two(tools, seed: int) -> bool:
    """Whether both layers have as few units as there can be."""
    rng = np.random.default_rng([seed, 7])
    two = two_layers(rng)
    f, box = two.network, uniform(0, 1, two.network.input_shape)
    verdicts = tools.verdicts(f, box)
    assert [int((v.status == Status.ACTIVE).sum()) for v in verdicts] == list(two.active)
    rewrite = compress_network(f, box, verdicts, max_deviation="rounding")
    for x in np.concatenate([box.sample(1, rng), box.corners(2, rng)]):
        assert np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() <= Fraction(rewrite.eps), seed
    assert tools.accepted(f, box, verdicts, rewrite)
    return tuple(rewrite.network.shapes[i][0] for i in rewrite.network.relus) == two.needed


@pytest.mark.parametrize("seed", range(4))
def test_two_layers_get_as_few_units_as_there_can_be(tools, seed):
    two = two_layers(np.random.default_rng([seed, 7]))
    assert two.needed[0] < two.single[0]                                  # looking at one layer at a time finds less
    assert check_two(tools, seed)


def check_dependent(tools, seed: int, folder=None) -> None:
    rng = np.random.default_rng([seed, 8])
    f, needed = dependent(rng, spatial=seed % 2 == 1)
    box = uniform(0, 1, f.input_shape)
    verdicts = tools.verdicts(f, box)
    rewrite = compress_network(f, box, verdicts, max_deviation="exact")
    assert f.shapes[0][0] > needed >= rewrite.network.shapes[0][0], (seed, needed)
    assert tools.same(f, rewrite.network, box, rng) and tools.accepted(f, box, verdicts, rewrite, folder)


@pytest.mark.parametrize("seed", range(6))
def test_exact_dependence_is_found_at_exact(tools, seed, tmp_path):
    check_dependent(tools, seed, tmp_path)


@pytest.mark.slow
def test_two_layers_and_dependence_in_many_networks(tools):
    for seed in range(100, 300):
        check_dependent(tools, seed)
        assert check_two(tools, seed), seed


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 1100, 100))
def test_everything_planted_is_found_in_a_thousand_networks(tools, start):
    for seed in range(start, start + 100):
        check(tools, seed)
