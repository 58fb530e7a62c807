"""From proofs to a certificate that the independent checker accepts, or to honest unknowns.

Multipliers of trees are written with few bits first, those of lemmas with more. Where the checker rejects a claim, the proofs of
that neuron (and, from the second round on, all lemmas) are written with more; a claim that is still rejected becomes
``unknown``. So nothing that leaves here as stable depends on our own floating point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exactprune.bounds.witness import Witnesses
from exactprune.checker.bounds import Bounds
from exactprune.checker.engine import proved
from exactprune.checker.network import CheckError
from exactprune.claim import LayerVerdict, Method, Status
from exactprune.deciders.cascade import BITS, Cascade
from exactprune.deciders.input_split import Question
from exactprune.deciders.proofs import Record, Tree, crown_record, pack, pack_integers
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.progress import Progress

EDGE = 1e-9  # a bound beyond 0 by less than this part of the neuron's range is left to exact arithmetic
WIDER = (4e-6, 1e-5, 2e-4)  # margins for sub-boxes that were not accepted: slopes may flip where two numbers nearly tie
POINTS_A_RECORD = 256


@dataclass(frozen=True, eq=False)
class Certified:
    """Verdicts, the records that prove them, and the checker's count.

    Attributes:
        layers: verdicts; every stable or unstable one is accepted by the checker.
        records: header first.
        accepted, rejected: verdicts the checker accepted, and proposals it did not (now unknown).
        seconds: of checking.
        rounds: how often the certificate was checked.
    """

    layers: tuple[LayerVerdict, ...]
    records: tuple[Record, ...]
    accepted: int
    rejected: int
    seconds: float
    rounds: int


def certify(cascade: Cascade, versions: Mapping[str, str], cap: int) -> Certified:
    """Write, check, repair.

    Args:
        cascade: a finished run.
        versions: for the header.
        cap: most bytes of packed proofs; verdicts whose proofs do not fit become unknown.
    """
    draft = _Draft(cascade, versions, cap)
    seconds, rejected, rounds = 0.0, 0, 0
    while True:
        records = draft.records()
        cascade.progress.stage("certificate", len(records))
        report, bounds = proved(cascade.network, cascade.box.lower, cascade.box.upper, _told(records, cascade.progress))
        seconds, rounds = seconds + report.seconds, rounds + 1
        if report.error:
            rejected += draft.retreat(report.error)
        elif report.accepted:
            break
        else:
            rejected += draft.repair(report.rejected, give_up=draft.attempts >= len(BITS) - 1)
    layers = draft.verdicts(bounds)
    accepted = sum(int((v.status != Status.UNKNOWN).sum()) for v in layers)
    return Certified(layers, tuple(records), accepted, rejected, seconds, rounds)


def _told(records: Sequence[Record], progress: Progress) -> Iterator[Record]:
    """The records, one by one."""
    for record in records:
        yield record
        progress.advance()


class _Draft:
    """A certificate in the making."""

    def __init__(self, cascade: Cascade, versions: Mapping[str, str], cap: int) -> None:
        self.cascade, self.network, self.box = cascade, cascade.network, cascade.box
        self.header = header(self.network, self.box, versions)
        self.witnesses = cascade.search.snapshot()
        self.status = [layer.status.copy() for layer in cascade.layers]
        self.method = [layer.method.copy() for layer in cascade.layers]
        self.reasons = [dict(layer.reasons) for layer in cascade.layers]
        self.bounds = [self._numpy(k) for k in range(len(self.status))]
        self.edge: list[Record] = []
        self.bits = [_first_bits(proof) for proof in cascade.proofs]
        self.attempts = 0
        self.readable = len(self.status)  # layers before this one may have proofs
        self.tainted = cascade.adopted > 0  # bounds may rest on what the checker has not accepted
        self.cache: dict[tuple[int, int], Record] = {}
        self._claim_edges()
        self._cap(cap)

    def _numpy(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        if self.cascade.program.preactivation(layer) not in self.cascade.state.known:
            size = len(self.status[layer])
            return np.full(size, -np.inf), np.full(size, np.inf)
        bounds = self.cascade.state.at(layer)
        return bounds.lower[0].cpu().numpy().copy(), bounds.upper[0].cpu().numpy().copy()

    def _claim_edges(self) -> None:
        """Neurons whose bound is 0 but for rounding: claimed, for the exact checker to say."""
        for k, (lower, upper) in enumerate(self.bounds):
            width = upper - lower
            open_ = self.status[k] == Status.UNKNOWN
            for status, edge in ((Status.INACTIVE, upper), (Status.ACTIVE, -lower)):
                near = np.flatnonzero(open_ & (self.status[k] == Status.UNKNOWN) & (edge > 0) & (edge <= EDGE * width))
                if len(near):
                    self.status[k][near], self.method[k][near] = status, Method.CROWN
                    self.edge.append(crown_record(k, near))

    def _cap(self, cap: int) -> None:
        """Drop proofs that do not fit, and with them their verdicts."""
        total = 0
        for i, proof in enumerate(self.cascade.proofs):
            record = self._record(i)
            total += _size(record)
            if total > cap and isinstance(proof, Tree):
                self.bits[i] = -1
                self._unknown(proof.layer, proof.neuron, f"its certificate does not fit into {cap} bytes")

    def _unknown(self, layer: int, neuron: int, reason: str) -> None:
        self.status[layer][neuron], self.method[layer][neuron] = Status.UNKNOWN, Method.NONE
        self.reasons[layer][neuron] = reason
        self.tainted = True

    def _record(self, i: int) -> Record:
        key = (i, self.bits[i])
        if key not in self.cache:
            self.cache[key] = self.cascade.proofs[i].record(BITS[self.bits[i]])
        return self.cache[key]

    def records(self) -> list[Record]:
        """The whole certificate."""
        proofs = [self._record(i) for i in range(len(self.bits)) if self.bits[i] >= 0]
        if self.readable < len(self.status):
            proofs, self.edge = _only_before(proofs, self.readable), _only_before(self.edge, self.readable)
        claims = [claims_record(k, status) for k, status in enumerate(self.status)]
        return [self.header, *proofs, *self.edge, *witness_records(self.witnesses, self.status), *claims]

    def repair(self, rejected: Sequence[tuple[int, int, str, str]], give_up: bool) -> int:
        """More bits for what was rejected, or unknown; returns how many verdicts were given up."""
        self.attempts += 1
        if self.attempts <= len(WIDER) and self._split_again(rejected, WIDER[self.attempts - 1]):
            return 0
        given_up = 0
        wrong = {(layer, neuron) for layer, neuron, _, _ in rejected}
        for layer, neuron, claim, reason in rejected:
            if give_up or not self._sharper(layer, neuron):
                method = Method(int(self.method[layer][neuron])).word or "bounds"
                self._unknown(layer, neuron, f"solver claims {claim} ({method}), the checker does not accept it: {reason}")
                given_up += 1
        if not give_up and self.attempts > 1:
            self._sharpen_lemmas()
        if given_up:
            self.bits = [-1 if isinstance(p, Tree) and (p.layer, p.neuron) in wrong
                         and self.status[p.layer][p.neuron] == Status.UNKNOWN else b
                         for p, b in zip(self.cascade.proofs, self.bits, strict=True)]
        return given_up

    def _split_again(self, rejected: Sequence[tuple[int, int, str, str]], margin: float) -> bool:
        """New sub-boxes for rejected verdicts of input splitting; the old ones stay: they prove the others."""
        signs = {"inactive": 1, "active": -1}
        questions = [Question(layer, neuron, signs[claim]) for layer, neuron, claim, _ in rejected
                     if claim in signs and self.method[layer][neuron] == Method.INPUT_SPLIT]
        found = bool(questions) and self.cascade.split_again(questions, margin)
        self.bits.extend(_first_bits(proof) for proof in self.cascade.proofs[len(self.bits) :])
        return found

    def retreat(self, error: str) -> int:
        """Leave out what the checker cannot read: first an earlier run's proofs, then a layer; returns verdicts given up."""
        if any(bits >= 0 for bits in self.bits[: self.cascade.adopted]):
            self.bits[: self.cascade.adopted] = [-1] * self.cascade.adopted
            return 0
        if self.readable == 0:
            raise AssertionError(f"the checker cannot read our certificate: {error}")
        self.readable -= 1
        settled = np.flatnonzero(self.status[self.readable] != Status.UNKNOWN).tolist()
        for neuron in settled:
            self._unknown(self.readable, neuron, f"the checker cannot compute with this layer: {error}")
        return len(settled)

    def _sharper(self, layer: int, neuron: int) -> bool:
        found = False
        for i, proof in enumerate(self.cascade.proofs):
            mine = isinstance(proof, Tree) and (proof.layer, proof.neuron) == (layer, neuron)
            listed = not isinstance(proof, Tree) and getattr(proof, "layer", None) == layer and neuron in getattr(
                proof, "neurons", ())
            if (mine or listed) and 0 <= self.bits[i] < len(BITS) - 1:
                self.bits[i] += 1
                found = True
        return found

    def _sharpen_lemmas(self) -> None:
        self.bits = [min(b + 1, len(BITS) - 1) if b >= 0 else b for b in self.bits]

    def verdicts(self, proved_bounds: Bounds | None) -> tuple[LayerVerdict, ...]:
        """The layers as they stand. If anything that bounds may rest on was given up, the checker's count instead."""
        found = []
        if self.tainted:
            self.bounds = [_checked(proved_bounds, k, len(status)) for k, status in enumerate(self.status)]
        for k, relu in enumerate(self.network.relus):
            lower, upper = self.bounds[k]
            lower = np.where(self.status[k] == Status.ACTIVE, np.maximum(lower, 0.0), lower)
            upper = np.where(self.status[k] == Status.INACTIVE, np.minimum(upper, 0.0), upper)
            reasons = {i: self.reasons[k].get(i, "left open") for i in np.flatnonzero(self.status[k] == Status.UNKNOWN).tolist()}
            found.append(LayerVerdict(k, self.network.nodes[relu].name, self.network.shapes[relu], self.status[k],
                                      self.method[k], lower, upper, reasons))
        return tuple(found)


def _checked(bounds: Bounds | None, layer: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the checker has proved of a layer; infinite where it cannot compute."""
    try:
        if bounds is not None:
            bounds.reach(layer)
            return bounds.lower[layer].copy(), bounds.upper[layer].copy()
    except CheckError:
        pass
    return np.full(size, -np.inf), np.full(size, np.inf)


def _first_bits(proof: object) -> int:
    """Lemmas, which later proofs rest on, begin one step finer than trees, which only prove their own verdict."""
    return 0 if isinstance(proof, Tree) else 1


def _only_before(records: Sequence[Record], layer: int) -> list[Record]:
    """The records that are about layers before this one; claims on boxes one by one."""
    found: list[Record] = []
    for record in records:
        claims: Any = record.get("claims")
        if claims is not None:
            found.append({**record, "claims": [claim for claim in claims if claim["layer"] < layer]})
        elif int(record["layer"]) < layer:  # type: ignore[call-overload]
            found.append(record)
    return found


def header(network: Network, box: Box, versions: Mapping[str, str]) -> Record:
    """The first record: what the certificate is about."""
    layers = [{"node": i, "name": network.nodes[i].name, "neurons": int(np.prod(network.shapes[i]))} for i in network.relus]
    return {"record": "header", "format": "exactprune-certificate/1", "network": network.sha256, "domain": box.sha256,
            "dtype": network.dtype.name, "input_shape": list(network.input_shape), "layers": layers, "tool": dict(versions)}


def witness_records(witnesses: Witnesses, status: Sequence[np.ndarray]) -> list[Record]:
    """Points, and which of them show which neuron unstable."""
    parts = (witnesses.points[at : at + POINTS_A_RECORD] for at in range(0, len(witnesses.points), POINTS_A_RECORD))
    found: list[Record] = [{"record": "points", "values": pack(part)} for part in parts]
    for k, states in enumerate(status):
        neurons = np.flatnonzero(states == Status.UNSTABLE)
        if len(neurons):
            found.append({"record": "unstable", "layer": k, "neurons": pack_integers(neurons),
                          "positive": pack_integers(witnesses.positive[k][neurons]),
                          "negative": pack_integers(witnesses.negative[k][neurons])})
    return found


def claims_record(layer: int, status: np.ndarray) -> Record:
    """The verdicts of one layer."""
    lists = {s.word: pack_integers(np.flatnonzero(status == s)) for s in Status}
    return {"record": "verdicts", "layer": layer, **lists}


def _size(record: Record) -> int:
    return len(json.dumps(record))
