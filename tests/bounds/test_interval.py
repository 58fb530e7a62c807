"""Interval bounds: rigorous against rationals, exact for one linear layer, infinite where arithmetic fails."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_evaluation import exact_extremes
from exact_truth import exact_ranges_1d, mlp, random_mlp
from random_networks import case, sample_points

from exactprune.bounds.interval import interval_bounds
from exactprune.bounds.program import compile_network
from exactprune.domain import Box, uniform


@pytest.mark.parametrize("seed", range(1, 100, 2))
def test_they_enclose_exact_values(seed: int) -> None:
    given = case(seed)
    program = compile_network(given.network)
    extremes = exact_extremes(given.network, sample_points(given.box, np.random.default_rng(seed), 8))
    for bounds, (least, most) in zip(interval_bounds(program, *program.box(given.box)), extremes):
        assert all(low <= x for low, x in zip(bounds.lower[0].tolist(), least))
        assert all(x <= up for up, x in zip(bounds.upper[0].tolist(), most))


def test_they_are_the_exact_range_of_one_linear_layer_up_to_rounding() -> None:
    rng = np.random.default_rng(0)
    network, box = random_mlp(rng, [6, 9, 1]), Box(-rng.random(6), rng.random(6))
    program = compile_network(network)
    (bounds,) = interval_bounds(program, *program.box(box))
    weight, bias = network.nodes[0].op.weight, network.nodes[0].op.bias  # type: ignore[attr-defined]
    for i, (row, b) in enumerate(zip(weight, bias)):
        top = Fraction(float(b)) + sum(max(Fraction(float(w)) * Fraction(float(x)) for x in ends)
                                       for w, ends in zip(row, zip(box.lower, box.upper)))
        assert 0 <= Fraction(float(bounds.upper[0, i])) - top <= Fraction(1, 10**12)


def test_several_boxes_are_bounded_as_one_by_one() -> None:
    rng = np.random.default_rng(1)
    program = compile_network(random_mlp(rng, [3, 5, 4, 1]))
    lower = torch.tensor(rng.normal(size=(7, 3)))
    upper = lower + torch.tensor(rng.random((7, 3)))
    together = interval_bounds(program, lower, upper)
    for i in range(7):
        for a, b in zip(together, interval_bounds(program, lower[i : i + 1], upper[i : i + 1])):
            torch.testing.assert_close(a.upper[i], b.upper[0])
            torch.testing.assert_close(a.lower[i], b.lower[0])


def test_exact_zeros_stay_exact() -> None:
    network = mlp([(np.array([[1.0], [-1.0]]), np.zeros(2)), (-np.ones((1, 2)), np.zeros(1)), (np.ones((1, 1)), np.zeros(1))])
    program = compile_network(network)
    first, second = interval_bounds(program, *program.box(uniform(0, 1, (1,))))
    assert float(first.lower[0, 0]) == 0 and float(first.upper[0, 1]) == 0 and float(second.upper[0, 0]) == 0


@pytest.mark.parametrize("scale", [1e160, 1e300])
def test_overflow_is_infinite_not_nan(scale: float) -> None:
    rng = np.random.default_rng(2)
    network = mlp([(scale * rng.normal(size=(3, 2)), np.zeros(3)), (scale * rng.normal(size=(3, 3)), np.zeros(3)),
                   (np.ones((1, 3)), np.zeros(1))])
    program = compile_network(network)
    found = interval_bounds(program, *program.box(uniform(-1, 1, (2,))))
    assert not any(bool(torch.isnan(t).any()) for b in found for t in (b.lower, b.upper))
    assert bool(torch.isinf(found[1].upper).all()) and bool(torch.isinf(found[1].lower).all())


@pytest.mark.parametrize("tiny", [1e-160, 1e-200, 5e-324])
def test_products_that_underflow_are_paid_for(tiny: float) -> None:
    network = mlp([(np.full((1, 1), tiny), np.zeros(1)), (np.full((1, 1), tiny), np.zeros(1)), (np.ones((1, 1)), np.zeros(1))])
    box = Box(np.array([0.0]), np.array([tiny]))
    program = compile_network(network)
    for ((low, high),), bounds in zip(exact_ranges_1d(network, box), interval_bounds(program, *program.box(box))):
        assert high > 0 and float(bounds.lower[0, 0]) <= low and high <= float(bounds.upper[0, 0])
