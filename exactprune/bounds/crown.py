"""CROWN: backward bound propagation, batched over neurons and boxes, sound in float64.

Start from coefficients v on the output of a node and substitute operators from there back to the input, replacing every ReLU
by its relaxation (Zhang et al. 2018, eq. 8-10). What is left is a linear function of the input, whose maximum over a box is
A.mid + abs(A).rad. The minimum is minus the maximum of the negative, so both sides are rows of one batch.

Soundness in floating point: every product v M is within gamma abs(v) abs(M) of the exact one, so replacing the exact by
the computed coefficients changes the form by at most gamma abs(v) . (abs(M) H + abs(b)) on D, with H >= abs(input of M)
(docs/certificate.md has the exact version). These terms are added up with everything else; any order of summation, any
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exactprune.bounds.fields import field as field_of
from exactprune.bounds.fields import tiles
from exactprune.bounds.interval import NodeBounds, pool_choice
from exactprune.bounds.program import FLOOR, TINY, Program
from exactprune.bounds.relaxation import Relaxation, fused
from exactprune.bounds.single import Columns, Constants, constants, first_columns
from exactprune.network import INPUT
from exactprune.ops import Add, MaxPool2d, ReLU

_ROWS = 640  # rows a pass on a CPU, of 800 coefficients: fewer calls, and the blocks still stay near the processor


@dataclass(eq=False)
class Trace:
    """What a pass met on its way, for those who tune the multipliers.

    Attributes:
        at_relu: layer -> coefficients on the ReLU outputs, (groups, rows, neurons).
        at_input: coefficients on the input, (groups, rows, inputs).
    """

    at_relu: dict[int, Tensor] = field(default_factory=dict)
    at_input: Tensor | None = None


def _dot(v: Tensor, vector: Tensor) -> Tensor:
    """(groups, rows, n) . (groups or 1, n) -> (groups, rows)."""
    if len(vector) == 1:
        return v @ vector[0]
    if v.shape[1] == 1:
        return (v[:, 0] * vector).sum(dim=-1, keepdim=True)
    return torch.matmul(v, vector.unsqueeze(-1)).squeeze(-1)


class Backward:
    """One backward pass: the linear form carried so far.

    Args:
        program: the network.
        known: bounds of every node before the start, with the ``error`` of linear nodes.
        relaxations: per ReLU layer before the start.
        trace: filled on the way if given.
        extra: layer -> what is added to the multipliers there, (groups, neurons): beta terms of split neurons, whose sign makes
            adding them sound (see ``deciders.branch_and_bound``).
    """

    def __init__(self, program: Program, known: Mapping[int, NodeBounds], relaxations: Mapping[int, Relaxation],
                 trace: Trace | None = None, extra: Mapping[int, Tensor] | None = None) -> None:
        self.program, self.known, self.relaxations, self.trace = program, known, relaxations, trace
        self.extra = extra or {}
        self.layer_of = program.layer_of

    def run(self, start: int, v: Tensor, total: Tensor) -> Tensor:
        """Upper bound of v . output(start) + total, (groups, rows). ``v`` is overwritten unless there is a trace."""
        pending = {start: v}
        for position in range(start, INPUT, -1):
            if position in pending:
                total = self._substitute(position, pending.pop(position), total, pending)
        return self._at_input(pending.get(INPUT), total)

    def _substitute(self, position: int, v: Tensor, total: Tensor, pending: dict[int, Tensor]) -> Tensor:
        node = self.program.network.nodes[position]
        match node.op:
            case ReLU():
                return self._relu(position, v, total, pending)
            case Add():
                total = total + self._shared_error(position, v)
                for source in node.inputs[1:]:
                    self._give(pending, position, source, v.clone())
                self._give(pending, position, node.inputs[0], v)
                return total
            case MaxPool2d():
                return self._max_pool(position, v, total, pending)
        return self._linear(position, v, total, pending)

    def _relu(self, position: int, v: Tensor, total: Tensor, pending: dict[int, Tensor]) -> Tensor:
        layer, source = self.layer_of[position], self.program.network.nodes[position].inputs[0]
        relaxation = self.relaxations[layer]
        if self.trace is not None:
            self.trace.at_relu[layer] = v
        kept = self.trace is not None
        if relaxation.alive is not None:
            v, kept = v.index_select(-1, relaxation.alive), False
        plus = v.clamp(min=0)
        total = total + _dot(plus, relaxation.on_plus) - _dot(v, relaxation.on_all)
        low, gap = relaxation.low.unsqueeze(1), relaxation.gap.unsqueeze(1)
        a = (v * low if kept else v.mul_(low)).addcmul_(plus, gap)
        if layer in self.extra:
            a, total = self._with_extra(layer, source, a, total)
        if not fused(self.program, layer):
            self._give(pending, position, source, a)
            return total
        below = self.program.network.nodes[source].inputs[0]
        mapping = self.program.maps[source]
        assert mapping is not None
        if relaxation.weight is not None:
            self._give(pending, source, below, a @ relaxation.weight)
        else:
            self._give(pending, source, below, mapping.transposed(a.flatten(0, 1)).view(*a.shape[:2], -1))
        return total

    def _give(self, pending: dict[int, Tensor], position: int, source: int, v: Tensor) -> None:
        """Hand coefficients of a node on to one of its inputs. Tensors in ``pending`` are nobody else's: overwritten freely."""
        places = self.program.inside.get((position, source))
        if source not in pending:
            wider = places is not None
            pending[source] = v.new_zeros(*v.shape[:2], self.program.size(source)).index_copy_(2, places, v) if wider else v
        elif places is None:
            pending[source].add_(v)
        else:
            pending[source].index_add_(2, places, v)

    def _with_extra(self, layer: int, source: int, a: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        extra = self.extra[layer]
        bounds, mapping = self.known[source], self.program.maps[source]
        size = extra.abs()
        error = size * bounds.magnitude * self.program.gamma
        if fused(self.program, layer):
            assert mapping is not None
            error = error if bounds.error is None else error + size * bounds.error * self.program.gamma
            if mapping.bias is not None:
                total = total + (extra * mapping.bias).sum(dim=-1, keepdim=True)
        return a + extra.unsqueeze(1), total + error.sum(dim=-1, keepdim=True) * (1 + 1e-6)

    def _linear(self, position: int, v: Tensor, total: Tensor, pending: dict[int, Tensor]) -> Tensor:
        mapping = self.program.maps[position]
        assert mapping is not None
        if mapping.bias is not None:
            total = total + v @ mapping.bias
        error = self.known[position].error
        if error is not None:
            total = total + v.abs() @ (error.reshape(-1, error.shape[-1])[0] * (self.program.gamma * (1 + 1e-6)) + TINY)
        total = total + self._shared_error(position, v)
        moved = mapping.transposed(v.flatten(0, 1)).view(*v.shape[:2], -1)
        self._give(pending, position, self.program.network.nodes[position].inputs[0], moved)
        return total

    def _shared_error(self, position: int, v: Tensor) -> Tensor | float:
        """Rounding of the sum of coefficients where several nodes read this one."""
        if len(self.program.network.readers[position]) < 2:
            return 0.0
        magnitude = self.known[position].magnitude.amax(dim=0)
        return v.abs() @ (magnitude * self.program.gamma + TINY)

    def _max_pool(self, position: int, v: Tensor, total: Tensor, pending: dict[int, Tensor]) -> Tensor:
        source = self.program.network.nodes[position].inputs[0]
        chosen, wins, top, size = pool_choice(self.program, position, self.known[source])
        plus, minus = v.clamp(min=0), v.clamp(max=0)
        total = total + _dot(plus, top * ~wins) * (1 + self.program.gamma)
        rounding = (size.amax(dim=0) + top.abs().amax(dim=0)) * self.program.gamma + TINY
        total = total + v.abs() @ rounding + self._shared_error(position, v)
        a = minus + plus * wins.unsqueeze(1)
        out = v.new_zeros(*v.shape[:2], self.program.size(source))
        out.scatter_add_(2, chosen.unsqueeze(1).expand(v.shape[0], v.shape[1], -1), a)
        self._give(pending, position, source, out)
        return total

    def _at_input(self, v: Tensor | None, total: Tensor) -> Tensor:
        if v is None:
            return total
        if self.trace is not None:
            self.trace.at_input = v
        bounds = self.known[INPUT]
        middle = 0.5 * bounds.lower + 0.5 * bounds.upper
        radius = torch.maximum(bounds.upper - middle, middle - bounds.lower) * (1 + 2.0**-50)
        radius = (radius + self.program.gamma * (radius + middle.abs())) * (1 + 1e-15) + TINY
        total = total + _dot(v, middle - radius)
        plus = v.clamp(min=0) if self.trace is not None else v.clamp_(min=0)
        return total + _dot(plus, 2 * radius)


def start_rows(program: Program, layer: int, neurons: Tensor, known: Mapping[int, NodeBounds]) -> tuple[int, Tensor, Tensor]:
    """Where a pass for these neurons starts: (node, coefficients on it (rows, size), constant (rows,)), rounding included."""
    position = program.preactivation(layer)
    mapping = program.maps[position] if position >= 0 else None
    if mapping is None:
        unit = torch.zeros(len(neurons), program.size(position), dtype=torch.float64, device=program.device)
        unit[torch.arange(len(neurons), device=program.device), neurons] = 1.0
        return position, unit, unit.new_zeros(len(neurons))
    constant = torch.zeros(len(neurons), dtype=torch.float64, device=program.device)
    if mapping.bias is not None:
        constant = mapping.bias[neurons]
    return program.network.nodes[position].inputs[0], mapping.rows(neurons), constant


def start_error(program: Program, layer: int, neurons: Tensor, known: Mapping[int, NodeBounds]) -> Tensor:
    """What rounding may have changed by the end of a pass besides its steps: (rows,)."""
    bounds = known[program.preactivation(layer)]
    if bounds.error is None:
        return program.gamma * bounds.magnitude.amax(dim=0)[neurons] + FLOOR
    error = bounds.error if bounds.error.dim() == 1 else bounds.error.reshape(-1, bounds.error.shape[-1])[0]
    return error.index_select(0, neurons).mul_(program.gamma).add_(FLOOR)


def crown_rows(program: Program, layer: int, neurons: Tensor, known: Mapping[int, NodeBounds],
               relaxations: Mapping[int, Relaxation], memory: int = 1 << 31,
               sensitivity: list[Tensor] | None = None, moved: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
    """CROWN bounds of some neurons of a ReLU layer.

    Args:
        program: the network.
        layer: number of the ReLU layer.
        neurons: int64 indices.
        known: bounds of the nodes before (``groups`` boxes), with ``error`` for linear nodes.
        relaxations: of the ReLU layers before.
        memory: bytes the pass may use.
        sensitivity: if given, a tensor (groups, len(neurons), inputs) is appended: abs of the coefficients on the input, both
            sides added.
        moved: told how many neurons were done, after every part (one box only).

    Returns:
        (lower, upper), each (groups, len(neurons)); infinite where the arithmetic failed.
    """
    groups = len(known[INPUT].lower)
    if groups == 1 and sensitivity is None and neurons.numel():
        return _one_box(program, layer, neurons, known, relaxations, memory, moved)
    bounds = torch.full((2, groups, len(neurons)), torch.inf, dtype=torch.float64, device=program.device)
    if sensitivity is not None:
        sensitivity.append(bounds.new_zeros(groups, len(neurons), program.size(INPUT)))
    for tile, window in tiles(program, layer, neurons):
        seen = field_of(program, layer, window)
        if seen is None:
            cut = _Cut(program, known, relaxations, neurons)
        else:
            cut = _Cut(seen.program, seen.bounds(known), seen.relaxations(relaxations), seen.local(neurons[tile]))
        for part in torch.arange(len(tile), device=tile.device).split(_step(cut.program, layer, groups, memory)):
            trace = Trace() if sensitivity is not None else None
            bounds[:, :, tile[part]] = _crown_part(cut, layer, part, trace)
            if sensitivity is not None and trace is not None and trace.at_input is not None:
                places = seen.kept.get(INPUT) if seen is not None else None
                _put_sizes(sensitivity[-1], tile[part], places, trace.at_input)
    return -bounds[1], bounds[0]


def _one_box(program: Program, layer: int, neurons: Tensor, known: Mapping[int, NodeBounds],
             relaxations: Mapping[int, Relaxation], memory: int, moved: Callable[[int], None] | None) -> tuple[Tensor, Tensor]:
    """``crown_rows`` by ``single.Columns``."""
    given, parts, order = constants(program, layer, known, relaxations), [], []
    for tile, window in tiles(program, layer, neurons):
        seen = field_of(program, layer, window)
        order.append(tile)
        where, cut, local = program, given, neurons
        if seen is not None:
            where, cut, local = seen.program, given.within(seen), seen.local(neurons.index_select(0, tile))
        for part in local.split(_step(where, layer, 1, memory)):
            parts.append(_columns_part(where, cut, layer, part))
            if moved is not None:
                moved(len(part))
    bounds = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if len(order) > 1:
        bounds = torch.empty_like(bounds).index_copy_(1, torch.cat(order), bounds)
    bounds = bounds.add_(start_error(program, layer, neurons, known))
    bounds = bounds.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    return -bounds[1:], bounds[:1]


def _columns_part(program: Program, given: Constants, layer: int, neurons: Tensor) -> Tensor:
    """(2, rows): upper bounds of z_hat, and of minus z_hat."""
    position = program.preactivation(layer)
    mapping = program.maps[position] if position != INPUT else None
    v = first_columns(mapping, program.size(position), neurons)
    bias = None if mapping is None else mapping.bias
    constant = v.new_zeros(len(neurons)) if bias is None else bias.index_select(0, neurons)
    start = position if mapping is None else program.network.nodes[position].inputs[0]
    return Columns(program, given).run(start, v, constant).view(2, -1)


@dataclass(frozen=True, eq=False)
class _Cut:
    """The part of a program that some neurons see (see ``fields``), and what is known about it."""

    program: Program
    known: Mapping[int, NodeBounds]
    relaxations: Mapping[int, Relaxation]
    neurons: Tensor


def _step(program: Program, layer: int, groups: int, memory: int) -> int:
    """Neurons a pass: what memory allows, and on a CPU what stays in cache."""
    widest = max(program.size(i) for i in range(INPUT, program.preactivation(layer) + 1))
    step = max(1, memory // (8 * 8 * 2 * groups * widest))
    return step if program.device.type != "cpu" else min(step, max(16, _ROWS * 800 // (groups * widest * 2)))


def _crown_part(cut: _Cut, layer: int, part: Tensor, trace: Trace | None) -> Tensor:
    """(2, groups, rows): upper bounds of z_hat, and of minus z_hat."""
    neurons, groups = cut.neurons[part], len(cut.known[INPUT].lower)
    start, rows, constant = start_rows(cut.program, layer, neurons, cut.known)
    v = torch.cat([rows, -rows]).unsqueeze(0).repeat(groups, 1, 1)
    total = torch.cat([constant, -constant]).expand(groups, -1)
    bound = Backward(cut.program, cut.known, cut.relaxations, trace).run(start, v, total)
    bound = bound.view(groups, 2, -1).transpose(0, 1) + start_error(cut.program, layer, neurons, cut.known)
    return torch.nan_to_num(bound, nan=torch.inf, posinf=torch.inf, neginf=torch.inf)


def _put_sizes(into: Tensor, rows: Tensor, places: Tensor | None, at_input: Tensor) -> None:
    """Store abs of the coefficients on the input, both sides added."""
    size = at_input.abs()
    size = size[:, : len(rows)] + size[:, len(rows) :]
    if places is None:
        into[:, rows] = size
    else:
        into[:, rows[:, None], places] = size
