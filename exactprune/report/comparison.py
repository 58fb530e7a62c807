"""Lossless against approximate: methods at several ratios and seeds, and how far each can differ from the original.

For every pruned network g of the original f, ``equiv`` bounds max abs(f - g) over the domain, whatever method made g. With
that bound U, a sample's class cannot change where the two largest outputs of f are more than 2 U apart (each output
moves by at most U). Outputs are evaluated in the network's dtype; ``_SLACK`` of the largest output is left for its rounding.
"""

from __future__ import annotations

import csv
import io
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exactprune.compress.levels import upward
from exactprune.errors import OptionError
from exactprune.io.atomic import write_bytes
from exactprune.report.page import cleaned
from exactprune.report.page_markdown import markdown_table, plain
from exactprune.report.strict import jsonable, pretty

if TYPE_CHECKING:
    from exactprune.domain import Box
    from exactprune.network import Network
    from exactprune.training import DataSet

SCHEMA = "exactprune-comparison/1"
FILES = ("comparison.html", "comparison.json", "comparison.csv", "comparison.md")
CONTROLS = ("random", "magnitude")
_SLACK = 1e-5
_COLUMNS = ("method", "ratio", "seed", "weights_kept", "weights", "parameters_stored", "parameters_nonzero", "macs",
            "accuracy_pruned", "accuracy", "deviation_upper", "deviation_lower", "unchangeable", "changed", "latency_1",
            "latency_64", "latency_1024", "collapsed")


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        model: model file.
        data: fashion-mnist, digits, or a .npz file with x, y, x_test and y_test.
        methods: names of pruning methods; random and magnitude are always there.
        ratios: weights of the original per weight that stays.
        seeds: of the methods and of the training afterwards.
        finetune: epochs of training afterwards.
        samples: first training samples that the methods may look at.
        tests: first test samples that are evaluated.
        domain: smallest and largest value of every input.
        input_shape: without batch axis, where the model does not say it.
        time_limit: seconds for deciding neurons before the lossless compression.

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

    def __post_init__(self) -> None:
        _require(bool(self.ratios) and min(self.ratios) >= 1, "ratios", self.ratios, "numbers >= 1")
        _require(bool(self.seeds) and min(self.seeds) >= 0, "seeds", self.seeds, "whole numbers >= 0")
        _require(self.finetune >= 0 and self.samples > 0 and self.tests > 0, "finetune, samples or tests",
                 (self.finetune, self.samples, self.tests), "epochs >= 0 and sample counts > 0")
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
    known = [field.name for field in fields(Study)]
    for key in given:
        _require(key in known, "key", key, f"one of {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return Study(**values)
    except TypeError as error:
        raise OptionError(f"{path}: {error}; see docs/report.md") from None


def write_comparison(study: Study, folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Run a study and write comparison.html, comparison.json, comparison.csv and comparison.md.

    Returns:
        What comparison.json holds.
    """
    from exactprune.report.html import render_comparison

    facts = run_study(study, say)
    texts = (render_comparison(facts), pretty(facts), comparison_csv(facts), comparison_markdown(facts))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, texts, strict=True):
        write_bytes(folder / name, text.encode())
    return facts


def run_study(study: Study, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Every run of a study as plain data (schema ``exactprune-comparison/1``)."""
    from exactprune.domain import uniform
    from exactprune.io import load
    from exactprune.options import CompressOptions, VerifyOptions
    from exactprune.pipeline import compress, verify
    from exactprune.training import load_data

    network = load(study.model, input_shape=study.input_shape)
    data = load_data(study.data).shaped(network.input_shape)
    bench = _Bench(network, uniform(*study.domain, network.input_shape), data, study)
    say("lossless")
    verification = verify(network, bench.domain, VerifyOptions(time_limit=study.time_limit))
    smaller = compress(verification, options=CompressOptions())
    lossless = bench.row("lossless", 0.0, 0, smaller.network, None) | {"level": str(smaller.level)}
    rows = []
    for method in study.methods:
        say(method)
        rows += list(bench.rows(method, network, method))
    say("lossless, then magnitude")
    rows += list(bench.rows("lossless, then magnitude", smaller.network, "magnitude"))
    dense = bench.row("dense", 1.0, 0, network, None)
    facts = {"schema": SCHEMA, "study": study, "model": {"name": network.name, "network_sha256": network.sha256},
             "samples": len(bench.x), "dense": dense, "lossless": lossless, "rows": rows, "summary": summary(rows)}
    return cleaned(jsonable(facts))


class _Bench:
    """The original, its domain and data, and what is measured of a smaller network."""

    def __init__(self, network: Network, domain: Box, data: DataSet, study: Study) -> None:
        self.network, self.domain, self.data, self.study = network, domain, data, study
        self.x = data.x_test[:study.tests].numpy().astype(network.dtype)
        self.y = data.y_test[:study.tests].numpy()
        self.outputs = _outputs(network, self.x)
        self.weights = _weights(network)[0]

    def rows(self, name: str, start: Network, method: str) -> Iterator[dict[str, Any]]:
        """One row a ratio and seed; ratios count the original's weights, also where ``start`` has fewer."""
        own = _weights(start)[0]
        for ratio in self.study.ratios:
            sparsity = max(0.0, 1.0 - self.weights / ratio / max(own, 1))
            for seed in self.study.seeds:
                yield self._pruned(name, start, method, ratio, sparsity, seed)

    def _pruned(self, name: str, start: Network, method: str, ratio: float, sparsity: float, seed: int) -> dict[str, Any]:
        from exactprune.pruning import prune
        from exactprune.training import TrainOptions

        data, options = self.data.first(self.study.samples), _seeded(method, seed)
        found = prune(start, method, sparsity, data, **options)
        first = found.network
        if self.study.finetune:
            found = prune(start, method, sparsity, data, finetune=TrainOptions(epochs=self.study.finetune, seed=seed), **options)
        assert found.network is not None and first is not None
        return self.row(name, ratio, seed, found.network, first) | {"collapsed": list(found.report.collapsed),
                                                                   "macs": found.report.macs}

    def row(self, name: str, ratio: float, seed: int, g: Network, first: Network | None) -> dict[str, Any]:
        """What is known about one network: size, accuracy, certified deviation, classes that change, times."""
        from exactprune.compress.measure import latency
        from exactprune.equivalence import equiv

        outputs, bound = _outputs(g, self.x), equiv(self.network, g, self.domain)
        kept = _weights(g)[1]
        times = {f"latency_{t.batch}": t.after for t in latency(self.network, g, batches=(1, 64, 1024), repeats=7)}
        return {"method": name, "ratio": ratio, "seed": seed, "weights_kept": kept, "weights": self.weights,
                "parameters_stored": g.parameters, "parameters_nonzero": _nonzero(g), "macs": None,
                "accuracy_pruned": self._accuracy(_outputs(first, self.x) if first is not None else outputs),
                "accuracy": self._accuracy(outputs), "deviation_upper": bound.upper, "deviation_lower": bound.lower,
                **self._classes(outputs, bound.upper), **times, "collapsed": []}

    def _accuracy(self, outputs: np.ndarray) -> float:
        return float((outputs.argmax(axis=1) == self.y).mean())

    def _classes(self, outputs: np.ndarray, upper: float) -> dict[str, Any]:
        """Share of samples whose class cannot change, share that did, by class of the original, and an example."""
        before, after = self.outputs.argmax(axis=1), outputs.argmax(axis=1)
        ordered = np.sort(self.outputs, axis=1)
        margin = ordered[:, -1] - ordered[:, -2] - _SLACK * max(float(np.abs(ordered).max()), 1.0)
        inside = ((self.x >= self.domain.lower) & (self.x <= self.domain.upper)).reshape(len(self.x), -1).all(axis=1)
        flips = np.flatnonzero(before != after)
        example = None if not flips.size else {"sample": int(flips[0]), "original": self.outputs[flips[0]].tolist(),
                                               "pruned": outputs[flips[0]].tolist()}
        churn = {str(c): float((after[before == c] != c).mean()) for c in np.unique(before)}
        return {"unchangeable": float(((margin > 2 * upper) & inside).mean()), "changed": float((before != after).mean()),
                "churn": churn, "counterexample": example}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, the largest deviation, per method and ratio."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["ratio"]), []).append(row)
    return [{"method": method, "ratio": ratio, "seeds": len(found), "accuracy_pruned": _spread(found, "accuracy_pruned"),
             "accuracy": _spread(found, "accuracy"), "deviation_upper": max(r["deviation_upper"] for r in found),
             "deviation_lower": max(r["deviation_lower"] for r in found), "unchangeable": min(r["unchangeable"] for r in found),
             "changed": _spread(found, "changed"), "collapsed": sum(bool(r["collapsed"]) for r in found)}
            for (method, ratio), found in groups.items()]


def comparison_csv(facts: Mapping[str, Any]) -> str:
    """One line a run, the dense and the lossless network first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in (facts["dense"], facts["lossless"], *facts["rows"]):
        writer.writerow([" ".join(row[c]) if c == "collapsed" else row[c] for c in _COLUMNS])
    return text.getvalue()


def comparison_markdown(facts: Mapping[str, Any]) -> str:
    """The comparison as a page: what lossless gives, then every method at every ratio."""
    dense, lossless, study = facts["dense"], facts["lossless"], facts["study"]
    low, high = study["domain"]
    head = (f"# Lossless against approximate: {plain(facts['model']['name'])}\n\n"
            f"Domain: every input from {low} to {high}. {len(study['seeds'])} seeds, {study['finetune']} epochs of training "
            f"after pruning, {facts['samples']:,} test samples. The deviation is the largest difference of any output from the "
            "original's, anywhere in the domain: certified (never more) and found (attained). "
            "*Class cannot change* is the certified share "
            "of test samples; *class changed* was counted.")
    rows = [[r["method"], f"{r['weights_kept']:,} of {r['weights']:,}", _percent(r["accuracy"]), _up(r["deviation_upper"]),
             _digits(r["deviation_lower"]), _percent(r["unchangeable"]), _percent(r["changed"])] for r in (dense, lossless)]
    first = markdown_table(["network", "non-zero weights", "accuracy", "deviation, certified", "found", "class cannot change",
                            "class changed"], rows)
    rows = [[s["method"], f"{s['ratio']:g}x", _both(s["accuracy_pruned"]), _both(s["accuracy"]), _up(s["deviation_upper"]),
             _digits(s["deviation_lower"]), _percent(s["unchangeable"]), _both(s["changed"]), s["collapsed"]]
            for s in facts["summary"]]
    second = markdown_table(["method", "ratio", "accuracy, pruned", "after training", "deviation, certified", "found",
                             "class cannot change", "class changed", "runs with a collapsed layer"], rows)
    return f"{head}\n\n## Dense and lossless\n\n{first}\n\n## Methods\n\n{second}\n"


# -- parts ---------------------------------------------------------------------------------------------------------


def _seeded(method: str, seed: int) -> dict[str, Any]:
    from exactprune.pruners import make

    options = make(method).options
    return {"seed": seed} if is_dataclass(options) and any(f.name == "seed" for f in fields(options)) else {}


def _outputs(network: Network, x: np.ndarray) -> np.ndarray:
    from exactprune.compress.measure import runner_of

    run, _ = runner_of(network)
    return np.concatenate([np.asarray(run(x[i:i + 1000])).reshape(len(x[i:i + 1000]), -1) for i in range(0, len(x), 1000)])


def _arrays(network: Network) -> list[np.ndarray]:
    return [a for node in network.nodes for a in vars(node.op).values() if isinstance(a, np.ndarray)]


def _weights(network: Network) -> tuple[int, int]:
    """Weights (arrays of two or more axes), and how many are not 0."""
    arrays = [a for a in _arrays(network) if a.ndim >= 2]
    return sum(a.size for a in arrays), sum(int(np.count_nonzero(a)) for a in arrays)


def _nonzero(network: Network) -> int:
    return sum(int(np.count_nonzero(a)) for a in _arrays(network))


def _spread(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    values = [float(row[name]) for row in rows]
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _both(spread: Mapping[str, float]) -> str:
    return f"{100 * spread['mean']:.2f} ± {100 * spread['std']:.2f} %"


def _up(value: float | str) -> str:
    """A certified bound, rounded up."""
    return upward(float(value)) if float(value) else "0"


def _digits(value: float | str) -> str:
    return f"{float(value):.3g}"


def _require(holds: bool, name: str, value: object, words: str) -> None:
    if not holds:
        raise OptionError(f"[compare] {name} is {value!r}; give {words}")
