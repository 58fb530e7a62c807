"""The dual ascent behind alpha-CROWN and branch and bound: one linear relaxation a row, its multipliers tuned by gradients.

A row asks for the maximum of ``sign * z_hat`` of one neuron over D, possibly with some ReLU phases fixed (split). Its bound is

    B(alpha, beta) = max over x in D of the linear form left after substituting every ReLU with coefficient v by
        s z + t if v >= 0,   alpha z if v < 0 (alpha in [0, 1]),   plus  sigma beta z  for split neurons (beta >= 0),

where sigma = +1 on the branch z >= 0 and -1 on z <= 0: sigma beta z >= 0 there, so adding it keeps an upper bound (Wang et al.
2021, "Beta-CROWN", theorem 3.1; Xu et al. 2021, "Fast and complete", alpha-CROWN). B is sound for every alpha and beta,
evaluated by ``crown.Backward`` with all rounding paid for, so the optimiser can be as heuristic as it likes.

The gradient needs no autograd: with x* the maximising corner and (z*, y*) the values of the relaxed network there,
dB/dalpha_j = min(v_j, 0) z*_j and dB/dbeta_j = sigma_j z*_j. The same values say where the relaxation is loosest
(v_j (y*_j - relu(z*_j))) and propose x* as a witness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from exactprune.bounds.crown import Backward, Trace, pool_choice, start_error, start_rows
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.program import Program
from exactprune.bounds.relaxation import Relaxation, adaptive_slope, relax
from exactprune.network import INPUT
from exactprune.ops import Add, MaxPool2d, ReLU

MAPPINGS = ("slack", "multipliers", "gradient_alpha", "gradient_beta", "scale")


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of rows of one ReLU layer and their multipliers.

    Attributes:
        layer: number of the ReLU layer the rows belong to.
        neurons, signs: (rows,): bound the maximum of signs * z_hat.
        alpha: layer -> (rows, neurons) slopes in [0, 1].
        sigma: layer -> (rows, neurons) int8: +1 split to active, -1 split to inactive, 0 not split. Empty without splits.
        beta: layer -> (rows, neurons) >= 0, only where sigma is not 0.
    """

    layer: int
    neurons: Tensor
    signs: Tensor
    alpha: Mapping[int, Tensor]
    sigma: Mapping[int, Tensor] = field(default_factory=dict)
    beta: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.neurons)

    def take(self, which: Tensor) -> Rows:
        """The rows ``which``."""
        parts = [{k: t[which] for k, t in m.items()} for m in (self.alpha, self.sigma, self.beta)]
        return Rows(self.layer, self.neurons[which], self.signs[which], *parts)


@dataclass(frozen=True, eq=False)
class Solution:
    """The state of the relaxations at one set of multipliers.

    Attributes:
        bound: (rows,) sound upper bounds of signs * z_hat.
        corner: (rows, inputs) maximiser of the final linear form, a point of D.
        slack: layer -> (rows, neurons): how much each neuron's relaxation gives away at the corner.
        multipliers: layer -> (rows, neurons): the coefficient put on each pre-activation (what a certificate stores).
        gradient_alpha, gradient_beta: layer -> (rows, neurons).
    """

    bound: Tensor
    corner: Tensor
    slack: Mapping[int, Tensor]
    multipliers: Mapping[int, Tensor]
    gradient_alpha: Mapping[int, Tensor]
    gradient_beta: Mapping[int, Tensor]
    scale: Mapping[int, Tensor]

    def take(self, which: Tensor) -> Solution:
        """The rows ``which``."""
        return Solution(self.bound[which], self.corner[which],
                        *({k: t[which] for k, t in getattr(self, name).items()} for name in MAPPINGS))


def layers_below(program: Program, layer: int) -> list[int]:
    """ReLU layers that the pre-activation of ``layer`` depends on."""
    seen, stack = set(), [program.preactivation(layer)]
    while stack:
        position = stack.pop()
        if position != INPUT and position not in seen:
            seen.add(position)
            stack.extend(program.network.nodes[position].inputs)
    return [k for k in range(layer) if program.network.relus[k] in seen]


def initial_rows(program: Program, layer: int, neurons: Tensor, signs: Tensor, known: Mapping[int, NodeBounds]) -> Rows:
    """Rows with CROWN's adaptive slopes and no splits."""
    alpha = {}
    for k in layers_below(program, layer):
        bounds = known[program.preactivation(k)]
        alpha[k] = adaptive_slope(bounds.lower, bounds.upper).expand(len(neurons), -1).clone()
    return Rows(layer, neurons, signs, alpha)


def cut_bounds(bounds: NodeBounds, sigma: Tensor | None) -> NodeBounds:
    """Pre-activation bounds of each row with the split phases cut at 0: (rows, neurons)."""
    if sigma is None:
        return bounds
    lower = torch.where(sigma > 0, bounds.lower.clamp(min=0), bounds.lower)
    upper = torch.where(sigma < 0, bounds.upper.clamp(max=0), bounds.upper)
    return NodeBounds(lower, upper, bounds.error)


def solve(program: Program, rows: Rows, known: Mapping[int, NodeBounds], want_gradient: bool = True) -> Solution:
    """Bounds of the rows at their present multipliers, with everything the next step needs."""
    relaxations, extra = {}, {}
    for k in rows.alpha:
        bounds = known[program.preactivation(k)]
        sigma = rows.sigma.get(k)
        relaxations[k] = relax(program, k, cut_bounds(bounds, sigma), rows.alpha[k])
        if sigma is not None:
            extra[k] = sigma * rows.beta[k]
    trace = Trace()
    start, v, constant = start_rows(program, rows.layer, rows.neurons, known)
    backward = Backward(program, known, relaxations, trace, extra)
    bound = backward.run(start, (v * rows.signs[:, None]).unsqueeze(1), (constant * rows.signs).unsqueeze(1))
    bound = bound[:, 0] + start_error(program, rows.layer, rows.neurons, known)
    bound = torch.nan_to_num(bound, nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    box = known[INPUT]
    at_input = torch.zeros(len(rows), box.lower.shape[1], dtype=torch.float64) if trace.at_input is None else trace.at_input[:, 0]
    corner = torch.where(at_input > 0, box.upper, box.lower)
    coefficients = {k: t[:, 0] for k, t in trace.at_relu.items()}
    multipliers = {k: _multiplier(v, relaxations[k], extra.get(k)) for k, v in coefficients.items()}
    if not want_gradient:
        return Solution(bound, corner, {}, multipliers, {}, {}, {})
    relaxed = _relaxed_forward(program, rows.layer, corner, coefficients, relaxations, known)
    slack, for_alpha, for_beta, scale = {}, {}, {}, {}
    for k, v in coefficients.items():
        z, y = relaxed[k]
        slack[k] = v * (y - z.clamp(min=0))
        for_alpha[k] = v.clamp(max=0) * z
        scale[k] = v.abs().mean(dim=1, keepdim=True)
        if k in rows.sigma:
            slack[k] = slack[k] * (rows.sigma[k] == 0)
            for_alpha[k] = for_alpha[k] * (rows.sigma[k] == 0)
            for_beta[k] = rows.sigma[k] * z
    return Solution(bound, corner, slack, multipliers, for_alpha, for_beta, scale)


def _multiplier(v: Tensor, relaxation: Relaxation, extra: Tensor | None) -> Tensor:
    a = torch.addcmul(v * relaxation.low, v.clamp(min=0), relaxation.gap)
    return a if extra is None else a + extra


def _relaxed_forward(program: Program, layer: int, corner: Tensor, coefficients: Mapping[int, Tensor],
                     relaxations: Mapping[int, Relaxation], known: Mapping[int, NodeBounds]) -> dict[int, tuple[Tensor, Tensor]]:
    """(z*, y*) of every ReLU layer at the corner, each neuron on the line its coefficient chose."""
    layer_of = {position: k for k, position in enumerate(program.network.relus)}
    needed = [program.network.relus[k] for k in coefficients]
    values: dict[int, Tensor] = {INPUT: corner}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for position in range(max(needed, default=INPUT) + 1):
        node = program.network.nodes[position]
        given = [values[i] for i in node.inputs]
        mapping = program.maps[position]
        if mapping is not None:
            values[position] = mapping.forward(given[0]) + (0.0 if mapping.bias is None else mapping.bias)
        elif isinstance(node.op, Add):
            values[position] = given[0] + given[1]
        elif isinstance(node.op, MaxPool2d):
            chosen, _, _, _ = pool_choice(program, position, known[node.inputs[0]])
            values[position] = given[0].gather(1, chosen.expand(len(corner), -1))
        elif isinstance(node.op, ReLU):
            k = layer_of[position]
            values[position] = given[0].clamp(min=0)
            if k in coefficients:
                values[position] = _on_line(given[0], coefficients[k], relaxations[k])
                found[k] = (given[0], values[position])
    return found


def _on_line(z: Tensor, v: Tensor, relaxation: Relaxation) -> Tensor:
    above = (relaxation.low + relaxation.gap) * z + relaxation.intercept
    return torch.where(v >= 0, above, relaxation.low * z)


@dataclass(frozen=True, eq=False)
class Optimised:
    """Best multipliers of every row.

    Attributes:
        rows: with the best alpha and beta found.
        bound: (rows,) the sound bounds they give.
        solution: of the last step that improved some row, merged row by row (slack, multipliers, corner belong to ``rows``).
        average: (rows, inputs) mean of the corners met, later ones counting more: such ergodic means approach the maximiser of
            the LP relaxation (Larsson et al. 1999), which corners of the box alone do not; a point of D.
    """

    rows: Rows
    bound: Tensor
    solution: Solution
    average: Tensor


class _Adam:
    """Adam on a dict of tensors, one learning rate a row (Kingma & Ba 2015)."""

    def __init__(self, like: Mapping[int, Tensor]) -> None:
        self.first = {k: torch.zeros_like(t) for k, t in like.items()}
        self.second = {k: torch.zeros_like(t) for k, t in like.items()}
        self.count = 0

    def step(self, gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        self.count += 1
        moves = {}
        for k, g in gradients.items():
            self.first[k].mul_(0.9).add_(g, alpha=0.1)
            self.second[k].mul_(0.99).addcmul_(g, g, value=0.01)
            corrected = self.second[k] / (1 - 0.99**self.count)
            moves[k] = self.first[k] / (1 - 0.9**self.count) / (corrected.sqrt() + 1e-30)
        return moves

    def take(self, which: Tensor) -> _Adam:
        """The state of the rows ``which``."""
        part = copy(self)
        part.first, part.second = ({k: t[which] for k, t in m.items()} for m in (self.first, self.second))
        return part


def optimise(program: Program, rows: Rows, known: Mapping[int, NodeBounds], steps: int, *, rate: float = 0.25,
             decay: float = 0.95, margin: float = 1e-4) -> Optimised:
    """Lower the bounds of all rows by ``steps`` projected Adam steps on alpha and beta, keeping each row's best.

    Args:
        program: the network.
        rows: where to start.
        known: bounds of all nodes before the rows' layer (one group).
        steps: gradient steps; 0 evaluates only.
        rate: first step size of alpha; beta moves in units of the row's mean coefficient.
        decay: factor of the step size a step.
        margin: a row stops when its bound is below 0 by this part of its neuron's range: what it is below 0 by pays for the
            coarser numbers of a certificate.

    Returns:
        The best of all iterates, row by row.
    """
    enough = -margin * _range(program, rows, known)
    ascent = _Ascent(rows, solve(program, rows, known, want_gradient=True))
    numbers = torch.arange(len(rows), device=rows.neurons.device)
    finished: list[tuple[Tensor, Optimised]] = []
    for step in range(steps):
        done = ascent.best.bound <= enough
        if bool(done.all()):
            break
        if 2 * int(done.sum()) >= len(done):  # what is proved costs no more time
            finished.append((numbers[done], ascent.take(done).result(known)))
            ascent, numbers, enough = ascent.take(~done), numbers[~done], enough[~done]
        ascent.step(program, known, rate * decay**step, step + 1, enough)
    finished.append((numbers, ascent.result(known)))
    return _joined(finished)


class _Ascent:
    """Rows on their way: where they stand, the best of every row so far, and the sum of the corners met."""

    def __init__(self, rows: Rows, state: Solution) -> None:
        self.current = self.best_rows = rows
        self.state = self.best = state
        self.adam_alpha, self.adam_beta = _Adam(rows.alpha), _Adam(rows.beta)
        self.total, self.weight = state.corner.clone(), 1.0

    def step(self, program: Program, known: Mapping[int, NodeBounds], size: float, number: int, enough: Tensor) -> None:
        """One projected Adam step; rows whose bound is ``enough`` keep what they have."""
        current, state, done = self.current, self.state, self.best.bound <= enough
        moves_alpha, moves_beta = self.adam_alpha.step(state.gradient_alpha), self.adam_beta.step(state.gradient_beta)
        alpha = {k: (t - size * moves_alpha[k]).clamp_(0, 1) if k in moves_alpha else t for k, t in current.alpha.items()}
        beta = {k: ((t - size * state.scale[k] * moves_beta[k]) * (current.sigma[k] != 0)).clamp_(min=0)
                if k in moves_beta else t for k, t in current.beta.items()}
        self.current = replace(current, alpha=alpha, beta=beta)
        self.state = solve(program, self.current, known)
        self.total, self.weight = self.total + number * self.state.corner, self.weight + number
        better = (self.state.bound < self.best.bound) & ~done
        self.best, self.best_rows = _merge(better, self.state, self.best), _merge_rows(better, self.current, self.best_rows)

    def take(self, which: Tensor) -> _Ascent:
        """The rows ``which``, with all their history."""
        part = copy(self)
        part.current, part.best_rows = self.current.take(which), self.best_rows.take(which)
        part.state, part.best = self.state.take(which), self.best.take(which)
        part.adam_alpha, part.adam_beta = self.adam_alpha.take(which), self.adam_beta.take(which)
        part.total = self.total[which]
        return part

    def result(self, known: Mapping[int, NodeBounds]) -> Optimised:
        """The best of every row."""
        box = known[INPUT]
        average = torch.minimum(torch.maximum(self.total / self.weight, box.lower), box.upper)
        return Optimised(self.best_rows, self.best.bound, self.best, average)


def _joined(parts: Sequence[tuple[Tensor, Optimised]]) -> Optimised:
    """Parts put together again, in the order of their row numbers."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.argsort(torch.cat([numbers for numbers, _ in parts]))
    found = [part for _, part in parts]
    return Optimised(
        _joined_rows([part.rows for part in found], order),
        torch.cat([part.bound for part in found])[order],
        _joined_solutions([part.solution for part in found], order),
        torch.cat([part.average for part in found])[order],
    )


def _together(parts: Sequence[Mapping[int, Tensor]], order: Tensor) -> dict[int, Tensor]:
    return {k: torch.cat([part[k] for part in parts])[order] for k in parts[0]}


def _joined_rows(parts: Sequence[Rows], order: Tensor) -> Rows:
    neurons, signs = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("neurons", "signs"))
    return Rows(parts[0].layer, neurons, signs,
                *(_together([getattr(part, name) for part in parts], order) for name in ("alpha", "sigma", "beta")))


def _joined_solutions(parts: Sequence[Solution], order: Tensor) -> Solution:
    bound, corner = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("bound", "corner"))
    return Solution(bound, corner, *(_together([getattr(part, name) for part in parts], order) for name in MAPPINGS))


def _range(program: Program, rows: Rows, known: Mapping[int, NodeBounds]) -> Tensor:
    bounds = known[program.preactivation(rows.layer)]
    return torch.nan_to_num((bounds.upper - bounds.lower)[0, rows.neurons], posinf=0.0)


def _choose(better: Tensor, new: Mapping[int, Tensor], old: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {k: torch.where(better[:, None], new[k], old[k]) for k in old if k in new}


def _merge(better: Tensor, new: Solution, old: Solution) -> Solution:
    bound = torch.where(better, new.bound, old.bound)
    corner = torch.where(better[:, None], new.corner, old.corner)
    return Solution(bound, corner, *(_choose(better, getattr(new, n), getattr(old, n)) for n in MAPPINGS))


def _merge_rows(better: Tensor, new: Rows, old: Rows) -> Rows:
    return replace(old, alpha=_choose(better, new.alpha, old.alpha), beta=_choose(better, new.beta, old.beta))
