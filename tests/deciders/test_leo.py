"""LEO against exact enumeration, and the other deciders."""

from __future__ import annotations

import numpy as np
import pytest
from exact_truth import exact_ranges_1d, exact_status, interval_bounds, random_1d, random_mlp

from exactprune.claim import Status
from exactprune.deciders import leo, milp
from exactprune.domain import uniform

TOLERANCE = 1e-5


def agree(seeds: range) -> None:
    for seed in seeds:
        network, box = random_1d(np.random.default_rng(seed))
        low, high = interval_bounds(network, box)
        ranges = exact_ranges_1d(network, box)
        for layer in leo.decide(network, box, low, high):
            assert [s.neuron for s in layer] == list(range(len(ranges[layer.layer])))
            for s in layer:
                least, most = ranges[s.layer][s.neuron]
                near = min(abs(float(least)), abs(float(most))) < TOLERANCE
                assert s.status is exact_status(least, most) or near, (seed, s, float(least), float(most))


def test_agrees_with_exact_enumeration() -> None:
    agree(range(200))


@pytest.mark.slow
def test_agrees_with_exact_enumeration_at_length() -> None:
    agree(range(200, 2400))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_milp_on_several_inputs(seed: int) -> None:
    network, box = random_mlp(np.random.default_rng(seed), [6, 8, 6, 1], bias=1.5), uniform(-1, 1, (6,))
    low, high = interval_bounds(network, box)
    for layer in leo.decide(network, box, low, high):
        other = milp.decide(network, box, low, high, layer.layer, np.arange(len(layer)))
        assert [s.status for s in layer] == [s.status for s in other]


def test_some_neurons_only_and_bounds_left_alone() -> None:
    network, box = random_mlp(np.random.default_rng(0), [3, 6, 6, 1]), uniform(-1, 1, (3,))
    low, high = interval_bounds(network, box)
    before = [a.copy() for a in (*low, *high)]
    first, second = leo.decide(network, box, low, high, neurons={1: [4, 2]})
    assert (len(first), [s.neuron for s in second]) == (0, [4, 2])
    assert all(np.array_equal(a, b) for a, b in zip(before, (*low, *high), strict=True))


def test_no_time_is_unknown() -> None:
    network, box = random_mlp(np.random.default_rng(0), [3, 6, 6, 1]), uniform(-1, 1, (3,))
    low, high = interval_bounds(network, box)
    for layer in leo.decide(network, box, low, high, time_limit=0.0):
        assert all(s.status is Status.UNKNOWN and "no time left" in s.reason for s in layer)
