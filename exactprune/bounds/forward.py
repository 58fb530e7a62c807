"""A float64 forward pass with a rigorous error bound, and an exact one for what the bound leaves open.

Let u = 2^-53 and gamma_n = n u / (1 - n u). A sum of n products evaluated in floating point, in any order and with or
without fused multiply-adds, is off by at most gamma_n times the sum of the magnitudes (Higham, Accuracy and Stability
of Numerical Algorithms, 2nd ed., section 3.1). So, writing x for the computed and x* for the exact input of ``W x + b``
with n inputs, ``m`` for a bound on |x| and ``e`` for one on |x - x*|,

    |computed - exact| <= |W| e + gamma_{n+1} (|W| m + |b|) + (n + 1) tiny,

where ``tiny`` pays for underflow, flushed to zero or not. ReLU and max pooling are 1-Lipschitz and round nothing. The
right-hand side is itself inflated for its own rounding. With m = the magnitudes of the computed values the bound is
*pointwise*; with m = magnitudes valid on the whole box it is computed once and then holds for every point of the box,
so that certain signs cost no more than the plain forward pass. An overflow makes the bound infinite: nothing certain.

No algorithm with another error model is allowed in: convolutions run without cuDNN (no Winograd, no FFT; oneDNN has no
float64) and everything is float64 (no TF32). The stored weights, float32 or float64, are exact in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import lcm, prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from exactprune.domain import Box
from exactprune.errors import DomainError, OptionError, ShapeError
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose

UNIT = 2.0**-53
TINY = 2.0**-1021

Arrays = tuple[Tensor, ...]
Activation = Callable[[Tensor], Tensor]


def gamma(n: int) -> float:
    """An upper bound of gamma_n = n u / (1 - n u), for n < 2^51."""
    return 1.000001 * n * UNIT / (1 - n * UNIT)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Convolutions by matrix products only: their error model is that of a sum of products."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


# -- one operator ------------------------------------------------------------------------------------------------------


def _zero_padded(x: Tensor, padding: tuple[int, int, int, int], value: float = 0.0) -> Tensor:
    top, left, bottom, right = padding
    return functional.pad(x, (left, right, top, bottom), value=value) if any(padding) else x


def _conv(op: Conv2d, arrays: Arrays, x: Tensor) -> Tensor:
    padded = _zero_padded(x, op.padding)
    return functional.conv2d(padded, *arrays, stride=op.stride, dilation=op.dilation, groups=op.groups)


def _max_pool(op: MaxPool2d, x: Tensor) -> Tensor:
    padded = _zero_padded(x, op.padding, -torch.inf)
    return functional.max_pool2d(padded, op.kernel, op.stride, dilation=op.dilation)


def _avg_pool(op: AvgPool2d, divisors: Tensor, x: Tensor) -> Tensor:
    return functional.avg_pool2d(_zero_padded(x, op.padding), op.kernel, op.stride, divisor_override=1) / divisors


def _pad(op: Pad, value: Tensor, x: Tensor) -> Tensor:
    sides = [n for pads in reversed(op.pads) for n in pads]
    return functional.pad(x, sides, value=float(value))


def _apply(op: Op, arrays: Arrays, inputs: Sequence[Tensor], activation: Activation) -> Tensor:
    """``op`` with its arrays replaced by ``arrays``, on tensors of shape (batch, *shape)."""
    x = inputs[0]
    match op:
        case Affine():
            return functional.linear(x, *arrays)
        case Conv2d():
            return _conv(op, arrays, x)
        case Scale():
            return x * arrays[0] + arrays[1]
        case ReLU():
            return activation(x)
        case Add():
            return x + inputs[1]
        case MaxPool2d():
            return _max_pool(op, x)
        case AvgPool2d():
            return _avg_pool(op, arrays[0], x)
        case Reshape():
            return x.reshape(x.shape[0], *op.shape)
        case Transpose():
            return x.permute(0, *(axis + 1 for axis in op.permutation))
        case Pad():
            return _pad(op, arrays[0], x)
    raise OptionError(f"{op.kind}: has no forward pass in float64; extend exactprune.bounds.forward")


def _arrays(op: Op, shape: tuple[int, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(linear part, constant part) of the operator as float64 arrays, in the order ``_apply`` takes them."""
    match op:
        case Affine() | Conv2d():
            return [op.weight], [op.bias]
        case Scale():
            return [op.scale], [op.shift]
        case AvgPool2d():
            return [op.divisors(shape).astype(np.float64)], []
        case Pad():
            return [], [np.array(op.value, dtype=np.float64)]
    return [], []


def _roundings(op: Op) -> int:
    """The most roundings that one result goes through, one product counted with its addition."""
    match op:
        case Affine():
            return op.weight.shape[1] + 1
        case Conv2d():
            return prod(op.weight.shape[1:]) + 1
        case AvgPool2d():
            return prod(op.kernel) + 1
        case Scale() | Add():
            return 2
    return 0


@dataclass(frozen=True, eq=False)
class _Step:
    """One node with its arrays on the device: as they are, their magnitudes, and the magnitudes with constants 0."""

    node: Node
    signed: Arrays
    magnitude: Arrays
    linear: Arrays
    roundings: int

    def value(self, inputs: Sequence[Tensor], activation: Activation) -> Tensor:
        return _apply(self.node.op, self.signed, inputs, activation)

    def error(self, magnitudes: Sequence[Tensor], errors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(bound on the magnitude of the computed result, bound on its error) from those of the inputs."""
        op, n = self.node.op, self.roundings
        size = _apply(op, self.magnitude, magnitudes, torch.relu)
        error = _apply(op, self.linear, errors, torch.relu)
        if not n:
            return size, error
        slack = 1 + 4 * gamma(n + 16)
        size = size * slack + n * TINY
        return size, (error + gamma(n) * size) * slack + n * TINY


def _step(node: Node, shape: tuple[int, ...], device: torch.device) -> _Step:
    linear, constant = _arrays(node.op, shape)

    def tensors(arrays: list[np.ndarray]) -> Arrays:
        return tuple(torch.tensor(a, dtype=torch.float64, device=device) for a in arrays)

    slopes, constants = tensors(linear), tensors(constant)
    sizes = tuple(t.abs() for t in slopes)
    return _Step(node, slopes + constants, sizes + tuple(t.abs() for t in constants),
                 sizes + tuple(torch.zeros_like(t) for t in constants), _roundings(node.op))


# -- the network -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Forward:
    """Pre-activations of a network in float64, with error bounds.

    Attributes:
        network: any network; its arrays are copied to the device once.
        device: where to compute, for example ``cpu`` or ``cuda``.
    """

    network: Network
    device: torch.device | str = "cpu"
    _steps: tuple[_Step, ...] = field(init=False, repr=False)
    _last: dict[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        network, device = self.network, torch.device(self.device)
        object.__setattr__(self, "device", device)
        shapes = (network.shape_of(n.inputs[0]) for n in network.nodes)
        object.__setattr__(self, "_steps", tuple(map(_step, network.nodes, shapes, [device] * len(network.nodes))))
        object.__setattr__(self, "_last", {i: max(readers, default=i) for i, readers in network.readers.items()})

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Number of neurons of every ReLU layer."""
        return tuple(prod(self.network.shapes[i]) for i in self.network.relus)

    @property
    def inputs(self) -> int:
        """Number of input values."""
        return prod(self.network.input_shape)

    def width(self, last: int | None = None) -> int:
        """Number of values of one input that a pass up to ReLU layer ``last`` computes: its memory per point."""
        return self.inputs + sum(prod(self.network.shapes[i]) for i in range(self._stop(last)))

    def tensor(self, x: np.ndarray | Tensor) -> Tensor:
        """Points as a float64 tensor of shape (batch, inputs) on the device.

        Raises:
            ShapeError: ``x`` is not (batch, inputs) or (batch, *input shape).
        """
        given = torch.as_tensor(x if isinstance(x, Tensor) else np.array(x))
        if given.ndim == 0 or prod(given.shape[1:]) != self.inputs or given.ndim == 1:
            raise ShapeError(f"{self.network.name}: takes points of shape (batch, {self.inputs}), was given "
                             f"{tuple(given.shape)}")
        return given.reshape(len(given), self.inputs).to(device=self.device, dtype=torch.float64)

    def preactivations(self, x: np.ndarray | Tensor, last: int | None = None, *,
                       activation: Activation = torch.relu) -> list[Tensor]:
        """Pre-activations of the ReLU layers 0..last (all by default); differentiable.

        Args:
            x: shape (batch, inputs) or (batch, *input shape).
            last: the last layer wanted; nothing behind it is computed.
            activation: what takes the place of ReLU, for example one with a surrogate slope.

        Returns:
            one tensor (batch, neurons of the layer) a layer, flat in C order.
        """
        x = self.tensor(x)
        values = {INPUT: x.reshape(-1, *self.network.input_shape)}
        found: list[Tensor] = []
        with plain_kernels():
            for position in range(self._stop(last)):
                step = self._steps[position]
                given = [values[i] for i in step.node.inputs]
                if isinstance(step.node.op, ReLU):
                    found.append(given[0].flatten(1))
                    if len(found) - 1 == last:
                        break
                values[position] = step.value(given, activation)
                self._forget(values, position)
        return found

    @torch.no_grad()
    def with_errors(self, x: np.ndarray | Tensor, last: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Pre-activations and, for each of them, a bound on abs(computed - exact); about three times the plain cost.

        Returns:
            (values, errors), each one tensor (batch, neurons of the layer) a layer.
        """
        x = self.tensor(x)
        start = x.reshape(-1, *self.network.input_shape)
        values, errors = {INPUT: start}, {INPUT: torch.zeros_like(start)}
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        with plain_kernels():
            for position in range(self._stop(last)):
                step = self._steps[position]
                given, wrong = [values[i] for i in step.node.inputs], [errors[i] for i in step.node.inputs]
                if isinstance(step.node.op, ReLU):
                    found[0].append(given[0].flatten(1))
                    found[1].append(wrong[0].flatten(1))
                values[position] = step.value(given, torch.relu)
                errors[position] = step.error([v.abs() for v in given], wrong)[1]
                self._forget(values, position)
                self._forget(errors, position)
        return found

    @torch.no_grad()
    def box_errors(self, box: Box) -> list[Tensor]:
        """For every ReLU layer a bound on abs(computed - exact) that holds at every point of the box.

        Args:
            box: of the network's input size.

        Returns:
            one tensor (neurons of the layer,) a layer.

        Raises:
            DomainError: the box has another size.
        """
        box = box.reshaped(self.network.input_shape)
        largest = torch.tensor(np.maximum(np.abs(box.lower), np.abs(box.upper)), device=self.device)[None]
        sizes, errors = {INPUT: largest}, {INPUT: torch.zeros_like(largest)}
        found: list[Tensor] = []
        with plain_kernels():
            for position, step in enumerate(self._steps):
                given, wrong = [sizes[i] for i in step.node.inputs], [errors[i] for i in step.node.inputs]
                if isinstance(step.node.op, ReLU):
                    found.append(wrong[0].reshape(-1))
                sizes[position], errors[position] = step.error(given, wrong)
        return found

    def signs(self, x: np.ndarray | Tensor, last: int | None = None) -> list[Tensor]:
        """Certain signs of the pre-activations: int8, +1, -1, or 0 where the error bound leaves it open."""
        return [certain_sign(z, e) for z, e in zip(*self.with_errors(x, last), strict=True)]

    def _stop(self, last: int | None) -> int:
        if last is None:
            return self.network.relus[-1] + 1 if self.network.relus else 0
        if not 0 <= last < len(self.network.relus):
            raise OptionError(f"ReLU layer {last}: {self.network.name} has {len(self.network.relus)} ReLU layers; "
                              "count from 0")
        return self.network.relus[last] + 1

    def _forget(self, values: dict[int, Tensor], position: int) -> None:
        for source in self.network.nodes[position].inputs:
            if self._last[source] == position:
                values.pop(source, None)


def certain_sign(value: Tensor, error: Tensor) -> Tensor:
    """+1 or -1 where abs(value) > error, both finite, else 0; int8."""
    certain = (value.abs() > error) & value.isfinite() & error.isfinite()
    return (value.sign() * certain).nan_to_num(0.0).to(torch.int8)


# -- exact -------------------------------------------------------------------------------------------------------------
# A node's values are Python integers over one common denominator; entries outside the cone of influence stay 0.

Exact = tuple[np.ndarray, int]


def _integers(array: np.ndarray) -> Exact:
    """A float array as (integers, denominator), exactly: the denominator is the largest power of two needed."""
    ratios = [float(v).as_integer_ratio() for v in array.ravel()]
    denominator = max((d for _, d in ratios), default=1)
    values = np.empty(len(ratios), dtype=object)
    values[:] = [n * (denominator // d) for n, d in ratios]
    return values.reshape(array.shape), denominator


def _window_sources(op: Conv2d | MaxPool2d | AvgPool2d, shape: tuple[int, ...]) -> np.ndarray:
    """Flat input index of every window entry, -1 for padding: (channels, H_out, W_out, kh, kw)."""
    top, left, bottom, right = op.padding
    places = np.pad(np.arange(prod(shape)).reshape(shape), ((0, 0), (top, bottom), (left, right)), constant_values=-1)
    dilation = (1, 1) if isinstance(op, AvgPool2d) else op.dilation
    span = tuple((k - 1) * d + 1 for k, d in zip(op.kernel, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(places, span, axis=(1, 2))
    return view[:, :: op.stride[0], :: op.stride[1], :: dilation[0], :: dilation[1]]


def _sources(op: Op, shape: tuple[int, ...], out: np.ndarray) -> np.ndarray:
    """Flat input indices that the flat outputs ``out`` read: (outputs, entries), -1 for padding."""
    if not len(out):  # nothing is asked of a node that is read in its padding only
        return np.empty((0, 1), np.int64)
    match op:
        case Affine():
            return np.broadcast_to(np.arange(prod(shape)), (len(out), prod(shape)))
        case Conv2d():
            windows = _window_sources(op, shape)
            channel, row, column = np.unravel_index(out, op.output_shape(shape))
            per_group = op.weight.shape[1]
            first = channel // (op.weight.shape[0] // op.groups) * per_group
            return windows[first[:, None] + np.arange(per_group), row[:, None], column[:, None]].reshape(len(out), -1)
        case MaxPool2d() | AvgPool2d():
            windows = _window_sources(op, shape)
            return windows[np.unravel_index(out, windows.shape[:3])].reshape(len(out), -1)
        case Transpose():
            return np.arange(prod(shape)).reshape(shape).transpose(op.permutation).reshape(-1)[out, None]
        case Pad():
            return np.pad(np.arange(prod(shape)).reshape(shape), op.pads, constant_values=-1).reshape(-1)[out, None]
    return out[:, None]


def _broadcast(array: np.ndarray, shape: tuple[int, ...], out: np.ndarray) -> np.ndarray:
    return np.broadcast_to(array, shape).reshape(-1)[out]


def _affine_exact(weight: np.ndarray, bias: np.ndarray, gathered: np.ndarray, denominator: int) -> Exact:
    """Row-wise weight . gathered + bias; weight and gathered (outputs, entries)."""
    both, scale = _integers(np.concatenate([weight, bias[:, None]], axis=1))
    return (both[:, :-1] * gathered).sum(axis=1) + both[:, -1] * denominator, scale * denominator


def _exact_op(op: Op, shape: tuple[int, ...], out: np.ndarray, given: Sequence[Exact]) -> Exact:
    """The outputs ``out`` of one operator."""
    values, denominator = given[0]
    sources = _sources(op, shape, out)
    gathered = np.where(sources >= 0, values[sources], 0)
    match op:
        case Affine():
            return _affine_exact(op.weight[out], op.bias[out], gathered, denominator)
        case Conv2d():
            channel = np.unravel_index(out, op.output_shape(shape))[0]
            weight = op.weight.reshape(len(op.weight), -1)[channel]
            return _affine_exact(weight, op.bias[channel], gathered, denominator)
        case Scale():
            return _affine_exact(_broadcast(op.scale, shape, out)[:, None], _broadcast(op.shift, shape, out), gathered,
                                 denominator)
        case ReLU():
            return np.maximum(gathered[:, 0], 0), denominator
        case Add():
            other, below = given[1]
            common = lcm(denominator, below)
            return gathered[:, 0] * (common // denominator) + other[out] * (common // below), common
        case MaxPool2d():
            lowest = min(int(values.min()), 0)
            return np.where(sources >= 0, values[sources], lowest).max(axis=1), denominator
        case AvgPool2d():
            divisors = np.broadcast_to(op.divisors(shape), op.output_shape(shape)).reshape(-1)[out]
            common = lcm(*map(int, divisors))
            factor = np.array([common // int(d) for d in divisors], dtype=object)
            return gathered.sum(axis=1) * factor, denominator * common
        case Pad():
            top, below = float(op.value).as_integer_ratio()
            common = lcm(denominator, below)
            padded = np.where(sources[:, 0] >= 0, gathered[:, 0] * (common // denominator), top * (common // below))
            return padded, common
    return gathered[:, 0], denominator


def _cone(network: Network, position: int, indices: np.ndarray) -> dict[int, np.ndarray]:
    """Flat indices needed of every node, to know the values ``indices`` of the node at ``position``."""
    needed: dict[int, np.ndarray] = {position: np.unique(indices)}
    for i in range(position, INPUT, -1):
        if i not in needed:
            continue
        node = network.nodes[i]
        read = np.unique(_sources(node.op, network.shape_of(node.inputs[0]), needed[i]))
        for source in node.inputs:
            needed[source] = np.union1d(needed.get(source, np.empty(0, np.int64)), read[read >= 0]).astype(np.int64)
    return needed


def exact_cost(network: Network, layer: int) -> int:
    """About how many products one exact pre-activation of a layer takes: those of its cone of influence."""
    position = network.nodes[network.relus[layer]].inputs[0]
    extents: dict[int, tuple[int, ...]] = {position: (1,) * len(network.shape_of(position))}
    cost = 0
    for i in range(position, INPUT, -1):
        if i not in extents:
            continue
        op, shape = network.nodes[i].op, network.shape_of(network.nodes[i].inputs[0])
        extent = extents[i]
        read = _read(op, extent, shape)
        if isinstance(op, Affine | Conv2d):
            cost += prod(extent) * prod(op.weight.shape[1:])
        for source in network.nodes[i].inputs:
            extents[source] = tuple(map(max, extents.get(source, read), read))
    return cost


def _read(op: Op, extent: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Extents of what an operator reads for outputs of some extents; the whole tensor where layouts change."""
    if isinstance(op, Conv2d | MaxPool2d | AvgPool2d):
        dilation = (1, 1) if isinstance(op, AvgPool2d) else op.dilation
        sides = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(extent[1:], op.stride, op.kernel, dilation, strict=True)]
        channels = extent[0] if not isinstance(op, Conv2d) else op.weight.shape[1] if extent[0] == 1 else shape[0]
        return tuple(map(min, (channels, *sides), shape))
    return shape if isinstance(op, Affine | Reshape | Transpose | Pad) else extent


def exact_preactivations(network: Network, x: np.ndarray, layer: int,
                         indices: Sequence[int] | np.ndarray) -> list[Fraction]:
    """Pre-activations as rationals, with Python integers on the cone of influence only.

    Args:
        network: its stored floats are read exactly.
        x: one input, ``inputs`` values in any shape; read exactly as float64.
        layer: number of the ReLU layer.
        indices: flat neuron indices.

    Raises:
        ShapeError: ``x`` has the wrong number of values.
        DomainError: ``x`` is not finite.
        OptionError: no such layer.
    """
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    if x.size != prod(network.input_shape):
        raise ShapeError(f"{network.name}: takes {prod(network.input_shape)} values, was given {x.size}")
    if not np.isfinite(x).all():
        raise DomainError(f"{network.name}: a point holds NaN or infinity; give finite values")
    if not 0 <= layer < len(network.relus):
        raise OptionError(f"ReLU layer {layer}: {network.name} has {len(network.relus)} ReLU layers; count from 0")
    position = network.nodes[network.relus[layer]].inputs[0]
    wanted = np.asarray(indices, dtype=np.int64)
    needed = _cone(network, position, wanted)
    known: dict[int, Exact] = {INPUT: _integers(x)}
    for i in sorted(needed.keys() - {INPUT}):
        node, out = network.nodes[i], needed[i]
        values, denominator = _exact_op(node.op, network.shape_of(node.inputs[0]), out, [known[j] for j in node.inputs])
        full = np.zeros(prod(network.shapes[i]), dtype=object)
        full[out] = values
        known[i] = (full, denominator)
    values, denominator = known[position]
    return [Fraction(int(values[i]), denominator) for i in wanted]


def exact_preactivation(network: Network, x: np.ndarray, layer: int, index: int) -> Fraction:
    """One pre-activation as a rational; see ``exact_preactivations``."""
    return exact_preactivations(network, x, layer, [index])[0]
