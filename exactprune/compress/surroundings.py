"""Where a ReLU layer can be rewritten as a block: the mixer that feeds it and the mixers that read it.

A layer qualifies when one Affine or ungrouped Conv2d feeds it and nothing else, and every path from it leads through
operators that treat all channels alike and linearly (Reshape to a flat vector, Transpose, average pools, zero padding)
to an Affine or an ungrouped Conv2d. Then channels may be replaced by other channels, as many as one likes, and the
readers' weights follow. Where zeros are padded in on the way, a constant cannot go into a bias: it needs a channel of
its own (``Surroundings.padded``). Max pools are let through only for rewrites that multiply channels by positive
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exactprune.compress.block import Block, Units
from exactprune.compress.enclosure import Interval
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, Reshape, Shape, Transpose


@dataclass(frozen=True, eq=False)
class Reader:
    """A mixer behind a layer.

    Attributes:
        position: of the node.
        channel: for each input unit of the mixer (feature or channel), the channel of the layer that it comes from.
    """

    position: int
    channel: np.ndarray


@dataclass(frozen=True, eq=False)
class Surroundings:
    """A ReLU layer with what feeds and reads it.

    Attributes:
        relu: position of the ReLU; feeder: of the mixer before it.
        between: positions of the operators between the ReLU and its readers, in order.
        readers: the mixers that read it.
        padded: zeros are padded in before or in some reader.
    """

    relu: int
    feeder: int
    between: tuple[int, ...]
    readers: tuple[Reader, ...]
    padded: bool


def surroundings(network: Network, relu: int, *, homogeneous: bool = False) -> Surroundings | None:
    """The layer's surroundings, or None where it does not qualify.

    Args:
        network: the network.
        relu: position of the layer.
        homogeneous: channels will only be multiplied by positive numbers, so max pools do no harm.
    """
    feeder = network.nodes[relu].inputs[0]
    if feeder == INPUT or relu == network.output or network.readers[feeder] != (relu,):
        return None
    labels = {relu: _channels(network.shapes[relu])}
    readers, between = [], []
    for position in range(relu + 1, len(network.nodes)):
        node = network.nodes[position]
        found = [labels[i] for i in node.inputs if i in labels]
        if not found:
            continue
        label = _relabelled(node.op, found[0], homogeneous) if position != network.output or _mixes(node.op) else None
        if label is None:
            return None
        if _mixes(node.op):
            readers.append(Reader(position, label))
        else:
            labels[position] = label
            between.append(position)
    fits = _mixes(network.nodes[feeder].op) and all(len(set(np.bincount(r.channel))) == 1 for r in readers)
    padded = any(_pads(network.nodes[p].op) for p in (*between, *(r.position for r in readers)))
    return Surroundings(relu, feeder, tuple(between), tuple(readers), padded) if readers and fits else None


def _mixes(op: Op) -> bool:
    return isinstance(op, Affine) or (isinstance(op, Conv2d) and op.groups == 1)


def _pads(op: Op) -> bool:
    return isinstance(op, Pad) or (isinstance(op, Conv2d | AvgPool2d | MaxPool2d) and any(op.padding))


def _channels(shape: Shape) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), shape)


def _relabelled(op: Op, labels: np.ndarray, homogeneous: bool) -> np.ndarray | None:
    """Channel of each element after an operator (of each input unit, for a mixer); None where it does not qualify."""
    if isinstance(op, Reshape) and len(op.shape) == 1:
        return labels.reshape(-1)
    if isinstance(op, Transpose):
        return labels.transpose(op.permutation)
    if isinstance(op, Affine):
        return labels
    spatial = isinstance(op, AvgPool2d | Conv2d) or (isinstance(op, MaxPool2d) and homogeneous) or (
        isinstance(op, Pad) and op.value == 0 and len(op.pads) == 3 and op.pads[0] == (0, 0))
    if not spatial or (labels != labels[:, :1, :1]).any():
        return None
    if isinstance(op, Conv2d):
        return labels[:, 0, 0] if op.groups == 1 else None
    return np.broadcast_to(labels[:, :1, :1], op.output_shape(labels.shape))


def make_block(network: Network, where: Surroundings, channels: np.ndarray, at: Interval, gain: np.ndarray | None,
               linear: bool, lines: tuple[np.ndarray, np.ndarray] | None = None) -> Block:
    """The block of some channels of a layer.

    Args:
        network: the network.
        where: the layer.
        channels: which channels are linear on the domain.
        at: enclosure of the tensor that the feeder reads.
        gain: weight of each output of the readers, all readers in one; ones by default.
        linear: whether the ReLU goes (all channels are linear).
        lines: (slope, shift) per channel: each is taken as slope * z + shift, rounded to float64; z by default.
    """
    feeder = mixer(network, where.feeder)
    biases = [mixer(network, r.position).bias for r in where.readers]
    lower, upper = _window_bounds(feeder, at)
    w_out = all_rows(network, where)[:, channels]
    w_in, b_in = feeder.weight.reshape(len(feeder.bias), -1)[channels], feeder.bias[channels]
    if lines is not None:
        slope, shift = lines
        w_in, b_in = w_in.astype(np.float64) * slope[:, None], b_in.astype(np.float64) * slope + shift
    return Block(w_in, b_in, w_out,
                 np.concatenate(owners(network, where)), np.concatenate(biases), lower, upper,
                 np.ones(sum(map(len, biases))) if gain is None else gain, network.dtype, linear, where.padded)


def mixer(network: Network, position: int) -> Affine | Conv2d:
    """The operator of a node that is known to mix."""
    op = network.nodes[position].op
    assert isinstance(op, Affine | Conv2d)
    return op


def owners(network: Network, where: Surroundings) -> list[np.ndarray]:
    """The output that each row of ``all_rows`` belongs to, counted through all readers; one array a reader."""
    found, start = [], 0
    for reader in where.readers:
        op = mixer(network, reader.position)
        found.append(start + np.repeat(np.arange(len(op.bias)), _by_channel(op, reader.channel).shape[1]))
        start += len(op.bias)
    return found


def all_rows(network: Network, where: Surroundings) -> np.ndarray:
    """The readers' weights by channel, one row per output and tap, all readers in one: (q, channels)."""
    found = []
    for reader in where.readers:
        op = mixer(network, reader.position)
        by_channel = _by_channel(op, reader.channel)
        found.append(by_channel.reshape(-1, by_channel.shape[-1]))
    return np.concatenate(found)


def _by_channel(op: Affine | Conv2d, channel: np.ndarray) -> np.ndarray:
    """Weights as (outputs, taps, channels of the layer)."""
    if isinstance(op, Conv2d):
        return op.weight.reshape(*op.weight.shape[:2], -1).transpose(0, 2, 1)
    count = int(channel.max()) + 1
    order = np.argsort(channel, kind="stable").reshape(count, -1)
    return op.weight[:, order].transpose(0, 2, 1)


def _window_bounds(feeder: Affine | Conv2d, at: Interval) -> Interval:
    """Bounds on what one output of the feeder reads: the vector, or a window at any position, padding included."""
    lower, upper = at
    if isinstance(feeder, Affine):
        return lower, upper
    low, high = lower.reshape(len(lower), -1).min(axis=1), upper.reshape(len(upper), -1).max(axis=1)
    if any(feeder.padding):
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    taps = feeder.kernel[0] * feeder.kernel[1]
    return np.repeat(low, taps), np.repeat(high, taps)


def rewritten(network: Network, where: Surroundings, kept: np.ndarray, new: Units,
              w_out: np.ndarray | None = None) -> dict[int, Op]:
    """New operators, by position: the kept channels first, then the new units.

    Args:
        network: the network.
        where: the layer.
        kept: channels that stay as they are.
        new: the units that replace all other channels.
        w_out: new weights of the readers for the kept channels, (q, kept), as in ``Block``; the old ones by default.
    """
    feeder = mixer(network, where.feeder)
    weight = np.concatenate([feeder.weight[kept], new.v.reshape(-1, *feeder.weight.shape[1:])])
    bias = np.concatenate([feeder.bias[kept], new.c])
    found: dict[int, Op] = {where.feeder: replace(feeder, weight=weight, bias=bias)}
    labels = _moved_labels(network, where, len(weight), found)
    start, old = 0, all_rows(network, where)[:, kept] if w_out is None else w_out
    for reader, rows in zip(where.readers, _split(network, where, np.concatenate([old, new.u], axis=1)), strict=True):
        op, source = network.nodes[reader.position].op, network.nodes[reader.position].inputs[0]
        assert isinstance(op, Affine | Conv2d)
        bias = new.d[start:start + len(op.bias)]
        found[reader.position] = replace(op, weight=_as_weight(op, rows, labels[source]), bias=bias)
        start += len(op.bias)
    return found


def _moved_labels(network: Network, where: Surroundings, count: int, found: dict[int, Op]) -> dict[int, np.ndarray]:
    """Channel of every element of the tensors after the layer, once it has ``count`` channels; reshapes are adapted."""
    labels = {where.relu: _channels((count, *network.shapes[where.relu][1:]))}
    for position in where.between:
        op, given = network.nodes[position].op, labels[network.nodes[position].inputs[0]]
        if isinstance(op, Reshape):
            op = found[position] = Reshape((given.size,))
        label = _relabelled(op, given, homogeneous=True)
        assert label is not None
        labels[position] = label
    return labels


def _split(network: Network, where: Surroundings, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows (q, channels) as (outputs, taps, channels) for each reader."""
    start = 0
    for reader in where.readers:
        op = mixer(network, reader.position)
        outputs, taps = _by_channel(op, reader.channel).shape[:2]
        yield rows[start:start + outputs * taps].reshape(outputs, taps, -1)
        start += outputs * taps


def _as_weight(op: Affine | Conv2d, by_channel: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(outputs, taps, channels) back in the operator's layout; ``labels`` is the channel of each of its inputs."""
    if isinstance(op, Conv2d):
        return by_channel.transpose(0, 2, 1).reshape(len(by_channel), -1, *op.kernel)
    order = np.argsort(labels, kind="stable")
    weight = np.empty((len(by_channel), labels.size), by_channel.dtype)
    weight[:, order] = by_channel.transpose(0, 2, 1).reshape(len(by_channel), -1)
    return weight


def outputs_of(network: Network, where: Surroundings, vector: np.ndarray) -> dict[int, np.ndarray]:
    """A value per output of the readers (..., m) spread over each reader's tensor: position -> (..., *shape)."""
    found, start = {}, 0
    for reader in where.readers:
        shape = network.shapes[reader.position]
        part = vector[..., start:start + shape[0]]
        found[reader.position] = np.broadcast_to(part.reshape(*part.shape, *[1] * (len(shape) - 1)),
                                                 (*part.shape[:-1], *shape))
        start += shape[0]
    return found


def replaced(nodes: Sequence[Node], ops: dict[int, Op]) -> list[Node]:
    """The nodes with some operators exchanged."""
    return [replace(node, op=ops[i]) if i in ops else node for i, node in enumerate(nodes)]
