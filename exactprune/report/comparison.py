"""Lossless against approximate: methods at several ratios and seeds, and how far each can differ from the original.

    study = read_study(Path("experiment.toml"))
    facts = write_comparison(study, Path("reports/fashion"))

Every network g, whatever made it, is compared with the original f in the same way (``comparison_cells``): its size and
times, its accuracy, a certified bound on the largest difference of any output on the whole domain, the largest difference
found, the share of samples whose class cannot change, the classes that did change, and an input that shows it. Cells are
kept as they finish: an interrupted study goes on where it was, and a study with one method more computes that method.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from exactprune.errors import OptionError
from exactprune.io.atomic import write_bytes
from exactprune.report.page import cleaned
from exactprune.report.strict import jsonable, pretty

SCHEMA = "exactprune-comparison/1"
FILES = ("comparison.html", "comparison.json", "comparison.csv", "comparison.md")
CONTROLS = ("random", "magnitude")
CLASSES = {
    "fashion-mnist": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
    "digits": tuple("0123456789"),
}
COLUMNS = (
    "method", "ratio", "seed", "weights_kept", "weights", "parameters_stored", "parameters_nonzero", "macs", "accuracy_pruned",
    "accuracy", "deviation_upper", "deviation_lower", "unchangeable", "changed", "latency_1", "latency_64", "latency_1024",
    "collapsed", "ratio_stored", "ratio_nonzero", "macs_dense", "neurons", "bytes", "bytes_sparse", "deviation_upper_pruned",
    "deviation_lower_pruned", "unchangeable_near", "latency_dense_1", "latency_dense_64", "latency_dense_1024",
    "sparse_latency_1", "sparse_latency_64", "sparse_latency_1024", "seconds", "seconds_training", "densities", "constant",
    "failed")
_AVERAGED = ("weights_kept", "parameters_stored", "parameters_nonzero", "macs", "macs_dense", "neurons", "bytes", "bytes_sparse",
             "ratio_stored", "ratio_nonzero", "seconds", "seconds_training")
_SPREAD = ("accuracy_pruned", "accuracy", "changed")
_LARGEST = ("deviation_upper", "deviation_lower", "deviation_upper_pruned", "deviation_lower_pruned")
_TIMES = tuple(f"{kind}_{batch}" for kind in ("latency", "latency_dense", "sparse_latency") for batch in (1, 64, 1024))


class Progress(Protocol):
    """What is told of the cells; the command line's display is one."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Cells of a method begin."""

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        model: model file.
        data: fashion-mnist, digits, or a .npz file with x, y, x_test and y_test.
        methods: names of pruning methods; random and magnitude are always there.
        ratios: weights of the original per weight that stays.
        seeds: of the methods and of the training afterwards.
        finetune: epochs of training after pruning, masks kept.
        samples: first training samples that methods may look at.
        tests: first test samples that are evaluated.
        domain: smallest and largest value of every input.
        input_shape: without batch axis, where the model does not say it.
        time_limit: seconds for deciding neurons before the lossless compression.
        train: options of the training after pruning (lr, batch, l1, ...), see ``TrainOptions``.
        train_samples: first training samples for it, and for methods that train; all by default.
        options: method -> its options.
        combine: methods that are also run on the lossless network.
        certify: first test samples around which classes are certified.
        radius: half the width of the box around each of them, in every input.
        exact: seconds a network for closing the gap between certified and found deviation; 0: bounds only.
        image: shape in which an input is a picture; found out by default.
        classes: names of the classes.
        title: of the report; the model's name by default.
        timing: seconds for measuring the time of a call at each batch size.

    Raises:
        OptionError: a value lies outside its range.
    """

    model: str
    data: str
    methods: tuple[str, ...] = CONTROLS
    ratios: tuple[float, ...] = (2, 4, 8, 16, 32)
    seeds: tuple[int, ...] = (0, 1, 2)
    finetune: int = 0
    samples: int = 1000
    tests: int = 2000
    domain: tuple[float, float] = (0.0, 1.0)
    input_shape: tuple[int, ...] | None = None
    time_limit: float = 60.0
    train: Mapping[str, Any] = field(default_factory=dict)
    train_samples: int | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    combine: tuple[str, ...] = ("magnitude",)
    certify: int = 200
    radius: float = 1 / 255
    exact: float = 0.0
    image: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    title: str = ""
    timing: float = 0.15

    def __post_init__(self) -> None:
        _require(bool(self.ratios) and min(self.ratios) >= 1, "ratios", self.ratios, "numbers >= 1")
        _require(bool(self.seeds) and min(self.seeds) >= 0, "seeds", self.seeds, "whole numbers >= 0")
        _require(self.finetune >= 0 and self.samples > 0 and self.tests > 0, "finetune, samples or tests",
                 (self.finetune, self.samples, self.tests), "epochs >= 0 and sample counts > 0")
        _require(self.train_samples is None or self.train_samples > 0, "train_samples", self.train_samples, "a number > 0")
        _require(self.certify >= 0 and self.radius >= 0 and self.exact >= 0 and self.timing >= 0,
                 "certify, radius, exact or timing", (self.certify, self.radius, self.exact, self.timing), "numbers >= 0")
        _require(len(self.domain) == 2 and self.domain[0] <= self.domain[1], "domain", self.domain, "two numbers, lower first")
        _require(self.image is None or len(self.image) in (2, 3), "image", self.image, "height, width, or 1 or 3 channels first")
        _require(isinstance(self.options, Mapping) and all(isinstance(v, Mapping) for v in self.options.values()), "options",
                 self.options, "a table for each method, [compare.options.METHOD]")
        _require(not {"epochs", "seed"} & set(self.train), "train", dict(self.train), "no epochs (finetune), no seed (seeds)")
        object.__setattr__(self, "methods", tuple(dict.fromkeys((*CONTROLS, *self.methods))))


def read_study(path: Path) -> Study:
    """The study of a TOML file, table ``[compare]``; paths in it are relative to the current directory.

    Raises:
        OptionError: no TOML, another table, an unknown key, or a value outside its range.
    """
    try:
        given = tomllib.loads(path.read_text())["compare"]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError) as error:
        raise OptionError(f"{path}: has no readable table [compare] ({error}); see docs/report.md") from None
    known = [f.name for f in fields(Study)]
    for key in given:
        _require(key in known, "key", key, f"one of {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return Study(**values)
    except TypeError as error:
        raise OptionError(f"{path}: {error}; see docs/report.md") from None


def write_comparison(study: Study, folder: Path, say: Callable[[str], None] = lambda text: None, *,
                     progress: Progress | None = None, source: str = "", fresh: bool = False) -> dict[str, Any]:
    """Run a study and write comparison.html, comparison.json, comparison.csv and comparison.md.

    Cells of an earlier or interrupted run in ``folder`` are not computed again.

    Args:
        study: what is compared.
        folder: where the files go, made when missing.
        say: told the name of every method.
        progress: told every cell.
        source: path of the TOML file, for the command that repeats the study.
        fresh: forget earlier cells.

    Returns:
        What comparison.json holds.
    """
    from exactprune.report.comparison_cells import Store
    from exactprune.report.comparison_page import render_comparison
    from exactprune.report.comparison_words import comparison_markdown

    if fresh:
        (folder / "cells.jsonl").unlink(missing_ok=True)
    store = Store(folder, None if fresh else folder / FILES[1])
    facts = run_study(study, say, store=store, progress=progress)
    facts["command"] = f"exactprune compare {source or 'experiment.toml'} -o {folder}"
    texts = (render_comparison(facts), pretty(facts), comparison_csv(facts), comparison_markdown(facts))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, texts, strict=True):
        write_bytes(folder / name, text.encode())
    store.done()
    return facts


def run_study(study: Study, say: Callable[[str], None] = lambda text: None, *, store: Any = None,
              progress: Progress | None = None) -> dict[str, Any]:
    """Every cell of a study as plain data (schema ``exactprune-comparison/1``).

    Args:
        study: what is compared.
        say: told the name of every method.
        store: ``comparison_cells.Store`` of finished cells; none are kept if None.
        progress: told every cell.
    """
    from exactprune.domain import uniform
    from exactprune.io import load
    from exactprune.report.comparison_cells import Bench, Store
    from exactprune.report.comparison_words import words_of
    from exactprune.training import load_data

    _check_methods(study)
    network = load(study.model, input_shape=study.input_shape)
    data = load_data(study.data).shaped(network.input_shape)
    _require(len(data.x_test) > 0, "data", study.data, "data with test samples (x_test, y_test)")
    bench, store = Bench(network, uniform(*study.domain, network.input_shape), data, study), store or Store(None)
    dense, lossless, *rows = _run_cells(bench, _cells(study), store, say, progress)
    done = [row for row in rows if "failed" not in row]
    facts = {"schema": SCHEMA, "title": study.title or network.name, "study": study,
             "model": {"name": network.name, "network_sha256": network.sha256, "input_shape": network.input_shape,
                       "parameters": network.parameters, "neurons": network.neurons},
             "data": {"name": data.name, "sha256": bench.data_hash, "classes": _class_names(study, data.name, dense)},
             "samples": len(bench.x), "certified_samples": len(bench.near), "image": bench.image, "dense": dense,
             "lossless": lossless, "rows": done, "failed": [row for row in rows if "failed" in row],
             "summary": summary(done), "versions": _versions(), "hardware": _hardware(dense["threads"]),
             "command": "exactprune compare experiment.toml -o DIR"}
    facts = cleaned(jsonable(facts))
    return facts | {"words": words_of(facts)}


def _check_methods(study: Study) -> None:
    """Everything about methods and training that can be refused before anything is computed."""
    from exactprune.pruners import make
    from exactprune.training import TrainOptions

    known = [f.name for f in fields(TrainOptions)]
    for name in study.train:
        _require(name in known, "train", name, f"one of {', '.join(known)}")
    TrainOptions(**study.train)
    for method in (*study.methods, *study.combine):
        make(method, **study.options.get(method, {}))
    for method in study.options:
        _require(method in (*study.methods, *study.combine), "options", method, "options of methods that are compared")


def _cells(study: Study) -> list[Any]:
    from exactprune.report.comparison_cells import DENSE, LOSSLESS, Cell

    cells, kinds = [Cell(DENSE), Cell(LOSSLESS, ratio=0.0)], [(m, m, False) for m in study.methods]
    for name, method, after in [*kinds, *((f"lossless, then {m}", m, True) for m in study.combine)]:
        cells += [Cell(name, method, float(ratio), seed, after) for ratio in study.ratios for seed in study.seeds]
    return cells


def _run_cells(bench: Any, cells: Sequence[Any], store: Any, say: Callable[[str], None],
               progress: Progress | None) -> list[dict[str, Any]]:
    found, last = [], ""
    for cell in cells:
        key = bench.key(cell)
        if cell.name != last:
            last = cell.name
            count = sum(c.name == last for c in cells)
            _ = progress.stage(f"compare: {last}", count) if progress is not None else None
            missing = sum(bench.key(c) not in store.rows for c in cells if c.name == last)
            say(last if missing else f"{last} (kept from an earlier run)")
        if key not in store.rows:
            store.add(bench.run(cell))
        found.append(store.rows[key])
        _ = progress.advance() if progress is not None else None
    return found


def _class_names(study: Study, data: str, dense: Mapping[str, Any]) -> list[str]:
    count = max(map(int, dense["churn"]), default=-1) + 1
    names = list(study.classes or CLASSES.get(data, ()))
    return [names[i] if i < len(names) else str(i) for i in range(max(count, len(names)))]


# -- over seeds ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per method and ratio: mean and standard deviation over seeds, the largest deviation, the smallest certified share.

    ``row`` is the number of the run whose counterexample is shown, if any has one.
    """
    groups: dict[tuple[str, float], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row["method"], row["ratio"]), []).append(number)
    return [{"method": method, "ratio": ratio, **_summed([rows[i] for i in numbers]), "row": _example(rows, numbers)}
            for (method, ratio), numbers in groups.items()]


def _summed(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    near = [r["unchangeable_near"] for r in found]
    return {"seeds": len(found), **{name: _spread(found, name) for name in _SPREAD},
            **{name: max((r[name] for r in found), key=float) for name in _LARGEST},
            "unchangeable": min(r["unchangeable"] for r in found), "unchangeable_near": None if None in near else min(near),
            "collapsed": sum(bool(r["collapsed"]) for r in found),
            "constant": sum(r["constant"] and not r["collapsed"] for r in found),
            "collapsed_layers": sorted({name for r in found for name in r["collapsed"]}),
            **{name: statistics.fmean(float(r[name]) for r in found) for name in _AVERAGED},
            **{name: _median([r[name] for r in found]) for name in _TIMES},
            "churn": _mean_churn(found), "densities": _mean_densities(found)}


def _example(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> int | None:
    """The first run with a confirmed example, else with any."""
    having = [(not rows[i]["counterexample"]["confirmed"], i) for i in numbers if rows[i]["counterexample"]]
    return min(having)[1] if having else None


def _spread(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    values = [float(row[name]) for row in rows]
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _mean_churn(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {c: statistics.fmean(r["churn"].get(c, 0.0) for r in rows) for c in rows[0]["churn"]}


def _mean_densities(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layer by layer the mean share of weights that stays."""
    return [{"name": parts[0]["name"], "density": statistics.fmean(p["kept"] / max(p["total"], 1) for p in parts)}
            for parts in zip(*(r["layers"] for r in rows))]


# -- files ---------------------------------------------------------------------------------------------------------------


def comparison_csv(facts: Mapping[str, Any]) -> str:
    """One line a run, the dense and the lossless network first; failed runs last."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in (facts["dense"], facts["lossless"], *facts["rows"], *facts["failed"]):
        writer.writerow([_value(row, column) for column in COLUMNS])
    return text.getvalue()


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column == "collapsed":
        return " ".join(row.get(column, ()))
    if column == "densities":
        return " ".join(f"{layer['name']}={layer['kept'] / max(layer['total'], 1):.6g}" for layer in row.get("layers", ()))
    return row.get(column, "")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in ("exactprune", "torch", "numpy", "highspy")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _hardware(threads: int) -> dict[str, Any]:
    return {"machine": platform.machine(), "processors": os.cpu_count() or 0, "threads": threads}


def _require(holds: bool, name: str, value: object, words: str) -> None:
    if not holds:
        raise OptionError(f"[compare] {name} is {value!r}; give {words}")
