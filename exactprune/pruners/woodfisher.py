"""WoodFisher: OBS with the empirical Fisher matrix, block by block, inverted by Woodbury's identity.

S. P. Singh, D. Alistarh, "WoodFisher: efficient second-order approximation for neural network compression", NeurIPS
2020. With g_n the loss gradient of sample n (or of a small batch), F = damping I + (1/N) sum_n g_n g_n^T per
block of weights (Eq. 2 and Section 3.2); the inverse by the Sherman-Morrison recursion of Eq. 8,

    F_n^-1 = F_(n-1)^-1 - F_(n-1)^-1 g_n g_n^T F_(n-1)^-1 / (N + g_n^T F_(n-1)^-1 g_n),   F_0^-1 = I / damping,

saliency w_q^2 / [F^-1]_qq and update sum over removed q of -w_q F^-1 e_q / [F^-1]_qq (Eq. 10), removed weights then zero.

The recursion's result does not depend on the order of its N rank-one steps, so all are taken at once (Woodbury): with G
the N x B matrix of gradients,

    F^-1 = (I - G^T C^-1 G) / damping,   C = damping N I + G G^T   (N < B),

or the Cholesky inverse of the B x B matrix itself (N >= B). Blocks of equal size are one batched operation, and for
N < B the inverse is never formed: its diagonal and its products need C's factor alone.

Choices left open, as in the authors' code: the saliency has no factor 1/2; 1e-10 is added to [F^-1]_qq and to the
result; gradients are of single samples; a block is a layer, or ``block`` consecutive weights of it. ``steps`` > 1 is the
gradual variant: prune and update to i / steps of the target, measure again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, ScoreOptions, apply, finite, gone, require
from exactprune.pruners.selection import flatten, keep_largest, unflatten
from exactprune.pruners.taps import Factors, all_factors

EPSILON = 1e-10
WORKSPACE = 2**28  # bytes of gradients that are worked on at once


@dataclass(frozen=True)
class WoodFisherOptions(ScoreOptions):
    """Options of ``woodfisher``.

    Attributes:
        damping: of the Fisher matrix.
        block: weights per block; 0 for one block per layer, -1 for one block in all.
        update: single (sum of the OBS updates, the paper's), joint (the minimiser for all removed weights), none.
        samples: gradients to use, from the start of the data; 0 for all.
        average: samples per gradient (the paper's mini-batch).
        steps: number of rounds; 1 is one-shot.
    """

    damping: float = 1e-5
    block: int = 0
    update: Literal["single", "joint", "none"] = "single"
    samples: int = 0
    average: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.damping > 0, "damping", self.damping, "a number > 0")
        require(self.block >= -1, "block", self.block, "a block size, 0 for layers or -1 for the whole network")
        require(self.update in ("single", "joint", "none"), "update", self.update, "single, joint or none")
        require(self.samples >= 0, "samples", self.samples, "a whole number, 0 for all")
        require(self.average >= 1, "average", self.average, "a whole number >= 1")
        require(self.steps >= 1, "steps", self.steps, "a whole number >= 1")


class WoodFisher(Pruner[WoodFisherOptions]):
    """Blockwise empirical-Fisher OBS."""

    name: ClassVar[str] = "woodfisher"
    reference: ClassVar[str] = "Singh & Alistarh 2020, Eqs. 8, 10"
    Options = WoodFisherOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """w_q^2 / [F^-1]_qq."""
        return self._score(problem, inverse_diagonal(problem, self.options))

    def _score(self, problem: Problem, diagonal: Tensor) -> dict[str, Tensor]:
        weights = flatten(problem.weights.values())
        score = weights.square() / (diagonal + EPSILON) + EPSILON
        return finite(unflatten(score, problem.shapes), "the WoodFisher score")

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """``steps`` rounds of measuring, removing and updating."""
        now, plan = problem, None
        for step in range(1, self.options.steps + 1):
            plan = self._round(now, sparsity * step / self.options.steps)
            if step < self.options.steps:
                now = replace(problem, module=apply(problem.module, plan), previous=plan.masks)
        assert plan is not None
        return plan

    def _round(self, problem: Problem, sparsity: float) -> Plan:
        blocks = list(fisher_blocks(problem, self.options))
        scores = self._score(problem, torch.cat([b.inverse_diagonal() for b in blocks]))
        masks = keep_largest(scores, sparsity, self.options.scope, gone(problem))
        weights, keep = flatten(problem.weights.values()), flatten(masks.values())
        moved = torch.cat([b.move(weights, keep, self.options.update) for b in blocks])
        return Plan(masks, unflatten(moved * keep, problem.shapes), scores=scores)


def update(problem: Problem, masks: dict[str, Tensor], options: WoodFisherOptions) -> dict[str, Tensor]:
    """The change of every weight for given masks, before removed weights are set to zero exactly."""
    weights, keep = flatten(problem.weights.values()), flatten(masks.values())
    moved = [b.move(weights, keep, options.update) for b in fisher_blocks(problem, options)]
    return unflatten(torch.cat(moved) - weights, problem.shapes)


def inverse_diagonal(problem: Problem, options: WoodFisherOptions) -> Tensor:
    """Diagonal of the inverse Fisher matrix in global index order, shape (n,)."""
    return torch.cat([block.inverse_diagonal() for block in fisher_blocks(problem, options)])


# -- blocks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocks:
    """A run of equally large blocks of weights.

    Attributes:
        start: global index of the first weight.
        size: weights per block, B.
        number: of blocks.
        sources: what the gradients come from, (factors, first column, last column + 1) side by side.
        average: samples per gradient.
        damping: of F.
    """

    start: int
    size: int
    number: int
    sources: tuple[tuple[Factors, int, int], ...]
    average: int
    damping: float

    @property
    def stop(self) -> int:
        """Global index after the last weight."""
        return self.start + self.size * self.number

    def gradients(self) -> Tensor:
        """Shape (number, N, B)."""
        columns = torch.cat([factors.columns(a, b) for factors, a, b in self.sources], 1)
        if self.average > 1:
            columns = torch.stack([part.mean(0) for part in columns.split(self.average)])
        return columns.view(len(columns), self.number, self.size).transpose(0, 1)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of F^-1, shape (number * B,)."""
        return _diagonal(self.gradients(), self.damping).flatten()

    def move(self, weights: Tensor, keep: Tensor, update: str) -> Tensor:
        """The weights of these blocks after the update for those that go, before they are zeroed, (number * B,)."""
        w = weights[self.start:self.stop].view(self.number, self.size)
        going = ~keep[self.start:self.stop].view(self.number, self.size)
        if update == "none" or not bool(going.any()):
            return w.flatten().clone()
        g = self.gradients()
        if update == "joint":
            return torch.cat([w_ + _joint(w_, going_, g_, self.damping) for w_, going_, g_ in zip(w, going, g)])
        return (w - _single(w, going, g, self.damping)).flatten()


def _diagonal(g: Tensor, damping: float) -> Tensor:
    """Diagonal of F^-1 for gradients (blocks, N, B), shape (blocks, B)."""
    if g.shape[1] >= g.shape[2]:
        return block_inverse(g, damping).diagonal(dim1=1, dim2=2)
    half = torch.linalg.solve_triangular(_woodbury_factor(g, damping), g, upper=False)
    return (1 - half.square().sum(1)) / damping


def _single(w: Tensor, going: Tensor, g: Tensor, damping: float) -> Tensor:
    """F^-1 v with v_q = w_q / [F^-1]_qq where ``going``, for weights (blocks, B) and gradients (blocks, N, B)."""
    if g.shape[1] >= g.shape[2]:
        inverse = block_inverse(g, damping)
        basis = torch.where(going, w / inverse.diagonal(dim1=1, dim2=2), 0)
        return torch.matmul(inverse, basis.unsqueeze(2)).squeeze(2)
    basis = torch.where(going, w / _diagonal(g, damping), 0)
    inner = torch.cholesky_solve(torch.matmul(g, basis.unsqueeze(2)), _woodbury_factor(g, damping))
    return (basis - torch.matmul(g.mT, inner).squeeze(2)) / damping


def _joint(weights: Tensor, going: Tensor, g: Tensor, damping: float) -> Tensor:
    """The minimiser of delta^T F delta with delta = -w where ``going``, for one block.

    With K kept and P going, delta_K = F_KK^-1 F_KP w_P, which needs products with G_K only (the same as the OBS
    formula with F^-1).
    """
    kept, target = g[:, ~going], g[:, going] @ weights[going]
    delta = -weights * going
    if len(g) < kept.shape[1]:
        factor = _woodbury_factor(kept[None], damping)[0]
        delta[~going] = kept.T @ torch.cholesky_solve(target[:, None], factor)[:, 0]
    else:
        fisher = kept.T @ kept / len(g)
        fisher.diagonal().add_(damping)
        factor = torch.linalg.cholesky(fisher)
        delta[~going] = torch.cholesky_solve((kept.T @ target)[:, None] / len(g), factor)[:, 0]
    return delta


def block_inverse(gradients: Tensor, damping: float) -> Tensor:
    """(damping I + G^T G / N)^-1 for a batch of blocks.

    Args:
        gradients: shape (blocks, N, B).
        damping: > 0.

    Returns:
        shape (blocks, B, B).
    """
    samples, size = gradients.shape[1:]
    if samples >= size:
        fisher = torch.matmul(gradients.mT, gradients).div_(samples)
        fisher.diagonal(dim1=1, dim2=2).add_(damping)
        return torch.cholesky_inverse(torch.linalg.cholesky(fisher))
    half = torch.linalg.solve_triangular(_woodbury_factor(gradients, damping), gradients, upper=False)
    inverse = torch.matmul(half.mT, half).neg_()
    inverse.diagonal(dim1=1, dim2=2).add_(1)
    return inverse.div_(damping)


def _woodbury_factor(gradients: Tensor, damping: float) -> Tensor:
    """Cholesky factor of damping N I + G G^T, shape (blocks, N, N)."""
    gram = torch.matmul(gradients, gradients.mT)
    gram.diagonal(dim1=1, dim2=2).add_(damping * gradients.shape[1])
    return torch.linalg.cholesky(gram)


def fisher_blocks(problem: Problem, options: WoodFisherOptions) -> Iterator[Blocks]:
    """All blocks in global index order, equal ones together as far as ``WORKSPACE`` allows."""
    if options.samples:
        problem = replace(problem, x=problem.inputs[:options.samples], y=problem.data[1][:options.samples])
    factors, = all_factors(problem)
    samples = -(-len(problem.inputs) // options.average)
    if options.block == -1:
        sources = tuple((f, 0, f.size) for f in factors.values())
        yield Blocks(0, problem.size, 1, sources, options.average, options.damping)
        return
    start = 0
    for factor in factors.values():
        size = min(options.block or factor.size, factor.size)
        for a, b in _runs(factor.size, size, max(1, WORKSPACE // (8 * size * max(samples, size)))):
            width = min(size, b - a)
            yield Blocks(start + a, width, (b - a) // width, ((factor, a, b),), options.average, options.damping)
        start += factor.size


def _runs(total: int, size: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of at most ``most`` blocks of ``size``; a shorter last block is a run of its own."""
    whole = total // size
    for i in range(0, whole, most):
        yield i * size, min(i + most, whole) * size
    if whole * size < total:
        yield whole * size, total
