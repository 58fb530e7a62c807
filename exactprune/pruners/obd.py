"""Optimal Brain Damage: s_i = h_ii w_i^2 / 2.

Y. LeCun, J. Denker, S. Solla, "Optimal brain damage", NeurIPS 1989, Eqs. 2-5: the rise of the loss when weight i goes, for
a diagonal Hessian at a minimum. h is the exact diagonal of the mean loss's Hessian by default; the Gauss-Newton
approximation (the paper's Eq. 9 drops the same term) or the empirical Fisher matrix can be chosen.

Choices left open: all layers are ranked together; ``steps`` repeats (prune a part, measure h again) without the paper's
retraining in between; step i removes the fraction i / steps of what is to go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from exactprune.pruners.curvature import CURVATURES, Curvature, diagonal
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, ScoreOptions, apply, gone, require
from exactprune.pruners.selection import keep_largest


@dataclass(frozen=True)
class ObdOptions(ScoreOptions):
    """Options of ``obd``.

    Attributes:
        curvature: hessian, gauss-newton or fisher.
        steps: number of rounds of measuring and removing.
    """

    curvature: Curvature = "hessian"
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.curvature in CURVATURES, "curvature", self.curvature, ", ".join(CURVATURES))
        require(self.steps >= 1, "steps", self.steps, "a whole number >= 1")


class Obd(Pruner[ObdOptions]):
    """Optimal Brain Damage."""

    name: ClassVar[str] = "obd"
    reference: ClassVar[str] = "LeCun et al. 1989, Eq. 5"
    Options = ObdOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """h_ii w_i^2 / 2."""
        h = diagonal(problem, self.options.curvature)
        return {name: h[name] * w.square() / 2 for name, w in problem.weights.items()}

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """``steps`` rounds; removed weights are zero when the rest is measured again."""
        now, plan = problem, None
        for step in range(1, self.options.steps + 1):
            scores = self.score(now)
            masks = keep_largest(scores, sparsity * step / self.options.steps, self.options.scope, gone(now))
            plan = Plan(masks, scores=scores)
            if step < self.options.steps:
                now = replace(problem, module=apply(problem.module, plan), previous=masks)
        assert plan is not None
        return plan
