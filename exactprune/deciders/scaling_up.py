"""ISA: repeat one whole-network MILP until it finds no activation state that is new (Serra et al., NeurIPS 2021).

Before: states seen at sample points are struck off (the paper's preprocessing with training data). Each round then
maximises the number of newly seen states, and the states of every solution found are struck off; the round may end at
its first new solution, which is what the authors' lazy constraints do inside one tree. At the start of a round the LP
relaxation's input is run through the network, as their callback injects relaxation solutions. When the dual bound is
below 1, nothing new exists: a neuron never seen active is stably inactive, one never seen inactive stably active.

A state counts as seen by the network's float64 value at the solution's input. Solutions often lie on z_hat = 0 with
the phase chosen freely, so the solver also claims states that the network does not show. The published method
believes them (``confirm=False``). Here they are struck off too, so that rounds end, and then looked for: by an LP
inside the solution's activation region, and at the end by a MILP for the one neuron.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exactprune.deciders.highs import HighsOptions, SolveStatus, WarmLP, solve
from exactprune.deciders.milp import maximum
from exactprune.deciders.outcome import REACHED, LayerSuggestions, Side, Suggestion, all_preactivations, conclude
from exactprune.domain import Box
from exactprune.errors import SolverError
from exactprune.formulations.arrays import Kind
from exactprune.formulations.bigm import build
from exactprune.formulations.scaling_up import isa_arrays, isa_pyomo
from exactprune.network import Network

Neurons = Mapping[int, Iterable[int]]
NOTHING_NEW = 0.5
NO_LIMIT = 1e7


@dataclass
class _Search:
    """States still unseen, and what showed the others: the running state of one call of ``decide``."""

    network: Network
    box: Box
    active: dict[int, dict[int, np.ndarray | None]]
    inactive: dict[int, dict[int, np.ndarray | None]]
    open_active: dict[int, set[int]]
    open_inactive: dict[int, set[int]]
    rounds: int = 0
    nodes: int = 0
    reason: str = ""
    finished: bool = False

    @property
    def left(self) -> int:
        return sum(map(len, self.open_active.values())) + sum(map(len, self.open_inactive.values()))

    def observe(self, points: np.ndarray) -> int:
        """Strike off what the network does at these inputs; how many states were shown that had not been."""
        if not len(points):
            return 0
        shown = 0
        for layer, z_hat in enumerate(all_preactivations(self.network, points)):
            shown += _strike(self.open_active[layer], self.active[layer], z_hat > 0, points)
            shown += _strike(self.open_inactive[layer], self.inactive[layer], z_hat < 0, points)
        return shown

    def claims(self) -> list[tuple[int, int, int]]:
        """(sign, layer, neuron) of states that only the solver has seen."""
        return [(sign, layer, neuron) for sign, seen in ((1, self.active), (-1, self.inactive))
                for layer, points in seen.items() for neuron, point in points.items() if point is None]

    def arrays(self, sets: dict[int, set[int]]) -> dict[int, np.ndarray]:
        return {k: np.array(sorted(v), np.int64) for k, v in sets.items() if v}


def _strike(unseen: set[int], seen: dict[int, np.ndarray | None], hit: np.ndarray, points: np.ndarray) -> int:
    wanted = unseen | {i for i, point in seen.items() if point is None}
    shown = [i for i in wanted if hit[:, i].any()]
    for neuron in shown:
        seen[neuron] = points[int(np.argmax(hit[:, neuron]))]
        unseen.discard(neuron)
    return len(shown)


def decide(network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], *,
           ask_positive: Neurons | None = None, ask_negative: Neurons | None = None, samples: np.ndarray | None = None,
           options: HighsOptions | None = None, time_limit: float = np.inf, stop_at_first: bool = True,
           inject: bool = True, confirm: bool = True, solver: str | None = None,
           cancel: threading.Event | None = None) -> tuple[LayerSuggestions, ...]:
    """Suggestions for all ReLU layers by ISA.

    Args:
        network, box: what is asked about.
        lower, upper: bounds of every ReLU layer; interval bounds in the published method.
        ask_positive, ask_negative: layer -> neurons not yet known to reach z_hat > 0 (< 0); by default all that the
            bounds leave unstable.
        samples: inputs of shape (count, *input shape) whose states are struck off first.
        options: of each solve.
        time_limit: seconds for everything; what is left is unknown.
        stop_at_first: end a round at its first new solution rather than at its optimum.
        inject: try the LP relaxation's input before each round.
        confirm: look for an input behind every state that only the solver has seen, rather than believe it.
        solver: name of a Pyomo solver ("appsi_highs", "gurobi", "scip") for the Pyomo model; None for HiGHS on arrays.
        cancel: ends the search; what is left is unknown.

    Raises:
        SolverError: ``solver`` is not available.
    """
    began = time.perf_counter()
    box = box.reshaped(network.input_shape)
    lower, upper = ([np.asarray(a, np.float64).ravel() for a in bounds] for bounds in (lower, upper))
    search = _start(network, box, lower, upper, ask_positive, ask_negative)
    asked = {k: (set(search.open_active[k]), set(search.open_inactive[k])) for k in search.open_active}
    search.observe(np.zeros((0, *box.shape)) if samples is None else np.asarray(samples, np.float64))
    limits = options or HighsOptions(time_limit=NO_LIMIT)
    rounds = _Rounds(search, lower, upper, stop_at_first, inject, confirm, cancel) if solver is None \
        else _PyomoRounds(solver, search, lower, upper)
    while search.left and not search.finished and not search.reason:
        left = time_limit - (time.perf_counter() - began)
        if left <= 0 or (cancel is not None and cancel.is_set()):
            search.reason = "time limit" if left <= 0 else "cancelled"
            break
        rounds.next(replace(limits, time_limit=min(left, limits.time_limit)))
        search.rounds += 1
    sides = _confirm(search, lower, upper, limits, began + time_limit, cancel) if confirm else {}
    return _report(search, asked, sides, time.perf_counter() - began)


def _start(
    network: Network,
    box: Box,
    lower: Sequence[np.ndarray],
    upper: Sequence[np.ndarray],
    positive: Neurons | None,
    negative: Neurons | None,
) -> _Search:
    split = {k: set(np.flatnonzero((low < 0) & (high > 0)).tolist()) for k, (low, high) in enumerate(zip(lower, upper))}

    def asked(given: Neurons | None) -> dict[int, set[int]]:
        return {k: set(v) if given is None else set(map(int, given.get(k, ()))) & v for k, v in split.items()}

    return _Search(network, box, {k: {} for k in split}, {k: {} for k in split}, asked(positive), asked(negative))


class _Rounds:
    """Rounds on HiGHS: one model, only its objective changes."""

    def __init__(self, search: _Search, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], stop_at_first: bool,
                 inject: bool, confirm: bool, cancel: threading.Event | None) -> None:
        self._search, self._stop_at_first, self._inject, self._confirm = search, stop_at_first, inject, confirm
        self._cancel = cancel
        if not search.left:
            return
        self._model = isa_arrays(search.network, search.box, lower, upper, search.arrays(search.open_active),
                                 search.arrays(search.open_inactive))
        self._lp = WarmLP(self._model.arrays, "max", HighsOptions(time_limit=NO_LIMIT), cancel)

    def next(self, options: HighsOptions) -> None:
        """One round; the search is brought up to date."""
        search, until = self._search, time.perf_counter() + options.time_limit
        c = self._objective()
        if self._inject and self._try_relaxation(c, options):
            return
        found: list[np.ndarray] = []
        limits = replace(options, time_limit=max(0.0, until - time.perf_counter()))
        first = self._stop_at_first
        outcome = solve(
            self._model.arrays.with_objective(c),
            "max",
            limits,
            cancel=self._cancel,
            improving=found.append,
            stop=lambda best, bound: bound < NOTHING_NEW or (first and NOTHING_NEW < best < 1e300),
        )
        search.nodes += outcome.nodes
        search.finished = outcome.dual_bound < NOTHING_NEW
        before = search.left
        for y in [*found, *([] if outcome.x is None else [outcome.x])]:
            self._take(y, max(0.0, until - time.perf_counter()))
        if search.left == before and not search.finished:
            why = (
                outcome.reason
                if outcome.status is not SolveStatus.OPTIMAL
                else "no progress within the solver's tolerance"
            )
            search.reason = f"HiGHS: {why} (at most {outcome.dual_bound:.6g} of {search.left} states reachable)"

    def _objective(self) -> np.ndarray:
        c = np.zeros(self._model.arrays.c.size)
        for columns, unseen in ((self._model.active, self._search.open_active),
                                (self._model.inactive, self._search.open_inactive)):
            for layer, at in columns.items():
                c[at[np.isin(self._model.arrays.columns.index[at], sorted(unseen[layer]))]] = 1.0
        return c

    def _try_relaxation(self, c: np.ndarray, options: HighsOptions) -> bool:
        """Whether the LP relaxation ends the round: nothing is left, or its input shows something new."""
        outcome = self._lp.solve(c, time_limit=options.time_limit)
        if outcome.status is SolveStatus.OPTIMAL and outcome.dual_bound < NOTHING_NEW:
            self._search.finished = True
            return True
        return outcome.x is not None and self._search.observe(self._model.bigm.point(outcome.x)[None]) > 0

    def _take(self, y: np.ndarray, seconds: float) -> None:
        """Strike off what a solution shows and what it claims, and look for its claims in its activation region."""
        search, columns = self._search, self._model.arrays.columns
        search.observe(self._model.bigm.point(y)[None])
        for at_layer, unseen, seen in ((self._model.active, search.open_active, search.active),
                                       (self._model.inactive, search.open_inactive, search.inactive)):
            for layer, at in at_layer.items():
                for neuron in map(int, columns.index[at[y[at] > NOTHING_NEW]]):
                    if neuron in unseen[layer]:
                        unseen[layer].discard(neuron)
                        seen[layer][neuron] = None
        if self._confirm and search.claims():
            self._search_region(y, seconds)

    def _search_region(self, y: np.ndarray, seconds: float) -> None:
        columns = self._model.arrays.columns
        phases = np.isin(columns.kind, (Kind.PHASE, Kind.CHOICE))
        low, high = self._model.arrays.col_lower.copy(), self._model.arrays.col_upper.copy()
        low[phases] = high[phases] = np.round(y[phases])
        c = np.zeros(y.size)
        for sign, layer, neuron in self._search.claims():
            c[
                (columns.kind == (Kind.Z if sign > 0 else Kind.SLACK))
                & (columns.layer == layer)
                & (columns.index == neuron)
            ] = 1.0
        outcome = self._lp.solve(c, col_lower=low, col_upper=high, time_limit=seconds)
        if outcome.x is not None:
            self._search.observe(self._model.bigm.point(outcome.x)[None])


def _confirm(
    search: _Search,
    lower: Sequence[np.ndarray],
    upper: Sequence[np.ndarray],
    options: HighsOptions,
    until: float,
    cancel: threading.Event | None,
) -> dict[tuple[int, int, int], Side]:
    """What a MILP for the one neuron says about each state that only the solver has seen."""
    sides = {}
    for sign, layer, neuron in search.claims():
        left = until - time.perf_counter()
        model = build(search.network, search.box, lower, upper, target=layer, neurons=np.array([neuron]))
        limits = replace(options, time_limit=max(0.0, min(options.time_limit, left)))
        sides[sign, layer, neuron] = maximum(model, neuron, sign, limits, cancel)
    return sides


class _PyomoRounds:
    """Rounds with the Pyomo model and any Pyomo solver; the bound is the solver's own."""

    def __init__(self, solver: str, search: _Search, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray]) -> None:
        import pyomo.environ as pyo

        self._name, self._search, self._lower, self._upper = solver, search, lower, upper
        self._solver: Any = pyo.SolverFactory(solver)
        if not self._solver.available(exception_flag=False):
            raise SolverError(f"Pyomo cannot find the solver '{solver}'; install it, or leave the solver to HiGHS")

    def next(self, options: HighsOptions) -> None:
        """One round; the search is brought up to date."""
        search = self._search
        m = isa_pyomo(search.network, search.box, self._lower, self._upper, search.arrays(search.open_active),
                      search.arrays(search.open_inactive))
        bound, solved = self._solve(m, options)
        search.finished = bound < NOTHING_NEW
        if not solved:
            search.reason = "" if search.finished else f"{self._name}: no solution within the time limit"
            return
        before = search.left
        low, high = search.box.lower.ravel(), search.box.upper.ravel()
        x = np.array([low[i] if v.value is None else v.value for i, v in enumerate(m.x.values())])
        search.observe(np.clip(x, low, high).reshape(1, *search.box.shape))
        for variables, unseen, seen in (
            (m.p, search.open_active, search.active),
            (m.q, search.open_inactive, search.inactive),
        ):
            for (layer, neuron), variable in variables.items():
                if (variable.value or 0.0) > NOTHING_NEW and neuron in unseen[layer]:
                    unseen[layer].discard(neuron)
                    seen[layer][neuron] = None
        if search.left == before and not search.finished:
            search.reason = f"{self._name}: no progress (bound {bound:.6g})"

    def _solve(self, m: Any, options: HighsOptions) -> tuple[float, bool]:
        """(dual bound, whether there is a solution)."""
        if self._name.startswith("appsi_"):
            self._solver.config.time_limit = options.time_limit
            self._solver.config.load_solution = False
            result = self._solver.solve(m, load_solutions=False)
        else:
            result = self._solver.solve(m, load_solutions=False, timelimit=options.time_limit)
        bound = result.problem.upper_bound
        solved = len(result.solution) > 0 if not self._name.startswith("appsi_") else True
        try:
            if self._name.startswith("appsi_"):
                self._solver.load_vars()
            elif solved:
                m.solutions.load_from(result)
        except (RuntimeError, ValueError):
            solved = False
        return (float("inf") if bound is None or not np.isfinite(bound) else float(bound)), solved


def _report(search: _Search, asked: Mapping[int, tuple[set[int], set[int]]], sides: Mapping[tuple[int, int, int], Side],
            seconds: float) -> tuple[LayerSuggestions, ...]:
    layers = []
    for layer, (positive, negative) in asked.items():
        suggestions = tuple(
            _suggest(search, sides, layer, i, i in positive, i in negative) for i in sorted(positive | negative)
        )
        layers.append(LayerSuggestions(layer, suggestions, seconds / max(1, len(asked))))
    return tuple(layers)


def _suggest(search: _Search, sides: Mapping[tuple[int, int, int], Side], layer: int, neuron: int, positive: bool,
             negative: bool) -> Suggestion:
    most = _side(search, sides, 1, layer, neuron) if positive else REACHED
    least = _side(search, sides, -1, layer, neuron) if negative else REACHED
    return conclude(layer, neuron, most, least)


def _side(search: _Search, sides: Mapping[tuple[int, int, int], Side], sign: int, layer: int, neuron: int) -> Side:
    unseen, seen = ((search.open_active, search.active) if sign > 0 else (search.open_inactive, search.inactive))
    if neuron in unseen[layer]:
        return Side(bound=0.0) if search.finished else Side(reason=search.reason or "not finished")
    return sides.get((sign, layer, neuron), Side(reached=True, witness=seen[layer][neuron]))
