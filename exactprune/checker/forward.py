"""Forward evaluation: values of nodes at points with a proved error, and the range of a linear map over a box.

Weights and inputs are cut into two limbs each, few enough bits wide that products of limbs are exact in float64 in any order of
summation (Ozaki et al. 2012). What is left out is bounded, not estimated: what the limbs miss of W and of x, the product of
the two lower limbs, and the rounding of the final additions. A point carries one radius for all its values; through a
linear map it grows by at most the largest sum of abs(W) of a row. Everything here only encloses: what the enclosures leave
open is computed again without rounding (``witness``, and ``exact_range`` for bounds that may be exactly 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exactprune.checker import dyadic
from exactprune.checker.coarse import FAR
from exactprune.checker.dyadic import Array, column
from exactprune.checker.layers import AvgPool, Layer, Linear, ReLU, Scale, Sum

TOGETHER = 64  # outputs whose exact range is computed at a time
UP = 1 + 2.0**-30  # pays for fewer than 2**22 roundings of sums and products of numbers >= 0


@dataclass(frozen=True, eq=False)
class Points:
    """``abs(true value - values[p]) <= radius[p]`` for all values of point p; (points, *shape) and (points,)."""

    values: Array
    radius: Array


class ForwardStep:
    """An affine layer or a convolution, y = W x + b, forward."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer
        self.bits = (53 - layer.weight.shape[2].bit_length()) // 2
        top = int(np.frexp(np.abs(layer.weight).max(initial=0.0))[1])
        if self.bits < 15 or top > FAR:
            raise OverflowError("weights or sums leave the range of the forward step")
        self.grid = max(top, -FAR) - 2 * self.bits
        whole = np.rint(np.ldexp(layer.weight, -self.grid))  # below 2**53; abs(W - whole * 2**grid) <= 2**(grid - 1)
        self.high = np.rint(np.ldexp(whole, -self.bits))
        self.low = whole - np.ldexp(self.high, self.bits)
        self.sums = np.abs(layer.weight).sum(axis=2) * UP  # (G, O)
        self.terms = float(layer.weight.shape[2])

    def _cut(self, x: Array) -> tuple[Array, Array, Array]:
        """Integers and an exponent (points,): x = (first + second * 2**-bits) * 2**exponent, up to 2**(exponent - bits - 1)."""
        most = np.abs(x).reshape(len(x), -1).max(axis=1, initial=0.0)
        if not (most < 2.0**FAR).all():
            raise OverflowError("values leave the range of the forward step")
        exponent = np.maximum(np.frexp(most)[1].astype(np.int64), -FAR) - self.bits
        scaled = np.ldexp(x, column(-exponent, x))
        first = np.rint(scaled)
        return first, np.rint(np.ldexp(scaled - first, self.bits)), exponent

    def _dropped(self, exponent: Array) -> Array:
        """What the limbs leave of W x: of W (also times what they leave of x), of x, both lower limbs' product; (points,)."""
        of_weights = np.ldexp(self.terms, self.grid - 1 + exponent + self.bits) * (1 + 2.0**-20)
        of_values = np.ldexp(self.sums.max(initial=0.0), exponent - self.bits - 1)
        both = np.ldexp(self.terms, self.grid + self.bits - 1 + exponent - 1)
        return (of_weights + of_values + both) * UP

    def _product(self, x: Array, high: Array, low: Array) -> tuple[Array, Array]:
        """W x (points, *out) without bias, and a radius."""
        first, second, exponent = self._cut(x)
        size = exponent + self.grid + self.bits
        parts = [(self.layer.forward(first, high), size), (self.layer.forward(second, high), size - self.bits),
                 (self.layer.forward(first, low), size - self.bits)]
        total, most = np.zeros(()), np.zeros(len(x))
        for values, e in reversed(parts):
            part = np.ldexp(values, column(e, values))
            total, most = total + part, most + _largest(part)
        return total, (self._dropped(exponent) + most * 2.0**-50) * UP  # three roundings of at most 2**-53 of ``most`` each

    def points(self, x: Points) -> Points:
        """W x + b."""
        values, radius = self._product(x.values, self.high, self.low)
        values = values + self.layer.bias
        grown = x.radius * self.sums.max(initial=0.0) + radius + _largest(values) * 2.0**-52
        return Points(values, grown * UP)

    def range(self, lower: Array, upper: Array, signs: bool = True) -> tuple[Array, Array]:
        """Bounds of W x + b over boxes (boxes, *shape); with ``signs``, for one box, exact where rounding may hide one.

        The range is W c + b -+ abs(W) r for the centre c and radii r; r is taken up to its limbs' grid by ``_dropped``.
        """
        centre = lower + (upper - lower) / 2
        reach = np.maximum(dyadic.add_up(upper, -centre), dyadic.add_up(centre, -lower))
        middle = self.points(Points(centre, np.zeros(1)))
        sign = np.where(self.high * 2.0**self.bits + self.low < 0, -1.0, 1.0)
        spread, radius = self._product(reach, self.high * sign, self.low * sign)
        excess = np.ldexp(_largest(centre) + _largest(reach), -51) * self.sums.max(initial=0.0)  # of reach over (u - l) / 2
        slack = (middle.radius + radius + _largest(spread) * 2.0**-50 + _largest(middle.values) * 2.0**-50 + excess) * UP
        low, high = middle.values - spread - column(slack, spread), middle.values + spread + column(slack, spread)
        if not signs:
            return low, high
        gap = column(2.0 * slack * UP, spread)
        close = np.flatnonzero(((high > 0) & (high <= gap)) | ((low < 0) & (low >= -gap)))
        if len(close):
            low, high = np.ascontiguousarray(low), np.ascontiguousarray(high)  # else reshape would copy
            low.reshape(-1)[close], high.reshape(-1)[close] = exact_range(self.layer, close, lower, upper)
        return low, high


def _largest(values: Array) -> Array:
    return np.abs(values).reshape(len(values), -1).max(axis=1, initial=0.0)


def exact_range(layer: Linear, outputs: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Bounds of some outputs over a box (1, *shape), rounded outward only once, by Python integers."""
    ends = [b.reshape(1, -1) for b in (lower, upper)]
    parts = [_exact_part(layer, outputs[i : i + TOGETHER], *ends) for i in range(0, len(outputs), TOGETHER)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _exact_part(layer: Linear, outputs: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    weight, bias = layer.unit_rows(outputs)
    weight = weight.reshape(-1, len(outputs)).T  # (rows, inputs)
    used = np.flatnonzero(weight.any(axis=0))
    weight, lower, upper = weight[:, used], lower[:, used], upper[:, used]
    return -_above(-weight, -bias, lower, upper), _above(weight, bias, lower, upper)


def _above(weight: Array, bias: Array, lower: Array, upper: Array) -> Array:
    values, e = dyadic.exact_int(np.where(weight >= 0, upper, lower))
    factors, f = dyadic.exact_int(weight)
    terms = dyadic.row_sums(values.astype(object) * factors.astype(object))
    total = dyadic.add(dyadic.Dyadic(terms, np.full(len(weight), e + f, np.int64)), dyadic.from_float(bias))
    return np.array([dyadic.float_up(int(v), int(x)) for v, x in zip(total.values, total.exponent, strict=True)])


def step(layer: Layer, linear: ForwardStep | None, inputs: list[Points]) -> Points:
    """One operator at points."""
    first = inputs[0]
    if linear is not None:
        return linear.points(first)
    if isinstance(layer, ReLU):
        return Points(np.maximum(first.values, 0.0), first.radius)
    if isinstance(layer, Sum):
        values = first.values + inputs[1].values
        return Points(values, (first.radius + inputs[1].radius + _largest(values) * 2.0**-52) * UP)
    if isinstance(layer, AvgPool | Scale):
        around = column(first.radius, first.values)
        low, high = layer.interval([(-dyadic.add_up(-first.values, around), dyadic.add_up(first.values, around))], False)
        values = low + (high - low) / 2
        return Points(values, _largest(np.maximum(dyadic.add_up(high, -values), dyadic.add_up(values, -low))))
    return Points(layer.interval([(first.values, first.values)], False)[0], first.radius)  # moves or selects values
