"""Branch and bound over ReLU phases, many neurons and many nodes at once (beta-CROWN style).

To decide whether sign * z_hat <= 0 on D, nodes fix the phases of some neurons; a node is closed when its dual bound
(``bounds.dual``, alpha and beta tuned by gradients, warm-started from the parent) is <= 0, and split otherwise on the neuron
whose relaxation gives most away at the node's maximising corner. That corner, evaluated on the real network, is also the natural
counterexample: it is how most unstable neurons that sampling missed are found. (Bunel et al. 2020, "Branch and bound for
piecewise linear neural network verification"; Wang et al. 2021, "Beta-CROWN".)

Why sound: the leaves of the tree cover D, and the tree with a leaf's multipliers is a certificate that the checker re-evaluates
exactly; nothing else is believed. A leaf closed by the dual ascent has a sound bound already; one closed by an LP has only the
solver's word until the checker has seen its multipliers.

Work is counted in nodes, not seconds, wherever it could change a verdict, so equal runs give equal answers; the time limit
can only turn verdicts into ``unknown``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.dual import Optimised, Rows, optimise
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.program import Program
from exactprune.deciders.proofs import Multipliers, Tree

LP_MARGIN = 1e-7  # of a neuron's range: a solver's tolerance is not to close a node

Refuter = Callable[[Tensor, Tensor, Tensor], Tensor]
Splits = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Relaxed:
    """An exact solution of a node's LP relaxation.

    Attributes:
        bound: upper bound of sign * z_hat that the solver suggests; infinite if it failed.
        multipliers: that prove it, one row; None if there are none.
        point: the LP's maximiser, float64 (inputs,), a candidate counterexample; None if there is none.
    """

    bound: float
    multipliers: Multipliers | None
    point: np.ndarray | None


NodeLP = Callable[[int, int, Splits], Relaxed]


@dataclass(frozen=True)
class Limits:
    """When to give up.

    Attributes:
        deadline: on the clock of ``time.monotonic``.
        nodes: per neuron and side.
        batch: nodes bounded at once.
        steps: gradient steps a node.
        lp_after: nodes of one neuron after which further nodes that stay open are also solved as LPs, as long as that closes
            at least a quarter of them.
    """

    deadline: float
    nodes: int = 20_000
    batch: int = 256
    steps: int = 12
    lp_after: int = 32


@dataclass(frozen=True, eq=False)
class Decision:
    """What became of one (neuron, sign).

    Attributes:
        neuron, sign: the question was whether sign * z_hat <= 0 on D.
        tree: the proof, if proved.
        refuted: a counterexample was found (and recorded by the caller's refuter).
        reason: why it is open, if it is.
        bound: the best upper bound of sign * z_hat known.
        nodes: how many nodes were bounded.
    """

    neuron: int
    sign: int
    tree: Tree | None
    refuted: bool
    reason: str
    bound: float
    nodes: int


@dataclass(eq=False)
class _Node:
    problem: int
    place: int
    splits: Splits  # (layer, neuron, sigma)
    alpha: Mapping[int, Tensor]
    beta: tuple[float, ...]
    bound: float
    branch: tuple[int, int] | None


@dataclass(eq=False)
class Problem:
    """One question on its way: its open nodes, and the tree so far."""

    neuron: int
    sign: int
    open: deque[_Node] = field(default_factory=deque)
    children: dict[int, tuple[int, int, tuple[int, int]]] = field(default_factory=dict)
    leaves: dict[int, Multipliers] = field(default_factory=dict)
    nodes: int = 0
    lp_tried: int = 0
    lp_closed: int = 0
    refuted: bool = False
    reason: str = ""

    def wants_lp(self, after: int) -> bool:
        """Whether exact LPs have been worth their time so far."""
        return self.nodes > after and (self.lp_tried < 8 or 4 * self.lp_closed >= self.lp_tried)

    @property
    def active(self) -> bool:
        return bool(self.open) and not self.refuted and not self.reason


class BranchAndBound:
    """One run over the open neurons of one layer.

    Args:
        program: the network.
        known: bounds of every node before the layer (one group).
        rows: the open (neuron, sign) rows with good starting slopes, for example alpha-CROWN's.
        refute: called with (points, neurons, signs), says which points are confirmed counterexamples; (rows,) booleans.
        limits: when to give up.
        node_lp: solves a node's relaxation exactly, for nodes where the dual ascent is not enough; optional.
        progress: called with the number of decided rows.
    """

    def __init__(self, program: Program, known: Mapping[int, NodeBounds], rows: Rows, refute: Refuter, limits: Limits,
                 node_lp: NodeLP | None = None, progress: Callable[[int], None] | None = None) -> None:
        self.program, self.known, self.rows, self.refute, self.limits = program, known, rows, refute, limits
        self.node_lp, self.progress = node_lp, progress
        self.layer = rows.layer
        self.problems = [Problem(int(n), int(s)) for n, s in zip(rows.neurons.tolist(), rows.signs.tolist(), strict=True)]
        self.unstable = {k: self._unstable(k) for k in rows.alpha}

    def run(self) -> list[Decision]:
        """Decide every row, or give up with a reason."""
        self._roots()
        while True:
            active = [p for p in self.problems if p.active]
            if not active:
                break
            if monotonic() > self.limits.deadline:
                for problem in active:
                    problem.reason = f"time limit after {problem.nodes} branch-and-bound nodes"
                break
            self._round(active)
        return [self._decision(problem) for problem in self.problems]

    # -- one round -----------------------------------------------------------------------------------------------------

    def _unstable(self, layer: int) -> Tensor:
        bounds = self.known[self.program.preactivation(layer)]
        return torch.nonzero((bounds.lower[0] < 0) & (bounds.upper[0] > 0)).flatten()

    def _roots(self) -> None:
        solved = self._solve(self.rows, range(len(self.problems)), steps=2 * self.limits.steps)
        for i, problem in enumerate(self.problems):
            self._file(problem, 0, (), solved, i)

    def _round(self, active: Sequence[Problem]) -> None:
        share = max(1, self.limits.batch // (2 * len(active)))
        picked: list[_Node] = []
        for problem in sorted(active, key=lambda p: len(p.open)):
            if len(picked) * 2 >= self.limits.batch:
                break
            picked.extend(problem.open.pop() for _ in range(min(share, len(problem.open))))
        children = [self._child(node, phase) for node in picked for phase in (-1, 1)]
        rows = self._rows_of(children)
        solved = self._solve(rows, [child.problem for child in children], steps=self.limits.steps)
        for i, child in enumerate(children):
            problem = self.problems[child.problem]
            if not problem.refuted:
                self._file(problem, child.place, child.splits, solved, i)
        for problem in active:
            if problem.nodes >= self.limits.nodes and problem.open:
                problem.reason = f"gave up after {problem.nodes} branch-and-bound nodes"
        if self.progress is not None:
            self.progress(sum(not p.active for p in self.problems))

    def _child(self, node: _Node, phase: int) -> _Node:
        assert node.branch is not None
        problem = self.problems[node.problem]
        if phase < 0:
            first = 1 + 2 * len(problem.children)
            problem.children[node.place] = (first, first + 1, node.branch)
        left, right, _ = problem.children[node.place]
        splits = (*node.splits, (*node.branch, phase))
        return _Node(node.problem, left if phase < 0 else right, splits, node.alpha, (*node.beta, 0.0), node.bound, None)

    def _rows_of(self, nodes: Sequence[_Node]) -> Rows:
        device = self.program.device
        alpha = {k: torch.stack([node.alpha[k] for node in nodes]) for k in self.rows.alpha}
        sigma = {k: torch.zeros(t.shape, dtype=torch.int8, device=device) for k, t in alpha.items()}
        beta = {k: torch.zeros(t.shape, dtype=torch.float64, device=device) for k, t in alpha.items()}
        for k in alpha:
            at = [(i, j, s, b) for i, node in enumerate(nodes)
                  for (layer, j, s), b in zip(node.splits, node.beta, strict=True) if layer == k]
            if at:
                row, column, phase, value = zip(*at, strict=True)
                where = (torch.tensor(row, device=device), torch.tensor(column, device=device))
                sigma[k][where] = torch.tensor(phase, dtype=torch.int8, device=device)
                beta[k][where] = torch.tensor(value, dtype=torch.float64, device=device)
        neurons = torch.tensor([self.problems[n.problem].neuron for n in nodes], device=device)
        signs = torch.tensor([float(self.problems[n.problem].sign) for n in nodes], dtype=torch.float64, device=device)
        return Rows(self.layer, neurons, signs, alpha, sigma, beta)

    def _solve(self, rows: Rows, problems: Sequence[int], steps: int) -> Optimised:
        solved = optimise(self.program, rows, self.known, steps)
        for points in (solved.solution.corner, solved.average):
            hit = self.refute(points, rows.neurons, rows.signs)
            for i in torch.nonzero(hit).flatten().tolist():
                self.problems[problems[i]].refuted = True
        return solved

    def _file(self, problem: Problem, place: int, splits: Splits, solved: Optimised, row: int) -> None:
        problem.nodes += 1
        bound = float(solved.bound[row])
        if bound <= 0:
            problem.leaves[place] = self._multipliers(solved, row)
            return
        branch = self._branch(solved, row)
        if (branch is None or problem.wants_lp(self.limits.lp_after)) and self._closed_by_lp(problem, place, splits):
            return
        if branch is None:
            problem.reason = f"no phase left to split at bound {bound:.3g}"
        alpha = {k: t[row].clone() for k, t in solved.rows.alpha.items()}
        beta = tuple(float(solved.rows.beta[k][row, j]) for k, j, _ in splits)
        index = self.problems.index(problem)
        problem.open.append(_Node(index, place, splits, alpha, beta, bound, branch))

    def _closed_by_lp(self, problem: Problem, place: int, splits: Splits) -> bool:
        """Whether a node's LP closes it: by a bound with multipliers, or by a counterexample that settles the problem."""
        if self.node_lp is None:
            return False
        relaxed = self.node_lp(problem.neuron, problem.sign, splits)
        problem.lp_tried += 1
        if relaxed.bound <= -LP_MARGIN * self._range(problem.neuron) and relaxed.multipliers is not None:
            problem.lp_closed += 1
            problem.leaves[place] = relaxed.multipliers
            return True
        if relaxed.point is not None:
            point = torch.tensor(relaxed.point, dtype=torch.float64, device=self.program.device).reshape(1, -1)
            sign = torch.tensor([float(problem.sign)], dtype=torch.float64, device=self.program.device)
            problem.refuted = bool(self.refute(point, torch.tensor([problem.neuron]), sign)[0])
        return problem.refuted

    def _range(self, neuron: int) -> float:
        bounds = self.known[self.program.preactivation(self.layer)]
        return float(bounds.upper[0, neuron] - bounds.lower[0, neuron])

    def _branch(self, solved: Optimised, row: int) -> tuple[int, int] | None:
        best, choice = 0.0, None
        for k, slack in solved.solution.slack.items():
            if not len(self.unstable[k]):
                continue
            sigma = solved.rows.sigma.get(k)
            candidates = slack[row, self.unstable[k]].clamp(min=0) + 1e-300
            if sigma is not None:
                candidates = candidates * (sigma[row, self.unstable[k]] == 0)
            value, at = candidates.max(dim=0)
            if float(value) > best:
                best, choice = float(value), (k, int(self.unstable[k][at]))
        return choice

    def _multipliers(self, solved: Optimised, row: int) -> Multipliers:
        neurons = {k: i.cpu().numpy() for k, i in self.unstable.items() if len(i)}
        values = {k: solved.solution.multipliers[k][row, self.unstable[k]].cpu().numpy()[None]
                  for k in neurons if k in solved.solution.multipliers}
        return Multipliers({k: neurons[k] for k in values}, values)

    # -- results -------------------------------------------------------------------------------------------------------

    def _decision(self, problem: Problem) -> Decision:
        bound = max([node.bound for node in problem.open], default=0.0)
        proved = not problem.refuted and not problem.open and not problem.reason
        tree = self._tree(problem) if proved else None
        return Decision(problem.neuron, problem.sign, tree, problem.refuted, problem.reason, bound, problem.nodes)

    def _tree(self, problem: Problem) -> Tree:
        splits: list[tuple[int, int] | None] = []
        leaves: list[Multipliers] = []
        stack = [0]
        while stack:
            place = stack.pop()
            if place in problem.children:
                left, right, branch = problem.children[place]
                splits.append(branch)
                stack.extend((right, left))
            else:
                splits.append(None)
                leaves.append(problem.leaves[place])
        return Tree(self.layer, problem.neuron, problem.sign, splits, leaves)
