"""Splitting: pieces cover the box exactly, the dispatcher equals the original within each piece's claim, files are checked."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from exactprune.compress.levels import EXACT
from exactprune.compress.slicing import Dispatcher, Piece, load_split, payoff, pieces_of
from exactprune.domain import Box, uniform
from exactprune.errors import DomainError, LoadError, OptionError, ShapeError
from exactprune.ops import Affine, ReLU
from exactprune.options import CompressOptions
from exactprune.pipeline import compress_split


@pytest.fixture
def sliced(tools):
    """Half of the neurons are stable once the sign of input 0 is known."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20, 3)).astype(np.float32) / 4
    weight[:, 0] = np.where(np.arange(20) % 2, 2, -2)
    return tools.chain((3,), Affine(weight, np.zeros(20, np.float32)), ReLU(),
                       Affine(rng.standard_normal((2, 20)).astype(np.float32), np.zeros(2, np.float32)))


def test_the_cut_is_where_most_neurons_become_stable(sliced):
    first, second = pieces_of(sliced, uniform(-1, 1, (3,)), 2)
    assert first.upper.tolist() == [0, 1, 1] and second.lower.tolist() == [0, -1, -1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_pieces_cover_the_box(sliced, count):
    domain = Box(np.array([-1.0, 0.5, -2.0]), np.array([1.0, 0.5, 3.0]))
    pieces = pieces_of(sliced, domain, count)
    assert len(pieces) == count
    rng = np.random.default_rng(1)
    x = np.concatenate([domain.sample(200, rng), domain.corners(20, rng), [[0.0, 0.5, 0.5]]])
    assert np.stack([p.contains(x) for p in pieces]).any(axis=0).all()
    wide = [0, 2]
    volume = sum(np.prod((p.upper - p.lower)[wide]) for p in pieces)
    assert volume == pytest.approx(np.prod((domain.upper - domain.lower)[wide]))


def test_a_point_cannot_be_cut(sliced):
    assert len(pieces_of(sliced, Box(np.zeros(3), np.zeros(3)), 4)) == 1
    with pytest.raises(OptionError, match="--split is 0"):
        pieces_of(sliced, uniform(0, 1, (3,)), 0)


def test_split_networks_agree_with_the_original_and_come_back_from_files(tools, sliced, tmp_path):
    split = compress_split(sliced, uniform(-1, 1, (3,)), 3, CompressOptions(samples=20))
    split.save(tmp_path / "s")
    found = load_split(tmp_path / "s")
    assert len(found.pieces) == 3 and split.payoff.pays and split.payoff.macs < split.single.after.macs
    assert "Splitting pays" in str(split) and [p.level for p in found.pieces] == [p.level for p in split.parts]
    x = np.concatenate([found.domain.sample(20, np.random.default_rng(2)), np.zeros((1, 3))])
    for point, index in zip(x, found.which(x), strict=True):
        piece = found.pieces[index]
        gap = np.abs(tools.exact(sliced, point) - tools.exact(piece.network, point)).max()
        assert gap <= Fraction(piece.level.eps)
    assert np.allclose(found.evaluate(x), sliced.evaluate(x), atol=1e-4)
    assert np.allclose(found.evaluate(x[0]), found.evaluate(x)[0], atol=1e-5)


def test_points_outside_and_wrong_shapes_are_refused(sliced):
    half = Dispatcher(uniform(0, 1, (3,)), (Piece(uniform(0, 1, (3,)), sliced, EXACT),))
    with pytest.raises(DomainError, match=r"input 1 \(1 such\) lies outside"):
        half.evaluate(np.array([[0, 0, 0], [0, 0, 2]]))
    with pytest.raises(ShapeError, match=r"takes \(batch, 3\)"):
        half.evaluate(np.zeros((2, 4)))


def test_it_says_when_splitting_does_not_pay(sliced):
    domain = uniform(-1, 1, (3,))
    pieces = [Piece(box, sliced, EXACT) for box in pieces_of(sliced, domain, 4)]
    found = payoff(sliced, pieces, domain)
    assert not found.pays and found.words.startswith("Splitting does not pay") and found.stored == 4 * sliced.parameters
    assert found.macs == pytest.approx(sliced.macs)


def test_changed_and_missing_files_are_refused(sliced, tmp_path):
    compress_split(sliced, uniform(-1, 1, (3,)), 2, CompressOptions(samples=5)).save(tmp_path)
    with pytest.raises(LoadError, match=r"has no dispatch\.json"):
        load_split(tmp_path / "elsewhere")
    file = tmp_path / "dispatch.json"
    given = json.loads(file.read_text())
    for change, words in (({"format": "other/1"}, "has format"), ({"pieces": []}, "one interface"), ({"domain": 3}, "malformed")):
        file.write_text(json.dumps(given | change))
        with pytest.raises(LoadError, match=words):
            load_split(tmp_path)
    file.write_text(json.dumps(given))
    (tmp_path / "piece0.onnx").write_bytes(b"x")
    with pytest.raises(LoadError, match="is not the file that"):
        load_split(tmp_path)
