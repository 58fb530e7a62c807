"""What every method owes: one suite, inherited by each."""

from __future__ import annotations

import copy
import io
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import exactprune
from exactprune import pruners
from exactprune.errors import DataError, ExactPruneError, OptionError, WeightError
from exactprune.pruners import epsilon_resnet


class Contract:
    """The suite; a subclass names the method and, where needed, options, a network and its input shape."""

    method: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    sparsity: ClassVar[float] = 0.6
    exact: ClassVar[bool] = True

    @pytest.fixture
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                             nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()

    @pytest.fixture
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return torch.rand(24, 1, 4, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)

    def plan(self, net, data, sparsity=None, **more):
        return pruners.plan(self.method, net, *data, self.sparsity if sparsity is None else sparsity,
                            **(self.options | more))

    def removed(self, plan) -> int:
        tensors = plan.masks if plan.units is None else plan.units
        return sum(int((~t).sum()) for t in tensors.values())

    def expected(self, plan, sparsity) -> int:
        """Per layer, for methods that count so; all together otherwise."""
        tensors = plan.masks if plan.units is None else plan.units
        return round(sparsity * sum(t.numel() for t in tensors.values()))

    @pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 1.0])
    def test_exact_count(self, net, data, sparsity):
        plan = self.plan(net, data, sparsity)
        if self.exact:
            assert self.removed(plan) == self.expected(plan, sparsity)
        applied = dict(pruners.apply(net, plan).named_parameters())
        for name, mask in plan.masks.items():
            if name in applied:
                assert (applied[name][~mask] == 0).all()

    def test_same_again(self, net, data):
        first, again = self.plan(net, data), self.plan(net, data)
        assert all(torch.equal(first.masks[n], again.masks[n]) for n in first.masks)
        assert all(torch.equal(first.values[n], again.values[n]) for n in first.values)

    def test_the_given_module_is_untouched(self, net, data):
        net.train()
        before, mode = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
        plan = self.plan(net, data)
        pruners.apply(net, plan)
        assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
        assert mode == [m.training for m in net.modules()]
        assert all(p.grad is None for p in net.parameters())

    def test_only_prunable_parameters_change(self, net, data):
        plan = self.plan(net, data)
        if pruners.method(self.method).when == "during training" or plan.units is not None:
            return  # training moves everything; neuron methods switch biases off as documented
        assert set(plan.values) <= set(plan.masks)
        assert set(plan.masks) == {n for n, p in net.named_parameters() if p.dim() > 1}

    def test_state_dict_round_trip(self, net, data):
        pruned = exactprune.prune(net, self.method, self.sparsity, data, **self.options).module
        file = io.BytesIO()
        torch.save(pruned.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(pruned)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(other(data[0]), pruned(data[0]), rtol=0, atol=0)

    @pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), "half", True, None])
    def test_bad_sparsity(self, net, data, sparsity):
        if self.exact:
            with pytest.raises(OptionError, match="sparsity"):
                pruners.mask(self.method, net, *data, sparsity, **self.options)

    def test_unknown_option(self, net, data):
        with pytest.raises(OptionError, match="has no option"):
            self.plan(net, data, no_such_option=1)

    def test_empty_and_missing_data(self, net, data):
        with pytest.raises(DataError, match="at least one"):
            pruners.mask(self.method, net, data[0][:0], data[1][:0], 0.5, **self.options)
        needs = pruners.method(self.method).data
        if needs != "none":
            with pytest.raises(DataError, match="needs data"):
                pruners.mask(self.method, net, sparsity=0.5, **self.options)
        if needs == "labels":
            with pytest.raises(DataError):
                pruners.mask(self.method, net, data[0], sparsity=0.5, **self.options)

    def test_nan_is_an_error(self, net, data):
        x = data[0].clone()
        x[0, 0, 0, 0] = float("nan")
        with pytest.raises(DataError, match="NaN"):
            self.plan(net, (x, data[1]))
        with torch.no_grad():
            next(net.parameters()).view(-1)[0] = float("nan")
        with pytest.raises(WeightError, match="NaN"):
            self.plan(net, data)

    def test_overflowing_gradients_are_an_error(self, net, data):
        """Finite data, infinite gradients: an error of ours, or an answer that does not look at them."""
        try:
            plan = self.plan(net, (data[0] * 1e38, data[1]))
        except ExactPruneError:
            return
        assert all(v.isfinite().all() for v in plan.values.values())

    def test_report(self, net, data):
        result = exactprune.prune(net, self.method, self.sparsity, data, **self.options)
        report = result.report
        assert report.removed == sum(int((~m).sum()) for m in result.masks.values())
        assert report.sparsity == report.removed / report.prunable
        assert report.parameters == sum(p.numel() for p in net.parameters()) - report.removed
        assert report.macs is not None and report.macs_dense is not None and 0 <= report.macs <= report.macs_dense
        assert report.seconds > 0 and self.method in str(report)
        assert [r.kept for r in report.layers if r.collapsed] == [0] * len(report.collapsed)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_cuda_agrees(self, net, data):
        here = self.plan(net, data)
        there = self.plan(copy.deepcopy(net).cuda(), tuple(t.cuda() for t in data))
        if pruners.method(self.method).when != "during training":
            assert all(torch.equal(m, there.masks[n].cpu()) for n, m in here.masks.items())
            for name, value in here.values.items():
                torch.testing.assert_close(there.values[name].cpu(), value, rtol=1e-6, atol=1e-8)


class LayerContract(Contract):
    """For methods that prune each layer to the sparsity."""

    def expected(self, plan, sparsity) -> int:
        return sum(round(sparsity * m.numel()) for m in (plan.units or plan.masks).values())


class TestRandom(Contract):
    method = "random"

    def test_seed(self, net, data):
        assert any(not torch.equal(m, self.plan(net, data, seed=1).masks[n]) for n, m in self.plan(net, data).masks.items())


class TestRandomPerLayer(LayerContract):
    method = "random"
    options: ClassVar[dict[str, Any]] = {"scope": "layer"}


class TestMagnitude(Contract):
    method = "magnitude"


class TestSnip(Contract):
    method = "snip"


class TestGrasp(Contract):
    method = "grasp"


class TestSynFlow(Contract):
    method = "synflow"


class TestObd(Contract):
    method = "obd"
    options: ClassVar[dict[str, Any]] = {"steps": 2}


class TestObs(Contract):
    method = "obs"


class TestObsJoint(Contract):
    method = "obs"
    options: ClassVar[dict[str, Any]] = {"update": "joint", "curvature": "fisher", "damping": 1e-4}


class TestWoodFisher(Contract):
    method = "woodfisher"
    options: ClassVar[dict[str, Any]] = {"block": 7, "steps": 2}


class TestWoodFisherJoint(Contract):
    method = "woodfisher"
    options: ClassVar[dict[str, Any]] = {"update": "joint", "average": 5}


class TestMLPrune(Contract):
    method = "mlprune"
    options: ClassVar[dict[str, Any]] = {"update": True}


class TestCbs(Contract):
    method = "cbs"


class TestObc(LayerContract):
    method = "obc"


class TestSparseGpt(LayerContract):
    method = "sparsegpt"
    options: ClassVar[dict[str, Any]] = {"block": 5}


class TestWanda(LayerContract):
    method = "wanda"


class TestNisp(LayerContract):
    method = "nisp"


class TestNispBudget(Contract):
    method = "nisp"
    options: ClassVar[dict[str, Any]] = {"budget": "neurons"}
    sparsity = 0.5

    @pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.75])
    def test_exact_count(self, net, data, sparsity):
        assert self.removed(self.plan(net, data, sparsity)) == round(sparsity * 8)

    def test_too_small_a_budget(self, net, data):
        with pytest.raises(OptionError, match="one neuron per layer"):
            self.plan(net, data, 1.0)


class TestLottery(Contract):
    method = "lottery"
    options: ClassVar[dict[str, Any]] = {"epochs": 1, "rate": 0.8, "rewind": 1}


class TestSet(Contract):
    method = "set"
    options: ClassVar[dict[str, Any]] = {"epochs": 2}


class TestDsr(Contract):
    method = "dsr"
    options: ClassVar[dict[str, Any]] = {"epochs": 2, "threshold": 0.05}


class TestDeepR(Contract):
    method = "deep-r"
    options: ClassVar[dict[str, Any]] = {"epochs": 2, "temperature": 1e-3}


class TestEpsilonResNet(Contract):
    method = "epsilon-resnet"

    @pytest.fixture
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        blocks = [epsilon_resnet.EpsilonBlock(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()), 1e-3)
                  for _ in range(5)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16, 3)).eval()


class TestScalingUp(Contract):
    method = "scaling-up"
    exact = False

    @pytest.fixture
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        net[1].bias.data[:2] = -5
        return net

    def test_train_mode_and_losslessness(self, net, data):
        result = exactprune.prune(net, "scaling-up", 0.5, data, structured=True)
        masked = exactprune.prune(net, "scaling-up", 0.5, data)
        torch.testing.assert_close(masked.module(data[0]), net(data[0]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.module(data[0]), net(data[0]), rtol=1e-5, atol=1e-6)
        assert result.report.parameters_stored < sum(p.numel() for p in net.parameters())


def test_every_method_has_a_contract():
    suites = [c for name, c in globals().items() if name.startswith("Test") and issubclass(c, Contract)]
    assert {suite.method for suite in suites} == set(pruners.names())


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
    """A layer used twice, and a grouped convolution, against autograd sample by sample."""
    from exactprune.pruners.problem import Problem
    from exactprune.pruners.taps import all_factors

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding="same", groups=2, padding_mode="reflect")
            self.out = nn.Linear(64, 3)

        def forward(self, x):
            return self.out(torch.relu(self.conv(torch.tanh(self.conv(x)))).flatten(1))

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
