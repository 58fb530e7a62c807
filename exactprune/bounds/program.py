"""A network made ready for bound propagation: float64 torch maps on one device, and the error constant that goes with them.

Every stored float32 or float64 is exact in float64, so the only errors are those of evaluating sums of products. With
u = 2^-53 and n terms in any order, a computed dot product is within gamma_n |a|.|b| of the exact one, gamma_n = n u / (1 - n u)
(Higham 2002, section 3.1). One constant ``gamma`` covers all sums of a network: n is the largest reduction plus a margin
for the handful of additions and products around it, times four for the two-sided uses in ``crown``.

Underflow is absolute, not relative: a product may be off by 2^-1074 more. Values beyond ``LARGE`` count as infinite, so
what such errors in coefficients can move a linear form by, at most 2^-1074 n LARGE a node, stays below ``FLOOR``, which
every backward bound adds once. ``TINY`` pays for it where an error term itself underflows before a large coefficient
multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from exactprune.bounds.linear_maps import LinearMap, linear_map
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Add, MaxPool2d, ReLU

UNIT_ROUNDOFF = 2.0**-53
TINY = 2.0**-960
LARGE = 2.0**400
FLOOR = 2.0**-560
_KEPT = 31 << 17  # doubles in 31 MB: once a block of this size was freed, glibc keeps smaller ones instead of unmapping them


@dataclass(frozen=True, eq=False)
class Program:
    """Maps and constants of one network on one device.

    Attributes:
        network: what it was made from.
        device: where the tensors are.
        maps: per node, its linear map (None for ReLU, Add, MaxPool2d).
        sizes: per node, the length of its flat output; the last entry is the input's (``INPUT`` is -1).
        gamma: relative error that covers every sum of products of the network.
        fields: receptive fields met so far (see ``fields``); they depend on nothing but the network.
        inside: in a cut program, (node, input) -> where the places that the node reads are among those held of its input,
            if it reads some of them only.
    """

    network: Network
    device: torch.device
    maps: tuple[LinearMap | None, ...]
    sizes: tuple[int, ...]
    gamma: float
    fields: dict[tuple, Any] = field(default_factory=dict, repr=False)
    inside: Mapping[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def size(self, position: int) -> int:
        """Flat length of the output of the node at ``position`` (``INPUT`` allowed)."""
        return self.sizes[position]

    def preactivation(self, layer: int) -> int:
        """Position of the node that ReLU layer ``layer`` reads."""
        return self.network.nodes[self.network.relus[layer]].inputs[0]

    @cached_property
    def layer_of(self) -> Mapping[int, int]:
        """Position of a ReLU -> number of its layer."""
        return {position: k for k, position in enumerate(self.network.relus)}

    @property
    def layers(self) -> int:
        """Number of ReLU layers."""
        return len(self.network.relus)

    def box(self, domain: Box) -> tuple[Tensor, Tensor]:
        """(lower, upper) of ``domain``, each of shape (1, inputs)."""
        lower = torch.tensor(domain.lower, device=self.device).reshape(1, -1)
        return lower, torch.tensor(domain.upper, device=self.device).reshape(1, -1)


def compile_network(network: Network, device: str | torch.device = "cpu") -> Program:
    """Copy the network's arrays to ``device`` as float64 and precompute what bound propagation needs."""
    device = torch.device(device)
    torch.empty(_KEPT, dtype=torch.float64)  # and freed, untouched
    maps = tuple(linear_map(node.op, network.shape_of(node.inputs[0]), device) for node in network.nodes)
    sizes = tuple(prod(shape) for shape in (*network.shapes, network.input_shape))
    overlaps = [node.op.kernel[0] * node.op.kernel[1] for node in network.nodes if isinstance(node.op, MaxPool2d)]
    terms = max([m.terms for m in maps if m is not None] + overlaps + list(sizes), default=1)
    n = terms + 4 * len(network.nodes) + 32
    gamma = 4 * n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)
    assert all(m is not None or isinstance(node.op, ReLU | Add | MaxPool2d) for m, node in zip(maps, network.nodes))
    return Program(network, device, maps, sizes, gamma)
