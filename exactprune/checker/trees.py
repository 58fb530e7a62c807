"""Trees of ReLU phase splits: reading them, and proving a neuron's sign leaf by leaf.

Every x of the domain has, at each split, z_hat <= 0 or z_hat >= 0, so it reaches some leaf whose cut intervals hold
for it.
A leaf with an empty interval holds no x. Leaves of many trees of one layer are checked in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from exactprune.checker import records
from exactprune.checker.bounds import Bounds, Multipliers, Region
from exactprune.checker.dyadic import Array
from exactprune.checker.network import CheckError

DEPTH = 10_000  # deeper trees are refused

Path = tuple[tuple[int, int, int], ...]  # (layer, neuron, 0 for z_hat <= 0 or 1 for z_hat >= 0)


@dataclass(frozen=True, eq=False)
class Tree:
    """A claim "sign * z_hat <= 0" for one neuron: the path and the multipliers of every leaf."""

    layer: int
    neuron: int
    sign: int
    paths: list[Path]
    leaves: list[dict[int, tuple[Array, Array, Array]]]


def read(record: dict[str, Any], sizes: list[int]) -> Tree:
    """A ``tree`` record.

    Raises:
        CheckError: it is malformed, or its splits are not one full binary tree.
    """
    layer, neuron, side, splits, leaves = records.fields(record, "layer", "neuron", "side", "splits", "leaves")
    layer = records.whole(layer, 0, len(sizes), "tree: layer")
    neuron = records.whole(neuron, 0, sizes[layer], "tree: neuron")
    sign = 1 if records.choice(side, ("upper", "lower"), "tree: side") == "upper" else -1
    paths = _paths(records.listed(splits, "tree: splits"), sizes[:layer])
    entries = [records.multipliers(leaf, sizes[:layer], 1) for leaf in records.listed(leaves, "tree: leaves")]
    if len(entries) != len(paths):
        raise CheckError(f"tree: {len(paths)} leaves in the splits, {len(entries)} lists of multipliers")
    return Tree(layer, neuron, sign, paths, entries)


def _paths(splits: list[Any], sizes: list[int]) -> list[Path]:
    """The leaves' paths of a tree in preorder."""
    waiting: list[Path] = [()]
    found: list[Path] = []
    for entry in splits:
        if not waiting:
            raise CheckError("tree: entries after the last leaf")
        path = waiting.pop()
        if entry is None:
            found.append(path)
            continue
        if not isinstance(entry, list) or len(entry) != 2 or len(path) >= DEPTH:
            raise CheckError("tree: an entry is neither null nor [layer, neuron], or too deep")
        layer = records.whole(entry[0], 0, len(sizes), "tree: split layer")
        neuron = records.whole(entry[1], 0, sizes[layer], "tree: split neuron")
        waiting += [(*path, (layer, neuron, 1)), (*path, (layer, neuron, 0))]
    if waiting:
        raise CheckError("tree: leaves are missing")
    return found


def cut(base: Region, paths: list[Path]) -> tuple[Region, Array]:
    """The region of every leaf (one row each), and which leaves are empty."""
    split = sorted({layer for path in paths for layer, _, _ in path})
    rows = np.repeat(np.arange(len(paths)), [len(p) for p in paths])
    steps = np.array([step for path in paths for step in path], np.int64).reshape(-1, 3)
    relu = dict(base.relu)
    empty = np.zeros(len(paths), bool)
    for layer in split:
        lower, upper = (np.repeat(b, len(paths), axis=0) for b in base.relu[layer])
        below, above = ((steps[:, 0] == layer) & (steps[:, 2] == phase) for phase in (0, 1))
        np.minimum.at(upper, (rows[below], steps[below, 1]), 0.0)
        np.maximum.at(lower, (rows[above], steps[above, 1]), 0.0)
        empty |= (lower > upper).any(axis=1)
        relu[layer] = lower, upper
    return Region(base.box, relu, base.pool), empty


def prove(bounds: Bounds, trees: list[Tree], sizes: list[int]) -> list[str]:
    """Check trees of one ReLU layer; the proved ones narrow ``bounds``.

    Returns:
        For every tree why it fails, or "".
    """
    layer = trees[0].layer
    bounds.reach(layer)
    batches: list[list[Tree]] = [[]]
    for tree in trees:  # about 4000 leaves at a time, to bound the memory that regions take
        batches[-1].append(tree)
        if sum(len(t.paths) for t in batches[-1]) >= 2000:
            batches.append([])
    return [why for batch in batches if batch for why in _prove_batch(bounds, batch, layer, sizes)]


def _prove_batch(bounds: Bounds, trees: list[Tree], layer: int, sizes: list[int]) -> list[str]:
    values, owner = _all_values(bounds, trees, layer, sizes)
    why = []
    for index, tree in enumerate(trees):
        worst = float(values[owner == index].max())
        if worst <= 0:
            bounds.narrow(layer, np.array([tree.neuron]), "upper" if tree.sign > 0 else "lower", np.zeros(1))
        why.append(""
                   if worst <= 0 else f"{int((values[owner == index] > 0).sum())} of {len(tree.paths)} leaves are not "
                   f"proved (the worst bound is {worst:.3g} above 0)")
    return why


def worst(bounds: Bounds, trees: list[Tree], layer: int, sizes: list[int]) -> Array:
    """The largest bound of sign * z_hat in any leaf of each tree of one layer, (trees,); ``bounds`` are not narrowed."""
    found = np.full(len(trees), -np.inf)
    for start in range(0, len(trees), 1000):
        values, owner = _all_values(bounds, trees[start : start + 1000], layer, sizes)
        np.maximum.at(found, start + owner, values)
    return found


def _all_values(bounds: Bounds, trees: list[Tree], layer: int, sizes: list[int]) -> tuple[Array, Array]:
    """Bounds of every leaf of all trees, and the tree it belongs to."""
    owner = np.repeat(np.arange(len(trees)), [len(t.paths) for t in trees])
    neurons = np.array([t.neuron for t in trees], np.int64)
    signs = np.array([t.sign for t in trees], np.int64)
    values = np.full(len(owner), -np.inf)
    for sign in (1, -1):
        chosen = np.flatnonzero(signs[owner] == sign)
        if len(chosen):
            values[chosen] = _leaf_values(bounds, trees, layer, sizes, chosen, owner, neurons, sign)
    return values, owner


def _leaf_values(bounds: Bounds, trees: list[Tree], layer: int, sizes: list[int], chosen: Array, owner: Array,
                 neurons: Array, sign: int) -> Array:
    """Upper bounds of sign * z_hat in the chosen leaves (counted over all trees); -inf where empty."""
    first = np.concatenate([[0], np.cumsum([len(t.paths) for t in trees])])
    leaves = [(trees[owner[i]], int(i - first[owner[i]])) for i in chosen]
    values = np.full(len(chosen), -np.inf)
    step = max(1, int(200e6 / (40 * sum(sizes[:layer]) + 1)))  # regions and multipliers of about 200 MB at a time
    for start in range(0, len(chosen), step):
        part = leaves[start : start + step]
        region, empty = cut(bounds.domain(layer), [tree.paths[i] for tree, i in part])
        hints = records.dense([tree.leaves[i] for tree, i in part], sizes)
        values[start : start + step] = _values(bounds, layer, neurons[owner[chosen[start : start + step]]], sign,
                                               region, hints, empty)
    return values


def _values(bounds: Bounds, layer: int, neurons: Array, sign: int, region: Region, hints: dict[int, Multipliers],
            empty: Array) -> Array:
    signs = np.full(len(neurons), sign, np.int64)
    values = np.full(len(neurons), -np.inf)
    live = np.flatnonzero(~empty)
    if not len(live):
        return values
    some = {k: h.rows(live) for k, h in hints.items()}
    values[live] = bounds.decide(layer, neurons[live], signs[live], region.rows(live, len(neurons)), some)
    return values
