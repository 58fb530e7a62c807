"""Backward substitution on a grid: upper bounds of linear forms over a region, with exact float64 products.

A row is a linear form ``sum over j of values[j, r] * 2**exponent[r] * y_j`` with integer values of at most 2**BITS (and a few
units), held in float64 with the rows in the last axis. All float64 operations on them are exact by counting bits, or rounded up:

- a product with a weight matrix: weights are integers on a grid, cut into limbs few enough bits wide that every partial sum
  stays below 2**53, so it is exact in any order of summation, fused or not (Ozaki, Ogita, Oishi, Rump 2012);
- a sum of products of one integer and one bound: each product is correctly rounded by IEEE 754, hence off by at most half a
  unit in its 53rd bit; it is rounded up to a grid on which the whole sum is exact, and one unit of that grid, which is
  coarser than the 53rd bit of the largest term, is added for each;
- a scaling by a power of two, far from the ends of float64's range.

Rounding a row v up to v' is free where it multiplies something that is not negative: v . y <= v' . y for y >= 0, as behind a
ReLU. Elsewhere a *shift* s <= y is taken off first, v . y = v . (y - s) + v . s, where s has so few bits (``SHORT``) that v . s
is exact: a linear map does that before its rows are rounded, W y + b = W (y - s) + (W s + b). Weights that miss their
grid widen the bias by what they can change, ``2**(grid - 1) * sum of abs(y - s)``.

The ReLU step is the inequality of ``bounds``: any multiplier is valid, so multipliers are simply rounded to the row's grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exactprune.checker import dyadic
from exactprune.checker.dyadic import TINY, Array

BITS = 28  # of a row's largest value
FINE = 26  # bits of the weights' grid below their largest, at least
FAR = 400  # bounds beyond 2**FAR are refused, and those nearer to 0 than 2**-FAR are moved there, outward
SHORT = 16  # bits of a shift


@dataclass(frozen=True, eq=False)
class Rows:
    """``values[..., r] * 2**exponent[r]``: float64 integers (*shape, rows) and int64 (rows,)."""

    values: Array
    exponent: Array


@dataclass(frozen=True, eq=False)
class Part:
    """A term ``values * 2**exponent`` of the rows at a node, not rounded yet; float64.

    It multiplies y - s if ``shifted``; else y, and then its values are integers where s is not 0.
    """

    values: Array
    exponent: Array
    shifted: bool = False


@dataclass(frozen=True, eq=False)
class Weights:
    """A weight array as ``sum of limbs[i] * 2**exponents[i]``, up to 2**error an entry (None: exactly)."""

    limbs: tuple[Array, ...]
    exponents: tuple[int, ...]
    error: int | None


def cut_weights(weight: Array, terms: int) -> Weights:
    """Limbs for sums of at most ``terms`` products with rows.

    A value below 2**(BITS + 1) times a limb of at most 2**bits, ``terms`` times: below 2**53 as bits is chosen.
    """
    bits = 53 - (BITS + 1) - terms.bit_length()
    if bits < 2:
        raise OverflowError(f"a sum of {terms} products is too long for exact float64 limbs")
    count = -(-FINE // bits)
    grid = int(np.frexp(np.abs(weight).max(initial=0.0))[1]) - bits * count
    rest = np.rint(np.ldexp(weight, -grid))  # at most 2**(bits * count), and that is below 2**53
    error = None if np.array_equal(np.ldexp(rest, grid), weight) else grid - 1
    limbs, exponents = [], []
    for place in range(count - 1, -1, -1):
        limb = np.rint(np.ldexp(rest, -bits * place))
        rest = rest - np.ldexp(limb, bits * place)
        if limb.any() or not place:
            limbs.append(limb)
            exponents.append(grid + bits * place)
    return Weights(tuple(limbs), tuple(exponents), error)


def outward(x: Array) -> Array:
    """Numbers >= x of the same signs, 0 or at least 2**-FAR in magnitude: products and scalings of them do not underflow.

    Raises:
        OverflowError: beyond 2**FAR.
    """
    if not np.abs(x).max(initial=0.0) < 2.0**FAR:
        raise OverflowError("a bound is too large for coarse arithmetic")
    found = np.where((x > 0) & (x < 2.0**-FAR), 2.0**-FAR, x)
    return np.where((x < 0) & (x > -(2.0**-FAR)), 0.0, found)


def scaled_up(values: Array, exponent: Array | int) -> Array:
    """``values * 2**exponent`` for float64 values, rounded up where that leaves the normal range."""
    with np.errstate(over="ignore"):
        found = np.ldexp(values, np.clip(exponent, -8000, 8000))
    found = np.where((values > 0) & (found < 2.0**TINY), 2.0**TINY, found)
    return np.where((values < 0) & (found > -(2.0**TINY)), 0.0, found)


def sum_up(terms: Array, exponent: Array, top: int) -> Array:
    """Upper bounds of the sums over all but the last axis of ``terms * 2**exponent``.

    Args:
        terms: each a float64 product (or exact) with abs(term) <= 2**top, so off by at most 2**(top - 53) < 2**grid.
        exponent: of the rows.
        top: see terms.

    Terms are rounded up to integers times 2**grid of at most 2**51 / (number of terms) and a unit, so their sum is exact.
    """
    flat = terms.reshape(-1, terms.shape[-1])
    grid = top - 51 + len(flat).bit_length()
    total = np.ceil(flat * 2.0**-grid).sum(axis=0) + len(flat)
    if not np.abs(total).max(initial=0.0) <= 2.0**52:
        raise OverflowError("a sum leaves its grid")
    return scaled_up(total, exponent + grid)


def bits_of(bound: Array) -> int:
    """An exponent e with abs(bound) <= 2**e."""
    return int(np.frexp(np.abs(bound).max(initial=0.0))[1])


def support(v: Rows, low: Array, high: Array) -> Array:
    """Upper bounds of every row over a box (n, 1 or rows): sum over j of max(v_j low_j, v_j high_j)."""
    flat, low, high = v.values.reshape(-1, v.values.shape[-1]), -outward(-low), outward(high)
    terms = np.maximum(flat * low, flat * high) if (low < high).any() else flat * high
    return sum_up(terms, v.exponent, BITS + 1 + max(bits_of(low), bits_of(high)))


def gather(parts: list[Part], shift: Array | None) -> tuple[Rows, Array | None, Array]:
    """The sum of parts as one row each of at most BITS bits (and a few units), rounded up where that is needed.

    Args:
        parts: what to add.
        shift: s <= y (n, 1), or None where y >= 0 and s = 0.

    Returns:
        Rows on y; a constant (rows,) to add, or None; and for every row an exponent above all its values.
    """
    top = _top(parts)
    grid = np.maximum(top - BITS, np.minimum.reduce([p.exponent for p in parts]))
    if len(parts) == 1 and not parts[0].shifted and (grid == parts[0].exponent).all():
        return Rows(parts[0].values, grid), None, top  # integers already
    total, constant = None, None
    for part in parts:
        scale = np.ldexp(1.0, np.clip(part.exponent - grid, -200, 900))  # beyond -200, up is 0 or 1 anyway
        whole = np.ceil(part.values * scale)
        total = whole if total is None else total + whole
        if shift is not None and not part.shifted:
            constant = _add(constant, _times(part.values, part.exponent, shift))
    assert total is not None
    if shift is not None:
        constant = _add(constant, _times(total, grid, -shift))
    return Rows(total, grid), constant, top


def _top(parts: list[Part]) -> Array:
    """For every row an exponent e such that the absolute values of a sum of parts are at most 2**e."""
    base = np.maximum.reduce([p.exponent for p in parts])
    most = [_most(p.values) * np.ldexp(1.0, np.maximum(p.exponent - base, -900)) for p in parts]
    total = np.add.reduce(most) * (1 + 2.0**-40)
    return np.frexp(np.maximum(total, 1.0))[1] + base


def _add(total: Array | None, term: Array) -> Array:
    return term if total is None else dyadic.add_up(total, term)


def _times(values: Array, exponent: Array, shift: Array) -> Array:
    """Upper bounds of values . shift * 2**exponent, for integers and shifts whose products have at most 52 bits."""
    flat = values.reshape(-1, values.shape[-1])
    most = _most(flat).max(initial=0.0)
    if not most <= 2.0 ** (52 - SHORT):
        raise OverflowError("a row is too wide for coarse arithmetic")
    return sum_up(flat * shift, exponent, bits_of(most) + bits_of(shift))


def shift_below(lower: Array) -> Array | None:
    """Numbers s <= lower on one grid, SHORT bits of the largest; None if all are 0."""
    if not lower.any():
        return None
    if not np.abs(lower).max() < 2.0**FAR:
        raise OverflowError("a bound is too large for coarse arithmetic")
    grid = max(bits_of(lower) - SHORT, -FAR)
    return np.floor(lower * 2.0**-grid) * 2.0**grid


def _most(values: Array) -> Array:
    flat = values.reshape(-1, values.shape[-1])
    return np.maximum(flat.max(axis=0, initial=0.0), -flat.min(axis=0, initial=0.0))


@dataclass(frozen=True, eq=False)
class Lines:
    """A ReLU layer's bounds, ready for ``relax``: arrays (neurons, entries), or (neurons, 1).

    Attributes:
        lower, upper: bounds.
        chord: u / (u - l), 1 where active, 0 where inactive.
        active, inactive: (neurons,), in all entries.
    """

    lower: Array
    upper: Array
    chord: Array
    active: Array
    inactive: Array


def lines(lower: Array, upper: Array) -> Lines:
    """From bounds (entries, neurons)."""
    lower, upper = lower.T, upper.T
    with np.errstate(all="ignore"):
        ratio = np.clip(np.nan_to_num(upper / (upper - lower), nan=0.5), 0.0, 1.0)
    chord = np.where(upper <= 0, 0.0, np.where(lower >= 0, 1.0, ratio))
    active, inactive = np.all(lower >= 0, axis=1), np.all(upper <= 0, axis=1)
    return Lines(-outward(-lower), outward(upper), chord, active & ~inactive, inactive)


def relax(v: Rows, bounds: Lines, index: Array | None, given: tuple[Array, Array, Array] | None) -> tuple[Rows, Array]:
    """v . relu(z_hat) <= a . z_hat + c by the fixed rule, or by given multipliers.

    Neurons that are active (inactive) in all entries without a given multiplier have a = v (0) and c = 0: v relu(t) - a t
    is 0 for all t there.

    Args:
        v: rows (neurons, rows).
        bounds: of the neurons.
        index: the entry of every row, or None if there is one entry, or row i has entry i.
        given: values (neurons, rows), shift (rows,), mask (neurons, rows).
    """
    if given is not None:
        v = _on_grid(v, given)
    open_ = ~(bounds.active | bounds.inactive)
    some = np.flatnonzero(open_ if given is None else open_ | given[2].any(axis=1))
    every = len(some) == len(v.values)
    values = v.values if every else v.values[some]
    low, high, chord = (_pick(b if every else b[some], index) for b in (bounds.lower, bounds.upper, bounds.chord))
    slope = np.rint(values * np.where(values >= 0, chord, chord > 0.5))
    if given is not None:
        numbers, shift, mask = given
        each = np.ldexp(numbers[some].astype(np.float64), np.clip(-shift - v.exponent, -2000, 2000))
        slope = np.where(mask[some], np.rint(np.clip(each, -(2.0**BITS), 2.0**BITS)), slope)
    constant = _plain_intercept(values, slope, low, high) if given is None else _intercept(values, slope, low, high)
    top = BITS + 2 + max(bits_of(low), bits_of(high))
    if every:
        return Rows(slope, v.exponent), sum_up(constant, v.exponent, top)
    a = v.values * bounds.active[:, None]
    a[some] = slope
    return Rows(a, v.exponent), sum_up(constant, v.exponent, top)


def _pick(entries: Array, index: Array | None) -> Array:
    return entries if index is None or entries.shape[1] == 1 else entries[:, index]


def _intercept(v: Array, a: Array, low: Array, high: Array) -> Array:
    """The maximum of v relu(t) - a t over t in {low, high} and 0 if it lies between: one float64 product each."""
    found = np.maximum((np.where(low >= 0, v, 0.0) - a) * low, (np.where(high >= 0, v, 0.0) - a) * high)
    return np.where((low < 0) & (high > 0), np.maximum(found, 0.0), found)


def _plain_intercept(v: Array, a: Array, low: Array, high: Array) -> Array:
    """As ``_intercept`` for the fixed rule: a is v where low >= 0 and 0 where high <= 0, and the maximum is 0 there.

    Elsewhere 0 is between, and the maximum of -a low, (v - a) high and 0. With low cut to at most 0 and high to at least 0 that
    also holds where low >= 0 (v - a = 0) and where high <= 0 (a = 0).
    """
    found = a * -np.minimum(low, 0.0)
    other = v - a
    other *= np.maximum(high, 0.0)
    np.maximum(found, other, out=found)
    return np.maximum(found, 0.0, out=found)


def _on_grid(v: Rows, given: tuple[Array, Array, Array]) -> Rows:
    """A coarser grid where given multipliers need it; rounding v up is free, for y >= 0 behind a ReLU."""
    numbers, shift, mask = given
    largest = np.abs(np.where(mask, numbers, 0).astype(np.float64)).max(axis=0, initial=0.0)
    need = np.where(largest > 0, np.frexp(largest)[1] - shift - BITS, v.exponent)
    excess = np.maximum(need - v.exponent, 0)
    if not excess.any():
        return v
    return Rows(np.ceil(v.values * np.ldexp(1.0, -np.minimum(excess, 900))), v.exponent + excess)
