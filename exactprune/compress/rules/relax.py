"""Rule ``relax``: a neuron that is not stable, but whose replacement by a line changes the output by at most a budget.

With z in [l, u] and l < 0 < u, relu(z) lies within ``gap`` of the line slope * z + shift:

==============  =================  ====================
slope           shift              gap
==============  =================  ====================
0 (a constant)  u / 2              u / 2
1               -l / 2             -l / 2
u / (u - l)     -l u / (2 (u - l))  -l u / (2 (u - l))
==============  =================  ====================

The third is the chord of the ReLU moved half way down (Ehlers 2017's triangle) and has the least gap, but needs a direction of
its own; a constant needs none. These lines join the stably active neurons of the layer and are merged with them
(``rules.merge``); the gaps, times the outgoing weights, are added to the block's deviation. This is the relaxed redundancy of
Lahav and Katz 2021 ("Pruning and Slicing Neural Networks using Formal Verification", FMCAD), with the deviation certified
for all neurons together. Level: ``certified(eps)``. A layer's neurons that are *unknown* are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exactprune.claim import LayerVerdict, Status

_WORTH = 1.25  # a chord has to be this much closer than a constant


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines that channels are replaced by; float64 arrays of shape (k,).

    Attributes:
        channels: which channels of the layer.
        slope, shift: of the line in the pre-activation.
        gap: bound on abs(relu(z) - line).
    """

    channels: np.ndarray
    slope: np.ndarray
    shift: np.ndarray
    gap: np.ndarray

    def first(self, order: np.ndarray) -> Lines:
        """The lines at these places."""
        return Lines(self.channels[order], self.slope[order], self.shift[order], self.gap[order])


def lines_of(verdict: LayerVerdict) -> Lines:
    """The line of every channel that is neither stable nor unknown anywhere."""
    status, lower, upper = (a.reshape(verdict.shape[0], -1) for a in (verdict.status, verdict.lower, verdict.upper))
    low, high = lower.min(axis=1), upper.max(axis=1)
    known = (status != Status.UNKNOWN).all(axis=1) & np.isfinite(low) & np.isfinite(high)
    channels = np.flatnonzero(known & (low < 0) & (high > 0))
    low, high = low[channels], high[channels]
    chord = high / (high - low)
    middle = -low * high / (high - low) / 2
    constant, identity = high / 2 <= _WORTH * middle, -low / 2 <= _WORTH * middle
    slope = np.where(constant, 0.0, np.where(identity, 1.0, chord))
    gap = np.where(constant, high / 2, np.where(identity, -low / 2, middle * (1 + 2.0**-48)))
    return Lines(channels, slope, np.where(constant, high / 2, np.where(identity, -low / 2, middle)), gap)
