"""``exactprune prune`` and ``exactprune.prune`` end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import exactprune
from exactprune.cli.app import MISUSE, run
from exactprune.errors import DataError
from exactprune.training import TrainOptions


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.save(net, tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.random((30, 6)), y=rng.integers(0, 3, 30), x_test=rng.random((9, 6)),
             y_test=rng.integers(0, 3, 9))
    return tmp_path / "data.npz"


def test_masked_model_masks_and_json(model, data, tmp_path, capsys):
    out, masks = tmp_path / "small.onnx", tmp_path / "masks.npz"
    assert run(["prune", str(model), "--method", "woodfisher", "--sparsity", "0.5", "--data", str(data), "-p", "damping=1e-3",
                "-p", "block=5", "--finetune", "1", "-o", str(out), "--masks", str(masks), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["removed"] == 36 and report["options"]["damping"] == 1e-3 and report["options"]["block"] == 5
    assert 0 <= report["test"]["accuracy"] <= 1 and report["macs"] == 36
    kept = np.load(masks)
    network = exactprune.load(out)
    weights = [node.op.weight for node in network.nodes if node.op.kind == "Affine"]
    assert sum(int((w == 0).sum()) for w in weights) >= 36 == sum(int((~kept[k]).sum()) for k in kept.files)


def test_structured_is_smaller_and_equal_to_the_masked(model, data, tmp_path, capsys):
    arguments = ["prune", str(model), "--method", "nisp", "--keep", "0.5", "--data", str(data)]
    assert run([*arguments, "-o", str(tmp_path / "masked.pt"), "--quiet"]) == 0
    assert run([*arguments, "-o", str(tmp_path / "small.pt"), "--structured"]) == 0
    masked, small = exactprune.load(tmp_path / "masked.pt"), exactprune.load(tmp_path / "small.pt")
    assert small.parameters < masked.parameters == exactprune.load(model).parameters
    x = np.random.default_rng(1).random((20, 6))
    np.testing.assert_allclose(small.evaluate(x, np.float64), masked.evaluate(x, np.float64), atol=1e-12)
    assert f"83 -> {small.parameters} parameters" in capsys.readouterr().out
    assert run([*arguments, "--structured", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["macs_stored"] == small.macs == report["macs"] and report["parameters_stored"] == small.parameters


def test_one_file_states_an_experiment(model, data, tmp_path, capsys):
    config = tmp_path / "experiment.toml"
    config.write_text(f'[prune]\nmethod = "obd"\nsparsity = 0.25\ndata = "{data}"\n[prune.options]\ncurvature = "fisher"\n'
                      "[finetune]\nepochs = 1\nlr = 0.01\n")
    assert run(["prune", str(model), "--config", str(config), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["method"] == "obd" and first["removed"] == 18 and first["options"]["curvature"] == "fisher"
    assert run(["prune", str(model), "--config", str(config), "--sparsity", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 36


@pytest.mark.parametrize("text, words", [
    ("[prune]\nmethd = 1", "no key 'methd'"), ("[prune]\nsamples = 'x'", "samples is 'x'; give a whole number"),
    ("[prune]\nsparsity = true", "give a number"), ("[prune]\noptions = 3", "give a table"),
    ("[other]\n", "not one of the tables"),
    ("[prune]\nmethod = 'random'\n[prune.options]\nseed = 1.5", "seed is 1.5; give a whole number"),
    ("[prune]\nmethod = 'grasp'\n[prune.options]\ntemperature = true", "give a number"),
    ("[prune]\nmethod = 'random'\n[prune.options]\nscope = 3", "give a word"), ("[prune]\ninput-shape = 6", "a list"),
    ("[finetune]\nepochs = 1.5", "epochs is 1.5"), ("[finetune]\nlr = 'x'", "lr is 'x'"),
    ("[finetune]\nno = 1", "no option 'no'"),
])
def test_wrong_config_is_one_line(model, data, tmp_path, capsys, text, words):
    (tmp_path / "wrong.toml").write_text(text + "\n")
    assert run(["prune", str(model), "--data", str(data), "--config", str(tmp_path / "wrong.toml")]) == MISUSE
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_convolutional_files_take_an_input_shape(tmp_path, capsys):
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), tmp_path / "conv.pt")
    assert run(["prune", str(tmp_path / "conv.pt")]) == MISUSE
    assert "--input-shape" in capsys.readouterr().err
    arguments = ["prune", str(tmp_path / "conv.pt"), "--sparsity", "0.5", "--json"]
    assert run([*arguments, "--input-shape", "1,4,4"]) == 0
    (tmp_path / "shape.toml").write_text("[prune]\ninput_shape = [1, 4, 4]\n")
    first = capsys.readouterr().out
    assert run([*arguments, "--config", str(tmp_path / "shape.toml")]) == 0
    assert json.loads(first)["macs_dense"] == json.loads(capsys.readouterr().out)["macs_dense"] == 88


def test_list(capsys):
    assert run(["prune", "--list", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["grasp"]["options"]["temperature"] == 200 and rows["scaling-up"]["prunes"] == "neurons"
    assert run(["prune", "--list"]) == 0
    assert "damping=1e-05" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    ([], "which model"), (["MODEL", "--method", "snip"], "needs data"), (["MODEL", "--method", "no"], "no pruning method"),
    (["MODEL", "-p", "x=1"], "no option 'x'"), (["MODEL", "-p", "scope"], "name=value"),
    (["MODEL", "-p", "scope=row"], "global or layer"), (["MODEL", "--sparsity", "2"], "from 0 to 1"),
    (["MODEL", "--sparsity", "0.5", "--keep", "0.5"], "one of them"), (["MODEL", "--method", "random", "-p", "seed=x"], "whole"),
    (["MODEL", "-o", "/nowhere/x.pt"], "existing folder"), (["MODEL", "--data", "digits"], "the model takes"),
    (["MODEL", "--method", "snip", "--data", "DATA", "--samples", "0"], ">= 1"), (["gone.pt"], "cannot be read"),
])
def test_misuse_is_one_line(model, data, capsys, arguments, words):
    given = [{"MODEL": str(model), "DATA": str(data)}.get(a, a) for a in arguments]
    assert run(["prune", *given]) == MISUSE
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_python_takes_networks_modules_loaders_and_sets(model, batch, mlp):
    loader = [(batch[0][:20], batch[1][:20]), (batch[0][20:], batch[1][20:])]
    a = exactprune.prune(mlp, "snip", 0.5, loader)
    b = exactprune.prune(mlp, method="snip", sparsity=0.5, data=batch)
    assert all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks) and a.network is None
    tuned = exactprune.prune(mlp, "magnitude", 0.5, batch, finetune=TrainOptions(epochs=1))
    assert all((p[~tuned.masks[n]] == 0).all() for n, p in tuned.module.named_parameters() if n in tuned.masks)
    network = exactprune.prune(exactprune.load(model), "magnitude", 0.5).network
    assert network is not None and network.input_shape == (6,)
    for wrong in ([], [1, 2], 7):
        with pytest.raises(DataError):
            exactprune.prune(mlp, "snip", 0.5, wrong)


def test_collapsed_layers_are_named(mlp):
    result = exactprune.prune(mlp, "magnitude", 1.0)
    assert result.report.collapsed == tuple(result.masks) and "COLLAPSED" in str(result)
