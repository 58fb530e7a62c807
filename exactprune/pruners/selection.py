"""Exactly k weights go: the k smallest scores, ties by the flat index.

Of weights with equal scores the one with the lower index is removed first. Libraries that compare with a threshold keep
k - 1, k or k + 1 weights instead when scores tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from exactprune.errors import DataError, OptionError

Scope = Literal["global", "layer"]


def count(sparsity: float, size: int) -> int:
    """How many of ``size`` weights go at ``sparsity``: the nearest whole number, halves to even.

    Raises:
        OptionError: ``sparsity`` is not in [0, 1].
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not isfinite(sparsity) \
            or not 0 <= sparsity <= 1:
        raise OptionError(f"sparsity is {sparsity!r}; give the fraction of weights to remove, from 0 to 1")
    return round(sparsity * size)


def smallest(scores: Tensor, number: int) -> Tensor:
    """Indices of the ``number`` smallest of ``scores`` (1-d), ties by index.

    Raises:
        DataError: a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise DataError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: "
                        "the gradients are not finite; check the data and the weights")
    return torch.sort(scores, stable=True).indices[:number]


def keep_largest(scores: Mapping[str, Tensor], sparsity: float, scope: Scope = "global",
                 removed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Masks (True = kept) that drop exactly ``count(sparsity, size)`` of the lowest scores.

    Args:
        scores: parameter name -> saliency.
        sparsity: fraction to remove, of all weights together or of every layer.
        scope: ``global`` or ``layer``.
        removed: parameter name -> True where a weight is gone already; those go first.
    """
    if scope == "layer":
        return {name: drop_lowest({name: s}, count(sparsity, s.numel()), removed)[name] for name, s in scores.items()}
    return drop_lowest(scores, count(sparsity, sum(s.numel() for s in scores.values())), removed)


def drop_lowest(scores: Mapping[str, Tensor], number: int,
                removed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Masks that drop exactly ``number`` weights, those in ``removed`` first, then the lowest scores."""
    if removed:
        scores = {name: s.masked_fill(removed[name], -torch.inf) for name, s in scores.items()}
    return unflatten(_mask(flatten(scores.values()), number), {name: s.shape for name, s in scores.items()})


def _mask(flat: Tensor, number: int) -> Tensor:
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[smallest(flat, number)] = False
    return mask


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Everything in one row, in global index order."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The inverse of ``flatten``."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}
