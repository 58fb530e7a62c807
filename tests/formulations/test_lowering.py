"""Lowered operators against the operators' own evaluation."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from exactprune.errors import UnsupportedOpError
from exactprune.formulations.lowering import OUTSIDE, is_linear, lower, windows
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Shape, Transpose

RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


LINEAR: list[tuple[Op, tuple[Shape, ...]]] = [
    (Affine(draw(3, 5), draw(3)), ((5,),)),
    (Conv2d(draw(4, 2, 3, 2), draw(4), (2, 1), (1, 0, 2, 1), (1, 2), 1), ((2, 6, 7),)),
    (Conv2d(draw(6, 2, 3, 3), draw(6), groups=3, padding=(1, 1, 1, 1)), ((6, 5, 5),)),
    (Conv2d(draw(4, 1, 2, 2), draw(4), groups=4), ((4, 3, 3),)),
    (Scale(draw(3, 1, 1), draw(3, 1, 1)), ((3, 4, 5),)),
    (Add(), ((2, 3), (2, 3))),
    (AvgPool2d((2, 3), (2, 1), (1, 1, 0, 1)), ((2, 5, 6),)),
    (AvgPool2d((3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=False), ((1, 6, 6),)),
    (Reshape((6, 2)), ((3, 4),)),
    (Transpose((2, 0, 1)), ((2, 3, 4),)),
    (Pad(((1, 0), (0, 2)), 1.5), ((2, 3),)),
]


@pytest.mark.parametrize(("op", "shapes"), LINEAR, ids=lambda value: getattr(value, "kind", ""))
def test_matrix_agrees_with_evaluate(op: Op, shapes: tuple[Shape, ...]) -> None:
    lowered = lower(op, *shapes)
    assert is_linear(op)
    inputs = [draw(4, *shape) for shape in shapes]
    expected = op.evaluate(*inputs).reshape(4, -1)
    got = lowered.constant + sum(x.reshape(4, -1) @ m.T for m, x in zip(lowered.matrices, inputs, strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [ReLU(), MaxPool2d((2, 2), (2, 2))])
def test_nonlinear_operators_are_refused(op: Op) -> None:
    assert not is_linear(op)
    with pytest.raises(UnsupportedOpError, match="no matrix"):
        lower(op, (1, 4, 4))


def test_windows_are_the_places_a_max_pool_compares() -> None:
    op = MaxPool2d((2, 3), (2, 2), (1, 1, 1, 1), (1, 2))
    shape = (2, 6, 7)
    x = draw(*shape)
    places = windows(shape, op.kernel, op.stride, op.padding, op.dilation)
    seen = np.where(places == OUTSIDE, -np.inf, x.ravel()[places])
    np.testing.assert_array_equal(seen.max(axis=(3, 4)), op.evaluate(x[None])[0])
    assert places.max() < prod(shape)
