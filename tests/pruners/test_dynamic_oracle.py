"""Lottery ticket, SET, DSR, Deep-R, NISP and the epsilon gate against their reference numbers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from pruning_oracle import SHARED
from torch import nn

from exactprune import pruners
from exactprune.errors import OptionError
from exactprune.formulations.nisp import LayerCost, total_cost
from exactprune.pruners import chains, deep_r, dsr, dynamic, epsilon_resnet, inf_fs, lottery, nisp
from exactprune.pruners import set as set_
from exactprune.pruners.problem import Problem
from exactprune.training import TrainOptions, train


def test_lottery_rounds(oracle):
    """Each round from the reference's own state: it removes up to two more than a fifth, always the smallest."""
    truth = oracle("mlp_trained", "lth")
    weights = {name: p.detach() for name, p in truth.module.named_parameters() if name.endswith("weight")}
    before = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for level in range(1, 11):
        theirs = {n: m.bool() for n, m in truth.by_layer(f"lth.level{level}." + "{}").items()}
        left = sum(int(m.sum()) for m in theirs.values())
        mine = lottery.next_masks(weights, before, 1 - left / 1888)
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
        remaining = sum(int(m.sum()) for m in before.values())
        assert abs(remaining - left - 0.2 * remaining) <= 2
        before = theirs


def test_lottery_schedule():
    rounds = lottery.Lottery().schedule(0.9)
    assert len(rounds) == 11 and rounds[-1] == 0.9
    np.testing.assert_allclose(rounds[:3], [0.2, 0.36, 0.488])


def test_lottery_rewinds_to_the_step(mlp, batch):
    """The ticket is the first training's state after k steps, masked; a step that is never reached is an error."""
    options = {"epochs": 2, "batch": 10, "rate": 0.5, "rewind": 3, "finish": "ticket"}
    plan = pruners.plan("lottery", mlp, *batch, 0.6, **options)
    state = train(mlp, *batch, TrainOptions(epochs=2, batch=10), snapshots=(3,)).snapshots[3]
    for name, value in plan.values.items():
        torch.testing.assert_close(value * plan.masks.get(name, 1), state[name] * plan.masks.get(name, 1), rtol=0, atol=0)
    with pytest.raises(OptionError, match="8 steps"):
        pruners.plan("lottery", mlp, *batch, 0.6, **options | {"rewind": 9})


@pytest.mark.parametrize("layer", (0, 2))
def test_set_drops(oracle, layer):
    truth = oracle("mlp_trained", "dst")
    mask = truth[f"start_mask.{layer}"].bool().flatten()
    weight = truth.module[layer].weight.detach().flatten() * mask
    for zeta in (0.1, 0.3):
        mine = set(set_.dropped(weight, mask, zeta, "magnitude").tolist())
        theirs = set(truth[f"set_intel.{zeta}.{layer}.pruned_idx"].tolist())
        assert mine <= theirs and len(theirs) - len(mine) <= 1
    gone = torch.zeros_like(mask)
    gone[set_.dropped(weight, mask, 0.3)] = True
    theirs = mask & ~truth[f"set_mocanu.0.3.{layer}.core_mask"].bool().flatten()
    for sign in (weight > 0, weight < 0):
        assert int(((gone ^ theirs) & sign).sum()) <= 1  # the authors' code keeps or drops the threshold itself


def test_set_grows_back_to_the_number(oracle):
    truth = oracle("mlp_trained", "dst")
    masks = {f"{k}.weight": truth[f"start_mask.{k}"].bool() for k in (0, 2)}
    weights = {n: (truth.module[int(n[0])].weight.detach() * m).clone() for n, m in masks.items()}
    set_.SparseEvolutionary().rewire(weights, masks, 0.1, torch.Generator().manual_seed(0))
    for k in (0, 2):
        assert int(masks[f"{k}.weight"].sum()) == int(truth[f"set_mocanu.0.3.{k}.n_after_growth"])
        assert (weights[f"{k}.weight"][~masks[f"{k}.weight"]] == 0).all()


@pytest.mark.parametrize("threshold", ("0.001", "0.01", "0.05"))
def test_dsr_step(oracle, threshold):
    truth = oracle("mlp_trained", "dst")
    gone, kept = [], []
    for k in (0, 2):
        mask = truth[f"start_mask.{k}"].bool()
        drop = dsr.dropped(truth.module[k].weight.detach(), mask, float(threshold))
        assert drop.flatten().nonzero().flatten().tolist() == truth[f"dsr.{threshold}.{k}.pruned_idx"].tolist()
        gone.append(int(drop.sum()))
        kept.append(int((mask & ~drop).sum()))
    np.testing.assert_allclose(dsr.growth(kept, sum(gone)), truth[f"dsr.{threshold}.grow_float"])
    for wanted in (50, 600):
        following = float(truth[f"dsr.{threshold}.next_threshold.N{wanted}"])
        assert dsr.adapted(float(threshold), sum(gone), wanted, 0.1) == pytest.approx(following, rel=1e-12)


@pytest.mark.parametrize("layer", (0, 2))
def test_deep_r_drops(oracle, layer):
    truth = oracle("mlp_trained", "dst")
    sign = truth[f"deepr.{layer}.sign_before"].float()
    weight = truth[f"deepr.{layer}.after_step"]
    mine = deep_r.crossed(weight, sign, sign != 0).flatten().nonzero().flatten()
    assert mine.tolist() == sorted(truth[f"deepr.{layer}.pruned_idx"].tolist())


def test_shares_add_up_and_respect_room():
    assert dynamic.spread(10, [1.0, 1.0, 2.0], [1, 10, 10]) == [1, 3, 6]
    for number in range(31):
        shares = dynamic.spread(number, [3.0, 0.5, 1.0], [5, 20, 6])
        assert sum(shares) == number and all(s <= r for s, r in zip(shares, (5, 20, 6)))


@pytest.mark.parametrize("method", ("set", "dsr", "deep-r"))
def test_dynamic_training_keeps_the_number_and_learns(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > x[:, 1]).long()
    more = {"zeta": 0.1} if method == "set" else {}
    plan = pruners.plan(method, net, x, y, 0.5, epochs=12, batch=20, lr=0.5 if method == "deep-r" else 0.1, **more)
    assert sum(int((~m).sum()) for m in plan.masks.values()) == 128
    pruned = pruners.apply(net, plan)
    assert (pruned(x).argmax(1) == y).float().mean() > 0.85
    start = dynamic.first_masks(Problem(net), 0.5, "uniform", torch.Generator().manual_seed(0))
    assert any(not torch.equal(plan.masks[n], start[n]) for n in start)  # connections moved


# -- NISP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking, key", [("inf-fs", "inffs_paper"), ("pyifs", "pyifs"), ("ones", "ones")])
def test_nisp_importances(oracle, ranking, key):
    truth = oracle("mlp_trained", "nisp")
    scores = pruners.score("nisp", truth.module, truth.x, ranking=ranking)
    torch.testing.assert_close(scores["0.weight"], truth[f"nisp.{key}.s_frl"], rtol=1e-6, atol=0)
    chain = chains.chain_of(truth.module)
    inputs = nisp.input_importance(chain, truth.x[:1], truth[f"nisp.{key}.s_frl"])
    torch.testing.assert_close(inputs, truth[f"nisp.{key}.input_of.0"], rtol=1e-6, atol=0)


def _best(scores, prices, inputs, outputs, limit):
    """The best total importance over all subsets, by enumeration."""
    bits = np.array(list(product((0, 1), repeat=sum(len(s) for s in scores))))
    parts = np.split(bits, np.cumsum([len(s) for s in scores])[:-1], axis=1)
    counts = [part.sum(1) for part in parts]
    allowed = (total_cost([*counts, outputs], prices, inputs) <= limit) & np.all(counts, axis=0)
    return sum(part @ s for s, part in zip(scores, parts))[allowed].max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", ("neurons", "parameters", "macs"))
def test_nisp_program_is_optimal(seed, budget):
    rng = np.random.default_rng(seed)
    sizes = [5, 4, 3]
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    scores = [rng.random(n) for n in sizes]
    shapes = {name: (1,) for name, _ in net.named_children()}
    prices, inputs = chains.costs(chains.chain_of(net), shapes, budget)
    limit = rng.uniform(0.4, 0.8) * total_cost([*sizes, 2], prices, inputs)
    kept = nisp.solve([torch.tensor(s) for s in scores], prices, inputs, 2, limit, nisp.NispOptions(budget=budget))
    mine = sum(float(s @ k.numpy()) for s, k in zip(scores, kept))
    assert mine == pytest.approx(_best(scores, prices, inputs, 2, limit), rel=1e-9)


def test_nisp_closed_form_is_the_program(mlp, batch):
    """With a number per layer, sorting is optimal: compare with all subsets."""
    plan = pruners.plan("nisp", mlp, batch[0], sparsity=0.4)
    assert plan.units is not None and plan.scores is not None
    for name, stay in plan.units.items():
        scores = plan.scores[name]
        best = max(float(scores[list(bits)].sum()) for bits in _subsets(len(scores), int(stay.sum())))
        assert float(scores[stay].sum()) == pytest.approx(best)


def _subsets(size, number):
    from itertools import combinations

    return combinations(range(size), number)


def test_nisp_prices_are_the_networks(mlp):
    chain = chains.chain_of(mlp)
    prices, inputs = chains.costs(chain, {name: (1,) for name, _ in mlp.named_children()}, "parameters")
    assert total_cost([7, 5, 3], prices, inputs) == sum(p.numel() for p in mlp.parameters())
    assert prices[0] == LayerCost(1.0, 1.0)


def test_nisp_on_a_convolutional_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.rand(20, 1, 4, 4)
    for budget in ("layer", "macs"):
        plan = pruners.plan("nisp", net, x, sparsity=0.5, budget=budget)
        pruned = pruners.apply(net, plan)
        assert plan.units is not None
        off = ~plan.units["0.weight"]
        assert (pruned[:3](x)[:, off] == 0).all() and off.any()


def test_nisp_refuses_other_structures(batch):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(OptionError, match=r"nn\.Sequential"):
        pruners.mask("nisp", Other(), batch[0], sparsity=0.5)
    layer = nn.Linear(6, 6)
    with pytest.raises(OptionError, match="two places"):
        pruners.mask("nisp", nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3)), batch[0], sparsity=0.5)


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    samples = np.random.default_rng(0).integers(0, 5, (40, 6)).astype(float)
    np.testing.assert_allclose(inf_fs.spearman(torch.tensor(samples)), spearmanr(samples)[0], atol=1e-12)


# -- epsilon-ResNet ----------------------------------------------------------------------------------------------------


def test_gate_cases():
    path = SHARED / "oracles" / "pruning" / "eps_resnet_gate.npz"
    if not path.exists():
        pytest.skip(f"cases are not in {path}")
    cases = np.load(path)
    for case in {key.rsplit(".", 1)[0] for key in cases.files}:
        value = epsilon_resnet.gate(torch.tensor(cases[f"{case}.F"]), float(cases[f"{case}.eps"]))
        assert float(value) == float(cases[f"{case}.identity_w"]), case


def test_blocks_that_are_the_identity_are_removed():
    torch.manual_seed(0)
    small, large = (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(2))
    with torch.no_grad():
        small[0].weight.mul_(1e-3)
        small[0].bias.zero_()
    block = epsilon_resnet.EpsilonBlock
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), block(small, 0.5), block(large, 1e-3), nn.Flatten(), nn.Linear(8, 3))
    net = epsilon_resnet.EpsilonNet(layers, epsilon_resnet.SideOutput(2, 3), after=2)
    x, y = torch.rand(10, 1, 4, 4), torch.randint(0, 3, (10,))
    for options in ({}, {"epsilon": -2.0}, {"epsilon": 0.1}):
        plan = pruners.plan("epsilon-resnet", net, x, sparsity=0.5, **options)
        pruned = pruners.apply(net, plan)
        assert list(plan.replaced) == ["layers.1"] and isinstance(pruned.get_submodule("layers.1"), nn.Identity)
        torch.testing.assert_close(pruned(x), net(x), rtol=0, atol=0)
    assert net.side_loss(x, y).requires_grad
    with pytest.raises(OptionError, match="EpsilonBlock"):
        pruners.mask("epsilon-resnet", layers[0], x, sparsity=0.5)
