"""``check``: accepts what verify wrote, rejects what was changed, and needs neither torch nor a solver."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

DIGITS = Path(__file__).parents[2] / "models" / "digits_2x32.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model and its finished run, made once."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(DIGITS, folder / "m.pt")
    subprocess.run([sys.executable, "-m", "exactprune", "verify", "m.pt", "--quiet"], cwd=folder, check=True)
    return folder


@pytest.fixture
def run(here, finished):
    shutil.copytree(finished, here, dirs_exist_ok=True)
    return here / "m.exactprune"


def records(run):
    return [json.loads(line) for line in gzip.open(run / "certificates.jsonl.gz", "rt")]


def rewrite(run, lines):
    with gzip.open(run / "certificates.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize("options", [[], ["--exact"]])
def test_an_untouched_run_is_accepted(run, cli, options):
    code, out, err = cli("check", "m.pt", run, *options)
    assert (code, err) == (0, "") and "ACCEPTED. 64 claims of the certificate hold" in out
    assert out.isascii()


def test_json_is_one_object_and_says_the_same(run, cli):
    code, out, _ = cli("check", "m.pt", run, "--json")
    report = json.loads(out)
    assert (code, report["schema"], report["accepted"], report["rejected"]) == (0, "exactprune-check/1", True, [])
    totals = json.loads((run / "run.json").read_text())["totals"]
    for word in ("inactive", "active", "unstable", "unknown"):
        assert sum(layer[word] for layer in report["layers"]) == totals[word]


def test_neither_torch_nor_a_solver_nor_our_solving_code_is_imported(run):
    code = ("import sys; from exactprune.cli.app import run; code = run(['check', 'm.pt', 'm.exactprune', '--quiet']); "
            "heavy = [m for m in ('torch', 'highspy', 'onnx', 'scipy', 'exactprune.bounds', 'exactprune.deciders') "
            "if m in sys.modules]; sys.exit(f'{code} {heavy}' if code or heavy else 0)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=run.parent, capture_output=True, text=True, check=False,
                          env=environment)
    assert done.returncode == 0, done.stderr


def tamper_status(run):
    path = run / "neurons.csv"
    path.write_text(path.read_text().replace(",unstable,", ",inactive,", 1))


def tamper_domain(run):
    with np.load(run / "domain.npz") as file:
        np.savez(run / "domain.npz", lower=file["lower"], upper=file["upper"] + 1)


def tamper_header(run):
    lines = records(run)
    lines[0]["network"] = "0" * 64
    rewrite(run, lines)


def drop_witnesses(run):
    rewrite(run, [line for line in records(run) if line["record"] != "unstable"])


def swap_verdicts(run):
    lines = records(run)
    for line in lines:
        if line["record"] == "verdicts":
            line["inactive"], line["unstable"] = line["unstable"], line["inactive"]
    rewrite(run, lines)


def cut_file(run):
    path = run / "certificates.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])


def drop_rows(run):
    path = run / "neurons.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("tamper", [tamper_status, tamper_domain, tamper_header, drop_witnesses, swap_verdicts,
                                    cut_file, drop_rows])
def test_a_changed_run_is_rejected(run, cli, tamper):
    tamper(run)
    code, out, err = cli("check", "m.pt", run)
    assert code == 1 and "REJECTED" in out and err == ""
    assert json.loads(cli("check", "m.pt", run, "--json")[1])["accepted"] is False


def test_another_model_is_rejected(here, run, cli):
    model = torch.load(here / "m.pt", weights_only=False)
    with torch.no_grad():
        model[next(i for i, m in enumerate(model) if isinstance(m, nn.Linear))].weight[0, 0] += 1e-7
    torch.save(model, here / "other.pt")
    code, out, _ = cli("check", "other.pt", run)
    assert code == 1 and "is for network" in out


def test_quiet_says_it_by_the_exit_code_alone(run, cli):
    assert cli("check", "m.pt", run, "--quiet") == (0, "", "")
    tamper_status(run)
    assert cli("check", "m.pt", run, "--quiet") == (1, "", "")


@pytest.mark.parametrize(("arguments", "words"), [
    (["none.pt", "m.exactprune"], "none.pt: no such file"),
    (["m.pt", "none"], "none: no such folder"),
    (["m.pt", "."], "has no certificates.jsonl.gz"),
])
def test_misuse(run, refused, arguments, words):
    assert words in refused("check", *arguments)


def test_a_source_the_checker_cannot_read_is_checked_through_network_npz(here, cli):
    from exactprune import load, save

    save(load(DIGITS), here / "m.pt2")
    assert cli("verify", "m.pt2", "--quiet")[0] == 0
    assert (here / "m.exactprune" / "network.npz").exists()
    code, out, _ = cli("check", "m.pt2", "m.exactprune")
    assert code == 0 and "network.npz" in out
