"""An exact evaluator of every operator, written apart from the package: Python integers over one denominator a node.

Only the operators' settings and arrays are read; none of their code is run. Convolutions and pools are plain loops.
"""

from __future__ import annotations

from fractions import Fraction
from math import lcm

import numpy as np

from exactprune.network import INPUT, Network
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose

Exact = tuple[np.ndarray, int]  # integers of shape (batch, *shape), and what they are divided by


def integers(array: np.ndarray) -> Exact:
    """A float array as integers over a power of two."""
    ratios = [float(v).as_integer_ratio() for v in np.asarray(array).ravel()]
    below = max((d for _, d in ratios), default=1)
    found = np.empty(len(ratios), dtype=object)
    found[:] = [n * (below // d) for n, d in ratios]
    return found.reshape(np.shape(array)), below


def exact_layers(network: Network, points: np.ndarray) -> list[list[list[Fraction]]]:
    """Pre-activations as rationals: layer -> point -> flat neuron.

    Args:
        network: any network.
        points: float64 (batch, *input_shape) or (batch, inputs).
    """
    points = np.asarray(points, np.float64).reshape(len(points), *network.input_shape)
    values: dict[int, Exact] = {INPUT: integers(points)}
    found = []
    for position, node in enumerate(network.nodes):
        given = [values[i] for i in node.inputs]
        if isinstance(node.op, ReLU):
            top, below = given[0]
            found.append([[Fraction(int(v), below) for v in row] for row in top.reshape(len(points), -1)])
        values[position] = _apply(node.op, given)
    return found


def exact_extremes(network: Network, points: np.ndarray) -> list[tuple[list[Fraction], list[Fraction]]]:
    """(smallest, largest) pre-activation of every neuron over the points: layer -> pair of flat lists."""
    return [([min(c) for c in zip(*rows)], [max(c) for c in zip(*rows)]) for rows in exact_layers(network, points)]


def _apply(op: Op, given: list[Exact]) -> Exact:
    x, below = given[0]
    match op:
        case Affine():
            weight, scale = integers(np.concatenate([op.weight, op.bias[:, None]], axis=1))
            return x.dot(weight[:, :-1].T) + weight[:, -1] * below, below * scale
        case Conv2d():
            return _conv(op, x, below)
        case Scale():
            both, scale = integers(np.stack(np.broadcast_arrays(op.scale, op.shift)))
            return x * both[0] + both[1] * below, below * scale
        case ReLU():
            return np.where(x > 0, x, 0), below
        case Add():
            other, under = given[1]
            common = lcm(below, under)
            return x * (common // below) + other * (common // under), common
        case MaxPool2d():
            return _pool(op, x, max), below
        case AvgPool2d():
            return _average(op, x, below)
        case Reshape():
            return x.reshape(len(x), *op.shape), below
        case Transpose():
            return np.transpose(x, (0, *(a + 1 for a in op.permutation))), below
        case Pad():
            value, under = float(op.value).as_integer_ratio()
            common = lcm(below, under)
            pads = ((0, 0), *op.pads)
            shape = [n + before + after for n, (before, after) in zip(x.shape, pads)]
            out = np.full(shape, value * (common // under), dtype=object)
            out[tuple(slice(before, before + n) for n, (before, _) in zip(x.shape, pads))] = x * (common // below)
            return out, common
    raise AssertionError(op.kind)


def _places(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> list[list[int]]:
    """For each output place along one axis the input places of its window; places in the padding are out of range."""
    span = (kernel - 1) * dilation + 1
    starts = range(-before, size + after - span + 1, stride)
    return [[start + dilation * k for k in range(kernel)] for start in starts]


def _windows(op: Conv2d | MaxPool2d | AvgPool2d, shape: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    top, left, bottom, right = op.padding
    dy, dx = (1, 1) if isinstance(op, AvgPool2d) else op.dilation
    rows = _places(shape[-2], op.kernel[0], op.stride[0], dy, top, bottom)
    return rows, _places(shape[-1], op.kernel[1], op.stride[1], dx, left, right)


def _conv(op: Conv2d, x: np.ndarray, below: int) -> Exact:
    both, scale = integers(np.concatenate([op.weight.ravel(), op.bias]))
    weight, bias = both[: op.weight.size].reshape(op.weight.shape), both[op.weight.size :]
    rows, columns = _windows(op, x.shape)
    out = np.zeros((len(x), len(weight), len(rows), len(columns)), dtype=object)
    per_group, outs = op.weight.shape[1], len(weight) // op.groups
    for o in range(len(weight)):
        for i, ys in enumerate(rows):
            for j, xs in enumerate(columns):
                total = bias[o] * below
                for c in range(per_group):
                    for ky, y in enumerate(ys):
                        for kx, column in enumerate(xs):
                            if 0 <= y < x.shape[2] and 0 <= column < x.shape[3]:
                                total = total + weight[o, c, ky, kx] * x[:, (o // outs) * per_group + c, y, column]
                out[:, o, i, j] = total
    return out, below * scale


def _inside(x: np.ndarray, channel: int, ys: list[int], xs: list[int]) -> list[np.ndarray]:
    return [x[:, channel, y, c] for y in ys for c in xs if 0 <= y < x.shape[2] and 0 <= c < x.shape[3]]


def _pool(op: MaxPool2d | AvgPool2d, x: np.ndarray, reduce) -> np.ndarray:
    rows, columns = _windows(op, x.shape)
    out = np.zeros((*x.shape[:2], len(rows), len(columns)), dtype=object)
    for c in range(x.shape[1]):
        for i, ys in enumerate(rows):
            for j, xs in enumerate(columns):
                out[:, c, i, j] = [reduce(row) for row in zip(*_inside(x, c, ys, xs))]
    return out


def _average(op: AvgPool2d, x: np.ndarray, below: int) -> Exact:
    total = _pool(op, x, sum)
    rows, columns = _windows(op, x.shape)
    top, left, bottom, right = op.padding

    def count(ys: list[int], xs: list[int]) -> int:
        if op.count_include_pad:
            return sum(-top <= y < x.shape[2] + bottom for y in ys) * sum(-left <= c < x.shape[3] + right for c in xs)
        return sum(0 <= y < x.shape[2] for y in ys) * sum(0 <= c < x.shape[3] for c in xs)

    counts = [[count(ys, xs) for xs in columns] for ys in rows]
    common = lcm(*(n for row in counts for n in row))
    factor = np.array([[common // n for n in row] for row in counts], dtype=object)
    return total * factor, below * common
