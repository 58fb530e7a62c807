"""Levels of a claim about an original network f and a compressed network g over a box D, with the words for each.

=================  ======================================================  =========================================
level              claim                                                   how it is established
=================  ======================================================  =========================================
``exact``          f(x) = g(x) as real functions for every x in D          identities in rational numbers
``certified(e)``   max over D and outputs of abs(f - g) <= e (reals)       rigorous error bounds, added up
``float(e)``       the same for IEEE execution                             forward error analysis of both networks
``measured``       on N inputs only                                        run
=================  ======================================================  =========================================

Levels compose along a chain of rewrites f = f_0 -> f_1 -> ... -> g: by the triangle inequality errors add, and the kind
of the result is the weakest kind met (exact < certified < float < measured).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from enum import IntEnum

from exactprune.errors import OptionError


class Kind(IntEnum):
    """Kinds of claim, from the strongest to the weakest."""

    EXACT = 0
    CERTIFIED = 1
    FLOAT = 2
    MEASURED = 3


def upward(eps: float) -> str:
    """``eps`` in three digits, rounded up: a printed bound must not be smaller than the proved one."""
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal_from_float(eps)):.3g}"


@dataclass(frozen=True)
class Level:
    """What is claimed about a rewrite.

    Attributes:
        kind: see ``Kind``.
        eps: bound on the deviation (``certified``, ``float``) or the largest one seen (``measured``); 0 for ``exact``.
        inputs: number of inputs a ``measured`` level rests on.
    """

    kind: Kind
    eps: float = 0.0
    inputs: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps >= 0) or (self.kind is Kind.EXACT and self.eps):
            raise OptionError(f"level {self.kind.name.lower()} with eps {self.eps}: must be finite, >= 0, 0 for exact")

    def __add__(self, other: Level) -> Level:
        """The level of two rewrites one after the other; the sum of errors is rounded up."""
        total = self.eps + other.eps
        if self.eps and other.eps:
            total = math.nextafter(total, math.inf)
        return Level(max(self.kind, other.kind), total, max(self.inputs, other.inputs))

    def __str__(self) -> str:
        name = self.kind.name.lower()
        return f"{name}({upward(self.eps)})" if self.kind in (Kind.CERTIFIED, Kind.FLOAT) else name

    @property
    def words(self) -> str:
        """The claim in one sentence; f is the original network, g the compressed one, D the domain."""
        if self.kind is Kind.EXACT:
            return "exact: f(x) = g(x) as real functions for every x in D"
        if self.kind is Kind.CERTIFIED:
            return (f"certified({upward(self.eps)}): max over D and outputs of abs(f - g) <= {upward(self.eps)}, "
                    "as real functions")
        if self.kind is Kind.FLOAT:
            return (f"float({upward(self.eps)}): max over D and outputs of abs(f - g) <= {upward(self.eps)} for IEEE "
                    "execution, any summation order")
        return f"measured: on {self.inputs} inputs, max abs(f - g) was {upward(self.eps)}"


EXACT = Level(Kind.EXACT)


def certified(eps: float) -> Level:
    """max over D of abs(f - g) <= eps as real functions; ``exact`` when eps is 0."""
    return Level(Kind.CERTIFIED, float(eps)) if eps else EXACT


def floating(eps: float) -> Level:
    """max over D of abs(f - g) <= eps for IEEE execution."""
    return Level(Kind.FLOAT, float(eps))


def measured(eps: float, inputs: int) -> Level:
    """On ``inputs`` inputs the largest deviation was eps."""
    return Level(Kind.MEASURED, float(eps), inputs)
