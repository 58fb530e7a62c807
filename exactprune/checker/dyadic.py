"""Exact arithmetic on arrays of integers times powers of two.

A ``Dyadic`` holds ``values[r, ...] * 2**exponent[r] / divisor`` with integer values: int64 while everything fits into
62 bits, Python integers (dtype object) beyond. Matrix products are exact and come from float64 BLAS: both factors are
cut
into limbs few enough bits wide that every partial sum is an integer of at most 53 bits, which float64 holds exactly
in any
order of summation, fused or not (Ozaki, Ogita, Oishi, Rump: Error-free transformations of matrix multiplication, 2012).

Rounding is always explicit and always upward; rounding down is ``-up(-x)``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LIMB = 24  # bits of one limb of the left factor of a product
WORD = 62  # magnitudes below 2**62 stay int64: one bit of slack below overflow
TINY = -1000  # results below 2**TINY are rounded away from the exact value, up, to 2**TINY or 0

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Dyadic:
    """Numbers ``values[r, ...] * 2**exponent[r] / divisor``.

    Attributes:
        values: int64 or object (Python integers), any shape with rows first.
        exponent: int64, shape (rows,).
        divisor: a positive integer.
    """

    values: Array
    exponent: Array
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class Matrix:
    """A fixed right factor: integer matrices (..., k, n) times 2**exponent, cut into limbs for ``product``."""

    limbs: tuple[tuple[Array, int], ...]
    width: int
    exponent: int
    terms: int


def width(values: Array) -> int:
    """Bits of the largest magnitude."""
    if values.size == 0:
        return 0
    return max(int(values.max()).bit_length(), int(values.min()).bit_length())


def row_width(values: Array) -> Array:
    """Bits of the largest magnitude in every row, at most one too many; int64 (rows,)."""
    flat = values.reshape(len(values), -1)
    if flat.shape[1] == 0:
        return np.zeros(len(flat), np.int64)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    if values.dtype == object:
        return np.array([int(v).bit_length() for v in largest], np.int64)
    return np.frexp(largest.astype(np.float64))[1].astype(np.int64)


def column(rows: Array, like: Array) -> Array:
    """``rows`` (rows,) shaped to broadcast against ``like`` (rows, ...)."""
    return rows.reshape((-1,) + (1,) * (like.ndim - 1))


def narrow(values: Array) -> Array:
    """The same integers as int64 if they fit into 62 bits."""
    return values.astype(np.int64) if values.dtype == object and width(values) <= WORD else values


def shift_left(values: Array, shift: Array | int) -> Array:
    """``values * 2**shift`` for shift >= 0, exactly."""
    most = int(np.max(shift, initial=0))
    if most == 0:
        return values
    if values.dtype != object and width(values) + most > WORD:
        values = values.astype(object)
    if values.dtype == object and isinstance(shift, np.ndarray):
        shift = shift.astype(object)
    return values << shift


def shift_right_up(values: Array, shift: Array | int) -> Array:
    """``ceil(values / 2**shift)`` for shift >= 0 (for int64, magnitudes below 2**62)."""
    if not np.any(shift):
        return values
    if values.dtype == object:
        shift = shift.astype(object) if isinstance(shift, np.ndarray) else shift
        return -((-values) >> shift)
    return -((-values) >> np.minimum(shift,
                                     WORD))  # at 62 and beyond the result is 1 or 0: both at least the exact value


def round_up(number: Dyadic, bits: int) -> tuple[Dyadic, Array]:
    """Every row rounded up to a grid of about ``bits`` bits of its largest value, as int64.

    Returns:
        The rounded rows and, for every row, whether it may have changed (by less than one unit of its new grid).
    """
    excess = np.maximum(row_width(number.values) - bits, 0)
    values = shift_right_up(number.values, column(excess, number.values))
    return Dyadic(narrow(values), number.exponent + excess, number.divisor), excess > 0


def add(first: Dyadic | None, second: Dyadic) -> Dyadic:
    """The exact sum; None counts as zero."""
    if first is None:
        return second
    divisor = math.lcm(first.divisor, second.divisor)
    exponent = np.minimum(first.exponent, second.exponent)
    a, b = (shift_left(multiply_int(x.values, divisor // x.divisor), column(x.exponent - exponent, x.values))
            for x in (first, second))
    if a.dtype != object and b.dtype != object and max(width(a), width(b)) >= WORD:
        a = a.astype(object)
    return Dyadic(a + b, exponent, divisor)


def multiply_int(values: Array, factor: int) -> Array:
    """``values * factor``, exactly, for a Python integer."""
    if factor == 1:
        return values
    if values.dtype != object and width(values) + factor.bit_length() > WORD:
        values = values.astype(object)
    return values * factor


def multiply(first: Array, second: Array) -> Array:
    """Elementwise product, exactly."""
    if object not in (first.dtype, second.dtype) and width(first) + width(second) > WORD:
        first = first.astype(object)
    return first * second


def row_sums(values: Array) -> Array:
    """Sums over everything but the first axis, exactly, as Python integers; shape (rows,), dtype object."""
    flat = values.reshape(len(values), -1)
    if flat.dtype == object:
        return flat.sum(axis=1) if flat.shape[1] else np.zeros(len(flat), object)
    low = flat & 0xFFFFF  # 20 bits, and 43 above: both sums stay below 2**63 for up to 2**19 columns
    if flat.shape[1] >= 2**19:
        return flat.astype(object).sum(axis=1)
    return ((flat >> 20).sum(axis=1).astype(object) << 20) + low.sum(axis=1).astype(object)


def _limbs(values: Array, bits: int) -> list[tuple[Array, int]]:
    """Float64 arrays L_s with ``values = sum of L_s * 2**s`` and abs(L_s) <= 2**bits."""
    found = []
    shift, left = 0, width(values)
    while left > bits:
        found.append(((values & ((1 << bits) - 1)).astype(np.float64), shift))
        values, shift, left = values >> bits, shift + bits, left - bits
    return [*found, (values.astype(np.float64), shift)]


def matrix(values: Array, exponent: int, terms: int) -> Matrix:
    """A right factor (..., k, n) for products with sums of at most ``terms`` >= k products."""
    bits = 53 - LIMB - terms.bit_length()
    if bits < 1:
        raise OverflowError(f"a sum of {terms} products is too long for exact float64 limbs")
    return Matrix(tuple(_limbs(values, bits)), width(values), exponent, terms)


def signed_matrices(values: Array, exponent: int, terms: int) -> tuple[Matrix, Matrix, Matrix]:
    """``matrix`` of the values, of max(values, 0) and of min(values, 0): the limbs of the first, masked by sign."""
    whole = matrix(values, exponent, terms)
    positive, negative = (
        Matrix(tuple((np.where(mask, limb, 0.0), shift) for limb, shift in whole.limbs), whole.width, exponent, terms)
        for mask in (values > 0, values < 0))
    return whole, positive, negative


def product(values: Array, right: Matrix, transpose: bool = False, finish: Callable[[Array],
                                                                                    Array] = lambda x: x) -> Array:
    """``finish(values @ right)`` (or ``right.T``), exactly: integers (..., m, k) times (..., k, n).

    ``finish`` rearranges and adds entries, each sum counting for the ``terms`` that ``right`` was made for; it is
    applied
    to every pair of limbs while these are float64, before the wider integers are put together.
    """
    wide = width(values) + right.width + right.terms.bit_length() > WORD
    total: Array | None = None
    for a, s in _limbs(values, LIMB):
        for b, t in right.limbs:
            part = finish(np.matmul(a, np.swapaxes(b, -1, -2) if transpose else b)).astype(np.int64)
            part = part.astype(object) if wide else part
            part = part << (s + t) if s + t else part
            total = part if total is None else total + part
    assert total is not None
    return total


# -- to and from float64 -----------------------------------------------------------------------------------------------


def scale_up(x: Array, shift: Array | int) -> Array:
    """``ceil(x * 2**shift)`` as int64, for floats x with abs(x) * 2**shift < 2**62."""
    scaled = np.ceil(np.ldexp(x, shift))
    return np.where((x > 0) & (scaled <= 0), 1.0,
                    scaled).astype(np.int64)  # underflow of ldexp must not lose a positive


def exact_int(x: Array) -> tuple[Array, int]:
    """Integers m and one exponent e with x = m * 2**e, exactly; m is int64 if it fits, else object."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    used = whole != 0
    if not used.any():
        return np.zeros(x.shape, np.int64), 0
    zeros = np.log2(np.where(used, whole & -whole, 1)).astype(np.int64)  # trailing zeros: exact for powers of two
    whole, exponent = whole >> zeros, exponent - 53 + zeros
    least = int(exponent[used].min())
    return narrow(shift_left(whole, np.where(used, exponent - least, 0))), least


def from_float(x: Array) -> Dyadic:
    """Floats (rows, ...) exactly."""
    values, exponent = exact_int(x)
    return Dyadic(values, np.full(len(x), exponent, np.int64))


def from_float_up(x: Array, bits: int) -> tuple[Dyadic, Array]:
    """Floats (rows, ...) rounded up to a grid of ``bits`` bits of each row's largest, and which rows changed."""
    flat = x.reshape(len(x), -1)
    exponent = np.frexp(np.abs(flat).max(axis=1, initial=0.0))[1].astype(np.int64) - bits
    values = scale_up(x, column(-exponent, x))
    changed = np.ldexp(values.astype(np.float64), column(exponent, x)) != x
    return Dyadic(values, exponent), changed.reshape(len(x), -1).any(axis=1)


def float_up(value: int, exponent: int, divisor: int = 1) -> float:
    """The least float64 >= value * 2**exponent / divisor, or a slightly greater one outside the normal range."""
    if divisor != 1:
        value, exponent = -((-value << 128) // divisor), exponent - 128
    shift = max(value.bit_length() - 53, 0)
    value, exponent = -((-value) >> shift), exponent + shift
    if value.bit_length() + exponent > 1023:
        return math.inf if value > 0 else -sys.float_info.max
    if value.bit_length() + exponent < TINY:
        return 2.0**TINY if value > 0 else 0.0
    return math.ldexp(value, exponent)


def to_float_up(number: Dyadic) -> Array:
    """Every number rounded up to float64."""
    if number.values.ndim == 1 and number.divisor == 1:
        number = round_up(number, WORD - 2)[0]  # many totals: vectorised, at the price of a second rounding
    values = number.values
    if values.dtype == object or number.divisor != 1:
        exponents = np.broadcast_to(column(number.exponent, values), values.shape)
        each = [float_up(int(v), int(e), number.divisor) for v, e in zip(values.flat, exponents.flat, strict=True)]
        return np.array(each, np.float64).reshape(values.shape)
    near = values.astype(np.float64)
    near = np.where(near.astype(np.int64) < values, np.nextafter(near, np.inf), near)
    with np.errstate(over="ignore"):
        scaled = np.maximum(np.ldexp(near, column(number.exponent, values)), -sys.float_info.max)
    scaled = np.where((values > 0) & (scaled < 2.0**TINY), 2.0**TINY, scaled)
    return np.where((values < 0) & (scaled > -(2.0**TINY)), 0.0, scaled)


def to_float_down(number: Dyadic) -> Array:
    """Every number rounded down to float64."""
    return -to_float_up(Dyadic(-number.values, number.exponent, number.divisor))


def add_up(a: Array, b: Array) -> Array:
    """Float64 sums rounded up (Knuth's TwoSum gives the error of the rounded sum exactly)."""
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    return np.where(error > 0, np.nextafter(total, np.inf), total)


def multiply_up(a: Array, b: Array) -> Array:
    """Float64 upper bounds of products; exact zeros and signs are kept."""
    near = np.nextafter(a * b, np.inf)
    return np.where((a == 0) | (b == 0), 0.0, np.where((a < 0) != (b < 0), np.minimum(near, 0.0), near))
