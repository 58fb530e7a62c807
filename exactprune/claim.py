"""What is said about neurons: statuses, verdicts of a layer, and outcomes of a decider. Plain data, no computing.

For a neuron with pre-activation z_hat over a box D: *stably inactive* means z_hat <= 0 on D, *stably active* means
z_hat >= 0 on D (a neuron that is 0 everywhere counts as inactive), *unstable* means z_hat takes a value > 0 and a value
< 0 on D, and *unknown* means that none of these is proved; it always comes with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from exactprune.ops import Shape, frozen


class Status(IntEnum):
    """Status of a neuron over the domain."""

    UNKNOWN = 0
    INACTIVE = 1
    ACTIVE = 2
    UNSTABLE = 3

    @property
    def word(self) -> str:
        """Lower-case name, as in neurons.csv."""
        return self.name.lower()


class Method(IntEnum):
    """What settled a neuron's status."""

    NONE = 0
    INTERVAL = 1
    CROWN = 2
    ALPHA_CROWN = 3
    CORNER = 4
    SAMPLE = 5
    DATA = 6
    ASCENT = 7
    INPUT_SPLIT = 8
    BRANCH_AND_BOUND = 9
    LP = 10
    MILP = 11
    SCALING_UP = 12
    LEO = 13

    @property
    def word(self) -> str:
        """Name as in neurons.csv, for example ``alpha-crown``; empty when nothing settled it."""
        return "" if self is Method.NONE else self.name.lower().replace("_", "-")


@dataclass(frozen=True, eq=False)
class LayerVerdict:
    """Verdicts of one ReLU layer; all arrays are flat, in C order of the layer's shape.

    Attributes:
        layer: number of the ReLU layer, from 0 in topological order.
        node: name of the ReLU node.
        shape: of the layer, without batch axis.
        status: int8, values of ``Status``.
        method: int8, values of ``Method``.
        lower, upper: float64, sound bounds on the pre-activation over the domain.
        reasons: index -> why the neuron is unknown.
    """

    layer: int
    node: str
    shape: Shape
    status: np.ndarray
    method: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in (("status", np.int8), ("method", np.int8), ("lower", np.float64), ("upper", np.float64)):
            object.__setattr__(self, name, frozen(np.asarray(getattr(self, name), dtype=dtype).reshape(-1)))

    def count(self, status: Status) -> int:
        """How many neurons have ``status``."""
        return int((self.status == status).sum())

    def indices(self, status: Status) -> np.ndarray:
        """Flat indices of the neurons with ``status``."""
        return np.flatnonzero(self.status == status)

    def counts(self) -> dict[str, int]:
        """``{neurons, inactive, active, unstable, unknown}``."""
        words = {s.word: self.count(s) for s in (Status.INACTIVE, Status.ACTIVE, Status.UNSTABLE, Status.UNKNOWN)}
        return {"neurons": self.status.size, **words}
