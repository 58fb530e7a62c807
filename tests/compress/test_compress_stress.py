"""Random stably-structured networks of every shape: the claim holds exactly, sizes only shrink, every count adds up.

A small dose runs always; ``-m slow`` runs 1,200 networks at three budgets each.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from exactprune.compress import compress_network
from exactprune.compress.measure import search_deviation
from exactprune.domain import Box, uniform
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Pad, ReLU, Reshape, Scale, Transpose


def planted(tools, rng, op):
    """Plant dead, constant, active, doubled and dependent units."""
    size = len(op.bias)
    if rng.random() < 0.5:
        op = tools.killed(op, *rng.permutation(size)[:rng.integers(0, size + 1)])
    if rng.random() < 0.3:
        op = tools.constant(op, int(rng.integers(size)), float(rng.integers(-4, 5) / 8))
    if rng.random() < 0.3:
        op = replace(op, bias=op.bias + np.float32(20) * (rng.random(size) < 0.5).astype(np.float32))
    if rng.random() < 0.2:
        weight, bias = op.weight.copy(), op.bias.copy()
        weight[0], bias[0] = weight[-1] * 2, bias[-1] * 2
        op = replace(op, weight=weight, bias=bias)
    if size > 2 and rng.random() < 0.2:
        weight, bias = op.weight.copy(), op.bias.copy()
        weight[1], bias[1] = weight[0] - weight[2], bias[0] - bias[2] + 20
        op = replace(op, weight=weight, bias=bias)
    return op


def dense(tools, rng):
    widths = [int(w) for w in rng.integers(1, 7, 5)]
    ops = []
    for n, m in pairwise(widths):
        ops += [planted(tools, rng, tools.affine(rng, m, n, float(rng.random() * 0.8))), ReLU()][:1 if rng.random() < 0.1 else 2]
    return tools.chain((widths[0],), *(ops[:-1] if rng.random() < 0.7 else ops))


class Graph:
    """A random DAG of convolutions, residual blocks, padded shortcuts, pools and layouts."""

    def __init__(self, tools, rng):
        self.tools, self.rng, self.nodes = tools, rng, []
        self.channels, self.side = int(rng.integers(2, 5)), int(rng.integers(2, 5))

    def add(self, op, *inputs):
        self.nodes.append(Node(f"n{len(self.nodes)}", op, inputs))
        return len(self.nodes) - 1

    def mixer(self, m, n, groups=1):
        kernel = int(self.rng.choice([1, 3]))
        op = self.tools.conv(self.rng, m, n, k=kernel, padding=kernel // 2, groups=groups)
        sparse = op.weight * (self.rng.random(op.weight.shape) > self.rng.random() * 0.7).astype(np.float32)
        return planted(self.tools, self.rng, replace(op, weight=sparse))

    def residual(self, x):
        inner = int(self.rng.integers(1, 5))
        y = self.add(ReLU(), self.add(self.mixer(inner, self.channels), x))
        y = self.add(self.mixer(self.channels, inner), y)
        if self.rng.random() < 0.3:
            shape = (self.channels, 1, 1)
            y = self.add(Scale(self.tools.dyadic(self.rng, *shape), self.tools.dyadic(self.rng, *shape)), y)
        x = self.add(Add(), y, x)
        return self.add(ReLU(), x) if self.rng.random() < 0.8 else x

    def depthwise(self, x):
        return self.add(ReLU(), self.add(self.mixer(self.channels, self.channels, self.channels), x))

    def plain(self, x):
        old, self.channels = self.channels, int(self.rng.integers(1, 6))
        return self.add(ReLU(), self.add(self.mixer(self.channels, old), x))

    def shortcut(self, x):
        before, after = (int(n) for n in self.rng.integers(0, 2, 2))
        wide = self.add(Pad(((before, after), (0, 0), (0, 0)), float(self.rng.choice([0, 0, 0.5]))), x)
        y = self.add(self.mixer(self.channels + before + after, self.channels), x)
        self.channels += before + after
        return self.add(ReLU(), self.add(Add(), wide, y))

    def projection(self, x):
        """A residual block with a projection shortcut: a sum of mixers before the ReLU."""
        inner, old = int(self.rng.integers(1, 5)), self.channels
        self.channels = int(self.rng.integers(1, 6))
        y = self.add(ReLU(), self.add(self.mixer(inner, old), x))
        main, short = self.add(self.mixer(self.channels, inner), y), self.add(self.mixer(self.channels, old), x)
        return self.add(ReLU(), self.add(Add(), main, short))

    def fork(self, x):
        """Two layers whose sum only a mixer reads."""
        old, width, self.channels = self.channels, int(self.rng.integers(1, 6)), int(self.rng.integers(1, 6))
        a, b = (self.add(ReLU(), self.add(self.mixer(width, old), x)) for _ in range(2))
        return self.add(ReLU(), self.add(self.mixer(self.channels, width), self.add(Add(), a, b)))

    def straight(self, x):
        """Mixers with no ReLU between."""
        old, width, self.channels = self.channels, int(self.rng.integers(1, 8)), int(self.rng.integers(1, 6))
        return self.add(ReLU(), self.add(self.mixer(self.channels, width), self.add(self.mixer(width, old), x)))

    def head(self, x):
        choice = self.rng.random()
        if choice < 0.3:
            x = self.add(MaxPool2d((2, 2), (1, 1), (0, 0, 1, 1)), x)
        elif choice < 0.5:
            x = self.add(AvgPool2d((2, 2), (1, 1), (1, 1, 0, 0), bool(self.rng.random() < 0.5)), x)
        if self.rng.random() < 0.2:
            return
        shape = Network(tuple(self.nodes), (2, self.side, self.side), np.dtype(np.float32)).shapes[x]
        if self.rng.random() < 0.4:
            x = self.add(Transpose((1, 2, 0)), x)
        x = self.add(Reshape((int(np.prod(shape)),)), x)
        self.add(self.tools.affine(self.rng, 3, int(np.prod(shape)), 0.5), x)

    def network(self):
        x = self.add(ReLU(), self.add(self.mixer(self.channels, 2), INPUT))
        blocks = [self.residual, self.residual, self.depthwise, self.plain, self.shortcut, self.projection, self.fork,
                  self.straight]
        for _ in range(int(self.rng.integers(1, 4))):
            x = self.rng.choice(blocks)(x)
        self.head(x)
        return build(self.nodes, (2, self.side, self.side), np.float32)


def check(tools, seed):
    rng = np.random.default_rng(seed)
    f = dense(tools, rng) if rng.random() < 0.5 else Graph(tools, rng).network()
    low = rng.integers(-4, 5, f.input_shape) / 4
    box = Box(low, low + rng.integers(0, 5, f.input_shape) / 4)
    for budget in ("exact", "rounding", float(10.0 ** rng.integers(-4, 1))):
        rewrite = compress_network(f, box, tools.verdicts(f, box), max_deviation=budget)
        g = rewrite.network
        for x in np.concatenate([box.sample(1, rng), box.corners(2, rng)]):
            assert np.abs(tools.exact(f, x) - tools.exact(g, x)).max() <= Fraction(rewrite.eps), (seed, budget)
        assert rewrite.eps <= rewrite.budget and g.parameters <= f.parameters and g.neurons <= f.neurons, (seed, budget)
        assert (g.input_shape, g.output_shape, g.dtype) == (f.input_shape, f.output_shape, f.dtype)
        new = sum(int((units < 0).sum()) * (v.status.size // len(units))
                  for (_, units), v in zip(rewrite.origin, rewrite.verdicts, strict=True))
        assert f.neurons - g.neurons == sum(r.neurons for r in rewrite.removals) - new, (seed, budget)


def test_random_networks_small_dose(tools):
    for seed in range(5):
        check(tools, seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2200, 100))
def test_random_networks(tools, start):
    for seed in range(start, start + 100):
        check(tools, seed)


def test_the_search_finds_the_worst_deviation_of_an_affine_change(tools):
    rng = np.random.default_rng(0)
    f = tools.chain((4,), Affine(rng.standard_normal((2, 4)), np.zeros(2)), dtype=np.float64)
    op = f.nodes[0].op
    change = rng.standard_normal((2, 4))
    g = tools.chain((4,), Affine(op.weight + change, op.bias), dtype=np.float64)
    found = search_deviation(f, g, uniform(-1, 1, (4,)))
    assert found.deviation == pytest.approx(np.abs(g.nodes[0].op.weight - op.weight).sum(axis=1).max())
    true = np.abs(tools.exact(f, found.point) - tools.exact(g, found.point)).max()
    assert Fraction(found.deviation) <= true
    assert search_deviation(f, f, uniform(-1, 1, (4,))).deviation == 0


def test_one_convolution_is_a_network_too(tools):
    rng = np.random.default_rng(1)
    f = tools.chain((1, 3, 3), Conv2d(rng.standard_normal((2, 1, 2, 2)).astype(np.float32), np.zeros(2, np.float32)))
    assert compress_network(f, uniform(0, 1, (1, 3, 3)), ()).network is f
