"""The compression rules of the 2021 paper on given verdicts, to compare ours with.

Serra, Yu, Kumar and Ramalingam, "Scaling Up Exact Neural Network Compression by ReLU Stability" (NeurIPS 2021),
algorithm 1, layer by layer: stably inactive neurons go; where every neuron left in a layer is stably active, the layer
folds into the next one; otherwise a stably active neuron goes when its row of weights is a linear combination of the rows of
stably active neurons that stay, and the next layer takes it over. An all-dead layer leaves a constant. Rank is decided
in floating point with numpy's tolerance, for float64 as in the authors' code, or, generous to them, for float32: there
rows that are dependent up to about 1e-4 count. Nothing is certified.

Networks that are no chain of affine layers and ReLUs are beyond the paper. There its rules are read as follows, for the
count only: a channel that is inactive everywhere goes, and of the channels that are active everywhere as many as the rank of
their filters stay; what is coupled to a channel that stays, stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import qr

from exactprune.claim import LayerVerdict, Status
from exactprune.compress.apply import apply
from exactprune.compress.plan import Plan
from exactprune.compress.rewrite import start
from exactprune.compress.units import PINNED, units_of
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, Conv2d, ReLU


@dataclass(frozen=True)
class Layer:
    """An affine layer and the verdicts of the ReLUs behind it (None: the output layer)."""

    weight: np.ndarray
    bias: np.ndarray
    status: np.ndarray | None


def by_the_paper(network: Network, verdicts: Sequence[LayerVerdict], rank: type = np.float64) -> tuple[Network, bool]:
    """The network that the paper's rules leave, and whether its weights are real (chains) or only its sizes.

    Args:
        network: any network.
        verdicts: one per ReLU layer.
        rank: dtype whose tolerance decides about rank.
    """
    layers = _chain(network, verdicts)
    if layers is None:
        return _sizes_only(network, verdicts, rank), False
    return _built(network, _compressed(layers, rank)), True


# -- chains of affine layers ------------------------------------------------------------------------------------------


def _chain(network: Network, verdicts: Sequence[LayerVerdict]) -> list[Layer] | None:
    """The layers of a chain; None for anything else."""
    nodes = network.nodes[_prefix(network):]
    kinds = [type(n.op) for n in nodes]
    if len(kinds) % 2 == 0 or any(k is not (Affine, ReLU)[i % 2] for i, k in enumerate(kinds)):
        return None
    status = [v.status for v in verdicts] + [None]
    return [Layer(n.op.weight.astype(float), n.op.bias.astype(float), s)
            for n, s in zip(nodes[::2], status, strict=True)]


def _prefix(network: Network) -> int:
    """Number of nodes before the first affine layer, none of which has neurons."""
    return next((i for i, n in enumerate(network.nodes) if isinstance(n.op, Affine | Conv2d | ReLU)), 0)


def _compressed(layers: list[Layer], rank: type) -> list[Layer]:
    done: list[Layer] = []
    current = layers[0]
    for after in layers[1:]:
        kept, current = _one_layer(current, after, rank)
        done += [kept] if kept is not None else []
    return [*done, current]


def _one_layer(layer: Layer, after: Layer, rank: type) -> tuple[Layer | None, Layer]:
    """(what stays of a layer or None, the next one with what it took over)."""
    assert layer.status is not None
    alive = layer.status != Status.INACTIVE
    layer = Layer(layer.weight[alive], layer.bias[alive], layer.status[alive])
    after = Layer(after.weight[:, alive], after.bias, after.status)
    active = layer.status == Status.ACTIVE
    if active.all():
        folded = Layer(after.weight @ layer.weight, after.weight @ layer.bias + after.bias, after.status)
        return None, folded
    stay, gone = _independent(layer.weight, np.flatnonzero(active), rank)
    if gone.size:
        combine = np.linalg.lstsq(layer.weight[stay].T, layer.weight[gone].T, rcond=None)[0]
        weight, bias = after.weight.copy(), after.bias.copy()
        weight[:, stay] += weight[:, gone] @ combine.T
        bias += weight[:, gone] @ (layer.bias[gone] - combine.T @ layer.bias[stay])
        left = np.setdiff1d(np.arange(len(layer.weight)), gone)
        layer = Layer(layer.weight[left], layer.bias[left], layer.status[left])
        after = Layer(weight[:, left], bias, after.status)
    return layer, after


def _independent(weight: np.ndarray, rows: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """(rows that form a basis, the others), by a pivoted QR decomposition."""
    if not rows.size:
        return rows, rows
    rank = int(np.linalg.matrix_rank(weight[rows].astype(dtype)))
    order = qr(weight[rows].T, mode="r", pivoting=True)[1]
    return rows[order[:rank]], rows[order[rank:]]


def _built(network: Network, layers: Sequence[Layer]) -> Network:
    nodes: list[Node] = list(network.nodes[:_prefix(network)])
    for index, layer in enumerate(layers):
        nodes.append(Node(f"affine{index}", Affine(layer.weight, layer.bias), (len(nodes) - 1,)))
        if index < len(layers) - 1:
            nodes.append(Node(f"relu{index}", ReLU(), (len(nodes) - 1,)))
    return build(nodes, network.input_shape, network.dtype, name=network.name)


# -- everything else, sizes only -----------------------------------------------------------------------------------------


def _sizes_only(network: Network, verdicts: Sequence[LayerVerdict], rank: type) -> Network:
    units = units_of(network)
    removed = np.zeros(units.count, bool)
    for verdict in verdicts:
        group = units.group[network.relus[verdict.layer]]
        removed[group[_channels(verdict, Status.INACTIVE)]] = True
        removed[group[_dependent(network, verdict, rank)]] = True
    for position, node in enumerate(network.nodes):
        if isinstance(node.op, Add):  # other terms of the sum may be alive
            removed[units.group[position]] = False
    removed[PINNED] = False
    return apply(start(network, verdicts), Plan(units, removed, {}, {}, tuple({} for _ in verdicts))).network


def _channels(verdict: LayerVerdict, status: Status) -> np.ndarray:
    return np.flatnonzero((verdict.status == status).reshape(verdict.shape[0], -1).all(axis=1))


def _dependent(network: Network, verdict: LayerVerdict, rank: type) -> np.ndarray:
    feeder = network.nodes[network.relus[verdict.layer]].inputs[0]
    op = network.nodes[feeder].op if feeder != INPUT else None
    if not isinstance(op, Affine | Conv2d):
        return np.zeros(0, int)
    return _independent(op.weight.reshape(len(op.weight), -1), _channels(verdict, Status.ACTIVE), rank)[1]

