"""Each domain option builds the box it describes, with the endpoints it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exactprune.cli.arguments import DomainFlags
from exactprune.cli.domains import build_domain
from exactprune.network import INPUT, Node, build
from exactprune.ops import Affine, Reshape


@pytest.fixture
def network():
    return build([Node("flat", Reshape((6,)), (INPUT,)), Node("out", Affine(np.ones((1, 6)), np.ones(1)), (0,))],
                 (1, 2, 3), np.float32)


def same(box, lower, upper):
    shape = (1, 2, 3)
    assert box.shape == shape
    assert np.array_equal(box.lower, np.broadcast_to(lower, shape))
    assert np.array_equal(box.upper, np.broadcast_to(upper, shape))


def test_without_an_option_the_unit_box(network):
    same(build_domain(DomainFlags(), network), 0, 1)


def test_interval(network):
    same(build_domain(DomainFlags(domain=(-0.1, 0.3)), network), -0.1, 0.3)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 3)])
def test_box_file_flat_or_in_shape(network, tmp_path, shape):
    lower = np.arange(6.0).reshape(shape)
    np.savez(tmp_path / "b.npz", lower=lower, upper=lower + 0.5)
    same(build_domain(DomainFlags(domain_box=tmp_path / "b.npz"), network), np.arange(6.0).reshape(1, 2, 3),
         np.arange(6.0).reshape(1, 2, 3) + 0.5)


def test_ball_is_clipped_and_float32_centres_are_widened_exactly(network, tmp_path):
    center = np.linspace(0, 1, 6, dtype=np.float32)
    np.save(tmp_path / "c.npy", center)
    box = build_domain(DomainFlags(center=tmp_path / "c.npy", epsilon=0.1, clip=(0.0, 1.0)), network)
    exact = center.astype(np.float64).reshape(1, 2, 3)
    same(box, np.maximum(exact - 0.1, 0), np.minimum(exact + 0.1, 1))


def test_range_of_data_with_margin(network, tmp_path):
    data = np.random.default_rng(0).normal(size=(9, 6))
    np.savez(tmp_path / "d.npz", x=data)
    box = build_domain(DomainFlags(domain_data=tmp_path / "d.npz", margin=0.25), network)
    same(box, data.min(axis=0).reshape(1, 2, 3) - 0.25, data.max(axis=0).reshape(1, 2, 3) + 0.25)


def test_vnnlib_property(network, tmp_path):
    lines = [f"(declare-const X_{i} Real)" for i in range(6)] + ["(declare-const Y_0 Real)"]
    lines += [f"(assert (<= X_{i} {i}.5))\n(assert (>= X_{i} {i}))" for i in range(6)] + ["(assert (>= Y_0 0))"]
    (tmp_path / "p.vnnlib").write_text("\n".join(lines))
    lower = np.arange(6.0).reshape(1, 2, 3)
    same(build_domain(DomainFlags(vnnlib=Path(tmp_path / "p.vnnlib")), network), lower, lower + 0.5)
