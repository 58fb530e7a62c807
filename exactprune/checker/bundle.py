"""The certificate bundle of a compression: read strictly, and checked against both model files (docs/bundle.md).

gzip of JSON lines: a ``bundle`` header that names both networks, the domain and the level that is claimed; the domain;
the rewrites in words (for people: nothing here believes them); hints that relate tensors of the smaller network to the
original; then the original's certificate as in docs/certificate.md. Accepted iff the certificate is accepted as a whole
and the deviation that ``difference`` computes is at most the eps that is claimed, 0 for the level ``exact``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from sys import float_info
from typing import Any

import numpy as np

from exactprune.checker import boxes, chains, network, records, redundant
from exactprune.checker.bounds import Bounds
from exactprune.checker.chains import Entering
from exactprune.checker.difference import Difference
from exactprune.checker.dyadic import Array
from exactprune.checker.engine import Report, proved
from exactprune.checker.network import CheckError, Network, OpenShapeError, UnknownError
from exactprune.checker.readers import read_network
from exactprune.checker.records import Json

__all__ = ["Bundle", "BundleReport", "UnknownError", "check_bundle", "check_records", "read"]

FORMAT = "exactprune-bundle/1"
INTEGERS, FLOATS = "exact integers", "float64 with proved error bounds"
LEVELS = ("exact", "certified")
RATIOS = ("<f8",)


class FloatingError(CheckError):
    """Exact arithmetic throughout was asked for, and the claim rests on a bound in float64."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a bundle says, read and not yet believed.

    Attributes:
        header: its fields by name.
        lower, upper: the domain, float64 in the input's shape.
        rewrites: for people.
        hints: ``duplicate``, ``line`` and ``relation`` records in order.
        certificate: the original's records, header first, read as they are used.
        split: the ``split`` record: boxes on which the deviation is bounded one by one.
        forward: neurons of the original that nothing sees (``redundant``), in order; the hints are about what is left.
    """

    header: Json
    lower: Array
    upper: Array
    rewrites: list[Json]
    hints: list[Json]
    certificate: Iterator[Json]
    split: Json | None = None
    forward: tuple[Json, ...] = ()


@dataclass(eq=False)
class BundleReport:
    """The outcome of a check.

    Attributes:
        error: why the bundle is rejected, or "".
        level, claimed: the claim that the bundle makes.
        deviation: the bound on abs(f - g) over D and all outputs that the checker computed; NaN if it did not come so far.
        rewrites: how many the bundle lists.
        certificate: the outcome of the original's certificate.
        seconds: time taken.
        arithmetic: what the deviation was computed in.
    """

    error: str = ""
    level: str = ""
    claimed: float = float("nan")
    deviation: float = float("nan")
    rewrites: int = 0
    certificate: Report = field(default_factory=Report)
    seconds: float = 0.0
    arithmetic: str = INTEGERS

    @property
    def accepted(self) -> bool:
        """Whether the claim is accepted."""
        return not self.error and self.deviation <= self.claimed

    def as_dict(self) -> Json:
        """JSON-able data."""
        found = float(self.deviation)
        return {"accepted": self.accepted, "error": self.error, "level": self.level,
                "claimed": self.claimed if self.claimed == self.claimed else None,
                "deviation": found if found == found else None, "rewrites": self.rewrites,
                "arithmetic": self.arithmetic, "certificate": self.certificate.counts, "seconds": self.seconds}


def check_bundle(original: str | Path, compressed: str | Path, bundle: str | Path,
                 input_shape: network.Shape | None = None, exact: bool = False) -> BundleReport:
    """Check two model files and a bundle.

    Args:
        original: the model file of f.
        compressed: the model file of g.
        bundle: the file that ``compress`` wrote beside g.
        input_shape: without batch axis, where a model file leaves it open (the domain's shape is taken otherwise).
        exact: exact integers throughout; nothing is accepted on a bound in float64, however rigorous.

    Raises:
        FloatingError: with ``exact``: integers prove less than is claimed, and the ``split`` record needs float64.
        UnknownError: a model file is of a kind, or holds an operator, that the checker's readers do not know.
    """
    started = time.perf_counter()
    try:
        found = read(records.read_lines(Path(bundle)))
        f, g = (_network(Path(path), input_shape, found.lower.shape) for path in (original, compressed))
        report = _check(f, g, found, exact=exact)
    except (UnknownError, FloatingError):
        raise
    except CheckError as error:
        report = BundleReport(error=str(error))
    report.seconds = time.perf_counter() - started
    return report


Proved = tuple[Report, Bounds | None]


def check_records(original: Any, compressed: Any, lines: Iterable[Json], known: Proved | None = None) -> BundleReport:
    """Check two networks (see ``network.of``) and the records of a bundle.

    Args:
        original: f.
        compressed: g.
        lines: the records.
        known: what ``engine.proved`` found for the same f, domain and certificate, to spare doing it again.
    """
    started = time.perf_counter()
    try:
        report = _check(network.of(original), network.of(compressed), read(lines), known)
    except CheckError as error:
        report = BundleReport(error=str(error))
    report.seconds = time.perf_counter() - started
    return report


def _network(path: Path, input_shape: network.Shape | None, domain: network.Shape) -> Network:
    try:
        return read_network(path, input_shape)
    except OpenShapeError:
        return read_network(path, domain)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(lines: Iterable[Json]) -> Bundle:
    """The records of a bundle up to the certificate.

    Raises:
        CheckError: one is malformed, missing, or not where it belongs.
    """
    stream = iter(lines)
    header, lower, upper = _header(next(stream, None)), *_domain(next(stream, None))
    rewrites: list[Json] = []
    hints: list[Json] = []
    forward: list[Json] = []
    split: Json | None = None
    for record in stream:
        kind = records.kind_of(record)
        if kind == "header":
            return Bundle(header, lower, upper, rewrites, hints, _joined(record, stream), split, tuple(forward))
        if kind == "split" and split is None:
            split = record
            continue
        if kind == "rewrite" and not (hints or forward):
            rewrites.append(record)
        elif kind == "forward" and not hints:
            forward.append(record)
        elif kind in HINTS:
            hints.append(record)
        else:
            raise CheckError(f"there is no record '{kind}' (here)")
    raise CheckError("the bundle ends before the original's certificate")


def _joined(first: Json, rest: Iterator[Json]) -> Iterator[Json]:
    yield first
    yield from rest


def _header(record: Any) -> Json:
    if records.kind_of(record) != "bundle":
        raise CheckError("the first record is not the header of a bundle")
    names = ("format", "original", "compressed", "domain", "dtype", "level", "eps", "allowed", "tool")
    values: Json = dict(zip(names, records.fields(record, *names), strict=True))
    if values["format"] != FORMAT:
        raise CheckError(f"format {values['format']!r}; this checker reads {FORMAT}")
    level, eps = records.choice(values["level"], LEVELS, "level"), values["eps"]
    if type(eps) not in (int, float) or not 0 <= eps <= float_info.max or (level == "exact" and eps != 0):
        raise CheckError(f"level {level} with eps {eps!r}; expected a finite number >= 0, and 0 for exact")
    return values


def _domain(record: Any) -> tuple[Array, Array]:
    if records.kind_of(record) != "domain":
        raise CheckError("the second record is not the domain")
    lower, upper = (records.unpack(v, RATIOS, "domain") for v in records.fields(record, "lower", "upper"))
    if lower.shape != upper.shape or (lower > upper).any():
        raise CheckError("the domain is empty, or its ends differ in shape")
    return lower, upper


# -- checking ----------------------------------------------------------------------------------------------------------


def _check(f: Network, g: Network, bundle: Bundle, known: Proved | None = None, exact: bool = False) -> BundleReport:
    header = bundle.header
    report = BundleReport(level=header["level"], claimed=float(header["eps"]), rewrites=len(bundle.rewrites))
    try:
        _belongs(f, g, bundle)
        report.certificate, bounds = known or proved(f, bundle.lower, bundle.upper, bundle.certificate)
        if bounds is None:
            raise CheckError(f"the original's certificate: {report.certificate.error}")
        if report.certificate.rejected:
            k, i, claim, why = report.certificate.rejected[0]
            raise CheckError(f"the original's certificate: layer {k}, neuron {i}, {claim}: {why} "
                             f"({len(report.certificate.rejected)} such)")
        for record in bundle.forward:
            bounds = redundant.without(bounds, record)
        report.deviation = _deviation(Difference(bounds, g, report.claimed == 0), bundle.hints)
        if bundle.split is not None and report.deviation > report.claimed > 0:
            _only_integers(report, exact)
            found = _on_boxes(bounds, g, bundle, report.claimed)
            report.deviation, report.arithmetic = min((report.deviation, INTEGERS), (found, FLOATS))
        if not report.deviation <= report.claimed:
            raise CheckError(f"abs(f - g) is proved to be at most {report.deviation!r} only, claimed are "
                             f"{report.claimed!r}")
    except FloatingError:
        raise
    except CheckError as error:
        report.error = str(error)
    except Exception as error:  # nothing unforeseen may pass for an acceptance
        report.error = f"cannot be checked: {type(error).__name__}: {error}"
    return report


def _only_integers(report: BundleReport, exact: bool) -> None:
    if exact:
        raise FloatingError(f"in exact integers abs(f - g) is proved to be at most {report.deviation!r}, claimed are "
                            f"{report.claimed!r}; the claim rests on the bounds on boxes (record split), which are computed in "
                            "float64 with proved error bounds")


def _belongs(f: Network, g: Network, bundle: Bundle) -> None:
    header = bundle.header
    for name, net in (("original", f), ("compressed", g)):
        if header[name] != net.sha256:
            raise CheckError(f"it is for the {name} network {str(header[name])[:16]}..., the file holds "
                             f"{net.sha256[:16]}...")
    if header["domain"] != network.domain_sha256(bundle.lower, bundle.upper):
        raise CheckError("the domain is not the one that the header names")
    if header["dtype"] != f.dtype:
        raise CheckError(f"the header's dtype is {header['dtype']!r}, the original's is {f.dtype}")


def _deviation(difference: Difference, hints: list[Json]) -> float:
    for record in hints:
        HINTS[records.kind_of(record)](difference, record)
    return difference.deviation()


def _on_boxes(bounds: Bounds, g: Network, bundle: Bundle, claimed: float) -> float:
    """The largest deviation on any box of the ``split`` record (``chains``)."""
    assert bundle.split is not None
    errors = local_errors(bounds, g, bundle.hints)
    dims, at = records.fields(bundle.split, "dims", "at")
    lower, upper = bundle.lower.reshape(-1), bundle.upper.reshape(-1)
    low, high = boxes.leaves(dims, at, lower, upper)
    values = chains.deviation(g, errors, low, high)[0]
    if not values.size:
        raise CheckError("split: there are no boxes")
    return float(values.max())


def local_errors(bounds: Bounds, g: Network, hints: list[Json]) -> list[Entering]:
    """What enters at every ReLU layer of a chain g and at its output, everything before it being equal.

    Raises:
        CheckError: g is no chain, or a hint does not hold.
    """
    found = chains.chain_of(g)
    if found is None:
        raise CheckError("split: the smaller network is no chain of affine layers and ReLUs")
    difference = Difference(bounds, g, False, local=True)
    for record in hints:
        HINTS[records.kind_of(record)](difference, record)
    last = difference.output_error()
    known = difference.local or {}
    if set(known) != set(found[1][:-1]):
        raise CheckError("split: a layer of the smaller network is not related")
    return [known[position] for position in found[1][:-1]] + [Entering(last)]


def _duplicate(difference: Difference, record: Json) -> None:
    of, axis, gone, kept, ratios = records.fields(record, "of", "axis", "gone", "kept", "ratios")
    of = records.whole(of, 0, len(difference.f.nodes), "duplicate: of")
    shape = difference.f.shape_of(of)
    axis = records.whole(axis, 0, len(shape), "duplicate: axis")
    places = records.indices(gone, shape[axis], "duplicate: gone")
    sources = records.integers(kept, 0, shape[axis], "duplicate: kept")
    difference.add_duplicates(of, axis, places, sources, _ratios(ratios, len(places), len(sources)))


def _line(difference: Difference, record: Json) -> None:
    of, axis, units, slopes = records.fields(record, "of", "axis", "units", "slopes")
    of = records.whole(of, 0, len(difference.f.nodes), "line: of")
    shape = difference.f.shape_of(of)
    axis = records.whole(axis, 0, len(shape), "line: axis")
    chosen = records.indices(units, shape[axis], "line: units")
    difference.add_linear(of, axis, chosen, _ratios(slopes, len(chosen)))


def _relation(difference: Difference, record: Json) -> None:
    node, of, axis, units, ratios = records.fields(record, "node", "of", "axis", "units", "ratios")
    node = records.whole(node, 0, len(difference.g.nodes), "relation: node")
    of = records.whole(of, 0, len(difference.f.nodes), "relation: of")
    shape = difference.f.shape_of(of)
    axis = records.whole(axis, 0, len(shape), "relation: axis")
    chosen = records.integers(units, -1, shape[axis], "relation: units")
    given = np.ones(len(chosen)) if ratios is None else _ratios(ratios, len(chosen))
    difference.relate(node, of, axis, chosen, given)


def _ratios(value: Any, *counts: int) -> Array:
    found = records.unpack(value, RATIOS, "ratios")
    if any(found.shape != (count,) for count in counts):
        raise CheckError(f"{found.shape} ratios for {counts} units")
    return found


HINTS = {"duplicate": _duplicate, "line": _line, "relation": _relation}
