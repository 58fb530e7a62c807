"""One cell of the study: what verify, check and compress say about one network, kept as one JSON file.

A cell is made once. Its file holds the settings it was made with; while they are the same it is read and not made again, so a
study that was interrupted goes on where it stopped, and a cell is repeated by deleting its file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _compress_cases as inputs
import numpy as np

import exactprune
from exactprune.checker import check_run
from exactprune.checker.bundle import check_bundle
from exactprune.compress.bundle import bundle
from exactprune.domain import Box
from exactprune.io.atomic import write_bytes
from exactprune.network import Network
from exactprune.options import CompressOptions, VerifyOptions
from exactprune.pipeline import Verification
from exactprune.report.record import write_run
from exactprune.report.strict import jsonable, pretty

ROOT = inputs.ROOT
OUT = ROOT / "reports" / "study"
SCHEMA = "exactprune-study/1"
BUDGETS = ("exact", "rounding")
Facts = dict[str, Any]
Data = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Cells:
    """Cells of one part of the study, one file each in ``folder``."""

    folder: Path

    def get(self, name: str, settings: Facts, make: Callable[[], Facts]) -> Facts:
        """The cell ``name``: read where it was made with the same settings, else made and written."""
        file, settings = self.folder / f"{name}.json", jsonable(settings)
        if file.exists() and (kept := json.loads(file.read_text()))["settings"] == settings:
            return kept
        began = time.perf_counter()
        made = jsonable({"schema": SCHEMA, "name": name, "settings": settings, **make(), "made with": setting()})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(file, pretty(made).encode())
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return made


def setting() -> Facts:
    """Versions and hardware."""
    import torch

    return {"exactprune": exactprune.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "processor": processor(), "cpus": os.cpu_count(),
            "threads": torch.get_num_threads()}


def processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.machine()


def examined(model: Path, network: Network, box: Box, data: Data | None, limit: float) -> Facts:
    """What the tool says about a network on a box, and what it makes of it at ``exact`` and at ``rounding``.

    Args:
        model: the network's file, which the checker reads for itself.
        network: the same, loaded.
        box: the domain.
        data: labelled inputs (N, *input shape) and (N,) for accuracies.
        limit: seconds for the exact stage.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    found = exactprune.verify(network, box, VerifyOptions(time_limit=limit))
    spent = {"seconds": time.perf_counter() - wall, "cpu seconds": time.process_time() - cpu}
    share, answers = (None, None) if data is None else inputs.accuracy(network, data)
    return {"network_sha256": network.sha256, "domain": box.source, "samples": 0 if data is None else len(data[1]),
            "accuracy": share, "sizes": sizes(network),
            "verify": {"totals": found.totals, "layers": [v.counts() for v in found.layers], **spent},
            "check": checked(model, network, found),
            "budgets": [compressed(model, found, budget, data, answers) for budget in BUDGETS]}


def checked(model: Path, network: Network, found: Verification) -> Facts:
    """What the independent checker says, from the files alone and in exact arithmetic."""
    with tempfile.TemporaryDirectory() as scratch:
        write_run(found, scratch, model=model)
        report = check_run(model, scratch, exact=True, input_shape=network.input_shape)
        size = (Path(scratch) / "certificates.jsonl.gz").stat().st_size
    told = report.as_dict()
    claims = {word: told["counts"][word] == found.totals[word] for word in ("inactive", "active", "unstable")}
    return {"accepted": not report.error and not report.rejected and all(claims.values()), "rejected": len(report.rejected),
            "error": report.error, "seconds": told["seconds"], "bytes": size}


def compressed(model: Path, found: Verification, budget: str, data: Data | None, answers: np.ndarray | None) -> Facts:
    """The smaller network at one budget, with its certificate checked from the files."""
    began = time.perf_counter()
    smaller = exactprune.compress(found, options=CompressOptions(max_deviation=budget))
    g, seconds = smaller.network, time.perf_counter() - began
    row = {"budget": budget, "level": str(smaller.level), "eps": smaller.level.eps, "allowed": smaller.rewrite.budget,
           "R": smaller.rewrite.reach, "seconds": seconds, **sizes(g), "largest measured": smaller.agreement.largest,
           "original against itself": smaller.agreement.itself,
           "latency": [{"batch": t.batch, "before": t.before, "after": t.after} for t in smaller.latency],
           "certificate": certificate(model, found, smaller)}
    if data is not None:
        share, after = inputs.accuracy(g, data)
        row |= {"accuracy": share, "other answers": int((after != answers).sum())}
    return row


def certificate(model: Path, found: Verification, smaller: Any) -> Facts:
    """Write the smaller network and its certificate, and have both checked against the original's file."""
    proof = bundle(smaller.original, smaller.domain, smaller.rewrite, found.records, found.layers)
    if proof.level is None:
        return {"accepted": False, "error": proof.report.error, "claimed": str(proof.claimed)}
    with tempfile.TemporaryDirectory() as scratch:
        small, file = Path(scratch) / f"small{model.suffix}", Path(scratch) / "certificate"
        exactprune.save(smaller.network, small)
        file.write_bytes(proof.data)
        report = check_bundle(model, small, file, smaller.original.input_shape)
        return {"accepted": report.accepted, "error": report.error, "level": str(proof.level), "deviation": report.deviation,
                "seconds": report.as_dict()["seconds"], "bytes": file.stat().st_size}


def sizes(network: Network) -> Facts:
    """Neurons, parameters and multiply-accumulates."""
    return {"neurons": network.neurons, "parameters": network.parameters, "macs": network.macs}
