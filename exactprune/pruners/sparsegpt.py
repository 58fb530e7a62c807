"""SparseGPT: layer-wise OBS in one left-to-right pass over the columns, all rows sharing one inverse.

E. Frantar, D. Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", ICML 2023, Algorithm 1.
With R the upper Cholesky factor of (H + damping mean(diag H) I)^-1, column j's error w_j / R_jj is spread over the columns to
its right by R_j:, so weights to the left of a column never move again. The mask is chosen per run of ``block``
columns, by the current w^2 / R_jj^2 over all rows of the run.

Choices left open: damping 0.01 and block 128 as in the paper; the number that goes is exact per layer: runs get shares
that add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.layerwise import LayerPruner, Tick, damped, inverse, without_dead
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import no_score, require
from exactprune.pruners.selection import smallest


@dataclass(frozen=True)
class SparseGptOptions:
    """Options of ``sparsegpt``.

    Attributes:
        damping: times the mean of the diagonal of H, added to it.
        block: columns per choice of the mask.
    """

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        require(self.damping >= 0, "damping", self.damping, "a number >= 0")
        require(self.block >= 1, "block", self.block, "a whole number >= 1")


class SparseGpt(LayerPruner[SparseGptOptions]):
    """One-pass layer-wise OBS."""

    name: ClassVar[str] = "sparsegpt"
    reference: ClassVar[str] = "Frantar & Alistarh 2023, Alg. 1"
    Options = SparseGptOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """There is none: the order depends on updates on the way."""
        raise no_score(self.name)

    def prune_rows(self, weight: Tensor, hessian: Tensor, number: int, tick: Tick) -> tuple[Tensor, Tensor]:
        """Choose the mask run by run, carry every column's error to the right."""
        weight, full = without_dead(weight, hessian)
        full = full + damped(hessian, self.options.damping) - hessian
        root = torch.linalg.cholesky(inverse(full), upper=True)
        w, keep, columns = weight.clone(), torch.ones_like(weight, dtype=torch.bool), weight.shape[1]
        for start in range(0, columns, self.options.block):
            stop = min(start + self.options.block, columns)
            share = number * stop // columns - number * start // columns
            cost = (w[:, start:stop] / root.diagonal()[start:stop]).square().flatten()
            going = smallest(cost, share)
            keep[going // (stop - start), start + going % (stop - start)] = False
            for j in range(start, stop):
                error = torch.where(keep[:, j], 0, w[:, j]) / root[j, j]
                w[:, j:] -= torch.outer(error, root[j, j:])
        tick(len(w))
        return keep, w * keep
