"""Lossless against approximate: what the numbers of a study mean, checked against torch and by perturbing outputs."""

from __future__ import annotations

import csv
import html
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from exactprune.cli.app import run as command_line
from exactprune.errors import OptionError
from exactprune.report.comparison import COLUMNS, FILES, read_study

MODEL = Path(__file__).parents[2] / "models" / "digits_2x32.pt"
STUDY = f'[compare]\nmodel = {str(MODEL)!r}\ndata = "digits"\nratios = [2, 8]\nseeds = [0, 1]\ntime_limit = 5\ntiming = 0\n'


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of a whole study through the command line, and its facts."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY)
    assert command_line(["compare", str(folder / "study.toml"), "-o", str(folder / "out"), "--quiet"]) == 0
    return folder / "out", json.loads((folder / "out" / "comparison.json").read_text())


def test_controls_and_combination_are_always_there(study):
    _, facts = study
    found = {(r["method"], r["ratio"], r["seed"]) for r in facts["rows"]}
    methods = ("random", "magnitude", "lossless, then magnitude")
    assert found == {(m, r, s) for m in methods for r in (2, 8) for s in (0, 1)}
    assert facts["dense"]["deviation_upper"] == 0 and facts["dense"]["changed"] == 0 and facts["dense"]["unchangeable"] > 0.99


def test_lossless_is_within_rounding_and_changes_no_class(study):
    lossless = study[1]["lossless"]
    assert lossless["deviation_upper"] < 1e-5 and lossless["changed"] == 0 and lossless["unchangeable"] > 0.99
    assert lossless["parameters_stored"] < study[1]["dense"]["parameters_stored"]


def test_bounds_and_counts_agree(study):
    _, facts = study
    for row in facts["rows"]:
        assert 0 <= row["deviation_lower"] <= row["deviation_upper"]
        assert row["unchangeable"] + row["changed"] <= 1 + 1e-9 and row["accuracy_pruned"] == row["accuracy"]
        assert row["weights_kept"] <= -(-row["weights"] // row["ratio"]) + 1
        assert row["changed"] == 0 or row["counterexample"]["sample"] is not None
        assert row["counterexample"] is None or row["counterexample"]["confirmed"] or row["counterexample"]["sample"] is not None


def test_counterexamples_and_accuracy_are_those_of_torch(study):
    from exactprune.training import load_data

    _, facts = study
    data = load_data("digits")
    with torch.no_grad():
        outputs = torch.load(MODEL, weights_only=False).eval()(data.x_test).numpy()
    assert facts["dense"]["accuracy"] == pytest.approx((outputs.argmax(1) == data.y_test.numpy()).mean())
    examples = [row["counterexample"] for row in facts["rows"] if row["counterexample"]]
    assert examples
    for example in examples:
        if example["sample"] is None:
            with torch.no_grad():
                own = torch.load(MODEL, weights_only=False).double()(torch.tensor(example["input"]).double()[None])[0].numpy()
        else:
            own = outputs[example["sample"]]
            assert example["label"] == data.y_test[example["sample"]]
        assert example["original"] == pytest.approx(own, abs=1e-4)
        assert np.argmax(example["original"]) != np.argmax(example["pruned"])


def test_summary_is_mean_and_standard_deviation_over_seeds(study):
    _, facts = study
    for line in facts["summary"]:
        rows = [r for r in facts["rows"] if (r["method"], r["ratio"]) == (line["method"], line["ratio"])]
        assert line["accuracy"]["mean"] == pytest.approx(statistics.fmean(r["accuracy"] for r in rows))
        assert line["accuracy"]["std"] == pytest.approx(statistics.stdev(r["accuracy"] for r in rows))
        assert line["deviation_upper"] == max(r["deviation_upper"] for r in rows)


def test_files_hold_the_same(study):
    folder, facts = study
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert [r["method"] for r in rows] == ["dense", "lossless", *(r["method"] for r in facts["rows"])]
    assert tuple(rows[0]) == COLUMNS
    assert [float(r["deviation_upper"]) for r in rows[2:]] == [r["deviation_upper"] for r in facts["rows"]]
    page = (folder / "comparison.html").read_text()
    assert page.count("<script") == 1
    assert "default-src 'none'" in html.unescape(page)
    assert page.count('<tr class="control"') == 2 * 5 and page.count("<tr data-method=") == 5 * len(facts["summary"])


def test_comparison_page_in_a_picture_has_every_method(study):
    page = (study[0] / "comparison.html").read_text()
    assert page.count('class="panel" viewBox="0 0 320') == 2 * 3
    assert page.count('class="dense" d="M44') == 2 * 3  # the original is on every one


def test_a_second_run_computes_nothing_and_changes_no_byte(study, monkeypatch):
    from exactprune.report.comparison_cells import Bench

    folder, _ = study
    before = {name: (folder / name).read_bytes() for name in FILES}
    monkeypatch.setattr(Bench, "run", lambda self, cell: pytest.fail(f"{cell} was computed again"))
    assert command_line(["compare", str(folder.parent / "study.toml"), "-o", str(folder), "--quiet"]) == 0
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    from exactprune.report.comparison_cells import Bench

    (tmp_path / "s.toml").write_text(STUDY.replace("[0, 1]", "[0]").replace("[2, 8]", "[4]"))
    run, done = Bench.run, []

    def stopping(self, cell):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell.name)
        return run(self, cell)

    monkeypatch.setattr(Bench, "run", stopping)
    arguments = ["compare", str(tmp_path / "s.toml"), "-o", str(tmp_path / "out"), "--quiet"]
    assert command_line(arguments) == 3
    assert "same command goes on" in capsys.readouterr().err
    with (tmp_path / "out" / "cells.jsonl").open("a") as file:
        file.write('{"cell": "cut off')
    monkeypatch.setattr(Bench, "run", lambda self, cell: done.append(cell.name) or run(self, cell))
    assert command_line(arguments) == 0
    assert done == ["dense", "lossless", "random", "magnitude", "lossless, then magnitude"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_a_method_that_cannot_do_it_is_reported_and_stops_nothing(tmp_path):
    from exactprune.report.comparison import Study, write_comparison

    study = Study(str(MODEL), "digits", ("epsilon-resnet",), (2,), (0,), tests=50, certify=5, combine=(), timing=0.0,
                  time_limit=5.0)
    facts = write_comparison(study, tmp_path / "out")
    assert [(r["method"], bool(r["failed"])) for r in facts["failed"]] == [("epsilon-resnet", True)]
    assert {r["method"] for r in facts["rows"]} == {"random", "magnitude"}
    for name in ("comparison.html", "comparison.md", "comparison.csv"):
        assert "epsilon-resnet" in (tmp_path / "out" / name).read_text()


def test_sparse_and_dense_versions_compute_the_same(study):
    from exactprune.io import load, to_torch
    from exactprune.pruning import prune
    from exactprune.report.comparison_measure import _sparse, layers_of, nonzero_macs, sizes

    network = load(MODEL)
    pruned = prune(network, "magnitude", 0.75).network
    x = torch.rand(7, 64)
    with torch.no_grad():
        assert torch.allclose(_sparse(to_torch(pruned))(x), to_torch(pruned)(x), atol=1e-5)
    found, kept = sizes(pruned, network), sum(layer["kept"] for layer in layers_of(pruned))
    assert found["macs"] == nonzero_macs(pruned) == kept == found["weights_kept"] == 3392 - round(0.75 * 3392)
    assert found["bytes_sparse"] < found["bytes"] and found["macs_dense"] == 3392


def test_a_picture_is_a_png_of_the_values():
    import base64
    import zlib

    from exactprune.report.png import data_uri

    raw = base64.b64decode(data_uri(np.array([[0.0, 0.5], [2.0, -1.0]])).removeprefix("data:image/png;base64,"))
    at = raw.index(b"IDAT")
    size = int.from_bytes(raw[at - 4:at], "big")
    assert zlib.decompress(raw[at + 4:at + 4 + size]) == bytes([0, 0, 128, 0, 255, 0])
    assert int.from_bytes(raw[at + 4 + size:at + 8 + size], "big") == zlib.crc32(raw[at:at + 4 + size])


@pytest.mark.parametrize(("text", "words"), [
    ("", "no readable table"), ("[compare]\nmodel = 1\nmodel = 2", "no readable table"), ('[compare]\nmodel = "m"', "data"),
    ('[compare]\nmodel = "m"\ndata = "d"\nratio = 2', "'ratio'"),
    ('[compare]\nmodel = "m"\ndata = "d"\nratios = [0.5]', "ratios"),
    ('[compare]\nmodel = "m"\ndata = "d"\nseeds = []', "seeds"),
    ('[compare]\nmodel = "m"\ndata = "d"\nradius = -1', "radius"), ('[compare]\nmodel = "m"\ndata = "d"\nimage = [4]', "image"),
    ('[compare]\nmodel = "m"\ndata = "d"\ntrain = {epochs = 2}', "train"),
    ('[compare]\nmodel = "m"\ndata = "d"\ndomain = [1, 0]', "domain"),
    ('[compare]\nmodel = "m"\ndata = "d"\ntests = 0', "tests"),
])
def test_a_wrong_study_is_refused(tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(OptionError, match=words):
        read_study(tmp_path / "s.toml")


@pytest.mark.parametrize(("given", "words"), [
    ({"methods": ("wandas",)}, "did you mean 'wanda'"), ({"combine": ("nothing",)}, "no pruning method"),
    ({"options": {"magnitude": {"depth": 3}}}, "no option 'depth'"), ({"options": {"snip": {}}}, "options"),
    ({"options": {"magnitude": 3}}, "a table for each method"), ({"train": {"speed": 1}}, "'speed'"),
    ({"train": {"lr": -1}}, "lr"),
])
def test_what_cannot_be_done_is_refused_before_anything_is_computed(given, words, tmp_path):
    from exactprune.report.comparison import Study, write_comparison

    with pytest.raises(OptionError, match=words):
        write_comparison(Study(str(MODEL), "digits", **given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
