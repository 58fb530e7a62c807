"""Approximate pruning methods behind one protocol: the baselines that lossless compression is compared with.

    scores = exactprune.pruners.score("snip", module, x, y)             # {parameter name: tensor}
    masks = exactprune.pruners.mask("woodfisher", module, x, y, 0.9)    # {parameter name: bool tensor}

Larger scores are kept; masks are True where a weight stays, and remove exactly ``round(sparsity * weights)`` weights,
ties by the flat index. ``exactprune.prune`` goes on from there to a pruned module and a report.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from exactprune.pruners.problem import LOSSES, Loss, Problem
from exactprune.pruners.protocol import NoOptions, Plan, Pruner, ScoreOptions, ScorePruner, apply, decide, make_options
from exactprune.pruners.registry import method, methods, names, register
from exactprune.pruners.selection import count

__all__ = [
    "LOSSES", "Loss", "NoOptions", "Plan", "Problem", "Pruner", "ScoreOptions", "ScorePruner", "apply", "count", "decide",
    "make", "mask", "method", "methods", "names", "plan", "register", "score",
]


def make(name: str, **options: Any) -> Pruner[Any]:
    """A pruner by name, with its options.

    Raises:
        OptionError: the method or an option is unknown.
    """
    cls = method(name)
    return cls(make_options(cls, options))


def score(method: str, module: nn.Module, x: Tensor | None = None, y: Tensor | None = None, *,
          loss: Loss | None = None, **options: Any) -> dict[str, Tensor]:
    """Saliency of every prunable weight, in float64; larger means kept.

    Args:
        method: name of a method, see ``names()``.
        module: any module with Linear or Conv2d layers; not changed.
        x: inputs, shape (N, ...).
        y: targets, shape (N,): class numbers (cross entropy) or floats (squared error).
        loss: maps (outputs, targets) to one loss per sample, if neither fits.
        options: the method's options.

    Raises:
        OptionError: the method or an option is unknown, or the method has no saliency.
        DataError: data are missing, empty, or give gradients that are not finite.
    """
    return make(method, **options).score(Problem(module, x, y, loss))


def plan(method: str, module: nn.Module, x: Tensor | None = None, y: Tensor | None = None, sparsity: float = 0.9, *,
         loss: Loss | None = None, **options: Any) -> Plan:
    """Masks and new values, see ``Plan``; arguments as for ``mask``."""
    return decide(make(method, **options), Problem(module, x, y, loss), sparsity)


def mask(method: str, module: nn.Module, x: Tensor | None = None, y: Tensor | None = None, sparsity: float = 0.9, *,
         loss: Loss | None = None, **options: Any) -> dict[str, Tensor]:
    """True where a weight stays; exactly ``round(sparsity * n)`` weights go.

    Args:
        method: name of a method, see ``names()``.
        module: any module with Linear or Conv2d layers; not changed.
        x: inputs, shape (N, ...).
        y: targets, shape (N,).
        sparsity: fraction to remove, 0 to 1.
        loss: see ``score``.
        options: the method's options.

    Raises:
        OptionError: the sparsity, the method or an option is wrong.
        DataError: data are missing, empty, or give gradients that are not finite.
    """
    return plan(method, module, x, y, sparsity, loss=loss, **options).masks
