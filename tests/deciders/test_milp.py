"""One MILP per side, against exact one-dimensional enumeration and phase enumeration."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from exact_truth import exact_ranges_1d, exact_status, extremum_by_phases, interval_bounds, mlp, random_1d, random_mlp

from exactprune.claim import Status
from exactprune.deciders.highs import HighsOptions
from exactprune.deciders.milp import decide, maximum
from exactprune.deciders.outcome import REACHED, Side, Suggestion, conclude, preactivation
from exactprune.domain import uniform
from exactprune.formulations.bigm import build

TOLERANCE = 1e-5


def agree(seeds: range) -> None:
    """Suggestions for every neuron of every layer are the truth; unknown only where the truth is within tolerance of
    0."""
    for seed in seeds:
        network, box = random_1d(np.random.default_rng(seed))
        low, high = interval_bounds(network, box)
        for layer, ranges in enumerate(exact_ranges_1d(network, box)):
            for s in decide(network, box, low, high, layer, np.arange(len(ranges))):
                check(s, *ranges[s.neuron], network, box, seed)


def check(s: Suggestion, least, most, network, box, seed: int) -> None:
    near = min(abs(float(least)), abs(float(most))) < TOLERANCE
    assert s.status is exact_status(least, most) or near, (seed, s, float(least), float(most))
    for point, sign in ((s.positive, 1), (s.negative, -1)):
        if point is not None:
            assert box.contains(point[None])[0]
            assert sign * preactivation(network, point, s.layer)[s.neuron] > 0
    assert s.status is not Status.UNSTABLE or (s.positive is not None and s.negative is not None)
    assert (s.status is Status.UNKNOWN) == bool(s.reason)


def test_agrees_with_exact_enumeration() -> None:
    agree(range(200))


@pytest.mark.slow
def test_agrees_with_exact_enumeration_at_length() -> None:
    agree(range(200, 2400))


@pytest.mark.parametrize("seed", range(4))
def test_the_maximum_is_exact(seed: int) -> None:
    network = random_mlp(np.random.default_rng(seed), [4, 4, 3, 2, 1])
    box = uniform(-1, 1, (4,))
    low, high = interval_bounds(network, box)
    model = build(network, box, low, high, target=2)
    for sign in (1, -1):
        side = maximum(model, 1, sign, stop_early=False)
        assert side.bound == pytest.approx(extremum_by_phases(network, box, 2, 1, sign), abs=1e-5)


def test_only_open_sides_are_asked() -> None:
    network, box = random_mlp(np.random.default_rng(1), [2, 4, 3, 1]), uniform(-1, 1, (2,))
    low, high = interval_bounds(network, box)
    found = decide(network, box, low, high, 1, np.arange(3), ask_positive=np.array([True, False, False]),
                   ask_negative=np.array([False, True, False]))
    first, second, third = found
    assert first.negative is None and first.lower == -np.inf
    assert second.positive is None and second.upper == np.inf
    assert third.status is Status.UNSTABLE, "both sides were known before"
    assert len(found) == 3 and "LayerSuggestions(layer 1" in repr(found)


def test_time_and_cancel_end_as_unknown() -> None:
    network, box = random_mlp(np.random.default_rng(0), [20, 30, 30, 10, 1]), uniform(-1, 1, (20,))
    low, high = interval_bounds(network, box)
    for s in decide(network, box, low, high, 2, np.arange(2), time_limit=0.0):
        assert s.status is Status.UNKNOWN and "no time left" in s.reason
    cancel = threading.Event()
    cancel.set()
    for s in decide(network, box, low, high, 2, np.arange(2), cancel=cancel):
        assert s.status is Status.UNKNOWN and "cancelled" in s.reason
    for s in decide(network, box, low, high, 2, np.arange(2), options=HighsOptions(time_limit=0.05)):
        assert s.status is not Status.UNKNOWN or "HiGHS" in s.reason or "tolerance" in s.reason
        assert s.upper >= s.lower


@pytest.mark.parametrize(("bias", "status"), [(0.0, Status.INACTIVE), (-1.0, Status.INACTIVE), (1.0, Status.ACTIVE)])
def test_a_neuron_that_reads_nothing(bias: float, status: Status) -> None:
    network = mlp([(np.ones((2, 1)), np.zeros(2)), (np.zeros((1, 2)), np.array([bias])), (np.eye(1), np.zeros(1))])
    box = uniform(-1, 1, (1,))
    low, high = interval_bounds(network, box)
    (found,) = decide(network, box, low, high, 1, np.array([0]))
    assert found.status is status


class TestConclude:
    def test_a_bound_that_contradicts_a_witness_is_unknown(self) -> None:
        s = conclude(0, 0, Side(bound=-1.0, reached=True), REACHED)
        assert s.status is Status.UNKNOWN and "excludes z_hat > 0" in s.reason
        assert conclude(0, 0, REACHED, Side(bound=0.0, reached=True)).status is Status.UNKNOWN

    def test_bounds_and_witnesses(self) -> None:
        assert conclude(0, 0, Side(bound=0.0), Side()).status is Status.INACTIVE
        assert conclude(0, 0, REACHED, Side(bound=-0.5)).status is Status.ACTIVE
        assert conclude(0, 0, REACHED, REACHED).status is Status.UNSTABLE
        assert conclude(0, 0, Side(reason="time limit"), REACHED).reason == "maximum: time limit"
        assert conclude(0, 0, Side(bound=float("nan")), REACHED).status is Status.UNKNOWN
