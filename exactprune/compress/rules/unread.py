"""Rule ``unread``: what no live unit reads goes, by mark and sweep over the coupling groups.

A mixer (Affine, Conv2d) reads unit j of its input for output unit i when some weight from j to i is not 0. A group is
live when it holds the output, or when a live output unit of a mixer reads one of its units that is not *free* (0 on D,
or a constant that went into the mixer's bias). The least such set is found by following reads back from the output;
what is not reached can be left out, all at once and with all its consequences: neurons read only by removed neurons,
zero columns, cycles of residual channels that feed only each other.

Level: ``exact``. Every product left out has a factor that is 0 on D (or is accounted for in a bias), or ends in a unit
that is itself left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exactprune.compress.units import PINNED, Units
from exactprune.network import Network
from exactprune.ops import Affine, Conv2d, Pad


@dataclass(frozen=True, eq=False)
class Mixer:
    """An operator that mixes units.

    Attributes:
        position: of the node; ``source``: of the tensor it reads.
        reads: booleans (output units, input units): some weight is not 0.
    """

    position: int
    source: int
    reads: np.ndarray

    def outputs(self, units: Units) -> np.ndarray:
        """Group of each output unit."""
        return units.group[self.position]

    def inputs(self, units: Units) -> np.ndarray:
        """Group of each input unit."""
        return units.along_first(self.source, self.reads.shape[1])


def mixers_of(network: Network) -> tuple[Mixer, ...]:
    """Every Affine and Conv2d with the units it reads."""
    return tuple(Mixer(p, node.inputs[0], reads_of(node.op)) for p, node in enumerate(network.nodes)
                 if isinstance(node.op, Affine | Conv2d))


def reads_of(op: Affine | Conv2d) -> np.ndarray:
    """Booleans (output units, input units): which output reads which input."""
    if isinstance(op, Affine):
        return op.weight != 0
    inner = (op.weight != 0).any(axis=(2, 3))
    out, per_group = inner.shape
    reads = np.zeros((out, per_group * op.groups), bool)
    for g in range(op.groups):
        rows = slice(g * out // op.groups, (g + 1) * out // op.groups)
        reads[rows, g * per_group:(g + 1) * per_group] = inner[rows]
    return reads


def live_groups(network: Network, units: Units, mixers: tuple[Mixer, ...],
                free: Mapping[int, np.ndarray]) -> np.ndarray:
    """Booleans of shape (groups,): what has to stay.

    Args:
        network: the network.
        units: its units.
        mixers: its mixers.
        free: position of a mixer -> booleans over its input units: reading it needs nothing.
    """
    live = np.zeros(units.count, bool)
    live[PINNED] = True
    count = 0
    while count != live.sum():
        count = live.sum()
        for mixer in reversed(mixers):
            needed = mixer.reads[live[mixer.outputs(units)]].any(axis=0) & ~free[mixer.position]
            live[mixer.inputs(units)[needed]] = True
        _keep_pad_inputs(network, units, live)
    return live


def _keep_pad_inputs(network: Network, units: Units, live: np.ndarray) -> None:
    """A live Pad keeps at least one unit of what it pads: its result must have a tensor to grow from."""
    for position, node in enumerate(network.nodes):
        if isinstance(node.op, Pad) and live[units.group[position]].any():
            inner = units.group[node.inputs[0]]
            if not live[inner].any():
                live[inner[0]] = True
