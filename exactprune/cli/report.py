"""``report``: report.html, report.md and report.json of a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from exactprune.errors import LoadError, OptionError


def run_report(run: Path, output: Path | None, curve: bool, model: Path | None, json: bool, quiet: bool) -> int:
    """``exactprune report``."""
    from exactprune.report.html import FILES, write_report
    from exactprune.report.strict import pretty

    target = run if output is None else output
    _check(run, target, curve, model)
    facts = write_report(run, target, curve=_curve(run, model) if curve else ())
    if json:
        sys.stdout.write(pretty(facts))
    elif not quiet:
        print("\n".join([*_words(facts), *(f"{target / name}" for name in FILES)]))
    return 0


def _words(facts: dict[str, Any]) -> list[str]:
    lines = [f"Claim: {facts['claim']['headline']}", *(f"  {sentence}" for sentence in facts["claim"]["sentences"])]
    lines += [f"  Allowed {row['allowed']}: certified {row['certified']}, {row['neurons']:,} neurons, "
              f"{row['parameters']:,} parameters left" for row in facts["curve"]]
    return [*lines, "Written:"]


def _check(run: Path, target: Path, curve: bool, model: Path | None) -> None:
    if not run.is_dir():
        raise OptionError(f"{run}: no such folder; give the run folder that verify or compress wrote")
    if target.exists() and not target.is_dir():
        raise OptionError(f"--output {target}: is a file; name a folder")
    if not target.absolute().parent.is_dir():
        raise OptionError(f"--output {target}: its parent folder does not exist; make it first")
    if model is not None and not curve:
        raise OptionError("--model is read for --curve only; add --curve, or leave --model out")


def _curve(run: Path, model: Path | None) -> list[dict[str, Any]]:
    from exactprune.io import load
    from exactprune.report.curve import removal_curve
    from exactprune.report.record import read_run

    record = read_run(run)
    path = model or _own_model(run, record.summary["model"]["path"])
    return removal_curve(load(path, input_shape=record.summary["model"]["input_shape"]), record)


def _own_model(run: Path, path: str | None) -> Path:
    """The network kept in the run folder, else the file the run names."""
    kept = run / "network.npz"
    if kept.exists() or path is None:
        return kept
    if not Path(path).is_file():
        raise LoadError(f"{path}: the model of this run is not there (any more); give it with --model")
    return Path(path)
