"""Branch and bound over the phases of two networks whose neurons are bounded in pairs.

``bounds.difference`` writes a neuron of B as y_B = r y_A + delta. Here phases are split on both networks, on z_A >= 0 and on
z_B = r z_A + dz >= 0, and the relaxation of delta follows the phases:

    A on, B on: delta = dz      both off: delta = 0      A on, B off: delta = -r z_A      A off, B on: delta = z_B,

all of them linear, and between min(dz, 0) and max(dz, 0) while a phase is open. So what the networks share still cancels
inside the tree, which branch and bound on A and B side by side forgets at once. A node's bound is a dual one (``bounds.dual``):
slopes alpha of A's relaxation and multipliers beta >= 0 of the phases that were split (Wang et al. 2021, "Beta-CROWN"), tuned by
gradients; it is sound for any alpha and beta, and all rounding is paid for in ``crown.Backward``. The best bound first, until
the largest open one is at most (1 + gap) times the largest difference that was found: sound at any moment, because the open
nodes and the closed ones cover the domain.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from time import monotonic

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from exactprune.bounds.crown import Backward, Trace, start_error, start_rows
from exactprune.bounds.difference import Joint, relax_delta
from exactprune.bounds.dual import _Adam as Adam
from exactprune.bounds.interval import NodeBounds, pool_choice
from exactprune.bounds.layerwise import Layerwise
from exactprune.bounds.program import TINY, UNIT_ROUNDOFF
from exactprune.bounds.relaxation import Relaxation, adaptive_slope, relax
from exactprune.deciders.difference_search import Largest, Search
from exactprune.network import INPUT
from exactprune.ops import Add, Affine, MaxPool2d, ReLU

BATCH, STEPS, NODES = 128, 10, 400_000
ELASTIC = 1e5  # what leaving a phase costs, times the objective's largest coefficient
RATE, LEAST = 0.25, 2e-3  # first step size, and the share of it that the last step is
AGAIN = 4  # times that a node without open phases is tuned again
PER_NODE = 4096  # bytes an open node keeps, about

Maps = dict[int, Tensor]
Split = tuple[int, int, int]


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


@dataclass(frozen=True, eq=False)
class Pair:
    """What a layer of deltas belongs to.

    Attributes:
        partner: position of -r z_A.
        first: ReLU layer of A; -1 if its phases cannot be split.
        source: (neurons,) A's neuron, 0 where there is none.
        matched: (neurons,) where there is one.
        own: bounds of z_B, (1, neurons).
    """

    partner: int
    first: int
    source: Tensor
    matched: Tensor
    own: NodeBounds


@dataclass(frozen=True, eq=False)
class Rows:
    """One row a node: an output, a sign, and by ReLU layer slopes, phases (-1, 0, 1) and multipliers, (rows, neurons)."""

    outputs: Tensor
    signs: Tensor
    alpha: Maps
    sigma: Maps
    beta: Maps


@dataclass(frozen=True, eq=False)
class Solved:
    """Sound bounds (rows,), points (rows, inputs), and by ReLU layer what each phase gives away, and gradients."""

    bound: Tensor
    corner: Tensor
    slack: Maps
    for_alpha: Maps
    for_beta: Maps
    scale: Maps


@dataclass(order=True)
class _Node:
    key: float
    number: int
    output: int = field(compare=False)
    sign: float = field(compare=False)
    splits: tuple[Split, ...] = field(compare=False)
    alpha: dict[int, Tensor] = field(compare=False)
    beta: tuple[float, ...] = field(compare=False)
    branch: tuple[int, int] | None = field(compare=False)
    again: int = field(compare=False, default=0)


class _Backward(Backward):
    """Backward substitution that also carries what a delta or a split phase of B puts on -r z_A."""

    pairs: Mapping[int, Pair]
    turned: Mapping[int, Tensor]

    def _relu(self, position: int, v: Tensor, total: Tensor, pending: dict[int, Tensor]) -> Tensor:
        layer = self.layer_of[position]
        total = super()._relu(position, v, total, pending)
        if layer not in self.pairs:
            return total
        partner, extra = self.pairs[layer].partner, self.extra[layer].unsqueeze(1)
        size = self.known[partner].magnitude * (4 * self.program.gamma) + TINY
        self._give(pending, position, partner, v * self.turned[layer].unsqueeze(1) - extra)
        return total + ((v.abs() + extra.abs()) * size).sum(dim=-1)


class PhaseSplit:
    """One run.

    Args:
        joint: B relative to A.
        state: ``difference_bounds`` of it over the whole box.
        search: judges points.
        upper: (outputs,) what is known.
        found: points so far.
        beside: ReLU layer of the joint network -> more bounds of z_B, if there are some.
        gap, tolerance, deadline: see ``exactprune.equiv``.
        memory: bytes for open nodes.
    """

    words = "branch and bound over phases"

    def __init__(self, joint: Joint, state: Layerwise, search: Search, upper: np.ndarray, found: Largest, *, gap: float,
                 tolerance: float | None, deadline: float, beside: Mapping[int, NodeBounds] | None = None,
                 memory: int = 1 << 30) -> None:
        self.joint, self.state, self.search, self.found = joint, state, search, found
        self.gap, self.tolerance, self.deadline = gap, tolerance, deadline
        self.program, self.known = state.program, state.known
        self.limit = min(NODES, memory // PER_NODE)
        self.pairs = {k: self._pair(k, (beside or {}).get(k)) for k in joint.deltas}
        self.layers = list(range(joint.last))
        self.plain = [k for k in self.layers if k not in self.pairs]
        self.start, self.closed = upper.copy(), np.zeros_like(upper)
        self.heap: list[_Node] = []
        self.count, self.stuck = 0, False

    # -- facts -----------------------------------------------------------------------------------------------------------

    def _pair(self, layer: int, beside: NodeBounds | None) -> Pair:
        delta = self.joint.deltas[layer]
        node = self.program.network.nodes[delta.partner]
        first = next((k for k in range(layer) if self.program.preactivation(k) == node.inputs[0]), -1)
        weight = next(array for name, array in node.op.arrays() if name == "weight")
        units = np.abs(weight).reshape(*weight.shape[:2]).argmax(axis=1) if weight.size else np.zeros(len(weight), np.int64)
        places = 1 if isinstance(node.op, Affine) else prod(self.program.network.shapes[delta.partner][1:])
        source = (units[:, None] * places + np.arange(places)).reshape(-1)
        device = self.program.device
        own = self.known[self._own(layer)]
        partner, dz = self.known[delta.partner], self.state.at(layer)
        low, high = _less(dz, partner)
        low, high = torch.maximum(low, own.lower), torch.minimum(high, own.upper)
        if beside is not None:
            low, high = torch.maximum(low, beside.lower), torch.minimum(high, beside.upper)
        return Pair(delta.partner, first, torch.tensor(source, device=device),
                    torch.as_tensor(delta.matched, device=device), NodeBounds(low, high))

    def _own(self, layer: int) -> int:
        """Position of z_B: dz = z_B + (-r z_A)."""
        add = self.program.network.nodes[self.program.preactivation(layer)]
        return next(i for i in add.inputs if i != self.joint.deltas[layer].partner)

    # -- one node --------------------------------------------------------------------------------------------------------

    def solve(self, rows: Rows) -> Solved:
        """Bounds of the rows at their present multipliers."""
        relaxations, turned, empty = self._relaxations(rows)
        trace = Trace()
        start, v, constant = start_rows(self.program, self.joint.last, rows.outputs, self.known)
        back = _Backward(self.program, self.known, relaxations, trace, {k: rows.sigma[k] * rows.beta[k] for k in self.layers})
        back.pairs, back.turned = self.pairs, turned
        bound = back.run(start, (v * rows.signs[:, None]).unsqueeze(1), (constant * rows.signs).unsqueeze(1))[:, 0]
        bound = bound + start_error(self.program, self.joint.last, rows.outputs, self.known)
        bound = torch.where(empty, -torch.inf, torch.nan_to_num(bound, nan=torch.inf, posinf=torch.inf, neginf=torch.inf))
        box = self.known[INPUT]
        at_input = torch.zeros_like(box.lower) if trace.at_input is None else trace.at_input[:, 0]
        corner = torch.where(at_input > 0, box.upper, box.lower).expand(len(bound), -1)
        return self._told(rows, bound, corner, {k: t[:, 0] for k, t in trace.at_relu.items()}, relaxations, turned)

    def _relaxations(self, rows: Rows) -> tuple[dict[int, Relaxation], Maps, Tensor]:
        """By layer; what a delta is of -r z_A (-1, 0, 1); and which rows have no points at all."""
        found: dict[int, Relaxation] = {}
        turned: Maps = {}
        empty = torch.zeros(len(rows.outputs), dtype=torch.bool, device=self.program.device)
        for k in self.plain:
            cut = _cut(self.state.at(k), rows.sigma[k])
            empty |= (cut.lower > cut.upper).any(dim=1)
            found[k] = relax(self.program, k, cut, rows.alpha[k])
        for k, pair in self.pairs.items():
            found[k], turned[k], crossed = self._delta(k, pair, rows)
            empty |= crossed
        return found, turned, empty

    def _delta(self, layer: int, pair: Pair, rows: Rows) -> tuple[Relaxation, Tensor, Tensor]:
        negative, dz = self.known[pair.partner], self.state.at(layer)
        first = NodeBounds(-negative.upper, -negative.lower)
        if pair.first >= 0:
            sigma = rows.sigma[pair.first][:, pair.source] * pair.matched
            first = _cut(first, sigma)
        own = _cut(pair.own, rows.sigma[layer])
        low, high = _less(own, first)
        cut = NodeBounds(torch.maximum(dz.lower, low), torch.minimum(dz.upper, high))
        crossed = ((own.lower > own.upper) | (first.lower > first.upper) | (cut.lower > cut.upper)).any(dim=1)
        a_on, a_off, b_on, b_off = first.lower >= 0, first.upper <= 0, own.lower >= 0, own.upper <= 0
        falls, rises = pair.matched & a_on & ~a_off & b_off & ~b_on, pair.matched & a_off & ~a_on & b_on & ~b_off
        active = (pair.matched & a_on & b_on) | rises
        inactive = ((pair.matched & a_off & b_off) | falls) & ~active
        turned = falls.to(torch.float64) - rises.to(torch.float64)
        return relax_delta(self.program, cut, pair.matched, active, inactive), turned, crossed

    def _told(self, rows: Rows, bound: Tensor, corner: Tensor, coefficients: Maps, relaxations: Mapping[int, Relaxation],
              turned: Maps) -> Solved:
        values = self._forward(corner, coefficients, relaxations, turned)
        slack: Maps = {k: torch.zeros_like(rows.beta[k]) for k in self.layers}
        for_alpha, for_beta, scale = {}, {}, {}
        for k, v in coefficients.items():
            if k == self.joint.last:
                continue
            z, y = values[self.program.preactivation(k)], values[self.program.network.relus[k]]
            pair = self.pairs.get(k)
            if pair is None:
                gives = v * (y - z.clamp(min=0))
                for_alpha[k] = v.clamp(max=0) * z * (rows.sigma[k] == 0)
                for_beta[k] = rows.sigma[k] * z
                slack[k] += gives.clamp(min=0)
            else:
                negative = values[pair.partner]
                own = z - negative
                gives = (v * (y - (own.clamp(min=0) - (-negative).clamp(min=0) * pair.matched))).clamp(min=0)
                for_beta[k] = rows.sigma[k] * own
                slack[k] += gives
                if pair.first >= 0:
                    slack[pair.first].index_add_(1, pair.source, gives * pair.matched)
            scale[k] = v.abs().mean(dim=1, keepdim=True)
        return Solved(bound, corner, slack, for_alpha, for_beta, scale)

    def _forward(self, corner: Tensor, coefficients: Maps, relaxations: Mapping[int, Relaxation], turned: Maps) -> Maps:
        """Values of the relaxed network at the corners; they steer the search and prove nothing."""
        values: Maps = {INPUT: corner}
        for position, node in enumerate(self.program.network.nodes[:-1]):
            given, mapping = [values[i] for i in node.inputs], self.program.maps[position]
            if mapping is not None:
                values[position] = mapping.forward(given[0]) + (0.0 if mapping.bias is None else mapping.bias)
            elif isinstance(node.op, Add):
                values[position] = given[0] + given[1]
            elif isinstance(node.op, MaxPool2d):
                chosen = pool_choice(self.program, position, self.known[node.inputs[0]])[0]
                values[position] = given[0].gather(1, chosen.expand(len(corner), -1))
            elif isinstance(node.op, ReLU):
                layer = self.program.layer_of[position]
                values[position] = self._on_line(layer, given[0], values, coefficients, relaxations, turned)
        return values

    def _on_line(self, k: int, z: Tensor, values: Maps, coefficients: Maps, relaxations: Mapping[int, Relaxation],
                 turned: Maps) -> Tensor:
        if k not in coefficients:
            return z.clamp(min=0)
        line, pair = relaxations[k], self.pairs.get(k)
        under = line.on_all if pair is not None else 0.0
        y = torch.where(coefficients[k] >= 0, (line.low + line.gap) * z + line.intercept, line.low * z - under)
        return y if pair is None else y + turned[k] * values[pair.partner]

    # -- tuning ----------------------------------------------------------------------------------------------------------

    def tuned(self, rows: Rows, enough: float, steps: int = STEPS) -> tuple[Rows, Solved, Tensor]:
        """The best multipliers of ``steps`` projected gradient steps, row by row, and the corners met on the way."""
        state = best = self.solve(rows)
        kept, adam_alpha, adam_beta = rows, Adam(rows.alpha), Adam(rows.beta)
        total, weight = state.corner.clone(), 1.0
        for step in range(steps):
            if bool((best.bound <= enough).all()):
                break
            size = RATE * (0.5 if steps <= 3 * STEPS else LEAST ** (1 / steps)) ** (step / 9 if steps <= 3 * STEPS else step)
            alpha, beta = dict(rows.alpha), dict(rows.beta)
            for k, move in adam_alpha.step(state.for_alpha).items():
                alpha[k] = (alpha[k] - size * move).clamp_(0, 1)
            for k, move in adam_beta.step(state.for_beta).items():
                beta[k] = ((beta[k] - size * state.scale[k] * move) * (rows.sigma[k] != 0)).clamp_(min=0)
            rows = Rows(rows.outputs, rows.signs, alpha, rows.sigma, beta)
            state = self.solve(rows)
            total, weight = total + (step + 2) * state.corner, weight + step + 2
            better = state.bound < best.bound
            best, kept = _better(better, state, best), _better_rows(better, rows, kept)
        return kept, best, total / weight

    # -- the tree --------------------------------------------------------------------------------------------------------

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
        alpha = {k: adaptive_slope(self.state.at(k).lower, self.state.at(k).upper)[0] for k in self.plain}
        for i in range(0, len(every), BATCH):
            nodes = [_Node(-float(self.start[o]), 0, o, s, (), alpha, (), (-1, -1)) for o, s in every[i : i + BATCH]]
            self._bound(nodes, 3 * STEPS)

    def _round(self) -> None:
        nodes: list[_Node] = []
        fixed: list[_Node] = []
        goal = self._goal()
        while self.heap and len(nodes) + len(fixed) < BATCH:
            node = heapq.heappop(self.heap)
            if -node.key <= goal:
                self._close(node.output, -node.key)
                continue
            if node.branch is None:  # all phases are fixed: only better multipliers are left
                fixed.append(replace(node, again=node.again + 1))
                continue
            nodes += [_Node(node.key, 0, node.output, node.sign, (*node.splits, (*node.branch, phase)), node.alpha,
                            (*node.beta, 0.0), (-1, -1)) for phase in (-1, 1)]
        for some, steps in ((nodes, STEPS), (fixed, 10 * STEPS)):
            if some:
                self._bound(some, steps)

    def _close(self, output: int, bound: float) -> None:
        self.closed[output] = max(self.closed[output], bound)

    def _bound(self, nodes: Sequence[_Node], steps: int) -> None:
        rows = self._rows(nodes)
        for i, node in enumerate(nodes):
            if node.again == 1:
                self._by_lp(rows, i, node)
        rows, solved, average = self.tuned(rows, self._goal(), steps)
        self.found = self.found.joined(self.search.judge(torch.cat([solved.corner, average])))
        values = solved.bound.cpu().numpy()
        branches = self._branches(rows, solved)
        for i, node in enumerate(nodes):
            self.count += 1
            bound = min(float(values[i]), -node.key)
            if bound <= self._goal() or node.again >= AGAIN:
                self.stuck |= bound > self._goal()
                self._close(node.output, bound)
                continue
            alpha = {k: t[i].clone() for k, t in rows.alpha.items()}
            beta = tuple(float(rows.beta[k][i, j]) for k, j, _ in node.splits)
            heapq.heappush(self.heap, _Node(-bound, self.count, node.output, node.sign, node.splits, alpha, beta, branches[i],
                                            node.again))

    def _rows(self, nodes: Sequence[_Node]) -> Rows:
        device, count = self.program.device, len(nodes)
        alpha = {k: torch.stack([node.alpha[k] for node in nodes]) for k in self.plain}
        sizes = {k: self.program.size(self.program.preactivation(k)) for k in self.layers}
        sigma = {k: torch.zeros(count, sizes[k], dtype=torch.int8, device=device) for k in self.layers}
        beta = {k: torch.zeros(count, sizes[k], dtype=torch.float64, device=device) for k in self.layers}
        for i, node in enumerate(nodes):
            for (k, j, phase), b in zip(node.splits, node.beta, strict=True):
                sigma[k][i, j], beta[k][i, j] = phase, b
        outputs = torch.tensor([node.output for node in nodes], device=device)
        signs = torch.tensor([node.sign for node in nodes], dtype=torch.float64, device=device)
        return Rows(outputs, signs, alpha, sigma, beta)

    def _by_lp(self, rows: Rows, i: int, node: _Node) -> None:
        """Put the LP's duals into ``rows`` as the multipliers of a node whose phases are all fixed.

        Both networks are affine there, so they are measured at 0 and the unit vectors. The rows are elastic: a node
        without points gets large multipliers. A wrong multiplier costs tightness, never soundness.
        """
        alpha, sigma, beta = ({k: t[i : i + 1] for k, t in m.items()} for m in (rows.alpha, rows.sigma, rows.beta))
        row = Rows(rows.outputs[i : i + 1], rows.signs[i : i + 1], alpha, sigma, beta)
        relaxations, turned, _ = self._relaxations(row)
        low, high = (t[0].cpu().numpy() for t in (self.known[INPUT].lower, self.known[INPUT].upper))
        points = torch.eye(len(low) + 1, len(low), dtype=torch.float64, device=self.program.device).roll(1, 0)
        values = self._forward(points, {k: torch.ones(1, 1, dtype=torch.float64) for k in self.layers}, relaxations, turned)
        out = (values[self.program.preactivation(self.joint.last)][:, node.output] * node.sign).cpu().numpy()
        forms = np.array([phase * self._phase_value(values, k, j) for k, j, phase in node.splits])
        gradient, constant = forms[:, 1:] - forms[:, :1], forms[:, 0]
        scale = np.maximum(np.abs(gradient).max(axis=1), 1e-300)
        most = ELASTIC * max(float(np.abs(out[1:] - out[0]).max()), 1e-300)
        if not all(np.isfinite(t).all() for t in (out, forms)):
            return
        found = linprog(np.append(out[0] - out[1:], most), np.hstack([-gradient / scale[:, None], -np.ones((len(scale), 1))]),
                        constant / scale, bounds=[*zip(low, high, strict=True), (0, None)], method="highs")
        if found.status == 0:
            for (k, j, _), dual in zip(node.splits, -found.ineqlin.marginals / scale, strict=True):
                rows.beta[k][i, j] = max(0.0, float(dual))

    def _phase_value(self, values: Maps, k: int, j: int) -> np.ndarray:
        z = values[self.program.preactivation(k)][:, j]
        return (z - values[self.pairs[k].partner][:, j] if k in self.pairs else z).cpu().numpy()

    def _branches(self, rows: Rows, solved: Solved) -> list[tuple[int, int] | None]:
        """Per row the phase that gives most away at the corner among those that are open; None where all are fixed."""
        scores, places = [], []
        for k in self.layers:
            bounds = self.pairs[k].own if k in self.pairs else self.state.at(k)
            open_ = (bounds.lower < 0) & (bounds.upper > 0) & (rows.sigma[k] == 0)
            scores.append(torch.where(open_, solved.slack[k].clamp(min=0) + 1e-300, -1.0))
            places += [(k, j) for j in range(open_.shape[1])]
        if not places:
            return [None] * len(rows.outputs)
        best, at = torch.cat(scores, dim=1).max(dim=1)
        return [places[j] if s > 0 else None for s, j in zip(best.tolist(), at.tolist(), strict=True)]


def _cut(bounds: NodeBounds, sigma: Tensor) -> NodeBounds:
    """(rows, neurons) bounds with the split phases cut at 0."""
    lower = torch.where(sigma > 0, bounds.lower.clamp(min=0), bounds.lower)
    return NodeBounds(lower, torch.where(sigma < 0, bounds.upper.clamp(max=0), bounds.upper), bounds.error)


def _less(a: NodeBounds, b: NodeBounds) -> tuple[Tensor, Tensor]:
    """Bounds of a - b, rounded outward."""
    low, high = a.lower - b.upper, a.upper - b.lower
    low = low - 4 * UNIT_ROUNDOFF * (a.lower.abs() + b.upper.abs())
    high = high + 4 * UNIT_ROUNDOFF * (a.upper.abs() + b.lower.abs())
    return low.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), high.nan_to_num(nan=torch.inf, posinf=torch.inf,
                                                                                                neginf=-torch.inf)


def _chosen(better: Tensor, new: Maps, old: Maps) -> Maps:
    return {k: torch.where(better[:, None], new[k], old[k]) for k in old}


def _better(better: Tensor, new: Solved, old: Solved) -> Solved:
    maps = [_chosen(better, getattr(new, n), getattr(old, n)) for n in ("slack", "for_alpha", "for_beta", "scale")]
    return Solved(torch.where(better, new.bound, old.bound), torch.where(better[:, None], new.corner, old.corner), *maps)


def _better_rows(better: Tensor, new: Rows, old: Rows) -> Rows:
    return Rows(old.outputs, old.signs, _chosen(better, new.alpha, old.alpha), old.sigma, _chosen(better, new.beta, old.beta))
