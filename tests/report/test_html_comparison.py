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
from exactprune.report.comparison import COLUMNS, FILES, read_study, write_comparison

MODEL = Path(__file__).parents[2] / "models" / "digits_2x32.pt"
STUDY = f'[compare]\nmodel = {str(MODEL)!r}\ndata = "digits"\nratios = [2, 8]\nseeds = [0, 1]\ntime_limit = 5\n'


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
    assert "<script" not in page
    assert "default-src 'none'" in html.unescape(page)
    assert page.count("<tr>") == 1 + 2 + len(facts["summary"])


def test_comparison_page_in_a_picture_has_every_method(study):
    page = (study[0] / "comparison.html").read_text()
    assert page.count('class="line c') == 2 * 3


@pytest.mark.parametrize(("text", "words"), [
    ("", "no readable table"), ("[compare]\nmodel = 1\nmodel = 2", "no readable table"), ('[compare]\nmodel = "m"', "data"),
    ('[compare]\nmodel = "m"\ndata = "d"\nratio = 2', "'ratio'"),
    ('[compare]\nmodel = "m"\ndata = "d"\nratios = [0.5]', "ratios"),
    ('[compare]\nmodel = "m"\ndata = "d"\nseeds = []', "seeds"), ('[compare]\nmodel = "m"\ndata = "d"\ntests = 0', "tests"),
])
def test_a_wrong_study_is_refused(tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(OptionError, match=words):
        read_study(tmp_path / "s.toml")

