"""The operators: exact values, interval bounds, and backward substitution.

Every operator answers three questions about y = op(x):
- ``exact``: y for points x, without rounding;
- ``interval``: float64 bounds on y from float64 bounds on x, rounded outward;
- ``backward``: given rows v (a linear form v . y each), rows w and constants c with v . y <= w . x + c.

Two precisions: *exact* carries rows without any rounding; *coarse* (``exact`` false) rounds outward. Affine layers and
convolutions take their coarse steps in ``coarse`` and ``forward``; what is coarse here serves the other operators, and
sub-boxes where ``forward`` gives up. Rounding a row v up to v' costs (v' - v) . max(-y, 0) <= unit * sum max(-lower(y), 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np

from exactprune.checker import dyadic
from exactprune.checker.dyadic import Array, Dyadic, Matrix, column
from exactprune.checker.network import CheckError, Network, Op, Shape

BITS = 23  # of a row in coarse arithmetic: one limb after rounding up
POINT = 30  # bits of an interval endpoint in coarse arithmetic
WIDE = 31  # bits that a factor of such an endpoint may have


@dataclass(frozen=True, eq=False)
class Interval:
    """Integers low <= high times 2**exponent, elementwise, enclosing float intervals; shape (1 or rows, n)."""

    low: Array
    high: Array
    exponent: Array


def interval(lower: Array, upper: Array, exact: bool) -> Interval:
    """Float bounds (1 or rows, n) as integers: exactly over one common power of two, or to ``POINT`` bits, outward."""
    if exact:
        both, exponent = dyadic.exact_int(np.stack([lower, upper]))
        return Interval(both[0].astype(object), both[1].astype(object), np.full((1, 1), exponent, np.int64))
    exponent = np.frexp(np.maximum(np.abs(lower), np.abs(upper)))[1].astype(np.int64) - POINT
    return Interval(-dyadic.scale_up(-lower, -exponent), dyadic.scale_up(upper, -exponent), exponent)


def gather_constants(terms: Array, row_exponent: Array, exponent: Array) -> Dyadic:
    """Sums over j of terms[r, j] * 2**(row_exponent[r] + exponent[., j]); int64 terms rounded up to the coarsest."""
    if exponent.size == 0:
        return Dyadic(np.zeros(len(terms), object), row_exponent)
    if terms.dtype == object:
        base = exponent.min(axis=1)
        terms = dyadic.shift_left(terms, exponent - base[:, None])
    else:
        base = exponent.max(axis=1)
        terms = dyadic.shift_right_up(terms, base[:, None] - exponent)
    return Dyadic(dyadic.row_sums(terms), row_exponent + base)


def support(v: Dyadic, box: Interval) -> Dyadic:
    """The maximum of every row's form over a box: sum over j of max(v_j * low_j, v_j * high_j).

    Products of box ends, which have at most POINT + 1 bits, with rows of at most WIDE bits stay below 2**62. Wider rows are
    cut in two: v = above * 2**WIDE + below, and with e_j the end that the sign of v_j chooses, v . e is the sum of both.
    """
    values = v.values.reshape(len(v.values), -1)
    if values.dtype != object and box.low.dtype != object and dyadic.width(values) > WIDE:
        end = np.where(values >= 0, box.high, box.low)
        above, below = values >> WIDE, values & ((1 << WIDE) - 1)
        return dyadic.add(replace(gather_constants(above * end, v.exponent + WIDE, box.exponent), divisor=v.divisor),
                          replace(gather_constants(below * end, v.exponent, box.exponent), divisor=v.divisor))
    terms = np.maximum(values * box.low, values * box.high)
    total = gather_constants(terms, v.exponent, box.exponent)
    return Dyadic(total.values, total.exponent, v.divisor)


def rounding_cost(changed: Array, exponent: Array, lower: Array) -> Dyadic:
    """What rounding rows up by less than a unit 2**exponent cost at most over values >= ``lower``; shape (rows,)."""
    slack = np.nextafter(math.fsum(np.maximum(-lower, 0.0).flat), np.inf) if (lower < 0).any() else 0.0
    value, base = dyadic.exact_int(np.array([slack]))
    return Dyadic(changed.astype(object) * int(value[0]), exponent + base)


def _pad(x: Array, pads: Sequence[Sequence[int]], value: float) -> Array:
    """Constant padding of (rows, *shape); ``np.pad`` would put numpy integers, which wrap, among Python integers."""
    shape = (len(x), *(n + before + after for n, (before, after) in zip(x.shape[1:], pads, strict=True)))
    padded = np.full(shape, value, x.dtype)
    padded[(slice(None), *(slice(b, b + n) for (b, _), n in zip(pads, x.shape[1:], strict=True)))] = x
    return padded


@dataclass(frozen=True, eq=False)
class Windows:
    """Sliding windows over (channels, height, width)."""

    shape: Shape
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    def _places(self) -> list[tuple[slice, slice]]:
        return [tuple(slice(k * d, k * d + (n - 1) * s + 1, s) for k, d, n, s in
                      zip((i, j), self.dilation, self.out, self.stride, strict=True))
                for i in range(self.kernel[0]) for j in range(self.kernel[1])]  # type: ignore[misc]

    def gather(self, x: Array, fill: float = 0) -> Array:
        """(rows, C, H, W) -> (rows, C, H_out, W_out, places), ``fill`` in the padding."""
        top, left, bottom, right = self.padding
        padded = _pad(x, ((0, 0), (top, bottom), (left, right)), fill) if any(self.padding) else x
        return np.stack([padded[:, :, r, c] for r, c in self._places()], axis=-1)

    def scatter(self, windows: Array) -> Array:
        """The transpose of ``gather``: sums (rows, C, H_out, W_out, places) into (rows, C, H, W)."""
        top, left, bottom, right = self.padding
        _, height, width = self.shape
        total = np.zeros((len(windows), self.shape[0], height + top + bottom, width + left + right), windows.dtype)
        for place, (r, c) in enumerate(self._places()):
            total[:, :, r, c] += windows[..., place]
        return total[:, :, top : top + height, left : left + width]

    def scatter_rows(self, windows: Array) -> Array:
        """``scatter`` with places second and rows last: (C, places, H_out, W_out, rows) into (C, H, W, rows)."""
        top, left, bottom, right = self.padding
        _, height, width = self.shape
        total = np.zeros((len(windows), height + top + bottom, width + left + right, windows.shape[-1]), windows.dtype)
        for place, (r, c) in enumerate(self._places()):
            total[:, r, c] += windows[:, place]
        return total[:, top : top + height, left : left + width]


def windows(op: Op, shape: Shape, out: Shape) -> Windows:
    """The windows of a convolution or pool."""
    s = op.settings
    kernel = op.arrays["weight"].shape[2:] if op.kind == "Conv2d" else tuple(s["kernel"])
    return Windows(shape, (out[1], out[2]), (kernel[0], kernel[1]), tuple(s["stride"]), tuple(s["padding"]),
                   tuple(s.get("dilation", (1, 1))))


class Layer:
    """An operator in its place. The base class is the identity on flat values (reshape)."""

    def __init__(self, op: Op, shape: Shape, out: Shape) -> None:
        self.op, self.shape, self.out = op, shape, out

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """The operator at points, exactly; values (points, *shape)."""
        return self._same(inputs[0], inputs[0].values.reshape(-1, *self.out))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Bounds (boxes, *out) from the inputs' bounds."""
        (lower, upper), = bounds
        return lower.reshape(-1, *self.out), upper.reshape(-1, *self.out)

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Rows (rows, *out) -> rows (rows, *shape) and constants (rows,)."""
        return self._same(v, v.values.reshape(-1, *self.shape)), None

    def prepare(self, lower: Array, upper: Array) -> None:
        """Tell the layer bounds (1, *shape) of its input over the domain, before any coarse step."""

    @staticmethod
    def _same(v: Dyadic, values: Array) -> Dyadic:
        return Dyadic(values, v.exponent, v.divisor)


class Permute(Layer):
    """Transpose."""

    def _forward(self, x: Array) -> Array:
        return x.transpose(0, *(i + 1 for i in self.op.settings["permutation"]))

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        return self._same(inputs[0], self._forward(inputs[0].values))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        return self._forward(bounds[0][0]), self._forward(bounds[0][1])

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Backward substitution; see ``Layer``."""
        return self._same(v, v.values.transpose(0,
                                                *(int(i) + 1
                                                  for i in np.argsort(self.op.settings["permutation"])))), None


class Padding(Layer):
    """Constant padding."""

    def _forward(self, x: Array, value: float) -> Array:
        return _pad(x, self.op.settings["pads"], value)

    @cached_property
    def _outside(self) -> Array:
        return self._forward(np.zeros((1, *self.shape)), float(self.op.settings["value"]))

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        (x,) = inputs
        return dyadic.add(self._same(x, self._forward(x.values, 0)), _repeated(self._outside, len(x.values)))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        value = float(self.op.settings["value"])
        return self._forward(bounds[0][0], value), self._forward(bounds[0][1], value)

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Backward substitution; see ``Layer``."""
        outside = self._outside.reshape(1, -1)
        inner = tuple(slice(b, b + n) for (b, _), n in zip(self.op.settings["pads"], self.shape, strict=True))
        return self._same(v, v.values[(slice(None), *inner)]), support(v, interval(outside, outside, exact))


def _repeated(x: Array, rows: int) -> Dyadic:
    one = dyadic.from_float(x)
    return Dyadic(np.broadcast_to(one.values, (rows, *x.shape[1:])), np.repeat(one.exponent, rows))


class Sum(Layer):
    """y = x1 + x2."""

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        return dyadic.add(inputs[0], inputs[1])

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        (l1, u1), (l2, u2) = bounds
        return -dyadic.add_up(-l1, -l2), dyadic.add_up(u1, u2)

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Backward substitution; see ``Layer``."""
        return v, None


class ReLU(Layer):
    """y = max(x, 0); its backward step needs bounds and is in ``bounds``."""

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        return self._same(inputs[0], np.maximum(inputs[0].values, 0))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        return np.maximum(bounds[0][0], 0.0), np.maximum(bounds[0][1], 0.0)


class Scale(Layer):
    """y = scale * x + shift, elementwise."""

    @cached_property
    def _parts(self) -> tuple[Array, Array]:
        both = (np.broadcast_to(self.op.arrays[k].astype(np.float64), self.shape) for k in ("scale", "shift"))
        scale, shift = (np.ascontiguousarray(a)[None] for a in both)
        return scale, shift

    def prepare(self, lower: Array, upper: Array) -> None:
        """Bounds of the input, before any coarse step; see ``Layer``."""
        self._lower = lower

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        (x,) = inputs
        scale, shift = self._parts
        values, exponent = dyadic.exact_int(scale)
        scaled = Dyadic(dyadic.multiply(x.values, values), x.exponent + exponent, x.divisor)
        return dyadic.add(scaled, _repeated(shift, len(x.values)))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        (lower, upper), = bounds
        scale, shift = self._parts
        low, high = np.where(scale >= 0, lower, upper), np.where(scale >= 0, upper, lower)
        if exact:
            return (-dyadic.to_float_up(_negative(self.exact(dyadic.from_float(low)))),
                    dyadic.to_float_up(self.exact(dyadic.from_float(high))))
        return (-dyadic.add_up(dyadic.multiply_up(-low, scale), -shift), dyadic.add_up(dyadic.multiply_up(high, scale),
                                                                                       shift))

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Backward substitution; see ``Layer``."""
        scale, shift = (a.reshape(1, -1) for a in self._parts)
        constant = support(v, interval(shift, shift, exact))
        if exact:
            values, exponent = dyadic.exact_int(self._parts[0])
            return Dyadic(dyadic.multiply(v.values, values), v.exponent + exponent, v.divisor), constant
        exponent = int(np.frexp(np.abs(scale).max(initial=0.0))[1]) - POINT
        high = dyadic.scale_up(self._parts[0], -exponent)
        low = -dyadic.scale_up(-self._parts[0], -exponent)
        rounded = Dyadic(np.maximum(v.values * high, v.values * low), v.exponent + exponent)
        # (rounded - exact) <= abs(v) * 2**exponent where the grid misses the scale, and costs that much per unit of -x
        slack = np.where(high != low, np.maximum(-self._lower, 0.0), 0.0).reshape(1, -1)
        error = support(Dyadic(np.abs(v.values), v.exponent + exponent), interval(np.zeros_like(slack), slack, False))
        return rounded, dyadic.add(constant, error)


def _negative(number: Dyadic) -> Dyadic:
    return Dyadic(-number.values, number.exponent, number.divisor)


class Linear(Layer):
    """y = W x + b by groups: an affine layer or a convolution, as products of gathered columns."""

    def __init__(self, op: Op, shape: Shape, out: Shape) -> None:
        super().__init__(op, shape, out)
        weight = op.arrays["weight"].astype(np.float64)
        self.groups = int(op.settings.get("groups", 1))
        self.windows = windows(op, shape, out) if op.kind == "Conv2d" else None
        self.weight = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)  # (G, O, K)
        bias = op.arrays["bias"].astype(np.float64)
        self.bias = np.broadcast_to(bias.reshape(-1, *(1,) * (len(out) - 1)), out)[None]
        taps = prod(self.windows.kernel) if self.windows else 1
        self.backward_terms = max(self.weight.shape[1] * taps, 1)
        self.terms = max(self.backward_terms, self.weight.shape[2])

    # columns (G, N, K) <-> input (rows, *shape), and outputs (G, N, O) <-> (rows, *out)

    def _columns(self, x: Array) -> Array:
        if self.windows is None:
            return x[None]
        found = self.windows.gather(x).reshape(len(x), self.groups, -1, prod(self.windows.out),
                                               prod(self.windows.kernel))
        return found.transpose(1, 0, 3, 2, 4).reshape(self.groups, len(x) * prod(self.windows.out), -1)

    def _from_columns(self, columns: Array, rows: int) -> Array:
        if self.windows is None:
            return columns[0]
        split = columns.reshape(self.groups, rows, *self.windows.out, -1, prod(self.windows.kernel))
        merged = split.transpose(1, 0, 4, 2, 3, 5).reshape(rows, self.shape[0], *self.windows.out,
                                                           prod(self.windows.kernel))
        return self.windows.scatter(merged)

    def _outputs(self, products: Array, rows: int) -> Array:
        if self.windows is None:
            return products[0]
        split = products.reshape(self.groups, rows, prod(self.windows.out), -1)
        return split.transpose(1, 0, 3, 2).reshape(rows, *self.out)

    def _from_outputs(self, v: Array) -> Array:
        if self.windows is None:
            return v[None]
        split = v.reshape(len(v), self.groups, -1, prod(self.windows.out))
        return split.transpose(1, 0, 3, 2).reshape(self.groups, len(v) * prod(self.windows.out), -1)

    def forward(self, x: Array, weight: Array) -> Array:
        """The operator without bias at points (points, *shape), for other weights (G, O, K), in float64."""
        return self._outputs(np.matmul(self._columns(x), weight.transpose(0, 2, 1)), len(x))

    def unit_rows(self, outputs: Array) -> tuple[Array, Array]:
        """The rows y[outputs] as floats: weights (*shape, rows) and biases (rows,)."""
        rows = np.arange(len(outputs))
        bias = self.bias.reshape(-1)[outputs]
        if self.windows is None:
            return np.ascontiguousarray(self.weight[0, outputs].T), bias
        (height, width), (top, left, bottom, right) = self.windows.out, self.windows.padding
        channel, place = np.divmod(outputs, height * width)
        group, channel = np.divmod(channel, self.weight.shape[1])
        weight = self.weight[group, channel].reshape(len(outputs), -1, *self.windows.kernel)  # (rows, C, kh, kw)
        inputs = group[:, None] * weight.shape[1] + np.arange(weight.shape[1])
        total = np.zeros((self.shape[0], self.shape[1] + top + bottom, self.shape[2] + left + right, len(outputs)))
        for i, j in np.ndindex(*self.windows.kernel):
            row = place // width * self.windows.stride[0] + i * self.windows.dilation[0]
            column = place % width * self.windows.stride[1] + j * self.windows.dilation[1]
            total[inputs, row[:, None], column[:, None], rows[:, None]] = weight[:, :, i, j]
        return total[:, top : top + self.shape[1], left : left + self.shape[2]], bias

    def _apply(self, x: Array, weights: Matrix) -> Array:
        return dyadic.product(self._columns(x), weights, True, lambda y: self._outputs(y, len(x)))

    # weights as integers

    @cached_property
    def _exact(self) -> tuple[Matrix, Matrix, Matrix]:
        return dyadic.signed_matrices(*dyadic.exact_int(self.weight), self.terms)

    def prepare(self, lower: Array, upper: Array) -> None:
        """Keep the input's range; what depends on it is computed when it is needed."""
        self._lower, self.size = lower, np.maximum(np.abs(lower), np.abs(upper))
        self.__dict__.pop("_rounded", None)

    @cached_property
    def _rounded(self) -> tuple[tuple[Matrix, Matrix, Matrix], tuple[Array, Array]]:
        """Weights on a grid, and what that can change in y as an interval around the bias."""
        bits = dyadic.WORD - BITS - 2 - self.terms.bit_length()
        exponent = int(np.frexp(np.abs(self.weight).max(initial=0.0))[1]) - bits
        values = np.rint(np.ldexp(self.weight, -exponent))
        missed = (np.ldexp(values, exponent) != self.weight).astype(np.int64)
        grid = int(np.frexp(self.size.max(initial=0.0))[1]) - 20
        touched = self._apply(dyadic.scale_up(self.size, -grid), dyadic.matrix(missed, 0, self.terms))
        error = np.ldexp(np.nextafter(touched.astype(np.float64), np.inf), grid + exponent)  # abs(missed) < 2**exponent
        error = np.where(touched == 0, 0.0, np.maximum(error, 2.0**dyadic.TINY))
        bias = -dyadic.add_up(-self.bias, error), dyadic.add_up(self.bias, error)
        return dyadic.signed_matrices(values.astype(np.int64), exponent, self.terms), bias

    @property
    def _coarse(self) -> tuple[Matrix, Matrix, Matrix]:
        return self._rounded[0]

    @property
    def _bias(self) -> tuple[Array, Array]:
        return self._rounded[1]

    # the three questions

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        (x,) = inputs
        weights = self._exact[0]
        y = Dyadic(self._apply(x.values, weights), x.exponent + weights.exponent, x.divisor)
        return dyadic.add(y, _repeated(self.bias, len(x.values)))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        (lower, upper), = bounds
        return -self._upper(-upper, -lower, exact, -1), self._upper(lower, upper, exact, 1)

    def _upper(self, lower: Array, upper: Array, exact: bool, sign: int) -> Array:
        """Upper bound of W x + sign * b over [lower, upper]."""
        _, positive, negative = self._exact if exact else self._coarse
        low, high = _points(lower, upper, exact)
        products = self._apply(high.values, positive) + self._apply(low.values, negative)
        y = Dyadic(products, high.exponent + positive.exponent)
        if exact:
            return dyadic.to_float_up(dyadic.add(y, _repeated(sign * self.bias, len(lower))))
        return dyadic.add_up(dyadic.to_float_up(y), self._bias[1] if sign > 0 else -self._bias[0])

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Backward substitution without any rounding (coarse rows take the steps of ``backward``); see ``Layer``."""
        weights, bias = self._exact[0], self.bias.reshape(1, -1)
        constant = support(v, interval(bias, bias, True))
        values = dyadic.product(self._from_outputs(v.values), weights, False, lambda x: self._from_columns(x,
                                                                                                           len(v.values)))
        return Dyadic(values, v.exponent + weights.exponent, v.divisor), constant

    def rows(self, outputs: Array, sign: int) -> tuple[Dyadic, Dyadic] | None:
        """``backward`` of the unit rows sign * y[outputs]; affine layers only."""
        if self.windows is not None:
            return None
        return dyadic.from_float(sign * self.weight[0, outputs]), dyadic.from_float(sign * self.bias[0, outputs])


def _points(lower: Array, upper: Array, exact: bool) -> tuple[Dyadic, Dyadic]:
    """Both endpoints (boxes, *shape) over one exponent a row: exactly, or to ``BITS`` bits, outward."""
    if exact:
        both, exponent = dyadic.exact_int(np.stack([lower, upper]))
        exponents = np.full(len(lower), exponent, np.int64)
        return Dyadic(both[0], exponents), Dyadic(both[1], exponents)
    size = np.maximum(np.abs(lower), np.abs(upper)).reshape(len(lower), -1).max(axis=1, initial=0.0)
    if not np.isfinite(size).all():
        raise CheckError("values leave the range of float64")
    exponents = np.frexp(size)[1].astype(np.int64) - BITS
    shift = column(-exponents, lower)
    return Dyadic(-dyadic.scale_up(-lower, shift), exponents), Dyadic(dyadic.scale_up(upper, shift), exponents)


class AvgPool(Layer):
    """y = (sum over a window) / divisor of that window."""

    def __init__(self, op: Op, shape: Shape, out: Shape) -> None:
        super().__init__(op, shape, out)
        self.windows = windows(op, shape, out)
        inside = self.windows.gather(np.ones((1, *shape), np.int64), 1 if op.settings["count_include_pad"] else 0)
        self.divisors = inside.sum(axis=-1)[:, :1]  # (1, 1, H_out, W_out)
        if (self.divisors < 1).any():
            raise CheckError("AvgPool2d: a window lies in the padding altogether")
        self.multiple = math.lcm(*(int(d) for d in np.unique(self.divisors)))

    def prepare(self, lower: Array, upper: Array) -> None:
        """Bounds of the input, before any coarse step; see ``Layer``."""
        self._lower = self.interval([(lower, upper)], False)[0]

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        (x,) = inputs
        factor = (self.multiple // self.divisors).astype(object)
        total = self.windows.gather(x.values.astype(object)).sum(axis=-1) * factor
        return Dyadic(dyadic.narrow(total), x.exponent, x.divisor * self.multiple)

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        (lower, upper), = bounds
        if exact:
            return (-dyadic.to_float_up(self.exact(dyadic.from_float(-lower))),
                    dyadic.to_float_up(self.exact(dyadic.from_float(upper))))
        return -self._upper(-lower), self._upper(upper)

    def _upper(self, x: Array) -> Array:
        taken = self.windows.gather(x)
        total = taken[..., 0]
        for place in range(1, taken.shape[-1]):
            total = dyadic.add_up(total, taken[..., place])
        return np.where(total == 0, 0.0, np.nextafter(total / self.divisors, np.inf))

    def backward(self, v: Dyadic, exact: bool) -> tuple[Dyadic, Dyadic | None]:
        """Backward substitution; see ``Layer``."""
        if exact:
            part = Dyadic(dyadic.multiply(v.values, (self.multiple // self.divisors).astype(object)), v.exponent,
                          v.divisor * self.multiple)
            constant = None
        else:  # v / divisor rounded up to a finer grid; the sum over a window is its divisor times y
            part = Dyadic(-((-v.values << POINT) // self.divisors), v.exponent - POINT)
            sums = self._lower * self.divisors.max()
            constant = rounding_cost(np.ones(len(v.values), bool), part.exponent, np.nextafter(sums, -np.inf))
        spread = np.broadcast_to(part.values[..., None], (*part.values.shape, prod(self.windows.kernel)))
        if spread.dtype != object and dyadic.width(spread) + prod(self.windows.kernel).bit_length() > dyadic.WORD:
            spread = spread.astype(object)
        return self._same(part, self.windows.scatter(spread)), constant


class MaxPool(Layer):
    """y = maximum over a window; its backward step needs bounds: ``relax``."""

    def __init__(self, op: Op, shape: Shape, out: Shape) -> None:
        super().__init__(op, shape, out)
        self.windows = windows(op, shape, out)
        self.real = self.windows.gather(np.ones((1, *shape), bool), False)
        if not self.real.any(axis=-1).all():
            raise CheckError("MaxPool2d: a window lies in the padding altogether")

    def exact(self, *inputs: Dyadic) -> Dyadic:
        """Exact values at points; see ``Layer``."""
        (x,) = inputs
        taken = self.windows.gather(x.values)
        lowest = column(x.values.reshape(len(x.values), -1).min(axis=1), taken)
        return self._same(x, np.where(self.real, taken, lowest).max(axis=-1))

    def interval(self, bounds: list[tuple[Array, Array]], exact: bool) -> tuple[Array, Array]:
        """Outward-rounded bounds; see ``Layer``."""
        (lower, upper), = bounds
        return self.windows.gather(lower, -np.inf).max(axis=-1), self.windows.gather(upper, -np.inf).max(axis=-1)

    def relax(self, v: Dyadic, lower: Array, upper: Array, exact: bool) -> tuple[Dyadic, Dyadic]:
        """v . max <= w . x + c by the fixed rule, for input bounds (1 or rows, *shape).

        For any input t of the window max >= x_t, so v < 0 may take any; where the lower bound of t is at least every
        other upper bound, max = x_t; and max <= the largest upper bound, for v >= 0.
        """
        low, high = self.windows.gather(lower, -np.inf), self.windows.gather(upper, -np.inf)
        places = np.arange(low.shape[-1])
        largest = high.argmax(axis=-1)[..., None]
        others = np.where(places == largest, -np.inf, high).max(axis=-1)
        dominated = np.take_along_axis(low, largest, -1)[..., 0] >= others
        chosen = np.where(dominated, largest[..., 0], low.argmax(axis=-1))
        top = high.max(axis=-1)
        linear = np.where(dominated | (v.values < 0), v.values, v.values * 0)
        rest = self._same(v, v.values - linear)
        top = top.reshape(len(top), -1)
        constant = support(rest, interval(top, top, exact))
        spread = np.where(places == chosen[..., None], linear[..., None], linear[..., None] * 0)
        return self._same(v, self.windows.scatter(spread)), constant


KINDS: dict[str, Callable[[Op, Shape, Shape], Layer]] = {
    "Affine": Linear, "Conv2d": Linear, "Scale": Scale, "ReLU": ReLU, "Add": Sum, "MaxPool2d": MaxPool,
    "AvgPool2d": AvgPool, "Reshape": Layer, "Transpose": Permute, "Pad": Padding,
}


def layers(network: Network) -> list[Layer]:
    """One ``Layer`` for every node."""
    return [KINDS[node.op.kind](node.op, network.shape_of(node.inputs[0]), shape)
            for node, shape in zip(network.nodes, network.shapes, strict=True)]
