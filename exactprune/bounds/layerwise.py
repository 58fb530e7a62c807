"""Bounds of all ReLU layers in topological order: interval first, then backward bounds for the rows that are still open.

A neuron whose interval bounds already fix its phase needs nothing more: its relaxation is exact. Layers are settled one
after the other, so every later layer profits from what the earlier ones learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exactprune.bounds.crown import crown_rows
from exactprune.bounds.interval import NodeBounds, input_bounds, interval_node, propagate
from exactprune.bounds.program import Program
from exactprune.bounds.relaxation import Relaxation, relax
from exactprune.network import INPUT


@dataclass(eq=False)
class Layerwise:
    """Bounds found so far, grown layer by layer (``enter``, then ``narrow`` any number of times, then the next layer).

    Attributes:
        program: the network.
        known: node -> bounds; pre-activations hold everything learned.
        relaxations: ReLU layer -> relaxation, for layers that are finished.
        memory: bytes a pass may use.
    """

    program: Program
    known: dict[int, NodeBounds]
    relaxations: dict[int, Relaxation] = field(default_factory=dict)
    memory: int = 1 << 31

    def enter(self, layer: int) -> NodeBounds:
        """Interval bounds of a layer's pre-activation; the layers before are final from now on."""
        for earlier in range(layer):
            if earlier not in self.relaxations:
                self.relaxations[earlier] = relax(self.program, earlier, self.at(earlier), compact=True)
        return self.propagate(layer)

    def propagate(self, layer: int) -> NodeBounds:
        """Interval bounds of a layer's pre-activation and of all nodes before it that lack them."""
        propagate(self.program, self.known, self.program.preactivation(layer))
        return self.at(layer)

    def at(self, layer: int) -> NodeBounds:
        """Current bounds of a layer's pre-activation."""
        return self.known[self.program.preactivation(layer)]

    def open_rows(self, layer: int) -> Tensor:
        """Neurons whose phase is not fixed in some group."""
        bounds = self.at(layer)
        found = (bounds.lower < 0) & (bounds.upper > 0)
        return torch.nonzero(found[0] if len(found) == 1 else found.any(dim=0))[:, 0]

    def crown(self, layer: int, neurons: Tensor, moved: Callable[[int], None] | None = None) -> None:
        """Narrow some rows by CROWN; ``moved`` is told how many are done."""
        if len(neurons):
            lower, upper = crown_rows(self.program, layer, neurons, self.known, self.relaxations, self.memory, moved=moved)
            self.narrow(layer, neurons, lower, upper)

    def narrow(self, layer: int, neurons: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Intersect the bounds of some rows with (lower, upper), each (groups, rows). Crossing bounds are left alone."""
        position, bounds = self.program.preactivation(layer), self.at(layer)
        tighter_lower = torch.maximum(bounds.lower.index_select(1, neurons), lower)
        tighter_upper = torch.minimum(bounds.upper.index_select(1, neurons), upper)
        new_lower = bounds.lower.index_copy(1, neurons, tighter_lower)
        new_upper = bounds.upper.index_copy(1, neurons, tighter_upper)
        self.known[position] = NodeBounds(new_lower, new_upper, bounds.error)


def start(program: Program, lower: Tensor, upper: Tensor, memory: int = 1 << 31) -> Layerwise:
    """Nothing known but the boxes (groups, inputs)."""
    return Layerwise(program, {INPUT: input_bounds(lower, upper)}, memory=memory)


def crown_bounds(program: Program, lower: Tensor, upper: Tensor, memory: int = 1 << 31) -> tuple[NodeBounds, ...]:
    """Interval-and-CROWN bounds of the pre-activations of every ReLU layer over boxes (groups, inputs).

    The first layer's rows are skipped where it is linear in the input: its interval bounds are exact already.
    """
    with torch.inference_mode():
        state = start(program, lower, upper, memory)
        for layer in range(program.layers):
            state.enter(layer)
            if not first_is_exact(program, layer):
                state.crown(layer, state.open_rows(layer))
    return tuple(_ordinary(state.at(layer)) for layer in range(program.layers))


def _ordinary(bounds: NodeBounds) -> NodeBounds:
    """The bounds as tensors that may be changed outside inference mode."""
    error = bounds.error if bounds.error is None else bounds.error.clone()
    return NodeBounds(bounds.lower.clone(), bounds.upper.clone(), error)


def first_is_exact(program: Program, layer: int) -> bool:
    """Whether a layer's pre-activation is one linear map of the input (moves aside): interval bounds are the exact range."""
    position, maps = program.preactivation(layer), 0
    while position != INPUT:
        mapping = program.maps[position]
        if mapping is None or len(program.network.nodes[position].inputs) != 1:
            return False
        maps += mapping.terms > 0
        position = program.network.nodes[position].inputs[0]
    return maps <= 1


__all__ = ["Layerwise", "crown_bounds", "first_is_exact", "interval_node", "start"]
