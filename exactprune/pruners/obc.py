"""Layer-wise OBS, known as Optimal Brain Compression (its pruning half, ExactOBS).

E. Frantar, S. P. Singh, D. Alistarh, "Optimal brain compression: a framework for accurate post-training quantization and
pruning", NeurIPS 2022, Eqs. 2-3 and Algorithms 1 and 2; layer-wise OBS goes back to X. Dong, S. Chen, S. Pan, "Learning to
prune deep neural networks via layer-wise optimal brain surgeon", NeurIPS 2017. The output error of a layer is a sum
over rows that share H, so each row is pruned greedily by exact OBS to the end,

    q = argmin w_q^2 / [H^-1]_qq,   w <- w - w_q / [H^-1]_qq (H^-1)_:q,   H^-1 <- H^-1 - (H^-1)_:q (H^-1)_q: / [H^-1]_qq,

recording the error of every step; then the cheapest steps of all rows together say how many weights each row loses, and
the row is taken from its own trace at that length (Algorithm 2).

Choices left open: ``damping`` times the mean of diag(H) is added (0 as in the authors' default), before
dead inputs are looked for, so that with damping their weights cost something; steps of equal error go in
the order of rows. Of a trace only the order and the errors are kept (``sweep``): at its length, a row is the joint minimiser
over what stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.layerwise import LayerPruner, Tick, damped, input_moments, inverse, positive_definite, without_dead
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import require
from exactprune.pruners.selection import smallest
from exactprune.pruners.sweep import Trace, rows_at_once, settle, sweep


@dataclass(frozen=True)
class ObcOptions:
    """Options of ``obc``.

    Attributes:
        damping: times the mean of the diagonal of H, added to it.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        require(self.damping >= 0, "damping", self.damping, "a number >= 0")


class Obc(LayerPruner[ObcOptions]):
    """Exact layer-wise OBS."""

    name: ClassVar[str] = "obc"
    reference: ClassVar[str] = "Frantar et al. 2022, Alg. 1-2"
    Options = ObcOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """Error of every single deletion, w_q^2 / (2 [H^-1]_qq)."""
        scores = {}
        for name, moment in input_moments(problem).items():
            weight = problem.weights[name]
            hessians = [damped(h, self.options.damping) for h in 2 / len(problem.inputs) * moment]
            diagonals = torch.stack([inverse(without_dead(weight.flatten(1), h)[1]).diagonal() for h in hessians])
            rows = diagonals.repeat_interleave(len(weight) // len(diagonals), 0)
            scores[name] = weight.square() / (2 * rows.view_as(weight))
        return scores

    def prune_rows(self, weight: Tensor, hessian: Tensor, number: int, tick: Tick) -> tuple[Tensor, Tensor]:
        """Sweep all rows to the end for the errors, then take each row at its length."""
        weight, hessian = without_dead(weight, damped(hessian, self.options.damping))
        hessian = positive_definite(hessian)
        trace = traces(weight, torch.cholesky_inverse(torch.linalg.cholesky(hessian)), tick)
        lengths = torch.bincount(smallest(trace.errors.flatten(), number) // weight.shape[1], minlength=len(weight))
        keep = torch.ones_like(weight, dtype=torch.bool)
        for row, order, length in zip(keep, trace.order, lengths.tolist()):
            row[order[:length]] = False
        return keep, torch.stack([settle(w, hessian, ~stay) for w, stay in zip(weight, keep)])


def traces(weight: Tensor, inverse_: Tensor, tick: Tick) -> Trace:
    """``sweep`` of rows that share an inverse."""
    parts = []
    for rows in weight.split(rows_at_once(weight.shape[1])):
        parts.append(sweep(rows, inverse_.repeat(len(rows), 1, 1)))
        tick(len(rows))
    return Trace(*(torch.cat(side) for side in zip(*parts)))
