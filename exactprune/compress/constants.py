"""Which elements of which tensors are constant on the domain, with their exact value.

A forward pass over the network, one rule per operator. An element is *known* when its value on D is proved and is a
float64 (read exactly):

- ReLU: 0 where the verdict is *inactive*; ``max(c, 0)`` where the pre-activation is known, or where the verdict is
  settled and its sound bounds meet (lower == upper == c).
- Affine, Conv2d: an output whose non-zero weights read known elements only. Value: the exact sum, kept when it is a
  float64 (for convolutions only when everything read is 0, so that the value is the bias).
- Scale, Add: elementwise, kept when no operation rounds (``compress.exact``).
- Pools: windows of known elements; a mean only when all its elements are equal and padding adds nothing else.
- Reshape, Transpose, Pad: the elements move.

*Sound* because each rule is an identity of real numbers on D; nothing is ever rounded. Verdicts *unknown* say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import numpy as np

from exactprune.claim import LayerVerdict, Status
from exactprune.compress.exact import dot, exact_product, exact_sum, representable
from exactprune.network import INPUT, Network
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Transpose


@dataclass(frozen=True, eq=False)
class Constant:
    """What is known of one tensor.

    Attributes:
        known: booleans in the tensor's shape.
        value: float64 in the tensor's shape; 0 where not known.
    """

    known: np.ndarray
    value: np.ndarray

    @property
    def zero(self) -> np.ndarray:
        """Where the tensor is 0 on the whole domain."""
        return self.known & (self.value == 0)


def nothing(shape: Sequence[int]) -> Constant:
    """Nothing is known."""
    return Constant(np.zeros(shape, bool), np.zeros(shape))


def constants_of(network: Network, verdicts: Sequence[LayerVerdict]) -> Mapping[int, Constant]:
    """Known elements of every tensor, by position (``INPUT`` too).

    Args:
        network: any network.
        verdicts: one per ReLU layer, in order.
    """
    found: dict[int, Constant] = {INPUT: nothing(network.input_shape)}
    layers = dict(zip(network.relus, verdicts, strict=True))
    for position, node in enumerate(network.nodes):
        given = [found[i] for i in node.inputs]
        if isinstance(node.op, ReLU):
            found[position] = _relu(given[0], layers[position])
        elif not any(c.known.any() for c in given) and not isinstance(node.op, Affine | Conv2d | Scale | Pad):
            found[position] = nothing(network.shapes[position])
        else:
            found[position] = _constant(node.op, *given)
    return found


def _relu(given: Constant, verdict: LayerVerdict) -> Constant:
    shape = given.known.shape
    status, lower, upper = (a.reshape(shape) for a in (verdict.status, verdict.lower, verdict.upper))
    inactive = status == Status.INACTIVE
    met = ((status == Status.ACTIVE) | inactive) & (lower == upper)
    value = np.where(given.known, given.value, np.where(met, lower, 0.0))
    value = np.where(inactive, 0.0, np.maximum(value, 0.0))
    return Constant(given.known | met | inactive, value)


@singledispatch
def _constant(op: Op, *given: Constant) -> Constant:
    return nothing(op.output_shape(*(c.known.shape for c in given)))


@_constant.register
def _affine(op: Affine, *given: Constant) -> Constant:
    (c,) = given
    nonzero = op.weight != 0
    touched = nonzero.astype(np.float32) @ (~c.known).astype(np.float32) > 0
    shifted = (nonzero & (c.value != 0)).any(axis=1) & ~touched
    known, value = ~touched, np.where(touched, 0.0, op.bias.astype(np.float64))
    for row in np.flatnonzero(shifted):
        used = np.flatnonzero(nonzero[row])
        total = dot(op.weight[row, used], c.value[used]) + dot([1.0], [op.bias[row]])
        known[row] = representable(total, np.float64)
        value[row] = float(total) if known[row] else 0.0
    return Constant(known, value)


@_constant.register
def _conv(op: Conv2d, *given: Constant) -> Constant:
    (c,) = given
    touches = replace(op, weight=(op.weight != 0).astype(np.float32), bias=np.zeros(op.bias.shape, np.float32))
    known = touches.evaluate((~c.zero).astype(np.float32)[None])[0] == 0
    return Constant(known, np.where(known, op.bias.astype(np.float64)[:, None, None], 0.0))


@_constant.register
def _scale(op: Scale, *given: Constant) -> Constant:
    (c,) = given
    scale, shift = (np.broadcast_to(a.astype(np.float64), c.known.shape) for a in (op.scale, op.shift))
    product, exact = exact_product(c.value, scale)
    total, also = exact_sum(product, shift)
    known = ((c.known & exact) | (scale == 0)) & also
    return Constant(known, np.where(known, total, 0.0))


@_constant.register
def _add(op: Add, *given: Constant) -> Constant:
    a, b = given
    total, exact = exact_sum(a.value, b.value)
    known = a.known & b.known & exact
    return Constant(known, np.where(known, total, 0.0))


@_constant.register
def _max(op: MaxPool2d, *given: Constant) -> Constant:
    (c,) = given
    unknown = op.evaluate((~c.known).astype(np.float32)[None])[0] > 0
    return Constant(~unknown, np.where(unknown, 0.0, op.evaluate(c.value[None])[0]))


@_constant.register
def _mean(op: AvgPool2d, *given: Constant) -> Constant:
    (c,) = given
    window = MaxPool2d(op.kernel, op.stride, op.padding)
    low, high = -window.evaluate(-c.value[None])[0], window.evaluate(c.value[None])[0]
    unknown = window.evaluate((~c.known).astype(np.float32)[None])[0] > 0
    plain = (high == 0) | (not op.count_include_pad) | (not any(op.padding))
    known = ~unknown & (low == high) & plain
    return Constant(known, np.where(known, high, 0.0))


@_constant.register(Reshape)
@_constant.register(Transpose)
def _moved(op: Reshape | Transpose, *given: Constant) -> Constant:
    (c,) = given
    return Constant(op.evaluate(c.known[None])[0], op.evaluate(c.value[None])[0])


@_constant.register
def _pad(op: Pad, *given: Constant) -> Constant:
    (c,) = given
    return Constant(np.pad(c.known, op.pads, constant_values=True), np.pad(c.value, op.pads, constant_values=op.value))
