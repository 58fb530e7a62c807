"""The check itself: records in file order, each narrowing what is known, and at the end every claim accepted or
rejected.

A malformed record rejects everything. A proof that does not check is no error: it narrows nothing, and the verdict that
needed it is rejected.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from exactprune.checker import boxes, network, records, trees, witness
from exactprune.checker.bounds import Bounds
from exactprune.checker.dyadic import Array
from exactprune.checker.network import CheckError, Network


@dataclass(eq=False)
class LayerReport:
    """What was claimed of one ReLU layer: neuron -> claim if accepted, neuron -> reason if rejected."""

    layer: int
    neurons: int
    accepted: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)


@dataclass(eq=False)
class Report:
    """The outcome of a check.

    Attributes:
        error: why everything is rejected (a hash that differs, a malformed file), or "".
        layers: one report a ReLU layer.
        rejected: (layer, neuron, claim, reason) of every claim that is not accepted.
        counts: accepted claims by kind, rejected ones, neurons, and records by kind.
        seconds: time taken.
        source: where the network comes from.
    """

    error: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    rejected: list[tuple[int, int, str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    source: str = "memory"

    @property
    def accepted(self) -> bool:
        """Whether every claim that is made is accepted."""
        return not self.error and not self.rejected

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        layers = [{"layer": r.layer, "neurons": r.neurons, "accepted": len(r.accepted), "rejected": len(r.rejected)}
                  for r in self.layers]
        rejected = [{"layer": k, "neuron": i, "claim": c, "reason": r} for k, i, c, r in self.rejected]
        return {"accepted": self.accepted, "error": self.error, "source": self.source, "counts": self.counts,
                "layers": layers, "rejected": rejected, "seconds": self.seconds}


def check(given: Any, lower: Array, upper: Array, lines: Iterable[dict[str, Any]], exact: bool = True) -> Report:
    """Check a certificate for a network over the box [lower, upper].

    Args:
        given: a ``network.Network``, or any object with its fields (see ``network.of``).
        lower, upper: float64, in the input's shape.
        lines: the records in order, as parsed JSON.
        exact: kept for callers; every decision is made in exact integer arithmetic either way.
    """
    return proved(given, lower, upper, lines)[0]


def proved(given: Any, lower: Array, upper: Array, lines: Iterable[dict[str, Any]]) -> tuple[Report, Bounds | None]:
    """As ``check``, with the bounds that the certificate proves (None where it is rejected as a whole)."""
    started = time.perf_counter()
    report, bounds = Report(), None
    try:
        checking = _Check(network.of(given), lower, upper, report)
        checking.run(lines)
        bounds = checking.bounds
    except CheckError as error:
        report.error = str(error)
    except Exception as error:  # nothing unforeseen may pass for an acceptance
        report.error = f"cannot be checked: {type(error).__name__}: {error}"
    report.seconds = time.perf_counter() - started
    return report, bounds


class _Check:
    def __init__(self, net: Network, lower: Array, upper: Array, report: Report) -> None:
        self.network, self.report = net, report
        self.lower, self.upper = (np.array(b, np.float64) for b in (lower, upper))
        if self.lower.shape != net.input_shape or self.upper.shape != net.input_shape:
            raise CheckError(f"the domain has shape {list(self.lower.shape)}, the input {list(net.input_shape)}")
        if not (np.isfinite(self.lower).all() and np.isfinite(self.upper).all() and (self.lower <= self.upper).all()):
            raise CheckError("the domain is empty or not bounded by finite numbers")
        self.sizes = [int(np.prod(net.shapes[i])) for i in net.relus]
        self.bounds = Bounds(net, (self.lower, self.upper))
        self.points = np.zeros((0, *net.input_shape))
        self.unstable: list[set[int]] = [set() for _ in self.sizes]
        self.reasons: dict[tuple[int, int, str], str] = {}
        self.judged: set[int] = set()
        report.layers = [LayerReport(k, n) for k, n in enumerate(self.sizes)]
        report.counts = {"neurons": sum(self.sizes), "inactive": 0, "active": 0, "unstable": 0, "unknown": 0,
                         "rejected": 0}

    def run(self, lines: Iterable[dict[str, Any]]) -> None:
        handlers = {"crown": self._crown, "linear": self._linear, "boxes": self._boxes, "points": self._points,
                    "unstable": self._unstable, "verdicts": self._verdicts}
        stream = iter(lines)
        self._header(next(stream, None))
        for kind, group in groupby(stream, records.kind_of):
            if kind == "tree":
                self._trees(group)
                continue
            if kind not in handlers:
                raise CheckError(f"there is no record '{kind}' (here)")
            for record in group:
                self._count(kind)
                handlers[kind](record)
        missing = [k for k in range(len(self.sizes)) if k not in self.judged]
        if missing:
            raise CheckError(f"the certificate is incomplete: no verdicts for ReLU layers {missing}")

    def _count(self, kind: str) -> None:
        key = f"{kind} records"
        self.report.counts[key] = self.report.counts.get(key, 0) + 1

    def _header(self, record: Any) -> None:
        if records.kind_of(record) != "header":
            raise CheckError("the first record is not a header")
        form, net, domain, dtype, shape, layers, _ = records.fields(
            record, "format", "network", "domain", "dtype", "input_shape", "layers", "tool")
        if form != records.FORMAT:
            raise CheckError(f"format {form!r}; this checker reads {records.FORMAT}")
        if net != self.network.sha256:
            raise CheckError(f"it is for network {str(net)[:16]}..., the model is {self.network.sha256[:16]}...")
        if domain != network.domain_sha256(self.lower, self.upper):
            raise CheckError("the certificate is for another domain")
        if dtype != self.network.dtype or shape != list(self.network.input_shape):
            raise CheckError("the header's dtype or input shape is not the model's")
        told = [(e.get("node"), e.get("neurons")) if isinstance(e, dict) else None for e in records.listed(layers,
                                                                                                           "layers")]
        if told != list(zip(self.network.relus, self.sizes, strict=True)):
            raise CheckError("the header's layers are not the model's")

    def _layer(self, value: Any) -> int:
        layer = records.whole(value, 0, len(self.sizes), "layer")
        self.bounds.reach(layer)
        return layer

    # -- lemmas ------------------------------------------------------------------------------------------------

    def _crown(self, record: dict[str, Any]) -> None:
        layer, neurons, side = records.fields(record, "layer", "neurons", "side")
        layer = self._layer(layer)
        chosen = records.indices(neurons, self.sizes[layer], "crown: neurons")
        side = records.choice(side, ("upper", "lower", "both"), "crown: side")
        for each in ("upper", "lower") if side == "both" else (side,):
            self._one_leaf(layer, chosen, each, [])

    def _linear(self, record: dict[str, Any]) -> None:
        layer, neurons, side, given = records.fields(record, "layer", "neurons", "side", "multipliers")
        layer = self._layer(layer)
        chosen = records.indices(neurons, self.sizes[layer], "linear: neurons")
        side = records.choice(side, ("upper", "lower"), "linear: side")
        entry = records.multipliers(given, self.sizes[:layer], len(chosen))
        self._one_leaf(layer, chosen, side, [entry] if entry else [])

    def _one_leaf(self, layer: int, neurons: Array, side: str, entries: list[Any]) -> None:
        """Narrow one side of some neurons; what ends just beyond 0 is computed again exactly."""
        sign = 1 if side == "upper" else -1
        hints = records.dense(entries, self.sizes)
        values = self.bounds.decide(layer, neurons, np.full(len(neurons), sign, np.int64), self.bounds.domain(layer),
                                    hints)
        self.bounds.narrow(layer, neurons, side, values)
        for neuron, value in zip(neurons[values > 0], values[values > 0], strict=True):
            self.reasons[layer, int(neuron), side] = f"its one-leaf bound misses 0 by {value:.3g}"

    def _trees(self, group: Iterator[dict[str, Any]]) -> None:
        def read(record: dict[str, Any]) -> trees.Tree:
            self._count("tree")
            return trees.read(record, self.sizes)

        for _, same in groupby(map(read, group), lambda tree: tree.layer):
            found = list(same)
            for tree, why in zip(found, trees.prove(self.bounds, found, self.sizes), strict=True):
                if why:
                    self.reasons[tree.layer, tree.neuron, "upper" if tree.sign > 0 else "lower"] = f"its tree: {why}"

    def _boxes(self, record: dict[str, Any]) -> None:
        splits = boxes.read(record, self.sizes, self.lower.reshape(-1), self.upper.reshape(-1))
        for (layer, neuron, sign), why in boxes.prove(self.bounds, splits).items():
            if why:
                self.reasons[layer, neuron, "upper" if sign > 0 else "lower"] = why

    # -- witnesses ---------------------------------------------------------------------------------------------

    def _points(self, record: dict[str, Any]) -> None:
        (values,) = records.fields(record, "values")
        found = records.unpack(values, ("<f8",), "points: values")
        if found.ndim != 2 or found.shape[1] != self.lower.size:
            raise CheckError(f"points: shape {list(found.shape)}, the input has {self.lower.size} values")
        outside = ((found < self.lower.reshape(-1)) | (found > self.upper.reshape(-1))).any(axis=1)
        if outside.any():
            raise CheckError(f"points: point {len(self.points) + int(outside.argmax())} lies outside the domain")
        self.points = np.concatenate([self.points, found.reshape(-1, *self.network.input_shape)])

    def _unstable(self, record: dict[str, Any]) -> None:
        layer, neurons, positive, negative = records.fields(record, "layer", "neurons", "positive", "negative")
        layer = self._layer(layer)
        chosen = records.indices(neurons, self.sizes[layer], "unstable: neurons")
        above, below = (records.integers(v, 0, len(self.points), "unstable: points") for v in (positive, negative))
        if not len(chosen) == len(above) == len(below):
            raise CheckError("unstable: the lists differ in length")
        if not len(chosen):
            return
        signs = witness.signs(self.bounds, layer, self.points, np.concatenate([above, below]), np.tile(chosen, 2))
        good = (signs[: len(chosen)] > 0) & (signs[len(chosen) :] < 0)
        self.unstable[layer].update(chosen[good].tolist())
        for neuron in chosen[~good]:
            self.reasons[layer, int(neuron), "points"] = "its points do not have both signs"

    # -- claims ------------------------------------------------------------------------------------------------

    def _verdicts(self, record: dict[str, Any]) -> None:
        layer, *lists = records.fields(record, "layer", "inactive", "active", "unstable", "unknown")
        layer = records.whole(layer, 0, len(self.sizes), "layer")
        if layer in self.judged:
            raise CheckError(f"verdicts: layer {layer} stands twice")
        self.judged.add(layer)
        inactive, active, unstable, unknown = (
            records.indices(v, self.sizes[layer], f"verdicts: layer {layer}") for v in lists)
        if sorted(np.concatenate([inactive, active, unstable, unknown]).tolist()) != list(range(self.sizes[layer])):
            raise CheckError(f"verdicts: in layer {layer} not every neuron stands in exactly one list")
        if len(inactive) or len(active):
            self.bounds.reach(layer)  # not for unstable and unknown: they need no bounds, which may leave the range of float64
            self._judge(layer, inactive, "inactive", "upper", self.bounds.upper[layer][inactive] <= 0)
            self._judge(layer, active, "active", "lower", self.bounds.lower[layer][active] >= 0)
        seen = np.array([int(i) in self.unstable[layer] for i in unstable], bool)
        self._judge(layer, unstable, "unstable", "points", seen)
        self.report.counts["unknown"] += len(unknown)

    def _judge(self, layer: int, neurons: Array, claim: str, side: str, holds: Array) -> None:
        report = self.report.layers[layer]
        for neuron, good in zip(neurons.tolist(), holds.tolist(), strict=True):
            if good:
                report.accepted[neuron] = claim
                self.report.counts[claim] += 1
                continue
            reason = self.reasons.get((layer, neuron, side), "nothing before it proves it")
            report.rejected[neuron] = reason
            self.report.rejected.append((layer, neuron, claim, reason))
            self.report.counts["rejected"] += 1
