"""Networks as PyTorch: an ``nn.Sequential`` of exact ``torch.nn`` types (``.pt``), or any DAG as a module (``.pt2``).

A ``.pt`` written here holds nothing but ``torch.nn`` layers, so it loads under ``torch.load(weights_only=True)`` with
those classes allowed and without this package. Every layer holds the stored numbers as they are.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from exactprune.errors import UnsupportedOpError
from exactprune.io import atomic
from exactprune.io.tidy import without_empty
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Pad, ReLU, Reshape, Scale, Shape, Transpose

OTHERS = "save as .onnx or .pt2 instead"


def save_pt(network: Network, path: str | os.PathLike[str]) -> None:
    """Write ``network`` as a whole ``nn.Sequential``, atomically.

    Raises:
        UnsupportedOpError: the network is not a chain, or a layer has no ``torch.nn`` form.
        OptionError: the place cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(to_sequential(network), buffer)
    atomic.write_bytes(path, buffer.getvalue())


def save_pt2(network: Network, path: str | os.PathLike[str]) -> None:
    """Write ``network`` as a ``torch.export`` program with a dynamic batch axis, atomically.

    Raises:
        OptionError: the place cannot be written.
    """
    module = to_torch(network)
    example = torch.zeros(2, *network.input_shape, dtype=_dtype(network.dtype))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, buffer)
    atomic.write_bytes(path, buffer.getvalue())


def to_sequential(network: Network) -> nn.Sequential:
    """``network`` as an ``nn.Sequential`` in evaluation mode.

    Raises:
        UnsupportedOpError: the network is not a chain, or a layer has no ``torch.nn`` form.
    """
    network = without_empty(network)
    axes = network.interface.input_axes
    layers: list[nn.Module] = [nn.Flatten()] if axes is not None and axes[1:] == ("...",) else []
    for position, node in enumerate(network.nodes):
        if node.inputs != (position - 1,):
            raise UnsupportedOpError(
                f"{network.name}: node '{node.name}' ({node.op.kind}) makes it no plain chain of layers, so "
                f"it has no nn.Sequential form; {OTHERS}"
            )
        layers.extend(_layers(node, network.shape_of(position - 1)))
    return nn.Sequential(*layers).eval()


def to_torch(network: Network) -> nn.Module:
    """Any network as a module in evaluation mode that takes (batch, *input_shape)."""
    return NetworkModule(without_empty(network)).eval()


class NetworkModule(nn.Module):
    """A network's nodes as submodules, run in order; intermediate tensors are kept as long as they are needed."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        steps = [_step(node, network.shape_of(node.inputs[0])) for node in network.nodes]
        self.steps = nn.ModuleList(steps)
        self.reads = tuple(node.inputs for node in network.nodes)
        last = {i: position for position, inputs in enumerate(self.reads) for i in inputs}
        self.frees = tuple(tuple(i for i, p in last.items() if p == position) for position in range(len(steps)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network's output, shape (batch, *output_shape)."""
        values = {INPUT: x}
        for position, (step, inputs) in enumerate(zip(self.steps, self.reads, strict=True)):
            values[position] = step(*(values[i] for i in inputs))
            for i in self.frees[position]:
                del values[i]
        return values[max(values)]


class _Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class _ScaleShift(nn.Module):
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, op: Scale) -> None:
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(op.scale.copy()))
        self.register_buffer("shift", torch.from_numpy(op.shift.copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


class _Layout(nn.Module):
    def __init__(self, op: Reshape | Transpose) -> None:
        super().__init__()
        self.shape = op.shape if isinstance(op, Reshape) else None
        self.permutation = op.permutation if isinstance(op, Transpose) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shape is not None:
            return x.reshape(x.shape[0], *self.shape)
        assert self.permutation is not None
        return x.permute(0, *(p + 1 for p in self.permutation))


class _Padded(nn.Module):
    """Padding, then a pool: what asymmetric padding of a pool means."""

    def __init__(self, pads: tuple[int, ...], value: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.pads, self.value, self.inner = pads, value, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.pad(x, self.pads, value=self.value)
        return y if self.inner is None else self.inner(y)


class _PartialMean(nn.Module):
    """Average pooling that divides by the number of real values in the window, any padding."""

    divisors: torch.Tensor

    def __init__(self, op: AvgPool2d, shape: Shape) -> None:
        super().__init__()
        top, left, bottom, right = op.padding
        self.pads, self.kernel, self.stride = (left, right, top, bottom), op.kernel, op.stride
        self.register_buffer("divisors", torch.from_numpy(op.divisors(shape)).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(x, self.pads)
        return functional.avg_pool2d(padded, self.kernel, self.stride, divisor_override=1) / self.divisors


def _step(node: Node, shape: Shape) -> nn.Module:
    """One node as a module: the Sequential form where there is one, else a form of its own."""
    match node.op:
        case Add():
            return _Sum()
        case Scale():
            return _ScaleShift(node.op)
        case Reshape() | Transpose():
            return _Layout(node.op)
        case Pad():
            return _Padded(tuple(n for p in reversed(node.op.pads) for n in p), node.op.value)
    try:
        layers = list(_layers(node, shape))
    except UnsupportedOpError:
        layers = [_general_pool(node, shape)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _general_pool(node: Node, shape: Shape) -> nn.Module:
    op = node.op
    if isinstance(op, MaxPool2d):
        top, left, bottom, right = op.padding
        return _Padded((left, right, top, bottom), float("-inf"), nn.MaxPool2d(op.kernel, op.stride, 0, op.dilation))
    assert isinstance(op, AvgPool2d)
    return _PartialMean(op, shape)


def _layers(node: Node, shape: Shape) -> Iterator[nn.Module]:
    """``torch.nn`` layers that compute ``node`` on an input of ``shape``.

    Raises:
        UnsupportedOpError: there are none.
    """
    match node.op:
        case Affine():
            yield _with(nn.Linear(*reversed(node.op.weight.shape), dtype=_dtype(node.op.weight.dtype)), node.op)
        case Conv2d():
            yield from _convolution(node.op)
        case Scale():
            yield from _scale(node.op, shape)
        case ReLU():
            yield nn.ReLU()
        case MaxPool2d():
            yield _max_pool(node, node.op, shape)
        case AvgPool2d():
            yield from _avg_pool(node, node.op)
        case Reshape():
            yield from _reshape(shape, node.op.shape)
        case Pad():
            yield _pad(node, node.op)
        case _:
            raise UnsupportedOpError(f"node '{node.name}' ({node.op.kind}) has no nn.Sequential form; {OTHERS}")


def _with(layer: nn.Linear | nn.Conv2d, op: Affine | Conv2d) -> nn.Module:
    """``layer`` holding the numbers of ``op``."""
    layer.weight = nn.Parameter(torch.from_numpy(op.weight.copy()))
    layer.bias = nn.Parameter(torch.from_numpy(op.bias.copy()))
    return layer


def _convolution(op: Conv2d) -> Iterator[nn.Module]:
    top, left, bottom, right = op.padding
    padding = (top, left)
    if padding != (bottom, right):
        yield nn.ZeroPad2d((left, right, top, bottom))
        padding = (0, 0)
    outputs, inputs = op.weight.shape[:2]
    layer = nn.Conv2d(
        inputs * op.groups,
        outputs,
        op.kernel,
        op.stride,
        padding,
        op.dilation,
        op.groups,
        dtype=_dtype(op.weight.dtype),
    )
    yield _with(layer, op)


def _scale(op: Scale, shape: Shape) -> Iterator[nn.Module]:
    """A 1 x 1 convolution with one group a channel: per channel where the numbers are, else one for each value."""
    per_channel = len(shape) == 3 and all(_channelwise(a, shape) for a in (op.scale, op.shift))
    layout = shape if per_channel else (prod(shape), 1, 1)
    yield from _reshape(shape, layout)
    target = (shape[0], 1, 1) if per_channel else shape
    weight, bias = (np.broadcast_to(a, target).reshape(-1) for a in (op.scale, op.shift))
    yield from _convolution(Conv2d(weight[:, None, None, None], bias, groups=layout[0]))
    yield from _reshape(layout, shape)


def _channelwise(array: np.ndarray, shape: Shape) -> bool:
    return np.broadcast_shapes(array.shape, (shape[0], 1, 1)) == (shape[0], 1, 1)


def _max_pool(node: Node, op: MaxPool2d, shape: Shape) -> nn.Module:
    top, left, bottom, right = op.padding
    small = 2 * top <= op.kernel[0] and 2 * left <= op.kernel[1]
    if small and (top, left) == (bottom, right):
        return nn.MaxPool2d(op.kernel, op.stride, (top, left), op.dilation)
    ceiled = nn.MaxPool2d(op.kernel, op.stride, (top, left), op.dilation, ceil_mode=True)
    if small and (bottom, right) == _ceiled(op, shape):
        return ceiled
    raise UnsupportedOpError(
        f"node '{node.name}' (MaxPool2d) is padded by {op.padding}, which nn.MaxPool2d cannot; {OTHERS}"
    )


def _ceiled(op: MaxPool2d, shape: Shape) -> tuple[int, int]:
    """Padding below and on the right that ``ceil_mode`` stands for."""
    from exactprune.io.graph import ceil_extra

    spans = [(k - 1) * d + 1 for k, d in zip(op.kernel, op.dilation, strict=True)]
    extra = [ceil_extra(shape[i + 1], op.padding[i], op.padding[i], spans[i], op.stride[i]) for i in (0, 1)]
    return op.padding[0] + extra[0], op.padding[1] + extra[1]


def _avg_pool(node: Node, op: AvgPool2d) -> Iterator[nn.Module]:
    top, left, bottom, right = op.padding
    symmetric = (top, left) == (bottom, right) and 2 * top <= op.kernel[0] and 2 * left <= op.kernel[1]
    if symmetric:
        yield nn.AvgPool2d(op.kernel, op.stride, (top, left), count_include_pad=op.count_include_pad)
    elif op.count_include_pad:
        yield nn.ZeroPad2d((left, right, top, bottom))
        yield nn.AvgPool2d(op.kernel, op.stride)
    else:
        raise UnsupportedOpError(
            f"node '{node.name}' (AvgPool2d) is padded by {op.padding}, which nn.AvgPool2d cannot; {OTHERS}"
        )


def _reshape(source: Shape, target: Shape) -> Iterator[nn.Module]:
    if source != target and len(source) != 1:
        yield nn.Flatten()
    if source != target and len(target) != 1:
        yield nn.Unflatten(1, target)


def _pad(node: Node, op: Pad) -> nn.Module:
    if len(op.pads) != 3 or any(op.pads[0]):
        raise UnsupportedOpError(f"node '{node.name}' (Pad) pads other axes than height and width; {OTHERS}")
    (top, bottom), (left, right) = op.pads[1:]
    pads = (left, right, top, bottom)
    return nn.ZeroPad2d(pads) if op.value == 0 else nn.ConstantPad2d(pads, op.value)


def _dtype(dtype: np.dtype) -> torch.dtype:
    return torch.float64 if dtype == np.float64 else torch.float32
