"""Magnitude, SNIP, GraSP and SynFlow against their reference implementations."""

from __future__ import annotations

import pytest
import torch
from pruning_oracle import SPARSITIES, disagreeing

from exactprune import pruners

MODELS = ("mlp_init", "mlp_trained")
NAMED = {"magnitude": "mag", "snip": "snip", "grasp": "grasp"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method, key, rtol, options", [
    ("magnitude", "mag", 1e-6, {}), ("snip", "snip", 1e-6, {}), ("grasp", "grasp", 1e-3, {}),
    ("grasp", "grasp_T1", 1e-6, {"temperature": 1.0}), ("synflow", "synflow1", 1e-6, {}),
])
def test_scores(oracle, model, method, key, rtol, options):
    truth = oracle(model, "synflow_repo")
    scores = pruners.score(method, truth.module, truth.x, truth.y, **options)
    for name, theirs in truth.by_layer(key + ".score.{}").items():
        torch.testing.assert_close(scores[name], theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", sorted(NAMED))
def test_global_and_local_masks(oracle, model, sparsity, method):
    truth = oracle(model, "synflow_repo")
    plan = pruners.plan(method, truth.module, truth.x, truth.y, sparsity)
    assert disagreeing(plan.masks, truth.by_layer(f"{NAMED[method]}.mask_global.{sparsity}." + "{}"), plan.scores) <= 1
    plan = pruners.plan(method, truth.module, truth.x, truth.y, sparsity, scope="layer")
    for name, theirs in truth.by_layer(f"{NAMED[method]}.mask_local.{sparsity}." + "{}").items():
        assert disagreeing({name: plan.masks[name]}, {name: theirs}, {name: plan.scores[name]}) <= 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_synflow_100_steps(oracle, model, sparsity):
    truth = oracle(model, "synflow_repo")
    masks = pruners.mask("synflow", truth.module, truth.x, truth.y, sparsity)
    assert disagreeing(masks, truth.by_layer(f"synflow100.mask_global.{sparsity}." + "{}")) <= 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_authors_grasp_and_another_snip(oracle, model, sparsity):
    truth = oracle(model, "grasp_snip_orig")
    scores = pruners.score("grasp", truth.module, truth.x, truth.y)
    snip = pruners.score("snip", truth.module, truth.x, truth.y)
    for name in scores:
        theirs = truth.by_layer("grasp_orig.score.{}")[name]
        torch.testing.assert_close(scores[name], -theirs, rtol=1e-3, atol=0)  # the authors remove the largest
        torch.testing.assert_close(snip[name], truth.by_layer("snip_miladi.score.{}")[name], rtol=1e-6, atol=0)
    for method, key in (("grasp", "grasp_orig"), ("snip", "snip_miladi")):
        plan = pruners.plan(method, truth.module, truth.x, truth.y, sparsity)
        assert disagreeing(plan.masks, truth.by_layer(f"{key}.mask.{sparsity}." + "{}"), plan.scores) <= 2


def test_torch_prune_and_magnitude(oracle):
    truth = oracle("mlp_trained", "lth")
    for sparsity in SPARSITIES:
        for scope, word in (("global", "global"), ("layer", "local")):
            masks = pruners.mask("magnitude", truth.module, sparsity=sparsity, scope=scope)
            assert disagreeing(masks, truth.by_layer(f"torchprune.{word}.{sparsity}." + "{}")) == 0


def test_synflow_never_empties_a_layer_():
    """Theorem 3: at the largest compression that leaves one path, SynFlow keeps one weight in every layer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(16, 16, bias=False), torch.nn.ReLU())])
    masks = pruners.mask("synflow", net, sparsity=1 - 8 / 1024)
    assert all(m.any() for m in masks.values())
