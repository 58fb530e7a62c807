"""Result-preserving: margins are lower bounds, certified inputs keep their class exactly, the budget is used up."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exactprune
from exactprune.compress import compress_network
from exactprune.compress.preserve import Margins, margins_of, preserved
from exactprune.domain import Box, uniform
from exactprune.errors import OptionError
from exactprune.ops import Affine, ReLU
from exactprune.options import CompressOptions


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def classifier(tools, rng, classes=3):
    first = Affine(normal(rng, 12, 4), np.concatenate([np.full(6, 6.0), np.zeros(6)]).astype(np.float32))
    return tools.chain((4,), first, ReLU(), Affine(normal(rng, classes, 12), normal(rng, classes)))


def classes(tools, network, x):
    return max(range(network.output_shape[0]), key=lambda c: tools.exact(network, x)[c])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_certified_inputs_keep_their_class(tools, seed):
    rng = np.random.default_rng(seed)
    f, box = classifier(tools, rng), uniform(0, 1, (4,))
    data = box.sample(12, rng)
    margins = margins_of(f, box, data, samples=10)
    for x, margin in zip(data, margins.data, strict=True):
        out = sorted(tools.exact(f, x))
        assert Fraction(margin) <= out[-1] - out[-2]
        assert margin == pytest.approx(float(out[-1] - out[-2]), rel=1e-9, abs=1e-9)
    rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation=0.5)
    kept = preserved(margins, rewrite.eps)
    assert kept.certified == sum(m > 2 * rewrite.eps for m in margins.data) and kept.outside == 0
    for x, margin in zip(data, margins.data, strict=True):
        if margin > 2 * rewrite.eps:
            assert classes(tools, f, x) == classes(tools, rewrite.network, x)


def test_the_budget_is_the_largest_with_which_all_keep_their_class(tools):
    margins = Margins(np.array([0.5, 0.25, -np.inf, 0.75]), np.array([0.1, 0.3]))
    assert margins.budget == pytest.approx(0.125) and margins.budget < 0.125
    all_, more = preserved(margins, margins.budget), preserved(margins, 0.125)
    assert (all_.certified, all_.undecided, all_.outside) == (3, 0, 1)
    assert (more.certified, more.undecided, more.share) == (2, 1, 0.5)
    assert "3 of 4 given inputs provably keep their class, 1 outside the box" in all_.words


def test_a_tie_is_no_class(tools):
    f = tools.chain((2,), Affine(np.ones((2, 2), np.float32), np.zeros(2, np.float32)))
    margins = margins_of(f, uniform(0, 1, (2,)), np.array([[0.5, 0.5]]), samples=4)
    assert margins.budget == 0.0 and preserved(margins, 0.0).certified == 0 and preserved(margins, 0.0).share == 0.0


def test_one_output_has_no_classes(tools):
    f = classifier(tools, np.random.default_rng(0), classes=1)
    with pytest.raises(OptionError, match="--preserve argmax: network has one output"):
        margins_of(f, uniform(0, 1, (4,)), None)


def test_the_pipeline_spends_what_the_data_allow(tools):
    rng = np.random.default_rng(3)
    f, box = classifier(tools, rng), Box(np.zeros(4), np.ones(4))
    data = box.sample(20, rng)
    found = exactprune.verify(f, box)
    smaller = exactprune.compress(found, options=CompressOptions(preserve="argmax", samples=50), data=data)
    assert smaller.preserved is not None and smaller.margins is not None
    assert smaller.preserved.certified == 20 and smaller.rewrite.budget == smaller.margins.budget
    assert all(classes(tools, f, x) == classes(tools, smaller.network, x) for x in data)
    capped = exactprune.compress(found, options=CompressOptions(1e-6, preserve="argmax", samples=50), data=data)
    assert capped.rewrite.budget == 1e-6
    assert exactprune.compress(found, options=CompressOptions(samples=50)).preserved is None
    assert smaller.floating is not None and smaller.floating.eps > smaller.level.eps
    with pytest.raises(OptionError, match="preserve"):
        CompressOptions(preserve="everything")
