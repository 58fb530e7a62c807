"""CBS, the combinatorial brain surgeon: choose the set that goes as a set, then move the rest jointly.

X. Yu, T. Serra, S. Ramalingam, S. Zhe, "The combinatorial brain surgeon: pruning weights that cancel one another in neural
networks", ICML 2022. With F = (1/N) sum_n g_n g_n^T, selection (CBS-S) looks for the set P of k weights with the
least w_P^T F_PP w_P, so that weights whose removals cancel go together; the update (CBS-U) is the joint OBS solution

    delta = -(F^-1)_:P [(F^-1)_PP]^-1 w_P,   F damped.

Selection is the paper's local search (Algorithm 1) from the magnitude solution. For i in P, alpha_i = 2 w_i (F w_P)_i - w_i^2
F_ii is what putting i back saves; for j outside, beta_j = 2 w_j (F w_P)_j + w_j^2 F_jj is what removing j costs; swapping
i and j changes the objective by beta_j - alpha_i - 2 w_i w_j F_ij. Each pass sorts P by alpha (descending) and the others
by beta less their interaction with the first of P (ascending), tries the first pair, then for the i-th of P the first
admissible j within ``window`` places of i, counting in the swaps already made in this pass; it ends after more than
``misses`` of P found no partner. Passes go on until the first pair improves by less than ``threshold``.

Choices left open: threshold 1e-4, window 10, misses 20, those of the authors' experiments. (In their code a comparison
without absolute value leaves negative weights out of the first candidates; here all weights that stay are candidates.) F in
the update is damped, and over the whole network by default (``block``); with few samples its inverse is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from exactprune.errors import OptionError
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, no_score, require
from exactprune.pruners.selection import count, flatten, smallest, unflatten
from exactprune.pruners.taps import all_factors, first_samples
from exactprune.pruners.woodfisher import WORKSPACE, WoodFisherOptions, update

MAX_BYTES = 4 * 2**30
RUN = 64  # weights of P whose products are computed together


@dataclass(frozen=True)
class CbsOptions:
    """Options of ``cbs``.

    Attributes:
        threshold: smallest improvement of the objective that a swap must make.
        window: how far from its place a partner is looked for.
        misses: weights without a partner that end a pass.
        passes: at most this many.
        samples: gradients to use, from the start of the data; 0 for all.
        update: joint, single or none.
        damping: of the Fisher matrix in the update.
        block: weights per block of F in the update; 0 for one block per layer, -1 for one block in all.
    """

    threshold: float = 1e-4
    window: int = 10
    misses: int = 20
    passes: int = 100
    samples: int = 1000
    update: Literal["joint", "single", "none"] = "joint"
    damping: float = 1e-5
    block: int = -1

    def __post_init__(self) -> None:
        require(self.threshold > 0, "threshold", self.threshold, "a number > 0")
        require(self.window >= 1, "window", self.window, "a whole number >= 1")
        require(self.misses >= 0, "misses", self.misses, "a whole number >= 0")
        require(self.passes >= 0, "passes", self.passes, "a whole number >= 0")
        self.fisher  # noqa: B018 (checks the rest)

    @property
    def fisher(self) -> WoodFisherOptions:
        """The options of the update."""
        return WoodFisherOptions(damping=self.damping, block=self.block, update=self.update, samples=self.samples)


class Cbs(Pruner[CbsOptions]):
    """Combinatorial selection and joint update."""

    name: ClassVar[str] = "cbs"
    reference: ClassVar[str] = "Yu et al. 2022, Alg. 1"
    Options = CbsOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """There is none: what a weight costs depends on what goes with it."""
        raise no_score(self.name)

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Local search for the set, then the update."""
        weights = flatten(problem.weights.values())
        search = self.search(problem, count(sparsity, problem.size))
        keep = torch.ones_like(weights, dtype=torch.bool).index_fill(0, search.pruned, False)
        masks = unflatten(keep, problem.shapes)
        delta = flatten(update(problem, masks, self.options.fisher).values())
        note = f"objective {search.objectives[0]:.6g} -> {search.objectives[-1]:.6g} in {len(search.objectives) - 1} passes"
        return Plan(masks, unflatten((weights + delta) * keep, problem.shapes), notes=(note,))

    def search(self, problem: Problem, number: int) -> Search:
        """The local search, finished."""
        weights = flatten(problem.weights.values())
        search = Search.start(weights, scaled_gradients(problem, self.options.samples), number)
        for _ in range(self.options.passes):
            if not search.sweep(self.options):
                break
        return search


def scaled_gradients(problem: Problem, samples: int = 0) -> Tensor:
    """Row q is w_q times the per-sample gradients of weight q, over sqrt(N), shape (n, N).

    Raises:
        OptionError: they do not fit in memory.
    """
    used = min(samples or len(problem.data[0]), len(problem.data[0]))
    if 8 * used * problem.size > MAX_BYTES:
        raise OptionError(f"cbs keeps {used:,} gradients of {problem.size:,} weights ({8 * used * problem.size / 2**30:.1f} "
                          f"GiB, the limit is {MAX_BYTES / 2**30:g}); give samples "
                          f"{max(1, MAX_BYTES // (8 * problem.size))} or less")
    factors, = all_factors(first_samples(problem, used))
    rows, start = problem.inputs.new_empty(problem.size, used, dtype=problem.dtype), 0
    for name, weight in problem.weights.items():
        each = factors[name]
        for a, b in pieces(each.size, max(1, WORKSPACE // (8 * used))):
            rows[start + a:start + b] = each.columns(a, b).T * (weight.flatten()[a:b, None] / used**0.5)
        start += each.size
    return rows


def pieces(total: int, width: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive pieces of at most ``width``."""
    for a in range(0, total, width):
        yield a, min(a + width, total)


@dataclass
class Search:
    """The local search's state.

    Attributes:
        scaled: row q is w_q g_q / sqrt(N), shape (n, N), so w_i F_ij w_j is a product of two rows.
        pruned: the set P.
        kept: candidates outside P.
        norms: F_qq w_q^2.
        total: the sum of the rows of P, so that its square is the objective.
        objectives: w_P^T F w_P at the start and after every pass.
    """

    scaled: Tensor
    pruned: Tensor
    kept: Tensor
    norms: Tensor
    total: Tensor
    objectives: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, weights: Tensor, scaled: Tensor, number: int) -> Search:
        """From the ``number`` weights of least magnitude."""
        pruned = smallest(weights.abs(), number)
        out = torch.ones_like(weights, dtype=torch.bool).index_fill(0, pruned, False)
        search = cls(scaled, pruned.sort().values, out.nonzero().flatten(), scaled.norm(dim=1).square(), scaled[0])
        search.measure()
        return search

    def measure(self) -> None:
        """Sum the rows of P afresh; the objective follows. A product reads them in place, where ``index_select`` copies."""
        member = self.scaled.new_zeros(len(self.scaled)).index_fill(0, self.pruned, 1)
        self.total = member @ self.scaled
        self.objectives.append(float(self.total.square().sum()))

    def sweep(self, options: CbsOptions) -> bool:
        """One pass of swaps; False where the first pair does not improve enough."""
        if not len(self.pruned) or not len(self.kept):
            return False
        reach = 2 * (self.scaled @ self.total)
        alpha = (reach - self.norms)[self.pruned]
        order = alpha.argsort(descending=True, stable=True)
        self.pruned, alpha = self.pruned[order], alpha[order]
        beta = (reach + self.norms)[self.kept]
        order = (beta - 2 * (self.scaled @ self.scaled[self.pruned[0]])[self.kept]).argsort(stable=True)
        self.kept, beta = self.kept[order], beta[order]
        pairs = self._pairs(alpha, beta, options)
        if not pairs:
            return False
        i, j = (torch.tensor(side, device=self.pruned.device) for side in zip(*pairs))
        self.pruned[i], self.kept[j] = self.kept[j], self.pruned[i]
        self.measure()
        return True

    def _pairs(self, alpha: Tensor, beta: Tensor, options: CbsOptions) -> list[tuple[int, int]]:
        """Places in P and outside that swap in this pass."""
        drift = torch.zeros_like(self.scaled[0])
        state = _Pass(alpha.cpu().numpy(), beta.cpu().numpy(), options)
        for begin, end in pieces(len(self.pruned), RUN):
            low, high = max(0, begin - options.window), min(len(self.kept), end + options.window)
            rows = self.scaled[torch.cat([self.pruned[begin:end], self.kept[low:high]])]
            before = len(state.pairs)
            state.run(begin, end, low, (rows @ rows.T).cpu().numpy(), (rows @ drift).cpu().numpy())
            if state.ended:
                break
            for i, j in state.pairs[before:]:
                drift += rows[end - begin + j - low] - rows[i - begin]
        return state.pairs


class _Pass:
    """One pass of swaps; products of the rows near each other come in runs, so that what is left is scalars.

    Attributes:
        pairs: (place in P, place outside) found so far.
        ended: whether the pass is over.
    """

    def __init__(self, alpha: np.ndarray, beta: np.ndarray, options: CbsOptions) -> None:
        self.alpha, self.beta, self.options = alpha, beta, options
        self.free = np.ones(len(beta), dtype=bool)
        self.pairs: list[tuple[int, int]] = []
        self.missed, self.ended = 0, False

    def run(self, begin: int, end: int, low: int, gram: np.ndarray, along: np.ndarray) -> None:
        """Places begin ... end - 1 of P.

        Args:
            begin: first place.
            end: after the last one.
            low: first place outside that any of them may take.
            gram: products of rows, P's first, then those outside.
            along: their products with the drift, the sum of what swaps of this pass have changed; kept current.
        """
        shift = end - begin - low
        for i in range(begin, end):
            j = self._partner(i, gram[i - begin], along, i - begin, shift)
            if j is not None:
                self.pairs.append((i, j))
                self.free[j] = False
                along += gram[:, shift + j] - gram[:, i - begin]
                continue
            self.missed += 1
            if i == 0 or self.missed > self.options.misses:
                self.ended = True
                return

    def _partner(self, i: int, products: np.ndarray, along: np.ndarray, own: int, shift: int) -> int | None:
        """First place in the window whose swap with i improves by the threshold."""
        reach = self.options.window
        low, high = (0, min(1, len(self.beta))) if i == 0 else (max(1, i - reach), min(len(self.beta), i + reach))
        if low >= high:
            return None
        near = slice(shift + low, shift + high)
        cost = self.beta[low:high] + 2 * (along[near] - products[near])
        found = (self.alpha[i] + 2 * along[own] - cost >= self.options.threshold) & self.free[low:high]
        place = int(found.argmax())
        return low + place if found[place] else None
