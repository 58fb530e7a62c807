"""MLPrune, OBC, SparseGPT, Wanda and CBS against their reference implementations."""

from __future__ import annotations

import pytest
import torch
from pruning_oracle import SPARSITIES, disagreeing, flat

from exactprune import pruners
from exactprune.errors import OptionError
from exactprune.pruners import cbs, mlprune, woodfisher
from exactprune.pruners.problem import Problem
from exactprune.pruners.selection import unflatten


@pytest.mark.parametrize("damping", ("1e-05", "0.001"))
@pytest.mark.parametrize("pi", (0, 1))
def test_mlprune(oracle, damping, pi):
    truth = oracle("mlpnb_trained", "kfac")
    pruner = mlprune.MLPrune(mlprune.MLPruneOptions(damping=float(damping), pi=bool(pi)))
    problem = Problem(truth.module, truth.x, truth.y)
    for name, inverse in pruner.inverses(problem).items():
        theirs = truth.by_layer(f"kfac.pi{pi}.damp{damping}.finv_diag." + "{}")[name]
        torch.testing.assert_close(inverse.diagonal(), theirs, rtol=1e-6, atol=0)
    for sparsity in (0.5, 0.9):
        plan = pruner.plan(problem, sparsity)
        assert plan.scores is not None
        for name, theirs in truth.by_layer(f"kfac.pi{pi}.damp{damping}.score." + "{}").items():
            torch.testing.assert_close(plan.scores[name], theirs, rtol=1e-6, atol=0)
        theirs = truth.by_layer(f"kfac.pi{pi}.damp{damping}.mask.{sparsity}." + "{}")
        assert disagreeing(plan.masks, theirs, plan.scores) <= 1


def test_kronecker_factors(oracle):
    truth = oracle("mlpnb_trained", "kfac")
    for name, (a, g) in mlprune.kronecker_factors(Problem(truth.module, truth.x, truth.y)).items():
        torch.testing.assert_close(a[0], truth[f"np.A.{name[0]}"], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(g[0], truth[f"np.G.{name[0]}"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("damping", ("0", "0.01"))
def test_obc(oracle, sparsity, damping):
    """The reference runs in float32 on the weights themselves: masks within its rounding of ties, values where they agree."""
    truth = oracle("mlp_trained", "layerwise")
    plan = pruners.plan("obc", truth.module, truth.x, None, sparsity, damping=float(damping))
    for name, theirs in truth.by_layer(f"obc.rd{damping}.{sparsity}." + "{}.W").items():
        mine = plan.values[name]
        same = ((mine != 0) == (theirs != 0)).all(1)
        assert int((~same).sum()) <= 2  # rows; the greedy order flips where two costs agree to float32
        torch.testing.assert_close(mine[same].float(), theirs[same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparsegpt_and_wanda(oracle, sparsity):
    truth = oracle("mlp_trained", "layerwise")
    plan = pruners.plan("sparsegpt", truth.module, truth.x, None, sparsity)
    wanda = pruners.plan("wanda", truth.module, truth.x, None, sparsity)
    assert wanda.scores is not None
    for name in plan.masks:
        theirs = truth.by_layer(f"sparsegpt.{sparsity}." + "{}.W")[name]
        mine = plan.values[name]
        assert int(((mine != 0) != (theirs != 0)).sum()) <= 1  # the reference removes one more
        same = ((mine != 0) == (theirs != 0)).all(1)
        torch.testing.assert_close(mine[same].float(), theirs[same], rtol=1e-3, atol=2e-4)  # theirs is float32
        scores = truth.by_layer("wanda.score.{}")[name]
        torch.testing.assert_close(wanda.scores[name].float(), scores, rtol=1e-5, atol=0)
        wrong = wanda.masks[name] != truth.by_layer(f"wanda.mask.{sparsity}." + "{}")[name].bool()
        assert int(wrong.sum(1).max()) <= 1  # per row: theirs rounds every row down, ours has the exact total


def test_obc_is_greedy_obs_row_by_row():
    torch.manual_seed(0)
    layer = torch.nn.Linear(9, 1, bias=False).double()
    x = torch.randn(50, 9).double()
    from exactprune.pruners.obs import greedy

    plan = pruners.plan("obc", layer, x, None, 4 / 9)
    _, expected = greedy(layer.weight.detach()[0], torch.linalg.inv(2 / 50 * x.T @ x), 4)
    torch.testing.assert_close(plan.values["weight"][0], expected)


@pytest.mark.parametrize("sparsity, threshold", [(0.3, "0.0001"), (0.3, "1e-08"), (0.95, "0.0001")])
def test_cbs_search(oracle, sparsity, threshold):
    truth = oracle("mlp_trained", "cbs")
    theirs = truth[f"cbs.{threshold}.{sparsity}.pruned_idx"]
    search = cbs.Cbs(cbs.CbsOptions(threshold=float(threshold))).search(Problem(truth.module, truth.x, truth.y), len(theirs))
    different = list(set(search.pruned.tolist()) ^ set(theirs.tolist()))
    assert (search.scaled[different] == 0).all()  # weights without any gradient tie
    objectives = torch.tensor(search.objectives, dtype=torch.float64)
    torch.testing.assert_close(objectives, truth[f"cbs.{threshold}.{sparsity}.objectives"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("sparsity", (0.5, 0.95))
@pytest.mark.parametrize("damping", ("1e-05", "0.001"))
def test_cbs_updates(oracle, sparsity, damping):
    truth = oracle("mlp_trained", "cbs")
    problem = Problem(truth.module, truth.x, truth.y)
    keep = torch.ones(problem.size, dtype=torch.bool).index_fill(0, truth[f"cbs.{sparsity}.mag_idx"], False)
    masks = unflatten(keep, problem.shapes)
    for update in ("joint", "single"):
        options = woodfisher.WoodFisherOptions(damping=float(damping), block=-1, update=update)
        delta = flat(woodfisher.update(problem, masks, options))
        torch.testing.assert_close(delta, truth[f"cbs.{sparsity}.damp{damping}.delta_{update}"], rtol=1e-6, atol=1e-8)


def test_cbs_says_how_many_samples_fit(mlp, batch, monkeypatch):
    monkeypatch.setattr(cbs, "MAX_BYTES", 8 * 10 * 92)
    with pytest.raises(OptionError, match="give samples 10 or less"):
        pruners.mask("cbs", mlp, *batch, 0.5)
    assert pruners.mask("cbs", mlp, *batch, 0.5, samples=10)
