"""One bound on the difference of two networks, some phases fixed: slopes, shares and multipliers tuned by gradients.

``bounds.difference`` writes a neuron of B as y_B = r y_A + delta. Its relaxation follows the phases that are fixed,

    A on, B on: delta = dz      both off: delta = 0      A on, B off: delta = -r z_A      A off, B on: delta = z_B,

all of them linear. While one is open there are two valid relaxations: delta between min(dz, 0) and max(dz, 0), where what both
networks share cancels, and y_B in the triangle of relu(z_B), which does not care how far the networks are apart. Any mixture

    v delta <= share v (line over dz) + (1 - share) v (line over z_B - r y_A),      0 <= share <= 1,

is valid too, so the share is one more multiplier, besides the slopes alpha of lower lines and beta >= 0 of phases that were
split (Wang et al. 2021, "Beta-CROWN"). A bound is sound for any of them, with all rounding paid for in ``crown.Backward``; the
gradients come from the values of the relaxed network at the corner that attains the bound, as in ``bounds.dual``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.crown import Backward, Trace
from exactprune.bounds.difference import Fixed, Joint, relax_delta
from exactprune.bounds.dual import _Adam as Adam
from exactprune.bounds.interval import NodeBounds, pool_choice
from exactprune.bounds.layerwise import Layerwise
from exactprune.bounds.linear_maps import DenseMap
from exactprune.bounds.program import FLOOR, TINY, UNIT_ROUNDOFF
from exactprune.bounds.relaxation import Relaxation, adaptive_slope, relax, upper_line
from exactprune.deciders.difference_cuts import Cut, Cuts, separate
from exactprune.network import INPUT
from exactprune.ops import Add, Affine, ReLU

STEPS = 10
RATE, LEAST = 0.25, 2e-3  # first step size, and the share of it that the last step is

Maps = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """What a layer of deltas belongs to.

    Attributes:
        partner: position of -r z_A.
        own: position of z_B.
        beside: position of r y_A, a linear map of y_A.
        after: position of y_B.
        first: ReLU layer of A; -1 if its phases cannot be split.
        source: (neurons,) A's neuron, 0 where there is none.
        ratio: (neurons,) r, 0 where there is none.
        matched: (neurons,) where there is one.
    """

    partner: int
    own: int
    beside: int
    after: int
    first: int
    source: Tensor
    ratio: Tensor
    matched: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """One row a bound: a neuron of the target, a sign, and by ReLU layer (rows, neurons) of everything that is tuned.

    Attributes:
        target: position of the node that is bounded.
        neurons, signs: (rows,): bound the maximum of signs * value.
        alpha: slopes of lower lines; share: see the top of the file, by layer of deltas.
        sigma: phases -1, 0 (open), 1; beta: their multipliers.
        mix: (rows, cuts) >= 0: how much of an upper line is a cut instead of the triangle's.
    """

    target: int
    neurons: Tensor
    signs: Tensor
    alpha: Maps
    share: Maps
    sigma: Maps
    beta: Maps
    mix: Tensor


@dataclass(frozen=True, eq=False)
class Solved:
    """Sound bounds (rows,), points (rows, inputs), and by ReLU layer what each phase gives away, and gradients."""

    bound: Tensor
    corner: Tensor
    slack: Maps
    for_alpha: Maps
    for_share: Maps
    for_beta: Maps
    scale: Maps
    for_mix: Tensor
    weight: Maps
    points: Maps


@dataclass(frozen=True, eq=False)
class Lines:
    """Relaxations of one evaluation: ``over`` by ReLU layer (of a delta: over dz, scaled by its share), and for layers of
    deltas ``own`` (triangle of relu(z_B)), ``rest`` (1 - share), and ``turned`` (what delta is of -r z_A: -1, 0, 1)."""

    over: dict[int, Relaxation]
    own: dict[int, Relaxation]
    rest: Maps
    turned: Maps


class _Backward(Backward):
    """Backward substitution that also carries what a delta or a split phase of B puts on z_A, y_A and z_B."""

    pairs: Mapping[int, Pair]
    lines: Lines
    phases: Maps
    pools: Mapping[int, Cuts]
    parts: Maps

    def _cuts(self, layer: int, source: int, plus: Tensor, slope: Tensor, intercept: Tensor, total: Tensor, position: int,
              pending: dict[int, Tensor]) -> Tensor:
        """Move what ``parts`` says of the coefficients from the triangle's upper line to cuts."""
        pool, gamma = self.pools[layer], 8 * self.program.gamma
        part = plus.index_select(2, pool.owner) * self.parts[layer].unsqueeze(1)
        moved = torch.zeros_like(plus).index_add_(2, pool.owner, part)
        self._give(pending, position, source, -moved * slope)
        self._give(pending, position, pool.source, part @ pool.weight)
        size = (self.known[source].magnitude.unsqueeze(1) + intercept) * gamma + TINY
        return total + (part * pool.constant).sum(dim=-1) + (moved * (size - intercept)).sum(dim=-1)

    def _relu(self, position: int, v: Tensor, total: Tensor, pending: dict[int, Tensor]) -> Tensor:
        layer = self.layer_of[position]
        total = super()._relu(position, v, total, pending)
        pair = self.pairs.get(layer)
        if pair is None:
            if layer not in self.parts:
                return total
            line = self.lines.over[layer]
            return self._cuts(layer, self.program.preactivation(layer), v.clamp(min=0), (line.low + line.gap).unsqueeze(1),
                              line.intercept.unsqueeze(1), total, position, pending)
        own, rest = self.lines.own[layer], self.lines.rest[layer].unsqueeze(1)
        part, extra = v * rest, self.phases[layer].unsqueeze(1)
        plus, gamma = part.clamp(min=0), 8 * self.program.gamma
        on_own = part * own.low.unsqueeze(1) + plus * own.gap.unsqueeze(1) + extra
        mapping = self.program.maps[pair.beside]
        assert mapping is not None
        on_beside = mapping.transposed(part.flatten(0, 1)).view(*v.shape[:2], -1)
        self._give(pending, position, pair.own, on_own)
        self._give(pending, position, self.program.network.nodes[pair.beside].inputs[0], -on_beside)
        self._give(pending, position, pair.partner, v * self.lines.turned[layer].unsqueeze(1))
        # |r y_A| <= |r z_A|, and the intercept is at most |z_B|
        size = (self.known[pair.partner].magnitude + 2 * self.known[pair.own].magnitude) * gamma + TINY
        total = total + (plus * own.intercept.unsqueeze(1)).sum(dim=-1) * (1 + gamma)
        total = total + ((v.abs() + extra.abs()) * size).sum(dim=-1)
        if layer not in self.parts:
            return total
        return self._cuts(layer, pair.own, plus, (own.low + own.gap).unsqueeze(1), own.intercept.unsqueeze(1), total, position,
                          pending)


class Bounding:
    """Bounds of nodes of B relative to A.

    Args:
        joint: B relative to A.
        state: ``difference_bounds`` of it over the whole box.
        beside: ReLU layer of the joint network -> more bounds of z_B, if there are some.
    """

    def __init__(self, joint: Joint, state: Layerwise, beside: Mapping[int, NodeBounds] | None = None) -> None:
        self.joint, self.program, self.known = joint, state.program, dict(state.known)
        self.layers = list(range(joint.last))
        self.pairs = {k: self._pair(k) for k in joint.deltas}
        self.plain = [k for k in self.layers if k not in self.pairs]
        self.difference = self.program.preactivation(joint.last)
        for k, bounds in (beside or {}).items():
            self.narrow(self.pairs[k].own, bounds.lower, bounds.upper)
        for k, pair in self.pairs.items():
            low, high = _less(self.at(k), self.known[pair.partner])
            self.narrow(pair.own, low, high)
            own = self.known[pair.own]
            self.narrow(pair.after, own.lower.clamp(min=0), own.upper.clamp(min=0))
        self.pools: dict[int, Cuts] = {}
        self.cuts: list[Cut] = []

    # -- facts -----------------------------------------------------------------------------------------------------------

    def _pair(self, layer: int) -> Pair:
        delta, network = self.joint.deltas[layer], self.program.network
        node = network.nodes[delta.partner]
        first = next((k for k in range(layer) if self.program.preactivation(k) == node.inputs[0]), -1)
        weight = next(array for name, array in node.op.arrays() if name == "weight")
        flat = np.abs(weight).reshape(*weight.shape[:2])
        units = flat.argmax(axis=1) if weight.size else np.zeros(len(weight), np.int64)
        places = 1 if isinstance(node.op, Affine) else prod(network.shapes[delta.partner][1:])
        device, position = self.program.device, network.relus[layer]
        ratio = np.repeat(flat.max(axis=1, initial=0.0), places)
        own = next(i for i in network.nodes[self.program.preactivation(layer)].inputs if i != delta.partner)
        y = next(n for n in network.nodes if isinstance(n.op, Add) and position in n.inputs)
        beside = next(i for i in y.inputs if i != position)
        after = next(i for i, n in enumerate(network.nodes) if n is y)
        return Pair(delta.partner, own, beside, after, first,
                    torch.tensor((units[:, None] * places + np.arange(places)).reshape(-1), device=device),
                    torch.tensor(ratio, device=device), torch.as_tensor(delta.matched, device=device))

    def at(self, layer: int) -> NodeBounds:
        """Bounds of what a ReLU layer reads: of dz for a layer of deltas."""
        return self.known[self.program.preactivation(layer)]

    def own(self, layer: int) -> int:
        """Position of the neuron's own pre-activation, of A or of B."""
        return self.pairs[layer].own if layer in self.pairs else self.program.preactivation(layer)

    def narrow(self, position: int, lower: Tensor, upper: Tensor) -> None:
        """Intersect the bounds of a node, over the whole box."""
        old = self.known[position]
        self.known[position] = NodeBounds(torch.maximum(old.lower, lower), torch.minimum(old.upper, upper), old.error)

    def phase(self, layer: int, rows: Rows) -> NodeBounds:
        """Bounds of the neuron's own pre-activation, of A or of B, under the phases of the rows."""
        return self.cut_pair(layer, rows)[1] if layer in self.pairs else self.known[self.own(layer)]

    def first_rows(self, target: int, neurons: Tensor, signs: Tensor) -> Rows:
        """Rows with no phase fixed and CROWN's slopes."""
        count = len(neurons)
        alpha, share, sigma, beta = {}, {}, {}, {}
        for k in self.layers:
            own = self.known[self.own(k)]
            alpha[k] = adaptive_slope(own.lower, own.upper).expand(count, -1).clone()
            sigma[k] = torch.zeros(alpha[k].shape, dtype=torch.int8, device=self.program.device)
            beta[k] = torch.zeros_like(alpha[k])
            if k in self.pairs:
                share[k] = self._share(k).expand(count, -1).clone()
        mix = torch.zeros(count, len(self.cuts), dtype=torch.float64, device=self.program.device)
        return Rows(target, neurons, signs, alpha, share, sigma, beta, mix)

    # -- cuts ------------------------------------------------------------------------------------------------------------

    def cut(self, rows: Rows, solved: Solved, room: int) -> int:
        """Add cuts that the mean points of some rows violate, ``room`` at most; how many."""
        found: list[tuple[float, Cut]] = []
        seen = {c.key for c in self.cuts}
        for k in self.layers:
            mapping, own = self.program.maps[self.own(k)], self.known[self.own(k)]
            if k not in solved.weight or not isinstance(mapping, DenseMap):
                continue
            source = self.program.network.nodes[self.own(k)].inputs[0]
            found += separate(k, source, mapping, self.known[source], own, solved.points[source],
                              solved.weight[k] * (rows.sigma[k] == 0), self.program.gamma)
        found.sort(key=lambda pair: -pair[0])
        new: list[Cut] = []
        for _, c in found:
            if len(new) < room and c.key not in seen:
                seen.add(c.key)
                new.append(c)
        self.cuts += new
        self.pools = {k: Cuts.of([(i, c) for i, c in enumerate(self.cuts) if c.layer == k], self.program.device)
                      for k in {c.layer for c in self.cuts}}
        return len(new)

    def _parts(self, rows: Rows) -> Maps:
        return {k: rows.mix[:, p.index] * (rows.sigma[k][:, p.owner] == 0) for k, p in self.pools.items()}

    def _share(self, layer: int) -> Tensor:
        """1 where the relaxation over dz gives less away than those of both neurons."""
        pair, dz = self.pairs[layer], self.at(layer)
        apart = upper_line(dz.lower, dz.upper)[1] + upper_line(-dz.upper, -dz.lower)[1]
        own, negative = self.known[pair.own], self.known[pair.partner]
        single = upper_line(own.lower, own.upper)[1] + upper_line(-negative.upper, -negative.lower)[1]
        return ((apart <= single) & pair.matched).to(torch.float64)

    # -- one bound -------------------------------------------------------------------------------------------------------

    def solve(self, rows: Rows) -> Solved:
        """Bounds of the rows at their present multipliers."""
        lines, empty = self.lines(rows)
        trace = Trace()
        start, v, constant = self._start(rows)
        phases = {k: rows.sigma[k] * rows.beta[k] for k in self.layers}
        back = _Backward(self.program, self.known, lines.over, trace, {k: phases[k] for k in self.plain})
        parts = self._parts(rows)
        back.pairs, back.lines, back.phases, back.pools, back.parts = self.pairs, lines, phases, self.pools, parts
        bound = back.run(start, (v * rows.signs[:, None]).unsqueeze(1), (constant * rows.signs).unsqueeze(1))[:, 0]
        bound = bound + self._start_error(rows)
        bound = torch.where(empty, -torch.inf, torch.nan_to_num(bound, nan=torch.inf, posinf=torch.inf, neginf=torch.inf))
        box = self.known[INPUT]
        at_input = torch.zeros_like(box.lower) if trace.at_input is None else trace.at_input[:, 0]
        corner = torch.where(at_input > 0, box.upper, box.lower).expand(len(bound), -1)
        return self._told(rows, bound, corner, {k: t[:, 0] for k, t in trace.at_relu.items()}, lines, parts)

    def _start(self, rows: Rows) -> tuple[int, Tensor, Tensor]:
        mapping, device = self.program.maps[rows.target], self.program.device
        constant = torch.zeros(len(rows.neurons), dtype=torch.float64, device=device)
        if mapping is None:
            unit = torch.zeros(len(rows.neurons), self.program.size(rows.target), dtype=torch.float64, device=device)
            unit[torch.arange(len(unit), device=device), rows.neurons] = 1.0
            return rows.target, unit, constant
        if mapping.bias is not None:
            constant = mapping.bias[rows.neurons]
        return self.program.network.nodes[rows.target].inputs[0], mapping.rows(rows.neurons), constant

    def _start_error(self, rows: Rows) -> Tensor:
        bounds = self.known[rows.target]
        size = bounds.magnitude.amax(dim=0) if bounds.error is None else bounds.error.reshape(-1, bounds.error.shape[-1])[0]
        return self.program.gamma * size[rows.neurons] + FLOOR

    def lines(self, rows: Rows) -> tuple[Lines, Tensor]:
        """The relaxations, and which rows have no points at all."""
        lines = Lines({}, {}, {}, {})
        empty = torch.zeros(len(rows.neurons), dtype=torch.bool, device=self.program.device)
        for k in self.plain:
            cut = _cut(self.known[self.own(k)], rows.sigma[k])
            empty |= (cut.lower > cut.upper).any(dim=1)
            lines.over[k] = relax(self.program, k, cut, rows.alpha[k])
        for k, pair in self.pairs.items():
            empty |= self._delta(k, pair, rows, lines)
        return lines, empty

    def _delta(self, layer: int, pair: Pair, rows: Rows, lines: Lines) -> Tensor:
        """Put the lines of a layer of deltas; which rows are empty."""
        first, own, dz = self.cut_pair(layer, rows)
        crossed = ((own.lower > own.upper) | (first.lower > first.upper) | (dz.lower > dz.upper)).any(dim=1)
        a_on, a_off, b_on, b_off = first.lower >= 0, first.upper <= 0, own.lower >= 0, own.upper <= 0
        falls, rises = pair.matched & a_on & ~a_off & b_off & ~b_on, pair.matched & a_off & ~a_on & b_on & ~b_off
        on, off = pair.matched & ~falls & ~rises, pair.matched & ~rises
        fixed = Fixed(on & b_on | rises, off & b_off, on & a_on | rises, off & a_off | falls)
        share = torch.where(pair.matched & (a_on | a_off) & (b_on | b_off), 1.0, rows.share[layer] * pair.matched)
        lines.over[layer] = relax_delta(self.program, dz, pair.matched, fixed, share)
        lines.own[layer], lines.rest[layer] = relax(self.program, layer, own, rows.alpha[layer]), 1 - share
        lines.turned[layer] = falls.to(torch.float64) - rises.to(torch.float64)
        return crossed

    def cut_pair(self, layer: int, rows: Rows) -> tuple[NodeBounds, NodeBounds, NodeBounds]:
        """Bounds of r z_A, z_B and dz under the phases of the rows, (rows, neurons) each."""
        pair, negative = self.pairs[layer], self.known[self.pairs[layer].partner]
        low, high = -negative.upper, -negative.lower
        if pair.first >= 0:
            z = _cut(self.at(pair.first), rows.sigma[pair.first])
            low, high = (torch.maximum(low, _times(z.lower[:, pair.source], pair.ratio, -1)),
                         torch.minimum(high, _times(z.upper[:, pair.source], pair.ratio, 1)))
        first, own = NodeBounds(low, high), _cut(self.known[pair.own], rows.sigma[layer])
        low, high = _less(own, first)
        dz = self.at(layer)
        return first, own, NodeBounds(torch.maximum(dz.lower, low), torch.minimum(dz.upper, high))

    def _told(self, rows: Rows, bound: Tensor, corner: Tensor, coefficients: Maps, lines: Lines, parts: Maps) -> Solved:
        values, choices = self.forward(corner, coefficients, lines, rows.target, parts)
        slack: Maps = {k: torch.zeros_like(rows.beta[k]) for k in self.layers}
        given_away = self._given_away(corner, coefficients, lines, rows.target, parts)
        told = Solved(bound, corner, slack, {}, {}, {}, {}, torch.zeros_like(rows.mix), {}, {})
        for k, v in coefficients.items():
            if k == self.joint.last:
                continue
            z, pair = values[self.own(k)], self.pairs.get(k)
            told.scale[k] = torch.maximum(2 * v.abs(), v.abs().mean(dim=1, keepdim=True))
            told.for_beta[k] = rows.sigma[k] * z
            open_ = rows.sigma[k] == 0
            told.weight[k] = v.clamp(min=0) if pair is None else v.clamp(min=0) * lines.rest[k]
            source = self.program.network.nodes[self.own(k)].inputs[0]
            told.points[source] = values[source]
            if k in parts:
                pool = self.pools[k]
                told.for_mix[:, pool.index] = told.weight[k][:, pool.owner] * choices[k][-1]
            if pair is None:
                told.for_alpha[k] = v.clamp(max=0) * z * open_
                slack[k] += given_away[k]
                continue
            over, beside = choices[k][:2]
            told.for_alpha[k] = v.clamp(max=0) * lines.rest[k] * z * open_
            told.for_share[k] = v * (over - beside) * pair.matched
            gives = given_away[k]
            slack[k] += gives * ((v > 0) | (lines.rest[k] > 0.01))
            if pair.first >= 0:
                slack[pair.first].index_add_(1, pair.source, gives * (pair.matched & ((v < 0) | (lines.rest[k] > 0.01))))
        return told

    def _value(self, position: int, given: Sequence[Tensor]) -> Tensor:
        """Value of a node that is no ReLU at points; of a max pool, the line that its relaxation chose."""
        node, mapping = self.program.network.nodes[position], self.program.maps[position]
        if mapping is not None:
            return mapping.forward(given[0]) + (0.0 if mapping.bias is None else mapping.bias)
        if isinstance(node.op, Add):
            return given[0] + given[1]
        chosen = pool_choice(self.program, position, self.known[node.inputs[0]])[0]
        return given[0].gather(1, chosen.expand(len(given[0]), -1))

    def _given_away(self, corner: Tensor, coefficients: Maps, lines: Lines, until: int, parts: Maps) -> Maps:
        """What every line is above the neuron at the corners, times its coefficient: together with the terms of beta these add
        up to the bound less the value that is attained."""
        values: Maps = {INPUT: corner}
        found: Maps = {}
        for position, node in enumerate(self.program.network.nodes[: until + 1]):
            given = [values[i] for i in node.inputs]
            if not isinstance(node.op, ReLU):
                values[position] = self._value(position, given)
            else:
                k = self.program.layer_of[position]
                pair, z = self.pairs.get(k), given[0]
                y = z.clamp(min=0)
                if pair is not None:
                    y = values[pair.own].clamp(min=0) - (-values[pair.partner]).clamp(min=0) * pair.matched
                values[position] = y
                if k in coefficients:
                    line = self._on_line(k, z, values, coefficients, lines, {}, parts)
                    found[k] = (coefficients[k] * (line - y)).clamp(min=0)
        return found

    def forward(self, corner: Tensor, coefficients: Maps, lines: Lines, until: int,
                parts: Maps) -> tuple[Maps, dict[int, tuple[Tensor, ...]]]:
        """Values of the relaxed network at points, and of deltas by both relaxations; they steer the search and prove
        nothing."""
        values: Maps = {INPUT: corner}
        choices: dict[int, tuple[Tensor, ...]] = {}
        for position, node in enumerate(self.program.network.nodes[: until + 1]):
            given = [values[i] for i in node.inputs]
            if not isinstance(node.op, ReLU):
                values[position] = self._value(position, given)
            else:
                layer = self.program.layer_of[position]
                values[position] = self._on_line(layer, given[0], values, coefficients, lines, choices, parts)
        return values, choices

    def _on_line(self, k: int, z: Tensor, values: Maps, coefficients: Maps, lines: Lines,
                 choices: dict[int, tuple[Tensor, ...]], parts: Maps) -> Tensor:
        pair, v = self.pairs.get(k), coefficients.get(k)
        if v is None:
            return z.clamp(min=0)
        line = lines.over[k]
        if pair is None:
            above, given = self._above(k, line, z, values, parts)
            choices[k] = given
            return torch.where(v >= 0, above, line.low * z)
        own, rest, z_b = lines.own[k], lines.rest[k], values[pair.own]
        share = (1 - rest).clamp(min=1e-9)
        over = torch.where(v >= 0, (line.low + line.gap) * z + line.intercept, line.low * z - line.on_all)
        above, given = self._above(k, own, z_b, values, parts)
        y = torch.where(v >= 0, above, own.low * z_b)
        mapping = self.program.maps[pair.beside]
        assert mapping is not None
        beside = y - mapping.forward(values[self.program.network.nodes[pair.beside].inputs[0]])
        choices[k] = over / share, beside, *given
        return over + rest * beside + lines.turned[k] * values[pair.partner]

    def _above(self, k: int, line: Relaxation, z: Tensor, values: Maps, parts: Maps) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Values of the upper lines, and how much lower every cut is than the triangle."""
        above = (line.low + line.gap) * z + line.intercept
        if k not in parts:
            return above, ()
        pool = self.pools[k]
        less = values[pool.source] @ pool.weight.T + pool.constant - above[:, pool.owner]
        return above.index_add(1, pool.owner, parts[k] * less), (less,)

    # -- tuning ----------------------------------------------------------------------------------------------------------

    def tuned(self, rows: Rows, enough: float, steps: int = STEPS) -> tuple[Rows, Solved, Maps]:
        """The best multipliers of ``steps`` projected gradient steps, row by row, and by position the means of the points met.

        A row starts from the better of its betas and none: what its parent had may be far off once one more phase is fixed.
        """
        state = self.solve(rows)
        without = replace(rows, beta={k: torch.zeros_like(t) for k, t in rows.beta.items()})
        plain = self.solve(without)
        better = plain.bound < state.bound
        state, rows = _better(better, plain, state), replace(rows, beta=_chosen(better, without.beta, rows.beta))
        best = state
        kept, adams = rows, tuple(Adam(m) for m in (rows.alpha, rows.share, rows.beta, {0: rows.mix}))
        total, weight = {**state.points, INPUT: state.corner}, 1.0
        for step in range(steps):
            if bool((best.bound <= enough).all()):
                break
            size = RATE * (0.5 if steps <= 3 * STEPS else LEAST ** (1 / steps)) ** (step / 9 if steps <= 3 * STEPS else step)
            alpha, share, beta = dict(rows.alpha), dict(rows.share), dict(rows.beta)
            for k, move in adams[0].step(state.for_alpha).items():
                alpha[k] = (alpha[k] - size * move).clamp_(0, 1)
            for k, move in adams[1].step(state.for_share).items():
                share[k] = (share[k] - size * move).clamp_(0, 1)
            for k, move in adams[2].step(state.for_beta).items():
                beta[k] = ((beta[k] - size * state.scale[k] * move) * (rows.sigma[k] != 0)).clamp_(min=0)
            mix = rows.mix
            if self.cuts:
                mix = self._simplex(mix - size * adams[3].step({0: state.for_mix})[0])
            rows = replace(rows, alpha=alpha, share=share, beta=beta, mix=mix)
            state = self.solve(rows)
            met = {**state.points, INPUT: state.corner}
            total, weight = {p: t + (step + 2) * met[p] for p, t in total.items()}, weight + step + 2
            better = state.bound < best.bound
            best, kept = _better(better, state, best), _better_rows(better, rows, kept)
        return kept, best, {p: t / weight for p, t in total.items()}

    def _simplex(self, mix: Tensor) -> Tensor:
        """Weights >= 0 whose sum over the cuts of a neuron is at most 1."""
        mix = mix.clamp(min=0)
        for k, pool in self.pools.items():
            part = mix[:, pool.index]
            total = mix.new_zeros(len(mix), self.program.size(self.own(k))).index_add_(1, pool.owner, part)
            mix[:, pool.index] = part / total.clamp(min=1)[:, pool.owner]
        return mix


def _cut(bounds: NodeBounds, sigma: Tensor) -> NodeBounds:
    """(rows, neurons) bounds with the split phases cut at 0."""
    lower = torch.where(sigma > 0, bounds.lower.clamp(min=0), bounds.lower)
    return NodeBounds(lower, torch.where(sigma < 0, bounds.upper.clamp(max=0), bounds.upper), bounds.error)


def _times(z: Tensor, ratio: Tensor, side: int) -> Tensor:
    """ratio * z, rounded outward; infinite where it overflows."""
    value = z * ratio
    return torch.nan_to_num(value + side * 4 * UNIT_ROUNDOFF * value.abs() + side * TINY, nan=side * torch.inf,
                            posinf=torch.inf, neginf=-torch.inf)


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
    maps = {n: _chosen(better, getattr(new, n), getattr(old, n))
            for n in ("slack", "for_alpha", "for_share", "for_beta", "scale", "weight")}
    return replace(new, bound=torch.where(better, new.bound, old.bound),
                   corner=torch.where(better[:, None], new.corner, old.corner), **maps)


def _better_rows(better: Tensor, new: Rows, old: Rows) -> Rows:
    maps = {name: _chosen(better, getattr(new, name), getattr(old, name)) for name in ("alpha", "share", "beta")}
    return replace(old, **maps, mix=torch.where(better[:, None], new.mix, old.mix))
