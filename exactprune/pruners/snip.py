"""SNIP: connection sensitivity s_j = abs(w_j dL/dw_j) / sum_k abs(w_k dL/dw_k).

N. Lee, T. Ajanthan, P. Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019, Eqs. 5
and 6. With c a multiplicative gate on w, dL/dc at c = 1 is w dL/dw. The absolute value is taken after summing over the
batch, and weights of all layers are ranked together, before training. Choices left open: the number of batches (all
given data are one batch here) and the initialisation (the module's own).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from exactprune.pruners.gradients import gradient
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import ScoreOptions, ScorePruner
from exactprune.pruners.selection import flatten


class Snip(ScorePruner[ScoreOptions]):
    """Single-shot pruning by connection sensitivity."""

    name: ClassVar[str] = "snip"
    when: ClassVar[str] = "before training"
    reference: ClassVar[str] = "Lee et al. 2019, Eq. 6"
    Options = ScoreOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """Normalised connection sensitivity."""
        slopes = gradient(problem)
        sensitivity = {name: (w * slopes[name]).abs() for name, w in problem.weights.items()}
        total = flatten(sensitivity.values()).sum()
        return {name: s / total if total > 0 else s for name, s in sensitivity.items()}
