"""Random pruning: every set of k weights is equally likely.

The scores are a random permutation of 0 ... n - 1 (of all weights, or of every layer's), so there are no ties and a
larger sparsity removes a superset. Numbers come from a generator of its own, seeded by ``seed``, on the CPU, so a
GPU removes the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import ScoreOptions, ScorePruner
from exactprune.pruners.selection import unflatten


@dataclass(frozen=True)
class RandomOptions(ScoreOptions):
    """Options of ``random``.

    Attributes:
        seed: of the permutation.
    """

    seed: int = 0


class Random(ScorePruner[RandomOptions]):
    """Random pruning."""

    name: ClassVar[str] = "random"
    when: ClassVar[str] = "any time"
    reference: ClassVar[str] = "baseline"
    data = "none"
    Options = RandomOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """A random rank for every weight."""
        generator = torch.Generator().manual_seed(self.options.seed)
        ranks = torch.randperm(problem.size, generator=generator).to(problem.device, problem.dtype)
        return unflatten(ranks, problem.shapes)
