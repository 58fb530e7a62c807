"""The study's tables are what its cells say."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "reports" / "study"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _study_tables  # pyright: ignore[reportMissingImports]

    return _study_tables


def cells(part: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((STUDY / part).glob("*.json"))]


def csv_rows(name: str) -> list[dict[str, str]]:
    with (STUDY / name).open(newline="") as file:
        return list(csv.DictReader(file))


def as_text(row: dict) -> dict[str, str]:
    return {key: "" if value is None else str(value) for key, value in row.items()}


def test_every_cell_of_the_sweep_is_a_line_and_every_line_a_cell(tables: ModuleType) -> None:
    made = [as_text(tables.sweep_row(cell)) for cell in cells("sweep")]
    assert len(made) >= 30
    assert sorted(made, key=str) == sorted(csv_rows("sweep.csv"), key=str)


def test_means_over_seeds_are_those_of_the_cells(tables: ModuleType) -> None:
    found = tables.summaries([tables.sweep_row(cell) for cell in cells("sweep")])
    by_name = {(row["network"], float(row["l1"])): row for row in csv_rows("sweep_summary.csv")}
    assert len(by_name) == len(found)
    for row in found:
        line = by_name[row["network"], row["l1"]]
        assert float(line["accuracy mean"]) == pytest.approx(row["accuracy mean"], rel=1e-12)
        gone = "parameters removed rounding mean"
        assert float(line[gone]) == pytest.approx(row[gone], rel=1e-12)


@pytest.mark.parametrize("part", ["sweep", "networks"])
def test_what_a_cell_claims_is_consistent(part: str) -> None:
    for cell in cells(part):
        totals, sizes = cell["verify"]["totals"], cell["sizes"]
        assert sum(totals[word] for word in ("inactive", "active", "unstable", "unknown")) == totals["neurons"]
        exact, rounding = cell["budgets"]
        assert exact["eps"] == 0 and exact["level"] == "exact"
        assert rounding["eps"] <= rounding["allowed"] or rounding["eps"] == 0
        assert rounding["parameters"] <= exact["parameters"] <= sizes["parameters"]
        if cell["samples"]:
            assert exact["other answers"] <= cell["samples"]


def test_a_sweep_row_by_hand(tables: ModuleType) -> None:
    budget = {"neurons": 3, "parameters": 20, "eps": 0.5, "accuracy": 0.75, "other answers": 1, "certificate": {"accepted": True}}
    cell = {"settings": {"architecture": "a", "training": {"l1": 0.1, "seed": 7}}, "accuracy": 0.5,
            "sizes": {"parameters": 40, "neurons": 4}, "training": {"accuracy": 0.6, "cpu seconds": 2.0},
            "verify": {"totals": {"neurons": 4, "inactive": 1, "active": 2, "unstable": 0, "unknown": 1}, "cpu seconds": 3.0},
            "check": {"accepted": False, "seconds": 0.1, "bytes": 10},
            "budgets": [{"budget": "exact", **budget}, {"budget": "rounding", **budget, "parameters": 10}]}
    row = tables.sweep_row(cell)
    assert (row["share inactive"], row["share active"], row["share stable"]) == (0.25, 0.5, 0.75)
    assert (row["parameters removed exact"], row["parameters removed rounding"]) == (0.5, 0.75)
    assert row["neurons removed exact"] == 0.25
    assert tables.accepted([row]) == (2, 3)
    (found,) = tables.summaries([row, row | {"seed": 8, "accuracy": 0.7}])
    assert found["accuracy mean"] == pytest.approx(0.6) and found["accuracy std"] == pytest.approx(0.2 / 2**0.5)
    assert found["seeds"] == 2 and found["unknown"] == 2 and found["checks"] == 6
