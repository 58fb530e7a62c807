"""GraSP: keep the gradient flow. S(-w) = -w * (H g), and the weights with the *largest* S go.

C. Wang, G. Zhang, R. Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020, Eq. 8
and Algorithm 1. Removing weight w changes the squared gradient norm by about -2 w (H g); a removal that *increases*
gradient flow has a large S. Scores here are larger for what is kept, so the score is w * (H g), the negative of S,
divided by the absolute value of its sum over all weights (the division changes no ranking).

Choices left open: logits are divided by T = 200 (the paper's code) in both gradients; g comes from the same data and T;
H and g run over the prunable weights only, not the biases. At T = 200 scores are near 1e-6 before the
division, where the reference implementations add 1e-10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from exactprune.pruners.gradients import gradient, hessian_vector
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import ScoreOptions, ScorePruner, require
from exactprune.pruners.selection import flatten


@dataclass(frozen=True)
class GraspOptions(ScoreOptions):
    """Options of ``grasp``.

    Attributes:
        temperature: divisor of the logits.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", self.temperature, "a number > 0")


class Grasp(ScorePruner[GraspOptions]):
    """Gradient signal preservation."""

    name: ClassVar[str] = "grasp"
    when: ClassVar[str] = "before training"
    reference: ClassVar[str] = "Wang et al. 2020, Eq. 8"
    Options = GraspOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """w * (H g), divided by the absolute value of its sum."""
        slopes = gradient(problem, self.options.temperature)
        product = hessian_vector(problem, slopes, self.options.temperature)
        flow = {name: w * product[name] for name, w in problem.weights.items()}
        total = flatten(flow.values()).sum().abs()
        return {name: f / total if total > 0 else f for name, f in flow.items()}
