"""Sound bounds on every tensor of a network over the domain, the verdicts' bounds included.

Interval arithmetic node by node (``bounds.interval``, sound in float64); the pre-activation of a ReLU layer is
intersected with the sound bounds of its verdict, so everything after it profits from what CROWN and its kin found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exactprune.claim import LayerVerdict
from exactprune.domain import Box
from exactprune.network import INPUT, Network

Interval = tuple[np.ndarray, np.ndarray]


def enclosures(network: Network, domain: Box, verdicts: Sequence[LayerVerdict]) -> Mapping[int, Interval]:
    """Lower and upper bounds, float64 in the tensor's shape, for every position (``INPUT`` too)."""
    import torch

    from exactprune.bounds.interval import NodeBounds, input_bounds, interval_node
    from exactprune.bounds.program import compile_network

    program = compile_network(network)
    known = {INPUT: input_bounds(*program.box(domain))}
    layers = {network.nodes[relu].inputs[0]: verdict for relu, verdict in zip(network.relus, verdicts, strict=True)}
    for position in range(len(network.nodes)):
        found = interval_node(program, position, known)
        if position in layers:
            lower, upper = (torch.tensor(np.array(a))[None] for a in (layers[position].lower, layers[position].upper))
            found = NodeBounds(torch.maximum(found.lower, lower), torch.minimum(found.upper, upper), found.error)
        known[position] = found
    return {p: _arrays(network, p, b.lower, b.upper) for p, b in known.items()}


def _arrays(network: Network, position: int, lower: Any, upper: Any) -> Interval:
    """Torch tensors (1, size) as arrays in the tensor's shape."""
    shape = network.shape_of(position)
    return lower[0].numpy().reshape(shape), upper[0].numpy().reshape(shape)
