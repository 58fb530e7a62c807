"""The operators of a network, each with the few facts the rest of the package needs.

An operator is an immutable value: arrays are copied in, made read-only, and shared by nobody. Shapes never contain the
batch axis; ``evaluate`` takes and gives arrays with one leading batch axis. Layouts are those of PyTorch and ONNX:
channels first, C order. Arrays keep the dtype of the network (float32 or float64), and every claim of the package is
about these stored floats read as exact rationals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import ClassVar, Self

import numpy as np

from exactprune.errors import ShapeError

Shape = tuple[int, ...]


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only, C-contiguous copy of ``array``."""
    copy = np.array(array, order="C", copy=True)
    copy.setflags(write=False)
    return copy


@dataclass(frozen=True, eq=False)
class Op(ABC):
    """One operator. Subclasses are final and list their arrays as fields of type ``np.ndarray``."""

    arity: ClassVar[int] = 1

    @property
    def kind(self) -> str:
        """The operator's name as printed and hashed, for example ``Conv2d``."""
        return type(self).__name__

    @abstractmethod
    def output_shape(self, *shapes: Shape) -> Shape:
        """Shape (no batch axis) of the result.

        Raises:
            ShapeError: the input shapes do not fit the operator.
        """

    @abstractmethod
    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        """The operator on arrays of shape (batch, *shape), in the dtype of the inputs."""

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """(field name, array) for every array field, in declaration order."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                yield item.name, value

    def settings(self) -> dict[str, object]:
        """Every field that is not an array, as JSON-able values; with ``arrays`` it defines the operator."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not isinstance(getattr(self, f.name), np.ndarray)}

    def astype(self, dtype: np.dtype | type) -> Self:
        """The same operator with its arrays cast to ``dtype`` (shared when the dtype is already right)."""
        changed = {name: frozen(a.astype(dtype)) for name, a in self.arrays() if a.dtype != dtype}
        return replace(self, **changed) if changed else self

    @property
    def parameters(self) -> int:
        """Number of stored scalars."""
        return sum(a.size for _, a in self.arrays())

    def macs(self, *shapes: Shape) -> int:
        """Multiply-accumulate operations for one input."""
        return 0


def _freeze_arrays(op: Op) -> None:
    for name, array in op.arrays():
        object.__setattr__(op, name, frozen(array))


def _fail(op: Op, why: str) -> ShapeError:
    return ShapeError(f"{op.kind}: {why}")


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """y = weight x + bias on a flat vector.

    Attributes:
        weight: shape (outputs, inputs).
        bias: shape (outputs,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        _freeze_arrays(self)
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise _fail(self, f"weight {self.weight.shape} and bias {self.bias.shape} do not fit")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if shape != (self.weight.shape[1],):
            raise _fail(self, f"takes a flat input of {self.weight.shape[1]} values, was given shape {shape}")
        return (self.weight.shape[0],)

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        (x,) = inputs
        return x @ self.weight.T.astype(x.dtype, copy=False) + self.bias.astype(x.dtype, copy=False)

    def macs(self, *shapes: Shape) -> int:
        return self.weight.size


def pair(value: object) -> tuple[int, int]:
    """(v, v) for an integer v, and a pair as it is."""
    if isinstance(value, int):
        return (value, value)
    first, second = value  # type: ignore[misc]
    return (int(first), int(second))


def _windows(x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> np.ndarray:
    """View of x (batch, C, H, W) as (batch, C, H_out, W_out, kh, kw)."""
    span = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    return view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def _spatial(op: Op, shape: Shape, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int],
             dilation: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 3:
        raise _fail(op, f"takes (channels, height, width), was given shape {shape}")
    top, left, bottom, right = padding
    height = shape[1] + top + bottom - (kernel[0] - 1) * dilation[0] - 1
    width = shape[2] + left + right - (kernel[1] - 1) * dilation[1] - 1
    if height < 0 or width < 0:
        raise _fail(op, f"kernel {kernel} with dilation {dilation} does not fit into input {shape} padded by {padding}")
    return height // stride[0] + 1, width // stride[1] + 1


def _padded(x: np.ndarray, padding: tuple[int, int, int, int], value: float) -> np.ndarray:
    top, left, bottom, right = padding
    if not any(padding):
        return x
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)


@dataclass(frozen=True, eq=False)
class Conv2d(Op):
    """Cross-correlation with zero padding.

    Attributes:
        weight: shape (out channels, in channels / groups, kernel height, kernel width).
        bias: shape (out channels,).
        stride, dilation: (vertical, horizontal).
        padding: (top, left, bottom, right).
        groups: number of channel groups.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        _freeze_arrays(self)
        if self.weight.ndim != 4 or self.bias.shape != self.weight.shape[:1]:
            raise _fail(self, f"weight {self.weight.shape} and bias {self.bias.shape} do not fit")
        if self.groups < 1 or self.weight.shape[0] % self.groups:
            raise _fail(self, f"{self.weight.shape[0]} output channels do not split into {self.groups} groups")

    @property
    def kernel(self) -> tuple[int, int]:
        """(kernel height, kernel width)."""
        return self.weight.shape[2], self.weight.shape[3]

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        height, width = _spatial(self, shape, self.kernel, self.stride, self.padding, self.dilation)
        if shape[0] != self.weight.shape[1] * self.groups:
            raise _fail(self, f"takes {self.weight.shape[1] * self.groups} channels, was given {shape[0]}")
        return (self.weight.shape[0], height, width)

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        (x,) = inputs
        view = _windows(_padded(x, self.padding, 0.0), self.kernel, self.stride, self.dilation)
        batch, _, height, width = view.shape[:4]
        outputs, channels = self.weight.shape[:2]
        size = prod(self.weight.shape[1:])
        columns = view.reshape(batch, self.groups, channels, height, width, *self.kernel)
        columns = columns.transpose(0, 3, 4, 1, 2, 5, 6).reshape(batch * height * width, self.groups, size)
        weight = self.weight.astype(x.dtype, copy=False).reshape(self.groups, outputs // self.groups, size)
        out = np.matmul(columns.transpose(1, 0, 2), weight.transpose(0, 2, 1))
        out = out.transpose(1, 0, 2).reshape(batch, height, width, outputs) + self.bias.astype(x.dtype, copy=False)
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2))

    def macs(self, *shapes: Shape) -> int:
        _, height, width = self.output_shape(*shapes)
        return self.weight.size * height * width


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """y = scale * x + shift elementwise; both broadcast to the input's shape (an unfolded batch norm, x - mean, x / std).

    Attributes:
        scale, shift: arrays that broadcast to the input's shape without enlarging it.
    """

    scale: np.ndarray
    shift: np.ndarray

    def __post_init__(self) -> None:
        _freeze_arrays(self)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        try:
            fits = np.broadcast_shapes(shape, self.scale.shape, self.shift.shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise _fail(self, f"scale {self.scale.shape} and shift {self.shift.shape} do not broadcast to {shape}")
        return shape

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        (x,) = inputs
        return x * self.scale.astype(x.dtype, copy=False) + self.shift.astype(x.dtype, copy=False)

    def macs(self, *shapes: Shape) -> int:
        return prod(shapes[0])


@dataclass(frozen=True, eq=False)
class ReLU(Op):
    """y = max(x, 0), the neurons this package is about."""

    def output_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        return np.maximum(inputs[0], 0)


@dataclass(frozen=True, eq=False)
class Add(Op):
    """y = x1 + x2, two tensors of the same shape (a residual connection)."""

    arity: ClassVar[int] = 2

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise _fail(self, f"takes two inputs of one shape, was given {shapes}")
        return shapes[0]

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        return inputs[0] + inputs[1]


@dataclass(frozen=True, eq=False)
class MaxPool2d(Op):
    """Maximum over windows; padded places never win.

    Attributes:
        kernel, stride, dilation: (vertical, horizontal).
        padding: (top, left, bottom, right).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_shape(self, *shapes: Shape) -> Shape:
        return (shapes[0][0], *_spatial(self, shapes[0], self.kernel, self.stride, self.padding, self.dilation))

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        padded = _padded(inputs[0], self.padding, -np.inf)
        return _windows(padded, self.kernel, self.stride, self.dilation).max(axis=(4, 5))


@dataclass(frozen=True, eq=False)
class AvgPool2d(Op):
    """Mean over windows: the sum divided by a divisor, exactly (as a rational).

    Attributes:
        kernel, stride: (vertical, horizontal).
        padding: (top, left, bottom, right).
        count_include_pad: divide by the window's size also where it reaches into the padding.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_include_pad: bool = True

    def output_shape(self, *shapes: Shape) -> Shape:
        return (shapes[0][0], *_spatial(self, shapes[0], self.kernel, self.stride, self.padding, (1, 1)))

    def divisors(self, shape: Shape) -> np.ndarray:
        """What each window's sum is divided by: integers of shape (H_out, W_out)."""
        ones = np.ones((1, 1, *shape[1:]), dtype=np.int64)
        padded = _padded(ones, self.padding, 1 if self.count_include_pad else 0)
        return _windows(padded, self.kernel, self.stride, (1, 1)).sum(axis=(4, 5))[0, 0]

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        (x,) = inputs
        total = _windows(_padded(x, self.padding, 0.0), self.kernel, self.stride, (1, 1)).sum(axis=(4, 5))
        return total / self.divisors(x.shape[1:]).astype(x.dtype)


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    """The same values in another shape, C order (flatten is one case).

    Attributes:
        shape: the result's shape without batch axis.
    """

    shape: Shape

    def output_shape(self, *shapes: Shape) -> Shape:
        if prod(shapes[0]) != prod(self.shape):
            raise _fail(self, f"cannot lay {shapes[0]} out as {self.shape}")
        return self.shape

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        return inputs[0].reshape(inputs[0].shape[0], *self.shape)


@dataclass(frozen=True, eq=False)
class Transpose(Op):
    """Axes permuted.

    Attributes:
        permutation: of the axes without batch axis, as in ``np.transpose``.
    """

    permutation: tuple[int, ...]

    def output_shape(self, *shapes: Shape) -> Shape:
        if sorted(self.permutation) != list(range(len(shapes[0]))):
            raise _fail(self, f"permutation {self.permutation} does not fit shape {shapes[0]}")
        return tuple(shapes[0][axis] for axis in self.permutation)

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(inputs[0].transpose(0, *(axis + 1 for axis in self.permutation)))


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """Constant padding on any axes.

    Attributes:
        pads: (before, after) for every axis of the shape, all >= 0.
        value: the constant, a finite float.
    """

    pads: tuple[tuple[int, int], ...]
    value: float = field(default=0.0)

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(self.pads) != len(shapes[0]) or min(min(p) for p in self.pads) < 0:
            raise _fail(self, f"pads {self.pads} do not fit shape {shapes[0]}")
        return tuple(n + before + after for n, (before, after) in zip(shapes[0], self.pads, strict=True))

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        return np.pad(inputs[0], ((0, 0), *self.pads), constant_values=self.value)


OPERATORS: dict[str, type[Op]] = {
    op.__name__: op
    for op in (Affine, Conv2d, Scale, ReLU, Add, MaxPool2d, AvgPool2d, Reshape, Transpose, Pad)
}
