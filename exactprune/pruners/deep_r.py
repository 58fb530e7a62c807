"""DEEP R: connections have a fixed sign, do a noisy walk, and go when they cross zero.

G. Bellec, D. Kappel, W. Maass, R. Legenstein, "Deep rewiring: training very sparse deep networks", ICLR 2018, Algorithm 1.
A connection is w = s theta with s = +-1 fixed while it lasts. After every step theta also moves by -lr * alpha (L1) and by
sqrt(2 lr T) times normal noise; where theta < 0 the connection becomes dormant, and as many dormant ones, drawn
uniformly, become active with theta = 0 and a random sign.

Choices left open: the number of connections is held per layer (the paper's first experiments); a new connection starts at
1e-12 like the authors' code, since a weight of exactly 0 has no sign; temperature and L1 default to values of the
size of the authors' MNIST script.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.dynamic import DynamicOptions, DynamicPruner, grow
from exactprune.pruners.protocol import require

START = 1e-12


@dataclass(frozen=True)
class DeepROptions(DynamicOptions):
    """Options of ``deep-r``.

    Attributes:
        alpha: weight of the L1 drift.
        temperature: T of the random walk.
        interval: steps between rewirings; the paper's is 1.
        momentum: of sgd; the paper has none.
    """

    alpha: float = 1e-5
    temperature: float = 1e-10
    interval: int = 1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, "alpha", self.alpha, "a number >= 0")
        require(self.temperature >= 0, "temperature", self.temperature, "a number >= 0")


class DeepR(DynamicPruner[DeepROptions]):
    """Deep rewiring."""

    name: ClassVar[str] = "deep-r"
    reference: ClassVar[str] = "Bellec et al. 2018, Alg. 1"
    Options = DeepROptions

    def __init__(self, options: DeepROptions | None = None) -> None:
        super().__init__(options)
        self.signs: dict[str, Tensor] = {}

    def rewire(self, weights: dict[str, Tensor], masks: dict[str, Tensor], lr: float, generator: torch.Generator) -> None:
        """L1 drift, noise, and a new place for every connection that changed its sign."""
        for name, mask in masks.items():
            weight = weights[name]
            sign = self.signs.setdefault(name, _signs(weight))
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            walk = -lr * self.options.alpha + math.sqrt(2 * lr * self.options.temperature) * noise
            weight.add_(sign * walk * mask)
            gone = crossed(weight, sign, mask)
            mask &= ~gone
            weight.mul_(mask)
            new = grow(mask, int(gone.sum()), generator, forbidden=gone)
            mask.view(-1)[new] = True
            sign.view(-1)[new] = (2.0 * torch.randint(0, 2, (len(new),), generator=generator) - 1).to(sign)
            weight.view(-1)[new] = START * sign.view(-1)[new]


def crossed(weight: Tensor, sign: Tensor, mask: Tensor) -> Tensor:
    """True where a connection's weight has left its sign."""
    return mask & (weight * sign < 0)


def _signs(weight: Tensor) -> Tensor:
    return torch.where(weight < 0, -1.0, 1.0).to(weight)
