"""Bounds of a pre-activation over the triangle relaxation, with the multipliers that prove them.

The LP is ``formulations.bigm`` without phases. Let y be the row duals in the convention reduced costs = c - A'y, and
let row (j, i), scaled by r, define neuron i of layer j: r (form - z + s) = r const. In the Lagrangian the form
appears with the coefficient -r y: that is the multiplier ``a`` of the certificate (docs/certificate.md), and what is
left of the neuron, max of v z - a (z - s) over its triangle, is the certificate's ``c``. So the LP bound and the
certificate's bound at these multipliers are the same number, up to rounding and to the active neurons' own columns
(Salman et al., *A convex relaxation barrier to tight robustness verification*, 2019; Wong and Kolter, 2018).
Multipliers are hints: wrong ones cost a proof, never soundness.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exactprune.deciders.highs import HighsOptions, HighsOutcome, SolveStatus, WarmLP
from exactprune.domain import Box
from exactprune.formulations.arrays import RowKind
from exactprune.formulations.bigm import BigM, build
from exactprune.network import Network

SideName = Literal["upper", "lower"]


@dataclass(frozen=True, eq=False)
class LayerMultipliers:
    """Multipliers of some neurons of one layer.

    Attributes:
        neurons: flat indices, ascending.
        values: the multiplier ``a`` of each, float64.
    """

    neurons: np.ndarray
    values: np.ndarray

    def dense(self, size: int) -> np.ndarray:
        """All neurons of the layer, NaN where the LP has no multiplier (the fixed slopes serve there)."""
        result = np.full(size, np.nan)
        result[self.neurons] = self.values
        return result


@dataclass(frozen=True, eq=False)
class LpBound:
    """An LP bound and its proof.

    Attributes:
        layer, neuron, side: whose upper or lower bound.
        value: suggested bound on z_hat from above (side "upper") or below; infinite when nothing is known.
        multipliers: ReLU layer -> multipliers, for bounding the maximum of z_hat ("upper") or of -z_hat ("lower").
        point: the input of the LP solution, a starting point for a witness search; None without one.
        outcome: the solve.
    """

    layer: int
    neuron: int
    side: SideName
    value: float
    multipliers: Mapping[int, LayerMultipliers]
    point: np.ndarray | None
    outcome: HighsOutcome

    @property
    def reason(self) -> str:
        """Why there is no proof, empty when there is one."""
        return "" if np.isfinite(self.value) else f"HiGHS: {self.outcome.reason or self.outcome.status.value}"


class LayerLP:
    """LP bounds for the neurons of one layer, one warm LP: objective and phases change, rows stay."""

    def __init__(self, network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], layer: int,
                 neurons: np.ndarray | None = None, options: HighsOptions | None = None,
                 cancel: threading.Event | None = None) -> None:
        self._model = build(network, box, lower, upper, target=layer, neurons=neurons, binaries=False)
        self._layer = layer
        self._lp = WarmLP(self._model.arrays, "max", options, cancel)

    @property
    def model(self) -> BigM:
        """The LP's arrays and their meaning."""
        return self._model

    def bound(self, neuron: int, side: SideName, phases: Mapping[tuple[int, int], bool] | None = None,
              time_limit: float | None = None) -> LpBound:
        """Bound one side of one neuron, optionally in a leaf {(layer, neuron): active?} of a phase tree.

        A leaf without points (the LP is infeasible) has multipliers too, from a Farkas proof: they prove that
        ``value``, a number < 0 ("upper") or > 0 ("lower"), bounds z_hat there, which is all that a tree needs.
        """
        sign = 1.0 if side == "upper" else -1.0
        c, offset = self._model.objective(neuron)
        low, high = self._model.phases(phases) if phases else (None, None)
        outcome = self._lp.solve(sign * c, sign * offset, low, high, time_limit)
        multipliers = multipliers_of(self._model, outcome.row_duals) if outcome.row_duals is not None else {}
        point = self._model.point(outcome.x) if outcome.x is not None else None
        value = sign * (outcome.dual_bound if outcome.status is not SolveStatus.ERROR else np.inf)
        return LpBound(self._layer, neuron, side, value, multipliers, point, outcome)


def multipliers_of(model: BigM, row_duals: np.ndarray) -> dict[int, LayerMultipliers]:
    """The certificate's multipliers from row duals: a = -r y of every defining row, by layer."""
    rows = model.arrays.rows
    defining = rows.kind == RowKind.DEFINITION
    values = -row_duals * rows.scale
    result = {}
    for layer in np.unique(rows.layer[defining]):
        here = np.flatnonzero(defining & (rows.layer == layer))
        here = here[np.argsort(rows.index[here], kind="stable")]
        result[int(layer)] = LayerMultipliers(rows.index[here], values[here])
    return result


def lp_multipliers(network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], layer: int,
                   neurons: Iterable[int], side: SideName, options: HighsOptions | None = None) -> list[LpBound]:
    """LP bounds with multipliers for some neurons of one layer; ``lower``/``upper`` bound every layer before it."""
    chosen = np.fromiter(neurons, np.int64)
    lp = LayerLP(network, box, lower, upper, layer, chosen, options)
    return [lp.bound(int(neuron), side) for neuron in chosen]
