"""The linear relaxation of a layer of ReLU neurons that backward bound propagation substitutes.

To bound a maximum, a ReLU output y = max(z, 0) with coefficient v >= 0 is replaced by the upper line s z + t through
(l, 0) and (u, u), and with v < 0 by alpha z with any alpha in [0, 1] (Zhang et al. 2018, "Efficient neural network
robustness certification with general
activation functions", CROWN; Xu et al. 2021, alpha-CROWN). Why it is sound in floating point: the slopes are *given*
numbers. For whatever float s the intercept t is rounded up to at least max(relu(z) - s z) over [l, u], and computing a = v s
instead of taking it exactly (and adding up v where several nodes read the neuron) is paid for by gamma abs(v) H, where H bounds
abs(z).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.linear_maps import DenseMap
from exactprune.bounds.program import TINY, UNIT_ROUNDOFF, Program

_INFLATE = 1 + 1e-6  # covers the rounding of the error terms themselves


@dataclass(frozen=True, eq=False)
class Step:
    """A relaxation over one box, as ``single`` uses it.

    Attributes:
        values: (4, neurons): low, gap, on_plus and on_all.
        alive: as in ``Relaxation``.
        weight: as in ``Relaxation``, transposed.
    """

    values: Tensor
    alive: Tensor | None
    weight: Tensor | None

    @cached_property
    def lines(self) -> tuple[Tensor, ...]:
        """low and gap as (neurons, 1), on_plus and on_all as (neurons,)."""
        low, gap, on_plus, on_all = self.values.unbind()
        return low.unsqueeze(1), gap.unsqueeze(1), on_plus, on_all


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Slopes and constants of one ReLU layer, (groups, neurons) each, or (groups, kept neurons) if compacted.

    A step of backward propagation with coefficients v is: total += max(v, 0) . on_plus - v . on_all and
    a = v * low + max(v, 0) * gap; both vectors already hold the bias and the error terms of the linear map below.

    Attributes:
        values: the next five, stacked.
        low: slope for v < 0.
        gap: slope for v >= 0 minus ``low``.
        on_plus, on_all: see above.
        intercept: t.
        alive: indices of the neurons that are not stably inactive, if compacted; None: all of them.
        weight: rows ``alive`` of the dense map below, if compacted.
    """

    values: Tensor
    alive: Tensor | None = None
    weight: Tensor | None = None

    @property
    def low(self) -> Tensor:
        return self.values[0]

    @property
    def gap(self) -> Tensor:
        return self.values[1]

    @property
    def on_plus(self) -> Tensor:
        return self.values[2]

    @property
    def on_all(self) -> Tensor:
        return self.values[3]

    @property
    def intercept(self) -> Tensor:
        return self.values[4]

    @cached_property
    def step(self) -> Step:
        """The same over the first box."""
        return Step(self.values[:4, 0], self.alive, None if self.weight is None else self.weight.T)

    def take(self, places: Tensor) -> Relaxation:
        """For some of the neurons (none left out so far)."""
        return Relaxation(self.values.index_select(2, places))


def fused(program: Program, layer: int) -> bool:
    """Whether a layer's pre-activation is a linear map that only this layer reads: its error terms then fold into ours."""
    position = program.preactivation(layer)
    return position >= 0 and program.maps[position] is not None and len(program.network.readers[position]) == 1


def upper_line(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Slope s (any float in [0, 1]) and intercept t >= max over [lower, upper] of relu(z) - s z."""
    width = (upper - lower).clamp(min=TINY)
    slope = (upper.clamp(min=0) / width).clamp(max=1)
    slope = torch.where(lower >= 0, torch.ones_like(slope), slope)
    above = upper.clamp(min=0) * (1 - slope)
    intercept = torch.maximum(slope * (-lower).clamp(min=0), above) * (1 + 8 * UNIT_ROUNDOFF)
    return slope, intercept


def adaptive_slope(lower: Tensor, upper: Tensor) -> Tensor:
    """CROWN's lower slope: 1 where the active part is the wider one, else 0."""
    return (upper > -lower).to(lower.dtype)


def relax(program: Program, layer: int, bounds: NodeBounds, alpha: Tensor | None = None, compact: bool = False) -> Relaxation:
    """The relaxation of a ReLU layer over its pre-activation bounds.

    Args:
        program: the network.
        layer: number of the ReLU layer.
        bounds: of its pre-activation, (groups, neurons).
        alpha: slopes in [0, 1] for v < 0 on unstable neurons, (groups, neurons); CROWN's adaptive rule by default.
        compact: leave stably inactive neurons out (one group only, dense map below).
    """
    plus, below = bounds.upper.clamp(min=0), bounds.lower.clamp(max=0).neg_()
    if alpha is not None:
        plus, below = plus.expand_as(alpha), below.expand_as(alpha)
    values = plus.new_empty(5, *plus.shape)
    low, gap, on_plus, on_all, intercept = values.unbind()
    width, alive = torch.add(plus, below).clamp_(min=TINY), plus > 0
    slope = plus / width  # at most 1: a sum is not below its terms
    intercept.copy_(torch.maximum(slope * below, torch.rsub(slope, 1).mul_(plus)).mul_(1 + 8 * UNIT_ROUNDOFF))
    if alpha is None:
        low.copy_(plus > below)
    else:
        torch.mul(torch.where(bounds.lower >= 0, 1.0, alpha), alive, out=low)
    torch.sub(slope, low, out=gap)
    mapping = program.maps[program.preactivation(layer)] if fused(program, layer) else None
    error = torch.maximum(plus, below).add_(intercept)
    if mapping is not None and bounds.error is not None:
        error.add_(bounds.error)
    error = torch.where(alive, error.mul_(program.gamma * _INFLATE).add_(TINY), 0.0)
    torch.add(intercept, error, alpha=2, out=on_plus)
    if mapping is not None and mapping.bias is not None:
        on_plus.addcmul_(gap, mapping.bias)
        torch.addcmul(error, low, mapping.bias, value=-1, out=on_all)
    else:
        on_all.copy_(error)
    return _compacted(program, layer, Relaxation(values), plus) if compact else Relaxation(values)


def _compacted(program: Program, layer: int, given: Relaxation, upper: Tensor) -> Relaxation:
    mapping = program.maps[program.preactivation(layer)] if fused(program, layer) else None
    if not isinstance(mapping, DenseMap) or len(upper) != 1:
        return given
    alive = torch.nonzero(upper[0] > 0).flatten()
    if alive.numel() > 0.85 * upper.shape[1]:
        return given
    return Relaxation(given.values.index_select(2, alive), alive, mapping.weight.index_select(0, alive))
