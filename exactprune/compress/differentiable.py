"""The network as a differentiable torch function, to look for points: nothing here is rigorous or has to be."""

from __future__ import annotations

from torch import Tensor

from exactprune.bounds.interval import pool_windows
from exactprune.bounds.program import Program, compile_network
from exactprune.network import INPUT
from exactprune.ops import MaxPool2d, ReLU


def output_of(program: Program, x: Tensor) -> Tensor:
    """Flat float64 output for flat inputs of shape (batch, inputs)."""
    return values_of(program, x)[program.network.output]


def values_of(program: Program, x: Tensor) -> dict[int, Tensor]:
    """Flat float64 values of every node for flat inputs of shape (batch, inputs)."""
    values = {INPUT: x}
    for position, node in enumerate(program.network.nodes):
        given = [values[i] for i in node.inputs]
        mapping = program.maps[position]
        if mapping is not None:
            values[position] = mapping.forward(given[0]) + (0.0 if mapping.bias is None else mapping.bias)
        elif isinstance(node.op, ReLU):
            values[position] = given[0].clamp(min=0)
        elif isinstance(node.op, MaxPool2d):
            values[position] = pool_windows(program, position, given[0]).amax(dim=-1)
        else:
            values[position] = given[0] + given[1]
    return values


__all__ = ["compile_network", "output_of", "values_of"]
