"""Independent truth for small networks: exact one-dimensional enumeration in rationals, and phase enumeration.

On a one-dimensional box every pre-activation is a continuous piecewise linear function of the input. Keep a grid on
which all layers so far are linear between neighbours; the next layer's extrema then lie on the grid, and its zero
crossings are added to it. Everything is a ``Fraction``, so the extrema are exact.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
from scipy.optimize import linprog

from exactprune.claim import Status
from exactprune.domain import Box
from exactprune.network import Network, Node
from exactprune.network import build as build_network
from exactprune.ops import Affine, ReLU


def mlp(layers: list[tuple[np.ndarray, np.ndarray]], dtype: type = np.float64) -> Network:
    """A chain of affine layers with ReLUs between them."""
    nodes: list[Node] = []
    for i, (weight, bias) in enumerate(layers):
        nodes.append(Node(f"affine{i}", Affine(np.asarray(weight, dtype), np.asarray(bias, dtype)), (len(nodes) - 1,)))
        if i < len(layers) - 1:
            nodes.append(Node(f"relu{i}", ReLU(), (len(nodes) - 1,)))
    return build_network(nodes, (np.shape(layers[0][0])[1],), dtype)


def random_mlp(rng: np.random.Generator, sizes: list[int], spread: float = 0.0, bias: float = 0.5) -> Network:
    """Random weights; each multiplied by 10^uniform(-spread, spread)."""
    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) * 10.0 ** rng.uniform(-spread, spread, size=shape)

    return mlp([(draw(b, a) / np.sqrt(a), bias * draw(b)) for a, b in pairwise(sizes)])


def exact_ranges_1d(network: Network, box: Box) -> list[list[tuple[Fraction, Fraction]]]:
    """Exact (minimum, maximum) of every pre-activation of every ReLU layer of an MLP with one input."""
    grid = sorted({Fraction(float(box.lower.flat[0])), Fraction(float(box.upper.flat[0]))})
    values = [[x] for x in grid]
    ranges = []
    for node in network.nodes:
        if isinstance(node.op, Affine):
            weight = [[Fraction(float(w)) for w in row] for row in node.op.weight]
            bias = [Fraction(float(b)) for b in node.op.bias]
            values = [[sum((w * v for w, v in zip(row, point)), b) for row, b in zip(weight, bias)] for point in values]
        else:
            ranges.append([(min(column), max(column)) for column in zip(*values)])
            grid, values = _with_crossings(grid, values)
            values = [[max(v, Fraction(0)) for v in point] for point in values]
    return ranges


def _with_crossings(grid: list[Fraction], values: list[list[Fraction]]) -> tuple[list[Fraction], list[list[Fraction]]]:
    points = dict(zip(grid, values))
    for (a, left), (b, right) in pairwise(zip(grid, values)):
        for u, v in zip(left, right):
            if u * v < 0:
                t = u / (u - v)
                points[a + t * (b - a)] = [p + t * (q - p) for p, q in zip(left, right)]
    ordered = sorted(points)
    return ordered, [points[x] for x in ordered]


def interval_bounds(network: Network, box: Box) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Plain float64 interval bounds of every ReLU layer of an MLP, widened a little."""
    low, high = box.lower.ravel(), box.upper.ravel()
    lowers, uppers = [], []
    for node in network.nodes:
        if isinstance(node.op, Affine):
            plus, minus = np.maximum(node.op.weight, 0).astype(float), np.minimum(node.op.weight, 0).astype(float)
            slack = 1e-12 * (np.abs(node.op.weight) @ np.maximum(abs(low), abs(high)) + np.abs(node.op.bias))
            low, high = (
                plus @ low + minus @ high + node.op.bias - slack,
                plus @ high + minus @ low + node.op.bias + slack,
            )
        else:
            lowers.append(low)
            uppers.append(high)
            low, high = np.maximum(low, 0), np.maximum(high, 0)
    return lowers, uppers


def extremum_by_phases(network: Network, box: Box, layer: int, neuron: int, sign: int) -> float:
    """Maximum of sign * z_hat by one LP over the inputs for each phase pattern of the layers before (scipy)."""
    affine = [n.op for n in network.nodes if isinstance(n.op, Affine)]
    count = sum(op.weight.shape[0] for op in affine[:layer])
    best = -np.inf
    for pattern in range(2**count):
        bits = [(pattern >> i) & 1 for i in range(count)]
        matrix, constant = np.eye(box.lower.size), np.zeros(box.lower.size)
        rows, right = [], []
        for op in affine[:layer]:
            matrix, constant = op.weight @ matrix, op.weight @ constant + op.bias
            active = np.array([bits.pop(0) for _ in range(len(constant))])
            side = 1 - 2 * active
            rows.append(side[:, None] * matrix)
            right.append(-side * constant)
            matrix, constant = active[:, None] * matrix, active * constant
        op = affine[layer]
        c, offset = sign * op.weight[neuron] @ matrix, sign * (op.weight[neuron] @ constant + op.bias[neuron])
        found = linprog(-c, np.vstack(rows) if rows else None, np.concatenate(right) if rows else None,
                        bounds=np.c_[box.lower.ravel(), box.upper.ravel()])
        if found.status == 0:
            best = max(best, offset - found.fun)
    return best


def exact_status(low: Fraction, high: Fraction) -> Status:
    """Status of a neuron with this exact range."""
    return Status.INACTIVE if high <= 0 else Status.ACTIVE if low >= 0 else Status.UNSTABLE


def random_1d(rng: np.random.Generator) -> tuple[Network, Box]:
    """A small random network with one input: mild or ill-scaled, sometimes with dead and repeated neurons."""
    sizes = [1, *rng.integers(2, 5, rng.integers(1, 4)).tolist(), 1]
    network = random_mlp(rng, sizes, spread=float(rng.choice([0.0, 1.0])), bias=float(rng.choice([0.1, 1.0])))
    if rng.random() < 0.2:
        arrays = [(n.op.weight.copy(), n.op.bias.copy()) for n in network.nodes if isinstance(n.op, Affine)]
        arrays[0][0][0], arrays[0][1][0] = 0.0, rng.choice([0.0, -1.0, 1.0])
        arrays[-1][0][:, -1] = 0.0
        network = mlp(arrays)
    box = Box(np.array([-rng.random()]), np.array([rng.random()]))
    return network, box
