"""Rule ``dependence``: a linear neuron whose weights are an exact combination of other linear neurons' weights.

If z_j = sum_i c_i z_i + c_0 for all inputs, and j and all i are stably active, then what reads y_j = z_j can read
sum_i c_i y_i + c_0: the outgoing weights become w_i + c_i w_j, the next bias takes c_0 w_j over, and j goes (Serra, Yu, Kumar
and Ramalingam 2021, "Scaling Up Exact Neural Network Compression by ReLU Stability", section 4). Here it is done where all of
that is exact: the c are rationals, and every new weight and bias is a number of the dtype. Where zeros are padded in between,
c_0 has to be 0.

Found in floating point: rows are projected on random directions (which keeps their rank) and go through Gram and Schmidt from
short to long (short rows have small coefficients); what is left over of a dependent row is next to nothing. Verified in integers:
the coefficients are rounded to rationals with small denominators, and sum_i c_i w_i - w_j has to be 0 exactly. If j cannot
go because a new weight would round, another neuron of the same relation may.

Level: ``exact``, deviation 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import numpy as np
from scipy.linalg import solve_triangular

from exactprune.checker import dyadic
from exactprune.compress.exact import exact_product, exact_sum, representable

_LEFT = 1e-7  # of a row of length 1, that is next to nothing
_DENOMINATOR = 4096  # of a coefficient, at most
_FAILURES = 8  # dependent rows in a turn that turn out not to be, after which no more are looked at
Relation = Mapping[int, Fraction]  # sum of relation[i] * w_i is 0


@dataclass(frozen=True, eq=False)
class Linear:
    """Channels that are linear on the domain, in their place.

    Attributes:
        w_in: (k, n), what they read; b_in: k rationals.
        w_out: (q, k), one row per output and tap; owner: (q,), the output that each row belongs to.
        b_out: (m,).
        padded: whether zeros are padded in between: no constant may go into b_out.
    """

    w_in: np.ndarray
    b_in: Sequence[Fraction]
    w_out: np.ndarray
    owner: np.ndarray
    b_out: np.ndarray
    padded: bool


@dataclass(eq=False)
class Taken:
    """What the readers become: channels that go, the new weights (q, k) and biases (m,), exact numbers of the dtype."""

    w_out: np.ndarray
    b_out: np.ndarray
    gone: list[int] = field(default_factory=list)


def dependents(given: Linear) -> Taken | None:
    """Remove dependent channels one by one; None where there are none that can go."""
    if not suspected(given.w_in):
        return None
    taken, rows, failures = Taken(given.w_out.copy(), given.b_out.copy()), _Rows(given.w_in), 0
    for j, coefficients in rows.dependent():
        relation = rows.verified(j, coefficients)
        gone = None if relation is None else _remove(given, taken, relation, j)
        failures = 0 if gone is not None else failures + 1
        if gone is not None:
            rows.without(gone, j)
        if failures >= _FAILURES:
            break
    return taken if taken.gone else None


def suspected(w_in: np.ndarray) -> bool:
    """A quick look: whether the rows may be dependent at all."""
    k, n = w_in.shape
    if k < 2 or k > n:
        return k >= 2
    return bool(np.abs(np.diag(np.linalg.qr(_projected(w_in)[0].T, mode="r"))).min() < _LEFT)


def _projected(w_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length 1 on random directions, and their lengths."""
    wide = w_in.astype(np.float64)
    size = np.linalg.norm(wide, axis=1)
    unit = np.divide(wide, size[:, None], out=np.zeros_like(wide), where=size[:, None] > 0)
    k, n = w_in.shape
    if n > k + 8:
        unit = unit @ np.random.default_rng(0).standard_normal((n, k + 8)) / np.sqrt(k + 8)
    return unit, size


class _Rows:
    """Rows that go through Gram and Schmidt one after the other.

    Attributes:
        basis: indices of rows that were independent, in order; ``q`` (rows, directions) and ``r`` of their decomposition.
    """

    def __init__(self, w_in: np.ndarray) -> None:
        self.projected, self.size = _projected(w_in)
        self.whole = dyadic.exact_int(w_in.astype(np.float64))[0]
        self.basis: list[int] = []
        most = min(self.projected.shape)
        self.q, self.r = np.zeros((most, self.projected.shape[1])), np.zeros((most, most))

    def dependent(self) -> Iterator[tuple[int, np.ndarray]]:
        """Rows that look dependent on ``basis``, from short to long, with their coefficients in it."""
        for j in np.argsort(self.size, kind="stable").tolist():
            count, row = len(self.basis), self.projected[j]
            first = self.q[:count] @ row
            rest = row - first @ self.q[:count]
            again = self.q[:count] @ rest
            rest, first = rest - again @ self.q[:count], first + again
            left = float(np.linalg.norm(rest))
            if left < _LEFT or count == len(self.q):
                found = solve_triangular(self.r[:count, :count], first) if count else first
                yield j, found * self.size[j] / self.size[self.basis]
            else:
                self.q[count], self.r[:count, count], self.r[count, count] = rest / left, first, left
                self.basis.append(j)

    def verified(self, j: int, coefficients: np.ndarray) -> Relation | None:
        """The relation of row j to the basis in rationals, if there is one."""
        relation = {j: Fraction(-1)}
        for i in np.flatnonzero(np.abs(coefficients) > _LEFT * self.size[j] / self.size[self.basis]).tolist():
            exact = Fraction(float(coefficients[i])).limit_denominator(_DENOMINATOR)
            if abs(float(exact) - coefficients[i]) > _LEFT * (1 + abs(coefficients[i])):
                return None
            relation[self.basis[i]] = exact
        scale = lcm(*(c.denominator for c in relation.values()))
        total = sum(self.whole[i].astype(object) * int(c * scale) for i, c in relation.items())
        return None if np.any(total) else {i: c for i, c in relation.items() if c}

    def without(self, gone: int, j: int) -> None:
        """Row ``gone`` left; j takes its place if it was in the basis."""
        if gone != j:
            self.basis[self.basis.index(gone)] = j
            count = len(self.basis)
            q, r = np.linalg.qr(self.projected[self.basis].T)
            self.q[:count], self.r[:count, :count] = q.T, r


def _remove(given: Linear, taken: Taken, relation: Relation, j: int) -> int | None:
    """Let one channel of a relation go, j if it can, and the others take over; None where none can."""
    simple = sorted(relation, key=lambda i: (i != j, _complexity(relation[i]), i))
    for gone in simple:
        others = {i: -c / relation[gone] for i, c in relation.items() if i != gone}
        columns = {i: _grown(taken.w_out[:, i], taken.w_out[:, gone], c) for i, c in others.items()}
        constant = given.b_in[gone] - sum((c * given.b_in[i] for i, c in others.items()), Fraction(0))
        bias = None if constant and given.padded else _shifted(given, taken, gone, constant)
        if bias is not None and all(column is not None for column in columns.values()):
            for i, column in columns.items():
                taken.w_out[:, i] = column
            taken.w_out[:, gone], taken.b_out = 0, bias
            taken.gone.append(gone)
            return gone
    return None


def _complexity(c: Fraction) -> int:
    """1 for powers of two, whose inverse multiplies floats exactly."""
    odd = abs(c.numerator)
    return odd // (odd & -odd)


def _grown(kept: np.ndarray, gone: np.ndarray, c: Fraction) -> np.ndarray | None:
    """kept + c * gone in the dtype, or None where a number rounds."""
    factor = float(c)
    if Fraction(factor) != c:
        return _grown_slowly(kept, gone, c)
    product, fine = exact_product(gone.astype(np.float64), np.full(len(gone), factor))
    total, also = exact_sum(kept.astype(np.float64), product)
    with np.errstate(over="ignore"):
        stored = total.astype(kept.dtype)
    return stored if bool((fine & also & (stored == total)).all()) else None


def _grown_slowly(kept: np.ndarray, gone: np.ndarray, c: Fraction) -> np.ndarray | None:
    found = kept.copy()
    for row in np.flatnonzero(gone):
        total = Fraction(float(kept[row])) + c * Fraction(float(gone[row]))
        if not representable(total, kept.dtype):
            return None
        found[row] = float(total)
    return found


def _shifted(given: Linear, taken: Taken, gone: int, constant: Fraction) -> np.ndarray | None:
    """The biases with the constant of one channel taken over, or None where one rounds."""
    if not constant:
        return taken.b_out
    weights: dict[int, Fraction] = {}
    for row in np.flatnonzero(taken.w_out[:, gone]).tolist():
        owner = int(given.owner[row])
        weights[owner] = weights.get(owner, Fraction(0)) + Fraction(float(taken.w_out[row, gone]))
    found = taken.b_out.copy()
    for owner, weight in weights.items():
        total = Fraction(float(found[owner])) + weight * constant
        if not representable(total, found.dtype):
            return None
        found[owner] = float(total)
    return found
