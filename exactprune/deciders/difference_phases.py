"""The largest difference of two networks by a MILP, which suggests a bound and finds points.

Both networks side by side are one big-M model (``formulations.bigm``) that says nothing of what they share, so its
relaxation is as loose as that of A plus that of B. What ``bounds.difference`` has proved of every pair of neurons,

    l <= z_B - r z_A <= u    and    l' <= relu(z_B) - relu(r z_A) <= u',

is added as rows: they hold on the whole domain, so no point is cut off, and the relaxation of A - B becomes about as tight
as those bounds. HiGHS' dual bound is the solver's word: it is reported as suggested and is never the upper bound, which
``difference_pairs`` proves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
from scipy import sparse

from exactprune.bounds.difference import Joint, Partners
from exactprune.bounds.layerwise import Layerwise
from exactprune.deciders.highs import HighsOptions, solve
from exactprune.domain import Box
from exactprune.errors import ExactPruneError
from exactprune.formulations.arrays import Kind, RowKind, Rows, scaled
from exactprune.formulations.bigm import BigM, build
from exactprune.network import Network

SLACK = 1e-6  # of a row's range: a solver's tolerance is not to cut points off


@dataclass(frozen=True, eq=False)
class Paired:
    """Bounds of the pairs of one layer of B, flat (neurons,): of z_B - r z_A, and of relu(z_B) - relu(r z_A).

    Attributes:
        layers: ReLU layers of A and of B in the network side by side.
        source: A's neuron; -1 for none.
        ratio: r.
        before, after: (2, neurons) lower and upper.
    """

    layers: tuple[int, int]
    source: np.ndarray
    ratio: np.ndarray
    before: np.ndarray
    after: np.ndarray


def suggest(joint: Joint, box: Box, state: Layerwise, uppers: np.ndarray, lowers: np.ndarray, seconds: float,
            pairs: tuple[Paired, ...] = ()) -> tuple[float | None, np.ndarray]:
    """A MILP's bound on the largest difference, which proves nothing, and its points (points, inputs).

    Args:
        joint: A and B side by side.
        box: the domain.
        state: bounds of the joint network.
        uppers, lowers: (outputs,) what is known.
        seconds: for all solves together.
        pairs: bounds of differences.
    """
    deadline, best = monotonic() + seconds, float(lowers.max(initial=0.0))
    asked = [int(i) for i in np.argsort(-uppers, kind="stable") if uppers[i] > best]
    low, high = ([getattr(state.at(k), side)[0].cpu().numpy() for k in range(joint.last)] for side in ("lower", "upper"))
    points: list[np.ndarray] = []
    bound = best
    try:
        model = with_pairs(build(joint.network, box, low, high, target=joint.last, neurons=np.array(asked)), pairs, low, high)
    except ExactPruneError:
        return None, np.empty((0, box.lower.size))
    for output, sign in ((o, s) for o in asked for s in (1, -1)):
        left = (deadline - monotonic()) / 2  # whatever is not above the worst so far ends at once
        c, offset = model.objective(output)
        arrays = model.arrays.with_objective(sign * c, sign * offset)
        known = bound
        outcome = solve(arrays, "max", HighsOptions(time_limit=max(0.01, left), mip_gap=1e-4),
                        stop=lambda _, dual, known=known: bool(dual <= known))
        bound = max(bound, min(outcome.dual_bound, float(uppers[output])))
        if outcome.x is not None:
            points.append(model.point(outcome.x).reshape(-1))
    return bound, np.array(points).reshape(-1, box.lower.size)


# -- rows of differences -----------------------------------------------------------------------------------------------


def with_pairs(model: BigM, pairs: tuple[Paired, ...], low: list[np.ndarray], high: list[np.ndarray]) -> BigM:
    """The model with the rows that bound differences, for the neurons that have columns."""
    entries: list[tuple[dict[int, float], float, float, int, int]] = []
    for pair in pairs:
        first, second = (_columns(model, k, low[k], high[k]) for k in pair.layers)
        for j in np.flatnonzero(pair.source >= 0).tolist():
            a, b = first.get(int(pair.source[j])), second.get(j)
            if a is not None and b is not None:
                entries += list(_rows(a, b, pair, j))
    if not entries:
        return model
    arrays, width = model.arrays, model.arrays.c.size
    place = [(i, k, v) for i, (row, *_) in enumerate(entries) for k, v in row.items()]
    row, column, value = (np.array(t) for t in zip(*place, strict=True))
    matrix = sparse.csr_array((value.astype(np.float64), (row, column)), shape=(len(entries), width))
    matrix, below, above, factor = scaled(matrix, np.array([e[1] for e in entries]), np.array([e[2] for e in entries]))
    rows = Rows(np.append(arrays.rows.kind, np.full(len(entries), RowKind.INDICATOR)),
                np.append(arrays.rows.layer, [e[3] for e in entries]), np.append(arrays.rows.index, [e[4] for e in entries]),
                np.append(arrays.rows.scale, factor))
    more = replace(arrays, A=sparse.csr_array(sparse.vstack([arrays.A, matrix])), rows=rows,
                   row_lower=np.append(arrays.row_lower, below), row_upper=np.append(arrays.row_upper, above))
    return replace(model, arrays=more)


def _columns(model: BigM, layer: int, low: np.ndarray, high: np.ndarray) -> dict[int, tuple[int, int, float, float]]:
    """Unstable neuron -> columns of z and of the slack, and their scales u and l: z_hat = u z' + l s'."""
    columns = model.arrays.columns
    z, index = columns.where(Kind.Z, layer)
    slack = dict(zip(*(t.tolist() for t in columns.where(Kind.SLACK, layer)[::-1]), strict=True))
    return {i: (c, slack[i], float(high[i]), float(low[i])) for c, i in zip(z.tolist(), index.tolist(), strict=True)}


def _rows(a: tuple[int, int, float, float], b: tuple[int, int, float, float], pair: Paired,
          j: int) -> Iterator[tuple[dict[int, float], float, float, int, int]]:
    r, (za, sa, ua, la), (zb, sb, ub, lb) = float(pair.ratio[j]), a, b
    margin = SLACK * (ub - lb + r * (ua - la))
    for bounds, row in ((pair.before[:, j], {zb: ub, sb: lb, za: -r * ua, sa: -r * la}),
                        (pair.after[:, j], {zb: ub, za: -r * ua})):
        if np.isfinite(bounds).all() and len(row) in (2, 4):
            yield row, float(bounds[0]) - margin, float(bounds[1]) + margin, pair.layers[1], j


def pairs_of(side_by_side: Joint, relative: Joint, state: Layerwise, partners: Mapping[int, Partners], a: Network,
             b: Network) -> tuple[Paired, ...]:
    """What the bounds of the relative network say about every layer of pairs.

    Args:
        side_by_side, relative: the two joint networks.
        state: bounds of ``relative``.
        partners: of ``relative``.
        a, b: the networks.
    """
    found = []
    for layer, delta in relative.deltas.items():
        partner = partners[delta.layer]
        ends = side_by_side.of_a.get(partner.layer, -1), side_by_side.of_b.get(delta.layer, -1)
        if min(ends) < 0:
            continue
        places = int(np.prod(b.shapes[b.relus[delta.layer]][1:], dtype=int))
        source = np.where(np.asarray(partner.source)[:, None] < 0, -1,
                          np.asarray(partner.source)[:, None] * places + np.arange(places)).reshape(-1)
        before, after = (np.stack([getattr(bounds, side)[0].cpu().numpy() for side in ("lower", "upper")])
                         for bounds in (state.at(layer), state.known[relative.network.relus[layer]]))
        found.append(Paired(ends, source, np.repeat(np.asarray(partner.ratio, np.float64), places), before, after))
    return tuple(found)
