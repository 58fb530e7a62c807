"""Network: an immutable DAG of operators with the arrays copied in.

Nodes are kept in topological order and refer to each other by position; ``INPUT`` (-1) stands for the tensor that
enters the network. The last node is the output. Names are for people: two networks that differ in names only have the
same ``sha256``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from exactprune.errors import ShapeError, WeightError
from exactprune.ops import Op, ReLU, Reshape, Shape

if TYPE_CHECKING:
    import networkx

INPUT = -1
FORMAT = "exactprune-network/1"


@dataclass(frozen=True, eq=False)
class Node:
    """One operator in its place.

    Attributes:
        name: as in the model file, for people.
        op: the operator.
        inputs: positions of the nodes it reads; ``INPUT`` for the network's input.
    """

    name: str
    op: Op
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """How the model file presents its input and output, kept so that a saved network can take the original's place.

    Not part of the function, so not hashed. Axes are integers, or a string for a dynamic axis; None stands for
    ``("batch", *shape)``.

    Attributes:
        input_name, output_name: names of the two tensors.
        input_axes, output_axes: full shapes, batch axis included where the file has one.
    """

    input_name: str = "input"
    output_name: str = "output"
    input_axes: tuple[int | str, ...] | None = None
    output_axes: tuple[int | str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Network:
    """A ReLU network, ready to be analysed.

    Attributes:
        nodes: in topological order; the last one is the output; every node reaches it.
        input_shape: without batch axis.
        dtype: ``float32`` or ``float64``, the dtype of every stored array and of the network's own execution.
        name: for people.
        notes: what the loader did to the numbers (folded a batch norm, widened float16, ...), one sentence each.
        interface: how the model file presents input and output.

    Raises:
        ShapeError: shapes do not fit, or nodes are not in topological order.
        WeightError: an array holds NaN or infinity.
    """

    nodes: tuple[Node, ...]
    input_shape: Shape
    dtype: np.dtype
    name: str = "network"
    notes: tuple[str, ...] = ()
    interface: Interface = Interface()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.dtype not in (np.float32, np.float64):
            raise WeightError(f"{self.name}: dtype {self.dtype} is not float32 or float64")
        for position, node in enumerate(self.nodes):
            _check_node(position, node, self.dtype)
        _ = self.shapes

    # -- shape facts -------------------------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Output shape of every node, without batch axis."""
        shapes: list[Shape] = []
        for node in self.nodes:
            given = [self.input_shape if i == INPUT else shapes[i] for i in node.inputs]
            try:
                shapes.append(node.op.output_shape(*given))
            except ShapeError as error:
                raise ShapeError(f"node '{node.name}': {error}") from None
        return tuple(shapes)

    def shape_of(self, position: int) -> Shape:
        """Output shape of the node at ``position`` (``INPUT`` allowed)."""
        return self.input_shape if position == INPUT else self.shapes[position]

    @property
    def output(self) -> int:
        """Position of the output node (``INPUT`` for a network without nodes)."""
        return len(self.nodes) - 1

    @property
    def output_shape(self) -> Shape:
        """Shape of the output, without batch axis."""
        return self.shape_of(self.output)

    @cached_property
    def relus(self) -> tuple[int, ...]:
        """Positions of the ReLU nodes in topological order: ReLU layer k is ``relus[k]``."""
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node.op, ReLU))

    @cached_property
    def readers(self) -> Mapping[int, tuple[int, ...]]:
        """For every position (``INPUT`` too), the positions of the nodes that read it."""
        readers: dict[int, list[int]] = {i: [] for i in range(INPUT, len(self.nodes))}
        for position, node in enumerate(self.nodes):
            for source in node.inputs:
                readers[source].append(position)
        return {position: tuple(found) for position, found in readers.items()}

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def neurons(self) -> int:
        """Number of ReLU neurons."""
        return sum(prod(self.shapes[i]) for i in self.relus)

    @property
    def parameters(self) -> int:
        """Number of stored scalars."""
        return sum(node.op.parameters for node in self.nodes)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one input."""
        return sum(n.op.macs(*(self.shape_of(i) for i in n.inputs)) for n in self.nodes)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, x: np.ndarray, dtype: np.dtype | type | None = None) -> np.ndarray:
        """The network's output in plain numpy.

        Args:
            x: shape (batch, *input_shape), or input_shape for one input.
            dtype: float type of the computation; the network's own by default.

        Returns:
            shape (batch, *output_shape), or output_shape for one input.

        Raises:
            ShapeError: ``x`` has another shape.
        """
        single = np.shape(x) == self.input_shape
        values = self.evaluate_nodes(np.asarray(x)[None] if single else x, dtype)
        return values[self.output][0] if single else values[self.output]

    def evaluate_nodes(self, x: np.ndarray, dtype: np.dtype | type | None = None) -> dict[int, np.ndarray]:
        """Output of every node (and ``INPUT``) for a batch ``x`` of shape (batch, *input_shape)."""
        x = np.asarray(x, dtype=dtype or self.dtype)
        if x.shape[1:] != self.input_shape or x.ndim == 0:
            raise ShapeError(f"{self.name}: takes (batch, {', '.join(map(str, self.input_shape))}), was given {x.shape}")
        values = {INPUT: x}
        for position, node in enumerate(self.nodes):
            values[position] = node.op.evaluate(*(values[i] for i in node.inputs))
        return values

    # -- identity ----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, object]:
        """Everything that defines the function, as JSON-able data, with each array as shape and sha256."""
        return {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "input_shape": list(self.input_shape),
            "nodes": [_describe_node(node) for node in self.nodes],
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of ``describe()``: equal exactly when operators, wiring, dtype and every stored bit are equal."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    # -- views and copies --------------------------------------------------------------------------------------

    def graph(self) -> networkx.DiGraph:
        """The wiring as a ``networkx.DiGraph`` over positions (``INPUT`` included)."""
        import networkx

        graph = networkx.DiGraph()
        graph.add_nodes_from(range(INPUT, len(self.nodes)))
        graph.add_edges_from((source, i) for i, node in enumerate(self.nodes) for source in node.inputs)
        return graph

    def astype(self, dtype: np.dtype | type) -> Network:
        """The same network with arrays in ``dtype``."""
        nodes = tuple(replace(node, op=node.op.astype(dtype)) for node in self.nodes)
        return replace(self, nodes=nodes, dtype=np.dtype(dtype))

    def __repr__(self) -> str:
        chain = " -> ".join(f"{n.op.kind}{list(s)}" for n, s in zip(self.nodes, self.shapes, strict=True))
        return (f"Network({self.name!r}, {self.dtype.name}, input {list(self.input_shape)}, {self.neurons:,} ReLU neurons, "
                f"{self.parameters:,} parameters: {chain})")


def build(nodes: Iterable[Node], input_shape: Sequence[int], dtype: np.dtype | type, *, output: int | None = None,
          name: str = "network", notes: Sequence[str] = (), interface: Interface | None = None) -> Network:
    """A tidy network from nodes in topological order: what loaders and rewrites end with.

    Arrays are cast to ``dtype`` (a cast that changes a value is the caller's to note). Reshapes that change nothing are
    dropped, a reshape of a reshape becomes one, and nodes that do not reach the output are dropped.

    Args:
        nodes: in topological order, referring to each other by position.
        input_shape: without batch axis.
        dtype: float32 or float64.
        output: position of the output node; the last one by default.
        name: for people.
        notes: see ``Network.notes``.
        interface: see ``Network.interface``; pass the original's when rewriting.
    """
    given = list(nodes)
    output = len(given) - 1 if output is None else output
    needed = _reaching(given, output)
    kept: list[Node] = []
    shapes: list[Shape] = []
    place = {INPUT: INPUT}
    for position, node in enumerate(given):
        if position not in needed:
            continue
        inputs = tuple(place[i] for i in node.inputs)
        if isinstance(node.op, Reshape):
            while inputs[0] != INPUT and isinstance(kept[inputs[0]].op, Reshape):
                inputs = kept[inputs[0]].inputs
            source = tuple(input_shape) if inputs[0] == INPUT else shapes[inputs[0]]
            if source == node.op.shape:
                place[position] = inputs[0]
                continue
        read = [tuple(input_shape) if i == INPUT else shapes[i] for i in inputs]
        op = node.op.astype(dtype)
        _check_arrays(node.name, op)
        try:
            shapes.append(op.output_shape(*read))
        except ShapeError as error:
            raise ShapeError(f"node '{node.name}': {error}") from None
        place[position] = len(kept)
        kept.append(Node(node.name, op, inputs))
    return _without_dead(kept, place[output], tuple(input_shape), np.dtype(dtype), name, tuple(notes),
                         interface or Interface())


def _without_dead(nodes: list[Node], output: int, input_shape: Shape, dtype: np.dtype, name: str,
                  notes: tuple[str, ...], interface: Interface) -> Network:
    needed = sorted(_reaching(nodes, output))
    place = {INPUT: INPUT} | {old: new for new, old in enumerate(needed)}
    kept = tuple(replace(nodes[i], inputs=tuple(place[j] for j in nodes[i].inputs)) for i in needed)
    return Network(kept, input_shape, dtype, name, notes, interface)


def _reaching(nodes: Sequence[Node], output: int) -> set[int]:
    found: set[int] = set()
    stack = [output]
    while stack:
        position = stack.pop()
        if position != INPUT and position not in found:
            found.add(position)
            stack.extend(nodes[position].inputs)
    return found


def _describe_node(node: Node) -> dict[str, object]:
    arrays = {name: {"shape": list(a.shape), "sha256": hashlib.sha256(a.astype(a.dtype.newbyteorder("<")).tobytes()).hexdigest()}
              for name, a in node.op.arrays()}
    return {"op": node.op.kind, "inputs": list(node.inputs), "settings": node.op.settings(), "arrays": arrays}


def _check_node(position: int, node: Node, dtype: np.dtype) -> None:
    if len(node.inputs) != node.op.arity or not all(INPUT <= i < position for i in node.inputs):
        raise ShapeError(f"node '{node.name}': reads {node.inputs}, which are not earlier nodes")
    for name, array in node.op.arrays():
        if array.dtype != dtype:
            raise WeightError(f"node '{node.name}': {name} is {array.dtype}, the network is {dtype}")
    _check_arrays(node.name, node.op)


def _check_arrays(name: str, op: Op) -> None:
    for field, array in op.arrays():
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise WeightError(f"node '{name}' ({op.kind}): {bad} of {array.size} values of {field} are NaN or infinite; "
                              "repair or retrain the model")
