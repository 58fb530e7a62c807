"""What a solver suggests about neurons: values that a certificate or an exact evaluation has yet to confirm.

A suggestion is never a verdict. ``inactive`` and ``active`` become verdicts when a certificate holds without the
solver, ``unstable`` when both witness candidates are confirmed in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exactprune.claim import Status
from exactprune.network import Network


@dataclass(frozen=True, eq=False)
class Side:
    """What is known about the maximum of z_hat (or of -z_hat, for the minimum) of one neuron.

    Attributes:
        bound: suggested upper bound on that maximum; infinite when nothing is known.
        reached: whether a value > 0 is known to be reached (candidate or known before).
        witness: the input that reaches it in float64, if it was found here.
        reason: why the side is open, empty when it is not.
        nodes: branch-and-bound nodes spent.
        seconds: time spent.
    """

    bound: float = float("inf")
    reached: bool = False
    witness: np.ndarray | None = None
    reason: str = ""
    nodes: int = 0
    seconds: float = 0.0


REACHED = Side(reached=True)


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What a solver suggests about one neuron.

    Attributes:
        layer, neuron: ReLU layer and flat index.
        status: the suggested status; ``UNKNOWN`` comes with a reason.
        upper, lower: suggested bounds on z_hat, infinite where nothing is known.
        positive, negative: inputs (in the input's shape) where z_hat > 0 and < 0 in float64, if found here.
        reason: why unknown, empty otherwise.
        nodes: branch-and-bound nodes; ``seconds``: time spent.
    """

    layer: int
    neuron: int
    status: Status
    upper: float = float("inf")
    lower: float = float("-inf")
    positive: np.ndarray | None = None
    negative: np.ndarray | None = None
    reason: str = ""
    nodes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerSuggestions:
    """Suggestions for some neurons of one ReLU layer, in order of the neurons."""

    layer: int
    suggestions: tuple[Suggestion, ...]
    seconds: float = 0.0

    def count(self, status: Status) -> int:
        """How many neurons are suggested to have ``status``."""
        return sum(s.status is status for s in self.suggestions)

    def __iter__(self):
        return iter(self.suggestions)

    def __len__(self) -> int:
        return len(self.suggestions)

    def __repr__(self) -> str:
        words = ", ".join(
            f"{self.count(s)} {s.word}" for s in (Status.INACTIVE, Status.ACTIVE, Status.UNSTABLE, Status.UNKNOWN)
        )
        return f"LayerSuggestions(layer {self.layer}: {words}, {self.seconds:.2f} s)"


def conclude(layer: int, neuron: int, most: Side, least: Side) -> Suggestion:
    """A suggestion from the maximum of z_hat (``most``) and of -z_hat (``least``).

    A bound counts before a witness: a side with bound <= 0 and a float64 witness > 0 contradicts itself and is unknown.
    """
    status, reason = _status(most, least)
    return Suggestion(layer, neuron, status, most.bound, -least.bound, most.witness, least.witness, reason,
                      most.nodes + least.nodes, most.seconds + least.seconds)


def _status(most: Side, least: Side) -> tuple[Status, str]:
    for side, sign in ((most, ">"), (least, "<")):
        if side.reached and side.bound <= 0:
            return Status.UNKNOWN, f"the solver excludes z_hat {sign} 0, which is reached"
    if most.bound <= 0:
        return Status.INACTIVE, ""
    if least.bound <= 0:
        return Status.ACTIVE, ""
    if most.reached and least.reached:
        return Status.UNSTABLE, ""
    reasons = [f"{name}: {side.reason or 'not asked'}" for name, side in (("maximum", most), ("minimum", least))
               if not side.reached]
    return Status.UNKNOWN, "; ".join(reasons)


def preactivation(network: Network, x: np.ndarray, layer: int) -> np.ndarray:
    """z_hat of ReLU layer ``layer`` at one input in float64, flat."""
    before = network.nodes[network.relus[layer]].inputs[0]
    return network.evaluate_nodes(np.asarray(x, np.float64)[None], np.float64)[before].reshape(-1)


def all_preactivations(network: Network, points: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    """z_hat of every ReLU layer at a batch of inputs in float64, each of shape (batch, neurons)."""
    values = network.evaluate_nodes(np.asarray(points, np.float64), np.float64)
    return [values[network.nodes[r].inputs[0]].reshape(len(points), -1) for r in network.relus]
