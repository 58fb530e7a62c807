"""Collapsing mixers with no ReLU between them: into one, or into a pair of low rank, whichever has fewer parameters.

W_2 (W_1 x + b_1) + b_2 is a layer all of whose channels are linear everywhere, so it is folded (``rules.fold``) or merged
(``rules.merge``) like a ReLU layer whose neurons are all stably active; no verdict is needed. Such pairs are in networks as
they are loaded, and where a layer lost its ReLU.

Level: ``exact`` where the products are numbers of the dtype, else ``certified(eps)`` within the budget.
"""

from __future__ import annotations

import math

import numpy as np

from exactprune.compress.apply import State
from exactprune.compress.deviation import propagate_all
from exactprune.compress.enclosure import enclosures
from exactprune.compress.linear import Applied, Candidate, active_lines, best_of, carried_out, gains, offers_of, place_of
from exactprune.compress.surroundings import Surroundings, linear_hubs, outputs_of, sources, surroundings
from exactprune.domain import Box


def collapse(state: State, domain: Box, budget: float) -> tuple[State, list[Applied]]:
    """Collapse until nothing gets smaller, from the last pair to the first, within ``budget`` altogether."""
    done: list[Applied] = []
    while True:
        found = _first(state, domain, budget)
        if found is None:
            return state, done
        state, applied = found
        budget = math.nextafter(budget - applied.eps, -math.inf) if applied.eps else budget
        done.append(applied)


def _first(state: State, domain: Box, budget: float) -> tuple[State, Applied] | None:
    """The network with the last pair collapsed that can be."""
    for hub in reversed(linear_hubs(state.network)):
        where = surroundings(state.network, hub)
        assert where is not None
        best = _best(state, domain, where, budget)
        if best is not None:
            moved = propagate_all(state.network, outputs_of(state.network, where, best.error[None]))
            return carried_out(state, where, best, moved), Applied(best, moved[state.network.output][0])
    return None


def _best(state: State, domain: Box, where: Surroundings, budget: float) -> Candidate | None:
    network = state.network
    known = enclosures(network, domain, state.verdicts)
    at = [known[source] for source in sources(network, where)]
    if not all(np.isfinite(ends).all() for interval in at for ends in interval):
        return None
    lines = active_lines(np.arange(network.shapes[where.hub][0]))
    place = place_of(network, -1, where, at, gains(network, where), lines, lines.channels.size)
    return best_of(offers_of(place, budget))
