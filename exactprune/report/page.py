"""Facts of a run's report (schema ``exactprune-report/1``): what the HTML page, report.md and report.json all say.

Everything comes from a run folder: run.json, neurons.csv and, after ``compress``, compression.json. Neurons that share
status, method and fate share a *kind*, which carries the sentences, so that 100,000 neurons stay small. Names from a
model file are data: ``clean`` takes control and format characters out of every text.
"""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.claim import LayerVerdict, Method, Status
from exactprune.compress.levels import upward
from exactprune.errors import CertificateError
from exactprune.options import CompressOptions, VerifyOptions
from exactprune.report.page_words import KEPT, MAY, STATUS, gone_because, proof_of
from exactprune.report.record import RunRecord
from exactprune.report.strict import jsonable
from exactprune.report.tables import size_words, stages_by_kind

SCHEMA = "exactprune-report/1"
LONGEST = 4000
_RANGES = 24


@dataclass(frozen=True, order=True)
class Kind:
    """What neurons of one kind have in common.

    Attributes:
        status, method: values of ``Status`` and ``Method``.
        fate: ``removed``, ``kept``, or, where nothing was compressed, ``removable``, ``mergeable``, ``stays``.
        rule: why, in one word: the rule that removed it, or a key of ``KEPT``.
        level: at which level the removal holds; empty otherwise.
    """

    status: int
    method: int
    fate: str
    rule: str
    level: str = ""

    def as_dict(self) -> dict[str, str]:
        """Words and sentences, JSON-able."""
        status, method = Status(self.status), Method(self.method)
        why = gone_because(self.rule, self.level) if self.fate == "removed" else {**MAY, **KEPT}[self.rule]
        return {"status": status.word, "method": method.word, "fate": self.fate, "rule": self.rule, "level": self.level,
                "meaning": STATUS[status], "proof": proof_of(status, method), "why": why}


def facts_of(record: RunRecord, curve: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Everything that a report says.

    Args:
        record: a run folder, read.
        curve: rows of ``curve.removal_curve``; none leaves the section out.

    Raises:
        CertificateError: compression.json cannot be read, or is about another network.
    """
    run, compression = record.summary, read_compression(record)
    rows = {entry["layer"]: entry for entry in (compression or {}).get("removed", [])}
    keys = [_kind_keys(layer, rows.get(layer.layer)) for layer in record.layers]
    kinds = sorted({key for layer in keys for key in layer})
    number = {kind: i for i, kind in enumerate(kinds)}
    layers = [_layer(layer, run["layers"][k], rows.get(layer.layer), [number[key] for key in keys[k]])
              for k, layer in enumerate(record.layers)]
    facts = {
        "schema": SCHEMA, "title": run["model"]["path"] or run["model"]["name"],
        "claim": claim(run, compression), "model": run["model"], "domain": run["domain"], "totals": run["totals"],
        "compression": None if compression is None else _compression(compression),
        "kinds": [kind.as_dict() for kind in kinds], "layers": layers,
        "stages": _stages(run), "seconds": run["seconds"], "certificate": run["certificate"],
        "commands": commands(record, compression, bool(curve)), "curve": list(curve), "options": run["options"],
        "versions": run["versions"], "hardware": run["hardware"],
    }
    return cleaned(jsonable(facts))


def read_compression(record: RunRecord) -> dict[str, Any] | None:
    """compression.json of a run folder; None where nothing was compressed.

    Raises:
        CertificateError: no JSON, of another schema, or about another network than run.json.
    """
    path = record.folder / "compression.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        known = found["schema"] == "exactprune-compression/1"
        same = found["model"]["network_sha256"] == record.summary["model"]["network_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CertificateError(f"{path}: not readable ({error}); run compress again") from None
    if not (known and same):
        raise CertificateError(f"{path}: is about another network or of another schema than run.json; run compress again")
    return found


# -- text ----------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """``text`` without control, format, surrogate and private characters, blanks collapsed, at most ``LONGEST`` characters."""
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    words = " ".join(kept.split())
    return words if len(words) <= LONGEST else words[:LONGEST - 1] + "…"


def cleaned(value: Any) -> Any:
    """``clean`` for every text of plain data, keys included."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def ranges(indices: Iterable[int], most: int = _RANGES) -> str:
    """Sorted whole numbers as people write them: ``0-4, 7``; the rest of a long list is counted."""
    array = np.unique(np.fromiter(indices, int))
    parts = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1) if array.size else []
    shown = ", ".join(str(p[0]) if p.size == 1 else f"{p[0]}-{p[-1]}" for p in parts[:most])
    rest = sum(p.size for p in parts[most:])
    return f"{shown} and {rest:,} more" if rest else shown


# -- the claim -----------------------------------------------------------------------------------------------------


def claim(run: Mapping[str, Any], compression: Mapping[str, Any] | None) -> dict[str, Any]:
    """Headline, what it rests on, and what is not claimed."""
    return {"headline": _headline(run, compression), "level": (compression or {}).get("level", {}).get("kind", ""),
            "sentences": [*_size_sentences(compression), *_count_sentences(run), _evidence_sentence(run),
                          *_bundle_sentences(compression)],
            "limits": _limits(compression)}


def _headline(run: Mapping[str, Any], compression: Mapping[str, Any] | None) -> str:
    domain = f"for every input of the domain ({run['domain']['source']})"
    if compression is None:
        counts = run["totals"]
        stable = counts["inactive"] + counts["active"]
        return f"{_capital(domain)}, {stable:,} of {counts['neurons']:,} ReLU neurons never change phase."
    if compression["level"]["kind"] == "exact":
        return f"{_capital(domain)}, the smaller network computes the same outputs as the original."
    if compression["level"]["kind"] != "certified":
        measured = compression["measured"]
        return (f"No bound on the difference of the two networks is proved; on {measured['inputs']:,} inputs that were run they "
                f"differ by at most {_short(measured['largest'])}.")
    bound = upward(float(compression["level"]["eps"]))
    return f"{_capital(domain)}, no output of the smaller network differs from the original's by more than {bound}."


def _size_sentences(compression: Mapping[str, Any] | None) -> list[str]:
    if compression is None:
        return []
    sizes = compression["sizes"]
    names = (("ReLU neurons", "neurons"), ("parameters", "parameters"), ("multiply-accumulates", "macs"))
    parts = [f"{label} {sizes[key]['before']:,} → {sizes[key]['after']:,} ({_change(sizes[key])})" for label, key in names]
    words = [f"Smaller network: {', '.join(parts)}."]
    if sizes["neurons"]["before"] == sizes["neurons"]["after"] and sizes["parameters"]["before"] == sizes["parameters"]["after"]:
        words = ["Nothing was proved removable: the network is as large as before."]
    return words


def _count_sentences(run: Mapping[str, Any]) -> list[str]:
    counts = run["totals"]
    words = [f"Of {counts['neurons']:,} ReLU neurons, {counts['inactive']:,} are never on, {counts['active']:,} are always on, "
             f"{counts['unstable']:,} switch within the domain."]
    if counts["unknown"]:
        words.append(f"Nothing is proved about {counts['unknown']:,} of them (unknown): nothing is removed on unknown.")
    return words


def _evidence_sentence(run: Mapping[str, Any]) -> str:
    checked = run["certificate"]["checked"]
    if not checked:
        return "The certificate was not checked during the run."
    rejected = f"and rejected {checked['rejected']:,}" if checked["rejected"] else "and rejected none"
    return f"The independent checker accepted the certificates of {checked['accepted']:,} verdicts {rejected}."


def _bundle_sentences(compression: Mapping[str, Any] | None) -> list[str]:
    """What the certificate about the two networks says, where ``compress`` wrote one."""
    found = (compression or {}).get("certificate")
    if not found:
        return []
    if not found["path"]:
        return [f"There is no certificate about the two networks: {found['words']}."]
    return [f"The claim about the two networks has a certificate of its own, {found['path']} ({size_words(found['bytes'])}): "
            f"{found['words']}."]


def _limits(compression: Mapping[str, Any] | None) -> list[str]:
    words = ["Nothing is said about inputs outside the domain.",
             "The claim is about the networks as real functions of their stored weights. Floating-point execution rounds, "
             "and rounds differently at another batch size or on other hardware."]
    if compression is not None:
        m = compression["measured"]
        words.append(f"Measured, not proved: on {m['inputs']:,} inputs the two networks differ by at most "
                     f"{_short(m['largest'])} when run, the predicted class differs on {m['flips']:,}; the original "
                     f"differs from itself at another batch size by {_short(m['itself'])}.")
    return words


def _compression(c: Mapping[str, Any]) -> dict[str, Any]:
    names = ("out", "options", "level", "sizes", "latency", "rewrites", "measured", "dead_inputs", "seconds")
    return {name: c[name] for name in names} | {"certificate": c.get("certificate")}


# -- layers --------------------------------------------------------------------------------------------------------


def _kind_keys(layer: LayerVerdict, removed: Mapping[str, Any] | None) -> list[Kind]:
    fates = _fates_before(layer) if removed is None or "gone" not in removed else _fates_after(layer, removed)
    settled = zip(layer.status.tolist(), layer.method.tolist(), fates, strict=True)
    return [Kind(status, method, *fate) for status, method, fate in settled]


def _fates_before(layer: LayerVerdict) -> list[tuple[str, str, str]]:
    """(fate, rule, level) of each neuron where nothing was compressed."""
    off, on = (_whole(layer, status, 0) for status in (Status.INACTIVE, Status.ACTIVE))
    words = {(Status.INACTIVE, True): ("removable", "removable", ""), (Status.INACTIVE, False): ("stays", "partial", ""),
             (Status.ACTIVE, True): ("mergeable", "mergeable", ""), (Status.ACTIVE, False): ("stays", "part", ""),
             (Status.UNSTABLE, False): ("stays", "switches", ""), (Status.UNKNOWN, False): ("stays", "unknown", "")}
    return [words[Status(status), off[i] or on[i]] for i, status in enumerate(layer.status.tolist())]


def _fates_after(layer: LayerVerdict, removed: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(fate, rule, level) of each neuron as compression.json tells it."""
    units, rules = unit_of(layer.shape, removed["axis"]), _unit_rules(removed)
    off, on = (_whole(layer, status, removed["axis"]) for status in (Status.INACTIVE, Status.ACTIVE))
    dropped = removed["left"] == removed["new"]  # nothing original is left: the node itself went
    return [_fate(Status(status), rules.get(unit), off[i] or on[i], dropped)
            for i, (status, unit) in enumerate(zip(layer.status.tolist(), units.tolist(), strict=True))]


def _fate(status: Status, rule: tuple[str, str] | None, whole: bool, dropped: bool) -> tuple[str, str, str]:
    if rule is not None:
        return "removed", rule[0], rule[1]
    if dropped:
        return "removed", "linear" if status is Status.ACTIVE else "unread", "exact"
    if status is Status.INACTIVE:
        return "kept", "coupled" if whole else "partial", ""
    if status is Status.ACTIVE and not whole:
        return "kept", "part", ""
    return "kept", status.word, ""


def _unit_rules(removed: Mapping[str, Any]) -> dict[int, tuple[str, str]]:
    rules: dict[int, tuple[str, str]] = {}
    for group in removed["gone"]:
        for unit in group["units"]:
            rules.setdefault(unit, (group["rule"], group["level"]))
    return rules


def unit_of(shape: Sequence[int], axis: int) -> np.ndarray:
    """Unit of each flat index of a layer: the coordinate along ``axis``. A layer without axes has unit 0."""
    if not shape:
        return np.zeros(1, int)
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    return np.broadcast_to(np.arange(shape[axis]).reshape(along), tuple(shape)).ravel()


def _whole(layer: LayerVerdict, status: Status, axis: int) -> list[bool]:
    """For each neuron: whether its whole unit has ``status``."""
    units = unit_of(layer.shape, axis)
    same = np.bincount(units, layer.status == status) == np.bincount(units)
    return same[units].tolist() if units.size else []


def _layer(layer: LayerVerdict, summary: Mapping[str, Any], removed: Mapping[str, Any] | None,
           kinds: list[int]) -> dict[str, Any]:
    sizes = {key: None if removed is None else removed[key] for key in ("removed", "new", "left")}
    return {**summary, **sizes, "channels": channels_of(layer), "groups": _groups(layer, kinds), "kind": kinds,
            "lower": layer.lower.tolist(), "upper": layer.upper.tolist(),
            "reasons": {str(i): reason for i, reason in sorted(layer.reasons.items())}}


def channels_of(layer: LayerVerdict) -> dict[str, list[float]] | None:
    """Status -> share of each channel's positions that have it; None for a layer without positions."""
    if len(layer.shape) < 2 or prod(layer.shape) == 0:
        return None
    status = layer.status.reshape(layer.shape[0], -1)
    return {s.word: np.round((status == s).mean(axis=1), 4).tolist() for s in _ORDER}


_ORDER = (Status.INACTIVE, Status.ACTIVE, Status.UNSTABLE, Status.UNKNOWN)


def _groups(layer: LayerVerdict, kinds: list[int]) -> list[dict[str, Any]]:
    """Kind -> how many neurons of the layer, and which."""
    array = np.asarray(kinds, int)
    return [{"kind": int(kind), "neurons": int((array == kind).sum()), "where": _where(layer, np.flatnonzero(array == kind))}
            for kind in np.unique(array)]


def _where(layer: LayerVerdict, indices: np.ndarray) -> str:
    if len(layer.shape) < 2:
        return ranges(indices)
    size = prod(layer.shape[1:])
    channels, counts = np.unique(indices // size, return_counts=True)
    whole, part = channels[counts == size], channels[counts < size]
    words = [f"channels {ranges(whole)} (every position)"] if whole.size else []
    return "; ".join([*words, *([f"part of channels {ranges(part)}"] if part.size else [])])


# -- effort and commands -------------------------------------------------------------------------------------------


def _stages(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a kind of stage, over all layers."""
    return [{"name": kind, "seconds": _number(sum(float(s["seconds"]) for s in stages)), "times": len(stages),
             "settled": sum(s["settled"] for s in stages),
             "details": list(dict.fromkeys(s["detail"] for s in stages if s["detail"]))}
            for kind, stages in stages_by_kind(run).items()]


def commands(record: RunRecord, compression: Mapping[str, Any] | None, curve: bool = False) -> dict[str, Any]:
    """The commands that repeat the run, check it, and make this report; paths as they were given."""
    run, folder = record.summary, str(record.folder)
    model = run["model"]["path"] or str(record.folder / "network.npz")
    words = ["exactprune", "verify" if compression is None else "compress", model]
    if compression is not None:
        words += ["-o", compression["out"]["path"], *_flags(compression["options"], CompressOptions(), ("seed",))]
    words += [*_domain_flags(record), *_shape_flag(run, model), *_flags(run["options"], VerifyOptions()), "--output", folder]
    bundle = (compression or {}).get("certificate") or {}
    both = [model, compression["out"]["path"], bundle["path"]] if compression is not None and bundle.get("path") else []
    return {"repeat": shlex.join(words), "check": shlex.join(["exactprune", "check", model, folder]),
            "check_both": shlex.join(["exactprune", "check", *both]) if both else "",
            "report": shlex.join(["exactprune", "report", folder, *(["--curve"] if curve else [])]), "notes": _command_notes(run)}


def _domain_flags(record: RunRecord) -> list[str]:
    low, high = np.unique(record.domain.lower), np.unique(record.domain.upper)
    if low.size == high.size == 1:
        return ["--domain", f"{float(low[0])!r},{float(high[0])!r}"]
    return ["--domain-box", str(record.folder / "domain.npz")]


def _shape_flag(run: Mapping[str, Any], model: str) -> list[str]:
    shape = run["model"]["input_shape"]
    needed = Path(model).suffix in (".pt", ".pth", ".safetensors") and len(shape) > 1
    arch = run["model"].get("arch")
    return [*(["--input-shape", ",".join(map(str, shape))] if needed else []), *(["--arch", arch] if arch else [])]


def _flags(options: Mapping[str, Any], defaults: Any, without: Sequence[str] = ()) -> list[str]:
    """Command-line options for what differs from the defaults."""
    words = []
    for name, value in options.items():
        if name not in without and getattr(defaults, name, None) != value:
            flag = name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def _command_notes(run: Mapping[str, Any]) -> list[str]:
    notes = []
    if run["model"]["path"] is None:
        notes.append("The network was made in Python; the run folder holds it as network.npz.")
    if any("data" in layer["methods"] for layer in run["layers"]):
        notes.append("The run was also given inputs with --data; add the same file to find the same witnesses.")
    return notes


# -- numbers -------------------------------------------------------------------------------------------------------


def _change(pair: Mapping[str, int]) -> str:
    return f"{100 * (pair['after'] - pair['before']) / pair['before']:+.1f} %" if pair["before"] else "0 %"


def _short(value: float | str) -> str:
    return f"{float(value):.3g}"


def _number(value: float) -> float:
    return round(value, 6) if np.isfinite(value) else value


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


__all__ = ["SCHEMA", "Kind", "channels_of", "claim", "clean", "cleaned", "commands", "facts_of", "ranges", "read_compression",
           "unit_of"]
