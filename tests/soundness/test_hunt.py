"""A small dose of the soundness hunt (make soundness runs 20,000 networks), and proof that the hunt can find something."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_evaluation import exact_layers
from exact_regions import exact_ranges
from exact_truth import exact_ranges_1d, random_mlp
from random_networks import case, sample_points

from exactprune.bounds.forward import exact_preactivations
from exactprune.domain import Box

spec = importlib.util.spec_from_file_location("hunt", Path(__file__).with_name("hunt.py"))
assert spec is not None and spec.loader is not None
hunt = importlib.util.module_from_spec(spec)
sys.modules["hunt"] = hunt
spec.loader.exec_module(hunt)


@pytest.mark.parametrize("part", range(10))
def test_no_violation(part: int) -> None:
    torch.set_num_threads(1)
    for seed in range(part, 300, 10):
        violations, counts = hunt.hunt(seed, whole=seed % 15 == 7)
        assert not violations
        assert counts["interval"] == counts["crown"] == counts["alpha-crown"] > 0


def test_the_hunt_finds_bounds_that_are_too_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen nothing for rounding, shift every claim by a hair: seen at once."""
    claim_all = hunt.Hunt.claim_all

    def tighter(self, method, layer, lower, upper):
        claim_all(self, method, layer, lower, upper - 1e-9 * upper.abs() if isinstance(upper, torch.Tensor) else upper)

    monkeypatch.setattr(hunt.Hunt, "claim_all", tighter)
    assert any(hunt.hunt(seed, whole=False)[0] for seed in range(1, 9))


@pytest.mark.parametrize("seed", range(1, 60))
def test_two_exact_evaluators_agree(seed: int) -> None:
    given = case(seed)
    points = sample_points(given.box, np.random.default_rng(seed), 3)[-2:]
    for k, rows in enumerate(exact_layers(given.network, points)):
        for point, row in zip(points, rows):
            assert row == exact_preactivations(given.network, point, k, range(len(row)))


def test_exact_evaluation_is_the_network_up_to_rounding() -> None:
    for seed in range(1, 200):
        given = case(seed)
        x = sample_points(given.box, np.random.default_rng(seed), 2)[:2]
        values = given.network.evaluate_nodes(x.reshape(2, *given.network.input_shape), np.float64)
        for relu, rows in zip(given.network.relus, exact_layers(given.network, x)):
            found = values[given.network.nodes[relu].inputs[0]].reshape(2, -1)
            exact = np.array([[float(v) for v in row] for row in rows])
            scale = max(1e-300, float(max(np.abs(v).max(initial=0) for v in values.values())))
            assert np.abs(found - exact).max() <= 1e-9 * scale


@pytest.mark.parametrize("seed", range(6))
def test_two_ways_to_exact_ranges_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, box = random_mlp(rng, [1, 4, 4, 3, 1]), Box(np.array([-0.7]), np.array([0.9]))
    assert exact_ranges(network, box) == exact_ranges_1d(network, box)


@pytest.mark.parametrize("inputs", [2, 3])
def test_exact_ranges_enclose_and_are_nearly_reached(inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    network, box = random_mlp(rng, [inputs, 4, 3, 1]), Box(-rng.random(inputs), rng.random(inputs))
    points = np.concatenate([box.sample(20_000, rng), box.corners(50, rng)])
    values = network.evaluate_nodes(points)
    for layer, relu in zip(exact_ranges(network, box), network.relus):
        z = values[network.nodes[relu].inputs[0]]
        low, high = (np.array([float(r[i]) for r in layer]) for i in (0, 1))
        assert (z.min(axis=0) >= low - 1e-12).all() and (z.max(axis=0) <= high + 1e-12).all()
        assert (z.max(axis=0) >= high - 0.1 * (high - low) - 1e-12).all()
