"""Bounds on differences under random multipliers, phases and cuts: none may be below a value that is attained."""

import numpy as np
import torch
from changed_networks import changed
from exact_truth import random_mlp

from exactprune.bounds.difference import difference_bounds, joint_network
from exactprune.bounds.program import compile_network
from exactprune.deciders.difference_bounding import Bounding
from exactprune.deciders.difference_pairs import widened
from exactprune.deciders.difference_partners import find_partners
from exactprune.domain import Box
from exactprune.ops import Affine

PAIRS, POINTS = 320, 400


def preactivations(network, x):
    """[(points, neurons)] of every affine layer, in plain numpy."""
    found = []
    for node in network.nodes:
        if isinstance(node.op, Affine):
            x = x @ np.asarray(node.op.weight, float).T + np.asarray(node.op.bias, float)
            found.append(x)
        else:
            x = np.maximum(x, 0)
    return found


def networks(rng):
    """Two networks with as many inputs and outputs: nearly equal, far apart, or unrelated."""
    sizes = [int(rng.integers(1, 5)), *rng.integers(2, 7, rng.integers(1, 4)).tolist(), int(rng.integers(1, 4))]
    a = random_mlp(rng, sizes)
    if rng.random() < 0.2:
        return a, random_mlp(rng, [sizes[0], 5, sizes[-1]])
    return a, changed(rng, a, float(rng.choice([1e-9, 1e-4, 0.03, 0.3, 1.0])))


def randomised(rng, bounding, rows):
    """The same rows with everything that is tuned drawn at random."""
    for m in (rows.alpha, rows.share):
        for t in m.values():
            t.copy_(torch.tensor(rng.random(t.shape)))
    for k, t in rows.sigma.items():
        t.copy_(torch.tensor(rng.choice([-1, 0, 0, 0, 1], t.shape)))
        rows.beta[k].copy_(torch.tensor(rng.exponential(0.3, t.shape)) * (t != 0))
    bounding.cut(rows, bounding.solve(rows), 30)
    rows = widened(rows, len(bounding.cuts))
    rows.mix.copy_(bounding._simplex(torch.tensor(rng.random(rows.mix.shape))))
    return rows


def test_no_bound_is_below_what_is_attained():
    """Any multipliers give a bound; tuned ones are no larger than what they start from."""
    cuts = tight = phases = 0
    for seed in range(PAIRS):
        rng = np.random.default_rng(seed)
        a, b = networks(rng)
        low = rng.uniform(-1, 0.5, a.input_shape)
        box = Box(low, low + rng.random(a.input_shape))
        x = np.concatenate([box.sample(POINTS // 2, rng), box.corners(POINTS // 2, rng)]).reshape(POINTS, -1)
        joint = joint_network(a, b, find_partners(a, b, box))
        program = compile_network(joint.network)
        with torch.no_grad():
            bounding = Bounding(joint, difference_bounds(program, joint, *program.box(box)))
            outputs = np.repeat(np.arange(b.output_shape[0]), 2)
            signs = np.tile([1.0, -1.0], len(outputs) // 2)
            rows = randomised(rng, bounding, bounding.first_rows(bounding.difference, torch.tensor(outputs), torch.tensor(signs)))
            given = bounding.solve(rows).bound.numpy()
            tuned = bounding.tuned(rows, -np.inf, 8)[1].bound.numpy()
        of_a, of_b = preactivations(a, x), preactivations(b, x)
        value = (of_a[-1] - of_b[-1])[:, outputs] * signs
        z = [of_b[joint.deltas[k].layer] if k in joint.deltas else
             next(source[i] for source, places in ((of_a, joint.of_a), (of_b, joint.of_b)) for i, at in places.items() if at == k)
             for k in bounding.layers]
        inside = np.ones_like(value, bool)
        for k, t in enumerate(z):
            inside &= (t[:, None, :] * rows.sigma[k].numpy() >= 0).all(axis=2)
        best = np.where(inside, value, -np.inf).max(axis=0)
        slack = 1e-12 * (1 + np.abs(of_a[-1]).max())
        assert (best <= given + slack).all() and (best <= tuned + slack).all(), seed
        assert (tuned <= given).all(), seed
        cuts, tight, phases = cuts + len(bounding.cuts), tight + int((given < np.inf).all()), phases + int((best > -np.inf).any())
    assert cuts > 3 * PAIRS and tight == PAIRS and phases > PAIRS // 4
