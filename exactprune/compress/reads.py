"""Inputs of the network that nothing reads: reported, never removed (the interface does not change).

Each input element is followed through operators that only move elements (Reshape, Transpose) or scale them; it is read
where an Affine has a non-zero weight in its column, where a Conv2d has a non-zero weight on its channel, or where any
other operator takes it.
"""

from __future__ import annotations

from math import prod

import numpy as np

from exactprune.compress.rules.unread import reads_of
from exactprune.network import INPUT, Network
from exactprune.ops import Affine, Conv2d, Op, Reshape, Scale, Transpose


def unread_inputs(network: Network) -> tuple[int, ...]:
    """Flat indices of the inputs that nothing reads."""
    index = {INPUT: np.arange(prod(network.input_shape)).reshape(network.input_shape)}
    read = np.zeros(prod(network.input_shape), bool)
    for position, node in enumerate(network.nodes):
        for source in set(node.inputs) & set(index):
            if isinstance(node.op, Reshape | Transpose):
                index[position] = node.op.evaluate(index[source][None])[0]
            elif isinstance(node.op, Scale):
                index[position] = index[source]
            else:
                read[index[source][_taken(node.op, index[source].shape)]] = True
    if network.output in index:
        read[index[network.output]] = True
    return tuple(int(i) for i in np.flatnonzero(~read))


def _taken(op: Op, shape: tuple[int, ...]) -> np.ndarray:
    """Booleans in the shape of the operand: which elements the operator takes."""
    if isinstance(op, Affine):
        return np.asarray(reads_of(op).any(axis=0))
    if isinstance(op, Conv2d):
        return np.broadcast_to(np.asarray(reads_of(op).any(axis=0))[:, None, None], shape)
    return np.ones(shape, bool)
