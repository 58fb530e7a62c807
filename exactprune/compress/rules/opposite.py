"""Rule ``opposite``: of two neurons with z_j = -t z_i, one becomes linear.

For t > 0, relu(z_j) = z_j + relu(-z_j) = z_j + t relu(z_i): neuron j is the line z_j plus a multiple of its opposite. The line
joins the stably active neurons of its layer and is merged with them (``rules.merge``), i takes over t w_j. This pays
when lines are cheap: p such pairs need at most rank(W_out W_in) linear units for p neurons (relu(z) - relu(-z) = z is the
case in which one of them is 0). With abs(z_j + t z_i) <= gap on the domain the change is bounded as in ``rules.duplicate``.

Level: ``certified(eps)``, as part of a merge. Verdicts are not used, but *unknown* neurons are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from exactprune.compress.block import Block
from exactprune.compress.rules.duplicate import Twin, taken_over, twins


@dataclass(frozen=True, eq=False)
class Opposites:
    """Neurons that become lines, and what their opposites take over.

    Attributes:
        gone: (p,) indices of the neurons that become lines.
        columns: index of a neuron that stays -> its new outgoing weights (q,).
        error: (q,) bound on the change of each row, float64.
    """

    gone: np.ndarray
    columns: dict[int, np.ndarray]
    error: np.ndarray


def opposites(block: Block, budget: float, spared: np.ndarray, reach: np.ndarray) -> Opposites:
    """All pairs of a layer, given as a block of all its neurons.

    Args:
        block: the layer.
        budget: deviation of the output that is allowed.
        spared: (k,) booleans, neurons to leave alone.
        reach: (k,) upper bound of relu(z) of each neuron.
    """
    by_kept: dict[int, list[Twin]] = {}
    for twin in twins(block, budget, spared, sign=-1):
        by_kept.setdefault(twin.kept, []).append(replace(twin, ratio=-twin.ratio))
    columns, error = {}, np.zeros(len(block.w_out))
    for kept, gone in by_kept.items():
        columns[kept], change = taken_over(block, kept, gone, float(reach[kept]))
        error = error + change
    return Opposites(np.array(sorted(t.gone for ts in by_kept.values() for t in ts), int), columns, error)
