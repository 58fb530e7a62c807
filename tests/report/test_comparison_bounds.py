"""What is said about classes that cannot change, against points and perturbations that try to change them."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.domain import uniform
from exactprune.network import INPUT, Node, build
from exactprune.ops import Affine, Conv2d, ReLU, Reshape
from exactprune.report.comparison_bounds import Deviation, deviation, steady, unchangeable


def flat(seed, sizes=(4, 6, 5, 3), keep=1.0):
    """A random network; ``keep`` of its weights stay, the same seed gives the same weights before that."""
    rng, mask = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    nodes = []
    for k, (n, m) in enumerate(pairwise(sizes)):
        weight = rng.normal(size=(m, n)).astype(np.float32)
        bias = rng.normal(size=m).astype(np.float32) / 4
        weight = weight * (mask.random(weight.shape) < keep)
        nodes.append(Node(f"fc{k}", Affine(weight.astype(np.float32), bias), (len(nodes) - 1 if nodes else INPUT,)))
        if k < len(sizes) - 2:
            nodes.append(Node(f"relu{k}", ReLU(), (len(nodes) - 1,)))
    return build(nodes, (sizes[0],), np.float32)


def conv(seed, keep=1.0):
    """1x4x4 -> 3 channels -> 3 outputs."""
    rng = np.random.default_rng(seed)
    kernel, matrix = rng.normal(size=(3, 1, 3, 3)).astype(np.float32), rng.normal(size=(3, 12)).astype(np.float32)
    kernel = kernel * (np.random.default_rng(9).random(kernel.shape) < keep).astype(np.float32)
    return build([Node("c", Conv2d(kernel, np.zeros(3, np.float32)), (INPUT,)), Node("r", ReLU(), (0,)),
                  Node("flat", Reshape((12,)), (1,)), Node("fc", Affine(matrix, np.zeros(3, np.float32)), (2,))],
                 (1, 4, 4), np.float32)


PAIRS = [(flat(0), flat(0, keep=0.8)), (flat(1), flat(1, keep=0.3)), (flat(2), flat(3, (4, 3, 2, 3))), (conv(0), conv(0, 0.7)),
         (flat(4, (2, 3, 25)), flat(4, (2, 3, 25), 0.5))]


@pytest.mark.parametrize(("f", "g"), PAIRS)
def test_no_point_exceeds_the_bounds_and_the_lower_one_is_attained(f, g):
    domain, rng = uniform(-1, 1, f.input_shape), np.random.default_rng(0)
    found = deviation(f, g, domain, starts=4)
    x = np.concatenate([domain.sample(2000, rng), domain.corners(500, rng), found.points])
    d = f.evaluate(x, np.float64) - g.evaluate(x, np.float64)
    assert np.abs(d).max() <= found.upper * (1 + 1e-12)
    assert found.lower <= np.abs(d).max() * (1 + 1e-9) and 0 < found.lower <= found.upper
    for i, j in combinations(range(d.shape[1]), 2):
        assert np.abs(d[:, i] - d[:, j]).max() <= found.pairs[i, j] * (1 + 1e-12)
        assert found.pairs[i, j] == found.pairs[j, i]


def test_a_bound_for_two_outputs_together_is_smaller_than_both_added_up():
    f, g = PAIRS[0]
    found = deviation(f, g, uniform(-1, 1, (4,)), starts=4)
    assert found.pairs.max() < 2 * found.upper


def test_equal_networks_do_not_deviate():
    found = deviation(flat(0), flat(0), uniform(-1, 1, (4,)))
    assert (found.upper, found.lower, found.pairs.max()) == (0, 0, 0)


def test_known_bounds_and_a_network_in_between_only_make_bounds_smaller():
    f, g, domain = flat(0), flat(0, keep=0.8), uniform(-1, 1, (4,))
    plain = deviation(f, g, domain, starts=4)
    assert deviation(f, g, domain, starts=4, known=plain.lower).upper == plain.lower
    assert deviation(f, g, domain, starts=4, via=(f, 0.125)).upper == plain.upper
    other = flat(0, keep=0.9)
    between = deviation(f, other, domain, starts=4).upper
    through = deviation(f, g, domain, starts=4, via=(other, between))
    assert plain.lower <= through.upper <= plain.upper and (through.pairs <= plain.pairs).all()


def test_more_time_closes_the_gap():
    f, g, domain = flat(0), flat(0, keep=0.8), uniform(-1, 1, (4,))
    assert deviation(f, g, domain, starts=4, exact=5.0).upper <= 1.01 * deviation(f, g, domain).lower


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_class_that_cannot_change_is_not_changed_by_any_shift_within_the_bounds(seed, size):
    rng = np.random.default_rng(seed)
    outputs, shift = rng.normal(size=(40, 4)), size * rng.uniform(-1, 1, (500, 4))
    pairs = np.abs(shift[:, :, None] - shift[:, None, :]).max(axis=0)
    classes = outputs.argmax(axis=1)
    said = unchangeable(outputs[np.arange(40), classes][:, None] - outputs, classes, Deviation(size, 0.0, pairs, shift))
    moved = (outputs[:, None] + shift[None]).argmax(axis=2)
    assert (moved[said] == classes[said, None]).all()
    assert said.all() if size == 0 else True


@pytest.mark.parametrize("network", [flat(0), conv(0)])
@pytest.mark.parametrize("radius", [0.0, 0.02, 0.2])
def test_no_input_nearby_changes_a_class_that_is_steady(network, radius):
    rng, domain = np.random.default_rng(1), uniform(-1, 1, network.input_shape)
    x = domain.sample(150, rng).astype(np.float32)
    classes = network.evaluate(x).argmax(axis=1)
    said = steady(network, x, classes, radius, domain)
    assert said.all() if radius == 0 else 0 < said.mean() <= 1
    for _ in range(100):
        near = np.clip(x + radius * rng.choice([-1.0, 0.3, 1.0], x.shape), -1, 1)
        assert (network.evaluate(near, np.float64).argmax(axis=1)[said] == classes[said]).all()
    assert not steady(network, x, (classes + 1) % 3, radius, domain).any()


def test_too_many_outputs_are_never_steady():
    assert not steady(flat(4, (2, 3, 25)), np.zeros((3, 2), np.float32), np.zeros(3, int), 0.0, uniform(-1, 1, (2,))).any()
