"""Trees of input splits: claims on sub-boxes of the domain, checked by bounds computed afresh on each.

On a sub-box, layer after layer: interval bounds, intersected with those known on the whole domain, then both sides by
backward substitution with the fixed slopes for every neuron that is still unstable there (not in the first layer, where
intervals lose nothing). Many sub-boxes form one batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from exactprune.checker import records
from exactprune.checker.bounds import Bounds, Region
from exactprune.checker.dyadic import Array
from exactprune.checker.layers import MaxPool, ReLU
from exactprune.checker.network import INPUT, CheckError

AGAIN = 32  # so many sub-boxes are computed again exactly
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


def leaves(dims: Any, at: Any, lower: Array, upper: Array) -> tuple[Array, Array]:
    """The boxes (leaves, inputs) of a tree given as in a ``boxes`` record; together they are [lower, upper]."""
    dims = records.integers(dims, -1, len(lower), "split: dims")
    at = records.unpack(at, ("<f8",), "split: at")
    if at.shape != dims.shape or not len(dims):
        raise CheckError("split: dims and at differ in length, or there is no box")
    low, high, children = _tree(dims, at, lower, upper)
    ends = np.array([c is None for c in children])
    return low[ends], high[ends]


def _tree(dims: Array, at: Array, lower: Array, upper: Array) -> tuple[Array, Array, list[tuple[int, int] | None]]:
    low, high = np.empty((len(dims), len(lower))), np.empty((len(dims), len(lower)))
    children: list[list[int]] = [[] for _ in dims]
    waiting: list[tuple[int, bool]] = [(-1,
                                        False)]  # (parent, upper half) of the boxes that are still to come, last first
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


Key = tuple[int, int, int]  # layer, neuron, sign


def prove(bounds: Bounds, tree: Splits) -> dict[Key, str]:
    """Check the claims; neurons whose claims cover the domain narrow ``bounds``.

    Returns:
        (layer, neuron, sign) -> why it is not proved, "" if it is.
    """
    held: dict[Key, set[int]] = {}
    failed: Counter[Key] = Counter()
    by_node: dict[int, list[Claim]] = {}
    for claim in tree.claims:
        by_node.setdefault(claim.node, []).append(claim)
    last = {node: max(c.layer for c in claims) for node, claims in by_node.items()}
    for layer in sorted(set(last.values())):
        bounds.reach(layer)
        step = max(1, int(BATCH / (16 * (bounds.widest * (len(bounds.layers) + 1)))))
        nodes = sorted(node for node in by_node if last[node] == layer)
        for start in range(0, len(nodes), step):
            part = nodes[start : start + step]
            _check_part(bounds, tree, layer, part, [by_node[node] for node in part], held, failed)
    _check_again(bounds, tree, by_node, held, failed)
    why = {}
    for key in sorted(held.keys() | failed.keys()):
        if _covered(tree.children, held.get(key, set())):
            layer, neuron, sign = key
            bounds.narrow(layer, np.array([neuron]), "upper" if sign > 0 else "lower", np.zeros(1))
            why[key] = ""
        else:
            why[key] = f"its sub-boxes do not cover the domain ({failed[key]} of its claims are not proved)"
    return why


def _check_part(bounds: Bounds, tree: Splits, last: int, nodes: list[int], claims: list[list[Claim]],
                held: dict[Key, set[int]], failed: Counter[Key], exact: bool = False) -> None:
    """The claims of some tree nodes, none of them beyond ReLU layer ``last``."""
    region = local_bounds(bounds, last, tree.lower[nodes], tree.upper[nodes], exact)
    flat = [(row, claim) for row, mine in enumerate(claims) for claim in mine]
    for layer in sorted({claim.layer for _, claim in flat}):
        mine = [(row, claim) for row, claim in flat if claim.layer == layer and len(claim.neurons)]
        if not mine:
            continue
        rows = np.repeat([row for row, _ in mine], [len(claim.neurons) for _, claim in mine])
        neurons = np.concatenate([claim.neurons for _, claim in mine])
        signs = np.concatenate([claim.signs for _, claim in mine])
        lower, upper = region.relu[layer]
        values = np.where(signs > 0, upper[rows, neurons], -lower[rows, neurons])
        for sign in (1, -1):
            open_rows = np.flatnonzero((values > 0) & (signs == sign))
            values[open_rows] = bounds.decide(layer, neurons[open_rows], signs[open_rows],
                                              region.rows(rows[open_rows], len(nodes)))
        for row, neuron, sign, value in zip(rows.tolist(), neurons.tolist(), signs.tolist(), values.tolist(),
                                            strict=True):
            if value <= 0:
                held.setdefault((layer, neuron, sign), set()).add(nodes[row])
            else:
                failed[layer, neuron, sign] += 1


def _check_again(bounds: Bounds, tree: Splits, by_node: dict[int, list[Claim]], held: dict[Key, set[int]],
                 failed: Counter[Key]) -> None:
    """Claims that coarse arithmetic did not settle, on a few sub-boxes, with exact arithmetic for all layers."""
    open_ = [claim for claims in by_node.values() for claim in claims
             if any((claim.layer, int(n), int(s)) in failed and claim.node not in held.get((claim.layer, int(n), int(s)), ())
                    for n, s in zip(claim.neurons, claim.signs, strict=True))]
    nodes = sorted({claim.node for claim in open_})
    if not nodes or len(nodes) > AGAIN:
        return
    for node in nodes:
        mine = [claim for claim in open_ if claim.node == node]
        failed.subtract((c.layer, int(n), int(s)) for c in mine for n, s in zip(c.neurons, c.signs, strict=True)
                        if c.node not in held.get((c.layer, int(n), int(s)), ()))
        _check_part(bounds, tree, max(c.layer for c in mine), [node], [mine], held, failed, exact=True)


def local_bounds(bounds: Bounds, last: int, lower: Array, upper: Array, exact: bool = False) -> Region:
    """Bounds of ReLU layers 0..last on sub-boxes (boxes, inputs); of the last one by intervals only."""
    shape = bounds.network.input_shape
    count = len(lower)
    ranges = {INPUT: (lower.reshape(count, *shape), upper.reshape(count, *shape))}
    pools: dict[int, tuple[Array, Array]] = {}
    relu: dict[int, tuple[Array, Array]] = {}
    for position in range(bounds.network.relus[last] + 1):
        op, inputs = bounds.layers[position], bounds.network.nodes[position].inputs
        if isinstance(op, ReLU):
            k = bounds.layer_of[position]
            low, high = (b.reshape(count, -1) for b in ranges[inputs[0]])
            relu[k] = np.maximum(low, bounds.lower[k]), np.minimum(high, bounds.upper[k])
            if k < last and not bounds.direct(position):
                _tighten(bounds, k, Region(ranges[INPUT], relu, pools), *relu[k], exact)
            ranges[position] = op.interval([tuple(b.reshape(count, *op.shape) for b in relu[k])], exact)  # type: ignore[list-item]
            continue
        if isinstance(op, MaxPool):
            pools[position] = ranges[inputs[0]]
        given = [ranges[i] for i in inputs]
        ranges[position] = op.interval(given, True) if exact else bounds.node_range(position, given, False)
        if not (np.isfinite(ranges[position][0]).all() and np.isfinite(ranges[position][1]).all()):
            raise CheckError(f"node {position}: its interval bounds leave the range of float64")
    return Region(ranges[INPUT], relu, pools)


def _tighten(bounds: Bounds, layer: int, region: Region, lower: Array, upper: Array, exact: bool) -> None:
    """Narrow bounds (boxes, neurons) in place by backward substitution where both signs are still possible."""
    for sign in (1, -1):
        rows, neurons = np.nonzero((lower < 0) & (upper > 0))
        signs = np.full(len(rows), sign, np.int64)
        values = bounds.maximise(layer, neurons, signs, region.rows(rows, len(lower)), exact=exact)
        if sign > 0:
            upper[rows, neurons] = np.minimum(upper[rows, neurons], values)
        else:
            lower[rows, neurons] = np.maximum(lower[rows, neurons], -values)


def _covered(children: list[tuple[int, int] | None], claimed: set[int]) -> bool:
    """Whether claimed tree nodes cover the root: in preorder, children come after their parent."""
    covered = [False] * len(children)
    for node in range(len(children) - 1, -1, -1):
        pair = children[node]
        covered[node] = node in claimed or (pair is not None and covered[pair[0]] and covered[pair[1]])
    return covered[0]
