"""Units: the slices of every tensor that can leave a network, and which of them can only leave together.

A *unit* of a tensor is one index along one axis: a neuron of a flat tensor, a channel of a (channels, height, width)
tensor. Operators couple units: element by element (ReLU, Scale), two branches with each other (a residual Add), a
channel with the block of features it becomes when flattened, the channels of one group of a grouped convolution.
Coupled units form a *group*: a connected component of a graph whose edges are the couplings. A group leaves as a whole
or stays as a whole, so every tensor keeps a consistent, smaller shape.

Group 0 is pinned: the network's input, its output, and every tensor whose elements do not fall into slices along one
axis. Affine and Conv2d (groups = 1) do not couple their input to their output: they *mix*. Everything else carries
units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import networkx
import numpy as np

from exactprune.network import INPUT, Network
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, Reshape, Shape, Transpose

PINNED = 0


@dataclass(frozen=True, eq=False)
class Units:
    """Units and groups of a network.

    Attributes:
        axis: position of a tensor (``INPUT`` too) -> the axis along which its units are counted.
        group: position -> int array, the group of each unit.
        count: number of groups; group ``PINNED`` never leaves.
    """

    axis: Mapping[int, int]
    group: Mapping[int, np.ndarray]
    count: int

    def kept(self, position: int, removed: np.ndarray) -> np.ndarray:
        """Indices of the units of a tensor that stay, given booleans of shape (count,)."""
        return np.flatnonzero(~removed[self.group[position]])

    def along_first(self, position: int, count: int) -> np.ndarray:
        """Group of each index of the first axis (``count`` of them), as Affine and Conv2d read a tensor.

        Where units lie along another axis, reading by channels has coupled them into one group.
        """
        group = self.group[position]
        return group if self.axis[position] == 0 else np.full(count, group[0])


@dataclass(frozen=True, eq=False)
class _Labels:
    """Element-wise labels of one tensor and the axis along which they vary."""

    array: np.ndarray
    axis: int


def units_of(network: Network) -> Units:
    """Units and coupling groups of a network, linear in its tensors' sizes."""
    graph = networkx.Graph()
    graph.add_node(PINNED)
    labels = {INPUT: _Labels(np.zeros(network.input_shape, np.int64), 0)}
    for position, node in enumerate(network.nodes):
        given = [labels[i] for i in node.inputs]
        labels[position] = _carry(graph, node.op, given, network.shapes[position])
    _couple(graph, labels[network.output].array.ravel(), np.zeros(1, np.int64))
    number = _numbered(graph)
    groups = {p: number[_along(found)] for p, found in labels.items()}
    return Units({p: found.axis for p, found in labels.items()}, groups, int(number.max()) + 1)


def _numbered(graph: networkx.Graph) -> np.ndarray:
    """Label -> group number, the pinned component first."""
    number = np.zeros(graph.number_of_nodes(), np.int64)
    pinned = networkx.node_connected_component(graph, PINNED)
    rest = (c for c in networkx.connected_components(graph) if PINNED not in c)
    for index, component in enumerate([pinned, *sorted(rest, key=min)]):
        number[list(component)] = index
    return number


def _along(labels: _Labels) -> np.ndarray:
    """The label of each unit: the first element of each slice."""
    return np.moveaxis(labels.array, labels.axis, 0).reshape(labels.array.shape[labels.axis], -1)[:, 0]


def _fresh(graph: networkx.Graph, count: int) -> np.ndarray:
    start = graph.number_of_nodes()
    new = np.arange(start, start + count)
    graph.add_nodes_from(new.tolist())
    return new


def _couple(graph: networkx.Graph, a: np.ndarray, b: np.ndarray) -> None:
    pairs = np.stack(np.broadcast_arrays(a, b), axis=-1).reshape(-1, 2)
    graph.add_edges_from((int(x), int(y)) for x, y in np.unique(pairs, axis=0) if x != y)


def _spread(vector: np.ndarray, axis: int, shape: Shape) -> np.ndarray:
    """A label per index of ``axis``, broadcast over the whole tensor."""
    view = vector.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(view, shape)


def _sliced(graph: networkx.Graph, array: np.ndarray, axis: int) -> np.ndarray:
    """Couple every slice along ``axis`` in itself; the label of each slice."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    if (rows != rows[:, :1]).any():
        _couple(graph, rows, rows[:, :1])
    return rows[:, 0]


def _varying(array: np.ndarray) -> list[int]:
    """Axes along which labels differ."""
    return [i for i in range(array.ndim) if (array != np.take(array, [0], axis=i)).any()]


def _settled(graph: networkx.Graph, array: np.ndarray) -> _Labels:
    """Labels after a change of layout: slices along the one axis that varies, else the first of three, else pinned."""
    varying = _varying(array)
    if not array.ndim:
        _couple(graph, array.ravel(), np.zeros(1, np.int64))
        return _Labels(array, 0)
    if len(varying) <= 1:
        return _Labels(array, varying[0] if varying else 0)
    if array.ndim == 3:
        return _Labels(_spread(_sliced(graph, array, 0), 0, array.shape), 0)
    _couple(graph, array.ravel(), np.zeros(1, np.int64))
    return _Labels(np.zeros(array.shape, np.int64), 0)


def _carry(graph: networkx.Graph, op: Op, given: list[_Labels], shape: Shape) -> _Labels:
    first = given[0]
    if isinstance(op, Affine):
        return _Labels(_fresh(graph, shape[0]), 0)
    if isinstance(op, Conv2d):
        return _convolved(graph, op, first, shape)
    if isinstance(op, MaxPool2d | AvgPool2d):
        return _Labels(_spread(_channels(graph, first), 0, shape), 0)
    if isinstance(op, Add):
        _couple(graph, first.array, given[1].array)
        return _settled(graph, first.array if _varying(first.array) else given[1].array)
    if isinstance(op, Reshape):
        return _settled(graph, first.array.reshape(shape))
    if isinstance(op, Transpose):
        return _Labels(first.array.transpose(op.permutation), op.permutation.index(first.axis))
    if isinstance(op, Pad):
        return _padded(graph, op, first, shape)
    return first


def _channels(graph: networkx.Graph, labels: _Labels) -> np.ndarray:
    """Labels of the channels (axis 0), each coupled within."""
    return _sliced(graph, labels.array, 0)


def _convolved(graph: networkx.Graph, op: Conv2d, labels: _Labels, shape: Shape) -> _Labels:
    channels, new = _channels(graph, labels), _fresh(graph, shape[0])
    if op.groups > 1:
        rows = np.concatenate([channels.reshape(op.groups, -1), new.reshape(op.groups, -1)], axis=1)
        _couple(graph, rows, rows[:, :1])
    return _Labels(_spread(new, 0, shape), 0)


def _padded(graph: networkx.Graph, op: Pad, labels: _Labels, shape: Shape) -> _Labels:
    """New slices along the units' axis are units of their own (pinned unless they are zeros); other axes just grow."""
    before, after = op.pads[labels.axis]
    vector = _along(labels)
    new = _fresh(graph, before + after)
    if op.value != 0:
        _couple(graph, new, np.zeros(1, np.int64))
    vector = np.concatenate([new[:before], vector, new[before:]])
    return replace(labels, array=_spread(vector, labels.axis, shape))
