"""Optimal Brain Surgeon: remove weights one by one, the others moving to make up for it.

B. Hassibi, D. Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992. With H the Hessian
of the loss at a minimum, removing weight q costs at least (Eq. 5)

    L_q = w_q^2 / (2 [H^-1]_qq),   reached by   delta = -w_q / [H^-1]_qq * H^-1 e_q,

and the inverse over the weights that remain is (a Schur complement)

    H^-1 <- H^-1 - H^-1 e_q e_q^T H^-1 / [H^-1]_qq.

Repeating this k times (update ``greedy``) keeps the weights the exact minimiser of the quadratic model under "these k are
zero": the sequence of single steps ends at the joint solution delta = -(H^-1)_:S [(H^-1)_SS]^-1 w_S of the set S it chose.

Choices left open: H is the Gauss-Newton matrix plus ``damping`` times the identity (the paper's alpha, 1e-8 to 1e-4), over
the prunable weights of all layers; biases do not move. ``update`` may also be ``joint`` (S = the k lowest L_q at
once, then the joint solution), ``single`` (the sum of the k single updates, which is no minimiser) or ``none``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exactprune.errors import OptionError
from exactprune.pruners.curvature import CURVATURES, Curvature, dense
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, gone, require
from exactprune.pruners.selection import count, flatten, smallest, unflatten

MAX_WEIGHTS = 12_000
Update = Literal["greedy", "joint", "single", "none"]


@dataclass(frozen=True)
class ObsOptions:
    """Options of ``obs``.

    Attributes:
        curvature: hessian, gauss-newton or fisher.
        damping: added to the diagonal.
        update: greedy, joint, single or none.
    """

    curvature: Curvature = "gauss-newton"
    damping: float = 1e-8
    update: Update = "greedy"

    def __post_init__(self) -> None:
        require(self.curvature in CURVATURES, "curvature", self.curvature, ", ".join(CURVATURES))
        require(self.damping >= 0, "damping", self.damping, "a number >= 0")
        require(self.update in ("greedy", "joint", "single", "none"), "update", self.update,
                "greedy, joint, single or none")


class Obs(Pruner[ObsOptions]):
    """Optimal Brain Surgeon."""

    name: ClassVar[str] = "obs"
    reference: ClassVar[str] = "Hassibi & Stork 1992, Eq. 5"
    Options = ObsOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """L_q of every single deletion."""
        return unflatten(saliency(flatten(problem.weights.values()), self.inverse(problem)), problem.shapes)

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Remove ``count`` weights and move the others."""
        number = count(sparsity, problem.size)
        weights, inverse = flatten(problem.weights.values()), self.inverse(problem)
        scores = saliency(weights, inverse)
        removed = gone(problem)
        first = flatten(removed.values()).nonzero().flatten() if removed else weights.new_empty(0, dtype=torch.long)
        if self.options.update == "greedy":
            order, moved = greedy(weights, inverse, number, first)
        else:
            order = smallest(scores.index_fill(0, first, -torch.inf), number)
            delta = {"joint": joint_update, "single": single_updates, "none": _no_update}[self.options.update]
            moved = weights + delta(weights, inverse, order)
        keep = torch.ones_like(weights, dtype=torch.bool).index_fill(0, order, False)
        return Plan(unflatten(keep, problem.shapes), unflatten(moved * keep, problem.shapes),
                    scores=unflatten(scores, problem.shapes))

    def inverse(self, problem: Problem) -> Tensor:
        """(H + damping I)^-1 over all prunable weights, shape (n, n).

        Raises:
            OptionError: the network is too large, or H is not positive definite.
        """
        if problem.size > MAX_WEIGHTS:
            gib = 8 * problem.size**2 / 2**30
            raise OptionError(f"obs needs the whole {problem.size:,} x {problem.size:,} inverse Hessian ({gib:,.0f} GiB); "
                              f"it is limited to {MAX_WEIGHTS:,} weights: use woodfisher (blocks) or obc (per layer)")
        matrix = dense(problem, self.options.curvature)
        matrix.diagonal().add_(self.options.damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise OptionError(f"the {self.options.curvature} matrix is not positive definite at damping "
                              f"{self.options.damping:g}; give a larger damping (the paper uses up to 1e-4)")
        return torch.cholesky_inverse(factor)


def saliency(weights: Tensor, inverse: Tensor) -> Tensor:
    """w_q^2 / (2 [H^-1]_qq), shape (n,)."""
    return weights.square() / (2 * inverse.diagonal())


def single_update(weights: Tensor, inverse: Tensor, q: int) -> Tensor:
    """The best move of all weights that brings weight ``q`` to zero, shape (n,)."""
    return -weights[q] / inverse[q, q] * inverse[:, q]


def single_updates(weights: Tensor, inverse: Tensor, subset: Tensor) -> Tensor:
    """The sum of the single updates of ``subset``, shape (n,)."""
    return -inverse[:, subset] @ (weights[subset] / inverse.diagonal()[subset])


def joint_update(weights: Tensor, inverse: Tensor, subset: Tensor) -> Tensor:
    """The best move of all weights that brings those of ``subset`` to zero together, shape (n,)."""
    factor = torch.linalg.cholesky(inverse[subset][:, subset])
    return -inverse[:, subset] @ torch.cholesky_solve(weights[subset, None], factor)[:, 0]


def _no_update(weights: Tensor, inverse: Tensor, subset: Tensor) -> Tensor:
    return torch.zeros_like(weights)


def greedy(weights: Tensor, inverse: Tensor, number: int, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``number`` deletions, each the cheapest after the ones before.

    Args:
        weights: shape (n,).
        inverse: H^-1, shape (n, n); not changed.
        number: how many go.
        first: indices that go before any other.

    Returns:
        The order of deletion, shape (number,), and the weights afterwards, exactly 0 where removed.
    """
    weights, inverse = weights.clone(), inverse.clone()
    alive = torch.ones_like(weights, dtype=torch.bool)
    order = list(first[:number].tolist()) if first is not None else []
    for step in range(number):
        if step == len(order):
            cost = saliency(weights, inverse).masked_fill(~alive, torch.inf)
            order.append(int(cost.argmin()))
        q = order[step]
        weights += single_update(weights, inverse, q)
        inverse -= torch.outer(inverse[:, q], inverse[q] / inverse[q, q])
        alive[q] = False
        weights[~alive] = 0
        inverse[q], inverse[:, q], inverse[q, q] = 0, 0, 1
    return torch.tensor(order, dtype=torch.long, device=weights.device), weights
