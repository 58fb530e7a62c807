"""SET, sparse evolutionary training: after every epoch the weakest connections give way to random ones.

D. C. Mocanu, E. Mocanu, P. Stone, P. Nguyen, M. Gibescu, A. Liotta, "Scalable training of artificial neural networks with
adaptive sparse connectivity inspired by network science", Nature Communications 9:2383 (2018), Algorithm 1. Per layer the
fraction ``zeta`` of the smallest positive and of the largest negative weights goes; as many new connections grow at
random places. The first connections are an Erdos-Renyi graph: layer l gets a share in proportion to n_in + n_out.

Choices left open: ``rule`` = magnitude drops the ``zeta`` smallest abs(w) instead, as later code does; new weights are drawn
from a normal distribution of the layer's own standard deviation; a connection just dropped grows back only when no
other place is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exactprune.pruners.dynamic import DynamicOptions, DynamicPruner, grow
from exactprune.pruners.protocol import require
from exactprune.pruners.selection import count, smallest


@dataclass(frozen=True)
class SetOptions(DynamicOptions):
    """Options of ``set``.

    Attributes:
        zeta: share of a layer's connections that moves.
        rule: signed (the paper's) or magnitude.
    """

    zeta: float = 0.3
    rule: Literal["signed", "magnitude"] = "signed"
    start: Literal["uniform", "erdos-renyi"] = "erdos-renyi"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.zeta <= 1, "zeta", self.zeta, "a number from 0 to 1")
        require(self.rule in ("signed", "magnitude"), "rule", self.rule, "signed or magnitude")


class SparseEvolutionary(DynamicPruner[SetOptions]):
    """Sparse evolutionary training."""

    name: ClassVar[str] = "set"
    reference: ClassVar[str] = "Mocanu et al. 2018, Alg. 1"
    Options = SetOptions

    def rewire(self, weights: dict[str, Tensor], masks: dict[str, Tensor], lr: float, generator: torch.Generator) -> None:
        """Drop and grow the same number in every layer."""
        for name, mask in masks.items():
            weight, flat = weights[name].view(-1), mask.view(-1)
            gone = dropped(weight, flat, self.options.zeta, self.options.rule)
            spread = float(weight[flat].std()) if int(flat.sum()) > 1 else 0.0
            before = flat.clone()
            flat[gone], weight[gone] = False, 0
            new = grow(flat, len(gone), generator, forbidden=before & ~flat)
            flat[new] = True
            weight[new] = (torch.randn(len(new), generator=generator) * spread).to(weight)


def dropped(weight: Tensor, mask: Tensor, zeta: float, rule: str = "signed") -> Tensor:
    """Flat indices of the connections that go, ``zeta`` of each sign (signed) or of all (magnitude)."""
    groups = (mask & (weight > 0), mask & (weight <= 0)) if rule == "signed" else (mask,)
    parts = []
    for group in groups:
        places = group.nonzero().flatten()
        parts.append(places[smallest(weight[places].abs(), count(zeta, len(places)))])
    return torch.cat(parts)
