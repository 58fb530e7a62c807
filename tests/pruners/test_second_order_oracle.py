"""OBD, OBS and WoodFisher against closed forms and their reference implementations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pruning_oracle import SHARED, SPARSITIES, disagreeing, flat
from torch import nn

from exactprune import pruners
from exactprune.errors import OptionError
from exactprune.pruners import obs, sweep, woodfisher
from exactprune.pruners.curvature import dense, diagonal, neuron_blocks
from exactprune.pruners.problem import Problem

CURVATURES = {"hessian": "hess", "gauss-newton": "ggn", "fisher": "ef"}


@pytest.mark.parametrize("curvature", CURVATURES)
def test_obd_saliencies(oracle, curvature):
    truth = oracle("mlp_trained", "obd")
    scores = pruners.score("obd", truth.module, truth.x, truth.y, curvature=curvature)
    for name, theirs in truth.by_layer(f"obd.saliency_{CURVATURES[curvature]}." + "{}").items():
        torch.testing.assert_close(scores[name], theirs, rtol=1e-6, atol=1e-15)


def test_hessian_diagonal_is_the_products_diagonal(oracle):
    truth = oracle("mlp_trained", "obd")
    h = diagonal(Problem(truth.module, truth.x, truth.y), "hessian")
    for k in (0, 2):
        mine = h[f"{k}.weight"].flatten()[truth[f"obd.check_idx.{k}"]]
        torch.testing.assert_close(mine, truth[f"obd.check_hvp.{k}"], rtol=1e-6, atol=1e-12)


def test_hessian_of_a_layer_used_twice(batch):
    """Its outputs are quadratic in a weight: the Gauss-Newton shortcut must not be taken."""
    torch.manual_seed(0)
    layer, tied = nn.Linear(6, 6), nn.Linear(6, 6)
    tied.weight = layer.weight
    for net in (nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(layer, nn.ReLU(), tied)):
        problem = Problem(net, *batch)
        torch.testing.assert_close(flat(diagonal(problem, "hessian")), dense(problem, "hessian").diagonal())
        assert not torch.allclose(flat(diagonal(problem, "hessian")), flat(diagonal(problem, "gauss-newton")), rtol=1e-3)


@pytest.fixture
def closed():
    path = SHARED / "oracles" / "pruning" / "closed_form.npz"
    if not path.exists():
        pytest.skip(f"closed forms are not in {path}")
    return {k: torch.tensor(v) for k, v in np.load(path).items()}


@pytest.fixture
def least_squares(closed):
    net = nn.Linear(8, 1, bias=False).double()
    net.weight.data = closed["w"][None].clone()
    return net


def test_smooth_network_curvatures(closed):
    """4-3-3 with biases and a smooth activation: Hessian, Gauss-Newton and Fisher differ."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)).double()
    nn.utils.vector_to_parameters(closed["theta"], net.parameters())
    weights = [*range(12), *range(15, 24)]
    problem = Problem(net, closed["net_x"], closed["net_y"])
    for kind, key in (("hessian", "exact"), ("gauss-newton", "gn"), ("fisher", "ef")):
        matrix = closed[f"H_{key}"][weights][:, weights]
        torch.testing.assert_close(dense(problem, kind), matrix, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(flat(diagonal(problem, kind)), matrix.diagonal(), rtol=1e-6, atol=1e-12)
        scores = pruners.score("obd", net, closed["net_x"], closed["net_y"], curvature=kind)
        torch.testing.assert_close(flat(scores), closed[f"obd_{key}"][weights], rtol=1e-6, atol=1e-15)


def test_obs_single_deletions(closed, least_squares):
    x, t = closed["X"], closed["t"]
    scores = pruners.score("obs", least_squares, x, t, damping=0.0)
    torch.testing.assert_close(scores["weight"][0], closed["obs_dL"], rtol=1e-6, atol=0)
    inverse = torch.linalg.inv(closed["H"])
    for q in range(8):
        delta = obs.single_update(closed["w"], inverse, q)
        torch.testing.assert_close(delta, closed["obs_delta"][q], rtol=1e-9, atol=1e-12)
    obd = pruners.score("obd", least_squares, x, t)
    torch.testing.assert_close(obd["weight"][0], closed["obd_saliency"], rtol=1e-6, atol=0)


def test_obs_subsets_and_greedy_order(closed, least_squares):
    inverse = torch.linalg.inv(closed["H"])
    for subset, delta in zip(closed["subsets"], closed["joint_delta"]):
        torch.testing.assert_close(obs.joint_update(closed["w"], inverse, subset), delta, rtol=1e-9, atol=1e-12)
    order, weights = obs.greedy(closed["w"], inverse, 3)
    assert order.tolist() == closed["greedy_order"].tolist()
    torch.testing.assert_close(weights, closed["greedy_w"], rtol=1e-9, atol=1e-12)
    plan = pruners.plan("obs", least_squares, closed["X"], closed["t"], 3 / 8)
    torch.testing.assert_close(plan.values["weight"][0], closed["greedy_w"], rtol=1e-6, atol=1e-9)
    error = closed["X"] @ plan.values["weight"][0] - closed["t"]
    torch.testing.assert_close(error.square().mean() / 2 - closed["L0"], closed["greedy_dL"], rtol=1e-6, atol=1e-9)


def test_sum_of_single_updates(closed):
    inverse, subset = torch.linalg.inv(closed["H"]), closed["greedy_order"]
    moved = closed["w"] + obs.single_updates(closed["w"], inverse, subset)
    torch.testing.assert_close(moved.index_fill(0, subset, 0), closed["woodfisher_sum_w"], rtol=1e-9, atol=1e-12)


def test_greedy_ends_at_the_joint_solution():
    torch.manual_seed(0)
    root, w = torch.randn(40, 12).double(), torch.randn(12).double()
    inverse = torch.linalg.inv(root.T @ root / 40)
    order, moved = obs.greedy(w, inverse, 5)
    torch.testing.assert_close(moved, (w + obs.joint_update(w, inverse, order)).index_fill(0, order, 0))


@pytest.mark.parametrize("kind", ["gauss-newton", "fisher"])
@pytest.mark.parametrize("update", ["greedy", "joint", "single", "none"])
def test_obs_by_neuron_is_obs_on_the_block_diagonal_matrix(mlp, batch, kind, update, monkeypatch):
    problem = Problem(mlp, *batch)
    blocks = list(neuron_blocks(problem, kind))
    matrix = torch.block_diag(*blocks)
    whole, at = dense(problem, kind), torch.block_diag(*(torch.ones_like(b) for b in blocks)).bool()
    torch.testing.assert_close(matrix, whole * at)
    monkeypatch.setattr(obs, "dense", lambda *_: matrix.clone())
    monkeypatch.setattr(sweep, "PANEL", 4)
    for first in (0.0, 0.2):
        known = replace(problem, previous=pruners.mask("magnitude", mlp, sparsity=first))
        plans = [obs.Obs(obs.ObsOptions(curvature=kind, damping=1e-4, update=update, block=block)).plan(known, 0.7)
                 for block in ("neuron", "network")]
        for name, mask in plans[0].masks.items():
            assert torch.equal(mask, plans[1].masks[name])
            torch.testing.assert_close(plans[0].values[name], plans[1].values[name], rtol=1e-6, atol=1e-8)


def test_neuron_blocks_of_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    problem = Problem(net, torch.rand(9, 2, 3, 3).double(), torch.randint(0, 3, (9,)))
    for kind in ("gauss-newton", "fisher"):
        blocks, whole = list(neuron_blocks(problem, kind)), dense(problem, kind)
        at = torch.block_diag(*(torch.ones_like(b) for b in blocks)).bool()
        torch.testing.assert_close(torch.block_diag(*blocks), whole * at)


def test_obs_refuses_what_does_not_fit():
    with pytest.raises(OptionError, match="use woodfisher"):
        pruners.mask("obs", nn.Linear(200, 100), torch.rand(4, 200), torch.randint(0, 100, (4,)), 0.5)
    with pytest.raises(OptionError, match="larger damping"):
        pruners.mask("obs", nn.Linear(5, 3), torch.rand(2, 5), torch.randint(0, 3, (2,)), 0.5, damping=0.0)


# -- WoodFisher --------------------------------------------------------------------------------------------------------

CASES = [(f"wf_block.damp{damping}.{name}", damping, options) for damping in ("1e-05", "0.001") for name, options in (
    ("joint", {}), ("layer", {"scope": "layer"}), ("joint.split512", {"block": 512}))]


@pytest.mark.parametrize("key, damping, options", [*CASES, ("wf_full.damp1e-05.joint", "1e-05", {"block": -1})])
def test_woodfisher(oracle, key, damping, options):
    truth = oracle("mlp_trained", "woodfisher")
    wanted = woodfisher.WoodFisherOptions(damping=float(damping), **options)
    problem = Problem(truth.module, truth.x, truth.y)
    inverse = woodfisher.inverse_diagonal(problem, wanted)
    torch.testing.assert_close(inverse, flat(truth.by_layer(key + ".finv_diag.{}")), rtol=1e-6, atol=0)
    scores = woodfisher.WoodFisher(wanted).score(problem)
    torch.testing.assert_close(flat(scores), flat(truth.by_layer(key + ".score.{}")), rtol=1e-6, atol=0)
    for sparsity in SPARSITIES:
        if f"{key}.mask.{sparsity}.0" in truth.arrays.files:
            _masks_and_updates(truth, problem, wanted, key, sparsity)


def _masks_and_updates(truth, problem, wanted, key, sparsity):
    theirs = truth.by_layer(f"{key}.mask.{sparsity}." + "{}")
    plan = woodfisher.WoodFisher(wanted).plan(problem, sparsity)
    groups = [(n,) for n in theirs] if wanted.scope == "layer" else [tuple(theirs)]
    for names in groups:
        mine, reference, scores = ({n: part[n] for n in names} for part in (plan.masks, theirs, plan.scores))
        assert disagreeing(mine, reference, scores) <= 1
    delta = woodfisher.update(problem, {name: mask.bool() for name, mask in theirs.items()}, wanted)
    reference = flat(truth.by_layer(f"{key}.delta.{sparsity}." + "{}"))
    torch.testing.assert_close(flat(delta), reference, rtol=1e-6, atol=1e-9)


def test_block_inverse_is_the_sherman_morrison_recursion():
    torch.manual_seed(0)
    for samples in (5, 30):
        gradients = torch.randn(3, samples, 12).double()
        for block, rows in zip(woodfisher.block_inverse(gradients, 1e-3), gradients):
            inverse = torch.eye(12).double() / 1e-3
            for g in rows:
                along = inverse @ g
                inverse -= torch.outer(along, along) / (samples + g @ along)
            torch.testing.assert_close(block, inverse, rtol=1e-8, atol=1e-8)


def test_blocks_chunking_and_gradual(mlp, batch, monkeypatch):
    whole = pruners.plan("woodfisher", mlp, *batch, 0.5, block=5)
    monkeypatch.setattr(woodfisher, "WORKSPACE", 1)
    torch.testing.assert_close(pruners.plan("woodfisher", mlp, *batch, 0.5, block=5).values, whole.values)
    gradual = pruners.plan("woodfisher", mlp, *batch, 0.5, steps=3)
    assert flat(gradual.masks).sum() == flat(whole.masks).sum()
    assert (flat(gradual.values)[~flat(gradual.masks)] == 0).all()
