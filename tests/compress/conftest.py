"""Independent truth for compression: exact rational evaluation, exact intervals, networks with planted redundancy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from exactprune.checker.bundle import check_bundle
from exactprune.claim import LayerVerdict, Status
from exactprune.compress.bundle import bundle
from exactprune.compress.rewrite import Rewrite
from exactprune.domain import Box
from exactprune.io import save
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose

_fraction = np.frompyfunc(lambda v: Fraction(float(v)), 1, 1)


def _windows(x: np.ndarray, op, fill: object) -> np.ndarray:
    """(C, H_out, W_out, kh, kw) by plain loops over positions."""
    top, left, bottom, right = op.padding
    padded = np.full((x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right), fill, object)
    padded[:, top:top + x.shape[1], left:left + x.shape[2]] = x
    (kh, kw), (sh, sw), (dh, dw) = op.kernel, op.stride, getattr(op, "dilation", (1, 1))
    rows = range(0, padded.shape[1] - (kh - 1) * dh, sh)
    cols = range(0, padded.shape[2] - (kw - 1) * dw, sw)
    out = np.empty((x.shape[0], len(rows), len(cols), kh, kw), object)
    for i, r in enumerate(rows):
        for j, c in enumerate(cols):
            out[:, i, j] = padded[:, r:r + (kh - 1) * dh + 1:dh, c:c + (kw - 1) * dw + 1:dw]
    return out


def _exact_op(op: Op, *inputs: np.ndarray) -> np.ndarray:
    x = inputs[0]
    if isinstance(op, Affine):
        return _fraction(op.weight).dot(x) + _fraction(op.bias)
    if isinstance(op, Conv2d):
        view, weight = _windows(x, op, Fraction(0)), _fraction(op.weight)
        ins, outs = weight.shape[1], weight.shape[0] // op.groups
        return np.array([np.einsum("chwij,cij->hw", view[(o // outs) * ins:(o // outs + 1) * ins], weight[o])
                         + Fraction(float(op.bias[o])) for o in range(weight.shape[0])], object)
    if isinstance(op, ReLU):
        return np.maximum(x, Fraction(0))
    if isinstance(op, Scale):
        return x * _fraction(op.scale) + _fraction(op.shift)
    if isinstance(op, Add):
        return x + inputs[1]
    if isinstance(op, MaxPool2d):
        view = _windows(x, op, None)
        flat = view.reshape(*view.shape[:3], -1)
        return np.array([max(v for v in row if v is not None) for row in flat.reshape(-1, flat.shape[-1])],
                        object).reshape(view.shape[:3])
    if isinstance(op, AvgPool2d):
        return _windows(x, op, Fraction(0)).sum(axis=(3, 4)) / _fraction(op.divisors(x.shape))
    if isinstance(op, Reshape):
        return x.reshape(op.shape)
    if isinstance(op, Transpose):
        return x.transpose(op.permutation)
    assert isinstance(op, Pad)
    return np.pad(x, op.pads, constant_values=Fraction(op.value))


def exact(network: Network, x: np.ndarray) -> np.ndarray:
    """Output at one float point, in rationals; shares no arithmetic with the package."""
    values = {INPUT: _fraction(np.asarray(x, np.float64))}
    for position, node in enumerate(network.nodes):
        values[position] = _exact_op(node.op, *(values[i] for i in node.inputs))
    return values[network.output]


def same(f: Network, g: Network, box: Box, rng: np.random.Generator, points: int = 3) -> bool:
    """f = g exactly at random points and corners."""
    batch = np.concatenate([box.sample(points, rng), box.corners(points, rng)])
    return all((exact(f, x) == exact(g, x)).all() for x in batch)


def _interval(op: Op, boxes: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Interval image in float64; exact for the dyadic weights used here."""
    (low, high), *rest = boxes
    if isinstance(op, Affine | Conv2d):
        positive = replace(op, weight=np.maximum(op.weight, 0).astype(np.float64), bias=op.bias.astype(np.float64))
        negative = replace(op, weight=np.minimum(op.weight, 0).astype(np.float64), bias=op.bias.astype(np.float64) * 0)
        return (positive.evaluate(low[None])[0] + negative.evaluate(high[None])[0],
                positive.evaluate(high[None])[0] + negative.evaluate(low[None])[0])
    if isinstance(op, Scale):
        ends = op.evaluate(low[None])[0], op.evaluate(high[None])[0]
        return np.minimum(*ends), np.maximum(*ends)
    others_low, others_high = [r[0][None] for r in rest], [r[1][None] for r in rest]
    return op.evaluate(low[None], *others_low)[0], op.evaluate(high[None], *others_high)[0]


def verdicts(network: Network, box: Box) -> tuple[LayerVerdict, ...]:
    """Verdicts by plain interval arithmetic; what it leaves open is called unstable."""
    found = {INPUT: (box.lower, box.upper)}
    layers = []
    for position, node in enumerate(network.nodes):
        if isinstance(node.op, ReLU):
            low, high = found[node.inputs[0]]
            status = np.where(high <= 0, Status.INACTIVE, np.where(low >= 0, Status.ACTIVE, Status.UNSTABLE))
            layers.append(LayerVerdict(len(layers), node.name, network.shapes[position], status, np.ones(low.size), low,
                                       high))
        found[position] = _interval(node.op, [found[i] for i in node.inputs])
    return tuple(layers)


def records(network: Network, box: Box, layers: tuple[LayerVerdict, ...]) -> list[dict]:
    """A certificate for verdicts that interval bounds prove."""
    heads = [{"node": i, "name": network.nodes[i].name, "neurons": int(np.prod(network.shapes[i]))} for i in network.relus]
    head = {"record": "header", "format": "exactprune-certificate/1", "network": network.sha256, "domain": box.sha256,
            "dtype": network.dtype.name, "input_shape": list(network.input_shape), "layers": heads, "tool": {"test": "1"}}
    lists = [{word: np.flatnonzero(v.status == status).tolist() for word, status in
              (("inactive", Status.INACTIVE), ("active", Status.ACTIVE), ("unknown", Status.UNSTABLE))} for v in layers]
    return [head, *({"record": "verdicts", "layer": k, "unstable": [], **found} for k, found in enumerate(lists))]


def accepted(network: Network, box: Box, layers: tuple[LayerVerdict, ...], rewrite: Rewrite, folder: Path | None = None) -> bool:
    """Whether the independent checker accepts the level that is claimed; with a folder, from files alone."""
    found = bundle(network, box, rewrite, records(network, box, layers), layers)
    if folder is None or not found.report.accepted:
        return found.report.accepted and found.level == rewrite.level
    save(network, folder / "f.onnx")
    save(rewrite.network, folder / "g.onnx")
    (folder / "bundle").write_bytes(found.data)
    report = check_bundle(folder / "f.onnx", folder / "g.onnx", folder / "bundle", exact=True)
    return report.accepted and report.claimed == rewrite.eps


def dyadic(rng: np.random.Generator, *shape: int, sparsity: float = 0.0) -> np.ndarray:
    """Multiples of 1/8 in [-1, 1], some of them 0."""
    return (rng.integers(-8, 9, shape) / 8 * (rng.random(shape) >= sparsity)).astype(np.float32)


def affine(rng: np.random.Generator, m: int, n: int, sparsity: float = 0.0) -> Affine:
    return Affine(dyadic(rng, m, n, sparsity=sparsity), dyadic(rng, m))


def conv(rng: np.random.Generator, m: int, n: int, k: int = 3, padding: int = 1, stride: int = 1,
         groups: int = 1) -> Conv2d:
    return Conv2d(dyadic(rng, m, n // groups, k, k), dyadic(rng, m), (stride, stride), (padding,) * 4, groups=groups)


def killed(op, *units: int):
    """The same mixer with these output units stably inactive on [0, 1] (bias far below zero)."""
    bias = op.bias.copy()
    bias[list(units)] = -1000
    return replace(op, bias=bias)


def constant(op, unit: int, value: float):
    """The same mixer with one output unit equal to ``value``."""
    weight, bias = op.weight.copy(), op.bias.copy()
    weight[unit], bias[unit] = 0, value
    return replace(op, weight=weight, bias=bias)


def unread(op, *units: int):
    """The same mixer, not reading these input units."""
    weight = op.weight.copy()
    weight[:, list(units)] = 0
    return replace(op, weight=weight)


def chain(input_shape: tuple[int, ...], *ops: Op, dtype: type = np.float32) -> Network:
    return build([Node(f"n{i}.{op.kind}", op, (i - 1,)) for i, op in enumerate(ops)], input_shape, dtype)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    functions: list[Callable] = [exact, same, verdicts, dyadic, affine, conv, killed, constant, unread, chain,
                                 records, accepted]
    return SimpleNamespace(**{f.__name__: f for f in functions})
