"""equiv: how far two networks can differ on a box, bounded from both sides, with the input where they do.

    a, b = exactprune.load("model.pt"), exactprune.load("small.pt")
    result = exactprune.equiv(a, b)
    result.upper, result.lower, result.point

The upper bound is the smaller one, output by output, of two sound ones: A and B side by side, and B written relative to
A (``bounds.difference``), which is far tighter where B comes from A. The lower bound is a point found by gradient search,
its difference computed in rationals. ``exact=True`` closes the gap: by splitting the box where it has few inputs, by
branch and bound over the phases of both networks otherwise, with points from a MILP. A solver's own bound is reported as
a suggestion and never as the upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import inf, isfinite, prod
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import numpy as np

from exactprune.domain import Box, uniform
from exactprune.errors import OptionError, ShapeError
from exactprune.network import Network
from exactprune.options import GIB
from exactprune.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor

    from exactprune.bounds.difference import Alone, Joint, Partners
    from exactprune.bounds.interval import NodeBounds
    from exactprune.bounds.layerwise import Layerwise
    from exactprune.deciders.difference_boxes import BoxSplit
    from exactprune.deciders.difference_pairs import PhaseSplit

FEW_INPUTS = 12
NEURONS, SECONDS = 0.2, 10.0  # of the time (without ``exact``: seconds) for the neurons of A and B, at most
SUGGESTING, TRYING = 0.15, 0.1  # shares of the time where there are more
APART = (1.0, 0.1, 0.01, 1e-3, 1e-5)


@dataclass(frozen=True, eq=False)
class Equivalence:
    """What is known about D = max over the domain and all outputs of abs(A - B), as real functions.

    Attributes:
        a, b, domain: what was asked.
        upper: certified, D <= upper.
        lower: D >= lower, attained at ``point``; ``value`` is the same number as a rational.
        point: input in A's shape, float64; where abs(A - B) = ``value`` at output ``output`` (a flat index).
        uppers, lowers: (outputs,) the same for every output by itself.
        points: (outputs, *input shape) where ``lowers`` are attained.
        partners: units of B that were compared with a unit of A, and units in all.
        closed: whether upper <= (1 + gap) * lower, or upper = 0.
        gap: the relative gap that was asked for.
        suggested: a MILP solver's bound on D, not certified; None if none was asked or it did not end.
        stages: (name, seconds, upper bound after it).
        reason: why the gap is not closed although ``exact`` was asked.
        seconds: of everything.
    """

    a: Network
    b: Network
    domain: Box
    upper: float
    lower: float
    value: Fraction
    point: np.ndarray
    output: int
    uppers: np.ndarray
    lowers: np.ndarray
    points: np.ndarray
    partners: tuple[int, int]
    closed: bool
    gap: float
    suggested: float | None
    stages: tuple[tuple[str, float, float], ...]
    reason: str
    seconds: float

    @property
    def ratio(self) -> float:
        """upper / lower; 1 where both are 0."""
        return 1.0 if self.upper == self.lower else self.upper / self.lower if self.lower else inf

    def within(self, tolerance: float) -> bool:
        """Whether abs(A - B) <= tolerance is proved for every input of the domain."""
        return self.upper <= tolerance

    def __str__(self) -> str:
        from exactprune.compress.levels import upward

        return (f"max abs({self.a.name} - {self.b.name}) over {self.domain.source}: at most {upward(self.upper)} (certified), "
                f"at least {self.lower:.6g} (found)")

    __repr__ = __str__


def equiv(a: Network, b: Network, domain: Box | None = None, *, exact: bool = False, gap: float = 1e-3,
          tolerance: float | None = None, time_limit: float = 600.0, partners: Mapping[int, Partners] | None = None,
          starts: int = 24, seed: int = 0, device: str = "cpu", memory: int = 2 * GIB,
          progress: Progress | None = None) -> Equivalence:
    """Bound max over the domain and outputs of abs(A - B).

    Args:
        a, b: networks with as many inputs and outputs; shapes and dtypes may differ.
        domain: the box, in A's input shape; the unit box by default.
        exact: go on until ``upper <= (1 + gap) * lower``, or until time is up.
        gap: relative gap, > 0.
        tolerance: with ``exact``, stop also once ``abs(A - B) <= tolerance`` is proved or refuted.
        time_limit: seconds for the exact stage.
        partners: ReLU layer of B -> ``bounds.difference.Partners``; found by sampling if None.
        starts: of the gradient search, per output and sign.
        seed: of the search and the sampling.
        device, memory: as for ``verify``.
        progress: told what happens.

    Raises:
        ShapeError: the networks do not have as many inputs and outputs.
        DomainError: the box does not fit.
        OptionError: an option is outside its range.
    """
    _check(a, b, gap, tolerance, time_limit, starts)
    began = perf_counter()
    domain = (domain or uniform(0.0, 1.0, a.input_shape)).reshaped(a.input_shape)
    run = _Run(a, b, domain, device, memory, partners, seed, progress or Silent())
    run.bound()
    run.search(starts)
    deadline = monotonic() + time_limit
    if not run.done(gap, tolerance):
        run.sharpen(NEURONS * time_limit if exact else SECONDS)
    if exact and not run.joint.equal:
        run.close(gap, tolerance, max(0.0, deadline - monotonic()))
    return run.result(gap, exact, began)


def _check(a: Network, b: Network, gap: float, tolerance: float | None, time_limit: float, starts: int) -> None:
    for what, of, other in (("inputs", a.input_shape, b.input_shape), ("outputs", a.output_shape, b.output_shape)):
        if prod(of) != prod(other):
            raise ShapeError(f"equiv: {a.name} has {prod(of)} {what} {list(of)}, {b.name} has {prod(other)} {list(other)}; "
                             "give networks of one interface")
    checks = (("gap", gap, gap > 0 and isfinite(gap), "a number > 0"), ("time-limit", time_limit, time_limit > 0, "seconds > 0"),
              ("starts", starts, starts >= 1, "a whole number >= 1"),
              ("tolerance", tolerance, tolerance is None or (tolerance >= 0 and isfinite(tolerance)), "a number >= 0"))
    for name, value, holds, words in checks:
        if not holds:
            raise OptionError(f"--{name} is {value!r}; give {words}")


class _Run:
    """The state of one call: bounds from above, points from below, and the account."""

    def __init__(self, a: Network, b: Network, domain: Box, device: str, memory: int, partners: Mapping[int, Partners] | None,
                 seed: int, progress: Progress) -> None:
        from exactprune.bounds.difference import joint_network
        from exactprune.deciders.difference_partners import find_partners
        from exactprune.deciders.difference_search import Search

        self.a, self.b, self.domain, self.device, self.memory, self.seed = a, b, domain, device, memory, seed
        self.clock, self.progress = perf_counter(), progress
        progress.stage("partners")
        self.stages: list[tuple[str, float, float]] = []
        self.joint = joint_network(a, b)
        given = find_partners(a, b, domain, seed=seed) if partners is None else partners
        self.given = dict(given)
        self.relative, self.paired = self.joint, 0
        self.chosen: Mapping[int, Partners] = {}
        self.tried: dict[int, float] = {}
        self.finder = Search(self.joint, domain, device)
        self.uppers = np.full(self.finder.outputs, 0.0 if self.joint.equal else inf)
        self.alone: Alone | None = None
        self.suggested: float | None = None
        self.reason = ""
        self.hints: list[Tensor] = []

    def note(self, name: str) -> None:
        """Close the account of a stage."""
        now = perf_counter()
        self.stages.append((name, now - self.clock, float(self.uppers.max(initial=0.0))))
        self.clock = now

    def bound(self) -> None:
        """Upper bounds from both joint networks."""
        self.note("partners")
        self.progress.stage("bounds")
        if not self.joint.equal:
            self._both()
            self.note("bounds")

    def _both(self) -> None:
        """Bounds side by side, and relative to partners from several distances; the best partners are kept."""
        self.tried.clear()
        self.side_by_side = self._bounded(self.joint)
        for apart in APART:
            self._try({k: p.within(apart) for k, p in self.given.items()})

    def _try(self, partners: Mapping[int, Partners]) -> None:
        """Bound the network relative to some partners; keep it if it is the best so far."""
        from exactprune.bounds.difference import joint_network

        partners = {k: p for k, p in partners.items() if (np.asarray(p.source) >= 0).any()}
        count = _paired(self.b, partners)
        if not count or count in self.tried:
            return
        joint = joint_network(self.a, self.b, partners)
        last = self._bounded(joint).at(joint.last)
        top = float(max(-last.lower.min(), last.upper.max()))
        self.tried[count] = top
        if top <= min(self.tried.values()):
            self.relative, self.paired, self.chosen = joint, count, partners

    def _bounded(self, joint: Joint) -> Layerwise:
        import torch

        from exactprune.bounds.difference import difference_bounds
        from exactprune.bounds.program import compile_network
        from exactprune.deciders.difference_search import bound_corners

        program = compile_network(joint.network, self.device)
        state = difference_bounds(program, joint, *program.box(self.domain), self.memory, self.alone)
        last = state.at(joint.last)
        top = torch.maximum(-last.lower, last.upper)[0].nan_to_num(inf, posinf=inf, neginf=inf)
        self.uppers = np.minimum(self.uppers, top.cpu().numpy())
        self.hints.append(bound_corners(state, joint))
        return state

    def search(self, starts: int) -> None:
        """Points where the difference is large."""
        import torch

        self.progress.stage("search")
        self.found = self.finder.judge(self.finder.lower[None])
        if not self.joint.equal:
            hints = torch.cat(self.hints)[:4096]
            self.found = self.finder.climb(hints, starts=starts, seed=self.seed)
        self.note("search")

    def sharpen(self, seconds: float) -> None:
        """Bounds again, with A's and B's own neurons decided as far as time allows: a pair of active neurons is linear."""
        self.alone = (self._decided(self.a, 0.5 * seconds), self._decided(self.b, 0.5 * seconds))
        self.note("neurons of A and B")
        self.progress.stage("bounds again")
        self._both()
        self.note("bounds again")

    def _decided(self, network: Network, seconds: float) -> list[NodeBounds]:
        """Bounds of all neurons: intervals, CROWN, alpha-CROWN, branch and bound."""
        from exactprune.deciders.cascade import Cascade, Effort

        cascade = Cascade(network, self.domain.reshaped(network.input_shape),
                          Effort(time_limit=seconds, memory=self.memory, device=self.device, seed=self.seed), self.progress)
        cascade.run()
        return [cascade.state.at(k) for k in range(len(network.relus))]

    def close(self, gap: float, tolerance: float | None, seconds: float) -> None:
        """Make the gap small."""
        if self.done(gap, tolerance):
            return
        deadline = monotonic() + seconds
        if int((self.domain.upper > self.domain.lower).sum()) <= FEW_INPUTS:
            self._split(gap, tolerance, deadline)
            return
        self._suggest(SUGGESTING * seconds)
        self._race(gap, tolerance, TRYING * seconds, deadline)

    def done(self, gap: float, tolerance: float | None) -> bool:
        """Whether the bounds are close enough, or the tolerance is decided."""
        upper, lower = float(self.uppers.max(initial=0.0)), float(self.found.lower.max(initial=0.0))
        decided = tolerance is not None and (upper <= tolerance or lower > tolerance)
        return decided or upper <= (1 + gap) * lower

    def _split(self, gap: float, tolerance: float | None, deadline: float) -> None:
        self._go_on(self._boxes(gap, tolerance), deadline)

    def _race(self, gap: float, tolerance: float | None, trial: float, deadline: float) -> None:
        """Boxes and phases for as long each; the one that has the better bound by then goes on."""
        best = inf
        chosen = ways = (self._boxes(gap, tolerance), self._phases(gap, tolerance))
        for way in ways:
            if not self.done(gap, tolerance):
                own = self._go_on(way, min(deadline, monotonic() + trial))
                best, chosen = (own, (way,)) if own < best else (best, chosen)
        if not self.done(gap, tolerance) and self.reason and "limit" in self.reason:
            self._go_on(chosen[0], deadline)

    def _go_on(self, way: BoxSplit | PhaseSplit, deadline: float) -> float:
        """Run until a time; the way's own bound."""
        self.progress.stage(f"{way.words}, at most {max(0.0, deadline - monotonic()):.0f} s")
        way.found, way.deadline = self.found.joined(way.found), deadline
        reached = way.run()
        self.uppers, self.found, self.reason = np.minimum(self.uppers, reached.upper), reached.found, reached.reason
        self.note(f"{way.words}, {reached.count:,} pieces")
        return float(reached.upper.max(initial=0.0))

    def _boxes(self, gap: float, tolerance: float | None) -> BoxSplit:
        from exactprune.bounds.program import compile_network
        from exactprune.deciders.difference_boxes import BoxSplit

        program, kept = compile_network(self.relative.network, self.device), self.memory // (40 * self.domain.lower.size)
        return BoxSplit(program, self.relative, self.finder, self.uppers, self.found, gap=gap, tolerance=tolerance,
                        deadline=inf, boxes=max(1000, kept), alone=self.alone)

    def _suggest(self, seconds: float) -> None:
        from exactprune.deciders.difference_phases import pairs_of, suggest

        self.progress.stage(f"MILP, at most {seconds:.0f} s")
        pairs = pairs_of(self.joint, self.relative, self._bounded(self.relative), self.chosen, self.a, self.b)
        self.suggested, points = suggest(self.joint, self.domain, self.side_by_side, self.uppers, self.found.lower, seconds,
                                         pairs)
        if len(points):
            self.found = self.found.joined(self.finder.judge(self.finder.forward.tensor(points)))
        self.note("MILP, suggests only")

    def _phases(self, gap: float, tolerance: float | None) -> PhaseSplit:
        from exactprune.deciders.difference_bounding import Bounding
        from exactprune.deciders.difference_pairs import PhaseSplit

        bounding = Bounding(self.relative, self._bounded(self.relative), self._of_b())
        return PhaseSplit(bounding, self.finder, self.uppers, self.found, gap=gap, tolerance=tolerance, deadline=inf,
                          memory=self.memory)

    def _of_b(self) -> dict[int, NodeBounds]:
        """Bounds of B by itself, by layer of the relative network."""
        from exactprune.bounds.layerwise import crown_bounds
        from exactprune.bounds.program import compile_network

        if not self.relative.deltas:
            return {}
        if self.alone is not None:
            return {k: self.alone[1][delta.layer] for k, delta in self.relative.deltas.items()}
        program = compile_network(self.b, self.device)
        bounds = crown_bounds(program, *program.box(self.domain.reshaped(self.b.input_shape)), self.memory)
        return {k: bounds[delta.layer] for k, delta in self.relative.deltas.items()}

    def result(self, gap: float, exact: bool, began: float) -> Equivalence:
        """Everything that is known."""
        from exactprune.deciders.difference_search import rounded_down

        value, output, point = self.finder.exact(self.found)
        lower, shape = rounded_down(value), self.a.input_shape
        lowers = self.found.lower.copy()
        lowers[output] = max(lowers[output], lower)
        upper = float(self.uppers.max(initial=0.0))
        closed = upper <= (1 + gap) * lower
        reason = self.reason if exact and not closed else ""
        return Equivalence(self.a, self.b, self.domain, upper, lower, value, point.reshape(shape), output, self.uppers, lowers,
                           self.found.points.reshape(-1, *shape), (self.paired, self.b.neurons), closed, gap, self.suggested,
                           tuple(self.stages), reason, perf_counter() - began)


def _paired(b: Network, partners: Mapping[int, Partners]) -> int:
    """Neurons of B with a partner."""
    return sum(prod(b.shapes[b.relus[k]][1:]) * int((np.asarray(p.source) >= 0).sum()) for k, p in partners.items())


__all__ = ["Equivalence", "equiv"]
