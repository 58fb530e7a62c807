"""The report of a run: same facts in HTML, Markdown and JSON; safe, accessible, the same bytes again."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import unicodedata
from decimal import Decimal
from fractions import Fraction
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import exactprune
from exactprune.claim import LayerVerdict, Status
from exactprune.cli.app import run as command_line
from exactprune.errors import CertificateError
from exactprune.network import INPUT, Node, build
from exactprune.ops import Affine, Conv2d, ReLU, Reshape
from exactprune.report.compression import write_compression
from exactprune.report.html import FILES, outward, render_html, write_report
from exactprune.report.page import clean, facts_of, ranges, unit_of
from exactprune.report.page_markdown import plain
from exactprune.report.plots import interval_plot
from exactprune.report.record import read_run, write_run


class Page(HTMLParser):
    """Tags with attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self._open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data):
        if self._open in ("script", "style"):
            self.inside.append((self._open, data))
            self._open = None


def columns(facts):
    """(layer, index, status, method, lower, upper, reason) of every neuron."""
    for layer in facts["layers"]:
        for i, kind in enumerate(layer["kind"]):
            yield (layer["layer"], i, facts["kinds"][kind]["status"], facts["kinds"][kind]["method"], float(layer["lower"][i]),
                   float(layer["upper"][i]), layer["reasons"].get(str(i), ""))


@pytest.fixture
def folder(verification, tmp_path):
    write_run(verification, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def compression(tmp_path_factory):
    """(folder of files, result) of a real compression at a budget that merges."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("compression")
    weights = [rng.normal(size=s).astype(np.float32) for s in [(3, 1, 2, 2), (3,), (6, 12), (6,), (2, 6), (2,)]]
    weights[1][0], weights[3][:3] = -20, (-90, 90, 80)  # an inactive channel, an inactive and two active neurons
    network = build([Node("conv", Conv2d(weights[0], weights[1]), (INPUT,)), Node("relu1", ReLU(), (0,)),
                     Node("flat", Reshape((12,)), (1,)), Node("fc", Affine(weights[2], weights[3]), (2,)),
                     Node("relu2", ReLU(), (3,)), Node("out", Affine(weights[4], weights[5]), (4,))], (1, 3, 3), np.float32)
    model, out = folder / "m.onnx", folder / "small.onnx"
    exactprune.save(network, model)
    result = exactprune.compress(exactprune.verify(network, exactprune.uniform(0, 1, (1, 3, 3))),
                                 options=exactprune.CompressOptions(max_deviation=0.5, samples=10))
    run = write_run(result.verification, folder / "run", model=model)
    write_compression(result, folder / "run", run, model, out)
    return folder, result


@pytest.fixture
def compressed(compression, tmp_path):
    """(run folder, model file, result), a copy for one test."""
    shutil.copytree(compression[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "run", tmp_path / "m.onnx", compression[1]


# -- the same facts everywhere --------------------------------------------------------------------------------------


def test_report_json_holds_neurons_csv_without_loss(folder):
    write_report(folder)
    facts = json.loads((folder / "report.json").read_text())
    assert facts["schema"] == "exactprune-report/1"
    rows = [(int(r["layer"]), int(r["index"]), r["status"], r["method"], float(r["lower"]), float(r["upper"]), r["reason"])
            for r in csv.DictReader((folder / "neurons.csv").read_text().splitlines())]
    assert list(columns(facts)) == rows


def test_the_island_has_the_same_neurons_with_bounds_rounded_outward(folder):
    facts = write_report(folder)
    (text,) = [data for tag, data in Page((folder / "report.html").read_text()).inside if tag == "script" and data[0] == "{"]
    island = json.loads(text, parse_float=Decimal, parse_int=int)
    assert island["kinds"] == facts["kinds"]
    for shown, layer in zip(island["layers"], facts["layers"], strict=True):
        assert (shown["kind"], shown["node"], shown["reasons"]) == (layer["kind"], layer["node"], layer["reasons"])
        assert all(Decimal(s) <= Decimal(x) for s, x in zip(shown["lower"], layer["lower"], strict=True))
        assert all(Decimal(s) >= Decimal(x) for s, x in zip(shown["upper"], layer["upper"], strict=True))


def test_markdown_says_what_the_json_says(compressed):
    facts = write_report(compressed[0])
    text = (compressed[0] / "report.md").read_text()
    for sentence in (facts["claim"]["headline"], *facts["claim"]["sentences"], *facts["claim"]["limits"]):
        assert plain(sentence) in text
    for layer in facts["layers"]:
        for group in layer["groups"]:
            kind = facts["kinds"][group["kind"]]
            words = (kind["status"], kind["fate"], f"{group['neurons']:,}", group["where"], kind["proof"], kind["why"])
            assert f"| {' | '.join(map(plain, words))} |" in text
    assert all(f"    {facts['commands'][name]}" in text for name in ("repeat", "check", "report"))


def test_every_group_counts_its_neurons(folder):
    for layer in write_report(folder)["layers"]:
        assert sum(group["neurons"] for group in layer["groups"]) == layer["neurons"]
        shares = np.array(list(layer["channels"].values())) if layer["channels"] else np.ones((1, 1))
        assert shares.sum(axis=0) == pytest.approx(1, abs=2e-4)


def test_fates_are_those_of_the_rewrite(compressed):
    folder, _, result = compressed
    facts = write_report(folder)
    kept = {layer: set(units[units >= 0].tolist()) for layer, units in result.rewrite.origin}
    assert result.rewrite.removals
    for layer in facts["layers"]:
        units = unit_of(tuple(layer["shape"]), 0).tolist()
        for unit, kind in zip(units, layer["kind"], strict=True):
            stays = unit in kept.get(layer["layer"], ())
            assert facts["kinds"][kind]["fate"] == ("kept" if stays else "removed")
    rules = {(r.layer, r.index): r.rule for r in reversed(result.rewrite.removals)}
    for layer in facts["layers"]:
        for unit, kind in zip(unit_of(tuple(layer["shape"]), 0).tolist(), layer["kind"], strict=True):
            if facts["kinds"][kind]["fate"] == "removed" and (layer["layer"], unit) in rules:
                assert facts["kinds"][kind]["rule"] == rules[layer["layer"], unit]


def test_before_a_compression_whole_inactive_channels_are_removable(verification, tmp_path):
    write_run(verification, tmp_path / "run")
    facts = write_report(tmp_path / "run")
    first = [facts["kinds"][k] for k in facts["layers"][0]["kind"]]
    assert [k["fate"] for k in first] == ["stays"] * 8
    assert [k["rule"] for k in first[:5]] == ["partial", "partial", "part", "part", "switches"]  # no channel is of one kind
    second = [facts["kinds"][k]["fate"] for k in facts["layers"][1]["kind"]]
    assert second == ["removable", "mergeable", "stays"]


@pytest.mark.parametrize(("level", "words"), [
    ({"kind": "exact", "eps": 0.0}, "computes the same outputs as the original"),
    ({"kind": "certified", "eps": 0.12345}, "differs from the original's by more than 0.124."),
    ({"kind": "measured", "eps": 0.5}, "No bound on the difference of the two networks is proved"),
])
def test_the_headline_says_the_level(compressed, level, words):
    path = compressed[0] / "compression.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"level": {**level, "words": ""}}))
    assert words in facts_of(read_run(compressed[0]))["claim"]["headline"]


def test_the_command_repeats_the_run(compressed):
    folder, _, _ = compressed
    facts = write_report(folder)
    before = (folder / "neurons.csv").read_bytes()
    words = shlex.split(facts["commands"]["repeat"])
    assert words[:2] == ["exactprune", "compress"]
    (folder / "neurons.csv").unlink()
    assert command_line(words[1:]) == 0
    assert (folder / "neurons.csv").read_bytes() == before
    assert command_line(shlex.split(facts["commands"]["check"])[1:]) == 0


# -- form -----------------------------------------------------------------------------------------------------------


def test_the_same_bytes_again(compressed, tmp_path):
    write_report(compressed[0], tmp_path / "a")
    write_report(compressed[0], tmp_path / "b")
    assert [(tmp_path / "a" / n).read_bytes() for n in FILES] == [(tmp_path / "b" / n).read_bytes() for n in FILES]


def test_the_policy_names_exactly_the_script_and_the_style_of_the_page(folder):
    write_report(folder)
    page = Page((folder / "report.html").read_text())
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    (style,) = [data for tag, data in page.inside if tag == "style"]
    (script,) = [data for tag, data in page.inside if tag == "script" and data[0] != "{"]
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy


def test_nothing_points_outside_and_nothing_is_styled_inline(folder):
    write_report(folder)
    tags = Page((folder / "report.html").read_text()).tags
    targets = [v for _, a in tags for k, v in a.items() if k in ("href", "src", "srcset", "action", "data", "poster")]
    assert targets and all(v.startswith("#") or v == "data:," for v in targets)
    assert not [a for _, a in tags if "style" in a or any(k.startswith("on") for k in a)]
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids)) and {v[1:] for v in targets if v.startswith("#")} <= set(ids)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "</script><script>alert(1)</script>", "<!--<script>", "{{ 7*7 }}",
                                  '" onload="alert(1)', "a\u202eb\x00c\x1b[31m\u2028d", "\ud800", "| x |\n# y",
                                  "[a](javascript:b)"])
def test_a_name_is_only_ever_text(verification, tmp_path, name):
    first, second = verification.layers
    verification.layers = (dataclasses.replace(first, node="plain"), second)
    write_run(verification, tmp_path / "plain")
    record = read_run(tmp_path / "plain")
    named = [dict(layer) for layer in record.summary["layers"]]
    named[0]["node"] = name
    record = dataclasses.replace(record, summary={**record.summary, "layers": named})
    facts, page = facts_of(record), Page(render_html(facts_of(record)))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(render_html(facts_of(read_run(tmp_path / "plain")))).tags]
    assert facts["layers"][0]["node"] == clean(name)
    render_html(facts).encode()  # no lone surrogate is left


def test_headings_go_down_one_step_at_a_time(compressed):
    write_report(compressed[0])
    levels = [int(tag[1]) for tag, _ in Page((compressed[0] / "report.html").read_text()).tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("theme", [0, 1, 2])
def test_contrast_of_text_and_of_colours(theme):
    """WCAG 2.1: 4.5 to 1 for text, 3 to 1 for what a picture shows; light, dark and paper."""
    css = files("exactprune.report").joinpath("templates", "report.css").read_text()
    colour = dict(re.findall(r"--(\w+): (#\w+)", css.split(":root {")[theme + 1].split("}")[0]))
    for behind in (colour["paper"], colour["panel"]):
        for text in ("ink", "muted", "link"):
            assert contrast(colour[text], behind) >= 4.5, (text, behind)
        for mark in ("inactive", "active", "unstable", "unknown", "time"):
            assert contrast(colour[mark], behind) >= 3, (mark, behind)


def contrast(one, other):
    def light(code):
        code = code[1:] if len(code) == 7 else "".join(2 * c for c in code[1:])
        parts = [int(code[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05

    low, high = sorted((light(one), light(other)))
    return high / low


# -- parts ----------------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_outward_rounding_is_outward_and_close(value):
    low, high = (Fraction(Decimal(outward(value, up))) for up in (False, True))
    assert low <= Fraction(value) <= high
    assert high - low <= abs(Fraction(value)) / 10**4
    if abs(value) < 1e300:
        assert json.loads(outward(value, True)) == pytest.approx(value, rel=2e-5)


def test_bounds_that_are_not_finite_are_words():
    assert [json.loads(outward(v, True)) for v in ("inf", float("-inf"), "nan")] == ["inf", "-inf", "nan"]


@given(st.text())
def test_clean_text_has_no_control_characters(text):
    found = clean(text)
    assert not [c for c in found if unicodedata.category(c).startswith("C")]
    assert clean(found) == found
    found.encode()


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_the_numbers(numbers):
    parts = [p.split("-") for p in ranges(numbers, most=99).split(", ") if p]
    assert {n for p in parts for n in range(int(p[0]), int(p[-1]) + 1)} == numbers
    short = ranges(numbers, most=2)
    left = sum(int(b or a) - int(a) + 1 for a, b in re.findall(r"(\d+)(?:-(\d+))?(?=,| and|$)", short.split(" and ")[0]))
    assert left + int((re.findall(r"and (\d+) more", short) or [0])[0]) == len(numbers)


def drawn(lower, upper, status):
    layer = {"layer": 0, "neurons": len(lower), "lower": lower, "upper": upper, "kind": status}
    kinds = [{"status": s.word} for s in Status]
    picture = interval_plot(layer, kinds)
    return picture, ElementTree.fromstring(str(picture["svg"]))


def bars(tree, name):
    """(top, bottom) of each bar of a status."""
    paths = [p.get("d") for p in tree if p.get("class") == name]
    return [(float(a), float(b)) for p in paths for a, b in re.findall(r"M\S+ (\S+?)H\S+?V(\S+?)H", p)]


def test_stable_bars_stay_on_their_side_of_zero_and_unstable_ones_cross_it():
    lower, upper = [-3.0, -1e-9, 0.0, 2.0, -5.0], [-2.0, 0.0, 1e-9, 40.0, 7.0]
    picture, tree = drawn(lower, upper, [Status.INACTIVE, Status.INACTIVE, Status.ACTIVE, Status.ACTIVE, Status.UNSTABLE])
    (zero,) = [float(p.get("d").split()[1].split("H")[0]) for p in tree if p.get("class") == "zero"]
    assert len(bars(tree, "inactive")) == len(bars(tree, "active")) == 2 and picture["bins"] == 1
    assert all(zero - 0.01 <= top < bottom for top, bottom in bars(tree, "inactive"))
    assert all(top < bottom <= zero + 0.01 for top, bottom in bars(tree, "active"))
    ((top, bottom),) = bars(tree, "unstable")
    assert top < zero < bottom


@pytest.mark.parametrize(("lower", "upper"), [([-np.inf], [np.inf]), (["-inf"], ["inf"]), ([np.nan], [np.nan]), ([0.0], [0.0]),
                                              ([-5e-324], [1e300]), ([-1.8e308], [1.7e308]), ([3.0], [3.0]), ([-2.0], [-2.0])])
def test_any_bounds_are_drawn_within_the_picture(lower, upper):
    _, tree = drawn(lower, upper, [Status.UNKNOWN])
    numbers = [float(n) for p in tree for n in re.findall(r"-?[\d.]+|nan|inf", p.get("d"))]
    assert numbers and all(-4.01 <= n <= 1000 for n in numbers)


def test_a_large_layer_is_drawn_in_bins_that_hold_every_bound():
    rng = np.random.default_rng(0)
    picture, tree = drawn((-rng.random(10_000)).tolist(), rng.random(10_000).tolist(), [Status.UNSTABLE] * 10_000)
    assert picture["bins"] == 25 and len(bars(tree, "unstable")) == 400
    assert len(str(picture["svg"])) < 30_000


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 3, 2)])
def test_units_are_coordinates(shape):
    for axis in range(len(shape)):
        assert unit_of(shape, axis).tolist() == [i[axis] for i in np.ndindex(*shape)]
    assert len(unit_of(shape, 0)) == int(np.prod(shape))


def test_no_layers_and_empty_layers_make_a_page(verification, tmp_path):
    verification.layers = (LayerVerdict(0, "none", (0,), [], [], [], []),)
    verification.stages = ()
    verification.totals = {"neurons": 0, "inactive": 0, "active": 0, "unstable": 0, "unknown": 0}
    for name, layers in (("empty", verification.layers), ("no", ())):
        verification.layers = layers
        write_run(verification, tmp_path / name)
        assert write_report(tmp_path / name)["claim"]["headline"].endswith("0 of 0 ReLU neurons never change phase.")


# -- bad input, command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema": "other/1", "model": {"network_sha256": ""}}', "{}"])
def test_a_damaged_compression_is_refused(compressed, damage):
    (compressed[0] / "compression.json").write_text(damage)
    with pytest.raises(CertificateError, match=r"compression\.json: .*run compress again"):
        write_report(compressed[0])


def test_the_command_line_writes_three_files(compressed, capsys, tmp_path):
    folder, _, _ = compressed
    assert command_line(["report", str(folder), "--output", str(tmp_path / "page")]) == 0
    assert sorted(p.name for p in (tmp_path / "page").iterdir()) == sorted(FILES)
    assert "Claim: For every input of the domain" in capsys.readouterr().out
    assert command_line(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "report.json").read_text())


def test_a_curve_never_leaves_more_for_more_deviation(compressed):
    folder, _, _ = compressed
    assert command_line(["report", str(folder), "--curve", "--quiet"]) == 0
    curve = json.loads((folder / "report.json").read_text())["curve"]
    assert curve[0]["allowed"] == "exact" and curve[0]["eps"] == 0 and len(curve) > 3
    sizes = [row["neurons"] for row in curve]
    assert sizes == sorted(sizes, reverse=True)
    assert "What could go at which deviation" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere"], "no such folder; give the run folder"),
    (["RUN", "--output", "MODEL"], "is a file; name a folder"),
    (["RUN", "--output", "a/b"], "its parent folder does not exist"),
    (["RUN", "--model", "MODEL"], "--model is read for --curve only"),
    (["RUN", "--curve", "--model", "missing.onnx"], "missing.onnx"),
    (["."], "no readable run.json"),
])
def test_misuse_is_one_line(compressed, capsys, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [{"RUN": "run", "MODEL": "m.onnx"}.get(a, a) for a in arguments]
    assert command_line(["report", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("report.html"))


def test_a_curve_of_another_model_is_refused(compressed, tmp_path, capsys):
    (tmp_path / "other.onnx").write_bytes((tmp_path / "small.onnx").read_bytes())
    assert command_line(["report", str(compressed[0]), "--curve", "--model", str(tmp_path / "other.onnx")]) == 2
    assert "is not the one of this run" in capsys.readouterr().err


def test_the_architecture_of_a_state_dict_is_in_the_command_that_repeats_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    torch.save(module.state_dict(), "weights.pt")
    assert command_line(["verify", "weights.pt", "--arch", "3-4-2", "--quiet"]) == 0
    assert json.loads(Path("weights.exactprune/run.json").read_text())["model"]["arch"] == "3-4-2"
    assert command_line(["report", "weights.exactprune", "--curve", "--quiet"]) == 0
    repeat = json.loads(Path("weights.exactprune/report.json").read_text())["commands"]["repeat"]
    assert "--arch 3-4-2" in repeat
    assert command_line([*shlex.split(repeat)[1:], "--quiet"]) == 0


def test_a_position_map_shows_every_cell_by_the_share_of_its_interval_above_zero():
    from exactprune.report.plots import position_map

    rng = np.random.default_rng(0)
    lower = rng.normal(size=(5, 4, 6))
    upper = lower + rng.exponential(size=lower.shape)
    drawn = position_map({"shape": [5, 4, 6], "lower": lower.ravel().tolist(), "upper": upper.ravel().tolist()}, "<b>")
    found = np.full(lower.shape, -1)
    for level, path in re.findall(r'<path class="h(\d+)" d="([^"]*)"', drawn["svg"]):
        for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            assert (found[int(x) // 7, int(y), int(x) % 7:int(x) % 7 + int(run)] == -1).all()
            found[int(x) // 7, int(y), int(x) % 7:int(x) % 7 + int(run)] = int(level)
    assert drawn["columns"] == 5 and ((found == 0) == (upper <= 0)).all() and ((found == 10) == (lower >= 0)).all()
    share = np.clip(np.rint(10 * upper / (upper - lower)), 1, 9)
    assert (found == np.where(upper <= 0, 0, np.where(lower >= 0, 10, share))).all() and "&lt;b&gt;" in drawn["svg"]
    assert position_map({"shape": [200, 100, 100], "lower": [], "upper": []}, "") is None
    ends = position_map({"shape": [1, 1, 3], "lower": ["-inf", "nan", 0.0], "upper": ["inf", "nan", "inf"]}, "")
    assert 'class="h5"' in ends["svg"] and 'class="h10"' in ends["svg"]
