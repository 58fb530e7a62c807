"""``check``: the independent checker on a model file and a run folder; neither torch nor a solver is imported.

The checker believes the certificate file only. What people read is `neurons.csv`, so its statuses are compared with the
claims that the checker accepted: a status without an accepted claim counts as rejected.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exactprune.claim import LayerVerdict, Status
from exactprune.errors import CertificateError, ExactPruneError, LoadError

SHOWN = 20


def run_check(model: Path, run: Path, exact: bool, input_shape: tuple[int, ...] | None, json: bool, quiet: bool) -> int:
    """0 when every verdict is accepted, 1 when one is rejected."""
    from exactprune.report.strict import pretty
    from exactprune.report.tables import rendered

    _check_paths(model, run)
    summary = check_summary(model, run, exact, input_shape)
    if json:
        sys.stdout.write(pretty(summary))
    elif not quiet:
        sys.stdout.write(rendered(check_report(summary)))
    return 0 if summary["accepted"] else 1


def run_check_bundle(original: Path, compressed: Path, bundle: Path, exact: bool, input_shape: tuple[int, ...] | None,
                     json: bool, quiet: bool) -> int:
    """0 when the claim about two model files is accepted, 1 when it is rejected.

    Raises:
        LoadError: a model file is missing, or of a kind that the checker does not read.
        CertificateError: there is no bundle, or with ``exact`` it cannot be judged in integers alone.
    """
    from exactprune.report.strict import pretty

    summary = bundle_summary(original, compressed, bundle, input_shape, exact)
    if json:
        sys.stdout.write(pretty(summary))
    elif not quiet:
        sys.stdout.write("\n".join(bundle_words(summary)) + "\n")
    return 0 if summary["accepted"] else 1


def bundle_summary(original: Path, compressed: Path, bundle: Path,
                   input_shape: tuple[int, ...] | None, exact: bool = False) -> dict[str, Any]:
    """The checker's report on a bundle."""
    from exactprune.checker.bundle import FloatingError, UnknownError, check_bundle

    for path in (original, compressed):
        if not path.is_file():
            raise LoadError(f"{path}: no such file; give the original model, the smaller one and its certificate")
    if not bundle.is_file():
        raise CertificateError(f"{bundle}: no such file; give the certificate that compress wrote beside the model")
    try:
        report = check_bundle(original, compressed, bundle, input_shape, exact)
    except FloatingError as error:
        raise CertificateError(f"{bundle}: {error}; check it without --exact, or compress with a larger claim") from None
    except UnknownError as error:
        raise LoadError(f"the checker cannot read it itself: {error}; where it is the original, give network.npz of "
                        "the run folder instead") from None
    return {"schema": "exactprune-check-bundle/1", "original": str(original), "compressed": str(compressed),
            "bundle": str(bundle), "exact": exact, **report.as_dict()}


def bundle_words(summary: Mapping[str, Any]) -> list[str]:
    """What ``check`` prints about a bundle."""
    head = [f"Original: {summary['original']}", f"Smaller:  {summary['compressed']}"]
    if not summary["accepted"]:
        return [*head, f"REJECTED: {summary['error']}"]
    claim = "f(x) = g(x)" if summary["level"] == "exact" else f"abs(f(x) - g(x)) <= {summary['claimed']!r}"
    proved = "" if summary["level"] == "exact" else f" (proved here: {summary['deviation']!r}, in {summary['arithmetic']})"
    return [*head, f"ACCEPTED: {claim} as real functions for every x in the domain{proved}, checked in "
                   f"{summary['seconds']:.2f} s."]


def check_summary(model: Path, run: Path, exact: bool, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """The checker's report, with what `neurons.csv` says beyond it.

    Raises:
        LoadError: the checker cannot read the model.
    """
    from exactprune.checker import CheckError, check_run

    try:
        report = check_run(model, run, exact=exact, input_shape=input_shape)
    except CheckError as error:
        raise LoadError(f"{model}: {error}") from None
    accepted = [layer.accepted for layer in report.layers]
    summary = {"schema": "exactprune-check/1", "model": str(model), "run": str(run), "exact": exact, **report.as_dict()}
    claims = [{"layer": k, "neurons": layer.neurons, **_claims(accepted[k], len(layer.rejected), layer.neurons)}
              for k, layer in enumerate(report.layers)]
    known = {(k, i) for k, i, *_ in report.rejected}
    beyond = [] if report.error else _beyond(run, [layer.neurons for layer in report.layers], accepted, known)
    rejected = [*summary["rejected"], *beyond]
    return {**summary, "accepted": not (report.error or rejected), "layers": claims, "rejected": rejected}


def check_report(summary: Mapping[str, Any]) -> list[Any]:
    """What ``check`` prints."""
    from exactprune.report.tables import check_table

    lines = [f"  rejected: layer {r['layer']}, neuron {r['neuron']}, {r['claim']}: {r['reason']}"
             for r in summary["rejected"][:SHOWN]]
    if len(summary["rejected"]) > SHOWN:
        lines.append(f"  and {len(summary['rejected']) - SHOWN:,} more (--json lists them all)")
    count = sum(layer[word] for layer in summary["layers"] for word in ("inactive", "active", "unstable"))
    if summary["error"]:
        return [f"REJECTED as a whole: {summary['error']}"]
    verdict = "ACCEPTED" if summary["accepted"] else f"REJECTED: {len(summary['rejected']):,} verdicts"
    words = f"{verdict}. {count:,} claims of the certificate hold, checked in {summary['seconds']:.2f} s."
    return [f"Network: {summary['source']}", "", check_table(summary), "", *lines, words]


def _check_paths(model: Path, run: Path) -> None:
    if not model.is_file():
        raise LoadError(f"{model}: no such file; give the model that the run is about")
    if not run.is_dir():
        raise CertificateError(f"{run}: no such folder; give the run folder that verify wrote")
    for name in ("certificates.jsonl.gz", "domain.npz"):
        if not (run / name).is_file():
            raise CertificateError(f"{run}: has no {name}; give the run folder that verify wrote")


def _claims(accepted: Mapping[int, str], rejected: int, neurons: int) -> dict[str, int]:
    counts = Counter(accepted.values())
    words = {word: counts[word] for word in ("inactive", "active", "unstable")}
    return {**words, "rejected": rejected, "unknown": neurons - sum(words.values()) - rejected}


def _beyond(run: Path, sizes: list[int], accepted: list[dict[int, str]],
            known: set[tuple[int, int]]) -> list[dict[str, Any]]:
    """Statuses of neurons.csv that no accepted claim stands behind; everything when it cannot be read."""
    from exactprune.report.record import read_run

    try:
        layers = read_run(run).layers
    except ExactPruneError as error:
        return [_whole(str(error))]
    if [layer.status.size for layer in layers] != sizes:
        return [_whole("neurons.csv has other layers than the model")]
    return [entry for verdict in layers for entry in _unbacked(verdict, accepted[verdict.layer], known)]


def _whole(reason: str) -> dict[str, Any]:
    return {"layer": 0, "neuron": 0, "claim": "the run folder", "reason": reason}


def _unbacked(verdict: LayerVerdict, accepted: Mapping[int, str], known: set[tuple[int, int]]) -> list[dict[str, Any]]:
    said = {i: Status(status).word for i, status in enumerate(verdict.status.tolist()) if status}
    why = "neurons.csv says so, the certificate does not"
    return [{"layer": verdict.layer, "neuron": i, "claim": word, "reason": why}
            for i, word in said.items() if accepted.get(i) != word and (verdict.layer, i) not in known]
