"""Where the pruning benchmarks ran, and how they write what they measured: JSON with the settings, CSV with the rows."""

from __future__ import annotations

import csv
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import exactprune


def environment() -> dict[str, Any]:
    """Versions, hardware and threads."""
    return {"exactprune": exactprune.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "processor": _processor(), "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(), "system": platform.system()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier, perhaps interrupted, run."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """``path`` (JSON), and the rows beside it as CSV; each in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    _replace(path, json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1) + "\n")
    scratch = path.with_suffix(".csv.part")
    with scratch.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    scratch.replace(path.with_suffix(".csv"))


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    scratch.replace(path)


def into(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the page's comments ``<!-- name -->`` and ``<!-- end of name -->``."""
    whole, begin, end = page.read_text(), f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, found, rest = whole.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: has no place for {name!r}; put {begin.strip()} and {end} where it belongs")
    page.write_text(head + begin + text + end + tail)
