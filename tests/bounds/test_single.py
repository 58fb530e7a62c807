"""One box by columns against the passes for several boxes: the same bounds up to rounding, for every kind of network."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from random_networks import case

from exactprune.bounds.crown import crown_rows
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.layerwise import start
from exactprune.bounds.program import compile_network
from exactprune.bounds.relaxation import relax
from exactprune.network import Node, build
from exactprune.ops import ReLU


@pytest.mark.parametrize("family", ["dense", "image", "residual", "many-readers"])
def test_one_box_gets_the_bounds_that_two_equal_ones_get(family: str) -> None:
    for seed in range(900, 912):
        given = case(seed, family)
        program = compile_network(given.network)
        lower, upper = program.box(given.box)
        alone, twice = start(program, lower, upper), start(program, lower.repeat(2, 1), upper.repeat(2, 1))
        for layer in range(program.layers):
            rows = torch.arange(program.size(program.preactivation(layer)))
            results = []
            for state in (alone, twice):
                state.enter(layer)
                results.append(crown_rows(program, layer, rows, state.known, state.relaxations))
                state.narrow(layer, rows, *results[-1])
            for ours, theirs in zip(*results, strict=True):
                scale = 1 + float(theirs.abs().nan_to_num(posinf=0.0).max())
                torch.testing.assert_close(ours[0], theirs[1], rtol=1e-9, atol=1e-9 * scale)


def test_the_lines_of_a_relaxation_lie_on_the_right_side() -> None:
    """In rationals: v >= 0 takes a line above the ReLU, v < 0 one below, on_plus and on_all included."""
    generator = torch.Generator().manual_seed(1)
    size = 10.0 ** (torch.rand(3000, generator=generator, dtype=torch.float64) * 400 - 300).clamp(max=90)
    ratio = 10.0 ** (torch.rand(3000, generator=generator, dtype=torch.float64) * 40 - 20)
    sign = torch.randint(0, 3, (3000,), generator=generator)
    lower = torch.where(sign == 0, size, -size)
    upper = torch.where(sign == 0, size * (1 + ratio), torch.where(sign == 1, size * ratio, -size / (1 + ratio)))
    network = build([Node("relu", ReLU(), (-1,))], (3000,), np.float64)
    relaxation = relax(compile_network(network), 0, NodeBounds(lower[None], upper[None]))
    rows = (t[0].tolist() for t in (relaxation.low, relaxation.gap, relaxation.on_plus, relaxation.on_all))
    for least, most, low, gap, on_plus, on_all in zip(lower.tolist(), upper.tolist(), *rows, strict=True):
        for z in {least, most, 0.0} if least < 0 < most else {least, most}:
            exact = max(Fraction(z), 0)
            assert (Fraction(low) + Fraction(gap)) * Fraction(z) + Fraction(on_plus) - Fraction(on_all) >= exact, (least, most, z)
            assert Fraction(low) * Fraction(z) - Fraction(on_all) <= exact, (least, most, z)
            assert 0 <= low <= 1 and on_all >= 0
