"""Skip connections as 1 x 1 convolutions, where that makes the network smaller.

An addition ties the channels of its operands together: channel c leaves both branches and the sum, or none of them
(``compress.units``), and a layer whose channels are tied cannot be merged (``compress.surroundings``). Written as a mixer
with the weights 1 on the diagonal, the skip y + x = y + I x ties nothing: what is dead or linear on one side goes there, and
the mixer loses the row or the column. It costs rows x columns weights, so it is kept only where the network ends up with fewer
parameters, and no more multiply-accumulates.

Level: ``exact``; I x = x.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exactprune.claim import LayerVerdict, Status
from exactprune.compress.apply import State, finish
from exactprune.compress.surroundings import summands
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, Conv2d, Op, ReLU

Size = tuple[int, ...]


@dataclass(frozen=True)
class Skip:
    """An operand of an addition that is no mixer of its own.

    Attributes:
        add: position of the addition; operand: which of the two; source: what it reads.
    """

    add: int
    operand: int
    source: int


def skips(network: Network) -> list[Skip]:
    """Every skip connection of channels or of flat tensors."""
    return [Skip(position, operand, source) for position, node in enumerate(network.nodes) if isinstance(node.op, Add)
            for operand, source in enumerate(node.inputs)
            if len(network.shapes[position]) in (1, 3) and not summands(network, source, position)
            and not _inner(network, source, position)]


def _inner(network: Network, source: int, add: int) -> bool:
    """Whether a source is a sum that only this addition reads: its own operands are the skips then."""
    return source != INPUT and isinstance(network.nodes[source].op, Add) and network.readers[source] == (add,)


def split(state: State, chosen: Collection[int]) -> State:
    """The network with some skips, by their number in ``skips``, as mixers."""
    network, wanted = state.network, {(s.add, s.operand) for i, s in enumerate(skips(state.network)) if i in chosen}
    nodes: list[Node] = []
    place = {INPUT: INPUT}
    for position, node in enumerate(network.nodes):
        inputs = [place[i] for i in node.inputs]
        for operand in range(len(inputs)):
            if (position, operand) in wanted:
                nodes.append(Node(f"{node.name}.skip{operand}", identity(network, position), (inputs[operand],)))
                inputs[operand] = len(nodes) - 1
        nodes.append(replace(node, inputs=tuple(inputs)))
        place[position] = len(nodes) - 1
    layers = {place[relu]: k for k, relu in enumerate(network.relus)}
    everything = {k: (0, np.arange(v.shape[0])) for k, v in enumerate(state.verdicts)}
    return finish(state, nodes, place[network.output], layers, everything)


def identity(network: Network, position: int) -> Op:
    """The mixer that changes nothing, for a tensor of this shape."""
    shape = network.shapes[position]
    eye, zero = np.eye(shape[0], dtype=network.dtype), np.zeros(shape[0], network.dtype)
    return Affine(eye, zero) if len(shape) == 1 else Conv2d(eye[:, :, None, None], zero)


def promising(network: Network, verdicts: Sequence[LayerVerdict]) -> list[int]:
    """Skips, by number, with a layer of at least two stably active channels before or after them."""
    busy = {network.relus[v.layer] for v in verdicts
            if (v.status == Status.ACTIVE).reshape(v.shape[0], -1).all(axis=1).sum() > 1}
    return [i for i, s in enumerate(skips(network))
            if s.source in busy or any(r in busy for r in network.readers[s.add] if isinstance(network.nodes[r].op, ReLU))]


def worthwhile(candidates: Sequence[int], size: Callable[[Sequence[int]], Size], most: int = 100) -> list[int]:
    """A set of skips that leaves the smallest network found: all of them, less those that do not pay, or none.

    Args:
        candidates: skips by number.
        most: so many are left out one by one to see whether they pay, the first ones.
        size: of what is left of the network with some of them split: parameters first, multiply-accumulates last.
    """
    kept, best = list(candidates), size(candidates) if candidates else (0, 0, 0)
    for skip in candidates[:most]:
        fewer = [s for s in kept if s != skip]
        if (without := size(fewer)) <= best:
            kept, best = fewer, without
    none = size([])
    return kept if kept and best[0] < none[0] and best[-1] <= none[-1] else []
