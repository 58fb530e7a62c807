"""Branch and bound over the phases of two networks whose neurons are bounded in pairs.

Phases are split on both networks, on z_A >= 0 and on z_B = r z_A + dz >= 0; ``difference_bounding`` bounds a node, where what the
networks share cancels inside the tree too, which branch and bound on A and B side by side forgets at once. The best bound
first, until the largest open one is at most (1 + gap) times the largest difference that was found: sound at any moment, because
the open nodes and the closed ones cover the domain.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from exactprune.deciders.difference_bounding import STEPS, Bounding, Maps, Rows, Solved
from exactprune.deciders.difference_search import Largest, Search
from exactprune.network import INPUT

BATCH, NODES = 128, 400_000
ELASTIC = 1e5  # what leaving a phase costs, times the objective's largest coefficient
AGAIN = 4  # times that a node without open phases is tuned again
ROUNDS, CUTS = 2, 100  # of cuts before the first split


@dataclass(frozen=True, eq=False)
class Proof:
    """What branch and bound reached.

    Attributes:
        upper: (outputs,) sound bounds of abs(A - B).
        found: the largest differences met.
        count: how many nodes were bounded.
        reason: why the gap is open; empty when it is closed.
    """

    upper: np.ndarray
    found: Largest
    count: int
    reason: str


@dataclass(order=True)
class _Node:
    key: float
    number: int
    output: int = field(compare=False)
    sign: float = field(compare=False)
    data: np.ndarray = field(compare=False)
    branch: tuple[int, int] | None = field(compare=False)
    again: int = field(compare=False, default=0)


class PhaseSplit:
    """One run.

    Args:
        bounding: bounds of B relative to A.
        search: judges points.
        upper: (outputs,) what is known.
        found: points so far.
        gap, tolerance, deadline: see ``exactprune.equiv``.
        memory: bytes for open nodes.
    """

    words = "branch and bound over phases"

    def __init__(self, bounding: Bounding, search: Search, upper: np.ndarray, found: Largest, *, gap: float,
                 tolerance: float | None, deadline: float, memory: int = 1 << 30) -> None:
        self.bounding, self.search, self.found = bounding, search, found
        self.gap, self.tolerance, self.deadline = gap, tolerance, deadline
        self.layout = Layout.of(bounding)
        self.limit = min(NODES, memory // (8 * self.layout.size + 1000))
        self.start, self.closed = upper.copy(), np.zeros_like(upper)
        self.heap: list[_Node] = []
        self.count, self.stuck = 0, False

    def run(self) -> Proof:
        """Split until the gap is closed, the tolerance is decided, or time is up; may be called again with more time."""
        if self._goal() == 0:
            return Proof(self.start, self.found, 0, "no difference was found, so there is no gap to close; give a tolerance")
        with torch.no_grad():
            if not self.count:
                self._roots()
            reason = ""
            while self.heap and not reason and not self._enough():
                if monotonic() > self.deadline or len(self.heap) >= self.limit:
                    reason = f"{'time' if monotonic() > self.deadline else 'memory'} limit after {self.count} nodes"
                else:
                    self._round()
        upper = self.closed.copy()
        for node in self.heap:
            upper[node.output] = max(upper[node.output], -node.key)
        upper = np.minimum(self.start, upper)
        if not reason and self.stuck and upper.max(initial=0.0) > self._goal():
            reason = f"{self.count} nodes, and some with all phases fixed stay above the goal"
        return Proof(upper, self.found, self.count, reason)

    def _best(self) -> float:
        return float(self.found.lower.max(initial=0.0))

    def _goal(self) -> float:
        best, own = self._best(), (1 + self.gap) * self._best()
        return own if self.tolerance is None or best > self.tolerance else max(self.tolerance, own)

    def _enough(self) -> bool:
        decided = self.tolerance is not None and self._best() > self.tolerance
        return decided or -self.heap[0].key <= self._goal()

    def _roots(self) -> None:
        asked = np.flatnonzero(self.start > self._goal())
        self.closed = np.where(self.start > self._goal(), 0.0, self.start)
        every = [(int(o), s) for o in asked for s in (1.0, -1.0)]
        device = self.bounding.program.device
        for i in range(0, len(every), BATCH):
            some = every[i : i + BATCH]
            rows = self.bounding.first_rows(self.bounding.difference, torch.tensor([o for o, _ in some], device=device),
                                            torch.tensor([s for _, s in some], dtype=torch.float64, device=device))
            packed = self.layout.pack(rows)
            nodes = [_Node(-float(self.start[o]), 0, o, s, data, None) for (o, s), data in zip(some, packed, strict=True)]
            self._bound(nodes, 3 * STEPS)

    def _round(self) -> None:
        nodes: list[_Node] = []
        fixed: list[_Node] = []
        goal = self._goal()
        while self.heap and len(nodes) + len(fixed) < BATCH:
            node = heapq.heappop(self.heap)
            if -node.key <= goal:
                self._close(node.output, -node.key)
            elif node.branch is None:  # all phases are fixed: only better multipliers are left
                fixed.append(replace(node, again=node.again + 1))
            else:
                nodes += [replace(node, data=self.layout.split(node.data, *node.branch, phase)) for phase in (-1, 1)]
        for some, steps in ((nodes, STEPS), (fixed, 10 * STEPS)):
            if some:
                self._bound(some, steps)

    def _close(self, output: int, bound: float) -> None:
        self.closed[output] = max(self.closed[output], bound)

    def _bound(self, nodes: Sequence[_Node], steps: int) -> None:
        device = self.bounding.program.device
        widest = self.layout.size + len(self.bounding.cuts)
        data = np.stack([np.pad(node.data, (0, widest - len(node.data))) for node in nodes])
        rows = self.layout.rows(data, self.bounding.difference,
                                torch.tensor([node.output for node in nodes], device=device),
                                torch.tensor([node.sign for node in nodes], dtype=torch.float64, device=device))
        for i, node in enumerate(nodes):
            if node.again == 1:
                self._by_lp(rows, i, node)
        rows, solved, average = self.bounding.tuned(rows, self._goal(), steps)
        self.found = self.found.joined(self.search.judge(torch.cat([solved.corner, average[INPUT]])))
        if not self.count:
            rows, solved = self._with_cuts(rows, solved, average)
        branches, packed = self._branches(rows, solved), self.layout.pack(rows)
        for node, value, branch, data in zip(nodes, solved.bound.tolist(), branches, packed, strict=True):
            self.count += 1
            bound = min(value, -node.key)
            if bound <= self._goal() or node.again >= AGAIN:
                self.stuck |= bound > self._goal()
                self._close(node.output, bound)
                continue
            heapq.heappush(self.heap, _Node(-bound, self.count, node.output, node.sign, data, branch, node.again))

    def _with_cuts(self, rows: Rows, solved: Solved, average: Maps) -> tuple[Rows, Solved]:
        """Cuts that the relaxation's mean points violate, a few rounds."""
        for _ in range(ROUNDS):
            if bool((solved.bound <= self._goal()).all()) or not self.bounding.cut(rows, replace(solved, points=average), CUTS):
                break
            rows = widened(rows, len(self.bounding.cuts))
            rows, solved, average = self.bounding.tuned(rows, self._goal(), 3 * STEPS)
        return rows, solved

    def _by_lp(self, rows: Rows, i: int, node: _Node) -> None:
        """Put the LP's duals into ``rows`` as the multipliers of a node whose phases are all fixed.

        Both networks are affine there, so they are measured at 0 and the unit vectors. The rows are elastic: a node
        without points gets large multipliers. A wrong multiplier costs tightness, never soundness.
        """
        bounding, row = self.bounding, taken(rows, torch.tensor([i], device=rows.neurons.device))
        row = replace(row, mix=torch.zeros_like(row.mix))
        lines, _ = bounding.lines(row)
        low, high = (t[0].cpu().numpy() for t in (bounding.known[INPUT].lower, bounding.known[INPUT].upper))
        points = torch.eye(len(low) + 1, len(low), dtype=torch.float64, device=bounding.program.device).roll(1, 0)
        ones = {k: torch.ones(1, 1, dtype=torch.float64, device=points.device) for k in bounding.layers}
        values, _ = bounding.forward(points, ones, lines, bounding.difference, {})
        out = (values[bounding.difference][:, node.output] * node.sign).cpu().numpy()
        splits = [(k, int(j)) for k, s in row.sigma.items() for j in torch.nonzero(s[0]).flatten().tolist()]
        forms = np.array([float(row.sigma[k][0, j]) * values[bounding.own(k)][:, j].cpu().numpy() for k, j in splits])
        if not splits or not all(np.isfinite(t).all() for t in (out, forms)):
            return
        gradient, constant = forms[:, 1:] - forms[:, :1], forms[:, 0]
        scale = np.maximum(np.abs(gradient).max(axis=1), 1e-300)
        most = ELASTIC * max(float(np.abs(out[1:] - out[0]).max()), 1e-300)
        found = linprog(np.append(out[0] - out[1:], most), np.hstack([-gradient / scale[:, None], -np.ones((len(scale), 1))]),
                        constant / scale, bounds=[*zip(low, high, strict=True), (0, None)], method="highs")
        if found.status == 0:
            for (k, j), dual in zip(splits, -found.ineqlin.marginals / scale, strict=True):
                rows.beta[k][i, j] = max(0.0, float(dual))

    def _branches(self, rows: Rows, solved: Solved) -> list[tuple[int, int] | None]:
        """Per row the phase that gives most away at the corner among those that are open; None where all are fixed."""
        scores, places = [], []
        for k in self.bounding.layers:
            bounds = self.bounding.phase(k, rows)
            open_ = (bounds.lower < 0) & (bounds.upper > 0) & (rows.sigma[k] == 0)
            scores.append(torch.where(open_, solved.slack[k] + 1e-300, -1.0))
            places += [(k, j) for j in range(open_.shape[1])]
        if not places:
            return [None] * len(rows.neurons)
        best, at = torch.cat(scores, dim=1).max(dim=1)
        return [places[j] if s > 0 else None for s, j in zip(best.tolist(), at.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything that a node keeps of its row, as one vector of floats.

    Attributes:
        alpha, share, sigma, beta: (layer, where it lies) by layer.
        size: of the vector.
    """

    alpha: dict[int, slice]
    share: dict[int, slice]
    sigma: dict[int, slice]
    beta: dict[int, slice]
    size: int

    @staticmethod
    def of(bounding: Bounding) -> Layout:
        """For the layers of a pair of networks."""
        end = 0

        def place(position: int) -> slice:
            nonlocal end
            begin, end = end, end + bounding.program.size(position)
            return slice(begin, end)

        alpha, sigma, beta = ({k: place(bounding.own(k)) for k in bounding.layers} for _ in range(3))
        share = {k: place(bounding.own(k)) for k in bounding.pairs}
        return Layout(alpha, share, sigma, beta, end)

    def pack(self, rows: Rows) -> np.ndarray:
        """(rows, size)."""
        data = torch.empty(len(rows.neurons), self.size + rows.mix.shape[1], dtype=torch.float64)
        data[:, self.size :] = rows.mix
        for name in ("alpha", "share", "sigma", "beta"):
            for k, where in getattr(self, name).items():
                data[:, where] = getattr(rows, name)[k].to(data.device, torch.float64)
        return data.numpy()

    def rows(self, data: np.ndarray, target: int, neurons: Tensor, signs: Tensor) -> Rows:
        """The other way round."""
        given = torch.from_numpy(data).to(neurons.device)
        alpha, share = ({k: given[:, where] for k, where in m.items()} for m in (self.alpha, self.share))
        sigma = {k: given[:, where] for k, where in self.sigma.items()}
        beta = {k: given[:, where].clone() for k, where in self.beta.items()}
        return Rows(target, neurons, signs, alpha, share, sigma, beta, given[:, self.size :])

    def split(self, data: np.ndarray, layer: int, neuron: int, phase: int) -> np.ndarray:
        """One more phase fixed."""
        data = data.copy()
        data[self.sigma[layer].start + neuron] = phase
        return data


def taken(rows: Rows, which: Tensor) -> Rows:
    """Some of the rows."""
    alpha, share, sigma, beta = ({k: t[which] for k, t in m.items()} for m in (rows.alpha, rows.share, rows.sigma, rows.beta))
    return Rows(rows.target, rows.neurons[which], rows.signs[which], alpha, share, sigma, beta, rows.mix[which])


def widened(rows: Rows, cuts: int) -> Rows:
    """The same where there are more cuts by now."""
    more = cuts - rows.mix.shape[1]
    return replace(rows, mix=torch.cat([rows.mix, rows.mix.new_zeros(len(rows.mix), more)], dim=1))
