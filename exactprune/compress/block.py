"""Blocks: k neurons that are linear on the domain, between what they read and what reads them.

For stably active neurons, x -> W_out (W_in x + b_in) + b_out is what the layer after sees of them. A replacement by r
units is x -> U (V x + c) + d with arrays of the network's dtype. Its error is linear in x:

    E x + e_0,   E = W_out W_in - U V,   e_0 = W_out b_in + b_out - U c - d,

so over an enclosure mid +- rad of x it is at most abs(E mid + e_0) + abs(E) rad. With d chosen as the rounded
constant, what remains is abs(E) rad and half a unit in the last place of d.

A convolution is a block as well: x is a window, one channel a neuron, and each tap of a reading convolution (or each
position of a flattened channel) is one row of W_out that sees its own x; the errors of the rows that belong to one
output add up. Where zeros are padded in, a row may see zeros instead of the units, so constants are no longer summed
into d: a channel that is 1 everywhere carries each row's constant through the padding, and the rows' errors add up
singly.

*Sound in floating point*: the stored arrays are exact in the working type (float64 for float32 networks, the long
double where it is longer for float64 ones); each product of matrices with n terms is off by at most gamma_n times the
product of the absolute values (Higham 2002, section 3.1), which is added to the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from exactprune.compress.deviation import gamma, inflated

_SMALL = 200_000  # products that are worth an exact comparison, or tuning
_LIFTS = (0.0, 0.5, 2.0, 8.0, 32.0)  # of units above 0, in what they vary, that are tried
_GRID = 5_000_000  # numbers that trying roundings may take
_STEPS = 1024  # units in the last place that a weight moves, at most


@dataclass(frozen=True, eq=False)
class Block:
    """k linear neurons in their place; arrays are exact copies of stored numbers.

    Attributes:
        w_in: (k, n); b_in: (k,).
        w_out: (q, k): one row per output and tap.
        owner: (q,), the output that each row belongs to, below m.
        b_out: (m,).
        lower, upper: (n,), sound bounds on x.
        gain: (m,), how much a unit of error there weighs at the network's output (a heuristic).
        dtype: of the network.
        linear: no ReLU stays between: new units may be negative.
        padded: zeros are padded in between, so each row may see zeros instead of the units: no constant may be summed
            over rows; the last unit is a channel that is 1, and its weights carry each row's constant.
    """

    w_in: np.ndarray
    b_in: np.ndarray
    w_out: np.ndarray
    owner: np.ndarray
    b_out: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    gain: np.ndarray
    dtype: np.dtype
    linear: bool
    padded: bool = False

    @property
    def work(self) -> type:
        """Working float type: wider than the stored numbers."""
        return np.float64 if self.dtype == np.float32 else np.longdouble

    @property
    def unit(self) -> float:
        """Unit roundoff of the working type."""
        return float(np.finfo(self.work).eps) / 2

    @cached_property
    def product(self) -> np.ndarray:
        """W_out W_in, (q, n), in the working type."""
        return self.w_out.astype(self.work) @ self.w_in.astype(self.work)

    @cached_property
    def mid(self) -> np.ndarray:
        """Centre of x; any centre is sound with ``rad``."""
        return ((self.lower.astype(self.work) + self.upper) / 2).astype(self.work)

    @cached_property
    def rad(self) -> np.ndarray:
        """Upper bound on the distance of x from ``mid``."""
        return np.nextafter(np.maximum(self.upper - self.mid, self.mid - self.lower), self.work(np.inf))

    def summed(self, rows: np.ndarray) -> np.ndarray:
        """Sum of the rows of each output: (q,) -> (m,)."""
        total = np.zeros(self.b_out.shape, rows.dtype)
        np.add.at(total, self.owner, rows)
        return total


@dataclass(frozen=True, eq=False)
class Units:
    """What takes the block's place, in the network's dtype: u = V x + c, then U u + d.

    Attributes:
        v: (r, n); c: (r,); u: (q, r); d: (m,).
        upper: (r,), sound upper bound on V x + c (float64); the lower one is 0 by construction where ReLU stays.
        lower: (r,).
    """

    v: np.ndarray
    c: np.ndarray
    u: np.ndarray
    d: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def placed(block: Block, v: np.ndarray, u: np.ndarray, *, tune: bool = True) -> Units:
    """Choose the biases for given (stored) V and U: c so that V x + c >= 0 on the enclosure, d to centre the error.

    Small blocks, with ``tune``: of several c, each with U tuned to what d cannot represent (``_tuned``), the one of least
    deviation.
    """
    if block.padded:
        return _with_constant_channel(block, v, u)
    ranged = ranges(block, v)
    best = _with_biases(block, v, u, ranged, 0.0)
    small = len(block.w_out) * block.w_in.size <= _SMALL and np.array_equal(block.owner, np.arange(len(u)))
    if not (tune and small and len(v)):
        return best
    tuned = [_tuned(block, _with_biases(block, v, u, ranged, lift)) for lift in _LIFTS]
    offers = [best, *tuned, *(_nearby(block, units) for units in tuned)]
    return min(offers, key=lambda units: float((deviation(block, units) * block.gain).max(initial=0.0)))


def _tuned(block: Block, units: Units) -> Units:
    """U moved by a few units in the last place, so that the constant comes out where d cannot make it.

    Where unit j is h_j in the middle of the domain and varies by rho_j, a step of its weight moves the constant by ulp h_j
    at the price of ulp rho_j, which is less the farther it is lifted. From coarse steps to fine ones.
    """
    with np.errstate(all="ignore"):
        constant, _ = _constant(block, units)
        rest = (constant - units.d).astype(np.float64)
        middle = (units.v.astype(block.work) @ block.mid + units.c).astype(np.float64)
        steps = np.spacing(np.abs(units.u)).astype(np.float64) * np.abs(middle)
        u = units.u.copy()
        rows = np.arange(len(u))
        for unit in np.argsort(-steps, axis=1).T:
            size = steps[rows, unit]
            count = np.clip(np.rint(np.divide(rest, size, out=np.zeros_like(rest), where=size > 0)), -_STEPS, _STEPS)
            moved = (u[rows, unit] + np.sign(middle[unit]) * count * np.spacing(np.abs(units.u[rows, unit]))).astype(block.dtype)
            rest -= (moved.astype(np.float64) - u[rows, unit].astype(np.float64)) * middle[unit]
            u[rows, unit] = moved
    return Units(units.v, units.c, u, units.d, units.lower, units.upper)


def _nearby(block: Block, units: Units) -> Units:
    """The best of all roundings nearby: every weight of a row of U moved by up to a few units in the last place.

    A row has as many weights as there are units, and often fewer inputs vary much: then some combination leaves far
    smaller errors than rounding each weight by itself does.
    """
    rows, count = units.u.shape
    reach = next((k for k in (3, 2, 1) if (2 * k + 1) ** count * block.w_in.shape[1] * rows <= _GRID), 0)
    if not reach:
        return units
    moves = np.indices((2 * reach + 1,) * count).reshape(count, -1).T.astype(np.float64) - reach
    v, rad = units.v.astype(np.float64), block.rad.astype(np.float64)
    with np.errstate(all="ignore"):
        error, _, _ = _products(block, units)
        rest = (_constant(block, units)[0] - units.d).astype(np.float64)
        middle = (units.v.astype(block.work) @ block.mid + units.c).astype(np.float64)
        steps = np.spacing(np.abs(units.u)).astype(np.float64)
        u = units.u.copy()
        for row in range(rows):
            change = moves * steps[row]
            cost = np.abs(error[row].astype(np.float64) - change @ v) @ rad + np.abs(rest[row] - change @ middle)
            u[row] = (units.u[row].astype(np.float64) + change[np.nan_to_num(cost, nan=np.inf).argmin()]).astype(block.dtype)
    return Units(units.v, units.c, u, units.d, units.lower, units.upper)


def _with_biases(block: Block, v: np.ndarray, u: np.ndarray, ranged: tuple[np.ndarray, np.ndarray], lift: float) -> Units:
    """The least biases c that keep the units at 0 and above, lifted by so many times what the units vary."""
    low, high = ranged
    least = np.zeros(len(v)) if block.linear else -low
    c = _at_least(least + lift * (high - low), block.dtype)
    zero = np.zeros(block.b_out.shape, block.dtype)
    with np.errstate(over="ignore"):
        d = _constant(block, Units(v, c, u, zero, low, high))[0].astype(block.dtype)
    shift = c.astype(np.float64)
    return Units(v, c, u, d, np.maximum(np.nextafter(low + shift, -np.inf), -np.inf if block.linear else 0.0),
                 np.nextafter(high + shift, np.inf))


def _with_constant_channel(block: Block, v: np.ndarray, u: np.ndarray) -> Units:
    """As ``placed`` where zeros are padded in: a channel that is 1 carries the constants, the biases stay."""
    low, high = ranges(block, v)
    c = np.zeros(len(v), block.dtype) if block.linear else _at_least(-low, block.dtype)
    bare = Units(v, c, u, block.b_out, low, high)
    with np.errstate(over="ignore"):
        constant = _row_constants(block, bare)[0].astype(block.dtype)
    v = np.concatenate([v, np.zeros((1, v.shape[1]), block.dtype)])
    shift, one = c.astype(np.float64), np.ones(1)
    lower = np.maximum(np.nextafter(low + shift, -np.inf), -np.inf if block.linear else 0.0)
    return Units(v, np.append(c, block.dtype.type(1)), np.concatenate([u, constant[:, None]], axis=1),
                 block.b_out.copy(), np.concatenate([lower, one]),
                 np.concatenate([np.nextafter(high + shift, np.inf), one]))


def ranges(block: Block, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sound bounds of V x over the enclosure, float64."""
    wide = v.astype(block.work)
    size = np.abs(wide)
    centre, spread = wide @ block.mid, size @ block.rad
    slack = gamma(2 * wide.shape[1] + 8, block.unit) * (size @ np.abs(block.mid) + spread)
    low, high = centre - spread - 2 * slack, centre + spread + 2 * slack
    return _down(low), -_down(-high)


def _down(values: np.ndarray) -> np.ndarray:
    return np.nextafter(values.astype(np.float64), -np.inf)


def _at_least(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The next number of ``dtype`` at or above each value."""
    rounded = values.astype(dtype)
    return np.where(rounded < values, np.nextafter(rounded, dtype.type(np.inf)), rounded).astype(dtype)


def _products(block: Block, new: Units) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E as computed, and |W_out||W_in| h + |U||V| h for h = |mid| and h = rad, what its errors scale with."""
    w_out, w_in, u, v = (a.astype(block.work) for a in (block.w_out, block.w_in, new.u, new.v))
    error = block.product - u @ v
    ends = np.stack([np.abs(block.mid), block.rad], axis=1)
    size = np.abs(w_out) @ (np.abs(w_in) @ ends) + np.abs(u) @ (np.abs(v) @ ends)
    return error, size[:, 0], size[:, 1]


def _constant(block: Block, new: Units) -> tuple[np.ndarray, np.ndarray]:
    """E mid + e_0 without d, per output, and the size that its rounding error multiplies."""
    rows, sizes = _row_constants(block, new)
    return block.summed(rows) + block.b_out, block.summed(sizes) + np.abs(block.b_out).astype(block.work)


def _row_constants(block: Block, new: Units) -> tuple[np.ndarray, np.ndarray]:
    """The same per row, without b_out."""
    error, size, _ = _products(block, new)
    w_out, u = block.w_out.astype(block.work), new.u.astype(block.work)
    b_in, c = block.b_in.astype(block.work), new.c.astype(block.work)
    rows = error @ block.mid + w_out @ b_in - u @ c
    sizes = size + np.abs(error) @ np.abs(block.mid) + np.abs(w_out) @ np.abs(b_in) + np.abs(u) @ np.abs(c)
    return rows, sizes


def _rational(array: np.ndarray) -> np.ndarray:
    exact = np.empty(array.shape, object)
    exact.ravel()[:] = [Fraction(float(value)) for value in array.ravel()]
    return exact


def identical(block: Block, new: Units) -> bool:
    """Whether E = 0 and e_0 = 0 exactly; tried where float arithmetic shows no difference and the block is small."""
    if block.padded or len(block.w_out) * block.w_in.size > _SMALL or _products(block, new)[0].any():
        return False
    if (_constant(block, new)[0] != new.d).any():
        return False
    w_out, w_in, b_in, b_out = (_rational(a) for a in (block.w_out, block.w_in, block.b_in, block.b_out))
    u, v, c, d = (_rational(a) for a in (new.u, new.v, new.c, new.d))
    rest = b_out - d
    for owner, row in zip(block.owner, w_out.dot(b_in) - u.dot(c), strict=True):
        rest[owner] += row
    return not (w_out.dot(w_in) - u.dot(v)).any() and not rest.any()


def deviation(block: Block, new: Units) -> np.ndarray:
    """Sound bound, per output and over the enclosure, on the change that replacing the block makes; float64 (m,).

    Infinite where a stored number overflowed; 0 where small blocks are found to be identical in rationals.
    """
    arrays = (new.v, new.c, new.u, new.d)
    if not all(np.isfinite(a).all() for a in arrays):
        return np.full(block.b_out.shape, np.inf)
    if identical(block, new):
        return np.zeros(block.b_out.shape)
    n = block.w_in.shape[0] + new.v.shape[0] + 3 * block.w_in.shape[1] + len(block.owner) + 16
    error, _, size = _products(block, new)
    rows = np.abs(error) @ block.rad + gamma(n, block.unit) * size
    if block.padded:
        centre, centre_size = _row_constants(block, new)
        total = block.summed(np.abs(centre) + gamma(n, block.unit) * centre_size + rows)
    else:
        centre, centre_size = _constant(block, new)
        total = np.abs(centre - new.d) + gamma(n, block.unit) * (centre_size + np.abs(new.d)) + block.summed(rows)
    total = total * (1 + 2 * gamma(n, block.unit))
    return inflated(np.nextafter(total.astype(np.float64), np.inf), 4)
