"""Linear operators as sparse matrices: y = sum_i M_i x_i + constant on flat vectors in C order.

A convolution is a matrix whose row (o, h, w) holds the kernel of output channel o at the places of its window
(Goodfellow, Bengio, Courville, *Deep Learning*, section 9.1); the places come from sliding a window over the array of
flat indices, so padding, stride, dilation and groups need no case of their own. ReLU and max pooling are not linear
and have no matrix; ``windows`` gives the places that a max pool compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from scipy import sparse

from exactprune.errors import UnsupportedOpError
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Shape, Transpose

OUTSIDE = -1


@dataclass(frozen=True, eq=False)
class Lowered:
    """A linear operator on flat vectors.

    Attributes:
        matrices: one CSR array of shape (outputs, inputs) for each input of the operator, float64.
        constant: shape (outputs,), float64.
    """

    matrices: tuple[Any, ...]
    constant: np.ndarray


def windows(shape: Shape, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int],
            dilation: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Flat input indices seen by every window, ``OUTSIDE`` in the padding.

    Returns:
        int64, shape (channels, output height, output width, kernel height, kernel width).
    """
    top, left, bottom, right = padding
    places = np.arange(prod(shape)).reshape(shape)
    places = np.pad(places, ((0, 0), (top, bottom), (left, right)), constant_values=OUTSIDE)
    span = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(places, span, axis=(1, 2))
    return view[:, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def is_linear(op: Op) -> bool:
    """Whether ``lower`` has a matrix for ``op``."""
    return type(op) in _LOWER


def lower(op: Op, *shapes: Shape) -> Lowered:
    """The operator as sparse matrices, in float64.

    Args:
        op: a linear operator.
        *shapes: of its inputs, without batch axis.

    Raises:
        UnsupportedOpError: the operator is not linear, or not known.
    """
    try:
        make = _LOWER[type(op)]
    except KeyError:
        raise UnsupportedOpError(f"{op.kind}: has no matrix; only linear operators can be lowered") from None
    return make(op, *shapes)


def _affine(op: Affine, shape: Shape) -> Lowered:
    return Lowered((sparse.csr_array(op.weight.astype(np.float64)),), op.bias.astype(np.float64))


def _matrix(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> Any:
    """CSR array from broadcast triplets, without zeros and without the places outside."""
    values, rows, columns = (a.ravel() for a in np.broadcast_arrays(values, rows, columns))
    keep = (columns != OUTSIDE) & (values != 0)
    return sparse.csr_array((values[keep], (rows[keep], columns[keep])), shape=size)


def _conv(op: Conv2d, shape: Shape) -> Lowered:
    out = op.output_shape(shape)
    places = windows(shape, op.kernel, op.stride, op.padding, op.dilation)  # (C, H, W, kh, kw)
    places = places.transpose(1, 2, 0, 3, 4)  # (H, W, C, kh, kw)
    rows = np.arange(prod(out)).reshape(out)
    weight = op.weight.astype(np.float64)
    total = sparse.csr_array((prod(out), prod(shape)))
    outputs, inputs = out[0] // op.groups, op.weight.shape[1]
    for group in range(op.groups):
        o, c = slice(group * outputs, (group + 1) * outputs), slice(group * inputs, (group + 1) * inputs)
        total = total + _matrix(weight[o, None, None], rows[o][..., None, None, None], places[None, :, :, c],
                                (prod(out), prod(shape)))
    return Lowered((total,), np.repeat(op.bias.astype(np.float64), out[1] * out[2]))


def _scale(op: Scale, shape: Shape) -> Lowered:
    scale = np.broadcast_to(op.scale, shape).astype(np.float64).ravel()
    return Lowered(
        (sparse.diags_array(scale, format="csr"),), np.broadcast_to(op.shift, shape).astype(np.float64).ravel()
    )


def _identity(shape: Shape) -> Any:
    return sparse.eye_array(prod(shape), format="csr")


def _add(op: Add, first: Shape, second: Shape) -> Lowered:
    return Lowered((_identity(first), _identity(second)), np.zeros(prod(first)))


def _reshape(op: Reshape, shape: Shape) -> Lowered:
    return Lowered((_identity(shape),), np.zeros(prod(shape)))


def _average(op: AvgPool2d, shape: Shape) -> Lowered:
    out = op.output_shape(shape)
    places = windows(shape, op.kernel, op.stride, op.padding)
    share = 1.0 / op.divisors(shape).astype(np.float64)
    rows = np.arange(prod(out)).reshape(out)[..., None, None]
    return Lowered(
        (_matrix(share[None, :, :, None, None], rows, places, (prod(out), prod(shape))),), np.zeros(prod(out))
    )


def _select(places: np.ndarray, inputs: int, constant: np.ndarray) -> Lowered:
    rows = np.arange(places.size)
    return Lowered((_matrix(np.ones(places.size), rows, places.ravel(), (places.size, inputs)),), constant)


def _transpose(op: Transpose, shape: Shape) -> Lowered:
    places = np.arange(prod(shape)).reshape(shape).transpose(op.permutation)
    return _select(places, prod(shape), np.zeros(prod(shape)))


def _pad(op: Pad, shape: Shape) -> Lowered:
    places = np.pad(np.arange(prod(shape)).reshape(shape), op.pads, constant_values=OUTSIDE)
    return _select(places, prod(shape), np.where(places.ravel() == OUTSIDE, float(op.value), 0.0))


_LOWER: dict[type[Op], Callable[..., Lowered]] = {
    Affine: _affine, Conv2d: _conv, Scale: _scale, Add: _add, Reshape: _reshape, AvgPool2d: _average,
    Transpose: _transpose, Pad: _pad,
}
NONLINEAR = (ReLU, MaxPool2d)
