"""Neurons of f whose removal nothing downstream sees on D (forward redundancy), proved neuron by reader.

V is a set of neurons of ReLU layer k; every node that reads layer k is an affine map z = W y + b that is read by one ReLU only.
Without V that map is z - sum of W_v y_v over V. Let

    t_w = z_w + sum over V of max(-W_wv, 0) y_v,

the same row with the negative weights on V left out. Then z_w <= t_w, and z_w without V is <= t_w too, because every y_v >= 0.
If for every v in V and every w with W_wv != 0

    t_w <= 0 wherever z_v >= 0 (v on D's boundary of being active included),

then relu(z_w) is the same with and without V for every x in D: where some v that w reads is active, it is 0 both times,
and where none is, z_w does not change. So f without V equals f on D, as real functions, and everything behind these
ReLUs has the bounds it had. (Lahav and Katz, "Pruning and slicing neural networks using formal verification", FMCAD 2021:
forward redundancy.)

Each of these claims is a tree of phase splits whose root is cut at z_v >= 0 (``trees``); without a tree it is one leaf with
the fixed slopes. Nothing is believed: a claim that does not check rejects the record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exactprune.checker import records, trees
from exactprune.checker.bounds import Bounds
from exactprune.checker.dyadic import Array
from exactprune.checker.network import INPUT, CheckError, Network, Node, Op
from exactprune.checker.records import Json
from exactprune.checker.trees import Path, Tree


@dataclass(frozen=True, eq=False)
class Reader:
    """An affine node that reads the layer, and the ReLU layer that it feeds."""

    node: int
    layer: int


@dataclass(frozen=True, eq=False)
class Claim:
    """t_w <= 0 wherever z_v >= 0, for w a row of a reader and v a neuron of the layer that goes."""

    reader: Reader
    unit: int
    neuron: int


def readers_of(network: Network, layer: int) -> list[Reader]:
    """The readers of a ReLU layer, none where one of them is anything but an affine map in front of one ReLU."""
    position, found = network.relus[layer], []
    for node, op in ((i, n.op) for i, n in enumerate(network.nodes) if position in n.inputs):
        after = [i for i, n in enumerate(network.nodes) if node in n.inputs]
        if op.kind != "Affine" or len(after) != 1 or network.nodes[after[0]].op.kind != "ReLU":
            return []
        found.append(Reader(node, network.relus.index(after[0])))
    return found if position != len(network.nodes) - 1 else []


def sharp(bounds: Bounds) -> Bounds:
    """The same bounds of all ReLU layers, intersected with interval bounds without any rounding: claims may be tight."""
    bounds.reach(len(bounds.network.relus) - 1)
    found = Bounds(bounds.network, bounds.box, [b.copy() for b in bounds.lower], [b.copy() for b in bounds.upper])
    found.ranges = dict(bounds.ranges)
    ranges = {INPUT: bounds.ranges[INPUT]}
    for position, layer in enumerate(bounds.layers[: bounds.network.relus[-1]]):
        given = [ranges[i] for i in bounds.network.nodes[position].inputs]
        k = bounds.layer_of.get(position)
        if k is not None:
            given = [(found.lower[k].reshape(1, *layer.shape), found.upper[k].reshape(1, *layer.shape))]
        ranges[position] = low, high = layer.interval(given, True)
        if position in bounds.before:
            before = bounds.before[position]
            found.narrow(before, np.arange(low.size), "lower", -low.reshape(-1))
            found.narrow(before, np.arange(low.size), "upper", high.reshape(-1))
    return found


def claims_of(bounds: Bounds, layer: int, units: Array) -> list[Claim]:
    """What has to be proved before ``units`` may go; ``bounds`` reach all readers."""
    found = []
    for reader in readers_of(bounds.network, layer):
        part = _weight(bounds.network, reader)[:, units]
        settled = (bounds.upper[reader.layer] <= 0) & (part >= 0).all(axis=1)  # t_w is z_w there, and never above 0
        rows, columns = np.nonzero((part != 0) & ~settled[:, None])
        found += [Claim(reader, int(units[c]), int(w)) for w, c in zip(rows, columns, strict=True)]
    return found


def raised(bounds: Bounds, reader: Reader, units: Array) -> Bounds:
    """f with t_w in place of z_w at one reader; bounds up to there."""
    weight = _weight(bounds.network, reader).copy()
    weight[:, units] = np.maximum(weight[:, units], 0)
    network = _changed(bounds.network, {reader.node: weight})
    lower, upper = ([b.copy() for b in side[: reader.layer]] for side in (bounds.lower, bounds.upper))
    found = Bounds(network, bounds.box, lower, upper)
    found.reach(reader.layer)
    return found


def largest(at: Bounds, layer: int, claims: list[Claim], proofs: list[Tree | None]) -> Array:
    """Upper bounds of t_w on z_v >= 0 for claims about one reader, ``at`` being ``raised`` for it."""
    sizes = [len(b) for b in at.lower]
    found = [_rooted(claim, proof, layer) for claim, proof in zip(claims, proofs, strict=True)]
    return trees.worst(at, found, claims[0].reader.layer, sizes) if found else np.zeros(0)


def _rooted(claim: Claim, proof: Tree | None, layer: int) -> Tree:
    """The tree below the cut at z_v >= 0."""
    root: Path = ((layer, claim.unit, 1),)
    if proof is None:
        return Tree(claim.reader.layer, claim.neuron, 1, [root], [{}])
    return replace(proof, paths=[(*root, *path) for path in proof.paths])


def without(bounds: Bounds, record: Json) -> Bounds:
    """Check a ``forward`` record; f without the neurons it names, and what is proved about it.

    Args:
        bounds: of f. They are not changed.
        record: ``layer``, ``units``, and ``trees``: ``tree`` records with one more field, ``unit``.

    Raises:
        CheckError: it is malformed, or a claim does not check.
    """
    bounds = sharp(bounds)
    sizes = [len(b) for b in bounds.lower]
    layer, units, given = records.fields(record, "layer", "units", "trees")
    layer = records.whole(layer, 0, len(sizes), "forward: layer")
    units = records.indices(units, sizes[layer], "forward: units")
    proofs = _read(records.listed(given, "forward: trees"), sizes)
    readers = readers_of(bounds.network, layer)
    if not readers:
        raise CheckError(f"forward: layer {layer} has a reader that is not an affine map in front of one ReLU")
    for reader in readers:
        claims = [c for c in claims_of(bounds, layer, units) if c.reader.node == reader.node]
        values = largest(raised(bounds, reader, units), layer, claims,
                         [proofs.get((c.unit, reader.layer, c.neuron)) for c in claims])
        for claim, value in zip(claims, values, strict=True):
            if not value <= 0:
                raise CheckError(f"forward: neuron {claim.unit} of layer {layer} may be seen by neuron {claim.neuron} of layer "
                                 f"{reader.layer} (the bound is {value:.3g} above 0)")
    return _after(bounds, readers, units)


def _read(given: list[Any], sizes: list[int]) -> dict[tuple[int, int, int], Tree]:
    found: dict[tuple[int, int, int], Tree] = {}
    for entry in given:
        if not isinstance(entry, dict) or "unit" not in entry:
            raise CheckError("forward: a tree without a unit")
        tree = trees.read({k: v for k, v in entry.items() if k != "unit"}, sizes)
        key = records.whole(entry["unit"], 0, max(sizes), "forward: unit"), tree.layer, tree.neuron
        if tree.sign < 0 or key in found:
            raise CheckError("forward: a tree stands twice, or proves another side")
        found[key] = tree
    return found


def _after(bounds: Bounds, readers: list[Reader], units: Array) -> Bounds:
    """f without the units: all pre-activations are what they were, but for rows that read one; those are <= max(0, upper)."""
    weights, touched = {}, {}
    for reader in readers:
        weight = _weight(bounds.network, reader).copy()
        touched[reader.layer] = (weight[:, units] != 0).any(axis=1)
        weight[:, units] = 0
        weights[reader.node] = weight
    after = Bounds(_changed(bounds.network, weights), bounds.box)
    for k, (lower, upper) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
        after.reach(k)
        moved = touched.get(k, np.zeros(len(lower), bool))
        after.narrow(k, np.arange(len(lower)), "upper", np.where(moved, np.maximum(upper, 0.0), upper))
        after.narrow(k, np.flatnonzero(~moved), "lower", -lower[~moved])
    return after


def _weight(network: Network, reader: Reader) -> Array:
    return network.nodes[reader.node].op.arrays["weight"]


def _changed(network: Network, weights: dict[int, Array]) -> Network:
    nodes = list(network.nodes)
    for position, weight in weights.items():
        op = nodes[position].op
        nodes[position] = Node(Op(op.kind, {**op.arrays, "weight": weight}, op.settings), nodes[position].inputs)
    return Network(tuple(nodes), network.input_shape, network.dtype)
