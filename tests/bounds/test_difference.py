"""Bounds on A - B: sound for any partners, zero for equal networks, tight where B comes from A."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_truth import mlp, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import case, sample_points

from exactprune.bounds.difference import Fixed, Partners, difference_bounds, joint_network, relax_delta
from exactprune.bounds.forward import exact_preactivations
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.program import compile_network
from exactprune.domain import uniform
from exactprune.errors import ShapeError
from exactprune.network import Network, Node, build
from exactprune.ops import Affine, Conv2d, Op, ReLU, Reshape


def shaken(network: Network, rng: np.random.Generator, size: float) -> Network:
    """The network with all weights moved a little."""
    def moved(op: Op) -> Op:
        if not isinstance(op, Affine | Conv2d):
            return op
        return replace(op, weight=(op.weight * (1 + size * rng.normal(size=op.weight.shape))).astype(op.weight.dtype))

    return replace(network, nodes=tuple(Node(n.name, moved(n.op), n.inputs) for n in network.nodes))


def random_partners(a: Network, b: Network, rng: np.random.Generator) -> dict[int, Partners]:
    """Any partners at all, good or bad."""
    found = {}
    for k, relu in enumerate(b.relus):
        shape = b.shapes[relu]
        layers = [i for i, r in enumerate(a.relus) if len(a.shapes[r]) == len(shape) and a.shapes[r][1:] == shape[1:]]
        if not layers or len(shape) not in (1, 3) or rng.random() < 0.2:
            continue
        layer = k if k in layers and rng.random() < 0.7 else int(rng.choice(layers))
        units = a.shapes[a.relus[layer]][0]
        same = np.arange(shape[0]) % units
        source = np.where(rng.random(shape[0]) < 0.6, same, rng.integers(-1, units, shape[0]))
        found[k] = Partners(layer, source, np.where(rng.random(shape[0]) < 0.7, 1.0, rng.uniform(0.1, 3.0, shape[0])))
    return found


def bounds_of(a, b, box, partners=None):
    joint = joint_network(a, b, partners)
    program = compile_network(joint.network)
    last = difference_bounds(program, joint, *program.box(box)).at(joint.last)
    return joint, last.lower[0].numpy(), last.upper[0].numpy()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
def test_no_point_leaves_the_bounds_whatever_the_partners(seed, size):
    made, rng = case(seed), np.random.default_rng([seed, 3])
    a, box = made.network, made.box
    b = shaken(a, rng, size)
    plain = joint_network(a, b)
    _, low, high = bounds_of(a, b, box, random_partners(a, b, rng))
    for x in sample_points(box, rng, 6):
        for i, value in enumerate(exact_preactivations(plain.network, x, plain.last, range(len(low)))):
            assert low[i] <= value <= high[i]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_relaxation_of_delta_holds_on_a_grid(seed):
    rng = np.random.default_rng(seed)
    low, up = np.sort(rng.normal(size=(2, 9)), axis=0)
    za = np.sort(rng.normal(size=(2, 9)) + rng.choice([-3, 0, 3], 9), axis=0)
    matched = torch.tensor(rng.random(9) < 0.8)
    fixed = Fixed(*(torch.tensor(phase)[None] & matched
                    for phase in (za[0] + low >= 0, za[1] + up <= 0, za[0] >= 0, za[1] <= 0)))
    program = compile_network(random_mlp(rng, [2, 3, 1]))
    bounds = NodeBounds(torch.tensor(low)[None], torch.tensor(up)[None])
    relaxed = relax_delta(program, bounds, matched, fixed)
    for t in np.linspace(0, 1, 11):
        dz = low + t * (up - low)
        for s in np.linspace(0, 1, 11):
            z = np.where(matched, za[0] + s * (za[1] - za[0]), 0.0)
            delta = np.maximum(z + dz, 0) - np.maximum(z, 0)
            for sign in (1.0, -1.0):
                plus = max(sign, 0.0)
                line = (sign * relaxed.low + plus * relaxed.gap) * torch.tensor(dz)
                line = line + plus * relaxed.on_plus - sign * relaxed.on_all
                assert (sign * delta <= line[0].numpy() + 1e-15).all()


def test_a_network_and_its_copy_are_the_same_node_by_node():
    a = random_mlp(np.random.default_rng(0), [3, 5, 4, 2])
    assert joint_network(a, a.astype(np.float64)).equal
    assert joint_network(a.astype(np.float32), a.astype(np.float32).astype(np.float64)).equal
    assert not joint_network(a, shaken(a, np.random.default_rng(1), 1e-9)).equal


def test_what_two_networks_share_cancels():
    rng = np.random.default_rng(2)
    a = random_mlp(rng, [6, 20, 20, 3])
    arrays = [(n.op.weight, n.op.bias) for n in a.nodes if isinstance(n.op, Affine)]
    keep = np.arange(17)
    small = [(arrays[0][0][keep], arrays[0][1][keep]), (arrays[1][0][:, keep], arrays[1][1]), arrays[2]]
    b = mlp(small)
    weak = arrays[1][0].copy()
    weak[:, 17:] *= 1e-6  # what goes is hardly read
    a = mlp([arrays[0], (weak, arrays[1][1]), arrays[2]])
    box = uniform(-1, 1, (6,))
    _, low, high = bounds_of(a, b, box)
    partners = {0: Partners(0, keep, np.ones(17)), 1: Partners(1, np.arange(20), np.ones(20))}
    _, near_low, near_high = bounds_of(a, b, box, partners)
    assert max(near_high.max(), -near_low.min()) < 1e-4 < 0.1 < max(high.max(), -low.min())


def test_partners_that_do_not_fit_are_refused():
    a = random_mlp(np.random.default_rng(0), [3, 5, 2])
    with pytest.raises(ShapeError, match="ratio"):
        joint_network(a, shaken(a, np.random.default_rng(1), 0.1), {0: Partners(0, np.arange(5), -np.ones(5))})
    conv = build([Node("c", Conv2d(np.ones((4, 1, 1, 1)), np.zeros(4)), (-1,)), Node("r", ReLU(), (0,)),
                  Node("f", Reshape((16,)), (1,)), Node("a", Affine(np.ones((2, 16)), np.zeros(2)), (2,))], (1, 2, 2), np.float64)
    flat = random_mlp(np.random.default_rng(0), [4, 4, 2])
    with pytest.raises(ShapeError, match="do not fit"):
        joint_network(conv, flat, {0: Partners(0, np.arange(4), np.ones(4))})
