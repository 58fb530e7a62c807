"""Measuring: differences that are there are seen, and the levels say what they should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from exactprune.compress import EXACT, Kind, Level, certified, measured
from exactprune.compress.measure import compare, latency, weight_bytes
from exactprune.domain import uniform
from exactprune.errors import OptionError, ShapeError
from exactprune.ops import ReLU


def shifted(network, by):
    last = network.nodes[-1]
    op = replace(last.op, bias=last.op.bias + np.asarray(by, network.dtype))
    return replace(network, nodes=(*network.nodes[:-1], replace(last, op=op)))


def test_compare_sees_a_shift_and_a_flip(tools):
    rng = np.random.default_rng(0)
    f = tools.chain((3,), tools.affine(rng, 8, 3), ReLU(), tools.affine(rng, 2, 8), dtype=np.float64)
    box = uniform(0, 1, (3,))
    data = box.sample(5, rng)
    assert compare(f, f, box, data=data, points=10, corners=10).largest == 0
    found = compare(f, shifted(f, [100.0, 0.0]), box, data=data, points=10, corners=10)
    scores = f.evaluate(data)
    assert found.inputs == 25 and found.largest == pytest.approx(100)
    assert found.flips >= (scores[:, 0] < scores[:, 1]).sum()
    assert found.itself < 1e-12 and found.level.kind is Kind.MEASURED and "25 inputs" in found.level.words
    with pytest.raises(ShapeError, match="one interface"):
        compare(f, tools.chain((4,), tools.affine(rng, 2, 4)), box)


def test_latency_and_bytes(tools):
    rng = np.random.default_rng(1)
    f = tools.chain((3,), tools.affine(rng, 8, 3), ReLU(), tools.affine(rng, 2, 8))
    assert weight_bytes(f) == 4 * f.parameters and weight_bytes(f.astype(np.float64)) == 8 * f.parameters
    found = latency(f, f, batches=(1, 4), repeats=3)
    assert [t.batch for t in found] == [1, 4] and all(t.before > 0 and t.after > 0 for t in found)


def test_levels_add_up_to_the_weakest_and_never_down():
    assert certified(0) == EXACT and EXACT + EXACT == EXACT
    total = certified(0.1) + certified(0.2) + EXACT
    assert total.kind is Kind.CERTIFIED and total.eps >= math.fsum([0.1, 0.2])
    assert (certified(0.1) + measured(0.5, 7)).kind is Kind.MEASURED
    assert "for every x in D" in EXACT.words and "as real functions" in certified(1e-3).words
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(OptionError):
            certified(bad)
    with pytest.raises(OptionError):
        Level(Kind.EXACT, 0.1)
