"""CROWN: rigorous against rationals, exact on stable networks, never worse than intervals once intersected, chunked alike."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_evaluation import exact_extremes
from exact_truth import random_mlp
from random_networks import case, sample_points

from exactprune.bounds.crown import crown_rows
from exactprune.bounds.interval import interval_bounds
from exactprune.bounds.layerwise import crown_bounds, first_is_exact, start
from exactprune.bounds.program import compile_network
from exactprune.bounds.relaxation import adaptive_slope, upper_line
from exactprune.domain import Box, uniform


@pytest.mark.parametrize("family", ["dense", "near-zero", "image", "residual", "many-readers", "huge", "vanishing"])
def test_every_row_encloses_exact_values(family: str) -> None:
    for seed in range(500, 508):
        given = case(seed, family)
        program = compile_network(given.network)
        state = start(program, *program.box(given.box))
        extremes = exact_extremes(given.network, sample_points(given.box, np.random.default_rng(seed), 8))
        for layer, (least, most) in enumerate(extremes):
            state.enter(layer)
            rows = torch.arange(len(least))
            lower, upper = crown_rows(program, layer, rows, state.known, state.relaxations)
            assert all(low <= x for low, x in zip(lower[0].tolist(), least)), (family, seed, layer)
            assert all(x <= up for up, x in zip(upper[0].tolist(), most)), (family, seed, layer)
            state.narrow(layer, rows, lower, upper)


def test_where_no_neuron_is_unstable_it_is_exact_up_to_rounding() -> None:
    rng = np.random.default_rng(0)
    network = random_mlp(rng, [4, 6, 5, 3, 1])
    x = rng.normal(size=4)
    box = Box(x - 1e-6, x + 1e-6)
    program = compile_network(network)
    corners = np.array([np.where(rng.random(4) < 0.5, box.lower, box.upper) for _ in range(200)])
    values = network.evaluate_nodes(corners)
    state = start(program, *program.box(box))
    for layer, relu in enumerate(network.relus):
        z = values[network.nodes[relu].inputs[0]]
        state.enter(layer)
        assert not len(state.open_rows(layer))
        lower, upper = crown_rows(program, layer, torch.arange(z.shape[1]), state.known, state.relaxations)
        assert (np.abs(upper[0].numpy() - z.max(axis=0)) < 1e-12).all()
        assert (np.abs(lower[0].numpy() - z.min(axis=0)) < 1e-12).all()


@pytest.mark.parametrize("memory", [1, 1 << 12, 1 << 31])
def test_chunks_change_nothing_but_rounding(memory: int) -> None:
    program = compile_network(random_mlp(np.random.default_rng(3), [5, 40, 40, 8, 1]))
    given = program.box(uniform(-1, 1, (5,)))
    for a, b in zip(crown_bounds(program, *given), crown_bounds(program, *given, memory=memory)):
        torch.testing.assert_close(a.lower, b.lower, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.upper, b.upper, rtol=1e-9, atol=1e-9)


def test_groups_of_boxes_are_bounded_together() -> None:
    rng = np.random.default_rng(4)
    program = compile_network(random_mlp(rng, [3, 8, 8, 4, 1]))
    lower = torch.tensor(rng.normal(size=(5, 3)))
    upper = lower + 0.5
    together = crown_bounds(program, lower, upper)
    for i in range(5):
        for k, alone in enumerate(crown_bounds(program, lower[i : i + 1], upper[i : i + 1])):
            stable = (alone.upper[0] <= 0) | (alone.lower[0] >= 0)
            torch.testing.assert_close(together[k].upper[i][~stable], alone.upper[0][~stable], rtol=1e-9, atol=1e-9)


def test_it_is_never_worse_than_intervals_and_mostly_better() -> None:
    program = compile_network(random_mlp(np.random.default_rng(5), [6, 20, 20, 20, 1]))
    given = program.box(uniform(-1, 1, (6,)))
    for layer, (a, b) in enumerate(zip(interval_bounds(program, *given), crown_bounds(program, *given))):
        assert bool((b.upper <= a.upper).all()) and bool((b.lower >= a.lower).all())
        assert layer == 0 or float((b.upper - b.lower).mean()) < 0.9 * float((a.upper - a.lower).mean())
    assert first_is_exact(program, 0) and not first_is_exact(program, 1)


def test_the_upper_line_lies_above_the_relu() -> None:
    rng = np.random.default_rng(6)
    size = 10.0 ** rng.uniform(-300, 300, 4000)
    lower = torch.tensor(-size * rng.random(4000))
    upper = torch.tensor(size * rng.random(4000) * 10.0 ** rng.uniform(-3, 3, 4000))
    slope, intercept = upper_line(lower, upper)
    for low, up, s, t in zip(*(x.tolist() for x in (lower, upper, slope, intercept))):
        assert 0 <= s <= 1
        for z in (low, up, 0.0):
            line = Fraction(s) * Fraction(z) + Fraction(t)
            assert line >= max(Fraction(z), 0) - Fraction(2) ** -1070, (low, up)
    assert bool(((adaptive_slope(lower, upper) == 1) == (upper > -lower)).all())
