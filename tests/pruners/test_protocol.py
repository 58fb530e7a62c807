"""The protocol around the methods: registry, ties, losses, per-sample gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import exactprune
from exactprune import pruners
from exactprune.errors import OptionError


def test_every_method_says_where_it_comes_from():
    for name, cls in pruners.methods().items():
        assert cls.name == name and cls.reference and cls.when and cls.prunes in ("weights", "neurons", "blocks")
        assert __import__(cls.__module__, fromlist=["x"]).__doc__


def test_own_method_and_unknown_ones(mlp):
    @pruners.register
    class Largest(pruners.ScorePruner[pruners.ScoreOptions]):
        name = "largest-first"
        reference = "nobody"
        data = "none"
        Options = pruners.ScoreOptions

        def score(self, problem):
            return {n: -w.abs() for n, w in problem.weights.items()}

    try:
        masks = pruners.mask("largest_first", mlp, sparsity=0.5)
        assert sum(int((~m).sum()) for m in masks.values()) == 46
    finally:
        pruners.registry._REGISTERED.pop("largest-first")
    with pytest.raises(OptionError, match="did you mean 'magnitude'"):
        pruners.mask("magnitud", mlp)
    with pytest.raises(OptionError, match="exists already"):
        pruners.register(type("Again", (Largest,), {"name": "magnitude"}))
    with pytest.raises(OptionError, match="not a class"):
        pruners.register(nn.Linear)  # type: ignore[arg-type]


def test_ties_go_by_the_flat_index():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    masks = pruners.mask("magnitude", net, sparsity=5 / 8)
    assert masks["0.weight"].sum() == 0 and masks["1.weight"].flatten().tolist() == [False, True, True, True]


def test_nothing_prunable_and_other_losses(mlp, batch):
    with pytest.raises(OptionError, match=r"no nn\.Linear"):
        pruners.mask("magnitude", nn.Sequential(nn.BatchNorm1d(3)), sparsity=0.5)
    double = pruners.score("snip", mlp, *batch, loss=lambda o, t: 2 * nn.functional.cross_entropy(o, t, reduction="none"))
    for name, score in pruners.score("snip", mlp, *batch).items():
        torch.testing.assert_close(double[name], score)


def test_shared_weights_and_groups_have_right_sample_gradients():
    """A layer used twice, a weight shared by two layers, and a grouped convolution, against autograd sample by sample."""
    from exactprune.pruners.problem import Problem
    from exactprune.pruners.taps import all_factors

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding="same", groups=2, padding_mode="reflect")
            self.again = nn.Conv2d(4, 4, 3, padding="same", groups=2)
            self.again.weight = self.conv.weight
            self.out = nn.Linear(64, 3)

        def forward(self, x):
            return self.out(torch.relu(self.again(torch.tanh(self.conv(torch.tanh(self.conv(x)))))).flatten(1))

    torch.manual_seed(0)
    net, x, y = Twice().double(), torch.rand(5, 4, 4, 4).double(), torch.randint(0, 3, (5,))
    factors, = all_factors(Problem(net, x, y, batch=2))
    for i in range(5):
        loss = nn.functional.cross_entropy(net(x[i:i + 1]), y[i:i + 1])
        for name, slope in zip(("conv.weight", "out.weight"), torch.autograd.grad(loss, [net.conv.weight, net.out.weight])):
            f = factors[name]
            torch.testing.assert_close(f.columns(0, f.size)[i], slope.flatten())
            torch.testing.assert_close(f.columns(5, 19)[i], slope.flatten()[5:19])
    for name, f in factors.items():
        torch.testing.assert_close(f.squares(), f.columns(0, f.size).square().sum(0), msg=name)


def test_every_method_is_known_without_any_other_import():
    """Also the one that lives above the package, in a fresh interpreter and without installed metadata."""
    code = ("import importlib.metadata as m; m.entry_points = lambda **_: ();"
            "import exactprune.pruners as p; assert 'scaling-up' in p.names();"
            "import torch; from torch import nn; torch.manual_seed(0);"
            "net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)); net[0].bias.data[0] = -9;"
            "assert int((~p.mask('scaling_up', net)['0.weight']).sum()) == 2")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method, options", [
    ("woodfisher", {"block": 5}), ("obc", {}), ("sparsegpt", {}), ("obs", {"block": "neuron", "damping": 1e-4}),
    ("lottery", {"epochs": 1, "rate": 0.5}), ("set", {"epochs": 2}), ("dsr", {"epochs": 2}), ("deep-r", {"epochs": 2}),
])
def test_long_methods_tell_how_far_they_are(mlp, batch, method, options):
    told: list[tuple[int, int]] = []
    exactprune.prune(mlp, method, 0.6, batch, progress=lambda done, total: told.append((done, total)), **options)
    done, totals = [d for d, _ in told], {total for _, total in told}
    assert done == sorted(done) and len(totals) == 1 and done[-1] == totals.pop()


def test_a_bar_of_the_command_line_shows_it():
    from exactprune.cli.prune import _bar

    class Bars:
        def __init__(self):
            self.seen = []

        def stage(self, name, total=None):
            self.seen.append([total, 0])

        def advance(self, count=1):
            self.seen[-1][1] += count

        def note(self, text): ...

    bars = Bars()
    tell = _bar(bars, "obc")
    for done, total in ((1, 3), (3, 3), (2, 4), (4, 4)):
        tell(done, total)
    assert bars.seen == [[3, 3], [4, 4]]
