"""Where a layer can be rewritten as a block: the mixers that feed it and the mixers that read it.

A layer is a ReLU, or a tensor that mixers read with no ReLU before (``linear_hubs``). It qualifies when it is fed by one
Affine or ungrouped Conv2d, or by a sum of such mixers (a residual block with a projection shortcut), none of which
anything else reads, and every path from it leads through operators that treat all channels alike and linearly (Reshape to
a flat vector, Transpose, average pools, zero padding) to an Affine or an ungrouped Conv2d. Then channels may be replaced by
other channels, as many as one likes, and the mixers on both sides follow. A sum of mixers is one mixer of what they
read, side by side: W_1 x_1 + W_2 x_2 = [W_1 | W_2] (x_1, x_2).

Where zeros are padded in on the way, a constant cannot go into a bias: it needs a channel of its own
(``Surroundings.padded``). Max pools are let through only for rewrites that multiply channels by positive numbers: the
maximum commutes with nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from exactprune.compress.block import Block, Units
from exactprune.compress.deviation import UNIT, inflated
from exactprune.compress.enclosure import Interval
from exactprune.compress.exact import exact_sum
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Shape, Transpose


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
    """A layer with what feeds and reads it.

    Attributes:
        hub: position of the tensor that is read: a ReLU, or the sum of the feeders where there is none.
        feeders: the mixers whose sum enters it, in order.
        between: positions of the operators between the hub and its readers, in order.
        readers: the mixers that read it.
        padded: zeros are padded in before or in some reader.
    """

    hub: int
    feeders: tuple[int, ...]
    between: tuple[int, ...]
    readers: tuple[Reader, ...]
    padded: bool


def surroundings(network: Network, hub: int, *, homogeneous: bool = False) -> Surroundings | None:
    """The layer's surroundings, or None where it does not qualify.

    Args:
        network: the network.
        hub: position of a ReLU, or of a mixer or sum that is to be taken as a layer without one.
        homogeneous: channels will only be multiplied by positive numbers, so max pools do no harm.
    """
    node = network.nodes[hub]
    feeders = summands(network, node.inputs[0], hub) if isinstance(node.op, ReLU) else summands(network, hub, None)
    found = _readers(network, hub, homogeneous) if feeders and hub != network.output else None
    if found is None:
        return None
    readers, between = found
    padded = any(_pads(network.nodes[p].op) for p in (*between, *(r.position for r in readers)))
    return Surroundings(hub, feeders, between, readers, padded)


def linear_hubs(network: Network) -> list[int]:
    """Positions of mixers and of sums of mixers that only mixers read, with no ReLU between."""
    return [position for position, node in enumerate(network.nodes) if _mixes(node.op) or isinstance(node.op, Add)
            if surroundings(network, position) is not None]


def sources(network: Network, where: Surroundings) -> list[int]:
    """Positions of the tensors that the feeders read."""
    return [network.nodes[f].inputs[0] for f in where.feeders]


def summands(network: Network, top: int, reader: int | None) -> tuple[int, ...]:
    """The mixers that a tensor is the sum of, read by nothing but ``reader`` on the way; none where that is not so.

    Args:
        network: the network.
        top: position of the tensor.
        reader: position of the node it is for; None where anything may read the tensor itself.
    """
    if top == INPUT or (reader is not None and network.readers[top] != (reader,)):
        return ()
    node = network.nodes[top]
    if _mixes(node.op):
        return (top,)
    parts = [summands(network, i, top) for i in node.inputs] if isinstance(node.op, Add) else []
    return tuple(sorted(p for part in parts for p in part)) if parts and all(parts) else ()


def _readers(network: Network, hub: int, homogeneous: bool) -> tuple[tuple[Reader, ...], tuple[int, ...]] | None:
    """The mixers that read a tensor, and the operators on the way; None where something else does."""
    labels = {hub: _channels(network.shapes[hub])}
    readers, between = [], []
    for position in range(hub + 1, len(network.nodes)):
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
    fits = readers and all(len(set(np.bincount(r.channel))) == 1 for r in readers)
    return (tuple(readers), tuple(between)) if fits else None


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


def make_block(network: Network, where: Surroundings, channels: np.ndarray, at: Sequence[Interval], gain: np.ndarray | None,
               linear: bool, lines: tuple[np.ndarray, np.ndarray] | None = None) -> Block:
    """The block of some channels of a layer.

    Args:
        network: the network.
        where: the layer.
        channels: which channels are linear on the domain.
        at: enclosures of the tensors that the feeders read, one a feeder.
        gain: weight of each output of the readers, all readers in one; ones by default.
        linear: whether no ReLU stays (all channels are linear).
        lines: (slope, shift) per channel: each is taken as slope * z + shift, rounded to float64; z by default.
    """
    biases = [mixer(network, r.position).bias for r in where.readers]
    bounds = [_window_bounds(mixer(network, f), interval) for f, interval in zip(where.feeders, at, strict=True)]
    lower, upper = (np.concatenate(ends) for ends in zip(*bounds, strict=True))
    w_out = all_rows(network, where)[:, channels]
    w_in, b_in = incoming(network, where)[channels], constants(network, where)[0][channels]
    if lines is not None:
        slope, shift = lines
        w_in, b_in = w_in.astype(np.float64) * slope[:, None], b_in.astype(np.float64) * slope + shift
    return Block(w_in, b_in, w_out,
                 np.concatenate(owners(network, where)), np.concatenate(biases), lower, upper,
                 np.ones(sum(map(len, biases))) if gain is None else gain, network.dtype, linear, where.padded)


def incoming(network: Network, where: Surroundings) -> np.ndarray:
    """The feeders' weights side by side, one row a channel: (channels, n)."""
    parts = [mixer(network, f) for f in where.feeders]
    return np.concatenate([op.weight.reshape(len(op.bias), -1) for op in parts], axis=1)


def constants(network: Network, where: Surroundings) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the feeders' biases (channels,), and a bound on what rounding it to float64 changes: 0 where it does not."""
    total, *rest = (mixer(network, f).bias for f in where.feeders)
    error = np.zeros(len(total))
    for bias in rest:
        total, exact = exact_sum(total.astype(np.float64), bias.astype(np.float64))
        error = error + np.where(exact, 0.0, inflated(UNIT * np.abs(total), 2))
    return total, inflated(error, len(rest))


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
    found: dict[int, Op] = {}
    for feeder, v in zip(where.feeders, columns_of(network, where, new.v), strict=True):
        op = mixer(network, feeder)
        bias = np.concatenate([op.bias[kept], np.zeros_like(new.c) if found else new.c])
        found[feeder] = replace(op, weight=np.concatenate([op.weight[kept], v]), bias=bias)
    labels = _moved_labels(network, where, len(kept) + len(new.v), found)
    start, old = 0, all_rows(network, where)[:, kept] if w_out is None else w_out
    for reader, rows in zip(where.readers, _split(network, where, np.concatenate([old, new.u], axis=1)), strict=True):
        op, source = network.nodes[reader.position].op, network.nodes[reader.position].inputs[0]
        assert isinstance(op, Affine | Conv2d)
        bias = new.d[start:start + len(op.bias)]
        found[reader.position] = replace(op, weight=_as_weight(op, rows, labels[source]), bias=bias)
        start += len(op.bias)
    return found


def columns_of(network: Network, where: Surroundings, v: np.ndarray) -> list[np.ndarray]:
    """Rows (r, n) over everything that the feeders read, as weights of each feeder."""
    shapes = [mixer(network, f).weight.shape[1:] for f in where.feeders]
    parts = np.split(v, np.cumsum([prod(shape) for shape in shapes])[:-1], axis=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def _moved_labels(network: Network, where: Surroundings, count: int, found: dict[int, Op]) -> dict[int, np.ndarray]:
    """Channel of every element of the tensors after the layer, once it has ``count`` channels; reshapes are adapted."""
    labels = {where.hub: _channels((count, *network.shapes[where.hub][1:]))}
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
