"""Apply a plan: a physically smaller network, with the verdicts of what is left.

Every tensor loses the units whose groups go; every operator is cut accordingly: rows and columns of a weight, whole
groups of a grouped convolution, entries of a scale, pads along the units' axis, extents of a reshape. Input and output
keep their shapes because their group is pinned.

A mixer (Affine, Conv2d) that has lost all its inputs is a constant, its bias. It becomes the bias of a linear map with
zero weights on one value of the network's input (the largest: a max pool needs no parameters), so that a network whose
layer died is still a network with the same interface, and never a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatchmethod
from math import prod

import networkx
import numpy as np

from exactprune.claim import LayerVerdict
from exactprune.compress.plan import Plan
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Affine, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Shape

Origin = tuple[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class State:
    """A network on its way, with what is known about it.

    Attributes:
        network: the current network.
        verdicts: one per current ReLU layer.
        origin: per current ReLU layer, the original layer's number and the original unit of each unit (-1: new).
    """

    network: Network
    verdicts: tuple[LayerVerdict, ...]
    origin: tuple[Origin, ...]


def apply(state: State, plan: Plan) -> State:
    """The smaller network. Equal to the old one on the domain when the plan is exact."""
    cutter = _Cutter(state.network, plan)
    layers = {relu: k for k, relu in enumerate(state.network.relus)}
    for position in range(len(state.network.nodes)):
        cutter.place(position)
    return finish(state, cutter.nodes, cutter.at[state.network.output],
                  {new: layers[old] for old, new in cutter.at.items() if old in layers and old not in plan.identities},
                  {k: _kept_units(plan, relu) for relu, k in layers.items()})


def _kept_units(plan: Plan, relu: int) -> tuple[int, np.ndarray]:
    return plan.units.axis[relu], plan.units.kept(relu, plan.removed)


def finish(state: State, nodes: Sequence[Node], output: int, layers: dict[int, int],
           kept: dict[int, tuple[int, np.ndarray]]) -> State:
    """Tidy a new list of nodes and carry verdicts and origins over.

    Args:
        state: what the nodes were made from.
        nodes: in topological order.
        output: position of the output among them.
        layers: position of a ReLU among ``nodes`` -> number of the layer it was in ``state``.
        kept: number of a layer in ``state`` -> (axis of its units, indices of units that stay).
    """
    old = state.network
    if output == INPUT:
        nodes, output = [*nodes, Node("identity", Reshape(old.input_shape), (INPUT,))], len(nodes)
    network = build(nodes, old.input_shape, old.dtype, output=output, name=old.name, notes=old.notes,
                    interface=old.interface)
    alive = [k for position, k in sorted(layers.items()) if position in _ancestors(nodes, output)]
    verdicts = tuple(_restricted(state.verdicts[k], *kept[k], number, network) for number, k in enumerate(alive))
    origin = tuple((state.origin[k][0], state.origin[k][1][kept[k][1]]) for k in alive)
    return State(network, verdicts, origin)


def _ancestors(nodes: Sequence[Node], output: int) -> set[int]:
    graph = networkx.DiGraph((source, i) for i, node in enumerate(nodes) for source in node.inputs)
    return networkx.ancestors(graph, output) | {output}


def _restricted(verdict: LayerVerdict, axis: int, kept: np.ndarray, number: int, network: Network) -> LayerVerdict:
    """The verdicts of the units that stay, in the new numbering."""
    flat = np.take(np.arange(prod(verdict.shape)).reshape(verdict.shape), kept, axis=axis)
    position = network.relus[number]
    picked = {name: getattr(verdict, name)[flat.ravel()] for name in ("status", "method", "lower", "upper")}
    where = {int(old): new for new, old in enumerate(flat.ravel())} if verdict.reasons else {}
    reasons = {where[i]: why for i, why in verdict.reasons.items() if i in where}
    return LayerVerdict(number, network.nodes[position].name, flat.shape, reasons=reasons, **picked)


class _Cutter:
    """Builds the new list of nodes, one old node at a time."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.network, self.plan = network, plan
        self.nodes: list[Node] = []
        self.at: dict[int, int] = {INPUT: INPUT}

    def place(self, position: int) -> None:
        """Append what becomes of an old node, if anything does."""
        node = self.network.nodes[position]
        if position in self.plan.identities:
            self.at[position] = self.at[self.plan.identities[position]]
        elif not self._kept(position).size:
            return
        elif isinstance(node.op, Affine | Conv2d) and not self._columns(position).size:
            self.at[position] = self._constant(node, position)
        else:
            op = self._cut(node.op, position)
            self.at[position] = self._append(node.name, op, tuple(self.at[i] for i in node.inputs))

    def _append(self, name: str, op: Op, inputs: tuple[int, ...]) -> int:
        self.nodes.append(Node(name, op, inputs))
        return len(self.nodes) - 1

    def _kept(self, position: int) -> np.ndarray:
        return self.plan.units.kept(position, self.plan.removed)

    def _columns(self, position: int) -> np.ndarray:
        """Input units of a mixer that stay."""
        source = self.network.nodes[position].inputs[0]
        group = self.plan.units.along_first(source, self.network.shape_of(source)[0])
        return np.flatnonzero(~self.plan.removed[group])

    def _bias(self, position: int, op: Affine | Conv2d) -> np.ndarray:
        return self.plan.biases.get(position, op.bias)[self._kept(position)]

    def _shape(self, position: int) -> Shape:
        shape, axis = self.network.shape_of(position), self.plan.units.axis[position]
        return tuple(self._kept(position).size if i == axis else n for i, n in enumerate(shape))

    @singledispatchmethod
    def _cut(self, op: Op, position: int) -> Op:
        return op

    @_cut.register
    def _relu(self, op: ReLU, position: int) -> Op:
        return ReLU()

    @_cut.register
    def _affine(self, op: Affine, position: int) -> Op:
        rows, columns = self._kept(position), self._columns(position)
        return Affine(op.weight[np.ix_(rows, columns)], self._bias(position, op))

    @_cut.register
    def _conv(self, op: Conv2d, position: int) -> Op:
        rows, columns = self._kept(position), self._columns(position)
        if op.groups == 1:
            return replace(op, weight=op.weight[np.ix_(rows, columns)], bias=self._bias(position, op))
        groups = len(columns) // op.weight.shape[1]
        return replace(op, weight=op.weight[rows], bias=self._bias(position, op), groups=groups)

    @_cut.register
    def _scale(self, op: Scale, position: int) -> Op:
        axis, rank, kept = self.plan.units.axis[position], len(self.network.shapes[position]), self._kept(position)

        def cut(array: np.ndarray) -> np.ndarray:
            at = axis - rank + array.ndim
            return np.take(array, kept, axis=at) if at >= 0 and array.shape[at] > 1 else array

        return Scale(cut(op.scale), cut(op.shift))

    @_cut.register
    def _pad(self, op: Pad, position: int) -> Op:
        axis = self.plan.units.axis[position]
        if self.network.shape_of(position) == self.network.shape_of(self.network.nodes[position].inputs[0]):
            return op
        kept, (before, _) = self._kept(position), op.pads[axis]
        inner = self.network.shape_of(self.network.nodes[position].inputs[0])[axis]
        pads = (int((kept < before).sum()), int((kept >= before + inner).sum()))
        return replace(op, pads=tuple(pads if i == axis else p for i, p in enumerate(op.pads)))

    @_cut.register
    def _reshape(self, op: Reshape, position: int) -> Op:
        return Reshape(self._shape(position))

    def _constant(self, node: Node, position: int) -> int:
        """A mixer without inputs: its bias, behind zero weights on one value of the network's input, the largest."""
        dtype, shape, size = self.network.dtype, self._shape(position), prod(self.network.input_shape)
        bias = self._bias(position, node.op)  # type: ignore[arg-type]
        row = self._append(f"{node.name}.row", Reshape((1, 1, size)), (INPUT,))
        one = self._append(f"{node.name}.one", MaxPool2d((1, size), (1, size)), (row,))
        if isinstance(node.op, Affine):
            flat = self._append(f"{node.name}.flat", Reshape((1,)), (one,))
            return self._append(node.name, Affine(np.zeros((bias.size, 1), dtype), bias), (flat,))
        plane = self._append(f"{node.name}.plane", Pad(((0, 0), (0, shape[1] - 1), (0, shape[2] - 1))), (one,))
        return self._append(node.name, Conv2d(np.zeros((bias.size, 1, 1, 1), dtype), bias), (plane,))
