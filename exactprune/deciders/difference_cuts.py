"""Upper lines of a ReLU neuron that look at every input by itself, tighter than the triangle's.

The triangle bounds y = max(w . x + b, 0) by a line over z = w . x + b. Over a box of x the convex hull has many more facets
(Anderson, Huchette, Ma, Tjandraatmadja, Vielma, "Strong mixed-integer programming formulations for trained neural networks",
Math. Prog. 2020): y <= g . x + c with g_i = w_i on a set of inputs, a fraction of w_h on one, 0 elsewhere. The most violated
one at a point takes a sort (Tjandraatmadja et al., "The convex relaxation barrier, revisited", NeurIPS 2020, algorithm 1).

Why it is sound: for *any* g, y <= g . x + c holds on the box as soon as c is at least both of

    max over the box of -g . x          and          b + max over the box of (w - g) . x,

and that is what c is computed from, rounded outward. Where g comes from does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.linear_maps import DenseMap
from exactprune.bounds.program import TINY

LEAST = 1e-3  # of the largest gain of a layer: what is worth a cut


@dataclass(frozen=True, eq=False)
class Cut:
    """y of ``neuron`` of ReLU layer ``layer`` is at most ``weight`` . (value of node ``source``) + ``constant``."""

    layer: int
    neuron: int
    source: int
    weight: Tensor
    constant: float
    key: tuple[int, int, bytes]


@dataclass(frozen=True, eq=False)
class Cuts:
    """All cuts of one layer.

    Attributes:
        source: node they are lines over.
        index: (cuts,) their places in the list of all.
        owner: (cuts,) neuron.
        weight, constant: (cuts, inputs), (cuts,).
    """

    source: int
    index: Tensor
    owner: Tensor
    weight: Tensor
    constant: Tensor

    @staticmethod
    def of(cuts: Sequence[tuple[int, Cut]], device: torch.device) -> Cuts:
        """Some cuts of one layer with their places."""
        return Cuts(cuts[0][1].source, torch.tensor([i for i, _ in cuts], device=device),
                    torch.tensor([c.neuron for _, c in cuts], device=device), torch.stack([c.weight for _, c in cuts]),
                    torch.tensor([c.constant for _, c in cuts], dtype=torch.float64, device=device))


def separate(layer: int, source: int, mapping: DenseMap, box: NodeBounds, bounds: NodeBounds, points: Tensor, weight: Tensor,
             gamma: float) -> list[tuple[float, Cut]]:
    """Cuts that are below the triangle at some points, with what they gain there.

    Args:
        layer: of the neurons; source: the node that z is a linear map of.
        mapping: z = w x + b.
        box: bounds of x; bounds: of z; one box each.
        points: (rows, inputs).
        weight: (rows, neurons) >= 0: how much an upper line of this neuron matters.
        gamma: relative error of every sum.
    """
    low, high = box.lower[0], box.upper[0]
    neurons = torch.nonzero((bounds.lower[0] < 0) & (bounds.upper[0] > 0) & (weight > 0).any(dim=0)).flatten()
    if not len(neurons) or not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return []
    w = mapping.rows(neurons)
    bias = w.new_zeros(len(w)) if mapping.bias is None else mapping.bias[neurons]
    lower, upper = bounds.lower[0, neurons], bounds.upper[0, neurons]
    slope = upper / (upper - lower)
    found: list[tuple[float, Cut]] = []
    for x, v in zip(points, weight[:, neurons], strict=True):
        g = w * _shares(w, bias, low, high, x)
        constant = _constant(w, g, bias, low, high, gamma)
        gain = v * (slope * (w @ x + bias - lower) - (g @ x + constant))
        for j in torch.nonzero(gain > LEAST * gain.max().clamp(min=TINY)).flatten().tolist():
            if bool(torch.isfinite(constant[j])):
                key = int(neurons[j]), layer, (g[j] / w[j].abs().max()).to(torch.float16).numpy(force=True).tobytes()
                found.append((float(gain[j]), Cut(layer, int(neurons[j]), source, g[j], float(constant[j]), key)))
    return found


def _shares(w: Tensor, bias: Tensor, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    """Shares of w, (neurons, inputs), of the facet that is lowest at x."""
    width = (high - low).clamp(min=TINY)
    place = ((x - low) / width).clamp(0, 1)
    order = torch.where(w >= 0, place, 1 - place).argsort(dim=1)
    size = (w.abs() * (high - low)).gather(1, order)
    above = torch.maximum(w * low, w * high).sum(dim=1) + bias
    before = above[:, None] - (size.cumsum(dim=1) - size)
    share = (before / size.clamp(min=TINY)).clamp(0, 1)
    return torch.zeros_like(w).scatter_(1, order, share)


def _constant(w: Tensor, g: Tensor, bias: Tensor, low: Tensor, high: Tensor, gamma: float) -> Tensor:
    """The least c, rounded up so that it also pays for evaluating g . x."""
    rest, size = w - g, torch.maximum(low.abs(), high.abs())
    zero = torch.maximum(-g * low, -g * high).sum(dim=1)
    linear = torch.maximum(rest * low, rest * high).sum(dim=1) + bias
    error = ((w.abs() + 2 * g.abs()) @ size + bias.abs()) * (4 * gamma) + TINY
    return torch.maximum(zero, linear) + error
