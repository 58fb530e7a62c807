"""The certificate bundle of a compression: hints for the independent checker, and what it accepts of the claim.

The compressor knows for every unit of the smaller network g which unit of the original f it is, or that it is a new
linear one (``Rewrite.origin``), and which units of f it took for multiples of others (the steps of rule ``duplicate``).
That is all the checker is told (``checker.difference``, docs/bundle.md): it computes the deviation itself. So the
level that a bundle carries never rests on the compressor's arithmetic. Where the checker cannot confirm it, the claim
is lowered to what the checker computes, and where there is no proof at all there is no bundle and no claim.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exactprune.checker import records as reading
from exactprune.checker.bundle import FORMAT, BundleReport, Proved, check_records
from exactprune.checker.engine import proved
from exactprune.claim import LayerVerdict, Status
from exactprune.compress.hints import Record, hints_of
from exactprune.compress.levels import Kind, Level, certified, upward
from exactprune.compress.rewrite import Rewrite
from exactprune.deciders.proofs import crown_record, pack, pack_integers
from exactprune.domain import Box
from exactprune.network import Network


@dataclass(frozen=True, eq=False)
class Bundle:
    """A claim about f and g that the checker has judged.

    Attributes:
        level: what the checker accepts; None where it has no proof at all.
        claimed: the compressor's own claim.
        records: of the bundle, header first; they make the claim ``level``.
        report: the checker's last word.
        note: what was tried before and why it was given up; empty if nothing was.
    """

    level: Level | None
    claimed: Level
    records: tuple[Record, ...]
    report: BundleReport
    note: str = ""

    @property
    def data(self) -> bytes:
        """The file's content: gzip of JSON lines without name and time, so that equal bundles are equal files."""
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
            for record in self.records:
                file.write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        return buffer.getvalue()

    @property
    def words(self) -> str:
        """What the checker made of the claim, in one sentence; behind it what was given up."""
        return f"{self._words}. {self.note}" if self.note else self._words

    @property
    def _words(self) -> str:
        if self.level is None:
            return f"the independent checker does not accept {self.claimed}: {self.report.error}"
        found = f"the independent checker proves abs(f - g) <= {upward(self.report.deviation)} from the files alone"
        return found if self.level == self.claimed else f"{found}; claimed were {self.claimed}, so the claim is lowered"


def bundle(network: Network, domain: Box, rewrite: Rewrite, certificate: Sequence[Mapping[str, Any]],
           verdicts: Sequence[LayerVerdict]) -> Bundle:
    """Write a bundle, have it checked, and lower the claim to what is accepted.

    Args:
        network: the original.
        domain: the box.
        rewrite: what the compressor made of it.
        certificate: records of the original's verdicts, header first.
        verdicts: of the original.
    """
    cleared = rewrite.cleared
    left, seen = (network, ()) if cleared is None else (cleared.network, cleared.records)
    hints, proof = [*seen, *hints_of(left, rewrite), *_split(rewrite)], list(restricted(certificate))
    claim = _Claim(network, domain, rewrite, hints)
    found = claim.judged(proof, rewrite.level)
    if not found.report.accepted:
        tighter = [*proof, *_tightening(verdicts)]
        again = claim.judged(tighter, rewrite.level)
        better = again.report.accepted or _number(again) < _number(found)
        found, proof = (again, tighter) if better else (found, proof)
    deviation = found.report.deviation
    if found.report.accepted or not np.isfinite(deviation):
        return found
    return claim.judged(proof, certified(float(np.nextafter(deviation * 1.001, np.inf))))


def _number(found: Bundle) -> float:
    """The deviation that is proved, infinite where none is."""
    return float(np.nan_to_num(found.report.deviation, nan=np.inf))


@dataclass(frozen=True, eq=False)
class _Claim:
    """What a bundle is about; the certificate of f is checked once for each set of its records."""

    network: Network
    domain: Box
    rewrite: Rewrite
    hints: Sequence[Record]
    known: dict[int, Proved] = field(default_factory=dict)

    def judged(self, proof: Sequence[Record], level: Level) -> Bundle:
        """The bundle that claims ``level``, and what the checker says."""
        if len(proof) not in self.known:
            self.known[len(proof)] = proved(self.network, self.domain.lower, self.domain.upper, iter(proof))
        steps = [{"record": "rewrite", **step} for step in self.rewrite.rewrites]
        tool = dict(proof[0].get("tool", {})) if proof else {}
        records = (_header(self.network, self.domain, self.rewrite, level, tool), _domain(self.domain), *steps,
                   *self.hints, *proof)
        report = check_records(self.network, self.rewrite.network, iter(records), self.known[len(proof)])
        return Bundle(level if report.accepted else None, self.rewrite.level, records, report)


def _split(rewrite: Rewrite) -> Iterator[Record]:
    """The sub-boxes that the claim rests on, if it does."""
    if rewrite.boxes is not None:
        yield {"record": "split", "dims": pack_integers(rewrite.boxes.dims), "at": pack(rewrite.boxes.at)}


def _header(network: Network, domain: Box, rewrite: Rewrite, level: Level, tool: Record) -> Record:
    kind = "exact" if level.kind is Kind.EXACT else "certified"
    return {"record": "bundle", "format": FORMAT, "original": network.sha256, "compressed": rewrite.network.sha256,
            "domain": domain.sha256, "dtype": network.dtype.name, "level": kind, "eps": level.eps,
            "allowed": rewrite.budget, "tool": tool}


def _domain(domain: Box) -> Record:
    return {"record": "domain", "lower": pack(domain.lower), "upper": pack(domain.upper)}


# -- the original's certificate ----------------------------------------------------------------------------------------


def restricted(certificate: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """The records that stable verdicts need: no points, and *unstable* neurons claimed as nothing."""
    for record in certificate:
        if record["record"] == "verdicts":
            yield {**record, "unstable": [], "unknown": _both(record)}
        elif record["record"] not in ("points", "unstable"):
            yield dict(record)


def _both(record: Mapping[str, Any]) -> Record:
    lists = [reading.integers(record[word], 0, 2**62, word) for word in ("unstable", "unknown")]
    return pack_integers(np.sort(np.concatenate(lists)))


def _tightening(verdicts: Sequence[LayerVerdict]) -> Iterator[Record]:
    """CROWN on both sides for everything that is not inactive, behind the first layer (interval bounds are exact there)."""
    for verdict in verdicts[1:]:
        neurons = np.flatnonzero(verdict.status != Status.INACTIVE)
        if neurons.size:
            yield crown_record(verdict.layer, neurons)
