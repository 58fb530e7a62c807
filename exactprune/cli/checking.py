"""``check``: the independent checker on a model file and a run folder; neither torch nor a solver is imported."""

from __future__ import annotations

from pathlib import Path


def run_check(model: Path, run: Path, exact: bool, input_shape: tuple[int, ...] | None, json: bool, quiet: bool) -> int:
    """0 when every verdict is accepted, 1 when one is rejected."""
    raise NotImplementedError
