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
from math import ceil, prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exactprune.ops import Affine, AvgPool2d, Conv2d, Op, Pad, Reshape, Scale, Shape, Transpose

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

    @abstractmethod
    def transposed(self, v: Tensor) -> Tensor:
        """M^T v for rows v of shape (rows, size_out): shape (rows, size_in)."""

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` of M, exactly: shape (len(indices), size_in)."""
        if not len(indices):
            return torch.zeros(0, self.size_in, dtype=torch.float64, device=indices.device)
        unit = torch.zeros(len(indices), self.size_out, dtype=torch.float64, device=indices.device)
        unit[torch.arange(len(indices), device=indices.device), indices] = 1.0
        return self.transposed(unit)


def _part(weight: Tensor, part: str) -> Tensor:
    match part:
        case "all":
            return weight
        case "abs":
            return weight.abs()
        case "plus":
            return weight.clamp(min=0)
        case "minus":
            return weight.clamp(max=0)
    raise ValueError(part)


def _smallest(weight: Tensor) -> float:
    sizes = weight[weight != 0].abs()
    return float(sizes.min()) if len(sizes) else 1.0


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(np.asarray(array, dtype=np.float64), device=device)


class DenseMap(LinearMap):
    """M is a stored matrix."""

    def __init__(self, op: Affine, device: torch.device) -> None:
        self.weight = _tensor(op.weight, device)
        self.bias = _tensor(op.bias, device)
        self.size_out, self.size_in = self.weight.shape
        self.smallest = _smallest(self.weight)
        self.terms = max(self.weight.shape)

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        return x @ _part(self.weight, part).T

    def transposed(self, v: Tensor) -> Tensor:
        return v @ self.weight

    def rows(self, indices: Tensor) -> Tensor:
        return self.weight[indices]


class ConvMap(LinearMap):
    """M is a convolution with zero padding."""

    def __init__(self, op: Conv2d, shape_in: Shape, device: torch.device) -> None:
        self.shape_in, self.shape_out = shape_in, op.output_shape(shape_in)
        self.stride, self.dilation, self.groups, self.kernel = op.stride, op.dilation, op.groups, op.kernel
        self.padding = op.padding
        self.size_in, self.size_out = prod(shape_in), prod(self.shape_out)
        self.weight = _tensor(op.weight, device)
        self.smallest = _smallest(self.weight)
        places = self.shape_out[1] * self.shape_out[2]
        self.bias = _tensor(op.bias, device).repeat_interleave(places)
        self.terms = max(prod(op.weight.shape[1:]), op.weight.shape[0] * prod(op.kernel))
        self._phases = None if self._plain else self._polyphase()

    @property
    def _plain(self) -> bool:
        return self.groups > 1 or self.dilation != (1, 1)

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        top, left, bottom, right = self.padding
        padded = F.pad(x.reshape(-1, *self.shape_in), (left, right, top, bottom))
        columns = F.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride)
        weight = _part(self.weight, part).reshape(self.groups, self.shape_out[0] // self.groups, -1)
        columns = columns.reshape(len(columns), self.groups, weight.shape[2], -1)
        return torch.matmul(weight, columns).reshape(len(columns), self.size_out)

    def transposed(self, v: Tensor) -> Tensor:
        rows = v.reshape(-1, *self.shape_out)
        if self._phases is None:
            return self._transposed_by_fold(rows)
        return self._transposed_by_gather(rows)

    def _transposed_by_fold(self, rows: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        height, width = self.shape_in[1] + top + bottom, self.shape_in[2] + left + right
        weight = self.weight.reshape(self.groups, self.shape_out[0] // self.groups, -1)
        columns = torch.matmul(weight.transpose(1, 2), rows.reshape(len(rows), self.groups, weight.shape[1], -1))
        columns = columns.reshape(len(rows), self.shape_in[0] * prod(self.kernel), -1)
        image = F.fold(columns, (height, width), self.kernel, dilation=self.dilation, stride=self.stride)
        return image[:, :, top : top + self.shape_in[1], left : left + self.shape_in[2]].reshape(len(rows), -1)

    def _polyphase(self) -> tuple[Tensor, tuple[int, int]]:
        """Sub-kernels as one matrix (taps_y * taps_x * channels out, stride_y * stride_x * channels in), and the taps."""
        (stride_y, stride_x), (kernel_y, kernel_x) = self.stride, self.kernel
        taps = (ceil(kernel_y / stride_y), ceil(kernel_x / stride_x))
        weight = F.pad(self.weight, (0, taps[1] * stride_x - kernel_x, 0, taps[0] * stride_y - kernel_y))
        split = weight.reshape(*weight.shape[:2], taps[0], stride_y, taps[1], stride_x).flip(2, 4)
        matrix = split.permute(2, 4, 0, 3, 5, 1).reshape(taps[0] * taps[1] * weight.shape[0], -1)
        return matrix.contiguous(), taps

    def _transposed_by_gather(self, rows: Tensor) -> Tensor:
        assert self._phases is not None
        matrix, (taps_y, taps_x) = self._phases
        channels, height, width = self.shape_out
        blocks_y, blocks_x = height + taps_y - 1, width + taps_x - 1
        padded = rows.new_zeros(len(rows), height + 2 * taps_y - 2, width + 2 * taps_x - 2, channels)
        padded[:, taps_y - 1 : taps_y - 1 + height, taps_x - 1 : taps_x - 1 + width] = rows.permute(0, 2, 3, 1)
        windows = padded.unfold(1, taps_y, 1).unfold(2, taps_x, 1).permute(0, 1, 2, 4, 5, 3)
        out = rows.new_empty(len(rows), blocks_y * blocks_x, matrix.shape[1])
        step = max(1, _CACHE_DOUBLES // (blocks_y * blocks_x * matrix.shape[0])) if rows.device.type == "cpu" else len(rows)
        for start in range(0, len(rows), max(step, 1)):
            part = windows[start : start + step].reshape(-1, matrix.shape[0])
            torch.mm(part, matrix, out=out[start : start + step].view(-1, matrix.shape[1]))
        return self._crop(out.view(len(rows), blocks_y, blocks_x, *self.stride, self.shape_in[0]))

    def _crop(self, blocks: Tensor) -> Tensor:
        """(rows, blocks_y, blocks_x, stride_y, stride_x, channels) -> (rows, size_in), padding cut off."""
        rows, blocks_y, blocks_x, stride_y, stride_x, channels = blocks.shape
        image = blocks.permute(0, 5, 1, 3, 2, 4).reshape(rows, channels, blocks_y * stride_y, blocks_x * stride_x)
        top, left, _, _ = self.padding
        image = image[:, :, top : top + self.shape_in[1], left : left + self.shape_in[2]]
        short = (self.shape_in[2] - image.shape[3], self.shape_in[1] - image.shape[2])
        return (F.pad(image, (0, short[0], 0, short[1])) if any(short) else image).reshape(rows, -1)

    def rows(self, indices: Tensor) -> Tensor:
        found = [super(ConvMap, self).rows(part) for part in indices.split(256)]
        return torch.cat(found) if found else self.weight.new_zeros(0, self.size_in)


class ScaleMap(LinearMap):
    """M is diagonal."""

    def __init__(self, op: Scale, shape_in: Shape, device: torch.device) -> None:
        self.diagonal = _tensor(np.broadcast_to(op.scale, shape_in), device).reshape(-1)
        self.bias = _tensor(np.broadcast_to(op.shift, shape_in), device).reshape(-1)
        self.size_in = self.size_out = prod(shape_in)
        self.terms, self.smallest = 1, _smallest(self.diagonal)

    def forward(self, x: Tensor, part: str = "all") -> Tensor:
        return x * _part(self.diagonal, part)

    def transposed(self, v: Tensor) -> Tensor:
        return v * self.diagonal


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
