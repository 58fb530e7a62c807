"""The joint deviation of a whole rewrite, bounded afresh on sub-boxes: not a sum of worst cases.

What each layer of g does differently from f, everything before it being equal, is bounded in rationals
(``checker.difference``); how much of it reaches the output is bounded on sub-boxes of the domain, carried through the layers
as forms whose signs are kept (``checker.chains``). Both are the checker's own code, on the bounds of the verdicts, so what is
found here is what the checker finds with the boxes as a hint (record ``split``). A box is split at the input that has most to
do with neurons whose sign is open. The search ends early where it cannot succeed: the networks differ by more than the
target at the middle of a box, or a box is above the target although every sign is settled.

It applies to chains of affine layers and ReLUs with few inputs that vary, where it wins factors of 1,000 and more over
carrying absolute values through all layers; elsewhere the sum over the rewrites stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from exactprune.checker import chains
from exactprune.checker.bounds import Bounds
from exactprune.checker.bundle import local_errors
from exactprune.checker.network import CheckError
from exactprune.checker.network import of as checked
from exactprune.claim import LayerVerdict, Status
from exactprune.compress.hints import hints_of
from exactprune.domain import Box
from exactprune.network import Network

if TYPE_CHECKING:
    from exactprune.compress.rewrite import Rewrite

INPUTS = 12  # that vary, at most
BOXES = 40_000  # looked at, at most
WORK = 1.5e11  # multiplications, at most, about
WIDTH = 4000  # neurons and outputs of one network, at most
_MARGIN = 0.01  # of the errors is added: the bounds of a certificate may be a little wider than the verdicts'


@dataclass(frozen=True, eq=False)
class Joint:
    """A bound on abs(f - g) with the boxes that show it.

    Attributes:
        eps: the bound.
        dims, at: tree of boxes in preorder, as in the record ``split``; dims is -1 for a leaf.
    """

    eps: float
    dims: np.ndarray
    at: np.ndarray

    @property
    def leaves(self) -> int:
        """Number of boxes."""
        return int((self.dims < 0).sum())


def applies(network: Network, domain: Box) -> bool:
    """Whether sub-boxes can help: a chain with few inputs that vary."""
    varying = int((domain.lower < domain.upper).sum())
    return (0 < varying <= INPUTS and len(network.relus) > 1 and network.neurons <= WIDTH
            and chains.chain_of(checked(network)) is not None)


def joint(network: Network, domain: Box, verdicts: Sequence[LayerVerdict], rewrite: Rewrite, target: float,
          boxes: int = BOXES) -> Joint | None:
    """Bound the deviation of a rewrite on sub-boxes.

    Args:
        network: the original.
        domain: the box.
        verdicts: of the original.
        rewrite: what became of it.
        target: boxes are split until the bound is at most this, or there are too many.
        boxes: how many are looked at, at most.

    Returns:
        what is proved (perhaps more than ``target``), or None where this does not apply.
    """
    g = checked(rewrite.network)
    try:
        errors = local_errors(known_bounds(network, domain, verdicts), g, list(hints_of(network, rewrite)))
        errors = [error.wider(_MARGIN) for error in errors]
        tree = _Tree(domain.lower.reshape(1, -1).astype(np.float64), domain.upper.reshape(1, -1).astype(np.float64))
        boxes = min(boxes, int(WORK / _cost(rewrite.network)))
        while tree.open.size and len(tree.dims) <= boxes:
            hopeless = tree.look(*chains.deviation(g, errors, tree.low[tree.open], tree.high[tree.open]), target)
            if hopeless or _gap(network, rewrite.network, tree.middles) > target:
                break
    except CheckError:
        return None
    return tree.result()


def sampled(f: Network, g: Network, domain: Box, points: int = 2000) -> float:
    """The largest abs(f - g) at random points and corners, in float64: no bound, but what to aim for."""
    rng = np.random.default_rng(0)
    return _gap(f, g, np.concatenate([domain.sample(points, rng), domain.corners(points // 4, rng)]))


def _gap(f: Network, g: Network, x: np.ndarray) -> float:
    """The largest abs(f - g) at some inputs, in float64."""
    x = x.reshape(len(x), *f.input_shape)
    with np.errstate(all="ignore"):
        gaps = np.abs(f.evaluate(x, np.float64) - g.evaluate(x, np.float64))
    return float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0))


def _cost(g: Network) -> int:
    """About how many multiplications a box takes: every neuron of a chain is carried back to the input, both ways."""
    sizes = [int(np.prod(g.input_shape)), *(int(np.prod(g.shapes[i])) for i in g.relus), int(np.prod(g.output_shape))]
    through = np.cumsum([a * b for a, b in pairwise(sizes)])
    return 1 + 2 * int((np.array(sizes[1:]) * np.append(sizes[0], through[:-1])).sum())


def known_bounds(network: Network, domain: Box, verdicts: Sequence[LayerVerdict]) -> Bounds:
    """The verdicts' bounds as the checker holds them."""
    bounds = Bounds(checked(network), (domain.lower.astype(np.float64), domain.upper.astype(np.float64)))
    for verdict in verdicts:
        bounds.lower.append(np.where(verdict.status == Status.ACTIVE, np.maximum(verdict.lower, 0.0), verdict.lower))
        bounds.upper.append(np.where(verdict.status == Status.INACTIVE, np.minimum(verdict.upper, 0.0), verdict.upper))
    return bounds


@dataclass(eq=False)
class _Tree:
    """Boxes that are split; arrays over tree nodes in the order they were made."""

    low: np.ndarray
    high: np.ndarray
    dims: np.ndarray = field(init=False)
    at: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False)
    other: np.ndarray = field(init=False)
    value: np.ndarray = field(init=False)
    open: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.dims, self.first, self.other = np.full(1, -1), np.full(1, -1), np.full(1, -1)
        self.at, self.value, self.open = np.zeros(1), np.full(1, np.inf), np.zeros(1, int)

    @property
    def middles(self) -> np.ndarray:
        """Of the open boxes, (boxes, inputs)."""
        return self.low[self.open] / 2 + self.high[self.open] / 2

    def look(self, value: np.ndarray, worth: np.ndarray, target: float) -> bool:
        """Take bounds of the open boxes; those above the target become two. Whether one of them cannot be split usefully."""
        self.value[self.open] = value
        nodes, worth = self.open[value > target], worth[value > target]
        dim = worth.argmax(axis=1) if len(nodes) else np.zeros(0, int)
        cut = self.low[nodes, dim] / 2 + self.high[nodes, dim] / 2
        fine = (self.low[nodes, dim] < cut) & (cut < self.high[nodes, dim]) & (worth > 0).any(axis=1)
        nodes, dim, cut = nodes[fine], dim[fine], cut[fine]
        rows = np.arange(len(nodes))
        below, above = self.high[nodes].copy(), self.low[nodes].copy()
        below[rows, dim], above[rows, dim] = cut, cut
        start, count = len(self.dims), len(nodes)
        self.dims[nodes], self.at[nodes] = dim, cut
        self.first[nodes], self.other[nodes] = start + rows, start + count + rows
        self.low = np.concatenate([self.low, self.low[nodes], above])
        self.high = np.concatenate([self.high, below, self.high[nodes]])
        fresh = 2 * count
        self.dims = np.concatenate([self.dims, np.full(fresh, -1)])
        self.first, self.other = (np.concatenate([a, np.full(fresh, -1)]) for a in (self.first, self.other))
        self.at = np.concatenate([self.at, np.zeros(fresh)])
        self.value = np.concatenate([self.value, np.tile(self.value[nodes], 2)])  # true until it is bounded itself
        self.open = np.arange(start, start + fresh)
        return not fine.all()

    def result(self) -> Joint:
        """The largest bound of a leaf, and the tree in preorder."""
        order, waiting = [], [0]
        while waiting:
            node = waiting.pop()
            order.append(node)
            if self.dims[node] >= 0:
                waiting += [int(self.other[node]), int(self.first[node])]
        order = np.array(order)
        return Joint(float(self.value[self.dims < 0].max()), self.dims[order].astype(np.int64), self.at[order])
