"""Rule ``constant``: a unit that is constant on the domain goes into the next bias, where that is exact.

Applies: every element of the unit is known (``compress.constants``) with value c, and each mixer that reads it can
take the constant over: b_i + sum_j w_ij c_j, computed as a rational, is a number of the network's dtype for every row
i. A zero constant always goes. A non-zero channel does not go into a convolution with padding: at the border fewer
taps see it, so no bias equals it (DESIGN 7). All candidates are tried together first, then one by one.

Level: ``exact``, deviation 0: the new bias equals the old one plus the constants as rationals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from exactprune.compress.constants import Constant
from exactprune.compress.exact import representable
from exactprune.compress.rules.unread import Mixer, live_groups
from exactprune.compress.units import PINNED, Units
from exactprune.network import Network
from exactprune.ops import Affine, Conv2d


@dataclass(frozen=True, eq=False)
class Folding:
    """Constants that are accounted for.

    Attributes:
        free: position of a mixer -> booleans over its input units: 0 on D, or in the bias already.
        groups: booleans over groups: folded into a bias.
        biases: position of a mixer -> its new bias.
    """

    free: Mapping[int, np.ndarray]
    groups: np.ndarray
    biases: Mapping[int, np.ndarray]

    def used_biases(self, mixers: Sequence[Mixer], units: Units, removed: np.ndarray) -> dict[int, np.ndarray]:
        """The new biases of mixers that stay."""
        return {m.position: self.biases[m.position] for m in mixers
                if m.position in self.biases and not removed[m.outputs(units)].all()}


@dataclass(frozen=True, eq=False)
class _Candidate:
    """One mixer's view of its constant input units: exact increments of its bias per unit."""

    mixer: Mixer
    value: np.ndarray
    known: np.ndarray


def fold_constants(network: Network, units: Units, mixers: tuple[Mixer, ...], constants: Mapping[int, Constant],
                   barred: np.ndarray) -> Folding:
    """Fold what can be folded exactly, but no group that is ``barred``; everything that is 0 is free anyway."""
    views = [_view(network, m, constants[m.source]) for m in mixers]
    zero = {v.mixer.position: v.known & (v.value == 0) for v in views}
    chosen = np.zeros(units.count, bool)
    wanted = [int(g) for g in _candidates(units, views, live_groups(network, units, mixers, zero), barred)]
    biases: dict[int, list[Fraction]] = {}
    for trial in ([wanted] if len(wanted) > 1 else []) + [[g] for g in wanted]:
        open_groups = [g for g in trial if not chosen[g]]
        found = _try(network, units, views, open_groups, biases) if open_groups else None
        if found is not None:
            biases |= found
            chosen[open_groups] = True
    free = {v.mixer.position: zero[v.mixer.position] | (chosen[v.mixer.inputs(units)] & v.known) for v in views}
    dtype = network.dtype
    return Folding(free, chosen, {p: np.array([float(b) for b in row], dtype) for p, row in biases.items()})


def _view(network: Network, mixer: Mixer, constant: Constant) -> _Candidate:
    op = network.nodes[mixer.position].op
    if isinstance(op, Affine):
        return _Candidate(mixer, constant.value, constant.known)
    flat_value = constant.value.reshape(constant.value.shape[0], -1)
    flat_known = constant.known.reshape(constant.known.shape[0], -1).all(axis=1)
    value, same = flat_value[:, 0], (flat_value == flat_value[:, :1]).all(axis=1)
    foldable = not any(op.padding)  # type: ignore[attr-defined]
    return _Candidate(mixer, value, flat_known & same & (foldable | (value == 0)))


def _candidates(units: Units, views: Sequence[_Candidate], live: np.ndarray,
                barred: np.ndarray) -> np.ndarray:
    """Live groups that are read somewhere, and constant (not all 0) wherever they are read."""
    good, shifted = live & ~barred, np.zeros(units.count, bool)
    good[PINNED] = False
    for v in views:
        inputs = v.mixer.inputs(units)
        read = v.mixer.reads[live[v.mixer.outputs(units)]].any(axis=0)
        np.logical_and.at(good, inputs[read], v.known[read])
        shifted[inputs[read & v.known & (v.value != 0)]] = True
    return np.flatnonzero(good & shifted)


def _try(network: Network, units: Units, views: Sequence[_Candidate], groups: Sequence[int],
         biases: Mapping[int, list[Fraction]]) -> dict[int, list[Fraction]] | None:
    """New biases with these groups folded as well, or None where a row is not representable."""
    found = {}
    for v in views:
        columns = np.flatnonzero(np.isin(v.mixer.inputs(units), groups) & v.known & (v.value != 0))
        if columns.size:
            rows = _shifted(network, v, columns, biases.get(v.mixer.position))
            if rows is None:
                return None
            found[v.mixer.position] = rows
    return found


def _shifted(network: Network, v: _Candidate, columns: np.ndarray,
             start: list[Fraction] | None) -> list[Fraction] | None:
    """The bias with the constants added, or None at the first row where it is not a number of the dtype."""
    op = network.nodes[v.mixer.position].op
    assert isinstance(op, Affine | Conv2d)
    taps = np.stack([_taps(op, int(column)) for column in columns], axis=1)
    values = [Fraction(float(value)) for value in v.value[columns]]
    rows = []
    for row, weights in enumerate(taps):
        total = Fraction(float(op.bias[row])) if start is None else start[row]
        for value, column in zip(values, weights, strict=True):
            total += value * sum((Fraction(float(w)) for w in column if w), Fraction(0))
        if not representable(total, network.dtype):
            return None
        rows.append(total)
    return rows


def _taps(op: Affine | Conv2d, column: int) -> np.ndarray:
    """Weights from one input unit to every output unit: shape (outputs, taps)."""
    if isinstance(op, Affine):
        return op.weight[:, column, None]
    per_group = op.weight.shape[1]
    taps = op.weight[:, column % per_group].reshape(op.weight.shape[0], -1).copy()
    outside = np.arange(op.weight.shape[0]) * op.groups // op.weight.shape[0] != column // per_group
    taps[outside] = 0
    return taps
