"""CROWN over one box: the substitutions of ``crown.Backward`` on coefficients that lie a column a row, (size, rows).

The same relaxations, the same error terms (``crown`` says why they are sound), laid out for speed:

- Slopes scale whole lines of memory, stably inactive neurons are left out by copying lines, and a convolution needs no gathered
  windows (``conv_columns``).
- The bound from below is minus the bound of -z_hat from above. Up to the first ReLU the two sides differ by the sign only, so
  the rows are carried once, the constant (which changes sign) apart from the error (which does not), and doubled there.
- Everything that is the same for all rows is prepared once a layer (``Constants``): a node's error terms are one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exactprune.bounds.fields import Field
from exactprune.bounds.interval import NodeBounds, pool_choice
from exactprune.bounds.linear_maps import ConvMap, LinearMap
from exactprune.bounds.program import TINY, Program
from exactprune.bounds.relaxation import Relaxation, Step, fused
from exactprune.network import INPUT
from exactprune.ops import Add, MaxPool2d, ReLU


@dataclass(frozen=True, eq=False)
class Constants:
    """What a pass over one box needs besides the program.

    Attributes:
        steps: ReLU layer -> its relaxation.
        errors: node -> what abs(coefficients on it) are multiplied by; nodes that round nothing, and those whose error the ReLU
            above holds already, are left out.
        ball: (2, inputs): middle and radius of the box, the rounding of the last product included in the radius.
        known: bounds, for max pools.
    """

    steps: Mapping[int, Step]
    errors: Mapping[int, Tensor]
    ball: Tensor
    known: Mapping[int, NodeBounds]

    def within(self, seen: Field) -> Constants:
        """What a tile sees of it."""
        kept = seen.kept
        steps = {k: _cut(seen, k, step) for k, step in self.steps.items() if seen.program.network.relus[k] <= seen.origin}
        errors = {i: e.index_select(0, kept[i]) if i in kept else e for i, e in self.errors.items()}
        ball = self.ball.index_select(1, kept[INPUT]) if INPUT in kept else self.ball
        return Constants(steps, errors, ball, self.known)


def _cut(seen: Field, layer: int, step: Step) -> Step:
    position = seen.program.preactivation(layer)
    if step.weight is None:
        return Step(step.values.index_select(1, seen.kept[position]), None, None) if position in seen.kept else step
    below = seen.program.network.nodes[position].inputs[0]
    return Step(step.values, step.alive, step.weight.index_select(0, seen.kept[below])) if below in seen.kept else step


def constants(program: Program, layer: int, known: Mapping[int, NodeBounds], relaxations: Mapping[int, Relaxation]) -> Constants:
    """For passes that start at a layer."""
    steps = {k: r.step for k, r in relaxations.items() if k < layer}
    errors = {i: e for i in range(program.preactivation(layer)) if (e := _error(program, i, known[i])) is not None}
    return Constants(steps, errors, known[INPUT].ball(program.gamma), known)


def _error(program: Program, position: int, bounds: NodeBounds) -> Tensor | None:
    """Rounding of a node's own sum, and of the sum of coefficients where several nodes read it."""
    readers = program.network.readers[position]
    if isinstance(program.network.nodes[position].op, ReLU) or (
            len(readers) == 1 and isinstance(program.network.nodes[readers[0]].op, ReLU)):
        return None  # in the relaxation
    error = None
    if bounds.error is not None:
        error = bounds.error.reshape(-1, bounds.error.shape[-1])[0] * (program.gamma * (1 + 1e-6)) + TINY
    if len(readers) > 1:
        shared = bounds.magnitude[0] * (program.gamma * (1 + 1e-6)) + TINY
        error = shared if error is None else error + shared
    return error


class Columns:
    """One pass over one box.

    Args:
        program: the network.
        given: what is known about it.
    """

    def __init__(self, program: Program, given: Constants) -> None:
        self.program, self.given = program, given
        self.layer_of = program.layer_of
        self.pending: dict[int, Tensor] = {}
        self.doubled = False

    def run(self, start: int, v: Tensor, constant: Tensor) -> Tensor:
        """Upper bounds of v . output(start) + constant and of its negative.

        Args:
            start: a node.
            v: coefficients on its output, (size, rows); overwritten.
            constant: (rows,); overwritten.

        Returns:
            (2 * rows,), the error of ``start`` itself not included.
        """
        self.pending, self.doubled = {start: v}, False
        self.total, self.error = constant, torch.zeros_like(constant)
        for position in range(start, INPUT, -1):
            if position in self.pending:
                self._substitute(position, self.pending.pop(position))
        self._double()
        if INPUT in self.pending:
            self._at_input(self.pending.pop(INPUT))
        return self.total

    def _double(self) -> None:
        """From rows whose two sides differ by the sign to both sides."""
        if not self.doubled:
            self.doubled = True
            self.total = torch.cat([self.error + self.total, self.error - self.total])
            self.pending = {i: torch.cat([v, -v], dim=1) for i, v in self.pending.items()}

    def _substitute(self, position: int, v: Tensor) -> None:
        node = self.program.network.nodes[position]
        match node.op:
            case ReLU():
                self._relu(position, v)
            case Add():
                self._round(position, v)
                for source in node.inputs[1:]:
                    self._give(position, source, v.clone())
                self._give(position, node.inputs[0], v)
            case MaxPool2d():
                self._max_pool(position, v)
            case _:
                self._linear(position, v)

    def _round(self, position: int, v: Tensor) -> None:
        error = self.given.errors.get(position)
        if error is not None:
            (self.total if self.doubled else self.error).addmv_(v.abs().T, error)

    def _relu(self, position: int, v: Tensor) -> None:
        layer, source = self.layer_of[position], self.program.network.nodes[position].inputs[0]
        step = self.given.steps[layer]
        if step.alive is not None:
            v = v.index_select(0, step.alive)
        if not self.doubled:
            self._double()
            v = torch.cat([v, -v], dim=1)
        low, gap, on_plus, on_all = step.lines
        plus = v.clamp(min=0)
        self.total.addmv_(plus.T, on_plus).addmv_(v.T, on_all, alpha=-1)
        if not fused(self.program, layer):
            self._give(position, source, v.mul_(low).addcmul_(plus, gap))
            return
        below, mapping = self.program.network.nodes[source].inputs[0], self.program.maps[source]
        assert mapping is not None
        if isinstance(mapping, ConvMap) and mapping.gathers and not mapping.as_matrix:
            moved = self._scaled_and_convolved(mapping, v, plus, low, gap)
        else:
            a = v.mul_(low).addcmul_(plus, gap)
            moved = mapping.transposed_columns(a) if step.weight is None else torch.mm(step.weight, a)
        self._give(source, below, moved)

    @staticmethod
    def _scaled_and_convolved(mapping: ConvMap, v: Tensor, plus: Tensor, low: Tensor, gap: Tensor) -> Tensor:
        """M^T (v low + plus gap), the bracket written where the convolution reads it."""
        buffer, inner = mapping.columns.empty(v, v.shape[1])
        torch.mul(mapping.image_of(v), mapping.image_of(low), out=inner)
        inner.addcmul_(mapping.image_of(plus), mapping.image_of(gap))
        return mapping.from_columns(buffer)

    def _give(self, position: int, source: int, v: Tensor) -> None:
        """Hand coefficients of a node on to one of its inputs. Tensors in ``pending`` are nobody else's: overwritten freely."""
        places = self.program.inside.get((position, source))
        if source not in self.pending:
            if places is not None:
                v = v.new_zeros(self.program.size(source), v.shape[1]).index_copy_(0, places, v)
            self.pending[source] = v
        elif places is None:
            self.pending[source].add_(v)
        else:
            self.pending[source].index_add_(0, places, v)

    def _linear(self, position: int, v: Tensor) -> None:
        mapping = self.program.maps[position]
        assert mapping is not None
        if mapping.bias is not None:
            self.total.addmv_(v.T, mapping.bias)
        self._round(position, v)
        self._give(position, self.program.network.nodes[position].inputs[0], mapping.transposed_columns(v))

    def _max_pool(self, position: int, v: Tensor) -> None:
        if not self.doubled:
            self._double()
            v = torch.cat([v, -v], dim=1)
        source = self.program.network.nodes[position].inputs[0]
        chosen, wins, top, size = (t[0] for t in pool_choice(self.program, position, self.given.known[source]))
        plus = v.clamp(min=0)
        self.total += (plus.T @ (top * ~wins)) * (1 + self.program.gamma)
        self.total.addmv_(v.abs().T, (size + top.abs()) * self.program.gamma + TINY)
        self._round(position, v)
        a = v.clamp_(max=0).addcmul_(plus, wins.to(v.dtype).unsqueeze(1))
        self._give(position, source, v.new_zeros(self.program.size(source), v.shape[1]).index_add_(0, chosen, a))

    def _at_input(self, v: Tensor) -> None:
        middle, radius = self.given.ball.unbind()
        self.total.addmv_(v.T, middle).addmv_(v.abs_().T, radius)


def first_columns(mapping: LinearMap | None, size: int, neurons: Tensor) -> Tensor:
    """Rows of a map, or unit vectors where there is none, as columns."""
    if mapping is not None:
        return mapping.rows(neurons).T
    unit = torch.zeros(size, len(neurons), dtype=torch.float64, device=neurons.device)
    unit[neurons, torch.arange(len(neurons), device=neurons.device)] = 1.0
    return unit
