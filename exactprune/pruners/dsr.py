"""DSR, dynamic sparse reparameterization: a global threshold drops, and layers that kept more grow more.

H. Mostafa, X. Wang, "Parameter efficient training of deep convolutional neural networks by dynamic sparse reparameterization",
ICML 2019, Algorithm 1. Every weight with abs(w) < H goes, in all layers. If K went, H doubles when K < (1 - delta) N and
halves when K > (1 + delta) N, so that about N go next time. K new connections grow at random places with value 0; layer l
gets the share R_l / sum R of them, R_l being the weights it kept.

Choices left open: N is ``target`` of all connections, H starts at ``threshold``, delta at 0.1; shares are rounded so
that they add up to K exactly (largest remainders), and what finds no room in a layer goes to the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exactprune.pruners.dynamic import DynamicOptions, DynamicPruner, grow, spread
from exactprune.pruners.protocol import require


@dataclass(frozen=True)
class DsrOptions(DynamicOptions):
    """Options of ``dsr``.

    Attributes:
        threshold: H at the start.
        target: share of the connections that should move.
        tolerance: delta.
    """

    threshold: float = 1e-3
    target: float = 0.01
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold > 0, "threshold", self.threshold, "a number > 0")
        require(0 < self.target < 1, "target", self.target, "a number between 0 and 1")
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "a number from 0 to below 1")


class Dsr(DynamicPruner[DsrOptions]):
    """Dynamic sparse reparameterization."""

    name: ClassVar[str] = "dsr"
    reference: ClassVar[str] = "Mostafa & Wang 2019, Alg. 1"
    Options = DsrOptions

    def __init__(self, options: DsrOptions | None = None) -> None:
        super().__init__(options)
        self.threshold = self.options.threshold

    def rewire(self, weights: dict[str, Tensor], masks: dict[str, Tensor], lr: float, generator: torch.Generator) -> None:
        """Drop below the threshold everywhere, grow where weights were kept, adapt the threshold."""
        connections = sum(int(mask.sum()) for mask in masks.values())
        gone = {name: dropped(weights[name], mask, self.threshold) for name, mask in masks.items()}
        total = sum(int(g.sum()) for g in gone.values())
        for name, mask in masks.items():
            mask &= ~gone[name]
            weights[name].mul_(mask)
        kept = [int(mask.sum()) for mask in masks.values()]
        shares = spread(total, growth(kept, total), [m.numel() - k for m, k in zip(masks.values(), kept)])
        for (name, mask), number in zip(masks.items(), shares):
            mask.view(-1)[grow(mask, number, generator, forbidden=gone[name])] = True
        self.threshold = adapted(self.threshold, total, self.options.target * connections, self.options.tolerance)


def dropped(weight: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """True where a connection has abs(w) < threshold."""
    return mask & (weight.abs() < threshold)


def growth(kept: list[int], total: int) -> list[float]:
    """Connections that each layer should grow, before rounding."""
    everything = sum(kept)
    return [total * k / everything if everything else total / len(kept) for k in kept]


def adapted(threshold: float, gone: int, wanted: float, tolerance: float) -> float:
    """The next threshold."""
    if gone < (1 - tolerance) * wanted:
        return 2 * threshold
    return threshold / 2 if gone > (1 + tolerance) * wanted else threshold
