"""Maximum and minimum of a pre-activation by a big-M MILP with the best bounds known (Tjeng, Xiao, Tedrake, 2019).

One MILP per open side of a neuron. A solve ends as soon as the question is answered: the dual bound is below zero
(nothing there), or a solution is clearly above zero (a witness candidate). Only the dual bound suggests "never": a
time-out's objective is an incumbent, and an "infeasible" is a contradiction, since the network's own values are
always feasible.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from exactprune.deciders.highs import HighsOptions, HighsOutcome, SolveStatus, Stop, solve
from exactprune.deciders.outcome import REACHED, LayerSuggestions, Side, Suggestion, conclude, preactivation
from exactprune.domain import Box
from exactprune.formulations.bigm import BigM, build
from exactprune.network import Network

CLEAR = 1e-6


def decide(network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], layer: int,
           neurons: np.ndarray, *, ask_positive: np.ndarray | None = None, ask_negative: np.ndarray | None = None,
           options: HighsOptions | None = None, time_limit: float = np.inf,
           cancel: threading.Event | None = None) -> LayerSuggestions:
    """Suggestions for some neurons of one layer.

    Args:
        network, box: what is asked about.
        lower, upper: bounds of every ReLU layer before ``layer``.
        layer: the ReLU layer.
        neurons: flat indices.
        ask_positive, ask_negative: per neuron, whether it is open if z_hat > 0 (< 0) is reached; where False, a witness
            is known. All open by default.
        options: of each solve; its time limit is per side.
        time_limit: seconds for all of them.
        cancel: ends the rest as unknown.
    """
    began = time.perf_counter()
    neurons = np.asarray(neurons, np.int64)
    everything = np.ones(neurons.size, bool)
    positive = everything if ask_positive is None else np.asarray(ask_positive, bool)
    negative = everything if ask_negative is None else np.asarray(ask_negative, bool)
    model = build(network, box, lower, upper, target=layer, neurons=neurons)
    options = options or HighsOptions()
    found = []
    for neuron, plus, minus in zip(neurons, positive, negative, strict=True):
        left = time_limit - (time.perf_counter() - began)
        found.append(decide_neuron(model, int(neuron), bool(plus), bool(minus), _within(options, left / 2), cancel))
    return LayerSuggestions(layer, tuple(found), time.perf_counter() - began)


def decide_neuron(model: BigM, neuron: int, ask_positive: bool = True, ask_negative: bool = True,
                  options: HighsOptions | None = None, cancel: threading.Event | None = None) -> Suggestion:
    """The suggestion for one neuron of the model's target layer."""
    most = maximum(model, neuron, 1, options, cancel) if ask_positive else REACHED
    if most.bound <= 0:
        ask_negative = False
    least = (
        maximum(model, neuron, -1, options, cancel)
        if ask_negative
        else (REACHED if not most.bound <= 0 else Side())
    )
    assert model.target is not None
    return conclude(model.target, neuron, most, least)


def maximum(
    model: BigM,
    neuron: int,
    sign: int,
    options: HighsOptions | None = None,
    cancel: threading.Event | None = None,
    *,
    stop_early: bool = True,
) -> Side:
    """What a MILP says about the maximum of ``sign * z_hat``; without ``stop_early`` it goes on to the optimum."""
    options = options or HighsOptions()
    if options.time_limit <= 0 or (cancel is not None and cancel.is_set()):
        return Side(reason="no time left" if options.time_limit <= 0 else "cancelled")
    c, offset = model.objective(neuron)
    arrays = model.arrays.with_objective(sign * c, sign * offset)
    outcome = solve(
        arrays, "max", options, stop=_answered(arrays.c, arrays.offset) if stop_early else None, cancel=cancel
    )
    return read(model, neuron, sign, outcome)


def read(model: BigM, neuron: int, sign: int, outcome: HighsOutcome) -> Side:
    """A solve's outcome as a side; a witness candidate counts by its float64 value, not by the solver's."""
    witness = None
    if outcome.x is not None and model.target is not None:
        point = model.point(outcome.x)
        if sign * preactivation(model.network, point, model.target)[neuron] > 0:
            witness = point
    reason = "" if witness is not None or outcome.dual_bound <= 0 else _why(outcome)
    return Side(outcome.dual_bound, witness is not None, witness, reason, outcome.nodes, outcome.seconds)


def _why(outcome: HighsOutcome) -> str:
    if outcome.status in (SolveStatus.OPTIMAL, SolveStatus.STOPPED):
        values = f"solution {outcome.objective:.3g}, bound {outcome.dual_bound:.3g}"
        return f"within the solver's tolerance of zero ({values})"
    if outcome.status is SolveStatus.INFEASIBLE:
        return "HiGHS claims that the network has no values (numerical trouble)"
    return f"HiGHS: {outcome.reason} (bound {outcome.dual_bound:.6g})"


def _answered(c: np.ndarray, offset: float) -> Stop:
    """Stop once the sign is known: bound below zero, or solution above zero by a millionth of the range."""
    clear = CLEAR * max(float(np.abs(c).max(initial=0.0)), 1e-300)
    return lambda solution, bound: bool(bound < 0 or clear < solution < 1e300)


def _within(options: HighsOptions, seconds: float) -> HighsOptions:
    """Options with their time limit cut to what is left."""
    return options if seconds >= options.time_limit else replace(options, time_limit=max(0.0, seconds))
