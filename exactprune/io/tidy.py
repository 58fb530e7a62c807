"""Layers without neurons, made writable.

When every neuron of a layer is removed, the layer has zero outputs and the next one zero inputs. That is a sound
network, but file formats and runtimes treat empty tensors unevenly. ``without_empty`` gives each empty tensor one
neuron that is constantly 0 and is read with weight 0: the same function, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from exactprune.errors import ShapeError
from exactprune.network import Network, Node
from exactprune.ops import Affine, Conv2d, Op, Pad, Reshape, Scale, Shape


def without_empty(network: Network) -> Network:
    """``network`` itself if no tensor is empty, else the same function without empty tensors.

    Raises:
        ShapeError: an empty tensor is read in a way that has no such form (the input itself is empty, or a padding
            other than zero surrounds it).
    """
    if all(prod(shape) for shape in network.shapes):
        return network
    if not prod(network.input_shape) or not prod(network.output_shape):
        raise ShapeError(f"{network.name}: its input or output is empty; there is nothing to save")
    shapes: list[Shape] = []
    nodes: list[Node] = []
    for position, node in enumerate(network.nodes):
        given = tuple(network.input_shape if i < 0 else shapes[i] for i in node.inputs)
        touched = not prod(network.shapes[position]) or any(not prod(network.shape_of(i)) for i in node.inputs)
        op = _filled(node, network.shapes[position], given) if touched else node.op
        nodes.append(replace(node, op=op.astype(network.dtype)))
        shapes.append(op.output_shape(*given))
    return replace(network, nodes=tuple(nodes))


def _filled(node: Node, shape: Shape, given: tuple[Shape, ...]) -> Op:
    """The operator with one zero neuron wherever it had none; ``given`` are the filled input shapes."""
    op = node.op
    if isinstance(op, Affine):
        outputs = max(1, op.weight.shape[0])
        weight = op.weight if prod(op.weight.shape) else np.zeros((outputs, given[0][0]), op.weight.dtype)
        return Affine(weight, op.bias if op.bias.size else np.zeros(1, op.bias.dtype))
    if isinstance(op, Conv2d):
        weight = np.zeros((max(1, op.weight.shape[0]), given[0][0], *op.kernel), op.weight.dtype)
        return replace(op, weight=weight, bias=op.bias if op.bias.size else np.zeros(1, op.bias.dtype), groups=1)
    if isinstance(op, Scale):
        return Scale(np.zeros((), op.scale.dtype), np.zeros((), op.shift.dtype))
    if isinstance(op, Reshape):
        return Reshape(_refilled(node.name, shape, prod(given[0])))
    if isinstance(op, Pad):
        return replace(op, pads=_narrowed(node.name, op, shape, given[0]))
    return op


def _refilled(name: str, shape: Shape, size: int) -> Shape:
    rest = prod(n for n in shape if n)
    if shape.count(0) != 1 or size % rest:
        raise ShapeError(
            f"node '{name}': an empty tensor of shape {shape} cannot be saved; keep one neuron of that layer"
        )
    return tuple(n or size // rest for n in shape)


def _narrowed(name: str, op: Pad, shape: Shape, given: Shape) -> tuple[tuple[int, int], ...]:
    """Padding around one zero instead of around nothing."""
    pads = []
    for (before, after), n, old in zip(op.pads, given, shape, strict=True):
        extra = before + after + n - max(old, 1)
        if extra and (op.value != 0 or extra > before + after):
            raise ShapeError(
                f"node '{name}': padding around an empty tensor cannot be saved; keep one neuron of that layer"
            )
        cut = min(extra, after)
        pads.append((before - (extra - cut), after - cut))
    return tuple(pads)
