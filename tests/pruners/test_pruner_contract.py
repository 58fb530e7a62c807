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


def count(tensors: dict[str, torch.Tensor]) -> int:
    """How many are False."""
    return sum(int((~t).sum()) for t in tensors.values())


def same(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return first.keys() == other.keys() and all(torch.equal(t, other[name].cpu()) for name, t in first.items())


class Contract:
    """The suite; a subclass names the method and, where needed, options, a network and its input shape.

    ``moves`` says what a method may change besides zeroing what it prunes: the weights that stay, what belongs to removed
    neurons, or everything (methods that train).
    """

    method: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    sparsity: ClassVar[float] = 0.6
    shares: ClassVar[tuple[float, ...]] = (0.0, 0.37, 0.9, 1.0)
    per_layer: ClassVar[bool] = False
    moves: ClassVar[str] = "weights"

    @pytest.fixture
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                             nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()

    @pytest.fixture
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return torch.rand(24, 1, 4, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)

    # -- what the tests share ------------------------------------------------------------------------------------------

    def plan(self, net, data, sparsity=None, **more):
        return pruners.plan(self.method, net, *data, self.sparsity if sparsity is None else sparsity,
                            **(self.options | more))

    def counted(self, plan) -> dict[str, torch.Tensor]:
        """What the sparsity counts."""
        return plan.masks if plan.units is None else plan.units

    def expected(self, plan, sparsity) -> int:
        sizes = [t.numel() for t in self.counted(plan).values()]
        return sum(round(sparsity * n) for n in sizes) if self.per_layer else round(sparsity * sum(sizes))

    # -- the tests -----------------------------------------------------------------------------------------------------

    def test_exact_count(self, net, data):
        for sparsity in self.shares:
            plan = self.plan(net, data, sparsity)
            assert count(self.counted(plan)) == self.expected(plan, sparsity)
            applied = dict(pruners.apply(net, plan).named_parameters())
            assert all((applied[name][~mask] == 0).all() for name, mask in plan.masks.items() if name in applied)

    def test_determined_by_its_own_seed(self, net, data):
        """Twice the same under other global seeds, and the global generator is where it was."""
        plans = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            plans.append(self.plan(net, data))
            assert torch.equal(before, torch.get_rng_state())
        assert same(plans[0].masks, plans[1].masks) and same(plans[0].values, plans[1].values)

    def test_the_given_module_is_untouched(self, net, data):
        net.train()
        before, mode = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
        pruners.apply(net, self.plan(net, data))
        assert same(dict(net.state_dict()), before) and mode == [m.training for m in net.modules()]
        assert all(p.grad is None for p in net.parameters())

    def test_nothing_else_changes(self, net, data):
        plan = self.plan(net, data)
        assert set(plan.masks) == {n for n, p in net.named_parameters() if p.dim() > 1}
        pruned = pruners.apply(net, plan).state_dict()
        for name, value in net.state_dict().items():
            if name in pruned and name not in plan.masks:
                self.check_other(net, name, value, pruned[name], plan)

    def check_other(self, net, name, before, after, plan):
        """Biases, normalisation and its statistics."""
        if self.moves == "weights":
            assert torch.equal(before, after), name
        elif self.moves == "neurons":
            place = int(name.split(".")[0])
            owner = place - isinstance(net[place], nn.BatchNorm2d)
            stay = plan.units.get(f"{owner}.weight")
            off = before if stay is None or name not in dict(net.named_parameters()) else before * stay
            assert torch.equal(off, after), name
        else:
            assert after.isfinite().all()

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

    def test_bad_sparsity(self, net, data):
        for sparsity in (-0.1, 1.1, float("nan"), "half", True, None):
            with pytest.raises(OptionError, match="sparsity"):
                pruners.mask(self.method, net, *data, sparsity, **self.options)

    def test_unknown_option(self, net, data):
        with pytest.raises(OptionError, match="has no option"):
            self.plan(net, data, no_such_option=1)

    def test_empty_and_missing_data(self, net, data):
        with pytest.raises(DataError, match="at least one"):
            self.plan(net, (data[0][:0], data[1][:0]))
        needs = pruners.method(self.method).data
        for given in [] if needs == "none" else [(None, None)] if needs == "inputs" else [(None, None), (data[0], None)]:
            with pytest.raises(DataError, match="needs data"):
                self.plan(net, given)

    def test_nan_is_an_error(self, net, data):
        x = data[0].clone()
        x[0, 0, 0, 0] = float("nan")
        with pytest.raises(DataError, match="NaN"):
            self.plan(net, (x, data[1]))
        with torch.no_grad():
            next(net.parameters()).view(-1)[0] = float("nan")
        with pytest.raises(WeightError, match="NaN"):
            self.plan(net, data)

    def test_gradients_that_are_not_finite_are_an_error(self, net, data):
        """Of a loss without a derivative, for methods that use one; of huge data, or else the answer is finite."""
        for loss in (lambda o, t: o.sum(1) * float("nan"), lambda o, t: (o - o.detach()).abs().sqrt().sum(1)):
            if pruners.method(self.method).data == "labels":
                with pytest.raises(DataError, match=r"[Nn]a[Nn]|infinite"):
                    self.plan(net, data, loss=loss)
        try:
            plan = self.plan(net, (data[0] * 1e38, data[1]))
        except ExactPruneError:
            return
        assert all(v.isfinite().all() for v in plan.values.values())

    def test_report(self, net, data):
        result = exactprune.prune(net, self.method, self.sparsity, data, **self.options)
        report = result.report
        assert report.removed == count(result.masks) and report.sparsity == report.removed / report.prunable
        assert report.parameters == sum(p.numel() for p in net.parameters()) - report.removed
        assert report.macs is not None and report.macs_dense is not None and 0 <= report.macs <= report.macs_dense
        kept = [(name, int(mask.sum()), mask.numel()) for name, mask in result.masks.items()]
        assert [(r.name, r.kept, r.total) for r in report.layers] == kept
        assert report.collapsed == tuple(n for n, m in result.masks.items() if not m.any())
        assert report.seconds > 0 and report.peak_bytes >= 0 and self.method in str(report)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_cuda_agrees(self, net, data):
        here = self.plan(net, data)
        there = self.plan(copy.deepcopy(net).cuda(), tuple(t.cuda() for t in data))
        if self.moves != "everything":  # float32 training drifts apart, and the masks with it
            assert same(here.masks, there.masks)
            for name, value in here.values.items():
                torch.testing.assert_close(there.values[name].cpu(), value, rtol=1e-6, atol=1e-8)
        else:
            assert count(here.masks) == count(there.masks)


class TestRandom(Contract):
    method = "random"

    def test_seed(self, net, data):
        assert not same(self.plan(net, data).masks, self.plan(net, data, seed=1).masks)


class TestRandomPerLayer(Contract):
    method = "random"
    options: ClassVar[dict[str, Any]] = {"scope": "layer"}
    per_layer = True


class TestMagnitude(Contract):
    method = "magnitude"


class TestSnip(Contract):
    method = "snip"


class TestGrasp(Contract):
    method = "grasp"


class TestSynFlow(Contract):
    method = "synflow"
    options: ClassVar[dict[str, Any]] = {"iterations": 10}


class TestObd(Contract):
    method = "obd"
    options: ClassVar[dict[str, Any]] = {"steps": 2}


class TestObs(Contract):
    method = "obs"


class TestObsJoint(Contract):
    method = "obs"
    options: ClassVar[dict[str, Any]] = {"update": "joint", "curvature": "fisher", "damping": 1e-4}


class TestObsByNeuron(Contract):
    method = "obs"
    options: ClassVar[dict[str, Any]] = {"block": "neuron", "damping": 1e-4}


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


class TestObc(Contract):
    method = "obc"
    per_layer = True


class TestSparseGpt(Contract):
    method = "sparsegpt"
    options: ClassVar[dict[str, Any]] = {"block": 5}
    per_layer = True


class TestWanda(Contract):
    method = "wanda"
    per_layer = True


class TestNisp(Contract):
    method = "nisp"
    per_layer = True
    moves = "neurons"


class TestNispBudget(Contract):
    method = "nisp"
    options: ClassVar[dict[str, Any]] = {"budget": "neurons"}
    sparsity = 0.5
    shares = (0.0, 0.37, 0.5, 0.75)
    moves = "neurons"

    def test_too_small_a_budget(self, net, data):
        with pytest.raises(OptionError, match="one neuron per layer"):
            self.plan(net, data, 1.0)


class TestLottery(Contract):
    method = "lottery"
    options: ClassVar[dict[str, Any]] = {"epochs": 1, "rate": 0.8, "rewind": 1}
    moves = "everything"


class TestSet(Contract):
    method = "set"
    options: ClassVar[dict[str, Any]] = {"epochs": 2}
    moves = "everything"


class TestDsr(Contract):
    method = "dsr"
    options: ClassVar[dict[str, Any]] = {"epochs": 2, "threshold": 0.05}
    moves = "everything"


class TestDeepR(Contract):
    method = "deep-r"
    options: ClassVar[dict[str, Any]] = {"epochs": 2, "temperature": 1e-3}
    moves = "everything"


class TestEpsilonResNet(Contract):
    method = "epsilon-resnet"

    @pytest.fixture
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        blocks = [epsilon_resnet.EpsilonBlock(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()), 1e-3)
                  for _ in range(5)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16, 3)).eval()


class TestScalingUp(Contract):
    """How much goes is what can be proved, whatever the sparsity."""

    method = "scaling-up"
    moves = "neurons"

    def test_exact_count(self, net, data):
        """Exactly the neurons that are never positive at the 2^16 corners and at random points."""
        bits = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
        x = torch.cat([bits, torch.rand(20_000, 16, generator=torch.Generator().manual_seed(0))])
        for name, stay in self.plan(net, data).units.items():
            assert torch.equal(stay, (net[:int(name[0]) + 1](x) > 0).any(0))

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
