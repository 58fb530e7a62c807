"""The tables of a comparison as data: the page and comparison.md show the same ones.

Every table has a row for the dense and for the lossless network, and one per method and ratio, means over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from exactprune.compress.levels import upward
from exactprune.report.tables import size_words


@dataclass(frozen=True)
class Column:
    """A heading; ``shade`` names the colour whose strength shows the value, from 0 to 1."""

    label: str
    numeric: bool = True
    shade: str = ""


@dataclass(frozen=True)
class Cell:
    """What is shown, what it sorts by, and whether it is a warning."""

    text: str
    value: float | str
    flag: bool = False


@dataclass(frozen=True)
class Row:
    """A row with what it is filtered by."""

    method: str
    ratio: str
    cells: tuple[Cell, ...]
    control: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its title and what to know to read it."""

    id: str
    title: str
    notes: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


BATCHES = (1, 64, 1024)

Summary = Mapping[str, Any]
Build = Callable[[Summary], Sequence[Cell]]


def tables_of(facts: Mapping[str, Any]) -> list[Table]:
    """What can change, sizes, times, churn by class, density by layer."""
    from exactprune.report.comparison import summary

    controls = [{**summary([facts[name]])[0], "ratio": facts[name]["ratio_stored"]} for name in ("dense", "lossless")]
    entries = [(s, True) for s in controls] + [(s, False) for s in facts["summary"]]
    makers = (_changes, _sizes, _times, _churn, _densities)
    return [maker(facts, entries) for maker in makers]


def _table(name: str, title: str, notes: Sequence[str], columns: Sequence[Column], entries: Sequence[tuple[Summary, bool]],
           build: Build) -> Table:
    heads = (Column("Method", False), Column("Ratio"), *columns)
    rows = [Row(s["method"], _ratio(s["ratio"]), (*_head(s), *build(s)), control) for s, control in entries]
    return Table(name, title, tuple(notes), heads, tuple(rows))


def _head(s: Summary) -> tuple[Cell, Cell]:
    return Cell(s["method"], s["method"].lower()), Cell(_ratio(s["ratio"]), s["ratio"])


def _changes(facts: Mapping[str, Any], entries: Sequence[tuple[Summary, bool]]) -> Table:
    trained, study = bool(facts["study"]["finetune"]), facts["study"]
    names = ["Accuracy, %", "After training, %", "Certified, before training", "Deviation, certified", "Deviation, found",
             "Class cannot change", "Nor nearby", "Class changed, %"]
    shown = [i for i in range(len(names)) if trained or i not in (1, 2)]

    def build(s: Summary) -> list[Cell]:
        cells = [_both(s["accuracy_pruned"]), _both(s["accuracy"]), _bound(s["deviation_upper_pruned"]),
                 _bound(s["deviation_upper"]), Cell(_digits(s["deviation_lower"]), float(s["deviation_lower"])),
                 _share(s["unchangeable"]), _share(s["unchangeable_near"]), _both(s["changed"])]
        return [cells[i] for i in shown]

    seeds, near = _plural(len(study["seeds"]), "seed"), facts["certified_samples"]
    notes = [f"Accuracy: on {facts['samples']:,} test samples, mean ± standard deviation over {seeds}.",
             "Deviation: the largest difference of any output from the original's, anywhere in the domain. Certified is never "
             "exceeded, found was attained; the largest over seeds.",
             "Class cannot change: share of the test samples to which no network within that bound can give another class.",
             f"Nor nearby: share of the first {near:,} test samples for which original and pruned network provably give the same "
             f"class to every input within ±{study['radius']:.3g} of the sample; the smallest over seeds.",
             "Class changed: test samples to which the two networks give different classes, counted."]
    if trained:
        notes.insert(1, f"After training: {_plural(study['finetune'], 'epoch')} with the masks kept. The columns that follow are "
                        "about the trained network, unless they say otherwise.")
    return _table("changes", "What changes, and what cannot", notes, [Column(names[i]) for i in shown], entries, build)


def _sizes(facts: Mapping[str, Any], entries: Sequence[tuple[Summary, bool]]) -> Table:
    columns = ("Parameters, non-zero", "Times fewer", "Parameters, stored", "Times fewer", "MACs, non-zero", "MACs, dense",
               "Bytes on disk", "Bytes, sparse")

    def build(s: Summary) -> list[Cell]:
        return [_count(s["parameters_nonzero"]), _times_fewer(s["ratio_nonzero"]), _count(s["parameters_stored"]),
                _times_fewer(s["ratio_stored"]), _count(s["macs"]), _count(s["macs_dense"]), _bytes(s["bytes"]),
                _bytes(s["bytes_sparse"])]

    return _table("sizes", "Sizes",
                  ["Ratio: weights of the original for each weight that was asked to stay; for lossless, what came out.",
                   "Parameters include biases. Times fewer: than the original's.",
                   "MACs: multiply-accumulates for one input, those with a non-zero weight, and all that a dense kernel does.",
                   "Bytes on disk: the model file as saved. Sparse: a file that keeps weights in compressed rows wherever that "
                   "is smaller."], [Column(name) for name in columns], entries, build)


def _times(facts: Mapping[str, Any], entries: Sequence[tuple[Summary, bool]]) -> Table:
    columns = [Column(f"{kind}, batch {batch:,}") for batch in BATCHES for kind in ("Dense kernels", "Sparse kernels")]

    def build(s: Summary) -> list[Cell]:
        return [_time(s[f"{kind}_{b}"], s[f"latency_dense_{b}"]) for b in BATCHES for kind in ("latency", "sparse_latency")]

    threads = facts["hardware"]["threads"]
    return _table("times", "Time of a call (measured)",
                  ["Median time of a call; in brackets, how many times as fast as the original, which took turns with it (below "
                   f"1: slower). PyTorch on a CPU, {_plural(threads, 'thread')}.",
                   "Dense kernels multiply the zeros of a mask too, so that only a smaller network gains.",
                   "Sparse kernels keep the matrices of linear layers in compressed rows; convolutions stay dense."],
                  columns, entries, build)


def _churn(facts: Mapping[str, Any], entries: Sequence[tuple[Summary, bool]]) -> Table:
    classes, names = list(facts["dense"]["churn"]), facts["data"]["classes"]
    columns = [Column("All"), *[Column(names[int(c)] if int(c) < len(names) else c, shade="churn") for c in classes]]
    return _table("churn", "Changed classes, by class",
                  ["Of the test samples that the original puts into a class, the share that the other network puts into another "
                   "one, mean over seeds. The stronger the colour, the larger the share."], columns, entries,
                  lambda s: [_short(s["changed"]["mean"]), *[_short(s["churn"][c]) for c in classes]])


def _densities(facts: Mapping[str, Any], entries: Sequence[tuple[Summary, bool]]) -> Table:
    layers = [f"node {n}" if n.isdigit() else n for n in (layer["name"] for layer in facts["dense"]["layers"])]

    def build(s: Summary) -> list[Cell]:
        words = [*s["collapsed_layers"], *([f"one class in {_plural(s['constant'], 'run')}"] if s["constant"] else [])]
        gone = Cell(", ".join(words) or "none", s["collapsed"] + s["constant"], bool(words))
        return [*[_density(d["density"]) for d in s["densities"]], gone]

    return _table("densities", "Density by layer",
                  ["Share of each layer's weights that is not 0, mean over seeds; after lossless compression, of the smaller "
                   "layer's weights.",
                   "Collapsed: nothing is left of a layer, so the output no longer depends on the input. One class: every test "
                   "sample gets the same class, though no layer is empty."],
                  [*[Column(name, shade="density") for name in layers], Column("Collapsed", False)],
                  [(s, c) for s, c in entries if len(s["densities"]) == len(layers)], build)


# -- cells ---------------------------------------------------------------------------------------------------------------


def _ratio(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") + "x"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' if count != 1 else ''}"


def _both(spread: Mapping[str, float]) -> Cell:
    return Cell(f"{100 * spread['mean']:.2f} ± {100 * spread['std']:.2f}", spread["mean"])


def _bound(value: float | str) -> Cell:
    return Cell(upward(float(value)) if float(value) else "0", float(value))


def _share(value: float | None) -> Cell:
    return Cell("—", -1.0) if value is None else Cell(f"{100 * value:.1f} %", value)


def _short(value: float) -> Cell:
    return Cell(f"{100 * value:.1f} %" if value else "0", value)


def _density(value: float) -> Cell:
    return Cell(f"{100 * value:.3g} %", value, value == 0)


def _count(value: float) -> Cell:
    return Cell(f"{round(value):,}", value)


def _times_fewer(value: float) -> Cell:
    return Cell(f"{value:.2f}x", value)


def _bytes(value: float) -> Cell:
    return Cell(size_words(value), value)


def _time(seconds: float | None, dense: float) -> Cell:
    if seconds is None:
        return Cell("—", inf)
    return Cell(f"{_seconds(seconds)} ({dense / seconds:.2f}x)", seconds)


def _seconds(value: float) -> str:
    return f"{1e6 * value:,.0f} µs" if value < 1e-2 else f"{1e3 * value:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _digits(value: float | str) -> str:
    return f"{float(value):.3g}"
