"""Wanda: s_ok = abs(w_ok) ||X_k||_2, compared within each output row.

M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A simple and effective pruning approach for large language models", ICLR 2024, Eq. 1
and Section 3. ||X_k|| is the norm of input k over all samples and positions. No weight moves.

Choices left open: every row loses the same number; where the layer's exact total is not a multiple of the number of rows,
the rows whose next weight scores lowest lose one more.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.layerwise import input_moments
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import NoOptions, Plan, Pruner
from exactprune.pruners.selection import count, smallest


class Wanda(Pruner[NoOptions]):
    """Pruning by weights and activations."""

    name: ClassVar[str] = "wanda"
    reference: ClassVar[str] = "Sun et al. 2024, Eq. 1"
    data = "inputs"

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """abs(w) times the norm of its input."""
        scores = {}
        for name, moment in input_moments(problem).items():
            weight = problem.weights[name]
            norm = moment.diagonal(dim1=1, dim2=2).sqrt().repeat_interleave(len(weight) // len(moment), 0)
            scores[name] = weight.abs() * norm.view_as(weight)
        return scores

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """The same number from every row of a layer, give or take one."""
        scores = self.score(problem)
        masks = {n: _rows(s.flatten(1), count(sparsity, s.numel())).view_as(s) for n, s in scores.items()}
        return Plan(masks, scores=scores)


def _rows(scores: Tensor, number: int) -> Tensor:
    each, more = divmod(number, len(scores))
    order = torch.sort(scores, dim=1, stable=True).indices
    mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], False)
    if more:
        following = order[:, each]
        rows = smallest(scores.gather(1, following[:, None])[:, 0], more)
        mask[rows, following[rows]] = False
    return mask
