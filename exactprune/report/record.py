"""The run folder: what a verification leaves behind, and reading it again.

`run.json` (schema ``exactprune-run/1``, docs/run-json.md), `neurons.csv`, `domain.npz`, `certificates.jsonl.gz`,
`report.md` (the same for people), and, for sources that the checker has no reader for, `network.npz`. Every file is
replaced as a whole, `run.json` last, so a folder with a `run.json` is a finished run. Equal runs give equal bytes in
all but `run.json` and `report.md`, which also hold times.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exactprune.claim import LayerVerdict, Method
from exactprune.domain import Box
from exactprune.errors import CertificateError
from exactprune.io.atomic import write_bytes
from exactprune.io.npz import save_npz
from exactprune.network import Network
from exactprune.report.markdown import run_markdown
from exactprune.report.neurons import neurons_csv, read_neurons
from exactprune.report.strict import compact, jsonable, pretty

if TYPE_CHECKING:
    from exactprune.pipeline import Verification

SCHEMA = "exactprune-run/1"
CERTIFICATES = "certificates.jsonl.gz"


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run folder, read.

    Attributes:
        folder: where it lies.
        summary: run.json.
        domain: the box.
        layers: verdicts of the ReLU layers, in order.
    """

    folder: Path
    summary: Mapping[str, Any]
    domain: Box
    layers: tuple[LayerVerdict, ...]


def default_folder(model: Path) -> Path:
    """``<model stem>.exactprune`` in the current directory."""
    return Path(f"{model.stem}.exactprune")


def write_run(verification: Verification, folder: str | Path, *, model: str | Path | None = None,
              keep_network: bool | None = None, arch: str | None = None) -> dict[str, Any]:
    """Write the run folder.

    Args:
        verification: the result to keep.
        folder: made when it does not exist; files of an earlier run in it are replaced.
        model: the file the network came from; None for a network made in Python.
        keep_network: write network.npz; by default only where the checker cannot read ``model`` itself.
        arch: architecture that was given for a state_dict file.

    Returns:
        What run.json holds.
    """
    folder = Path(folder)
    model = None if model is None else Path(model)
    if keep_network is None:
        keep_network = model is None or not checker_reads(model, verification.network)
    certificate = certificate_bytes(verification.records)
    summary = summarise(verification, model, len(certificate), arch)
    files = {"neurons.csv": neurons_csv(verification.layers).encode(), "domain.npz": domain_bytes(verification.domain),
             CERTIFICATES: certificate}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "network.npz", "compression.json", "report.html", "report.json"):
        (folder / name).unlink(missing_ok=True)
    if keep_network:
        save_npz(verification.network, folder / "network.npz")
    files |= {"report.md": run_markdown(summary).encode(), "run.json": pretty(summary).encode()}
    for name, data in files.items():
        write_bytes(folder / name, data)
    return summary


def read_run(folder: str | Path) -> RunRecord:
    """A run folder back as values.

    Raises:
        CertificateError: not a finished run folder, or its files contradict each other.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    try:
        with np.load(folder / "domain.npz", allow_pickle=False) as file:
            domain = Box(file["lower"], file["upper"], summary["domain"]["source"])
        shapes = [tuple(layer["shape"]) for layer in summary["layers"]]
        layers = read_neurons((folder / "neurons.csv").read_text(), shapes)
    except (OSError, KeyError, ValueError) as error:
        raise CertificateError(f"{folder}: not a whole run folder ({error}); run verify again") from None
    if domain.sha256 != summary["domain"]["sha256"]:
        raise CertificateError(f"{folder}: domain.npz is not the domain of run.json; run verify again")
    return RunRecord(folder, summary, domain, layers)


def read_summary(folder: Path) -> dict[str, Any]:
    """run.json of a run folder.

    Raises:
        CertificateError: missing, no JSON, or of another schema.
    """
    try:
        summary = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise CertificateError(f"{folder}: no readable run.json ({error}); give a folder that verify wrote") from None
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        raise CertificateError(f"{folder}/run.json: schema is not {SCHEMA}; run verify again")
    return summary


# -- contents ----------------------------------------------------------------------------------------------------


def summarise(verification: Verification, model: Path | None, certificate_size: int,
              arch: str | None = None) -> dict[str, Any]:
    """What run.json holds; see docs/run-json.md."""
    v = verification
    return jsonable({
        "schema": SCHEMA,
        "model": _model(v.network, model) | ({} if arch is None else {"arch": arch}),
        "domain": {"sha256": v.domain.sha256, "source": v.domain.source, "min": float(v.domain.lower.min()),
                   "max": float(v.domain.upper.max())},
        "options": v.options,
        "versions": v.versions,
        "hardware": v.hardware,
        "stages": [{"name": s.name, "seconds": s.seconds, "settled": s.settled, "detail": s.detail} for s in v.stages],
        "seconds": v.seconds,
        "totals": v.totals,
        "layers": [layer_summary(layer) for layer in v.layers],
        "certificate": {"file": CERTIFICATES, "bytes": certificate_size, "records": len(v.records), "checked": v.check},
    })


def layer_summary(layer: LayerVerdict) -> dict[str, Any]:
    """One entry of ``layers`` in run.json."""
    return {"layer": layer.layer, "node": layer.node, "shape": list(layer.shape), **layer.counts(),
            "methods": methods(layer)}


def methods(layer: LayerVerdict) -> dict[str, int]:
    """How many neurons each method settled, in the order of ``Method``; methods that settled none are left out."""
    counts = np.bincount(layer.method, minlength=len(Method))
    return {method.word: int(counts[method]) for method in Method if method is not Method.NONE and counts[method]}


def certificate_bytes(records: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines, gzipped without name and time, so that equal records give equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        for record in records:
            file.write(compact(record).encode() + b"\n")
    return buffer.getvalue()


def domain_bytes(domain: Box) -> bytes:
    """domain.npz: arrays ``lower`` and ``upper``."""
    buffer = io.BytesIO()
    np.savez(buffer, lower=domain.lower, upper=domain.upper)
    return buffer.getvalue()


def checker_reads(model: Path, network: Network) -> bool:
    """Whether the checker's own reader makes the same network of the file; else it needs network.npz."""
    from exactprune.checker import CheckError, read_network

    try:
        return read_network(model, network.input_shape).sha256 == network.sha256
    except CheckError:
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model(network: Network, path: Path | None) -> dict[str, Any]:
    return {"path": None if path is None else str(path), "file_sha256": None if path is None else file_sha256(path),
            "network_sha256": network.sha256, "name": network.name, "dtype": network.dtype.name,
            "input_shape": list(network.input_shape), "notes": list(network.notes)}
