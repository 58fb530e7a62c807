"""Lossless against approximate methods: the experiments of reports/study/compare, run by ``exactprune compare``'s engine.

Each folder there has an ``experiment.toml``; results go beside it. Cells that are finished are kept, so an interrupted
study goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path

from _study_cells import OUT, ROOT, Facts

from exactprune.report.comparison import FILES, read_study, write_comparison

FOLDER = OUT / "compare"
ORDER = ("fashion_2x100", "fashion_5x100", "fashion_conv_bn", "fashion_2x800")


def experiments(only: str = "") -> list[Path]:
    """The folders with an experiment, or one of them."""
    return [FOLDER / name for name in ([only] if only else ORDER)]


def compare(folder: Path) -> None:
    """Run one experiment."""
    source = (folder / "experiment.toml").relative_to(ROOT)
    write_comparison(read_study(source), folder.relative_to(ROOT), lambda text: print(f"{folder.name}: {text}", flush=True),
                     source=str(source))


def results() -> list[tuple[str, Facts]]:
    """What comparison.json of every finished experiment holds."""
    found = [(folder.name, folder / FILES[1]) for folder in experiments()]
    return [(name, json.loads(file.read_text())) for name, file in found if file.exists()]
