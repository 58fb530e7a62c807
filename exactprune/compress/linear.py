"""Shrinking the linear part of a network under a budget: candidates for every layer, the best choice, the true
deviation.

Each layer offers candidates: its stably active neurons, and those that a line may replace (``rules.relax``), become
r units (``rules.merge``), or the whole layer folds (``rules.fold``), each with the parameters it leaves and a
certified deviation of the output. A choice of one candidate
a layer is a knapsack: fewest parameters with the sum of deviations within the budget (Pareto fronts are merged layer by
layer, so it is solved exactly for the candidates offered). The choice is then carried out from the last layer to the
first: what comes before a layer is then still the original, so its bounds hold as they are; what comes after is the
network as it is by then, through which the deviation is propagated afresh. The sum of these is the claim (triangle
inequality), per output; a choice whose true sum exceeds the budget is taken back and tried with a smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod

import numpy as np

from exactprune.claim import LayerVerdict, Method, Status
from exactprune.compress.apply import State, finish
from exactprune.compress.block import Block, Units, deviation
from exactprune.compress.deviation import inflated, propagate_all, propagate_many
from exactprune.compress.enclosure import Interval, enclosures
from exactprune.compress.rules.fold import exactly, foldable, folded, unpadded, without
from exactprune.compress.rules.merge import mergers
from exactprune.compress.rules.opposite import Opposites, opposites
from exactprune.compress.rules.relax import Lines, lines_of
from exactprune.compress.surroundings import (
    Surroundings,
    all_rows,
    constants,
    make_block,
    outputs_of,
    owners,
    replaced,
    rewritten,
    sources,
    surroundings,
)
from exactprune.domain import Box
from exactprune.network import Network, Node
from exactprune.ops import ReLU, Reshape

_SHARES = (0.4, 0.8)  # of the budget, that relaxed channels may use
_GAINS = 4096  # widest layer whose gains are worth computing


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to rewrite one layer.

    Attributes:
        layer: number of the ReLU layer in the current network; -1 for a layer that has no ReLU.
        rule: ``merge`` or ``fold``.
        units: the units that take the place of ``channels``.
        channels: the channels that go.
        relaxed: those of them that are not stable.
        saved: parameters that go.
        error: (m,) certified deviation at the readers' outputs.
        eps: largest certified deviation of the network's output.
        columns: see ``Place``.
        slopes: of the lines of ``relaxed``.
    """

    layer: int
    rule: str
    units: Units
    channels: np.ndarray
    relaxed: np.ndarray
    saved: int
    error: np.ndarray
    eps: float
    columns: Mapping[int, np.ndarray]
    slopes: np.ndarray

    @property
    def unstable_rule(self) -> str:
        """The rule that makes lines of channels that are not stable."""
        return "opposite" if self.columns else "relax"


@dataclass(frozen=True, eq=False)
class Applied:
    """A candidate that was carried out: with its deviation per output of the network, float64 in the output's shape."""

    candidate: Candidate
    deviation: np.ndarray

    @property
    def eps(self) -> float:
        """Largest deviation of any output."""
        return float(np.max(self.deviation, initial=0.0))


def shrink_linear(state: State, domain: Box, budget: float) -> tuple[State, list[Applied]]:
    """The smallest network found whose certified deviation from the given one is within the budget."""
    offers = [_offers(state, domain, layer, budget) for layer in range(len(state.verdicts))]
    for attempt in range(6):
        allowed = budget * 0.97**attempt
        after, applied = _carry_out(state, domain, choose(offers, allowed), allowed, offers)
        total = sum((a.deviation for a in applied), np.zeros(state.network.output_shape))
        if float(np.max(total, initial=0.0)) <= budget:
            return after, applied
    return state, []


def choose(offers: Sequence[Sequence[Candidate]], budget: float) -> tuple[Candidate, ...]:
    """One candidate of each layer (or none): most parameters saved with the sum of eps within the budget, exactly."""
    front: list[tuple[int, float, tuple[Candidate, ...]]] = [(0, 0.0, ())]
    for candidates in offers:
        grown = front + [(saved + c.saved, eps + c.eps, (*picked, c)) for saved, eps, picked in front
                         for c in candidates if eps + c.eps <= budget]
        front = _pareto(grown)
    return max(front, key=lambda item: (item[0], -item[1]))[2]


def _pareto(items: list[tuple[int, float, tuple[Candidate, ...]]]) -> list[tuple[int, float, tuple[Candidate, ...]]]:
    kept, best = [], -1
    for item in sorted(items, key=lambda i: (i[1], -i[0])):
        if item[0] > best:
            kept.append(item)
            best = item[0]
    return kept


def _carry_out(state: State, domain: Box, chosen: Sequence[Candidate], budget: float,
               offers: Sequence[Sequence[Candidate]]) -> tuple[State, list[Applied]]:
    """Carry candidates out from the last layer to the first.

    Each is chosen afresh for the network as it is by then (fewer units may do once the layers after are narrower),
    within what the budget leaves after those already carried out and those still to come.
    """
    applied: list[Applied] = []
    order = sorted(chosen, key=lambda c: -c.layer)
    for index, wanted in enumerate(order):
        spent = sum(a.eps for a in applied) + sum(c.eps for c in order[index + 1:])
        fresh = _offers(state, domain, wanted.layer, budget - spent) if applied else offers[wanted.layer]
        best = best_of([c for c in fresh if c.eps <= budget - spent])
        where = surroundings(state.network, state.network.relus[wanted.layer])
        if best is None or where is None:
            continue
        moved = propagate_all(state.network, outputs_of(state.network, where, best.error[None]))
        applied.append(Applied(best, moved[state.network.output][0]))
        state = carried_out(state, where, best, moved)
    return state, applied


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The most parameters saved, then the smallest deviation."""
    return max(candidates, key=lambda c: (c.saved, -c.eps), default=None)


def widened(state: State, moved: Mapping[int, np.ndarray]) -> State:
    """Verdicts that stay true when tensors deviate: bounds widened, and *unknown* where the phase is not certain any
    more.

    Args:
        state: the network and its verdicts.
        moved: position -> bound on the deviation, (1, *shape).
    """
    sources = [state.network.nodes[relu].inputs[0] for relu in state.network.relus]
    verdicts = tuple(_widened(v, moved[source].ravel()) if source in moved else v
                     for v, source in zip(state.verdicts, sources, strict=True))
    return State(state.network, verdicts, state.origin)


def _widened(verdict: LayerVerdict, by: np.ndarray) -> LayerVerdict:
    lower = np.where(by > 0, np.nextafter(verdict.lower - by, -np.inf), verdict.lower)
    upper = np.where(by > 0, np.nextafter(verdict.upper + by, np.inf), verdict.upper)
    lost = (((verdict.status == Status.ACTIVE) & (lower < 0)) | ((verdict.status == Status.INACTIVE) & (upper > 0))
            | ((verdict.status == Status.UNSTABLE) & (by > 0)))
    reasons = {**verdict.reasons, **{int(i): "an earlier layer was rewritten" for i in np.flatnonzero(lost)}}
    status = np.where(lost, Status.UNKNOWN, verdict.status)
    return LayerVerdict(verdict.layer, verdict.node, verdict.shape, status, verdict.method, lower, upper, reasons)


def _at_output(network: Network, where: Surroundings, errors: np.ndarray,
               at: dict[int, Interval] | None = None) -> np.ndarray:
    """Errors (batch, m) at the readers' outputs, at the network's output: (batch, *output shape)."""
    return propagate_many(network, outputs_of(network, where, errors), at)


# -- candidates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Place:
    """A layer with channels that are, or are taken to be, linear.

    Attributes:
        network: the current network; layer: the number of the layer in it; where: its surroundings.
        lines: the line of each channel: itself for stably active ones (slope 1, shift 0, gap 0).
        relaxed: channels that are not stable.
        block: the block of these lines.
        gap: (k,) bound on the distance of each channel from its line as stored in the block.
        columns: channel that stays -> new outgoing weights (q,), where it took over from its opposite.
        taken: (q,) bound on what that changes.
    """

    network: Network
    layer: int
    where: Surroundings
    lines: Lines
    relaxed: np.ndarray
    block: Block
    gap: np.ndarray
    columns: Mapping[int, np.ndarray] = field(default_factory=dict)
    taken: np.ndarray | float = 0.0


def _places(state: State, domain: Box, layer: int, budget: float) -> list[Place]:
    """The layer with its stably active channels, and with more and more channels that are relaxed within the budget."""
    network, verdict = state.network, state.verdicts[layer]
    where = surroundings(network, network.relus[layer])
    if where is None:
        return []
    known = enclosures(network, domain, state.verdicts)
    at = [known[source] for source in sources(network, where)]
    if not all(np.isfinite(ends).all() for interval in at for ends in interval):
        return []
    gain, active = gains(network, where), _active_channels(verdict)
    sets = [active_lines(active), *_relaxed_sets(network, where, verdict, gain, active, budget)]
    found = [place_of(network, layer, where, at, gain, lines, active.size) for lines in sets if lines.channels.size]
    pairs = _opposites(network, where, at, gain, verdict, active, budget)
    if pairs.gone.size:
        lines = active_lines(np.concatenate([active, pairs.gone]))
        place = place_of(network, layer, where, at, gain, lines, active.size)
        found.append(replace(place, columns=pairs.columns, taken=pairs.error))
    return found


def _opposites(network: Network, where: Surroundings, at: Sequence[Interval], gain: np.ndarray | None, verdict: LayerVerdict,
               active: np.ndarray, budget: float) -> Opposites:
    everything = make_block(network, where, np.arange(verdict.shape[0]), at, gain, linear=False)
    spared = (verdict.status == Status.UNKNOWN).reshape(verdict.shape[0], -1).any(axis=1)
    spared[active] = True
    spared |= constants(network, where)[1] > 0
    reach = np.maximum(verdict.upper, 0.0).reshape(verdict.shape[0], -1).max(axis=1)
    return opposites(everything, budget, spared, reach)


def active_lines(channels: np.ndarray) -> Lines:
    """Stably active channels are their own lines."""
    return Lines(channels, np.ones(channels.size), np.zeros(channels.size), np.zeros(channels.size))


def _relaxed_sets(network: Network, where: Surroundings, verdict: LayerVerdict, gain: np.ndarray | None,
                  active: np.ndarray, budget: float) -> list[Lines]:
    """The active channels with the cheapest relaxed ones, up to several shares of the budget."""
    lines = lines_of(verdict)
    rows = np.abs(all_rows(network, where).astype(np.float64))[:, lines.channels]
    weight = np.ones(len(rows)) if gain is None else gain[np.concatenate(owners(network, where))]
    cost = lines.gap * (rows * weight[:, None]).max(axis=0, initial=0.0)
    order = np.argsort(cost, kind="stable")
    total = np.cumsum(cost[order])
    sizes = {int((total <= share * budget).sum()) for share in _SHARES} - {0}
    return [_joined(active_lines(active), lines.first(np.sort(order[:size]))) for size in sorted(sizes)]


def _joined(a: Lines, b: Lines) -> Lines:
    return Lines(*(np.concatenate([getattr(a, f.name), getattr(b, f.name)]) for f in fields(Lines)))


def place_of(network: Network, layer: int, where: Surroundings, at: Sequence[Interval], gain: np.ndarray | None, lines: Lines,
             active: int) -> Place:
    """A layer with its lines as a block; the first ``active`` of them are stably active channels."""
    linear = lines.channels.size == network.shapes[where.hub][0]
    given = (lines.slope, lines.shift) if lines.channels.size > active else None
    block = make_block(network, where, lines.channels, at, gain, linear, given)
    size = np.abs(block.w_in) @ np.maximum(np.abs(block.lower), np.abs(block.upper)) + np.abs(block.b_in)
    rounding = np.where(lines.gap > 0, 2.0**-50 * (size + np.abs(lines.shift) + lines.gap), 0.0)
    rounding = rounding + constants(network, where)[1][lines.channels] * np.maximum(np.abs(lines.slope), 1.0)
    return Place(network, layer, where, lines, lines.channels[active:], block, lines.gap + rounding)


def _offers(state: State, domain: Box, layer: int, budget: float) -> list[Candidate]:
    """Candidates of one layer within the budget."""
    found = []
    for place in _places(state, domain, layer, budget):
        found += offers_of(place, budget)
    return found


def offers_of(place: Place, budget: float) -> list[Candidate]:
    """Candidates of one place within the budget."""
    merges = _merges(place, budget) if budget > 0 else []
    return [c for c in (*merges, *_folds(place)) if c.saved > 0 and c.eps <= budget]


def _active_channels(verdict: LayerVerdict) -> np.ndarray:
    """Channels that are stably active at every position."""
    return np.flatnonzero((verdict.status == Status.ACTIVE).reshape(verdict.shape[0], -1).all(axis=1))


def _folds(place: Place) -> list[Candidate]:
    if not (place.block.linear and foldable(place.network, place.where) and _fold_saves(place) > 0):
        return []
    block = unpadded(place.block)
    return [] if block is None else [_candidate(replace(place, block=block), "fold", folded(block))]


def _fold_saves(place: Place) -> int:
    """Parameters that a fold would save."""
    (gone, columns), rows = place.block.w_in.shape, len(place.block.w_out)
    feeders, outputs = len(place.where.feeders), len(place.block.b_out)
    return gone * (columns + feeders + rows) - rows * columns - (feeders - 1) * outputs


def gains(network: Network, where: Surroundings) -> np.ndarray | None:
    """How much a unit of deviation at each reader's output can weigh at the network's output."""
    outputs = sum(network.shapes[r.position][0] for r in where.readers)
    flat = all(len(shape) == 1 for shape in network.shapes[where.readers[0].position:])
    if not flat or outputs > _GAINS or outputs * network.macs > 2e11:
        return None
    found = _at_output(network, where, np.eye(outputs))
    return found.reshape(outputs, -1).max(axis=1)


def _merges(place: Place, budget: float) -> list[Candidate]:
    """Merges by growing numbers of units: the fewest within the budget and a few more precise ones."""
    block = place.block
    limit = min(place.lines.channels.size - (not block.linear), *block.w_in.shape, len(block.w_out))
    found: list[Candidate] = []
    for units in mergers(block, budget, limit) if limit >= 0 else ():
        found.append(_candidate(place, "merge", units))
        if sum(c.eps <= budget for c in found) >= 3 or found[-1].saved <= 0:
            break
    return found


def _candidate(place: Place, rule: str, units: Units) -> Candidate:
    block = place.block
    gaps = np.abs(block.w_out.astype(np.float64)) @ place.gap + place.taken
    changed = np.zeros(len(block.b_out)) if rule == "fold" and exactly(block, units) else deviation(block, units)
    error = inflated(changed + inflated(block.summed(gaps), len(place.gap) + len(gaps)), 2)
    eps = float(_at_output(place.network, place.where, error[None]).max()) if np.isfinite(error).all() else np.inf
    gone, rows, columns = len(block.w_in), len(block.w_out), block.w_in.shape[1] + len(place.where.feeders)
    saved = _fold_saves(place) if rule == "fold" else (gone - len(units.v)) * (columns + rows)
    slopes = place.lines.slope[gone - len(place.relaxed):]
    return Candidate(place.layer, rule, units, place.lines.channels, place.relaxed, saved, error, eps, place.columns, slopes)


# -- rewriting ------------------------------------------------------------------------------------------------------


def carried_out(state: State, where: Surroundings, candidate: Candidate, moved: Mapping[int, np.ndarray]) -> State:
    """The network with one candidate carried out; ``moved`` as in ``widened``."""
    state = widened(state, moved)
    units, network = candidate.units, state.network
    if candidate.rule == "fold":
        return _finished(state, where, *without(network, where, units))
    kept = np.setdiff1d(np.arange(network.shapes[where.hub][0]), candidate.channels)
    rows = all_rows(network, where)
    for channel, column in candidate.columns.items():
        rows[:, channel] = column
    nodes = replaced(network.nodes, rewritten(network, where, kept, units, rows[:, kept]))
    if not kept.size:
        return _without_relu(state, where, units, nodes)
    grown = _grown(state, candidate.layer, kept, units)
    layers = {relu: k for k, relu in enumerate(network.relus)}
    everything = {k: (0, np.arange(s[0])) for k, s in enumerate(v.shape for v in grown.verdicts)}
    return finish(grown, nodes, network.output, layers, everything)


def _grown(state: State, layer: int, kept: np.ndarray, units: Units) -> State:
    """Verdicts and origins with the kept channels first and the new units, stably active, after them."""
    old, (number, origin) = state.verdicts[layer], state.origin[layer]
    shape = (len(kept) + len(units.v), *old.shape[1:])
    places = prod(old.shape[1:])

    def joined(name: str, new: np.ndarray | int) -> np.ndarray:
        rows = getattr(old, name).reshape(old.shape[0], places)[kept]
        return np.concatenate([rows, np.broadcast_to(np.reshape(new, (-1, 1)), (len(units.v), places))])

    reasons = {i: why for i, why in old.reasons.items() if i // places in set(kept.tolist())}
    moved = {int(np.searchsorted(kept, i // places)) * places + i % places: why for i, why in reasons.items()}
    verdict = LayerVerdict(layer, old.node, shape, joined("status", int(Status.ACTIVE)),
                           joined("method", int(Method.INTERVAL)), joined("lower", units.lower),
                           joined("upper", units.upper), moved)
    grown = (number, np.concatenate([origin[kept], np.full(len(units.v), -1)]))
    return State(state.network, tuple(verdict if i == layer else v for i, v in enumerate(state.verdicts)),
                 tuple(grown if i == layer else o for i, o in enumerate(state.origin)))


def _without_relu(state: State, where: Surroundings, units: Units, nodes: list[Node]) -> State:
    """All channels were linear: the ReLU goes."""
    relu = nodes[where.hub]
    if isinstance(relu.op, ReLU):
        shape = (len(units.v), *state.network.shapes[where.hub][1:])
        nodes[where.hub] = Node(relu.name, Reshape(shape), relu.inputs)
    return _finished(state, where, nodes, {i: i for i in range(len(nodes))})


def _finished(state: State, where: Surroundings, nodes: Sequence[Node], place: Mapping[int, int]) -> State:
    """Tidy up; the layer is no layer any more, all others stay as they are."""
    layers = {place[relu]: k for k, relu in enumerate(state.network.relus) if relu != where.hub}
    everything = {k: (0, np.arange(v.shape[0])) for k, v in enumerate(state.verdicts)}
    return finish(state, nodes, place[state.network.output], layers, everything)
