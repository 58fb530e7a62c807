"""Where a ReLU layer can be rewritten as a block: the mixer that feeds it and the mixers that read it.

A layer qualifies when one Affine or ungrouped Conv2d feeds it and nothing else, and every path from it leads through
operators that treat channels alike and keep constants (Reshape to a flat vector, Transpose, an average pool that adds
no zeros) to an Affine or an ungrouped Conv2d without padding. Then channels may be replaced by other channels, as many
as one likes, and the readers' weights follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exactprune.compress.block import Block, Units
from exactprune.compress.enclosure import Interval
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Affine, AvgPool2d, Conv2d, Op, Reshape, Shape, Transpose


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
    """

    relu: int
    feeder: int
    between: tuple[int, ...]
    readers: tuple[Reader, ...]


def surroundings(network: Network, relu: int) -> Surroundings | None:
    """The layer's surroundings, or None where it does not qualify."""
    feeder = network.nodes[relu].inputs[0]
    if feeder == INPUT or relu == network.output or network.readers[feeder] != (relu,):
        return None
    if not _plain(network.nodes[feeder].op, padded=True):
        return None
    labels = {relu: _channels(network.shapes[relu])}
    readers, between = [], []
    for position in range(relu + 1, len(network.nodes)):
        node = network.nodes[position]
        found = [labels[i] for i in node.inputs if i in labels]
        if not found:
            continue
        if isinstance(node.op, Affine | Conv2d) and _plain(node.op, padded=False):
            readers.append(Reader(position, found[0] if isinstance(node.op, Affine) else found[0][:, 0, 0]))
        elif _transparent(node.op) and position != network.output:
            labels[position] = node.op.evaluate(found[0][None])[0]
            between.append(position)
        else:
            return None
    fits = all(len(set(np.bincount(r.channel.astype(int)))) == 1 for r in readers)
    return Surroundings(relu, feeder, tuple(between), tuple(readers)) if readers and fits else None


def _plain(op: Op, *, padded: bool) -> bool:
    return isinstance(op, Affine) or (isinstance(op, Conv2d) and op.groups == 1 and (padded or not any(op.padding)))


def _transparent(op: Op) -> bool:
    if isinstance(op, AvgPool2d):
        return not any(op.padding)
    return isinstance(op, Transpose) or (isinstance(op, Reshape) and len(op.shape) == 1)


def _channels(shape: Shape) -> np.ndarray:
    index = np.arange(shape[0], dtype=np.float64).reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(index, shape)


def make_block(network: Network, where: Surroundings, channels: np.ndarray, at: Interval, gain: np.ndarray | None,
               linear: bool) -> Block:
    """The block of some channels of a layer.

    Args:
        network: the network.
        where: the layer.
        channels: which channels are linear on the domain.
        at: enclosure of the tensor that the feeder reads.
        gain: weight of each output of the readers, all readers in one; ones by default.
        linear: whether the ReLU goes (all channels are linear).
    """
    feeder = network.nodes[where.feeder].op
    assert isinstance(feeder, Affine | Conv2d)
    rows, owners, biases, start = [], [], [], 0
    for reader in where.readers:
        op = network.nodes[reader.position].op
        assert isinstance(op, Affine | Conv2d)
        by_channel = _by_channel(op, reader.channel)
        rows.append(by_channel.reshape(-1, by_channel.shape[-1]))
        owners.append(start + np.repeat(np.arange(len(op.bias)), by_channel.shape[1]))
        biases.append(op.bias)
        start += len(op.bias)
    lower, upper = _window_bounds(feeder, at)
    w_out = np.concatenate(rows)[:, channels]
    return Block(feeder.weight.reshape(len(feeder.bias), -1)[channels], feeder.bias[channels], w_out,
                 np.concatenate(owners), np.concatenate(biases), lower, upper,
                 np.ones(start) if gain is None else gain, network.dtype, linear)


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


def rewritten(network: Network, where: Surroundings, kept: np.ndarray, new: Units) -> dict[int, Op]:
    """New operators, by position: the kept channels first, then the new units.

    Args:
        network: the network.
        where: the layer.
        kept: channels that stay as they are.
        new: the units that replace all other channels.
    """
    feeder = network.nodes[where.feeder].op
    assert isinstance(feeder, Affine | Conv2d)
    weight = np.concatenate([feeder.weight[kept], new.v.reshape(-1, *feeder.weight.shape[1:])])
    bias = np.concatenate([feeder.bias[kept], new.c])
    found: dict[int, Op] = {where.feeder: replace(feeder, weight=weight, bias=bias)}
    labels = _moved_labels(network, where, len(weight), found)
    for reader, (rows, bias) in zip(where.readers, _split(network, where, new), strict=True):
        op, source = network.nodes[reader.position].op, network.nodes[reader.position].inputs[0]
        assert isinstance(op, Affine | Conv2d)
        by_channel = np.concatenate([_by_channel(op, reader.channel)[:, :, kept], rows], axis=2)
        found[reader.position] = replace(op, weight=_as_weight(op, by_channel, labels[source]), bias=bias)
    return found


def _moved_labels(network: Network, where: Surroundings, count: int, found: dict[int, Op]) -> dict[int, np.ndarray]:
    """Channel of every element of the tensors after the layer, once it has ``count`` channels; reshapes are adapted."""
    labels = {where.relu: _channels((count, *network.shapes[where.relu][1:]))}
    for position in where.between:
        op, given = network.nodes[position].op, labels[network.nodes[position].inputs[0]]
        if isinstance(op, Reshape):
            op = found[position] = Reshape((given.size,))
        labels[position] = op.evaluate(given[None])[0]
    return labels


def _split(network: Network, where: Surroundings, new: Units) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each reader: the new units' weights as (outputs, taps, units), and the new bias."""
    row = start = 0
    for reader in where.readers:
        op = network.nodes[reader.position].op
        assert isinstance(op, Affine | Conv2d)
        outputs, taps = _by_channel(op, reader.channel).shape[:2]
        yield new.u[row:row + outputs * taps].reshape(outputs, taps, -1), new.d[start:start + outputs]
        row, start = row + outputs * taps, start + outputs


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
