"""Random small networks and boxes made to break floating point: ill-scaled, tiny, near-zero maxima, every operator.

``case(seed)`` is a pure function of its seed, so a seed is a reproducer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np

from exactprune.domain import Box
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose

FAMILIES = ("dense", "dense", "dense", "near-zero", "near-zero", "image", "image", "residual", "many-readers")


@dataclass(frozen=True, eq=False)
class Case:
    """One network and box; ``family`` says which recipe made it."""

    seed: int
    family: str
    network: Network
    box: Box


def case(seed: int, family: str | None = None) -> Case:
    """The network and box of a seed."""
    rng = np.random.default_rng([seed, 17])
    family = family or str(rng.choice(FAMILIES))
    dtype = np.float32 if rng.random() < 0.5 else np.float64
    spread = float(rng.choice([0.0, 1.0, 2.0, 4.0]))
    made = {"dense": _dense, "near-zero": _dense, "image": _image, "residual": _residual, "many-readers": _many_readers,
            "huge": _huge, "vanishing": _vanishing}[family](rng, _Draw(rng, spread, dtype))
    network = build(made[0], made[1], dtype, name=f"{family} {seed}")
    box = random_box(rng, network.input_shape)
    if family == "near-zero":
        network = with_near_zero_extremes(network, box, rng)
    return Case(seed, family, network, box)


@dataclass(frozen=True, eq=False)
class _Draw:
    rng: np.random.Generator
    spread: float
    dtype: type

    def __call__(self, *shape: int, zeros: float = 0.1) -> np.ndarray:
        rng = self.rng
        values = rng.normal(size=shape) * 10.0 ** rng.uniform(-self.spread, self.spread, size=shape)
        if rng.random() < 0.1:
            values = values * 1e-30
        values[rng.random(shape) < zeros] = 0.0
        return values.astype(self.dtype)


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    """Unit, centred, negative, ill-scaled, tiny or partly degenerate boxes."""
    kind = rng.integers(6)
    if kind == 0:
        lower, upper = np.zeros(shape), np.ones(shape)
    elif kind == 1:
        lower, upper = -rng.random(shape), rng.random(shape)
    elif kind == 2:
        upper = -rng.random(shape)
        lower = upper - rng.random(shape)
    elif kind == 3:
        middle = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 4, shape)
        radius = rng.random(shape) * 10.0 ** rng.uniform(-8, 4, shape)
        lower, upper = middle - radius, middle + radius
    elif kind == 4:
        lower = rng.normal(size=shape)
        upper = np.nextafter(lower, np.inf)
    else:
        lower = rng.normal(size=shape)
        upper = lower + rng.random(shape) * 1e-30
    same = rng.random(shape) < 0.15
    return Box(lower, np.where(same, lower, upper))


def _chain(ops: list[Op], nodes: list[Node] | None = None) -> list[Node]:
    nodes = [] if nodes is None else nodes
    for op in ops:
        nodes.append(Node(f"{op.kind.lower()}{len(nodes)}", op, (len(nodes) - 1,)))
    return nodes


def _dense(rng: np.random.Generator, draw: _Draw) -> tuple[list[Node], tuple[int, ...]]:
    depth = int(rng.integers(1, 5))
    sizes = [int(rng.integers(1, 7)), *rng.integers(1, 9, depth).tolist(), 2]
    ops: list[Op] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        weight, bias = draw(b, a), draw(b)
        if b > 1 and rng.random() < 0.2:
            weight[1], bias[1] = -weight[0], -bias[0]
        ops += [Affine(weight, bias)] + ([ReLU()] if i < depth else [])
        if rng.random() < 0.1:
            ops.append(Scale(draw(b), draw(b)))
    return _chain(ops), (sizes[0],)


def _image(rng: np.random.Generator, draw: _Draw) -> tuple[list[Node], tuple[int, ...]]:
    shape = (int(rng.integers(1, 3)), int(rng.integers(2, 5)), int(rng.integers(2, 5)))
    ops, at = [], shape
    for _ in range(int(rng.integers(1, 4))):
        op = _image_op(rng, draw, at)
        ops += [op]
        at = op.output_shape(at)
        if isinstance(op, Conv2d) or rng.random() < 0.5:
            ops.append(ReLU())
    width = int(rng.integers(1, 5))
    ops += [Reshape((prod(at),)), Affine(draw(width, prod(at)), draw(width)), ReLU(), Affine(draw(2, width), draw(2))]
    return _chain(ops), shape


def _image_op(rng: np.random.Generator, draw: _Draw, at: tuple[int, ...]) -> Op:
    kernel = tuple(int(rng.integers(1, min(3, n) + 1)) for n in at[1:])
    stride = tuple(int(n) for n in rng.integers(1, 3, 2))
    padding = tuple(int(rng.integers(0, k)) for k in (*kernel, *kernel))
    match int(rng.integers(7)):
        case 0:
            return MaxPool2d(kernel, stride, padding)
        case 1:
            return AvgPool2d(kernel, stride, padding, bool(rng.random() < 0.5))
        case 2:
            return Pad(((0, 0), (int(rng.integers(2)), 1), (0, int(rng.integers(2)))), float(rng.choice([0.0, -0.3, 1e4])))
        case 3:
            return Transpose((0, 2, 1))
    groups = at[0] if rng.random() < 0.3 else 1
    outs = groups * int(rng.integers(1, 3))
    return Conv2d(draw(outs, at[0] // groups, *kernel), draw(outs), stride, padding, (1, 1), groups)


def _residual(rng: np.random.Generator, draw: _Draw) -> tuple[list[Node], tuple[int, ...]]:
    inputs, width = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    nodes = _chain([Affine(draw(width, inputs), draw(width)), ReLU()])
    for _ in range(int(rng.integers(1, 3))):
        skip = len(nodes) - 1
        _chain([Affine(draw(width, width), draw(width)), ReLU(), Affine(draw(width, width), draw(width))], nodes)
        nodes.append(Node("add", Add(), (len(nodes) - 1, skip)))
        nodes.append(Node("relu", ReLU(), (len(nodes) - 1,)))
    return _chain([Affine(draw(2, width), draw(2))], nodes), (inputs,)


def _many_readers(rng: np.random.Generator, draw: _Draw) -> tuple[list[Node], tuple[int, ...]]:
    """One tensor read by four affine maps that nearly cancel."""
    inputs, width = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    nodes = _chain([Affine(draw(width, inputs), draw(width))] + ([ReLU()] if rng.random() < 0.7 else []))
    source = len(nodes) - 1 if rng.random() < 0.7 else INPUT
    fan = width if source >= 0 else inputs
    first = (draw(width, fan) * 10.0 ** rng.choice([0, 8])).astype(draw.dtype)
    weights = [first, -first, draw(width, fan), draw(width, fan)]
    added = None
    for i in rng.permutation(4).tolist():
        nodes.append(Node("branch", Affine(weights[i], draw(width)), (source,)))
        if added is not None:
            nodes.append(Node("add", Add(), (added, len(nodes) - 1)))
        added = len(nodes) - 1
    nodes.append(Node("relu", ReLU(), (len(nodes) - 1,)))
    return _chain([Affine(draw(3, width), draw(3)), ReLU(), Affine(draw(1, 3), draw(1))], nodes), (inputs,)


def _huge(rng: np.random.Generator, draw: _Draw) -> tuple[list[Node], tuple[int, ...]]:
    """Weights up to 1e300: overflow on the way."""
    nodes, shape = (_image if rng.random() < 0.4 else _dense)(rng, draw)
    top = 300.0 if draw.dtype is np.float64 else 37.0
    return [replace(n, op=_times(n.op, rng, draw.dtype, rng.uniform(0, top))) for n in nodes], shape


def _vanishing(rng: np.random.Generator, draw: _Draw) -> tuple[list[Node], tuple[int, ...]]:
    """Weights down to the smallest subnormal: underflow on the way."""
    nodes, shape = (_residual if rng.random() < 0.4 else _dense)(rng, draw)
    low = -320.0 if draw.dtype is np.float64 else -45.0
    return [replace(n, op=_times(n.op, rng, draw.dtype, rng.uniform(low, 0))) for n in nodes], shape


def _times(op: Op, rng: np.random.Generator, dtype: type, exponent: float) -> Op:
    if not isinstance(op, Affine | Conv2d):
        return op
    limit = float(np.finfo(dtype).max)
    scale = 10.0 ** (exponent / 2)

    def scaled(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", under="ignore"):
            return np.clip(np.clip(array.astype(np.float64) * scale, -limit, limit) * scale, -limit, limit).astype(dtype)

    bias = scaled(op.bias) if rng.random() < 0.5 else op.bias
    return replace(op, weight=scaled(op.weight), bias=bias)


def with_near_zero_extremes(network: Network, box: Box, rng: np.random.Generator) -> Network:
    """The same network with biases moved so that many neurons' largest (or smallest) seen value is about 0, layer by layer."""
    from exact_evaluation import exact_extremes

    points = sample_points(box, rng, 24)
    for k, relu in enumerate(network.relus):
        position = network.nodes[relu].inputs[0]
        op = network.nodes[position].op if position >= 0 else None
        if not isinstance(op, Affine):
            continue
        low, high = exact_extremes(network, points)[k]
        bias = op.bias.astype(np.float64)
        for i in range(len(bias)):
            kind = rng.integers(4)
            if kind < 3:
                extreme = high[i] if kind < 2 else low[i]
                bias[i] = float(_clipped(bias[i], extreme)) + float(rng.choice([0.0, 0.0, 1e-16, 1e-9, 2e-6, -2e-6]))
        nodes = list(network.nodes)
        nodes[position] = replace(nodes[position], op=Affine(op.weight, bias.astype(network.dtype)))
        network = replace(network, nodes=tuple(nodes))
    return network


def _clipped(bias: float, extreme) -> float:
    from fractions import Fraction

    return float(min(max(Fraction(bias) - extreme, Fraction(-10) ** 30), Fraction(10) ** 30))


def sample_points(box: Box, rng: np.random.Generator, count: int) -> np.ndarray:
    """Corners (all of them up to 4 inputs) and random points, flat float64."""
    low, high = box.lower.reshape(-1), box.upper.reshape(-1)
    if low.size <= 4:
        bits = (np.arange(2**low.size)[:, None] >> np.arange(low.size)) & 1
        corners = np.where(bits == 1, high, low)
    else:
        corners = box.corners(count, rng).reshape(count, -1)
    return np.concatenate([corners, box.sample(max(2, count // 3), rng).reshape(-1, low.size)])
