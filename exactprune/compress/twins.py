"""Carrying out ``rules.duplicate`` layer by layer within a budget (0: only where nothing rounds)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exactprune.claim import Status
from exactprune.compress.apply import State, finish
from exactprune.compress.block import Block, Units
from exactprune.compress.deviation import propagate_all
from exactprune.compress.enclosure import enclosures
from exactprune.compress.linear import gains, widened
from exactprune.compress.rules.duplicate import Twin, absorbed, taken_over, twins
from exactprune.compress.surroundings import (
    Surroundings,
    constants,
    incoming,
    make_block,
    outputs_of,
    replaced,
    rewritten,
    sources,
    surroundings,
)
from exactprune.domain import Box
from exactprune.network import Network


@dataclass(frozen=True, eq=False)
class Absorbed:
    """Twins of one layer that were carried out, with the deviation per output of the network."""

    layer: int
    twins: tuple[Twin, ...]
    deviation: np.ndarray

    @property
    def eps(self) -> float:
        """Largest deviation of any output."""
        return float(np.max(self.deviation, initial=0.0))


def absorb_twins(state: State, domain: Box, budget: float) -> tuple[State, list[Absorbed]]:
    """Merge proportional neurons of every layer, from the last to the first, within ``budget`` altogether."""
    done: list[Absorbed] = []
    for layer in reversed(range(len(state.verdicts))):
        state, found = _absorb(state, domain, layer, budget - sum(a.eps for a in done))
        done += [found] if found is not None else []
    return state, done


def _absorb(state: State, domain: Box, layer: int, budget: float) -> tuple[State, Absorbed | None]:
    network, verdict = state.network, state.verdicts[layer]
    where = surroundings(network, network.relus[layer], homogeneous=True)
    if where is None or len(verdict.shape) not in (1, 3):
        return state, None
    known = enclosures(network, domain, state.verdicts)
    at = [known[source] for source in sources(network, where)]
    block = make_block(network, where, np.arange(verdict.shape[0]), at, gains(network, where), linear=False)
    if not (np.isfinite(block.lower).all() and np.isfinite(block.upper).all()):
        return state, None
    reach = np.maximum(verdict.upper, 0.0).reshape(verdict.shape[0], -1).max(axis=1)
    merges = budget > 0 and surroundings(network, where.hub) is not None
    active = (verdict.status == Status.ACTIVE).reshape(verdict.shape[0], -1).all(axis=1)
    inexact = constants(network, where)[1] > 0
    found = list(twins(block, budget, inexact | active if merges else inexact))
    chosen = _affordable(block, found, reach, budget)
    best: tuple[State, Absorbed] | None = None
    fits, fails = 0, len(chosen) + 1  # the cheapest ones that fit: their deviation grows with their number
    while fails - fits > 1:
        count = fails - 1 if best is None and fails > len(chosen) else (fits + fails) // 2
        done = _carried_out(state, where, block, chosen[:count], reach, budget, layer)
        best, fits, fails = (best, fits, count) if done is None else (done, count, fails)
    return best or (state, None)


def _carried_out(state: State, where: Surroundings, block: Block, chosen: Sequence[Twin], reach: np.ndarray, budget: float,
                 layer: int) -> tuple[State, Absorbed] | None:
    """The network without these twins, if its output moves by no more than the budget."""
    network = state.network
    w_out, error = absorbed(block, chosen, reach)
    moved = propagate_all(network, outputs_of(network, where, error[None]))
    deviation = moved[network.output][0]
    if not (np.isfinite(w_out).all() and float(np.max(deviation, initial=0.0)) <= budget):
        return None
    after = _without(widened(state, moved) if error.any() else state, where, layer, list(chosen), w_out)
    return after, Absorbed(layer, tuple(chosen), deviation)


def _affordable(block: Block, found: list[Twin], reach: np.ndarray, budget: float) -> list[Twin]:
    """The cheapest twins whose costs, each on its own, stay within the budget altogether."""
    weight = block.gain[block.owner]
    costs = [float((taken_over(block, t.kept, [t], float(reach[t.kept]))[1] * weight).max(initial=0.0)) for t in found]
    order = np.argsort(costs, kind="stable")
    total = np.cumsum(np.asarray(costs)[order])
    return [found[i] for i, spent in zip(order, total, strict=True) if spent <= budget]


def _without(state: State, where: Surroundings, layer: int, chosen: list[Twin], w_out: np.ndarray) -> State:
    network = state.network
    kept = np.setdiff1d(np.arange(network.shapes[where.hub][0]), [t.gone for t in chosen])
    ops = rewritten(network, where, kept, _no_units(network, where, len(w_out)), w_out[:, kept])
    layers = {relu: k for k, relu in enumerate(network.relus)}
    stays = {k: (0, kept if k == layer else np.arange(v.shape[0])) for k, v in enumerate(state.verdicts)}
    return finish(state, replaced(network.nodes, ops), network.output, layers, stays)


def _no_units(network: Network, where: Surroundings, rows: int) -> Units:
    """No new unit, and the readers' biases as they are."""
    dtype, none = network.dtype, np.zeros(0)
    biases = np.concatenate([getattr(network.nodes[r.position].op, "bias") for r in where.readers])  # noqa: B009
    columns = incoming(network, where).shape[1]
    return Units(np.zeros((0, columns), dtype), np.zeros(0, dtype), np.zeros((rows, 0), dtype), biases, none, none)
