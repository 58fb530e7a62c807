"""Layer after layer: bounds only narrow, and what narrows one layer helps the next."""

from __future__ import annotations

import numpy as np
import torch
from exact_truth import random_mlp

from exactprune.bounds.layerwise import crown_bounds, first_is_exact, start
from exactprune.bounds.program import compile_network
from exactprune.domain import uniform
from exactprune.network import Node, build
from exactprune.ops import Affine, AvgPool2d, Conv2d, ReLU, Reshape


def prepared(seed: int = 0):
    program = compile_network(random_mlp(np.random.default_rng(seed), [4, 10, 10, 5, 1]))
    return program, start(program, *program.box(uniform(-1, 1, (4,))))


def test_step_by_step_is_crown_bounds() -> None:
    program, state = prepared()
    for layer in range(program.layers):
        state.enter(layer)
        if not first_is_exact(program, layer):
            state.crown(layer, state.open_rows(layer))
    for layer, bounds in enumerate(crown_bounds(program, *program.box(uniform(-1, 1, (4,))))):
        torch.testing.assert_close(state.at(layer).upper, bounds.upper, rtol=0, atol=0)
        torch.testing.assert_close(state.at(layer).lower, bounds.lower, rtol=0, atol=0)


def test_narrow_intersects() -> None:
    _, state = prepared()
    before = state.enter(0)
    rows = torch.tensor([2, 5])
    far = torch.tensor([[100.0, 100.0]], dtype=torch.float64)
    state.narrow(0, rows, -far, far)
    torch.testing.assert_close(state.at(0).upper, before.upper, rtol=0, atol=0)
    state.narrow(0, rows, -far, torch.zeros_like(far))
    assert state.at(0).upper[0, rows].tolist() == [min(0.0, u) for u in before.upper[0, rows].tolist()]
    torch.testing.assert_close(state.at(0).upper[0, :2], before.upper[0, :2], rtol=0, atol=0)


def test_what_is_learned_in_one_layer_narrows_the_next() -> None:
    _, plain = prepared()
    _, told = prepared()
    for state in (plain, told):
        state.enter(0)
    rows = torch.arange(10)
    told.narrow(0, rows, torch.full((1, 10), -0.01, dtype=torch.float64), torch.full((1, 10), 0.01, dtype=torch.float64))
    for state in (plain, told):
        state.enter(1)
        state.crown(1, torch.arange(10))
    width = [float((s.at(1).upper - s.at(1).lower).sum()) for s in (plain, told)]
    assert width[1] < 0.2 * width[0]


def test_open_rows_are_those_without_a_phase() -> None:
    _, state = prepared()
    state.enter(0)
    rows = torch.arange(10)
    state.narrow(0, rows[:4], torch.zeros(1, 4, dtype=torch.float64), torch.full((1, 4), torch.inf, dtype=torch.float64))
    bounds = state.at(0)
    expected = [i for i in range(10) if float(bounds.lower[0, i]) < 0 < float(bounds.upper[0, i])]
    assert state.open_rows(0).tolist() == expected and not set(expected) & {0, 1, 2, 3}


def test_which_first_layers_are_exact() -> None:
    rng = np.random.default_rng(1)
    conv = Conv2d(rng.normal(size=(2, 1, 2, 2)), np.zeros(2))
    tail = [Reshape((18,)), Affine(np.ones((1, 18)), np.zeros(1))]

    def exact(ops) -> bool:
        nodes = [Node(str(i), op, (i - 1,)) for i, op in enumerate(ops)]
        return first_is_exact(compile_network(build(nodes, (1, 4, 4), np.float64)), 0)

    assert exact([conv, ReLU(), *tail])
    assert exact([Reshape((1, 4, 4)), conv, ReLU(), *tail])
    assert not exact([AvgPool2d((1, 1), (1, 1)), conv, ReLU(), *tail])
    assert not exact([conv, Conv2d(rng.normal(size=(2, 2, 1, 1)), np.zeros(2)), ReLU(), *tail])
