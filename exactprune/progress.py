"""Progress: what long work tells while it runs. Who shows it decides what it looks like (``cli.progress``: bars)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by everything that may take seconds; telling changes no result."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; ``total`` counts its units where known."""

    def advance(self, count: int = 1) -> None:
        """``count`` more units of the current stage are done."""

    def note(self, text: str) -> None:
        """Something a person would want to know now."""


class Silent:
    """No progress."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, count: int = 1) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


__all__ = ["Progress", "Silent"]
