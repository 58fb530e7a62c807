"""MLPrune: OBS saliencies under a Kronecker-factored Fisher matrix, one threshold for all layers.

W. Zeng, R. Urtasun, "MLPrune: multi-layer pruning for automated neural network compression", 2018 (OpenReview r1g5b2RcKm),
with K-FAC (J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015).
Per layer F = G (x) A with A = E[a a^T] over its inputs and G = E[g g^T] over the gradients at its outputs, so that with
factored Tikhonov damping (K-FAC, Section 6.3)

    [F^-1]_qq = [(G + sqrt(damping / pi) I)^-1]_oo [(A + sqrt(damping pi) I)^-1]_kk,   pi = (tr A / dim A) / (tr G / dim G),

and the saliency of weight q = (o, k) is w_q^2 / [F^-1]_qq, ranked over all layers together.

Choices left open: curvature in the coordinates of the weights (not of the Kronecker eigenbasis); gradients of the loss at the
true labels (empirical Fisher); ``pi`` off means pi = 1; biases have no place in A; for convolutions A is
averaged over samples and positions and G summed over positions (R. Grosse, J. Martens, ICML 2016); no factor 1/2, and
1e-10 added twice as in ``woodfisher``. ``update`` moves the kept weights by the sum of the OBS updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, ScoreOptions, finite, gone, require
from exactprune.pruners.selection import keep_largest
from exactprune.pruners.taps import Factors, sample_factors
from exactprune.pruners.woodfisher import EPSILON


@dataclass(frozen=True)
class MLPruneOptions(ScoreOptions):
    """Options of ``mlprune``.

    Attributes:
        damping: of the Fisher matrix.
        pi: split the damping by the factors' mean diagonals.
        update: move the kept weights.
    """

    damping: float = 1e-5
    pi: bool = True
    update: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.damping > 0, "damping", self.damping, "a number > 0")


class Kronecker(NamedTuple):
    """Inverses of the damped factors of a layer: a (groups, K, K), g (groups, O, O)."""

    a: Tensor
    g: Tensor

    def diagonal(self) -> Tensor:
        """[F^-1]_qq, shape (groups * O, K)."""
        return torch.einsum("go,gk->gok", self.g.diagonal(dim1=1, dim2=2), self.a.diagonal(dim1=1, dim2=2)).flatten(0, 1)

    def times(self, matrix: Tensor) -> Tensor:
        """F^-1 applied to weights of shape (groups * O, K)."""
        grouped = matrix.unflatten(0, (len(self.g), -1))
        return torch.matmul(torch.matmul(self.g, grouped), self.a).flatten(0, 1)


class MLPrune(Pruner[MLPruneOptions]):
    """Multi-layer pruning with K-FAC."""

    name: ClassVar[str] = "mlprune"
    reference: ClassVar[str] = "Zeng & Urtasun 2018; Martens & Grosse 2015"
    Options = MLPruneOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """w_q^2 / [F^-1]_qq."""
        return self._score(problem, self.inverses(problem))

    def _score(self, problem: Problem, inverses: dict[str, Kronecker]) -> dict[str, Tensor]:
        scores = {name: w.square() / (inverses[name].diagonal().view_as(w) + EPSILON) + EPSILON
                  for name, w in problem.weights.items()}
        return finite(scores, "the K-FAC score")

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """The lowest saliencies go; with ``update`` the others move."""
        inverses = self.inverses(problem)
        scores = self._score(problem, inverses)
        masks = keep_largest(scores, sparsity, self.options.scope, gone(problem))
        if not self.options.update:
            return Plan(masks, scores=scores)
        values = {name: _moved(w, masks[name], inverses[name]) for name, w in problem.weights.items()}
        return Plan(masks, values, scores=scores)

    def inverses(self, problem: Problem) -> dict[str, Kronecker]:
        """Inverses of the damped factors of every layer."""
        return {name: self._invert(*factors) for name, factors in kronecker_factors(problem).items()}

    def _invert(self, a: Tensor, g: Tensor) -> Kronecker:
        pi = _mean_diagonal(a) / _mean_diagonal(g) if self.options.pi else torch.ones_like(a[:, 0, 0])
        pi = torch.where((pi > 0) & pi.isfinite(), pi, 1.0)
        return Kronecker(_damped_inverse(a, (self.options.damping * pi).sqrt()),
                         _damped_inverse(g, (self.options.damping / pi).sqrt()))


def _mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=1, dim2=2).mean(1)


def _damped_inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping[:, None, None] * identity))


def _moved(weight: Tensor, mask: Tensor, inverse: Kronecker) -> Tensor:
    matrix, going = weight.flatten(1), ~mask.flatten(1)
    basis = torch.where(going, matrix / inverse.diagonal(), 0)
    return ((matrix - inverse.times(basis)) * ~going).view_as(weight)


def kronecker_factors(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """A = E[a a^T] (groups, K, K) and G = E[g g^T] (groups, O, O) of every layer."""
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for result, in sample_factors(problem):
        for name, factors in result.items():
            a, g = _outer(factors)
            old = total.get(name)
            total[name] = (a, g) if old is None else (old[0] + a, old[1] + g)
    samples = len(problem.data[0])
    return {name: (a / samples, g / samples) for name, (a, g) in total.items()}


def _outer(factors: Factors) -> tuple[Tensor, Tensor]:
    positions = factors.a.shape[3]
    return (torch.einsum("ngkl,ngjl->gkj", factors.a, factors.a) / positions,
            torch.einsum("ngol,ngpl->gop", factors.g, factors.g))
