"""Inf-FS: rank features by the paths of every length through them.

G. Roffo, S. Melzi, M. Cristani, "Infinite feature selection", ICCV 2015, Eqs. 1-9. Features are nodes, and the edge between i
and j weighs a_ij = alpha max(sigma_i, sigma_j) + (1 - alpha) (1 - abs(spearman_ij)): spread out, and not redundant. The
sum over all path lengths l >= 1 of (r A)^l, with r = 0.9 / (spectral radius of A), is (I - r A)^-1 - I; a feature's score is
its row sum.

Choices left open: alpha = 0.5; sigma is the population standard deviation; a feature that never changes has no rank
correlation, taken as 0. ``variant`` = pyifs is what the PyIFS package computes without supervision: the signed correlation
itself instead of 1 - abs, and sample standard deviations divided by the largest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from exactprune.errors import DataError

REACH = 0.9
Variant = Literal["paper", "pyifs"]


def inf_fs(samples: Tensor, alpha: float = 0.5, variant: Variant = "paper") -> Tensor:
    """Scores of the columns of ``samples`` (N, features), larger is more important.

    Raises:
        DataError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(f"Inf-FS compares features over samples; it was given {len(samples)}, give at least 2")
    edges = _edges(samples.to(torch.float64), alpha, variant)
    radius = torch.linalg.eigvalsh(edges).abs().max()
    if radius == 0:
        return torch.zeros(samples.shape[1], dtype=torch.float64, device=samples.device)
    identity = torch.eye(len(edges), dtype=edges.dtype, device=edges.device)
    return torch.linalg.solve(identity - REACH / radius * edges, identity).sum(1) - 1


def _edges(samples: Tensor, alpha: float, variant: Variant) -> Tensor:
    rank = spearman(samples)
    if variant == "pyifs":
        spread = samples.std(0, correction=1)
        pairs = torch.maximum(spread[:, None], spread)
        return alpha * rank + (1 - alpha) * pairs / pairs.max().clamp(min=torch.finfo(pairs.dtype).tiny)
    spread = samples.std(0, correction=0)
    return alpha * torch.maximum(spread[:, None], spread) + (1 - alpha) * (1 - rank.abs())


def spearman(samples: Tensor) -> Tensor:
    """Rank correlation of columns (mean ranks for ties), 0 where a column is constant, shape (features, features)."""
    ranks = torch.stack([_mean_ranks(column) for column in samples.T], 1)
    centred = ranks - ranks.mean(0)
    norm = centred.norm(dim=0)
    scaled = torch.where(norm > 0, centred / norm, 0)
    return (scaled.T @ scaled).clamp(-1, 1)


def _mean_ranks(column: Tensor) -> Tensor:
    _, inverse, counts = column.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(column.dtype)
    return (last - (counts - 1) / 2)[inverse]
