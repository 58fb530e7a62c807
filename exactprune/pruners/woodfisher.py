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
N < B the inverse is never formed: its diagonal and its products need C's factor alone. Where a block is a whole layer
that is applied once per sample, g_n = vec(o_n a_n^T) and G G^T = (O O^T) * (A A^T) elementwise, so a large layer's C costs next
to nothing, and columns of G are formed a few at a time.

Choices left open, as in the authors' code: the saliency has no factor 1/2; 1e-10 is added to [F^-1]_qq and to the
result; gradients are of single samples; a block is a layer, or ``block`` consecutive weights of it. ``steps`` > 1 is the
gradual variant: prune and update to i / steps of the target, measure again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, ScoreOptions, apply, finite, gone, require
from exactprune.pruners.selection import flatten, keep_largest, unflatten
from exactprune.pruners.taps import Factors, all_factors, first_samples

EPSILON = 1e-10
WORKSPACE = 2**28  # bytes of gradients of small blocks that are worked on at once
COLUMNS = 2**26  # the same for the columns of a large block


@dataclass(frozen=True)
class WoodFisherOptions(ScoreOptions):
    """Options of ``woodfisher``.

    Attributes:
        damping: of the Fisher matrix.
        block: weights per block; 0 for one block per layer, -1 for one block in all.
        update: single (sum of the OBS updates, the paper's), joint (the minimiser for all removed weights), none.
        samples: gradients of this many samples, from the start of the data; 0 for all.
        average: samples per gradient (the paper's mini-batch).
        steps: number of rounds; 1 is one-shot.
    """

    damping: float = 1e-5
    block: int = 0
    update: Literal["single", "joint", "none"] = "single"
    samples: int = 1000
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
        tick = problem.ticker(2 * len(blocks))
        scores = self._score(problem, torch.cat([_and(tick, b.inverse_diagonal) for b in blocks]))
        masks = keep_largest(scores, sparsity, self.options.scope, gone(problem))
        weights, keep = flatten(problem.weights.values()), flatten(masks.values())
        moved = torch.cat([_and(tick, b.move(weights, keep, self.options.update)) for b in blocks])
        return Plan(masks, unflatten(moved * keep, problem.shapes), scores=scores)


def _and(tick: Callable[[int], None], value: Tensor) -> Tensor:
    tick(1)
    return value


def update(problem: Problem, masks: dict[str, Tensor], options: WoodFisherOptions) -> dict[str, Tensor]:
    """The change of every weight for given masks, before removed weights are set to zero exactly."""
    weights, keep = flatten(problem.weights.values()), flatten(masks.values())
    moved = [b.move(weights, keep, options.update) for b in fisher_blocks(problem, options)]
    return unflatten(torch.cat(moved) - weights, problem.shapes)


def inverse_diagonal(problem: Problem, options: WoodFisherOptions) -> Tensor:
    """Diagonal of the inverse Fisher matrix in global index order, shape (n,)."""
    return torch.cat([block.inverse_diagonal for block in fisher_blocks(problem, options)])


# -- blocks ------------------------------------------------------------------------------------------------------------


class Blocks(ABC):
    """A run of blocks of weights with consecutive global indices; the Fisher matrix has nothing outside of them.

    Attributes:
        start: global index of the first weight.
        stop: global index after the last one.
    """

    start: int
    stop: int

    @cached_property
    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of F^-1, shape (stop - start,)."""

    @abstractmethod
    def single(self, weights: Tensor, going: Tensor) -> Tensor:
        """F^-1 v with v_q = w_q / [F^-1]_qq where ``going``, else 0: minus the sum of the single updates."""

    @abstractmethod
    def joint(self, weights: Tensor, going: Tensor) -> Tensor:
        """The minimiser of delta^T F delta with delta = -w where ``going``."""

    def move(self, weights: Tensor, keep: Tensor, update: str) -> Tensor:
        """The weights of these blocks after the update for those that go, before they are zeroed exactly."""
        own, going = weights[self.start:self.stop], ~keep[self.start:self.stop]
        if update == "none" or not bool(going.any()):
            return own.clone()
        return own + self.joint(own, going) if update == "joint" else own - self.single(own, going)


@dataclass(frozen=True, eq=False)
class SmallBlocks(Blocks):
    """Equally large blocks, all at once: one batched operation each.

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
    def stop(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Global index after the last weight."""
        return self.start + self.size * self.number

    def gradients(self) -> Tensor:
        """Shape (number, N, B)."""
        columns = _averaged(torch.cat([f.columns(a, b) for f, a, b in self.sources], 1), self.average)
        return columns.view(len(columns), self.number, self.size).transpose(0, 1)

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of F^-1."""
        g = self.gradients()
        if g.shape[1] >= g.shape[2]:
            return block_inverse(g, self.damping).diagonal(dim1=1, dim2=2).flatten()
        half = torch.linalg.solve_triangular(_woodbury_factor(g, self.damping), g, upper=False)
        return ((1 - half.square().sum(1)) / self.damping).flatten()

    def single(self, weights: Tensor, going: Tensor) -> Tensor:
        """Minus the sum of the single updates."""
        basis = torch.where(going, weights / self.inverse_diagonal, 0).view(self.number, self.size, 1)
        g = self.gradients()
        if g.shape[1] >= g.shape[2]:
            return torch.cholesky_solve(basis, _fisher_factor(g, self.damping)).flatten()
        inner = torch.cholesky_solve(torch.matmul(g, basis), _woodbury_factor(g, self.damping))
        return ((basis - torch.matmul(g.mT, inner)) / self.damping).flatten()

    def joint(self, weights: Tensor, going: Tensor) -> Tensor:
        """Block by block: what stays differs from one to the next."""
        rows = zip(weights.view(self.number, -1), going.view(self.number, -1), self.gradients())
        return torch.cat([_joint(w, gone_, g[:, ~gone_], g[:, gone_] @ w[gone_], self.damping) for w, gone_, g in rows])


@dataclass(frozen=True, eq=False)
class LargeBlock(Blocks):
    """One block of whole layers, more weights than gradients: only columns of G are formed, a few at a time.

    Attributes:
        start: global index of the first weight.
        layers: factors of the layers, in order.
        average: samples per gradient.
        damping: of F.
    """

    start: int
    layers: tuple[Factors, ...]
    average: int
    damping: float

    @property
    def stop(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Global index after the last weight."""
        return self.start + sum(f.size for f in self.layers)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of G: (their places in this block, gradients (N, places))."""
        begin = 0
        for factors in self.layers:
            width = max(1, COLUMNS // (8 * len(factors.g)))
            for a in range(0, factors.size, width):
                b = min(a + width, factors.size)
                yield slice(begin + a, begin + b), _averaged(factors.columns(a, b), self.average)
            begin += factors.size

    @cached_property
    def factor(self) -> Tensor:
        """Cholesky factor of C = damping N I + G G^T, shape (N, N)."""
        if self.average == 1 and all(f.outer_products for f in self.layers):
            return _gram_factor(_summed(f.gram() for f in self.layers), self.damping)
        return _gram_factor(_summed(g @ g.T for _, g in self.pieces()), self.damping)

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of F^-1."""
        halves = (torch.linalg.solve_triangular(self.factor, g, upper=False) for _, g in self.pieces())
        return torch.cat([(1 - half.square().sum(0)) / self.damping for half in halves])

    def single(self, weights: Tensor, going: Tensor) -> Tensor:
        """Minus the sum of the single updates."""
        basis = torch.where(going, weights / self.inverse_diagonal, 0)
        inner = torch.cholesky_solve(_summed(g @ basis[at] for at, g in self.pieces())[:, None], self.factor)[:, 0]
        return torch.cat([basis[at] - g.T @ inner for at, g in self.pieces()]) / self.damping

    def joint(self, weights: Tensor, going: Tensor) -> Tensor:
        """The minimiser for all that goes together."""
        target = _summed(g[:, going[at]] @ weights[at][going[at]] for at, g in self.pieces())
        if int((~going).sum()) <= len(target):
            kept = torch.cat([g[:, ~going[at]] for at, g in self.pieces()], 1)
            return _joint(weights, going, kept, target, self.damping)
        gram = _summed(kept @ kept.T for kept in (g[:, ~going[at]] for at, g in self.pieces()))
        inner = torch.cholesky_solve(target[:, None], _gram_factor(gram, self.damping))[:, 0]
        return torch.cat([torch.where(going[at], -weights[at], g.T @ inner) for at, g in self.pieces()])


def _averaged(columns: Tensor, average: int) -> Tensor:
    return columns if average == 1 else torch.stack([part.mean(0) for part in columns.split(average)])


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in order, holding one at a time."""
    left = iter(parts)
    return sum(left, next(left))


def _joint(weights: Tensor, going: Tensor, kept: Tensor, target: Tensor, damping: float) -> Tensor:
    """The minimiser of delta^T F delta with delta = -w where ``going``, for one block.

    With K kept and P going, delta_K = F_KK^-1 F_KP w_P, which needs products with G_K only (the same as the OBS
    formula with F^-1).

    Args:
        weights: (B,).
        going: (B,).
        kept: G_K.
        target: G_P w_P, (N,).
        damping: of F.
    """
    delta = -weights * going
    if len(kept) < kept.shape[1]:
        delta[~going] = kept.T @ torch.cholesky_solve(target[:, None], _woodbury_factor(kept[None], damping)[0])[:, 0]
    else:
        moved = (kept.T @ target)[:, None] / len(kept)
        delta[~going] = torch.cholesky_solve(moved, _fisher_factor(kept[None], damping)[0])[:, 0]
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
        return torch.cholesky_inverse(_fisher_factor(gradients, damping))
    half = torch.linalg.solve_triangular(_woodbury_factor(gradients, damping), gradients, upper=False)
    inverse = torch.matmul(half.mT, half).neg_()
    inverse.diagonal(dim1=1, dim2=2).add_(1)
    return inverse.div_(damping)


def _fisher_factor(gradients: Tensor, damping: float) -> Tensor:
    """Cholesky factor of damping I + G^T G / N, shape (blocks, B, B)."""
    fisher = torch.matmul(gradients.mT, gradients).div_(gradients.shape[1])
    fisher.diagonal(dim1=1, dim2=2).add_(damping)
    return torch.linalg.cholesky(fisher)


def _woodbury_factor(gradients: Tensor, damping: float) -> Tensor:
    """Cholesky factor of damping N I + G G^T, shape (blocks, N, N)."""
    return _gram_factor(torch.matmul(gradients, gradients.mT), damping)


def _gram_factor(gram: Tensor, damping: float) -> Tensor:
    damped = gram + damping * gram.shape[-1] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(damped)


def fisher_blocks(problem: Problem, options: WoodFisherOptions) -> Iterator[Blocks]:
    """All blocks in global index order, equal ones together as far as ``WORKSPACE`` allows."""
    problem = first_samples(problem, options.samples)
    factors, = all_factors(problem)
    samples, start = -(-len(problem.inputs) // options.average), 0
    groups: list[tuple[Factors, ...]] = [(f,) for f in factors.values()]
    for layers in [tuple(factors.values())] if options.block == -1 else groups:
        whole = sum(f.size for f in layers)
        size = min(options.block, whole) if options.block > 0 else whole
        if size == whole > samples:
            yield LargeBlock(start, layers, options.average, options.damping)
        else:
            yield from _small_blocks(layers, start, size, samples, options)
        start += whole


def _small_blocks(layers: Sequence[Factors], start: int, size: int, samples: int,
                  options: WoodFisherOptions) -> Iterator[Blocks]:
    if len(layers) > 1:
        yield SmallBlocks(start, size, 1, tuple((f, 0, f.size) for f in layers), options.average, options.damping)
        return
    for a, b in _runs(layers[0].size, size, max(1, WORKSPACE // (8 * size * max(samples, size)))):
        width = min(size, b - a)
        yield SmallBlocks(start + a, width, (b - a) // width, ((layers[0], a, b),), options.average, options.damping)


def _runs(total: int, size: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of at most ``most`` blocks of ``size``; a shorter last block is a run of its own."""
    whole = total // size
    for i in range(0, whole, most):
        yield i * size, min(i + most, whole) * size
    if whole * size < total:
        yield whole * size, total
