"""What the checker is told about a rewrite: which unit of f each unit of g is, which are lines, multiples or new ones.

Hints are never believed (docs/bundle.md); they only choose which true inequality the checker writes down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exactprune.compress.surroundings import mixer, summands
from exactprune.compress.units import units_of
from exactprune.deciders.proofs import pack, pack_integers
from exactprune.network import Network
from exactprune.ops import MaxPool2d

if TYPE_CHECKING:
    from exactprune.compress.rewrite import Rewrite

Record = dict[str, Any]


def hints_of(network: Network, rewrite: Rewrite) -> Iterator[Record]:
    """The records ``duplicate``, ``line`` and ``relation`` of a rewrite of ``network``."""
    axes = units_of(network).axis
    lines = {layer: _lines(rewrite, layer, "relax") for layer in range(len(network.relus))}
    for layer, position in enumerate(network.relus):
        gone = list(_lines(rewrite, layer, "opposite"))
        pairs = [*_twins(rewrite, layer), *_opposites(network, position, axes[position], gone)]
        if pairs:
            kept, gone, ratios = (np.array(column) for column in zip(*pairs, strict=True))
            yield {"record": "duplicate", "of": position, "axis": axes[position], "gone": pack_integers(gone),
                   "kept": pack_integers(kept), "ratios": pack(ratios.astype(np.float64))}
        if lines[layer]:
            yield {"record": "line", "of": position, "axis": axes[position],
                   "units": pack_integers(np.array(list(lines[layer]))),
                   "slopes": pack(np.array(list(lines[layer].values()), np.float64))}
    found = _relus(network, rewrite, axes) | _pools(network, rewrite)
    yield from (found[position] for position in sorted(found))


def _twins(rewrite: Rewrite, layer: int) -> Iterator[tuple[int, int, float]]:
    for step in rewrite.steps:
        if step.rule == "duplicate" and step.data["layer"] == layer:
            yield from step.data["kept_gone_ratio"]  # type: ignore[misc]


def _lines(rewrite: Rewrite, layer: int, rule: str) -> dict[int, float]:
    """Units that a rule replaced by lines although they are not stably active, with the slopes."""
    found: dict[int, float] = {}
    for step in rewrite.steps:
        if rule in step.data and step.data["layer"] == layer:
            units, slopes = step.data[rule], step.data["slopes"]
            found |= {int(u): float(s) for u, s in zip(units, slopes, strict=True) if u >= 0}  # type: ignore[call-overload]
    return found


def _opposites(network: Network, position: int, axis: int, units: Sequence[int],
               near: float = 1e-6) -> Iterator[tuple[int, int, float]]:
    """For each of some units, the unit whose weights are a negative multiple of its own, and the factor."""
    feeders = [mixer(network, f) for f in summands(network, network.nodes[position].inputs[0], position)]
    if not units or not feeders or axis:
        return
    weight = np.concatenate([f.weight.reshape(len(f.bias), -1) for f in feeders], axis=1).astype(np.float64)
    size = np.linalg.norm(weight, axis=1)[:, None]
    unit = np.divide(weight, size, out=np.zeros_like(weight), where=size > 0)
    for gone in units:
        cosine = unit @ unit[gone]
        cosine[list(units)] = 0.0
        kept, pivot = int(cosine.argmin()), int(np.abs(weight[gone]).argmax())
        if cosine[kept] < near - 1 and weight[kept, pivot]:
            yield kept, gone, float(weight[gone, pivot] / weight[kept, pivot])


def _relus(network: Network, rewrite: Rewrite, axes: Mapping[int, int]) -> dict[int, Record]:
    return {position: _relation(position, network.relus[layer], axes[network.relus[layer]], units)
            for position, (layer, units) in zip(rewrite.network.relus, rewrite.origin, strict=True)}


def _relation(position: int, of: int, axis: int, units: np.ndarray) -> Record:
    return {"record": "relation", "node": position, "of": of, "axis": axis, "units": pack_integers(units),
            "ratios": None}


def _pools(network: Network, rewrite: Rewrite) -> dict[int, Record]:
    """Max pools keep the name of the node they were; their channels are those of the ReLU that they are coupled with."""
    pools = {node.name: i for i, node in enumerate(network.nodes) if isinstance(node.op, MaxPool2d)}
    groups = units_of(rewrite.network).group
    found = {}
    for position, node in enumerate(rewrite.network.nodes):
        if isinstance(node.op, MaxPool2d) and node.name in pools:
            of = pools[node.name]
            units = [u for p, (_, u) in zip(rewrite.network.relus, rewrite.origin, strict=True)
                     if np.array_equal(groups[p], groups[position]) and (u < network.shapes[of][0]).all()]
            found[position] = _relation(position, of, 0, units[0] if units else
                                        _linear_channels(network, rewrite, of, rewrite.network.shapes[position][0]))
    return found


def _linear_channels(network: Network, rewrite: Rewrite, of: int, count: int) -> np.ndarray:
    """Channels of a max pool of f whose ReLU went because all that was left of it is stably active."""
    group = units_of(network).group
    for layer, position in reversed(list(enumerate(network.relus))):
        left = [r.index for r in rewrite.removals if r.layer == layer and r.rule == "linear"]
        if position < of and len(left) == count and np.array_equal(group[position], group[of]):
            return np.array(sorted(left))
    return np.arange(count)
