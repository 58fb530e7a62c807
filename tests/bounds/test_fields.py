"""Cropped convolutions against the whole matrix, in integers: equal to the last bit; CROWN on tiles against the whole layer."""

import itertools

import numpy as np
import pytest
import torch

from exactprune.bounds.crown import crown_rows
from exactprune.bounds.fields import field, tiles
from exactprune.bounds.layerwise import start
from exactprune.bounds.linear_maps import ConvMap, Window
from exactprune.bounds.program import compile_network
from exactprune.network import Node, build
from exactprune.ops import Add, Conv2d, ReLU

CPU = torch.device("cpu")


def window(rng: np.random.Generator, height: int, width: int) -> Window:
    top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
    left, right = sorted(rng.choice(width + 1, 2, replace=False))
    return Window(int(top), int(bottom), int(left), int(right))


def places(shape: tuple[int, ...], part: Window | None) -> torch.Tensor:
    image = np.arange(np.prod(shape)).reshape(shape)
    if part is not None:
        image = image[:, part.top : part.bottom, part.left : part.right].transpose(1, 2, 0)
    return torch.tensor(image.ravel().copy())


@pytest.mark.parametrize("kernel, stride", list(itertools.product([1, 2, 3, 5], [1, 2, 3])))
def test_crops_are_parts_of_the_whole_matrix(kernel, stride):
    rng = np.random.default_rng(kernel * 10 + stride)
    for before, after, size in itertools.product([0, 1, 2], [0, 2], [7]):
        weight = rng.integers(-5, 6, (3, 2, kernel, kernel)).astype(float)
        op = Conv2d(weight, rng.standard_normal(3), (stride, stride), (before, after, after, before))
        whole = ConvMap(op, (2, size, size + 1), CPU)
        matrix = whole.forward(torch.eye(whole.size_in, dtype=torch.float64)).T
        for _ in range(3):
            out = window(rng, *whole.shape_out[1:])
            for part_out, part_in in ((out, whole.field(out)), (out, None), (None, Window(0, size, 0, size + 1))):
                cropped = whole.crop(part_out, part_in)
                rows, columns = places(whole.shape_out, part_out), places(whole.shape_in, part_in)
                v = torch.randint(-4, 5, (3, len(rows))).double()
                got = v.new_zeros(3, whole.size_in)
                got[:, columns] = cropped.transposed(v)
                assert torch.equal(got, v @ matrix[rows])
                assert torch.equal(cropped.transposed_columns(v.T.contiguous()), got[:, columns].T)
                cropped.small = None  # crops this small are kept as matrices
                assert torch.equal(cropped.transposed_columns(v.T.contiguous()), got[:, columns].T)
                assert torch.equal(cropped.bias, whole.bias[rows])


def residual(rng: np.random.Generator):
    def conv(inputs, outputs, stride=1):
        return Conv2d(rng.standard_normal((outputs, inputs, 3, 3)) * 0.3, rng.standard_normal(outputs) * 0.1,
                      (stride, stride), (1, 1, 1, 1))
    ops = [(conv(2, 4, 2), (-1,)), (ReLU(), (0,)), (conv(4, 4), (1,)), (ReLU(), (2,)), (conv(4, 4), (3,)),
           (Add(), (4, 1)), (ReLU(), (5,)), (conv(4, 3), (6,)), (ReLU(), (7,))]
    return build([Node(f"n{i}", op, inputs) for i, (op, inputs) in enumerate(ops)], (2, 12, 10), np.float64)


@pytest.mark.parametrize("groups", [1, 3])
def test_tiles_give_the_bounds_of_the_whole_layer(groups):
    rng = np.random.default_rng(groups)
    network = residual(rng)
    middle = torch.tensor(rng.standard_normal((groups, 240)))
    results = {}
    for tiled in (True, False):
        program = compile_network(network)
        if not tiled:
            program.fields["images", None] = frozenset()
        state = start(program, middle - 0.05, middle + 0.05)
        for layer in range(program.layers):
            state.enter(layer)
            rows = torch.arange(program.size(program.preactivation(layer)))
            if layer:
                results[tiled, layer] = crown_rows(program, layer, rows, state.known, state.relaxations)
                state.narrow(layer, rows, *results[tiled, layer])
        last = program.layers - 1
        assert (field(program, last, tiles(program, last, rows)[0][1]) is not None) == tiled
    for layer in range(1, 4):
        for ours, whole in zip(results[True, layer], results[False, layer], strict=True):
            assert torch.allclose(ours, whole, rtol=1e-12, atol=1e-12)
