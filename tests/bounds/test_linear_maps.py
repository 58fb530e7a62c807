"""Linear maps against torch's own operators and against dense matrices, for random settings; both directions, all parts."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exactprune.bounds.linear_maps import linear_map
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Shape, Transpose

CPU = torch.device("cpu")


def random_conv(rng: np.random.Generator) -> tuple[Conv2d, Shape]:
    kernel = tuple(int(k) for k in rng.integers(1, 5, 2))
    dilation = tuple(int(d) for d in rng.integers(1, 3, 2)) if rng.random() < 0.4 else (1, 1)
    groups = int(rng.integers(1, 4)) if rng.random() < 0.4 else 1
    span = [(k - 1) * d for k, d in zip(kernel, dilation)]
    shape = (groups * int(rng.integers(1, 4)), *(int(n) for n in rng.integers(1, 8, 2) + span))
    weight = rng.normal(size=(groups * int(rng.integers(1, 4)), shape[0] // groups, *kernel))
    stride = tuple(int(s) for s in rng.integers(1, 5, 2))
    padding = tuple(int(p) for p in rng.integers(0, 4, 4))
    return Conv2d(weight, rng.normal(size=len(weight)), stride, padding, dilation, groups), shape


def random_op(rng: np.random.Generator) -> tuple[Op, Shape]:
    kind = int(rng.integers(7))
    if kind < 2:
        return random_conv(rng)
    shape = tuple(int(n) for n in rng.integers(2, 6, 3))
    if kind == 2:
        outputs = int(rng.integers(1, 7))
        return Affine(rng.normal(size=(outputs, 5)), rng.normal(size=outputs)), (5,)
    if kind == 3:
        return Scale(rng.normal(size=(shape[0], 1, 1)), rng.normal(size=shape)), shape
    if kind == 4:
        kernel = tuple(int(k) for k in rng.integers(1, 3, 2))
        padding = tuple(int(rng.integers(0, k)) for k in (*kernel, *kernel))
        return AvgPool2d(kernel, tuple(int(s) for s in rng.integers(1, 4, 2)), padding, bool(rng.random() < 0.5)), shape
    if kind == 5:
        return Transpose(tuple(int(a) for a in rng.permutation(3))), shape
    return Pad(tuple((int(a), int(b)) for a, b in rng.integers(0, 3, (3, 2))), float(rng.normal())), shape


def dense(op: Op, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, constant) from the operator's own numpy evaluation of unit vectors."""
    size = prod(shape)
    constant = op.evaluate(np.zeros((1, *shape))).reshape(-1)
    return (op.evaluate(np.eye(size).reshape(size, *shape)).reshape(size, -1) - constant).T, constant


@pytest.mark.parametrize("seed", range(60))
def test_every_map_is_the_operator_s_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    op, shape = random_op(rng)
    mapping = linear_map(op, shape, CPU)
    assert mapping is not None
    matrix, constant = dense(op, shape)
    assert (mapping.size_out, mapping.size_in) == matrix.shape
    bias = np.zeros(mapping.size_out) if mapping.bias is None else mapping.bias.numpy()
    np.testing.assert_allclose(bias, constant, rtol=1e-13, atol=1e-14)
    x, v = rng.normal(size=(3, mapping.size_in)), rng.normal(size=(5, mapping.size_out))
    parts = {"all": matrix, "abs": np.abs(matrix), "plus": np.maximum(matrix, 0), "minus": np.minimum(matrix, 0)}
    for part, expected in parts.items():
        np.testing.assert_allclose(mapping.forward(torch.tensor(x), part).numpy(), x @ expected.T, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mapping.transposed(torch.tensor(v)).numpy(), v @ matrix, rtol=1e-11, atol=1e-12)
    columns = mapping.transposed_columns(torch.tensor(v.T.copy()))
    assert columns.is_contiguous()
    np.testing.assert_allclose(columns.numpy(), (v @ matrix).T, rtol=1e-11, atol=1e-12)
    for ours, part in zip(mapping.split(torch.tensor(x)), ("plus", "minus"), strict=True):
        np.testing.assert_allclose(ours.numpy(), x @ parts[part].T, rtol=1e-11, atol=1e-12)
    some = torch.tensor(rng.integers(0, mapping.size_out, 4))
    np.testing.assert_allclose(mapping.rows(some).numpy(), matrix[some.numpy()], rtol=1e-12, atol=1e-14)
    assert mapping.rows(some[:0]).shape == (0, mapping.size_in)
    there = np.abs(matrix) > 1e-12
    most = max(there.sum(axis=1).max(initial=0), there.sum(axis=0).max(initial=0))
    assert mapping.terms >= most or (mapping.terms == 0 and most <= 1)
    assert mapping.smallest <= np.abs(matrix[np.abs(matrix) > 1e-12]).min(initial=1.0) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(80))
def test_convolutions_agree_with_torch(seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    op, shape = random_conv(rng)
    mapping = linear_map(op, shape, CPU)
    assert mapping is not None
    top, left, bottom, right = op.padding
    x = torch.tensor(rng.normal(size=(2, *shape)), requires_grad=True)
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), torch.tensor(op.weight), None, op.stride, 0, op.dilation, op.groups)
    torch.testing.assert_close(mapping.forward(x.detach().reshape(2, -1)), y.detach().reshape(2, -1))
    v = torch.tensor(rng.normal(size=y.shape))
    (back,) = torch.autograd.grad(y, x, v)
    torch.testing.assert_close(mapping.transposed(v.reshape(2, -1)), back.reshape(2, -1))
    torch.testing.assert_close(mapping.transposed_columns(v.reshape(2, -1).T.contiguous()), back.reshape(2, -1).T)


def test_many_rows_take_the_same_path_in_chunks() -> None:
    rng = np.random.default_rng(0)
    op = Conv2d(rng.normal(size=(8, 6, 3, 3)), np.zeros(8), (2, 2), (1, 1, 1, 1))
    mapping = linear_map(op, (6, 17, 17), CPU)
    assert mapping is not None
    v = torch.tensor(rng.normal(size=(40, mapping.size_out)))
    expected = F.conv_transpose2d(v.reshape(40, 8, 9, 9), torch.tensor(op.weight), stride=2, padding=1)
    torch.testing.assert_close(mapping.transposed(v), expected.reshape(40, -1))


@pytest.mark.parametrize("op", [ReLU(), Add(), MaxPool2d((2, 2), (2, 2))])
def test_other_operators_have_no_map(op: Op) -> None:
    assert linear_map(op, (2, 4, 4), CPU) is None


def test_a_reshape_moves_nothing() -> None:
    mapping = linear_map(Reshape((8,)), (2, 4), CPU)
    assert mapping is not None and mapping.terms == 0
    x = torch.arange(16.0, dtype=torch.float64).reshape(2, 8)
    assert mapping.forward(x) is x and mapping.transposed(x) is x and not mapping.forward(x, "minus").any()
