"""The largest difference of two networks by ReLU phases: a MILP suggests it, branch and bound proves it.

The joint network is given 2 n outputs +-(A - B) - t, and ``branch_and_bound`` is asked whether all of them are <= 0: its
bounds are sound in float64, so a "yes" proves abs(A - B) <= t without a solver, and a counterexample raises the lower
bound and with it t = (1 + gap) * lower. The MILP (``formulations.bigm``, HiGHS) serves for points and for a bound that is
reported as suggested.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nextafter
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.difference import Joint
from exactprune.bounds.dual import initial_rows
from exactprune.bounds.interval import propagate
from exactprune.bounds.layerwise import Layerwise
from exactprune.bounds.program import compile_network
from exactprune.deciders.branch_and_bound import BranchAndBound, Decision, Limits
from exactprune.deciders.difference_search import Largest, Search
from exactprune.deciders.highs import HighsOptions
from exactprune.deciders.milp import maximum
from exactprune.domain import Box
from exactprune.errors import ExactPruneError
from exactprune.formulations.bigm import build
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Affine, ReLU

NODES = 200_000
STEPS = 40


@dataclass(frozen=True, eq=False)
class Proof:
    """What branch and bound reached.

    Attributes:
        upper: (outputs,) sound bounds of abs(A - B).
        found: the largest differences met.
        nodes: how many were bounded.
        reason: why the gap is open; empty when it is closed.
    """

    upper: np.ndarray
    found: Largest
    nodes: int
    reason: str


# -- suggestions -------------------------------------------------------------------------------------------------------


def suggest(joint: Joint, box: Box, state: Layerwise, uppers: np.ndarray, lowers: np.ndarray,
            seconds: float) -> tuple[float | None, np.ndarray]:
    """A MILP's bound on the largest difference, which proves nothing, and its points (points, inputs).

    Args:
        joint: A and B side by side.
        box: the domain.
        state: bounds of the joint network.
        uppers, lowers: (outputs,) what is known.
        seconds: for all solves together.
    """
    deadline, best = monotonic() + seconds, float(lowers.max(initial=0.0))
    asked = [int(i) for i in np.argsort(-uppers, kind="stable") if uppers[i] > best]
    low, high = ([getattr(state.at(k), side)[0].cpu().numpy() for k in range(joint.last)] for side in ("lower", "upper"))
    points, bound = [], best
    try:
        model = build(joint.network, box, low, high, target=joint.last, neurons=np.array(asked))
    except ExactPruneError:
        return None, np.empty((0, box.lower.size))
    for i, output in enumerate(asked):
        left = (deadline - monotonic()) / (len(asked) - i)
        for sign in (1, -1):
            side = maximum(model, output, sign, HighsOptions(time_limit=max(0.0, left / 2)), stop_early=False)
            bound = max(bound, min(side.bound, float(uppers[output])))
            if side.witness is not None:
                points.append(side.witness.reshape(-1))
    return bound, np.array(points).reshape(-1, box.lower.size)


# -- proofs ------------------------------------------------------------------------------------------------------------


def prove(joint: Joint, state: Layerwise, search: Search, uppers: np.ndarray, found: Largest, *, gap: float,
          tolerance: float | None, deadline: float) -> Proof:
    """Lower the upper bounds to (1 + gap) times the largest difference, or to the tolerance.

    Args:
        joint: A and B side by side.
        state: bounds of every node of it over the box.
        search: judges points.
        uppers: (outputs,) what is known.
        found: points so far.
        gap, tolerance, deadline: see ``exactprune.equiv``.
    """
    uppers, nodes = uppers.copy(), 0
    while True:
        best = float(found.lower.max(initial=0.0))
        goal = (1 + gap) * best if tolerance is None or best > tolerance else max(tolerance, (1 + gap) * best)
        if float(uppers.max(initial=0.0)) <= goal or (tolerance is not None and best > tolerance):
            return Proof(uppers, found, nodes, "")
        if goal == 0:
            return Proof(uppers, found, nodes, "no difference was found, so there is no gap to close; give a tolerance")
        question = _Question(joint, state, search, uppers, found, goal)
        decisions = question.ask(deadline)
        nodes, found = nodes + sum(d.nodes for d in decisions), question.found
        question.tighten(uppers, decisions)
        reasons = [d.reason for d in decisions if d.reason and not d.refuted]
        if reasons and (monotonic() > deadline or not any(d.refuted for d in decisions)):
            return Proof(uppers, found, nodes, reasons[0])


class _Question:
    """Is abs(A - B) <= goal, for the outputs whose bounds are above it?"""

    def __init__(self, joint: Joint, state: Layerwise, search: Search, uppers: np.ndarray, found: Largest, goal: float) -> None:
        self.search, self.found, self.goal = search, found, goal
        self.asked = np.flatnonzero(uppers > goal)
        self.network = _shifted(joint, self.asked, goal)
        self.program = compile_network(self.network, state.program.device)
        difference = len(joint.network.nodes) - 2
        self.known = {i: b for i, b in state.known.items() if i <= difference}
        propagate(self.program, self.known, difference + 1)

    def ask(self, deadline: float) -> list[Decision]:
        """One decision for every output and sign."""
        count = 2 * len(self.asked)
        neurons = torch.arange(count, device=self.program.device)
        layer = len(self.network.relus) - 1
        rows = initial_rows(self.program, layer, neurons, torch.ones(count, dtype=torch.float64), self.known)
        widest = max(self.program.size(i) for i in range(INPUT, len(self.program.sizes)))
        batch = int(max(2, min(256, (1 << 31) // (8 * 24 * widest * max(1, len(rows.alpha))))))
        return BranchAndBound(self.program, self.known, rows, self._refute, Limits(deadline, NODES, batch, STEPS)).run()

    def _refute(self, points: Tensor, neurons: Tensor, signs: Tensor) -> Tensor:
        with torch.no_grad():
            values, errors = (t[-1] for t in self.search.forward.with_errors(points))
        self.found = self.found.joined(self.search.judge(points))
        output = torch.as_tensor(self.asked, device=points.device)[neurons % len(self.asked)]
        side = torch.where(neurons < len(self.asked), 1.0, -1.0)
        sure = values.gather(1, output[:, None])[:, 0] * side - errors.gather(1, output[:, None])[:, 0]
        return torch.nan_to_num(sure, nan=-inf) > self.goal

    def tighten(self, uppers: np.ndarray, decisions: list[Decision]) -> None:
        """Put what the decisions prove into ``uppers``: goal, plus what the open nodes leave."""
        for place, output in enumerate(self.asked):
            both = (decisions[place], decisions[place + len(self.asked)])
            if not any(d.refuted for d in both):
                left = max(0.0, *(d.bound for d in both))
                uppers[output] = min(uppers[output], nextafter(self.goal + left, inf) if left else self.goal)


def _shifted(joint: Joint, outputs: np.ndarray, goal: float) -> Network:
    """The joint network with the outputs +(A - B) - goal, -(A - B) - goal."""
    unit = np.eye(joint.network.output_shape[0])[outputs]
    shift = Affine(np.concatenate([unit, -unit]), np.full(2 * len(outputs), -goal))
    nodes = joint.network.nodes[:-1]
    ends = (Node("shifted", shift, (len(nodes) - 1,)), Node("open", ReLU(), (len(nodes),)))
    return Network((*nodes, *ends), joint.network.input_shape, joint.network.dtype, joint.network.name)
