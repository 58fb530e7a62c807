"""Trees of input splits: claims on sub-boxes of the domain, checked by bounds computed afresh on each.

On a sub-box, layer after layer: interval bounds, intersected with those known on the whole domain, then both sides by
backward substitution with the fixed slopes for every neuron that is still unstable there. Many sub-boxes form one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from exactprune.checker import records
from exactprune.checker.bounds import Bounds, Region
from exactprune.checker.dyadic import Array
from exactprune.checker.layers import MaxPool, ReLU
from exactprune.checker.network import INPUT, CheckError

BATCH = 100e6  # bytes of bounds that a batch of sub-boxes may take, roughly


@dataclass(frozen=True, eq=False)
class Claim:
    """On one sub-box: these neurons of a layer have z_hat <= 0 (``neurons`` with sign 1) or >= 0 (sign -1)."""

    node: int
    layer: int
    neurons: Array
    signs: Array


@dataclass(frozen=True, eq=False)
class Splits:
    """A binary tree of boxes in preorder.

    Attributes:
        lower, upper: of the box of every tree node, float64 (nodes, inputs).
        children: of every node, or None for a leaf.
        claims: in file order.
    """

    lower: Array
    upper: Array
    children: list[tuple[int, int] | None]
    claims: list[Claim]


def read(record: dict[str, Any], sizes: list[int], lower: Array, upper: Array) -> Splits:
    """A ``boxes`` record over the domain [lower, upper], flat.

    Raises:
        CheckError: it is malformed, a cut is not strictly inside its box, or the tree is not full.
    """
    dims, at, claims = records.fields(record, "dims", "at", "claims")
    dims = records.integers(dims, -1, len(lower), "boxes: dims")
    at = records.unpack(at, ("<f8",), "boxes: at")
    if at.shape != dims.shape:
        raise CheckError("boxes: dims and at differ in length")
    low, high, children = _tree(dims, at, lower, upper)
    return Splits(low, high, children, [_claim(c, len(dims), sizes) for c in records.listed(claims, "boxes: claims")])


def _tree(dims: Array, at: Array, lower: Array, upper: Array) -> tuple[Array, Array, list[tuple[int, int] | None]]:
    low, high = np.empty((len(dims), len(lower))), np.empty((len(dims), len(lower)))
    children: list[list[int]] = [[] for _ in dims]
    waiting: list[tuple[int, bool]] = [(-1, False)]  # (parent, upper half) of the boxes that are still to come, last first
    for node, dim in enumerate(dims):
        if not waiting:
            raise CheckError("boxes: entries after the last leaf")
        parent, above = waiting.pop()
        low[node], high[node] = (lower, upper) if parent < 0 else (low[parent], high[parent])
        if parent >= 0:
            children[parent].append(node)
            (low if above else high)[node, dims[parent]] = at[parent]
        if dim >= 0:
            if not low[node, dim] < at[node] < high[node, dim]:
                raise CheckError(f"boxes: tree node {node} is cut at {at[node]!r}, not strictly inside its interval")
            waiting += [(node, True), (node, False)]
    if waiting:
        raise CheckError("boxes: leaves are missing")
    return low, high, [(c[0], c[1]) if c else None for c in children]


def _claim(value: Any, nodes: int, sizes: list[int]) -> Claim:
    node, layer, upper, lower = records.fields(value, "node", "layer", "upper", "lower")
    layer = records.whole(layer, 0, len(sizes), "boxes: claim layer")
    above = records.indices(upper, sizes[layer], "boxes: claim upper")
    below = records.indices(lower, sizes[layer], "boxes: claim lower")
    signs = np.concatenate([np.ones(len(above), np.int64), -np.ones(len(below), np.int64)])
    return Claim(records.whole(node, 0, nodes, "boxes: claim node"), layer, np.concatenate([above, below]), signs)


def prove(bounds: Bounds, tree: Splits) -> dict[tuple[int, int, int], str]:
    """Check the claims; neurons whose claims cover the domain narrow ``bounds``.

    Returns:
        (layer, neuron, sign) -> why it is not proved, "" if it is.
    """
    held: dict[tuple[int, int, int], set[int]] = {}
    failed: dict[tuple[int, int, int], int] = {}
    for layer in sorted({c.layer for c in tree.claims}):
        bounds.reach(layer)
        claims = [c for c in tree.claims if c.layer == layer]
        step = max(1, int(BATCH / (16 * (bounds.widest * (len(bounds.layers) + 1)))))
        used = sorted({c.node for c in claims})
        for start in range(0, len(used), step):
            part = used[start : start + step]
            _check_part(bounds, tree, layer, part, [c for c in claims if part[0] <= c.node <= part[-1]], held, failed)
    why = {}
    for key in sorted(held.keys() | failed.keys()):
        if _covered(tree.children, held.get(key, set())):
            why[key] = ""
        else:
            why[key] = f"its sub-boxes do not cover the domain ({failed.get(key, 0)} of its claims are not proved)"
    for (layer, neuron, sign), reason in why.items():  # after all layers: every sub-box sees D's bounds as they stood before
        if not reason:
            bounds.narrow(layer, np.array([neuron]), "upper" if sign > 0 else "lower", np.zeros(1))
    return why


def _check_part(bounds: Bounds, tree: Splits, layer: int, nodes: list[int], claims: list[Claim],
                held: dict[tuple[int, int, int], set[int]], failed: dict[tuple[int, int, int], int]) -> None:
    place = {node: i for i, node in enumerate(nodes)}
    region, lower, upper = local_bounds(bounds, layer, tree.lower[nodes], tree.upper[nodes])
    rows = np.repeat([place[c.node] for c in claims], [len(c.neurons) for c in claims])
    neurons = np.concatenate([c.neurons for c in claims])
    signs = np.concatenate([c.signs for c in claims])
    values = np.where(signs > 0, upper[rows, neurons], -lower[rows, neurons])
    again = np.flatnonzero(values > 0)
    values[again] = bounds.decide(layer, neurons[again], signs[again], region.rows(rows[again]))
    for row, neuron, sign, value in zip(rows, neurons, signs, values, strict=True):
        key = (layer, int(neuron), int(sign))
        if value <= 0:
            held.setdefault(key, set()).add(nodes[row])
        else:
            failed[key] = failed.get(key, 0) + 1


def local_bounds(bounds: Bounds, layer: int, lower: Array, upper: Array) -> tuple[Region, Array, Array]:
    """Bounds of ReLU layers 0..layer on sub-boxes (boxes, inputs).

    Returns:
        The region (one row a box) with the layers before ``layer``, and lower and upper of ``layer``, (boxes, neurons).
    """
    shape = bounds.network.input_shape
    count = len(lower)
    ranges = {INPUT: (lower.reshape(count, *shape), upper.reshape(count, *shape))}
    pools: dict[int, tuple[Array, Array]] = {}
    relu: dict[int, tuple[Array, Array]] = {}
    for position in range(bounds.network.relus[layer] + 1):
        op, inputs = bounds.layers[position], bounds.network.nodes[position].inputs
        if isinstance(op, ReLU):
            k = bounds.layer_of[position]
            relu[k] = _tighten(bounds, k, Region(ranges[INPUT], relu, pools), *ranges[inputs[0]])
            ranges[position] = op.interval([tuple(b.reshape(count, *op.shape) for b in relu[k])], False)  # type: ignore[list-item]
            continue
        if isinstance(op, MaxPool):
            pools[position] = ranges[inputs[0]]
        ranges[position] = op.interval([ranges[i] for i in inputs], False)
        if not (np.isfinite(ranges[position][0]).all() and np.isfinite(ranges[position][1]).all()):
            raise CheckError(f"node {position}: its interval bounds leave the range of float64")
    found = relu.pop(layer)
    return Region(ranges[INPUT], relu, pools), *found


def _tighten(bounds: Bounds, layer: int, region: Region, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Intersect with the domain's bounds, then backward substitution where both signs are still possible."""
    count = len(lower)
    lower = np.maximum(lower.reshape(count, -1), bounds.lower[layer])
    upper = np.minimum(upper.reshape(count, -1), bounds.upper[layer])
    for sign in (1, -1):
        rows, neurons = np.nonzero((lower < 0) & (upper > 0))
        values = bounds.maximise(layer, neurons, np.full(len(rows), sign, np.int64), region.rows(rows))
        if sign > 0:
            upper[rows, neurons] = np.minimum(upper[rows, neurons], values)
        else:
            lower[rows, neurons] = np.maximum(lower[rows, neurons], -values)
    return lower, upper


def _covered(children: list[tuple[int, int] | None], claimed: set[int]) -> bool:
    """Whether claimed tree nodes cover the root: in preorder, children come after their parent."""
    covered = [False] * len(children)
    for node in range(len(children) - 1, -1, -1):
        pair = children[node]
        covered[node] = node in claimed or (pair is not None and covered[pair[0]] and covered[pair[1]])
    return covered[0]
