"""One cell of a comparison: one method at one ratio with one seed, pruned, trained, measured and bounded.

A cell is known by a hash of everything that its result depends on: network, data, method and its options, ratio, seed,
training, domain and what is measured. ``Store`` keeps finished cells (one JSON line each), so that a study that was
interrupted, or is asked again with one method more, computes only what is missing. Equal cells have equal results, times
of a call aside, which are measured once and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from exactprune.compress.levels import Kind
from exactprune.errors import ExactPruneError
from exactprune.report.comparison_bounds import MOST_PAIRED, Deviation, deviation, steady, unchangeable
from exactprune.report.comparison_measure import sizes, times, weights_of
from exactprune.report.png import data_uri
from exactprune.report.strict import compact, jsonable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exactprune.domain import Box
    from exactprune.network import Network
    from exactprune.report.comparison import Study
    from exactprune.training import DataSet

VERSION = 4  # of what a cell holds; a change makes stored cells unknown
DENSE, LOSSLESS = "dense", "lossless"


@dataclass(frozen=True)
class Cell:
    """What is asked: ``method`` on the original, or, with ``after``, on the lossless network."""

    name: str
    method: str = ""
    ratio: float = 1.0
    seed: int = 0
    after: bool = False


class Store:
    """Finished cells, by hash: those of an earlier comparison.json, and those of a run that did not end."""

    def __init__(self, folder: Path | None, earlier: Path | None = None) -> None:
        self.path = None if folder is None else folder / "cells.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        for row in [*_rows_of(earlier), *_lines_of(self.path)]:
            self.rows[row["cell"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished cell; a line is written at once, so a run may end at any time."""
        self.rows[row["cell"]] = row
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(compact(jsonable(row)) + "\n")

    def done(self) -> None:
        """Everything is in comparison.json: the lines are no longer needed."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _rows_of(path: Path | None) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text()) if path is not None else {}
        rows = [found["dense"], found["lossless"], *found["rows"], *found["failed"]] if found else []
        return [row for row in rows if "cell" in row]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _lines_of(path: Path | None) -> list[dict[str, Any]]:
    """Whole lines; the last one may have been cut."""
    rows = []
    for line in path.read_text().splitlines() if path is not None and path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "cell" in row:
            rows.append(row)
    return rows


class Bench:
    """The original, its domain and data, and what is found out about a smaller network."""

    def __init__(self, network: Network, domain: Box, data: DataSet, study: Study) -> None:
        self.network, self.domain, self.data, self.study = network, domain, data, study
        self.x = data.x_test[:study.tests].numpy().astype(network.dtype)
        self.y = data.y_test[:study.tests].numpy()
        self.near = self.x[:study.certify]
        self._decided: tuple[tuple[Any, ...], Any] | None = None

    # -- what a cell is --------------------------------------------------------------------------------------------------

    def key(self, cell: Cell) -> str:
        """Hash of everything that a cell's result depends on."""
        s = self.study
        asked = {"version": VERSION, "network": self.network.sha256, "data": self.data_hash, "cell": cell,
                 "options": s.options.get(cell.method, {}), "training": (s.finetune, s.train, s.train_samples),
                 "samples": (s.samples, len(self.x), len(self.near), s.radius), "domain": self.domain.sha256,
                 "time_limit": s.time_limit if cell.after or cell.name == LOSSLESS else 0, "exact": s.exact, "timing": s.timing}
        return hashlib.sha256(compact(jsonable(asked)).encode()).hexdigest()[:20]

    @cached_property
    def data_hash(self) -> str:
        """Of all samples."""
        found = hashlib.sha256()
        for part in (self.data.x, self.data.y, self.data.x_test, self.data.y_test):
            found.update(np.ascontiguousarray(part.numpy()).data)
        return found.hexdigest()

    def run(self, cell: Cell) -> dict[str, Any]:
        """A cell's row; where a method cannot do it, ``failed`` says why."""
        head = {"method": cell.name, "ratio": cell.ratio, "seed": cell.seed, "cell": self.key(cell)}
        if cell.name == DENSE:
            largest = float(np.abs(self.outputs).max(initial=0.0))
            return head | self.facts(self.network, self.network) | {"largest_output": largest}
        if cell.name == LOSSLESS:
            return head | self.facts(self.lossless, self.lossless, known=self._claimed) | {"level": str(self._smaller.level)}
        try:
            return head | self._pruned(cell)
        except (ExactPruneError, MemoryError) as error:
            return head | {"failed": " ".join(str(error).split()) or type(error).__name__}

    # -- lossless --------------------------------------------------------------------------------------------------------

    @cached_property
    def _smaller(self) -> Any:
        from exactprune.options import CompressOptions, VerifyOptions
        from exactprune.pipeline import compress, verify

        verification = verify(self.network, self.domain, VerifyOptions(time_limit=self.study.time_limit))
        return compress(verification, options=CompressOptions())

    @property
    def lossless(self) -> Network:
        """The original, compressed at the default level."""
        return self._smaller.network

    @property
    def _claimed(self) -> float | None:
        """Certified bound on its deviation."""
        level = self._smaller.level
        return level.eps if level.kind <= Kind.CERTIFIED else None

    # -- approximate -----------------------------------------------------------------------------------------------------

    def _pruned(self, cell: Cell) -> dict[str, Any]:
        start = self.lossless if cell.after else self.network
        found, seconds = self._decision(cell, start)
        first, last, trained = found.network, found.network, 0.0
        if self.study.finetune and found.plan.smaller is None:
            began = perf_counter()
            last = self._trained(found.module, found.masks, cell.seed)
            trained = perf_counter() - began
        notes = list(found.report.notes)
        return self.facts(last, first, start) | {"seconds": seconds, "seconds_training": trained, "notes": notes}

    def _decision(self, cell: Cell, start: Network) -> tuple[Any, float]:
        """The pruned network and the seconds it took; the same for every seed where the method has none."""
        from exactprune.pruning import prune

        options = dict(self.study.options.get(cell.method, {})) | _seeded(cell.method, cell.seed)
        asked = (cell.method, cell.ratio, cell.after, tuple(sorted(_seeded(cell.method, cell.seed).items())))
        if self._decided is None or self._decided[0] != asked:
            own, began = weights_of(start)[0], perf_counter()
            sparsity = max(0.0, 1.0 - weights_of(self.network)[0] / cell.ratio / max(own, 1))
            found = prune(start, cell.method, sparsity, self._samples(cell.method), **options)
            self._decided = (asked, (found, perf_counter() - began))
        return self._decided[1]

    def _samples(self, method: str) -> DataSet:
        """What the method may look at: ``samples``, or all the training data if it trains."""
        from exactprune.pruners import make

        return self._training_data if make(method).when == "during training" else self.data.first(self.study.samples)

    @cached_property
    def _training_data(self) -> DataSet:
        return self.data if self.study.train_samples is None else self.data.first(self.study.train_samples)

    def _trained(self, module: nn.Module, masks: Mapping[str, Tensor], seed: int) -> Network:
        from exactprune.io import load
        from exactprune.training import TrainOptions, train

        options = TrainOptions(**{**self.study.train, "epochs": self.study.finetune, "seed": seed})
        names = dict(module.named_parameters())
        dtype, data = next(module.parameters()).dtype, self._training_data
        y = data.y.to(dtype) if data.y.is_floating_point() else data.y
        trained = train(module, data.x.to(dtype), y, options, masks={k: m for k, m in masks.items() if k in names})
        return load(trained.module, input_shape=self.network.input_shape)

    # -- what is found out -------------------------------------------------------------------------------------------------

    def facts(self, g: Network, first: Network, start: Network | None = None, known: float | None = None) -> dict[str, Any]:
        """Size, accuracy, certified deviation, classes that change, times.

        Args:
            g: the network.
            first: the same before it was trained again.
            start: what was pruned, where ``g`` is a pruned network.
            known: a bound on the deviation that is certified already.
        """
        outputs = self.outputs_of(g)
        via = (start, self._claimed) if start is not None and start is not self.network and self._claimed is not None else None
        found = deviation(self.network, g, self.domain, exact=self.study.exact, known=known, via=via)
        before = found if first is g else deviation(self.network, first, self.domain, exact=self.study.exact, via=via)
        counted = sizes(g, self.network)
        if start is not None:
            _name_layers(counted["layers"], start)
        return {**counted, "accuracy_pruned": self._accuracy(outputs if first is g else self.outputs_of(first)),
                "accuracy": self._accuracy(outputs), "deviation_upper": found.upper, "deviation_lower": found.lower,
                "deviation_upper_pruned": before.upper, "deviation_lower_pruned": before.lower,
                **self.classes(g, outputs, found), **times(self.network, g, self.study.timing), "seconds": 0.0,
                "seconds_training": 0.0,
                "collapsed": [layer["name"] for layer in counted["layers"] if layer["total"] and not layer["kept"]],
                "constant": len(set(outputs.argmax(axis=1))) == 1 < len(set(self.outputs.argmax(axis=1))), "notes": []}

    def outputs_of(self, network: Network) -> np.ndarray:
        """(samples, outputs) of the test samples, as the network is run."""
        from exactprune.compress.measure import runner_of

        run, _ = runner_of(network)
        parts = [np.asarray(run(self.x[i:i + 1000])).reshape(len(self.x[i:i + 1000]), -1) for i in range(0, len(self.x), 1000)]
        return np.concatenate(parts)

    def _accuracy(self, outputs: np.ndarray) -> float:
        return float((outputs.argmax(axis=1) == self.y).mean())

    @cached_property
    def outputs(self) -> np.ndarray:
        """Of the original."""
        return self.outputs_of(self.network)

    @cached_property
    def margins(self) -> np.ndarray:
        """(samples, outputs): at most f_c - f_j as real functions, c the class of the sample; -inf outside the domain."""
        lower, upper = _enclosed(self.network, self.x)
        own = lower[np.arange(len(lower)), self.outputs.argmax(axis=1)]
        return np.where(self.domain.contains(self.x)[:, None], np.nextafter(own[:, None] - upper, -np.inf), -np.inf)

    @cached_property
    def _steady(self) -> np.ndarray:
        return self._steady_of(self.network)

    def _steady_of(self, network: Network) -> np.ndarray:
        classes = self.outputs[:len(self.near)].argmax(axis=1)
        return steady(network, self.near, classes, self.study.radius, self.domain)

    def classes(self, g: Network, outputs: np.ndarray, found: Deviation) -> dict[str, Any]:
        """Share of samples whose class cannot change, by the domain's bound and nearby; share that did; an example."""
        before, after = self.outputs.argmax(axis=1), outputs.argmax(axis=1)
        near = None if outputs.shape[1] > MOST_PAIRED or not len(self.near) else \
            float((self._steady & (self._steady if g is self.network else self._steady_of(g))).mean())
        churn = {str(c): float((after[before == c] != c).mean()) for c in np.unique(before)}
        return {"unchangeable": float(unchangeable(self.margins, before, found).mean()), "unchangeable_near": near,
                "changed": float((before != after).mean()), "churn": churn,
                "counterexample": self._on_data(g, outputs) or self._searched(g, found)}

    def _on_data(self, g: Network, outputs: np.ndarray) -> dict[str, Any] | None:
        """The test sample whose class changes most clearly."""
        flips = np.flatnonzero(self.outputs.argmax(axis=1) != outputs.argmax(axis=1))
        if not flips.size:
            return None
        clear = np.minimum(_lead(self.outputs[flips]), _lead(outputs[flips]))
        best = int(flips[np.argsort(-clear, kind="stable")[0]])
        return {"sample": best, "label": self.y[best].item(), **self._example(g, self.x[best])}

    def _searched(self, g: Network, found: Deviation) -> dict[str, Any] | None:
        """A point of the domain, not from the data, whose class certainly changes."""
        for point in found.points:
            example = self._example(g, point)
            if example["confirmed"]:
                return {"sample": None, "label": None, **example, "input": point.reshape(-1).tolist()}
        return None

    def _example(self, g: Network, x: np.ndarray) -> dict[str, Any]:
        """Both outputs at a point in float64, whether the classes certainly differ, and the point as a picture."""
        (low_f, high_f), (low_g, high_g) = (_enclosed(n, x[None]) for n in (self.network, g))
        a, b = ((low + high)[0] / 2 for low, high in ((low_f, high_f), (low_g, high_g)))
        confirmed = a.argmax() != b.argmax() and _certain(low_f[0], high_f[0]) and _certain(low_g[0], high_g[0])
        return {"original": a.tolist(), "pruned": b.tolist(), "confirmed": bool(confirmed), "picture": self._picture(x)}

    def _picture(self, x: np.ndarray) -> str | None:
        shape = self.image
        limits = float(self.domain.lower.min()), float(self.domain.upper.max())
        return None if shape is None else data_uri(x.reshape(shape), *limits)

    @cached_property
    def image(self) -> tuple[int, ...] | None:
        """The shape in which an input is a picture, if it is one."""
        shape, given = self.network.input_shape, self.study.image
        if given is not None:
            return given
        if len(shape) == 3 and shape[0] in (1, 3):
            return shape
        side = round(self.x[0].size ** 0.5)
        return (side, side) if self.data.name in ("fashion-mnist", "digits") and side * side == self.x[0].size else None


# -- parts ---------------------------------------------------------------------------------------------------------------


def _seeded(method: str, seed: int) -> dict[str, Any]:
    from exactprune.pruners import make

    options = make(method).options
    return {"seed": seed} if is_dataclass(options) and any(f.name == "seed" for f in fields(options)) else {}


def _name_layers(layers: list[dict[str, Any]], start: Network) -> None:
    """Layers of a pruned network count against what was pruned, under its names."""
    from exactprune.report.comparison_measure import layers_of

    own = layers_of(start)
    if len(own) == len(layers):
        for layer, given in zip(layers, own, strict=True):
            layer |= {"name": given["name"], "total": given["total"]}


def _enclosed(network: Network, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples, outputs) that enclose the outputs as real functions."""
    from exactprune.compress.deviation import evaluate_with_error

    parts = [evaluate_with_error(network, x[i:i + 250]) for i in range(0, len(x), 250)]
    values, errors = (np.concatenate([part[k] for part in parts]).reshape(len(x), -1) for k in (0, 1))
    return np.nextafter(values - errors, -np.inf), np.nextafter(values + errors, np.inf)


def _lead(outputs: np.ndarray) -> np.ndarray:
    """By how much the largest output leads."""
    ordered = np.sort(outputs, axis=1)
    return ordered[:, -1] - ordered[:, -2] if outputs.shape[1] > 1 else ordered[:, -1]


def _certain(lower: np.ndarray, upper: np.ndarray) -> bool:
    best = int(lower.argmax())
    return bool((np.delete(upper, best) < lower[best]).all())
