"""A mixed-integer linear program as arrays, with the meaning of every row and column.

    maximise or minimise  c . y + offset   subject to   row_lower <= A y <= row_upper,  col_lower <= y <= col_upper

Columns are normalised: every continuous column runs from 0 to 1 and stands for ``shift + scale * y``; rows are
divided by a power of two so that their largest coefficient lies in [1, 2). Solver tolerances are absolute, so this
makes them relative to the range of each neuron. (Tolerances and scaling: Klotz and Newman, *Practical guidelines for
solving difficult mixed integer linear programs*, 2013.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np

from exactprune.ops import frozen

TINY = 2.0**-26


class Kind(IntEnum):
    """What a column stands for. With z_hat the pre-activation: z = max(z_hat, 0), slack = max(-z_hat, 0)."""

    INPUT = 0
    Z = 1
    SLACK = 2
    PHASE = 3
    ACTIVE = 4
    POOL = 5
    CHOICE = 6
    SEEN_ACTIVE = 7
    SEEN_INACTIVE = 8


class RowKind(IntEnum):
    """What a row says."""

    DEFINITION = 0
    TRIANGLE = 1
    PHASE = 2
    POOL = 3
    INDICATOR = 4


@dataclass(frozen=True, eq=False)
class Columns:
    """Meaning of the columns; all arrays have one entry a column.

    Attributes:
        kind: values of ``Kind``.
        layer: ReLU layer, or node position for a max pool; -1 for inputs.
        index: flat index of the neuron or input.
        shift, scale: the quantity is ``shift + scale * y``.
    """

    kind: np.ndarray
    layer: np.ndarray
    index: np.ndarray
    shift: np.ndarray
    scale: np.ndarray

    def where(self, kind: Kind, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(columns, neuron indices) of one kind in one layer, in order of the neurons."""
        found = np.flatnonzero((self.kind == kind) & (self.layer == layer))
        return found, self.index[found]


@dataclass(frozen=True, eq=False)
class Rows:
    """Meaning of the rows; all arrays have one entry a row.

    Attributes:
        kind: values of ``RowKind``.
        layer, index: the neuron, as in ``Columns``.
        scale: what the row was multiplied by.
    """

    kind: np.ndarray
    layer: np.ndarray
    index: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, eq=False)
class MilpArrays:
    """The program. Without ``integrality`` (see ``relaxed``) it is its LP relaxation.

    Attributes:
        c: objective, shape (columns,), and ``offset``, a number.
        A: CSR array of shape (rows, columns), float64.
        row_lower, row_upper, col_lower, col_upper: float64, infinities allowed in rows.
        integrality: uint8, 1 where a column is an integer.
        columns, rows: what they mean.
    """

    c: np.ndarray
    offset: float
    A: Any
    row_lower: np.ndarray
    row_upper: np.ndarray
    col_lower: np.ndarray
    col_upper: np.ndarray
    integrality: np.ndarray
    columns: Columns
    rows: Rows

    def __post_init__(self) -> None:
        for name in ("c", "row_lower", "row_upper", "col_lower", "col_upper"):
            object.__setattr__(self, name, frozen(np.asarray(getattr(self, name), np.float64)))
        object.__setattr__(self, "integrality", frozen(np.asarray(self.integrality, np.uint8)))

    @property
    def binaries(self) -> int:
        """Number of integer columns."""
        return int(self.integrality.sum())

    def relaxed(self) -> MilpArrays:
        """The LP relaxation: the same arrays without integrality."""
        return replace(self, integrality=np.zeros_like(self.integrality))

    def with_objective(self, c: np.ndarray, offset: float = 0.0) -> MilpArrays:
        """The same constraints under another objective."""
        return replace(self, c=c, offset=float(offset))

    def with_bounds(self, col_lower: np.ndarray, col_upper: np.ndarray) -> MilpArrays:
        """The same program over other column bounds (a branch-and-bound node)."""
        return replace(self, col_lower=col_lower, col_upper=col_upper)

    def __repr__(self) -> str:
        return (f"MilpArrays({self.A.shape[0]} rows, {self.A.shape[1]} columns, {self.A.nnz} nonzeros, "
                f"{self.binaries} integers)")


def power_of_two_below(value: np.ndarray) -> np.ndarray:
    """The largest power of two <= value, elementwise; 1 where value is 0 or not finite."""
    safe = np.where(np.isfinite(value) & (value > 0), value, 1.0)
    return np.exp2(np.frexp(safe)[1] - 1.0)


def scaled(matrix: Any, lower: np.ndarray, upper: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Rows divided by a power of two so that their largest coefficient is in [1, 2) (exact), and freed of tiny ones.

    A coefficient below ``TINY`` after scaling is dropped, and the row is widened by all that it could contribute over
    columns in [0, 1]. So the result is a relaxation: a bound from it stays a bound. (Solvers drop such coefficients
    silently, without widening: HiGHS below 1e-9.)

    Returns:
        (matrix, lower, upper, factor of each row).
    """
    from scipy import sparse

    matrix = sparse.csr_array(matrix)
    largest = abs(matrix).max(axis=1).toarray().ravel() if matrix.nnz else np.zeros(matrix.shape[0])
    factor = 1.0 / power_of_two_below(largest)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    data = matrix.data * factor[rows]
    tiny = np.abs(data) < TINY
    most = np.bincount(rows[tiny], np.maximum(data[tiny], 0), matrix.shape[0])
    least = np.bincount(rows[tiny], np.minimum(data[tiny], 0), matrix.shape[0])
    kept = sparse.csr_array((data[~tiny], (rows[~tiny], matrix.indices[~tiny])), shape=matrix.shape)
    return kept, lower * factor - most, upper * factor - least, factor
