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

The whole inverse is limited to ``MAX_WEIGHTS`` weights. ``block`` = neuron keeps the blocks of H that belong to one output
neuron (channel) each, and sets the rest to zero: OBS on that matrix, still exact. Neurons then do not interact, so each one's
greedy order is followed to the end (``sweep``), and the orders are merged by the cost of the next step: that is the greedy
order of the block-diagonal matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from exactprune.errors import OptionError
from exactprune.pruners.curvature import CURVATURES, Curvature, dense, neuron_blocks
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, gone, require
from exactprune.pruners.selection import count, flatten, smallest, unflatten
from exactprune.pruners.sweep import rows_at_once, settle, sweep
from exactprune.pruners.taps import first_samples

MAX_WEIGHTS = 12_000
Update = Literal["greedy", "joint", "single", "none"]


@dataclass(frozen=True)
class ObsOptions:
    """Options of ``obs``.

    Attributes:
        curvature: hessian, gauss-newton or fisher.
        damping: added to the diagonal.
        update: greedy, joint, single or none.
        block: network (the whole matrix) or neuron (its blocks of one neuron each; not with curvature hessian).
        samples: use this many samples, from the start of the data; 0 for all.
    """

    curvature: Curvature = "gauss-newton"
    damping: float = 1e-8
    update: Update = "greedy"
    block: Literal["network", "neuron"] = "network"
    samples: int = 1000

    def __post_init__(self) -> None:
        require(self.curvature in CURVATURES, "curvature", self.curvature, ", ".join(CURVATURES))
        require(self.damping >= 0, "damping", self.damping, "a number >= 0")
        require(self.update in ("greedy", "joint", "single", "none"), "update", self.update,
                "greedy, joint, single or none")
        require(self.block in ("network", "neuron"), "block", self.block, "network or neuron")
        require(self.block == "network" or self.curvature != "hessian", "curvature", self.curvature,
                "gauss-newton or fisher with block neuron")
        require(self.samples >= 0, "samples", self.samples, "a whole number, 0 for all")


class Obs(Pruner[ObsOptions]):
    """Optimal Brain Surgeon."""

    name: ClassVar[str] = "obs"
    reference: ClassVar[str] = "Hassibi & Stork 1992, Eq. 5"
    Options = ObsOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """L_q of every single deletion."""
        return unflatten(self._score(first_samples(problem, self.options.samples)), problem.shapes)

    def _score(self, problem: Problem) -> Tensor:
        weights = flatten(problem.weights.values())
        if self.options.block == "network":
            return saliency(weights, self.inverse(problem))
        rows = zip(weight_rows(problem), self._neurons(problem))
        return torch.cat([saliency(w, inverse_of(hessian)) for w, hessian in rows])

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Remove ``count`` weights and move the others."""
        used, number = first_samples(problem, self.options.samples), count(sparsity, problem.size)
        removed = gone(problem)
        first = flatten(removed.values()).nonzero().flatten() if removed else \
            torch.zeros(0, dtype=torch.long, device=problem.device)
        whole = self.options.block == "network"
        keep, moved, scores = self._whole(used, number, first) if whole else self._by_neuron(used, number, first)
        return Plan(unflatten(keep, problem.shapes), unflatten(moved * keep, problem.shapes),
                    scores=None if scores is None else unflatten(scores, problem.shapes))

    # -- the whole matrix ----------------------------------------------------------------------------------------------

    def _whole(self, problem: Problem, number: int, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, inverse = flatten(problem.weights.values()), self.inverse(problem)
        scores = saliency(weights, inverse)
        if self.options.update == "greedy":
            order, moved = greedy(weights, inverse, number, first)
        else:
            order = smallest(scores.index_fill(0, first, -torch.inf), number)
            moved = weights + UPDATES[self.options.update](weights, inverse, order)
        return kept_but(weights, order), moved, scores

    def inverse(self, problem: Problem) -> Tensor:
        """H^-1, shape (n, n).

        Raises:
            OptionError: it is too large, or H is not positive definite.
        """
        if problem.size > MAX_WEIGHTS:
            gib = 8 * problem.size**2 / 2**30
            raise OptionError(f"obs needs the whole {problem.size:,} x {problem.size:,} inverse Hessian ({gib:,.0f} GiB); "
                              f"it is limited to {MAX_WEIGHTS:,} weights: use woodfisher (blocks), obs with block=neuron, "
                              "or obc (per layer)")
        return inverse_of(self._damped(dense(problem, self.options.curvature)))

    def _damped(self, matrix: Tensor) -> Tensor:
        matrix.diagonal().add_(self.options.damping)
        return matrix

    # -- block by block ------------------------------------------------------------------------------------------------

    def _by_neuron(self, problem: Problem, number: int, first: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        tick = problem.ticker(2 * sum(len(weight) for weight in problem.weights.values()))
        greedy_ = self.options.update == "greedy"
        scores = self._costs(problem, first, tick) if greedy_ else self._score(problem)
        keep = kept_but(scores, smallest(scores.index_fill(0, first, -torch.inf), number))
        moved, start = [], 0
        for w, hessian in zip(weight_rows(problem), self._neurons(problem)):
            moved.append(self._settled(w, hessian, ~keep[start:start + len(w)]))
            start += len(w)
            tick(1)
        return keep, torch.cat(moved), None if greedy_ else scores

    def _settled(self, weights: Tensor, hessian: Tensor, going: Tensor) -> Tensor:
        if self.options.update in ("greedy", "joint"):
            return settle(weights, hessian, going)
        return weights + UPDATES[self.options.update](weights, inverse_of(hessian), going.nonzero().flatten())

    def _costs(self, problem: Problem, first: Tensor, tick: Callable[[int], None]) -> Tensor:
        """What a weight's turn costs: the dearest step of its neuron's greedy order up to its own, shape (n,).

        Merging orders by the cost of the next step takes steps in the order of this number.
        """
        before = unflatten(torch.zeros(problem.size, dtype=torch.bool, device=problem.device).index_fill(0, first, True),
                           problem.shapes)
        blocks, costs = self._neurons(problem), []
        for name, weight in problem.weights.items():
            rows = zip(weight.flatten(1), before[name].flatten(1))
            for some in batched(rows, rows_at_once(weight[0].numel())):
                ready = [_started(w, next(blocks), going) for w, going in some]
                order, errors = sweep(torch.stack([w for w, _ in ready]), torch.stack([inverse_of(h) for _, h in ready]))
                costs.append(torch.empty_like(errors).scatter_(1, order, errors.cummax(1).values).flatten())
                tick(len(ready))
        return torch.cat(costs)

    def _neurons(self, problem: Problem) -> Iterator[Tensor]:
        """The damped blocks of H, neuron after neuron in global index order."""
        for block in neuron_blocks(problem, self.options.curvature):
            yield self._damped(block)


def inverse_of(matrix: Tensor) -> Tensor:
    """The inverse of a positive definite matrix.

    Raises:
        OptionError: it is not.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise OptionError("obs: the curvature matrix is not positive definite at this damping; give a larger damping (the "
                          "paper uses up to 1e-4)")
    return torch.cholesky_inverse(factor)


def weight_rows(problem: Problem) -> Iterator[Tensor]:
    """The weights of every output neuron (channel), in global index order."""
    for weight in problem.weights.values():
        yield from weight.flatten(1)


def _started(weights: Tensor, hessian: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """A neuron's weights and Hessian once ``going`` is gone."""
    return (settle(weights, hessian, going), _without(hessian, going)) if bool(going.any()) else (weights, hessian)


def _without(hessian: Tensor, going: Tensor) -> Tensor:
    """H with the rows and columns of what is gone already replaced by those of the identity."""
    matrix = hessian.masked_fill(going[:, None] | going, 0)
    matrix.diagonal()[going] = 1
    return matrix


def batched(things: Iterable[Any], number: int) -> Iterator[list[Any]]:
    """Lists of at most ``number`` consecutive things."""
    left = iter(things)
    while some := list(islice(left, number)):
        yield some


def kept_but(like: Tensor, removed: Tensor) -> Tensor:
    """True everywhere but at the indices ``removed``."""
    return torch.ones_like(like, dtype=torch.bool).index_fill(0, removed, False)


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


UPDATES = {"greedy": joint_update, "joint": joint_update, "single": single_updates, "none": _no_update}


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
