"""The commands end to end on a small trained network: what they print, write and return."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import exactprune

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "models" / "digits_2x32.pt"
TEXT_ONLY = str.maketrans("", "", "\n")


@pytest.fixture
def model(here):
    """A network with neurons of every kind: the last unit of layer 0 is dead, the first of layer 1 always on."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        net[0].bias[-1], net[2].bias[0] = -10.0, 10.0
    torch.save(net, here / "m.pt")
    return net


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def points(shape, count=500):
    return np.random.default_rng(0).random((count, *shape)).astype(np.float32)


# -- verify ------------------------------------------------------------------------------------------------------


def test_json_is_one_object_on_stdout_and_is_run_json(here, cli):
    code, out, err = cli("verify", DIGITS, "--json")
    assert code == 0 and "unit box" in err
    summary = strict(out)
    assert summary == strict((here / "digits_2x32.exactprune" / "run.json").read_text())
    jsonschema.validate(summary, json.loads((ROOT / "docs" / "run.schema.json").read_text()))
    assert summary["totals"]["neurons"] == 64 and summary["domain"]["max"] == 1.0
    assert summary["totals"]["unknown"] == 0


def test_tables_name_the_domain_the_claim_and_the_run_folder(here, model, cli):
    code, out, err = cli("verify", "m.pt")
    assert (code, err) == (0, "")
    assert out.translate(TEXT_ONLY).isprintable()
    assert out.startswith("no domain given, so the unit box is taken")
    assert "Claim, for every input of the domain" in out and "exactprune check m.pt m.exactprune" in out


def test_a_given_domain_is_not_announced_as_the_default(model, cli):
    _, out, _ = cli("verify", "m.pt", "--domain", "-1,1")
    assert "no domain given" not in out and "Domain: [-1, 1] for every input" in out


def test_quiet_prints_nothing(here, model, cli):
    assert cli("verify", "m.pt", "--quiet") == (0, "", "")
    assert (here / "m.exactprune" / "run.json").exists()


def test_neurons_csv_agrees_with_run_json_and_with_torch(here, model, cli):
    _, out, _ = cli("verify", "m.pt", "--json", "--output", "run")
    rows = list(csv.DictReader(io.StringIO((here / "run" / "neurons.csv").read_text())))
    summary = strict(out)
    for layer in summary["layers"]:
        words = [row["status"] for row in rows if int(row["layer"]) == layer["layer"]]
        assert {w: words.count(w) for w in ("inactive", "active", "unstable", "unknown")} == {
            w: layer[w] for w in ("inactive", "active", "unstable", "unknown")}
    x, seen = torch.from_numpy(points((4,), 5000)).double(), []
    for module in model.double():
        x = module(x)
        if isinstance(module, nn.Linear):
            seen.append(x.detach().numpy())
    for row in rows:
        values = seen[int(row["layer"])][:, int(row["index"])]
        assert float(row["lower"]) <= values.min() and values.max() <= float(row["upper"])
        assert row["status"] != "inactive" or values.max() <= 0
        assert row["status"] != "active" or values.min() >= 0
    assert rows[5]["status"] == "inactive" and rows[6]["status"] == "active"


def test_no_exact_stops_after_bounds_and_witnesses(model, cli):
    _, out, _ = cli("verify", "m.pt", "--no-exact", "--json")
    used = {name for layer in strict(out)["layers"] for name in layer["methods"]}
    assert used <= {"interval", "crown", "alpha-crown", "corner", "sample", "data", "ascent"}


def test_resume_without_a_checkpoint_starts_anew_and_says_so(model, cli):
    code, out, _ = cli("verify", "m.pt", "--resume")
    assert code == 0 and "nothing to resume in m.exactprune" in out


def test_a_finished_run_leaves_no_checkpoint(here, model, cli):
    cli("verify", "m.pt")
    assert sorted(p.name for p in (here / "m.exactprune").iterdir()) == [
        "certificates.jsonl.gz", "domain.npz", "neurons.csv", "report.md", "run.json"]


def test_options_from_a_file_are_used(here, model, cli):
    (here / "c.toml").write_text('[verify]\nexact = false\nseed = 7\ndomain = "0,0.5"\n')
    options = strict(cli("verify", "m.pt", "--config", "c.toml", "--json")[1])
    assert (options["options"]["exact"], options["options"]["seed"], options["domain"]["max"]) == (False, 7, 0.5)


def test_equal_runs_write_equal_bytes(here, model, cli):
    for name in ("a", "b"):
        cli("verify", "m.pt", "--output", name)
    for name in ("neurons.csv", "domain.npz", "certificates.jsonl.gz"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()


# -- compress ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", ["exact", "rounding", "1e-3"])
def test_compress_writes_a_model_that_torch_loads_alone(here, model, cli, deviation):
    code, out, err = cli("compress", "m.pt", "-o", "small.pt", "--max-deviation", deviation, "--json")
    assert code == 0, err
    summary = strict(out)
    assert summary["sizes"]["neurons"]["before"] == 11 > summary["sizes"]["neurons"]["after"]
    assert summary["level"]["kind"] in (("exact",) if deviation == "exact" else ("exact", "certified"))
    code = ("import sys, torch\n"
            "allowed = [torch.nn.Sequential, torch.nn.Linear, torch.nn.ReLU, torch.nn.Flatten, torch.nn.Unflatten]\n"
            "with torch.serialization.safe_globals(allowed):\n"
            "    net = torch.load('small.pt', weights_only=True)\n"
            "assert not any(m.startswith('exactprune') for m in sys.modules)\n"
            "torch.save(net(torch.load('x.bin')), 'y.bin')\n")
    x = torch.from_numpy(points((4,)))
    torch.save(x, here / "x.bin")
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True)
    error = (torch.load(here / "y.bin").detach() - model(x).detach()).abs().max().item()
    assert error <= summary["level"]["eps"] + 1e-5


def test_compress_writes_onnx_that_onnxruntime_runs(here, model, cli):
    assert cli("compress", "m.pt", "-o", "small.onnx")[0] == 0
    session = onnxruntime.InferenceSession(here / "small.onnx", providers=["CPUExecutionProvider"])
    x = points((4,))
    given = session.get_inputs()[0]
    batched = [session.run(None, {given.name: row[None]})[0] for row in x[:50]]
    assert np.abs(np.concatenate(batched) - model(torch.from_numpy(x[:50])).detach().numpy()).max() < 1e-5


def test_compress_prints_the_level_the_sizes_and_the_measurement(model, cli):
    code, out, _ = cli("compress", "m.pt", "-o", "small.pt")
    assert code == 0
    for words in ("Claim (", "ReLU neurons", "parameters", "multiply-accumulates", "bytes on disk",
                  "latency, batch 1 (measured)", "latency, batch 64 (measured)", "Measured in float32 on 2,000 inputs",
                  "f against itself at another batch size"):
        assert words in out
    assert "lossless" not in out.lower()


def test_compress_keeps_the_interface_and_compares_on_data(here, model, cli):
    np.savez(here / "d.npz", x=points((4,), 10))
    summary = strict(cli("compress", "m.pt", "-o", "small.pt", "--data", "d.npz", "--json")[1])
    assert summary["measured"]["inputs"] == 2010
    small = exactprune.load(here / "small.pt")
    assert (small.input_shape, small.output_shape) == ((4,), (3,))
    assert small.sha256 == summary["out"]["network_sha256"]


def test_compress_refuses_a_format_that_cannot_hold_the_model_before_the_work(here, cli, monkeypatch):
    from exactprune.errors import UnsupportedOpError

    def refuse(*_):
        raise UnsupportedOpError("a residual network does not fit into a plain .pt; write .onnx or .pt2")

    torch.save(nn.Sequential(nn.Linear(2, 2)).eval(), here / "m.pt")
    monkeypatch.setattr("exactprune.io.save", refuse)
    monkeypatch.setattr("exactprune.pipeline.verify", lambda *_, **__: pytest.fail("worked before refusing"))
    code, _, err = cli("compress", "m.pt", "-o", "small.pt")
    assert code == 2 and "write .onnx or .pt2" in err
    assert [p.name for p in here.iterdir()] == ["m.pt"]


def test_a_reader_that_leaves_early_is_no_error(here, model):
    """exactprune ... | true"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "exactprune", "verify", "m.pt"]
    done = subprocess.run(command, cwd=here, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("layers", "neurons"), [
    ([nn.Linear(4, 3)], 0), ([nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)], 3),
    ([*(part for _ in range(8) for part in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2)], 32)])
def test_networks_without_neurons_with_dead_layers_and_with_many_layers(here, cli, layers, neurons):
    with torch.no_grad():
        layers[0].bias.fill_(-50)
    torch.save(nn.Sequential(*layers).eval(), here / "a b.pt")
    code, out, err = cli("compress", "a b.pt", "-o", "small.onnx")
    assert (code, err) == (0, "") and "Claim (" in out
    assert "exactprune check 'a b.pt' 'a b.exactprune'" in out
    summary = strict((here / "a b.exactprune" / "compression.json").read_text())
    assert summary["sizes"]["neurons"] == {"before": neurons, "after": 0}
    assert cli("check", "a b.pt", "a b.exactprune", "--quiet")[0] == 0
