"""The exact sign of pre-activations at points.

Values with a proved error (``forward``) decide most signs, enclosures by exact operators with float64 rounding between them
decide most others, and what is still open is evaluated without any rounding.
"""

from __future__ import annotations

import numpy as np

from exactprune.checker import dyadic
from exactprune.checker.bounds import Bounds
from exactprune.checker.dyadic import Array, Dyadic
from exactprune.checker.forward import Points, step
from exactprune.checker.layers import Linear
from exactprune.checker.network import INPUT


def signs(bounds: Bounds, layer: int, points: Array, numbers: Array, neurons: Array) -> Array:
    """The signs (-1, 0, 1) of z_hat of ReLU layer ``layer``: of neuron ``neurons[i]`` at point ``numbers[i]``.

    Args:
        bounds: of the network (only its operators are used).
        layer: number of the ReLU layer.
        points: float64 (points, *input shape).
        numbers, neurons: int64 (n,).
    """
    node = bounds.network.nodes[bounds.network.relus[layer]].inputs[0]
    bounds.reach(layer)  # prepares the operators for coarse arithmetic
    found = np.zeros(len(numbers), np.int64)
    todo = np.arange(len(numbers))
    for evaluate in (_coarse, _rounded, _exact):
        todo = todo[found[todo] == 0]
        used, place = np.unique(numbers[todo], return_inverse=True)
        some = max(1, int(100e6 / (bounds.widest * 40)))
        for start in range(0, len(used), some):
            mine = np.flatnonzero((place >= start) & (place < start + some))
            low, high = evaluate(bounds, node, points[used[start : start + some]])
            where = place[mine] - start, neurons[todo[mine]]
            found[todo[mine]] = np.where(low[where] > 0, 1, np.where(high[where] < 0, -1, 0))
    return found


def _coarse(bounds: Bounds, node: int, points: Array) -> tuple[Array, Array]:
    """Bounds on the values of a node by ``forward``, or no information where it gives up."""
    values = {INPUT: Points(points, np.zeros(len(points)))}
    for position in _needed(bounds, node):
        layer, linear = bounds.layers[position], bounds.forward_step(position)
        if isinstance(layer, Linear) and linear is None:
            return _enclose(bounds, node, points, False)
        try:
            values[position] = step(layer, linear, [values[i] for i in bounds.network.nodes[position].inputs])
        except OverflowError:
            return _enclose(bounds, node, points, False)
    found = values[node].values.reshape(len(points), -1)
    radius = values[node].radius[:, None]
    return np.where(found > radius, 1.0, -1.0), np.where(found < -radius, -1.0, 1.0)


def _rounded(bounds: Bounds, node: int, points: Array) -> tuple[Array, Array]:
    return _enclose(bounds, node, points, True)


def _enclose(bounds: Bounds, node: int, points: Array, exact: bool) -> tuple[Array, Array]:
    """Outward-rounded bounds on the values of a node, (points, size)."""
    values = {INPUT: (points, points)}
    for position in _needed(bounds, node):
        inputs = bounds.network.nodes[position].inputs
        values[position] = bounds.layers[position].interval([values[i] for i in inputs], exact)
    low, high = values[node]
    return low.reshape(len(points), -1), high.reshape(len(points), -1)


def _exact(bounds: Bounds, node: int, points: Array) -> tuple[Array, Array]:
    """The exact values of a node as integers (sign is all that matters), twice."""
    values: dict[int, Dyadic] = {INPUT: dyadic.from_float(points)}
    for position in _needed(bounds, node):
        inputs = bounds.network.nodes[position].inputs
        values[position] = bounds.layers[position].exact(*(values[i] for i in inputs))
    whole = values[node].values.reshape(len(points), -1)
    return whole, whole


def _needed(bounds: Bounds, node: int) -> list[int]:
    """The nodes that ``node`` depends on, in order, itself included."""
    needed, stack = set(), [node]
    while stack:
        position = stack.pop()
        if position != INPUT and position not in needed:
            needed.add(position)
            stack.extend(bounds.network.nodes[position].inputs)
    return sorted(needed)
