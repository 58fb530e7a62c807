"""The dual ascent: every iterate is a sound bound, splits included; it only improves; at its best it is the LP's value."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact_evaluation import exact_layers
from exact_truth import random_mlp
from random_networks import case, sample_points

from exactprune.bounds.dual import initial_rows, layers_below, optimise, solve
from exactprune.bounds.layerwise import start
from exactprune.bounds.program import compile_network
from exactprune.deciders.lp import lp_multipliers
from exactprune.domain import uniform
from exactprune.network import Network


def ready(network: Network, box):
    program = compile_network(network)
    state = start(program, *program.box(box))
    for layer in range(program.layers):
        state.enter(layer)
        state.crown(layer, state.open_rows(layer))
    return program, state


def all_rows(program, state, layer: int):
    size = program.sizes[program.preactivation(layer)]
    neurons, signs = torch.arange(size).repeat(2), torch.cat([torch.ones(size), -torch.ones(size)]).double()
    return initial_rows(program, layer, neurons, signs, state.known)


@pytest.mark.parametrize("family", ["dense", "image", "residual", "many-readers", "vanishing"])
def test_random_multipliers_and_splits_are_sound(family: str) -> None:
    for seed in range(700, 705):
        given = case(seed, family)
        if given.network.nodes[given.network.relus[-1]].inputs[0] < 0:
            continue
        program, state = ready(given.network, given.box)
        layer = program.layers - 1
        rng = np.random.default_rng(seed)
        rows = all_rows(program, state, layer)
        alpha = {k: torch.tensor(rng.random(t.shape)) for k, t in rows.alpha.items()}
        sigma = {k: torch.tensor(rng.choice([-1, 0, 0, 1], t.shape).astype(np.int8)) for k, t in alpha.items()}
        for k in sigma:
            bounds = state.at(k)
            sigma[k] = sigma[k] * ((bounds.lower < 0) & (bounds.upper > 0)).to(torch.int8)
        beta = {k: torch.tensor(10.0 ** rng.uniform(-3, 3, t.shape)) * (sigma[k] != 0) for k, t in alpha.items()}
        bound = solve(program, replace(rows, alpha=alpha, sigma=sigma, beta=beta), state.known).bound
        points = sample_points(given.box, rng, 16)
        exact = exact_layers(given.network, points)
        for i, (neuron, sign) in enumerate(zip(rows.neurons.tolist(), rows.signs.tolist())):
            for p in range(len(points)):
                inside = all((exact[k][p][j] * s >= 0) for k, t in sigma.items() for j, s in enumerate(t[i].tolist()) if s)
                assert not inside or Fraction(int(sign)) * exact[layer][p][neuron] <= float(bound[i]), (seed, i)


def test_more_steps_never_give_worse_bounds() -> None:
    box = uniform(-1, 1, (5,))
    program, state = ready(random_mlp(np.random.default_rng(0), [5, 12, 12, 6, 1]), box)
    rows = all_rows(program, state, 2)
    bounds = [optimise(program, rows, state.known, steps).bound for steps in (0, 3, 20, 60)]
    assert all(bool((b <= a).all()) for a, b in pairwise(bounds))
    assert float((bounds[0] - bounds[2]).mean()) > 0.01


def test_enough_steps_come_near_the_lp() -> None:
    box = uniform(-1, 1, (4,))
    network = random_mlp(np.random.default_rng(1), [4, 8, 8, 3, 1], bias=1.0)
    program, state = ready(network, box)
    lower = [state.at(k).lower[0].numpy() for k in range(3)]
    upper = [state.at(k).upper[0].numpy() for k in range(3)]
    lp = np.array([found.value for found in lp_multipliers(network, box, lower, upper, 2, range(3), "upper")])
    rows = initial_rows(program, 2, torch.arange(3), torch.ones(3).double(), state.known)
    ours = optimise(program, rows, state.known, 200, decay=0.99, margin=1e9).bound.numpy()
    assert (ours >= lp - 1e-6).all()
    assert ((ours - lp)[lp > 0] <= 0.05 * (upper[2] - lower[2])[lp > 0] + 1e-6).all()


def test_corners_and_averages_are_points_of_the_box() -> None:
    box = uniform(-0.5, 0.7, (5,))
    program, state = ready(random_mlp(np.random.default_rng(2), [5, 10, 10, 4, 1]), box)
    solved = optimise(program, all_rows(program, state, 2), state.known, 10)
    for points in (solved.solution.corner, solved.average):
        assert bool(((points >= -0.5) & (points <= 0.7)).all())


def test_taking_rows_takes_their_multipliers() -> None:
    program, state = ready(random_mlp(np.random.default_rng(3), [3, 6, 6, 4, 1]), uniform(-1, 1, (3,)))
    rows = all_rows(program, state, 2)
    some = rows.take(torch.tensor([5, 1]))
    assert len(some) == 2 and some.neurons.tolist() == [rows.neurons[5].item(), rows.neurons[1].item()]
    whole, part = solve(program, rows, state.known).bound, solve(program, some, state.known).bound
    torch.testing.assert_close(part, whole[[5, 1]], rtol=1e-12, atol=1e-12)
    assert layers_below(program, 2) == [0, 1]
