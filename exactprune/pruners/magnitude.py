"""Magnitude pruning: s = abs(w).

S. Han, J. Pool, J. Tran, W. Dally, "Learning both weights and connections for efficient neural networks", NeurIPS 2015
(per layer); ranked over all layers by default here, as in S. Janowsky, Phys. Rev. A 39 (1989) and most later work.
Choices left open: the paper sets a threshold per layer; here the number of weights is what is set.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import ScoreOptions, ScorePruner


class Magnitude(ScorePruner[ScoreOptions]):
    """Magnitude pruning."""

    name: ClassVar[str] = "magnitude"
    reference: ClassVar[str] = "Han et al. 2015"
    data = "none"
    Options = ScoreOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """abs(w)."""
        return {name: weight.abs() for name, weight in problem.weights.items()}
