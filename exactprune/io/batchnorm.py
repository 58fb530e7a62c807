"""Folding at load: batch norms into the layer before them, constants added after a product into its bias.

Batch norm in evaluation mode (Ioffe and Szegedy 2015, section 3.1) is per channel

    y = gamma * (x - mean) / sqrt(var + eps) + beta.

With x = weight . u + bias this is an affine layer again. The folded numbers are computed in float64, in exactly this
order, and rounded once to the network's dtype:

    s = gamma / sqrt(var + eps);  weight' = weight * s;  bias' = (bias - mean) * s + beta.

Without a layer to fold into (it has other readers, or there is none) the batch norm becomes ``Scale(s, bias')`` with
bias = 0. Either way the rounding happens here, before any claim is made: every claim is about the folded network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exactprune.errors import ShapeError, UnsupportedOpError, WeightError
from exactprune.network import INPUT, Node
from exactprune.ops import Affine, Conv2d, Op, Reshape, Scale, Shape


@dataclass(frozen=True, eq=False)
class BatchNorm(Op):
    """A batch norm as read from a file, channels on the first axis; ``fold`` replaces every one of them.

    Attributes:
        gamma, beta, mean, var: shape (channels,).
        eps: added to the variance.
        rank: number of axes of its input.
    """

    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    eps: float
    rank: int

    def output_shape(self, *shapes: Shape) -> Shape:
        """The input's shape, whose first axis must be the channels."""
        sizes = {a.shape for _, a in self.arrays()}
        if not shapes[0] or sizes != {shapes[0][:1]}:
            raise ShapeError(f"BatchNorm: statistics of shapes {sorted(sizes)} do not fit {shapes[0][:1]} channels")
        return shapes[0]

    def evaluate(self, *inputs: np.ndarray) -> np.ndarray:
        """Never used: ``fold`` comes first."""
        raise UnsupportedOpError("a batch norm is folded before a network is evaluated")

    def coefficients(self, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(s, bias') in float64 for the bias of the layer before."""
        gamma, beta, mean, var = (a.astype(np.float64) for _, a in self.arrays())
        s = gamma / np.sqrt(var + np.float64(self.eps))
        return s, (bias.astype(np.float64) - mean) * s + beta


@dataclass(frozen=True)
class Folded:
    """Nodes without ``BatchNorm``, the new position of the output, and what was done, in words."""

    nodes: tuple[Node, ...]
    output: int
    notes: tuple[str, ...]


def fold(nodes: Sequence[Node], output: int, dtype: np.dtype, open_nodes: Collection[int] = ()) -> Folded:
    """Fold batch norms and constants added after products.

    Args:
        nodes: in topological order, all reaching ``output``.
        output: position of the output node.
        dtype: of the network.
        open_nodes: positions of Affine, Conv2d and Scale nodes that came without a bias: a constant added next becomes
            it (0 + c = c, so exact).
    """
    return _Folder(nodes, output, np.dtype(dtype), frozenset(open_nodes)).run()


class _Folder:
    """One pass in topological order; ``kept`` grows, ``place`` says where the value of an old node now is."""

    def __init__(self, nodes: Sequence[Node], output: int, dtype: np.dtype, open_nodes: frozenset[int]) -> None:
        self.nodes, self.output, self.dtype = nodes, output, dtype
        self.readers = Counter(i for node in nodes for i in node.inputs)
        self.readers[output] += 1
        self.kept: list[Node] = []
        self.place = {INPUT: INPUT}
        self.open_nodes = open_nodes
        self.open: set[int] = set()
        self.into: list[str] = []
        self.alone: list[str] = []

    def run(self) -> Folded:
        for position, node in enumerate(self.nodes):
            self.place[position] = self._absorbed(node)
            if self.place[position] == len(self.kept):
                self._keep(position, node)
        return Folded(tuple(self.kept), self.place[self.output], self._notes())

    def _keep(self, position: int, node: Node) -> None:
        op = self._scale_of(node) if isinstance(node.op, BatchNorm) else node.op
        if position in self.open_nodes:
            self.open.add(len(self.kept))
        self.kept.append(Node(node.name, op, tuple(self.place[i] for i in node.inputs)))

    def _absorbed(self, node: Node) -> int:
        """Position of the kept node that took ``node`` in, or the next free position."""
        source = node.inputs[0]
        if source != INPUT and self.readers[source] == 1:
            if isinstance(node.op, BatchNorm) and self._fold_norm(node, source):
                return self.place[source]
            if isinstance(node.op, Scale) and _pure_shift(node.op) and self._fold_shift(node.op, source):
                return self.place[source]
        return len(self.kept)

    def _fold_norm(self, node: Node, source: int) -> bool:
        norm, at = node.op, self._producer(source)
        before = self.kept[at] if at != INPUT else None
        assert isinstance(norm, BatchNorm)
        if before is None or not isinstance(before.op, Affine | Conv2d) or before.op.bias.shape != norm.mean.shape:
            return False
        _check_norm(node.name, norm)
        s, bias = norm.coefficients(before.op.bias)
        weight = before.op.weight.astype(np.float64) * s.reshape(-1, *[1] * (before.op.weight.ndim - 1))
        self.into.append(f"'{node.name}' into '{before.name}'")
        return self._swap(at, replace(before.op, weight=self._rounded(weight), bias=self._rounded(bias)))

    def _fold_shift(self, op: Scale, source: int) -> bool:
        at = self._producer(source)
        if at not in self.open:
            return False
        before = self.kept[at].op
        if isinstance(before, Scale):
            return self.place[source] == at and self._swap(at, replace(before, shift=op.shift))
        layout = self.nodes[source].op
        bias = _as_bias(op.shift, before, layout.shape if isinstance(layout, Reshape) else None)
        return bias is not None and self._swap(at, replace(before, bias=bias))  # type: ignore[type-var]

    def _producer(self, source: int) -> int:
        """Kept position of the node at ``source``, seen through one reshape that nobody else reads."""
        inner = self.nodes[source].inputs[0]
        if isinstance(self.nodes[source].op, Reshape) and inner != INPUT and self.readers[inner] == 1:
            return self.place[inner]
        return self.place[source]

    def _swap(self, at: int, op: Op) -> bool:
        self.kept[at] = replace(self.kept[at], op=op)
        self.open.discard(at)
        return True

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return array.astype(self.dtype)

    def _scale_of(self, node: Node) -> Scale:
        assert isinstance(node.op, BatchNorm)
        _check_norm(node.name, node.op)
        shape = (-1, *[1] * (node.op.rank - 1))
        s, shift = node.op.coefficients(np.zeros_like(node.op.mean))
        self.alone.append(f"'{node.name}'")
        return Scale(self._rounded(s).reshape(shape), self._rounded(shift).reshape(shape))

    def _notes(self) -> tuple[str, ...]:
        words = (
            ("batch norm folded in float64, then rounded to the network's dtype: ", self.into),
            (
                "batch norm turned into a per-channel scale in float64, then rounded to the network's dtype: ",
                self.alone,
            ),
        )
        return tuple(start + ", ".join(found) for start, found in words if found)


def _pure_shift(op: Scale) -> bool:
    return op.scale.ndim == 0 and bool(op.scale == 1)


def _as_bias(shift: np.ndarray, op: Op, layout: Shape | None) -> np.ndarray | None:
    """``shift`` as the bias of ``op`` whose output is laid out as ``layout``, or None where it is not one."""
    if isinstance(op, Conv2d):
        channels = op.bias.shape[0]
        per_channel = layout is None and shift.shape == (channels, 1, 1)
        return shift.reshape(channels) if per_channel else None
    assert isinstance(op, Affine)
    shape = layout or op.bias.shape
    return np.broadcast_to(shift, shape).reshape(-1) if np.broadcast_shapes(shift.shape, shape) == shape else None


def _check_norm(name: str, norm: BatchNorm) -> None:
    for field, array in norm.arrays():
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise WeightError(
                f"node '{name}' (batch norm): {bad} of {array.size} values of {field} are NaN or infinite; "
                "repair or retrain the model"
            )
    if not (np.isfinite(norm.eps) and np.all(norm.var.astype(np.float64) + norm.eps > 0)):
        raise WeightError(
            f"node '{name}' (batch norm): var + eps is not positive everywhere; repair or retrain the model"
        )
