"""The linear operators of a network on torch float64: y = M x + b forwards, v -> M^T v backwards.

Everything that bound propagation does to a linear operator goes through one of these maps, on flat vectors in C order.
Convolutions are never turned into dense matrices: both directions gather windows (im2col) and call one GEMM, a chunk of
rows at a time so that the gathered windows stay in cache. A transposed convolution with stride s splits into s*s
phases, each a stride-1 correlation with a sub-kernel (polyphase form), all of them columns of the same GEMM. Plain GEMMs
only (no Winograd, no FFT, no TF32), so the textbook error bound of a dot product, gamma_n |a|.|b|, holds for every entry and
any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from functools import cached_property
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exactprune.bounds.conv_columns import ColumnConv, column_conv
from exactprune.ops import Affine, AvgPool2d, Conv2d, Op, Pad, Reshape, Scale, Shape, Transpose

_SMALL = 1 << 18  # doubles in a matrix of a cropped convolution
_DENSER = 4.0  # times the products of gathered windows that a plain matrix may take: gathering costs twice its products
_DENSER_COLUMNS = 1.5  # the same against strided windows, which are not copied
_CACHE_DOUBLES = 1 << 17  # 1 MB of gathered windows: they are read again before they leave the cache


class LinearMap(ABC):
    """One linear operator between flat vectors.

    Attributes:
        size_in, size_out: lengths of the flat vectors.
        terms: the most products any entry of M x or M^T v sums up (0: the map moves values and rounds nothing).
        bias: float64 tensor of shape (size_out,), or None.
        smallest: the smallest nonzero abs(M), for underflow; 1 if there is none.
    """

    size_in: int
    size_out: int
    terms: int
    bias: Tensor | None
    smallest: float = 1.0

    @abstractmethod
    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        """M x for rows x of shape (rows, size_in), without bias; ``part`` takes M, abs(M), max(M, 0) or min(M, 0)."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """max(M, 0) x and min(M, 0) x."""
        return self.forward(x, "plus"), self.forward(x, "minus")

    @cached_property
    def bias_size(self) -> Tensor:
        """abs(bias)."""
        assert self.bias is not None
        return self.bias.abs()

    @abstractmethod
    def transposed(self, v: Tensor) -> Tensor:
        """M^T v for rows v of shape (rows, size_out): shape (rows, size_in)."""

    def transposed_columns(self, v: Tensor) -> Tensor:
        """M^T v for columns v of shape (size_out, columns): shape (size_in, columns). May return v or change it."""
        return self.transposed(v.T).T.contiguous()

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` of M, exactly: shape (len(indices), size_in)."""
        if not len(indices):
            return torch.zeros(0, self.size_in, dtype=torch.float64, device=indices.device)
        unit = torch.zeros(len(indices), self.size_out, dtype=torch.float64, device=indices.device)
        unit[torch.arange(len(indices), device=indices.device), indices] = 1.0
        return self.transposed(unit)


class _Parts(dict[str, Tensor]):
    """M, abs(M), max(M, 0), min(M, 0) and the last two stacked by name, made when first asked for: weights never change."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(all=weight)

    def __missing__(self, part: str) -> Tensor:
        weight = self["all"]
        made = {"abs": weight.abs, "plus": weight.relu, "minus": lambda: weight.clamp(max=0),
                "both": lambda: torch.cat([weight.relu(), weight.clamp(max=0)])}[part]()
        self[part] = made
        return made


def _smallest(weight: Tensor) -> float:
    sizes = weight[weight != 0].abs()
    return float(sizes.min()) if len(sizes) else 1.0


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(np.asarray(array, dtype=np.float64), device=device)


class DenseMap(LinearMap):
    """M is a stored matrix."""

    def __init__(self, op: Affine, device: torch.device) -> None:
        self.weight = _tensor(op.weight, device)
        self.parts = _Parts(self.weight)
        self.bias = _tensor(op.bias, device)
        self.size_out, self.size_in = self.weight.shape
        self.smallest = _smallest(self.weight)
        self.terms = max(self.weight.shape)

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        return x @ self.parts[part].T

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.mm(x, self.parts["both"].T)
        return found[:, : self.size_out], found[:, self.size_out :]

    def transposed(self, v: Tensor) -> Tensor:
        return v @ self.weight

    def transposed_columns(self, v: Tensor) -> Tensor:
        return torch.mm(self.weight.T, v)

    def rows(self, indices: Tensor) -> Tensor:
        return self.weight.index_select(0, indices)

    def columns(self, indices: Tensor) -> DenseMap:
        """The map that takes some entries of x, in the given order."""
        made = copy(self)
        made.weight = self.weight[:, indices]
        made.parts, made.size_in = _Parts(made.weight), len(indices)
        return made


class Window(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` (both exclusive at the end) of an image."""

    top: int
    bottom: int
    left: int
    right: int


class ConvMap(LinearMap):
    """M is a convolution with zero padding, possibly cropped: from a window of the input to a window of the output.

    Attributes:
        shape_in, shape_out: (channels, height, width) of what M maps from and to.
        padding: (top, left, bottom, right); top and left may be negative in a crop: values there are not read.
        last_in, last_out: whether the flat vectors are laid out (height, width, channels) instead of C order.
        small: M itself, in a crop where using it is cheaper than gathering.
    """

    def __init__(self, op: Conv2d, shape_in: Shape, device: torch.device) -> None:
        self.shape_in, self.shape_out = shape_in, op.output_shape(shape_in)
        self.stride, self.dilation, self.groups, self.kernel = op.stride, op.dilation, op.groups, op.kernel
        self.padding = op.padding
        self.last_in = self.last_out = False
        self.size_in, self.size_out = prod(shape_in), prod(self.shape_out)
        self.weight = _tensor(op.weight, device)
        self.parts = _Parts(self.weight)
        self.smallest = _smallest(self.weight)
        places = self.shape_out[1] * self.shape_out[2]
        self.channel_bias = _tensor(op.bias, device)
        self.bias = self.channel_bias.repeat_interleave(places)
        self.terms = max(prod(op.weight.shape[1:]), op.weight.shape[0] * prod(op.kernel))
        self._matrices: dict[tuple[int, int], Tensor] = {}
        self._dense: dict[tuple, Tensor] = {}
        self._columns: dict[tuple, ColumnConv] = {}
        self._kernel_rows: dict[tuple[int, int, int, int], Tensor] = {}
        self.small: Tensor | None = None

    @property
    def gathers(self) -> bool:
        """Whether the transposed map gathers windows; grouped and dilated convolutions scatter them instead."""
        return self.groups == 1 and self.dilation == (1, 1)

    def field(self, out: Window) -> Window:
        """The window of the input that a window of the output reads."""
        top, bottom = self._reach(0, out.top, out.bottom)
        return Window(top, bottom, *self._reach(1, out.left, out.right))

    def _reach(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        stride, length = self.stride[axis], self.shape_in[1 + axis]
        first = start * stride - self.padding[axis]
        last = (stop - 1) * stride - self.padding[axis] + self.kernel[axis]
        first, last = min(max(first, 0), length - 1), max(min(last, length), 1)
        return first - first % stride, min(last + -last % stride, length)  # whole strides need no cutting

    def crop(self, out: Window | None, into: Window | None) -> ConvMap:
        """The map between windows, each laid out channels last; None: the whole image in C order. For ``transposed`` only."""
        made = copy(self)
        made.last_in, made.last_out = into is not None, out is not None
        into = into or Window(0, self.shape_in[1], 0, self.shape_in[2])
        out = out or Window(0, self.shape_out[1], 0, self.shape_out[2])
        made.shape_in = (self.shape_in[0], into.bottom - into.top, into.right - into.left)
        made.shape_out = (self.shape_out[0], out.bottom - out.top, out.right - out.left)
        made.size_in, made.size_out = prod(made.shape_in), prod(made.shape_out)
        top = into.top + self.padding[0] - out.top * self.stride[0]
        left = into.left + self.padding[1] - out.left * self.stride[1]
        made.padding = (top, left, 0, 0)
        if made.last_out:
            made.bias = self.channel_bias.repeat(made.shape_out[1] * made.shape_out[2])
        made.small = made._small_matrix()
        return made

    def _small_matrix(self) -> Tensor | None:
        """M itself, where it is so small that one product with it is cheaper than gathering windows."""
        blocks = prod(stop - first for first, stop, _ in (self.blocks(0), self.blocks(1)))
        if self.size_in * self.size_out > min(_SMALL, _DENSER * blocks * prod(self.taps) * self.weight[:, :, 0, 0].numel()
                                              * prod(self.stride)):
            return None
        key = (self.shape_in, self.shape_out, self.padding, self.last_in, self.last_out)
        if key not in self._dense:
            self._dense[key] = self.transposed(torch.eye(self.size_out, dtype=torch.float64, device=self.weight.device))
        return self._dense[key]

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        return self._products_of(self._unfolded(x), part)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        columns = self._unfolded(x)
        return self._products_of(columns, "plus"), self._products_of(columns, "minus")

    def _unfolded(self, x: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        padded = F.pad(x.reshape(-1, *self.shape_in), (left, right, top, bottom))
        columns = F.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride)
        return columns.reshape(len(columns), self.groups, columns.shape[1] // self.groups, -1)

    def _products_of(self, columns: Tensor, part: str) -> Tensor:
        weight = self.parts[part].reshape(self.groups, self.shape_out[0] // self.groups, -1)
        return torch.matmul(weight, columns).reshape(len(columns), self.size_out)

    def transposed(self, v: Tensor) -> Tensor:
        channels, height, width = self.shape_out
        if self.small is not None:
            return v @ self.small
        if not self.gathers:
            return self._transposed_by_fold(v.reshape(-1, *self.shape_out))
        if self.last_out:
            rows = v.reshape(-1, height, width, channels)
        else:
            rows = v.reshape(-1, channels, height * width).transpose(1, 2).reshape(-1, height, width, channels)
        image = self._transposed_by_gather(rows)
        return image.reshape(len(rows), -1) if self.last_in else image.permute(0, 3, 1, 2).reshape(len(rows), -1)

    def transposed_columns(self, v: Tensor) -> Tensor:
        if self.as_matrix:
            assert self.small is not None
            return torch.mm(self.small.T, v)
        if not self.gathers:
            return super().transposed_columns(v)
        buffer, inner = self.columns.empty(v, v.shape[1])
        inner.copy_(self.image_of(v))
        return self.from_columns(buffer)

    @property
    def as_matrix(self) -> bool:
        """Whether ``transposed_columns`` is one product with M."""
        return self.small is not None and self.small.numel() <= _DENSER_COLUMNS * self.columns.products

    def image_of(self, v: Tensor) -> Tensor:
        """Columns (size_out, columns) as (height, width, channels, columns)."""
        channels, height, width = self.shape_out
        if self.last_out:
            return v.view(height, width, channels, -1)
        return v.view(channels, height, width, -1).permute(1, 2, 0, 3)

    def from_columns(self, buffer: Tensor) -> Tensor:
        """M^T of what a buffer of ``columns`` holds: (size_in, columns)."""
        image = self.columns(buffer)
        return (image if self.last_in else image.permute(2, 0, 1, 3)).reshape(self.size_in, -1)

    @property
    def columns(self) -> ColumnConv:
        """The transposed map for images that lie (height, width, channels, columns); for maps that gather."""
        key = (self.shape_in, self.shape_out, self.padding)
        if key not in self._columns:
            self._columns[key] = column_conv(self)
        return self._columns[key]

    def kernel_row(self, tap: int, phase: int) -> Tensor | None:
        """What a place of this phase in y takes of an output row: (stride_x * channels in, taps_x * channels out), or None."""
        if not 0 <= (self.taps[0] - 1 - tap) * self.stride[0] + phase - self._shift(0) < self.kernel[0]:
            return None
        key = (tap, phase, self._shift(0), self._shift(1))
        if key not in self._kernel_rows:
            matrix = self._matrix(self._shift(0), self._shift(1))
            split = matrix.view(*self.taps, self.shape_out[0], *self.stride, self.shape_in[0])[tap, :, :, phase]
            self._kernel_rows[key] = split.permute(2, 3, 0, 1).reshape(self.stride[1] * self.shape_in[0], -1).contiguous()
        return self._kernel_rows[key]

    def _transposed_by_fold(self, rows: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        height, width = self.shape_in[1] + top + bottom, self.shape_in[2] + left + right
        weight = self.weight.reshape(self.groups, self.shape_out[0] // self.groups, -1)
        columns = torch.matmul(weight.transpose(1, 2), rows.reshape(len(rows), self.groups, weight.shape[1], -1))
        columns = columns.reshape(len(rows), self.shape_in[0] * prod(self.kernel), -1)
        image = F.fold(columns, (height, width), self.kernel, dilation=self.dilation, stride=self.stride)
        return image[:, :, top : top + self.shape_in[1], left : left + self.shape_in[2]].reshape(len(rows), -1)

    def _shift(self, axis: int) -> int:
        """Zeros to put before the kernel so that input places start a stride, where that costs no further tap."""
        stride, kernel = self.stride[axis], self.kernel[axis]
        shift = -self.padding[axis] % stride
        return shift if ceil((kernel + shift) / stride) == ceil(kernel / stride) else 0

    @property
    def taps(self) -> tuple[int, int]:
        return ceil(self.kernel[0] / self.stride[0]), ceil(self.kernel[1] / self.stride[1])

    def _matrix(self, shift_y: int, shift_x: int) -> Tensor:
        """Sub-kernels as one matrix (taps_y * taps_x * channels out, stride_y * stride_x * channels in)."""
        if (shift_y, shift_x) not in self._matrices:
            (stride_y, stride_x), (kernel_y, kernel_x) = self.stride, self.kernel
            taps_y, taps_x = self.taps
            after = (taps_x * stride_x - kernel_x - shift_x, taps_y * stride_y - kernel_y - shift_y)
            weight = F.pad(self.weight, (shift_x, after[0], shift_y, after[1]))
            split = weight.reshape(*weight.shape[:2], taps_y, stride_y, taps_x, stride_x).flip(2, 4)
            matrix = split.permute(2, 4, 0, 3, 5, 1).reshape(taps_y * taps_x * weight.shape[0], -1)
            self._matrices[shift_y, shift_x] = matrix.contiguous()
        return self._matrices[shift_y, shift_x]

    def blocks(self, axis: int) -> tuple[int, int, int]:
        """(first block of ``stride`` input places, one past the last, places to cut off the first)."""
        start = self.padding[axis] + self._shift(axis)
        first = start // self.stride[axis]
        return first, -(-(start + self.shape_in[1 + axis]) // self.stride[axis]), start - first * self.stride[axis]

    def _transposed_by_gather(self, rows: Tensor) -> Tensor:
        """(rows, height out, width out, channels out) -> (rows, height in, width in, channels in)."""
        (y0, y1, cut_y), (x0, x1, cut_x) = self.blocks(0), self.blocks(1)
        taps_y, taps_x = self.taps
        if min(y1, rows.shape[1]) < max(y0 - taps_y + 2, 1) or min(x1, rows.shape[2]) < max(x0 - taps_x + 2, 1):
            return rows.new_zeros(len(rows), *self.shape_in[1:], self.shape_in[0])  # these outputs see padding only
        halo = (0, 0, taps_x - 1 - x0, x1 - rows.shape[2], taps_y - 1 - y0, y1 - rows.shape[1])
        padded = F.pad(rows, halo) if any(halo) else rows
        windows = padded.unfold(1, taps_y, 1).unfold(2, taps_x, 1).permute(0, 1, 2, 4, 5, 3)
        blocks = self._products(windows, self._matrix(self._shift(0), self._shift(1)))
        return blocks[:, cut_y : cut_y + self.shape_in[1], cut_x : cut_x + self.shape_in[2]]

    def _products(self, windows: Tensor, matrix: Tensor) -> Tensor:
        """Windows (rows, blocks_y, blocks_x, ...) times the matrix, as an image (rows, height, width, channels in)."""
        rows, blocks_y, blocks_x = windows.shape[:3]
        (stride_y, stride_x), channels = self.stride, self.shape_in[0]
        out = windows.new_empty(rows, blocks_y * stride_y, blocks_x * stride_x, channels)
        step = rows
        if windows.device.type == "cpu":
            step = max(1, _CACHE_DOUBLES // (blocks_y * blocks_x * matrix.shape[0]))
        for start in range(0, rows, step):
            part, into = windows[start : start + step].reshape(-1, matrix.shape[0]), out[start : start + step]
            if self.stride == (1, 1):
                torch.mm(part, matrix, out=into.view(-1, matrix.shape[1]))
            else:
                product = torch.mm(part, matrix).view(-1, blocks_y, blocks_x, stride_y, stride_x, channels)
                into.view(-1, blocks_y, stride_y, blocks_x, stride_x, channels).copy_(product.transpose(2, 3))
        return out

    def rows(self, indices: Tensor) -> Tensor:
        if (small := self.small) is not None:
            return small[indices]
        found = [super(ConvMap, self).rows(part) for part in indices.split(256)]
        return torch.cat(found) if found else self.weight.new_zeros(0, self.size_in)


class ScaleMap(LinearMap):
    """M is diagonal."""

    def __init__(self, op: Scale, shape_in: Shape, device: torch.device) -> None:
        self.diagonal = _tensor(np.broadcast_to(op.scale, shape_in), device).reshape(-1)
        self.parts = _Parts(self.diagonal)
        self.bias = _tensor(np.broadcast_to(op.shift, shape_in), device).reshape(-1)
        self.size_in = self.size_out = prod(shape_in)
        self.terms, self.smallest = 1, _smallest(self.diagonal)

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        return x * self.parts[part]

    def transposed(self, v: Tensor) -> Tensor:
        return v * self.diagonal

    def transposed_columns(self, v: Tensor) -> Tensor:
        return v * self.diagonal.unsqueeze(1)

    def take(self, indices: Tensor) -> ScaleMap:
        """The map on some entries, in the given order."""
        assert self.bias is not None
        made = copy(self)
        made.diagonal, made.bias = self.diagonal[indices], self.bias[indices]
        made.parts, made.size_in, made.size_out = _Parts(made.diagonal), len(indices), len(indices)
        return made


class MoveMap(LinearMap):
    """M moves values and adds constants: reshape, transpose, padding. Output ``kept[i]`` is input ``source[i]``."""

    def __init__(self, op: Op, shape_in: Shape, device: torch.device) -> None:
        places = np.arange(prod(shape_in)).reshape(1, *shape_in)
        padded = isinstance(op, Pad)
        source = np.pad(places, ((0, 0), *op.pads), constant_values=-1) if padded else op.evaluate(places)
        flat = source.reshape(-1)
        self.size_in, self.size_out, self.terms = prod(shape_in), flat.size, 0
        self.moves = not np.array_equal(flat, np.arange(self.size_in))
        self.kept = torch.tensor(np.flatnonzero(flat >= 0), device=device)
        self.source = torch.tensor(flat[flat >= 0], device=device)
        self.bias = None
        if isinstance(op, Pad) and op.value:
            self.bias = _tensor(np.where(flat < 0, op.value, 0.0), device)

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        if part == "minus":
            return x.new_zeros(len(x), self.size_out)
        if not self.moves:
            return x
        out = x.new_zeros(len(x), self.size_out)
        out[:, self.kept] = x[:, self.source]
        return out

    def transposed(self, v: Tensor) -> Tensor:
        if not self.moves:
            return v
        out = v.new_zeros(len(v), self.size_in)
        out[:, self.source] = v[:, self.kept]
        return out

    def transposed_columns(self, v: Tensor) -> Tensor:
        if not self.moves:
            return v
        return v.new_zeros(self.size_in, v.shape[1]).index_copy_(0, self.source, v.index_select(0, self.kept))


class AvgPoolMap(LinearMap):
    """M averages windows; the division is one more rounding, which ``terms`` counts."""

    def __init__(self, op: AvgPool2d, shape_in: Shape, device: torch.device) -> None:
        channels, height, width = op.output_shape(shape_in)
        one = np.ones((1, 1, *op.kernel))
        self.conv = ConvMap(Conv2d(one, np.zeros(1), op.stride, op.padding), (1, *shape_in[1:]), device)
        self.divisor = _tensor(op.divisors(shape_in), device).reshape(-1)
        self.channels, self.places = channels, height * width
        self.size_in, self.size_out = prod(shape_in), channels * height * width
        self.terms, self.bias, self.smallest = prod(op.kernel) + 1, None, 1.0 / float(self.divisor.max())

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        if part == "minus":
            return x.new_zeros(len(x), self.size_out)
        total = self.conv.forward(x.reshape(len(x) * self.channels, -1)) / self.divisor
        return total.reshape(len(x), self.size_out)

    def transposed(self, v: Tensor) -> Tensor:
        scaled = v.reshape(len(v) * self.channels, self.places) / self.divisor
        return self.conv.transposed(scaled).reshape(len(v), self.size_in)


def linear_map(op: Op, shape_in: Shape, device: torch.device) -> LinearMap | None:
    """The map of a linear operator with one input; None for ReLU, Add and MaxPool2d."""
    match op:
        case Affine():
            return DenseMap(op, device)
        case Conv2d():
            return ConvMap(op, shape_in, device)
        case Scale():
            return ScaleMap(op, shape_in, device)
        case AvgPool2d():
            return AvgPoolMap(op, shape_in, device)
        case Reshape() | Transpose() | Pad():
            return MoveMap(op, shape_in, device)
    return None
