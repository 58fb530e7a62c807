"""Every figure of README.md and docs/ is what a file under reports/ says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "figures.py"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reports(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "reports"
    folder.mkdir()
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "REPORTS", folder)
    monkeypatch.setattr(figures, "EXEMPT", tmp_path / "figures.toml")
    (folder / "a.csv").write_text("net,ours,theirs,note\nx,1.5,3,\ny,2.5,10,busy\nz,,4,\n")
    (folder / "a.json").write_text(json.dumps({"runs": [{"net": "x", "t": {"ms": 12.34}}, {"net": "y", "t": {"ms": 8}}],
                                               "table": {"2x100": {"n": 5}}}))
    (folder / "a.md").write_text("# One\n\nText.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n## Two\n\n| c |\n|---|\n| 3 |\n\nEnd.\n")
    (folder / "a.txt").write_text("line 1\nline 2\nline 3\n")
    (tmp_path / "docs").mkdir()
    return folder


def test_pages_agree_with_their_reports(figures: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("what", "shown"), [
    ("a.csv :: [net=y] ours :: .1f", "2.5"), ("a.csv :: max(theirs) :: .0f", "10"),
    ("a.csv :: [net=x/y] median(ours) :: .2f", "2.00"),
    ("a.csv :: [net!=z] count()", "2"), ("a.csv :: [net=y] note", "busy"), ("a.csv :: min(ours) :: *100 :: .0f", "150"),
    ("a.csv :: sum(theirs) :: ,", "17"), ("a.json :: runs.0.t.ms :: .1f", "12.3"), ("a.json :: runs [net=y] t.ms :: .0f", "8"),
    ("a.json :: runs [] max(t.ms) :: .2f", "12.34"), ("a.json :: table.2x100.n", "5"),
    ("a.csv :: [ours<theirs; theirs>=10] net", "y"), ("a.csv :: [note^=bu] net", "y"),
    ("a.csv :: [ours>0] count()", "2"), ("a.json :: table [key=2x100] n", "5"),
])
def test_a_number(figures: ModuleType, reports: Path, what: str, shown: str) -> None:
    assert figures.rendered(f"took <!--= {what} -->7<!--/--> s") == f"took <!--= {what} -->{shown}<!--/--> s"


@pytest.mark.parametrize(("what", "shown"), [
    ("a.md :: table 2", "| c |\n|---|\n| 3 |"), ("a.md :: section Two", "| c |\n|---|\n| 3 |\n\nEnd."),
    ("a.md :: between it :: section Two", "<!-- it -->\n| c |\n|---|\n| 3 |\n\nEnd.\n<!-- end of it -->"),
    ("a.txt", "```\nline 1\nline 2\nline 3\n```"), ("a.txt :: lines 2-2", "```\nline 2\n```"),
    ("a.csv :: columns net, ours as ours [s] .2f :: where net=x/z", "| net | ours [s] |\n| --- | --- |\n| x | 1.50 |\n| z |  |"),
    ("a.csv :: bullets :: columns net, note :: at most 2", "- x\n- y busy"),
    ("a.json :: at runs :: columns net, t.ms as ms *10:.0f", "| net | ms |\n| --- | --- |\n| x | 123 |\n| y | 80 |"),
])
def test_a_block(figures: ModuleType, reports: Path, what: str, shown: str) -> None:
    page = f"before\n<!-- figures: {what} -->\nold\n<!-- /figures -->\nafter\n"
    new = figures.rendered(page)
    assert new == f"before\n<!-- figures: {what} -->\n{shown}\n<!-- /figures -->\nafter\n"
    assert figures.rendered(new) == new


@pytest.mark.parametrize("what", ["b.csv :: max(ours)", "a.csv :: [net=w] ours", "a.csv :: [net=x/y] ours",
                                  "a.csv :: max(nothing)", "a.json :: runs.7.net", "a.json :: other",
                                  "a.csv :: [net=x] ours :: wrong"])
def test_a_marker_that_names_nothing_is_an_error(figures: ModuleType, reports: Path, what: str) -> None:
    with pytest.raises(figures.FigureError, match=r"page: [ab]\."):
        figures.rendered(f"<!--= {what} -->1<!--/-->", "page")


@pytest.mark.parametrize("what", ["a.md :: table 9", "a.md :: section Nine", "a.md :: third", "a.csv :: where net=w",
                                  "a.csv :: sideways", "a.csv :: columns nothing"])
def test_a_block_that_names_nothing_is_an_error(figures: ModuleType, reports: Path, what: str) -> None:
    with pytest.raises(figures.FigureError, match="page: a"):
        figures.rendered(f"<!-- figures: {what} -->\n<!-- /figures -->", "page")


def test_a_changed_figure_fails_the_check_until_it_is_written(figures: ModuleType, reports: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    page = reports.parent / "README.md"
    page.write_text("line\n\nIt takes <!--= a.csv :: [net=x] ours -->1.4<!--/--> s.\n")
    assert figures.main(["--check"]) == 1
    assert "README.md:3: differs" in capsys.readouterr().out
    assert figures.main(["--write"]) == 0
    assert "-->1.5<!--/-->" in page.read_text()
    assert figures.main(["--check"]) == 0


@pytest.mark.parametrize(("text", "found"), [
    ("It takes 3.5 s.", ["3.5 s"]), ("and 12ms", ["12ms"]), ("saves 40 % of 3 MB", ["40 %", "3 MB"]), ("1.9x faster", ["1.9x"]),
    ("| net | 3.25 |", ["3.25"]), ("| net | ~1e-05 |", ["~1e-05"]), ("`--limit 3 s`", []), ("```\n3 s\n```", []),
    ("| exit code | 0 |", []), ("layer 3 of 2x100", []), ("<!--= a.csv :: max(ours) -->2.5<!--/--> s", []),
    ("waits at\nmost 10 s here", []), ("one\ntwo 9 s", ["9 s"]),
])
def test_measurements_without_a_marker_are_found(figures: ModuleType, text: str, found: list[str]) -> None:
    assert [word for _, word in figures.unmarked(text, ["at most 10 s"])] == found


def test_an_unmarked_measurement_fails_the_check_until_it_is_listed(figures: ModuleType, reports: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    (reports.parent / "README.md").write_text("The limit is 10 s.\n")
    assert figures.main([]) == 1
    assert "README.md:1: '10 s' has no marker" in capsys.readouterr().out
    (reports.parent / "figures.toml").write_text('"README.md" = ["The limit is 10 s"]\n')
    assert figures.main([]) == 0
