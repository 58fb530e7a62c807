"""Plan: which units go and why, before anything is rewritten.

A plan names removals (for people and for the certificate) and holds what ``compress.apply`` needs: the groups that go,
the biases that took over constants, and operators that are the identity on the domain. A plan is always relative to one
network and changes nothing by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from exactprune.claim import LayerVerdict
from exactprune.compress.constants import Constant, constants_of
from exactprune.compress.levels import EXACT, Level
from exactprune.compress.rules.constant import Folding, fold_constants
from exactprune.compress.rules.identity import identities
from exactprune.compress.rules.inactive import inactive_units
from exactprune.compress.rules.unread import Mixer, live_groups, mixers_of
from exactprune.compress.units import Units, units_of
from exactprune.network import Network


@dataclass(frozen=True)
class Removal:
    """One unit of one ReLU layer that goes.

    Attributes:
        layer: number of the ReLU layer in the original network.
        index: unit in that layer: the flat index of a neuron, or the channel of a convolutional layer.
        rule: ``inactive``, ``constant``, ``zero``, ``unread``, ``linear``, ``duplicate``, ``dependence``, ``merge``, ``fold``,
            ``forward``, ``relax`` or ``opposite``.
        level: what is claimed about it.
        neurons: how many ReLU neurons go with it (1, or height * width of a channel).
    """

    layer: int
    index: int
    rule: str
    level: Level = EXACT
    neurons: int = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do to one network.

    Attributes:
        units: its units and groups.
        removed: booleans of shape (groups,).
        biases: position of a node -> its new bias, the folded constants included.
        identities: position of a node -> position of the tensor that it equals on the domain.
        rules: per ReLU layer: unit along the layer's axis -> rule that removes it.
    """

    units: Units
    removed: np.ndarray
    biases: Mapping[int, np.ndarray]
    identities: Mapping[int, int]
    rules: tuple[Mapping[int, str], ...]

    @property
    def empty(self) -> bool:
        """Whether applying the plan changes nothing."""
        return not (self.removed.any() or self.biases or self.identities)


def plan_exact(network: Network, verdicts: Sequence[LayerVerdict], *, linearise: bool = False) -> Plan:
    """Everything that rational arithmetic and the verdicts allow, at level ``exact``.

    Args:
        network: any network.
        verdicts: one per ReLU layer, in order.
        linearise: also drop ReLU nodes whose neurons are all stably active.
    """
    units, constants, mixers = units_of(network), constants_of(network, verdicts), mixers_of(network)
    same = identities(network, constants, verdicts, linearise)
    if same:
        return Plan(units, np.zeros(units.count, bool), {}, same, tuple({} for _ in verdicts))
    folding, removed = _settled(network, units, mixers, constants)
    rules = tuple(_rules(network, units, constants, removed, folding, v) for v in verdicts)
    return Plan(units, removed, folding.used_biases(mixers, units, removed), {}, rules)


def _settled(network: Network, units: Units, mixers: tuple[Mixer, ...],
             constants: Mapping[int, Constant]) -> tuple[Folding, np.ndarray]:
    """Foldings and what they remove; a constant whose unit has to stay after all is not folded."""
    barred = np.zeros(units.count, bool)
    while True:
        folding = fold_constants(network, units, mixers, constants, barred)
        live = live_groups(network, units, mixers, folding.free)
        if not (live & folding.groups).any():
            return folding, ~live
        barred |= live & folding.groups


def _rules(network: Network, units: Units, constants: Mapping[int, Constant], removed: np.ndarray, folding: Folding,
           verdict: LayerVerdict) -> dict[int, str]:
    """Why each unit of a ReLU layer goes: the strongest reason first."""
    position = network.relus[verdict.layer]
    group, axis = units.group[position], units.axis[position]
    inactive = inactive_units(verdict, axis)
    zero = _whole(constants[position].zero, axis)
    constant = folding.groups[group]

    def rule(unit: int) -> str:
        return ("inactive" if inactive[unit] else "zero" if zero[unit] else "constant" if constant[unit] else "unread")

    return {int(unit): rule(int(unit)) for unit in np.flatnonzero(removed[group])}


def _whole(mask: np.ndarray, axis: int) -> np.ndarray:
    """For each slice along ``axis``: whether the mask holds everywhere in it."""
    return np.asarray(np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1).all(axis=1))


def removals_of(plan: Plan, origin: Sequence[tuple[int, np.ndarray]],
                shapes: Sequence[tuple[int, ...]]) -> list[Removal]:
    """The plan's removals in the numbering of the original network.

    Args:
        plan: a plan for the current network.
        origin: per current ReLU layer: number of the original layer, and the original unit of each current unit (-1:
            new).
        shapes: shape of each current ReLU layer.
    """
    found = []
    for rules, (layer, original), shape in zip(plan.rules, origin, shapes, strict=True):
        size = prod(shape) // max(len(original), 1)
        found += [Removal(layer, int(original[u]), rule, EXACT, size) for u, rule in rules.items() if original[u] >= 0]
    return found


__all__ = ["Mixer", "Plan", "Removal", "plan_exact", "removals_of"]
