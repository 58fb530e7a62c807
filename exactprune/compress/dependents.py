"""Carrying out ``rules.dependence`` layer by layer; every step is an identity in rationals."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from exactprune.claim import Status
from exactprune.compress.apply import State, finish
from exactprune.compress.block import Units
from exactprune.compress.rules.dependence import Linear, Taken, dependents
from exactprune.compress.surroundings import (
    Surroundings,
    all_rows,
    incoming,
    linear_hubs,
    mixer,
    owners,
    replaced,
    rewritten,
    surroundings,
)
from exactprune.network import Network


@dataclass(frozen=True, eq=False)
class Dependents:
    """Channels that went: ``layer`` is the number of the ReLU layer, -1 where no ReLU stood behind them."""

    layer: int
    channels: np.ndarray


def remove_dependents(state: State) -> tuple[State, list[Dependents]]:
    """Remove dependent channels from the last layer to the first, then where there is no ReLU."""
    done: list[Dependents] = []
    for layer in reversed(range(len(state.verdicts))):
        verdict = state.verdicts[layer]
        active = np.flatnonzero((verdict.status == Status.ACTIVE).reshape(verdict.shape[0], -1).all(axis=1))
        state, found = _removed(state, state.network.relus[layer], layer, active)
        done += found
    for index in reversed(range(len(linear_hubs(state.network)))):
        hub = linear_hubs(state.network)[index]
        state, found = _removed(state, hub, -1, np.arange(state.network.shapes[hub][0]))
        done += found
    return state, done


def _removed(state: State, hub: int, layer: int, channels: np.ndarray) -> tuple[State, list[Dependents]]:
    where = surroundings(state.network, hub) if channels.size > 1 else None
    found = dependents(_linear(state.network, where, channels)) if where is not None else None
    if where is None or found is None:
        return state, []
    gone = np.sort(channels[found.gone])
    return _without(state, where, layer, channels, found, gone), [Dependents(layer, gone)]


def _linear(network: Network, where: Surroundings, channels: np.ndarray) -> Linear:
    feeders, readers = ([mixer(network, p) for p in ps] for ps in (where.feeders, [r.position for r in where.readers]))
    b_in = [sum((Fraction(float(f.bias[c])) for f in feeders), Fraction(0)) for c in channels]
    return Linear(incoming(network, where)[channels], b_in, all_rows(network, where)[:, channels],
                  np.concatenate(owners(network, where)), np.concatenate([r.bias for r in readers]), where.padded)


def _without(state: State, where: Surroundings, layer: int, channels: np.ndarray, found: Taken, gone: np.ndarray) -> State:
    network, rows = state.network, all_rows(state.network, where)
    rows[:, channels] = found.w_out
    kept, none = np.setdiff1d(np.arange(network.shapes[where.hub][0]), gone), np.zeros(0)
    units = Units(np.zeros((0, incoming(network, where).shape[1]), network.dtype), np.zeros(0, network.dtype),
                  np.zeros((len(rows), 0), network.dtype), found.b_out, none, none)
    nodes = replaced(network.nodes, rewritten(network, where, kept, units, rows[:, kept]))
    layers = {relu: k for k, relu in enumerate(network.relus)}
    stays = {k: (0, kept if k == layer else np.arange(v.shape[0])) for k, v in enumerate(state.verdicts)}
    return finish(state, nodes, network.output, layers, stays)
