"""Rounding weights together: nearest plane against brute force, and the result against exact rationals."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from exactprune.checker import chains
from exactprune.checker.network import of as checked
from exactprune.compress.budget import budget_of
from exactprune.compress.polish import _equations, nearest, polished
from exactprune.compress.rewrite import _polished, _rewritten, compress_network
from exactprune.domain import Box
from exactprune.ops import Affine, ReLU


def deep(tools, rng, active=14, inputs=4):
    """First layer: more stably active neurons than inputs; then unstable layers."""
    first = rng.standard_normal((active + 6, inputs)).astype(np.float32)
    shift = np.concatenate([np.abs(first[:active]).sum(axis=1) + 0.1, rng.normal(size=6)]).astype(np.float32)
    ops = [Affine(first, shift), ReLU()]
    for n, m in ((active + 6, 20), (20, 20), (20, 20)):
        ops += [Affine((rng.standard_normal((m, n)) / 2).astype(np.float32), rng.standard_normal(m).astype(np.float32)), ReLU()]
    return tools.chain((inputs,), *ops, Affine(rng.standard_normal((2, 20)).astype(np.float32), np.zeros(2, np.float32)))


@pytest.fixture(params=[1])
def merged(tools, request):
    f = deep(tools, np.random.default_rng(request.param))
    box = Box(np.full(4, -0.5), np.array([0.5, 0.5, -0.4, -0.45]))
    verdicts = tools.verdicts(f, box)
    budget = budget_of(f, box, "rounding")
    return f, box, verdicts, _rewritten(f, box, verdicts, budget, 4096 * budget.eps)


@pytest.mark.parametrize("seed", range(5))
def test_nearest_plane_keeps_babais_bound(seed):
    rng = np.random.default_rng(seed)
    columns, wanted = rng.standard_normal((6, 4)) * np.array([8, 4, 2, 1]), 10 * rng.standard_normal(6)

    def left(t):
        return float(np.square(wanted - columns @ t).sum())

    t = nearest(columns, wanted, 1e-9)
    real = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    diagonal = np.diag(np.linalg.qr(columns[:, np.argsort(np.linalg.norm(columns, axis=0))])[1])
    assert left(t) - left(real) <= np.square(diagonal).sum() / 4 * (1 + 1e-6)
    assert (t == np.rint(t)).all() and not nearest(columns * 0, wanted, 1e-3).any()
    assert np.abs(nearest(columns * 1e-6, wanted, 1e-9)).max() <= 64


def test_a_polished_network_deviates_less_and_its_step_holds(tools, merged):
    f, box, _, rewrite = merged
    assert any((units < 0).any() for _, units in rewrite.origin)
    state, done = polished(f, box, rewrite)
    assert done and all(p.after < p.before for p in done)
    after = _polished(f, box, rewrite)
    assert after.network.sha256 == state.network.sha256 and [s.rule for s in after.steps].count("polish") == len(done)
    assert after.level.eps >= rewrite.level.eps
    rng = np.random.default_rng(9)
    fresh = box.sample(400, rng)
    size = [np.abs(f.evaluate(fresh, np.float64) - g.evaluate(fresh, np.float64)).max() for g in (rewrite.network, after.network)]
    assert size[1] < size[0]
    step = sum(Fraction(s.level.eps) for s in after.steps if s.rule == "polish")
    for x in np.concatenate([box.sample(5, rng), box.corners(5, rng)]):
        moved = np.abs(tools.exact(rewrite.network, x) - tools.exact(after.network, x)).max()
        assert 0 < moved <= step


def test_only_numbers_behind_new_units_move(merged):
    f, box, _, rewrite = merged
    after = _polished(f, box, rewrite)
    for old, new in zip(rewrite.network.nodes, after.network.nodes, strict=True):
        if isinstance(old.op, Affine) and not np.array_equal(old.op.weight, new.op.weight):
            columns = np.flatnonzero((old.op.weight != new.op.weight).any(axis=0))
            assert (rewrite.origin[0][1][columns] < 0).all()
            assert np.abs((new.op.weight - old.op.weight) / np.spacing(np.abs(old.op.weight))).max() <= 64


def test_equations_say_what_a_step_changes(merged):
    """The Jacobian against differences of two runs, at inputs and steps that cross no kink."""
    _, box, _, rewrite = merged
    g, units = rewrite.network, np.flatnonzero(rewrite.origin[0][1] < 0)
    op = g.nodes[g.relus[0] + 1].op
    numbers = np.concatenate([op.weight[:, units], op.bias[:, None]], axis=1).astype(np.float64)
    x, steps = box.sample(40, np.random.default_rng(0)), np.full(numbers.shape, 1e-7)
    wanted, columns = _equations(g, 0, units, x, np.zeros((40, 2)), steps)
    assert wanted.shape == (80,) and columns.shape == (80, steps.size)
    chain = chains.chain_of(checked(g))[0]
    moves = np.random.default_rng(1).integers(-3, 4, steps.shape) * steps
    weight = chain.weights[1].copy()
    weight[:, units] += moves[:, :-1]
    other = replace(chain, weights=(chain.weights[0], weight, *chain.weights[2:]),
                    biases=(chain.biases[0], chain.biases[1] + moves[:, -1], *chain.biases[2:]))

    def run(c):
        y = x.astype(np.float64)
        for k, (w, b) in enumerate(zip(c.weights, c.biases, strict=True)):
            y = y @ w.T + b
            y = np.maximum(y, 0) if k < c.hidden else y
        return y

    true, told = run(other) - run(chain), (columns @ (moves / steps).ravel()).reshape(40, 2)
    error = np.sort(np.abs(np.sort(true, axis=0) - np.sort(told, axis=0)).max(axis=1))
    assert error[-4] < 1e-6 * np.abs(true).max() + 1e-13


def test_what_cannot_be_polished_stays(tools, merged):
    f, box, verdicts, rewrite = merged
    assert polished(f, box, replace(rewrite, network=f, origin=tuple((k, np.arange(v.shape[0])) for k, v in enumerate(verdicts)),
                                    verdicts=tuple(verdicts)))[1] == []
    found = compress_network(f, box, verdicts)
    assert found.eps <= found.budget
