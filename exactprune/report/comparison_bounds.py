"""How far a network g is from f on the whole domain, and on which samples the class cannot change.

Let d = f - g. ``bounds.difference`` bounds every output of d over the domain; the same pass bounds every difference d_c - d_j
of two outputs (rows +1, -1 appended to both networks), which is smaller than the two bounds added up where outputs move
together. Then at a sample x of class c in f, g_c - g_j = (f_c - f_j) - (d_c - d_j), so the class cannot change if

    f_c(x) - f_j(x) > max over the domain of abs(d_c - d_j)    for every j other than c.

Neurons of a masked network are written relative to the neuron that they were, with or without whatever else is alike;
every choice of partners gives true bounds, and the smallest counts, output by output.

Nearby: f and g by themselves are bounded over a small box around each sample (many boxes at once). If the class of the
sample wins everywhere in the box in both, no input of the box changes its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import inf, prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.difference import Joint, Partners, difference_bounds, joint_network
from exactprune.bounds.layerwise import crown_bounds
from exactprune.bounds.program import compile_network
from exactprune.deciders.difference_partners import find_partners
from exactprune.deciders.difference_search import Search, bound_corners, rounded_down
from exactprune.network import Network, Node, build
from exactprune.ops import Affine, ReLU, Reshape

if TYPE_CHECKING:
    from exactprune.domain import Box

MOST_PAIRED = 20  # outputs; where there are more, two bounds are added up instead
APART = (1.0, 0.1, 1e-3)
STARTS = 16
_BOXES = 64


@dataclass(frozen=True, eq=False)
class Deviation:
    """What is known about f - g on the domain, as real functions.

    Attributes:
        upper: certified, no output differs by more.
        lower: attained at a point of the domain.
        pairs: (outputs, outputs): certified, the difference of two outputs moves by no more; 0 on the diagonal.
        points: (points, *input shape), where outputs differ most.
    """

    upper: float
    lower: float
    pairs: np.ndarray
    points: np.ndarray


def deviation(f: Network, g: Network, domain: Box, *, starts: int = STARTS, seed: int = 0, exact: float = 0.0,
              known: float | None = None, via: tuple[Network, float] | None = None) -> Deviation:
    """Bound f - g from above, and look for points where it is large.

    Args:
        f, g: networks of one interface.
        domain: the box, in f's input shape.
        starts: of the search, per output and sign.
        seed: of the search.
        exact: seconds for branch and bound with the MILP's suggestions; 0 for none.
        known: a bound that is certified already.
        via: a network between f and g, with a certified bound on its deviation from f; bounds add up.
    """
    outputs = prod(f.output_shape)
    pairs = list(combinations(range(outputs), 2)) if outputs <= MOST_PAIRED else []
    plain = joint_network(f, g)
    if plain.equal:
        return Deviation(0.0, 0.0, np.zeros((outputs, outputs)), np.empty((0, *f.input_shape)))
    top, hints = _best(f, g, domain, seed, pairs)
    if via is not None:
        top = np.minimum(top, _through(via[0], g, via[1], domain, seed, pairs))
    if known is not None:
        top[:outputs] = np.minimum(top[:outputs], known)
    finder = Search(plain, domain)
    found = finder.climb(hints, starts=starts, seed=seed)
    lower, upper = rounded_down(finder.exact(found)[0]), float(top[:outputs].max(initial=0.0))
    points = found.points.reshape(-1, *f.input_shape)
    if exact:
        from exactprune.equivalence import equiv

        closer = equiv(f, g, domain, exact=True, time_limit=exact, starts=starts, seed=seed)
        top[:outputs], lower = np.minimum(top[:outputs], closer.uppers), max(lower, closer.lower)
        upper, points = float(top[:outputs].max(initial=0.0)), np.concatenate([closer.point[None], points])
    return Deviation(upper, lower, _matrix(top, outputs, pairs), points)


def unchangeable(margins: np.ndarray, classes: np.ndarray, found: Deviation) -> np.ndarray:
    """For every sample whether no g within the bounds changes its class.

    Args:
        margins: (samples, outputs), at most f_c - f_j at the sample, c its class in f.
        classes: (samples,), that class.
        found: bounds of f - g on a domain that holds the samples.
    """
    others = np.arange(margins.shape[1]) != classes[:, None]
    return ((margins > found.pairs[classes]) | ~others).all(axis=1)


def steady(network: Network, centers: np.ndarray, classes: np.ndarray, radius: float, domain: Box) -> np.ndarray:
    """For every center whether its class has the largest output everywhere in the box of ``radius`` around it.

    Args:
        network: of at least two outputs.
        centers: (samples, *input shape).
        classes: (samples,), the class that must stay.
        radius: in every input; boxes are cut at the domain.
    """
    outputs = prod(network.output_shape)
    pairs = list(combinations(range(outputs), 2))
    if not pairs or outputs > MOST_PAIRED or not len(centers):
        return np.zeros(len(centers), bool)
    program = compile_network(_with_rows(network, pairs, True))
    flat, limits = centers.reshape(len(centers), -1).astype(np.float64), (domain.lower.ravel(), domain.upper.ravel())
    lower, upper = np.clip(flat - radius, *limits), np.clip(flat + radius, *limits)
    kept = []
    for i in range(0, len(flat), _BOXES):
        part = slice(i, i + _BOXES)
        last = crown_bounds(program, torch.from_numpy(lower[part]), torch.from_numpy(upper[part]))[-1]
        kept.append(_wins(last.lower.numpy(), last.upper.numpy(), classes[part], np.array(pairs)))
    return np.concatenate(kept)


# -- parts ---------------------------------------------------------------------------------------------------------------


def _best(f: Network, g: Network, domain: Box, seed: int, pairs: list[tuple[int, int]]) -> tuple[np.ndarray, Tensor]:
    """Row by row the smallest bound on abs(f - g) over all choices of partners, and corners where it may be attained."""
    a, b = _with_rows(f, pairs), _with_rows(g, pairs)
    tops, hints = zip(*(_bounded(joint_network(a, b, p), domain) for p in _choices(f, g, domain, seed)), strict=True)
    return np.min(tops, axis=0), torch.cat(hints)[:4096]


def _through(h: Network, g: Network, eps: float, domain: Box, seed: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Bounds on abs(f - g) from those on abs(h - g) and abs(f - h) <= eps; a difference of two outputs has eps twice."""
    outputs = prod(g.output_shape)
    if joint_network(h, g).equal:
        top = np.zeros(outputs + len(pairs))
    else:
        top, _ = _best(h, g, domain, seed, pairs)
    share = np.where(np.arange(len(top)) < outputs, eps, np.nextafter(2 * eps, inf))
    return np.nextafter(top + share, inf)


def _with_rows(network: Network, pairs: list[tuple[int, int]], only: bool = False) -> Network:
    """The outputs (unless ``only``), then the difference of every pair; with ``only``, a ReLU, so that they are bounded."""
    outputs = prod(network.output_shape)
    rows = np.zeros((len(pairs), outputs))
    for row, (i, j) in zip(rows, pairs, strict=True):
        row[i], row[j] = 1.0, -1.0
    matrix = rows if only else np.concatenate([np.eye(outputs), rows])
    nodes, last = list(network.nodes), network.output
    if network.output_shape != (outputs,):
        nodes.append(Node("rows/flat", Reshape((outputs,)), (last,)))
        last = len(nodes) - 1
    nodes.append(Node("rows", Affine(matrix.astype(network.dtype), np.zeros(len(matrix), network.dtype)), (last,)))
    if only:
        nodes.append(Node("rows/bounded", ReLU(), (len(nodes) - 1,)))
    return build(nodes, network.input_shape, network.dtype, name=network.name)


def _choices(f: Network, g: Network, domain: Box, seed: int) -> Iterator[Mapping[int, Partners]]:
    """None at all; every neuron with the one in its place; or the ones that behave alike."""
    yield {}
    shapes = [[n.shapes[i] for i in n.relus] for n in (f, g)]
    if shapes[0] == shapes[1] and all(len(shape) in (1, 3) for shape in shapes[0]):
        yield {k: Partners(k, np.arange(shape[0]), np.ones(shape[0])) for k, shape in enumerate(shapes[0])}
        return
    found = find_partners(f, g, domain, seed=seed)
    for apart in APART:
        yield {k: p.within(apart) for k, p in found.items()}


def _bounded(joint: Joint, domain: Box) -> tuple[np.ndarray, Tensor]:
    """Bounds on abs(f - g), row by row, and corners where it may be attained."""
    program = compile_network(joint.network)
    state = difference_bounds(program, joint, *program.box(domain))
    last = state.at(joint.last)
    top = torch.maximum(-last.lower, last.upper)[0].nan_to_num(inf, posinf=inf, neginf=inf)
    return top.numpy().copy(), bound_corners(state, joint)


def _matrix(top: np.ndarray, outputs: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """(outputs, outputs): the smaller of a pair's own bound and the two outputs' bounds added up (rounded up)."""
    single = np.nextafter(top[:outputs, None] + top[None, :outputs], inf)
    np.fill_diagonal(single, 0.0)
    for (i, j), bound in zip(pairs, top[outputs:], strict=True):
        single[i, j] = single[j, i] = min(single[i, j], bound)
    return single


def _wins(lower: np.ndarray, upper: np.ndarray, classes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    first, second = (pairs[:, k] == classes[:, None] for k in (0, 1))
    return ((~first | (lower > 0)) & (~second | (upper < 0))).all(axis=1)


__all__ = ["Deviation", "deviation", "steady", "unchangeable"]
