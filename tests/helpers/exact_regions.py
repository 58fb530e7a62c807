"""Exact ranges of every pre-activation of a small MLP, by cutting the box into simplices on which it is affine.

The box is a union of simplices (Kuhn 1960); each vertex carries its values as ``Fraction``. While some neuron has both signs on a
simplex, the simplex is cut in two at the zero of an edge, where the values are known by linear interpolation. So each layer
is affine on each piece, its extremes lie on vertices, and nothing is rounded.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import numpy as np

from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Affine

Vertex = tuple[Fraction, ...]
Simplex = tuple[Vertex, ...]


def exact_ranges(network: Network, box: Box) -> list[list[tuple[Fraction, Fraction]]]:
    """(minimum, maximum) over the box, per ReLU layer and neuron, of a chain of affine layers and ReLUs."""
    pieces, found = _triangulated(box), []
    for node in network.nodes:
        if isinstance(node.op, Affine):
            pieces = _mapped(node.op, pieces)
        else:
            found.append([(min(c), max(c)) for c in zip(*{v for piece in pieces for v in piece})])
            for neuron in range(len(found[-1])):
                pieces = [part for piece in pieces for part in _cut(piece, neuron)]
            pieces = [tuple(tuple(max(v, Fraction(0)) for v in vertex) for vertex in piece) for piece in pieces]
    return found


def _triangulated(box: Box) -> list[Simplex]:
    low, high = ([Fraction(float(v)) for v in side.reshape(-1)] for side in (box.lower, box.upper))
    found = []
    for order in permutations(range(len(low))):
        vertex, chain = list(low), [tuple(low)]
        for axis in order:
            vertex[axis] = high[axis]
            chain.append(tuple(vertex))
        found.append(tuple(chain))
    return found


def _mapped(op: Affine, pieces: list[Simplex]) -> list[Simplex]:
    weight = [[Fraction(float(w)) for w in row] for row in op.weight]
    bias = [Fraction(float(b)) for b in op.bias]
    image = {v: tuple(sum((w * x for w, x in zip(row, v)), b) for row, b in zip(weight, bias))
             for v in {v for piece in pieces for v in piece}}
    return [tuple(image[v] for v in piece) for piece in pieces]


def _cut(piece: Simplex, neuron: int) -> list[Simplex]:
    stack, done = [piece], []
    while stack:
        simplex = stack.pop()
        above = next((i for i, v in enumerate(simplex) if v[neuron] > 0), None)
        below = next((i for i, v in enumerate(simplex) if v[neuron] < 0), None)
        if above is None or below is None:
            done.append(simplex)
            continue
        p, n = simplex[above], simplex[below]
        t = p[neuron] / (p[neuron] - n[neuron])
        middle = tuple(a + t * (b - a) if i != neuron else Fraction(0) for i, (a, b) in enumerate(zip(p, n)))
        stack += [(*simplex[:i], middle, *simplex[i + 1 :]) for i in (above, below)]
    return done


def as_arrays(ranges: list[list[tuple[Fraction, Fraction]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(minima, maxima) of each layer as float64, rounded to nearest."""
    return [tuple(np.array([float(r[i]) for r in layer]) for i in (0, 1)) for layer in ranges]  # type: ignore[misc]
