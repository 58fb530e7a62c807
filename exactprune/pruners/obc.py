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
the order of rows. Traces are not stored: a second sweep stops each row at its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.layerwise import LayerPruner, damped, input_moments, inverse, without_dead
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import require
from exactprune.pruners.selection import smallest

WORKSPACE = 2**29


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

    def prune_rows(self, weight: Tensor, hessian: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Sweep all rows to the end for the errors, then to each row's length for the weights."""
        weight, hessian = without_dead(weight, damped(hessian, self.options.damping))
        h_inv = inverse(hessian)
        rows, columns = weight.shape
        most = max(1, WORKSPACE // (8 * columns * columns))
        whole = torch.full((rows,), columns, device=weight.device)
        errors = torch.cat([_sweep(w, h_inv, n)[0] for w, n in zip(weight.split(most), whole.split(most))])
        lengths = torch.bincount(smallest(errors.flatten(), number) // columns, minlength=rows)
        parts = [_sweep(w, h_inv, n) for w, n in zip(weight.split(most), lengths.split(most))]
        return torch.cat([keep for _, _, keep in parts]), torch.cat([w for _, w, _ in parts])


def _sweep(weight: Tensor, h_inv: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy OBS on a batch of rows, row i for ``lengths[i]`` steps.

    Returns:
        The error of every step (rows, K), the weights afterwards, and the mask of those that stay.
    """
    w, inverse_ = weight.clone(), h_inv.expand(len(weight), -1, -1).clone()
    keep = torch.ones_like(w, dtype=torch.bool)
    errors = torch.zeros_like(w)
    every = torch.arange(len(w), device=w.device)
    for step in range(int(lengths.max())):
        diagonal = inverse_.diagonal(dim1=1, dim2=2)
        cost = (w.square() / diagonal).masked_fill(~keep, torch.inf)
        q = cost.argmin(1)
        errors[:, step] = cost[every, q] / 2
        on = step < lengths
        row, pivot = inverse_[every, q], diagonal[every, q].clone()
        w = torch.where(on[:, None], w - row * (w[every, q] / pivot)[:, None], w)
        keep[every[on], q[on]] = False
        w[~keep] = 0
        scaled = row / pivot.sqrt()[:, None]
        inverse_.baddbmm_(scaled.unsqueeze(2), scaled.unsqueeze(1), alpha=-1)
    return errors, w, keep
