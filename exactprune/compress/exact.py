"""Exact arithmetic on stored floats: when is a result representable, and error-free elementwise sums and products.

TwoSum (Knuth 1969) and TwoProduct (Dekker 1971) give the rounding error of one float64 operation exactly, as long as
nothing over- or underflows; an operation is exact iff that error is 0. Longer sums go through ``fractions.Fraction``.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

_SMALL, _LARGE = 2.0**-900, 2.0**900
_SPLIT = 2.0**27 + 1


def dot(weights: Iterable[float], values: Iterable[float]) -> Fraction:
    """sum of w * v, exactly."""
    return sum((Fraction(float(w)) * Fraction(float(v)) for w, v in zip(weights, values, strict=True)), Fraction(0))


def representable(value: Fraction, dtype: np.dtype | type) -> bool:
    """Whether a rational is a finite number of ``dtype``."""
    try:
        with np.errstate(over="ignore"):
            rounded = float(np.dtype(dtype).type(float(value)))
    except OverflowError:
        return False
    return bool(np.isfinite(rounded)) and Fraction(rounded) == value


def exact_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b in float64, and where that is exact."""
    with np.errstate(all="ignore"):
        total = a + b
        part = total - a
        error = (a - (total - part)) + (b - part)
    return total, (error == 0) & (np.abs(total) < _LARGE)


def exact_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a * b in float64, and where that is exact (and far from over- and underflow)."""
    with np.errstate(all="ignore"):
        product = a * b
        a_high, b_high = (_SPLIT * x - (_SPLIT * x - x) for x in (a, b))
        a_low, b_low = a - a_high, b - b_high
        error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    size = np.abs(product)
    safe = (size > _SMALL) & (size < _LARGE) & (np.abs(a) < _LARGE) & (np.abs(b) < _LARGE)
    return product, (a == 0) | (b == 0) | (safe & (error == 0))
