"""compression.json and the tables of ``compress``: what went, at which level g equals f, and what it saves.

Sizes count the network, bytes the files on disk, latency is the median wall-clock of a call. Only the level is a claim;
what was measured is marked so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from exactprune.io.atomic import write_bytes
from exactprune.report.record import file_sha256
from exactprune.report.strict import jsonable, pretty
from exactprune.report.tables import Report, before_after_table, removal_table, size_words

if TYPE_CHECKING:
    from exactprune.compress.bundle import Bundle
    from exactprune.pipeline import Compression

    Certificate = tuple[Bundle, Path]

SCHEMA = "exactprune-compression/1"
FILE = "compression.json"


def write_compression(compression: Compression, folder: Path, run: Mapping[str, Any], model: Path,
                      out: Path, certificate: Certificate | None = None) -> dict[str, Any]:
    """Save the smaller model and its certificate, and write compression.json into the run folder.

    Args:
        compression: the result.
        folder: an existing run folder.
        run: run.json of the verification it rests on.
        model: file of the original.
        out: file for the smaller model.
        certificate: the bundle and the file it goes to.

    Returns:
        What compression.json holds, with run.json under ``run``.
    """
    from exactprune.io import save

    save(compression.network, out)
    summary = summarise_compression(compression, model, out) | {"certificate": _certified(certificate)}
    write_bytes(folder / FILE, pretty(summary).encode())
    return {**summary, "run": dict(run)}


def _certified(certificate: Certificate | None) -> dict[str, Any] | None:
    """Write the bundle; what is said about it. A claim without proof has no file."""
    if certificate is None:
        return None
    bundle, path = certificate
    content = bundle.data if bundle.level is not None else b""
    if content:
        write_bytes(path, content)
    return jsonable({"path": str(path) if content else None, "bytes": len(content), "claimed": str(bundle.claimed),
                     "words": bundle.words, "checked": bundle.report.as_dict()})


def summarise_compression(compression: Compression, model: Path, out: Path) -> dict[str, Any]:
    """What compression.json holds; see docs/run-json.md."""
    c = compression
    return jsonable({
        "schema": SCHEMA,
        "model": {"path": str(model), "network_sha256": c.original.sha256},
        "out": {"path": str(out), "file_sha256": file_sha256(out), "network_sha256": c.network.sha256},
        "options": c.options,
        "level": {"kind": c.level.kind.name.lower(), "eps": c.level.eps, "words": c.level.words,
                  "budget": c.rewrite.budget, "reach": c.rewrite.reach},
        "float": None if c.floating is None else {"eps": c.floating.eps, "words": c.floating.words,
                                                  "dtype": c.original.dtype.name},
        "preserved": None if c.preserved is None else {**vars(c.preserved), "words": c.preserved.words},
        "sizes": _sizes(c, model, out),
        "latency": [{"batch": t.batch, "before": t.before, "after": t.after} for t in c.latency],
        "removed": _removed(c),
        "rewrites": [{"rule": s.rule, "text": s.text, "level": str(s.level)} for s in c.rewrite.steps],
        "measured": {"inputs": c.agreement.inputs, "largest": c.agreement.largest, "flips": c.agreement.flips,
                     "itself": c.agreement.itself, "runner": c.agreement.runner},
        "dead_inputs": len(c.rewrite.dead_inputs),
        "seconds": c.seconds,
    })


def compress_report(summary: Mapping[str, Any], folder: str) -> Report:
    """What ``compress`` prints: what went from which layer, before and after, the claim in words, the measurement."""
    return [f"Model:  {summary['model']['path']}", f"Domain: {summary['run']['domain']['source']}", "",
            removal_table(summary), "", before_after_table(_rows(summary)), "", *compress_words(summary, folder)]


def compress_words(summary: Mapping[str, Any], folder: str) -> list[str]:
    """The claim, what was measured, and where things are."""
    level, measured = summary["level"], summary["measured"]
    lines = [f"Claim ({level['kind']}): {_without_kind(level['words'])}; f: model, g: smaller model, D: domain."]
    if level["budget"]:
        found = f"R = {level['reach']:.6g}, the largest abs output attained at a point found in D"
        reached = found if level["reach"] else "as given"
        lines.append(f"  eps {level['eps']:.3g} of a budget of {level['budget']:.3g} ({reached})")
    if not any(layer["removed"] for layer in summary["removed"]):
        lines.append("  Nothing is proved removable: every neuron is still there.")
    lines += [f"  {step['text']} [{step['level']}]" for step in summary["rewrites"]]
    lines += _further_claims(summary)
    lines.append(f"Measured in {summary['run']['model']['dtype']} on {measured['inputs']:,} inputs: largest abs(f - g) "
                 f"{measured['largest']:.3g}, argmax differs on {measured['flips']:,}; f against itself at another batch "
                 f"size: {measured['itself']:.3g}.")
    if summary["run"]["totals"]["unknown"]:
        lines.append(f"Unknown neurons: {summary['run']['totals']['unknown']:,}; nothing is removed on unknown.")
    if summary["dead_inputs"]:
        lines.append(f"Inputs that nothing reads: {summary['dead_inputs']:,}; they stay, so that the interface does.")
    lines += [f"Smaller model: {summary['out']['path']}", f"Run folder:    {folder}",
              f"Check it:      exactprune check {quote(summary['model']['path'])} {quote(folder)}"]
    return lines + _certificate_words(summary)


def _further_claims(summary: Mapping[str, Any]) -> list[str]:
    """The claim for IEEE execution, and which inputs keep their class."""
    kept, run = summary["preserved"], summary["float"]
    words = (f"Claim (float, executed in {run['dtype']}): {_without_kind(run['words'])}, no TF32 or half precision." if run
             else "Claim (float): none; a sum could overflow, or there is no proof.")
    return [words] + ([f"Classes: {kept['words']}."] if kept else [])


def _certificate_words(summary: Mapping[str, Any]) -> list[str]:
    certificate = summary["certificate"]
    if certificate is None:
        return []
    words = certificate["words"]
    if certificate["path"] is None:
        return [f"No certificate: {words}."]
    paths = " ".join(quote(p) for p in (summary["model"]["path"], summary["out"]["path"], certificate["path"]))
    return [f"Certificate:   {certificate['path']} ({size_words(certificate['bytes'])}): {words}.",
            f"Check all:     exactprune check {paths}"]


def _without_kind(words: str) -> str:
    return words.partition(": ")[2] or words


def _sizes(c: Compression, model: Path, out: Path) -> dict[str, dict[str, int]]:
    pairs = {name: (getattr(c.before, name), getattr(c.after, name)) for name in ("neurons", "parameters", "macs")}
    pairs["bytes"] = (model.stat().st_size, out.stat().st_size)
    return {name: {"before": before, "after": after} for name, (before, after) in pairs.items()}


def _removed(c: Compression) -> list[dict[str, Any]]:
    from exactprune.compress.units import units_of

    (left, new), axes = _left(c), units_of(c.original).axis
    return [{"layer": v.layer, "node": v.node, "neurons": v.status.size, "new": new[v.layer], "left": left[v.layer],
             "removed": v.status.size + new[v.layer] - left[v.layer], "rules": _rules(c, v.layer),
             "axis": axes[c.original.relus[v.layer]], "gone": _gone(c, v.layer)}
            for v in c.verification.layers]


def _gone(c: Compression, layer: int) -> list[dict[str, Any]]:
    """The units of a layer that went, by rule and level, in the order of the rewrites."""
    groups: dict[tuple[str, str], list[int]] = {}
    for removal in c.rewrite.removals:
        if removal.layer == layer:
            groups.setdefault((removal.rule, str(removal.level)), []).append(removal.index)
    return [{"rule": rule, "level": level, "units": sorted(units)} for (rule, level), units in groups.items()]


def _left(c: Compression) -> tuple[Counter[int], Counter[int]]:
    """Original layer -> neurons of the smaller network that came from it, and how many of them are new units."""
    left, new = Counter[int](), Counter[int]()
    for position, (layer, units) in zip(c.network.relus, c.rewrite.origin, strict=True):
        neurons = prod(c.network.shapes[position])
        left[layer] += neurons
        new[layer] += int((units < 0).sum()) * neurons // max(1, len(units))
    return left, new


def _rules(c: Compression, layer: int) -> dict[str, int]:
    """Rule -> neurons of a layer that it removed."""
    counts = Counter[str]()
    for removal in c.rewrite.removals:
        if removal.layer == layer:
            counts[removal.rule] += removal.neurons
    return dict(counts)


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    sizes = summary["sizes"]
    rows = [_row(label, sizes[name], lambda n: f"{n:,}") for label, name in _LABELS]
    rows.append(_row("bytes on disk", sizes["bytes"], size_words))
    return rows + [_row(f"latency, batch {t['batch']} (measured)", t, _time) for t in summary["latency"]]


_LABELS = (("ReLU neurons", "neurons"), ("parameters", "parameters"), ("multiply-accumulates", "macs"))


def _row(label: str, pair: Mapping[str, Any], show: Any) -> tuple[str, str, str, str]:
    before, after = pair["before"], pair["after"]
    change = f"{100 * (after - before) / before:+.1f} %" if before else ""
    return label, show(before), show(after), change


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} us" if seconds < 1e-2 else f"{1e3 * seconds:,.1f} ms"
