"""Every decider against exact enumeration (regions cut in rationals): no wrong verdict, nothing left open that should not be."""

from __future__ import annotations

import numpy as np
import pytest
from exact_regions import exact_ranges
from verified import agree, deep_case, small_case, wrong_verdicts

from exactprune import VerifyOptions, verify
from exactprune.claim import Method, Status
from exactprune.deciders.cascade import Cascade, Effort
from exactprune.options import DECIDERS
from exactprune.progress import Silent

COMPLETE = ("auto", "branch-and-bound")  # with so few neurons these must settle whatever is not within 1e-6 of 0


@pytest.mark.parametrize("decider", DECIDERS)
def test_no_verdict_is_wrong(decider: str) -> None:
    first = 10 * DECIDERS.index(decider)
    left = agree(range(first, first + 10), decider)
    assert left == 0 or decider not in COMPLETE


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("decider", DECIDERS)
def test_no_verdict_is_wrong_on_two_thousand_networks(decider: str) -> None:
    left = agree(range(1000, 3000), decider)
    assert left <= (0 if decider in COMPLETE else 200)


def test_each_decider_settles_what_bounds_leave_open() -> None:
    """The method that settled a neuron is the decider asked for (stable ones are proved by branch and bound or boxes)."""
    network, box = deep_case()
    open_ = verify(network, box, VerifyOptions(exact=False)).totals["unknown"]
    assert open_ > 0
    result = verify(network, box, VerifyOptions(decider="branch-and-bound"))
    methods = {Method(int(m)) for v in result.layers for m in v.method}
    assert result.totals["unknown"] == 0 and Method.BRANCH_AND_BOUND in methods


def test_stages_account_for_every_settled_neuron() -> None:
    network, box = small_case(4)
    result = verify(network, box)
    settled = sum(stage.settled for stage in result.stages)
    assert settled == result.totals["neurons"] - result.totals["unknown"]
    assert all(stage.seconds >= 0 for stage in result.stages)


def test_a_solver_that_lies_changes_no_verdict() -> None:
    """Suggestions are confirmed or proved: a solver that calls everything inactive costs nothing but a reason."""
    from exactprune.deciders.outcome import LayerSuggestions, Suggestion

    network, box = small_case(5)

    def lies(asked, lower, upper, seconds):
        for layer, (positive, negative) in asked.items():
            neurons = np.unique(np.concatenate([positive, negative]))
            outside = np.full(network.input_shape, 1e6)
            yield LayerSuggestions(layer, tuple(Suggestion(layer, int(n), Status.INACTIVE, positive=outside, negative=outside)
                                                for n in neurons))

    cascade = Cascade(network, box, Effort(decider="milp"), Silent(), None, lies)
    cascade.run()
    for layer, ranges in zip(cascade.layers, exact_ranges(network, box)):
        for status, (low, high) in zip(layer.status.tolist(), ranges):
            assert status != Status.INACTIVE or high <= 0
            assert status != Status.ACTIVE or low >= 0
            assert status != Status.UNSTABLE or low < 0 < high


@pytest.mark.parametrize("seed", range(3))
def test_memory_and_steps_of_time_never_make_a_wrong_verdict(seed: int) -> None:
    network, box = small_case(seed)
    ranges = exact_ranges(network, box)
    for options in (VerifyOptions(time_limit=1e-6), VerifyOptions(memory=2**24), VerifyOptions(exact=False)):
        assert not wrong_verdicts(verify(network, box, options), ranges)
