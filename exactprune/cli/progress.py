"""Progress on stderr: bars on a terminal, nothing when piped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from exactprune.progress import Progress, Silent


class RichProgress:
    """One bar a stage, through rich, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                          console=Console(stderr=True), transient=True)
        self._task = None

    def stage(self, name: str, total: int | None = None) -> None:
        """See ``Progress``."""
        self._finish()
        self._task = self._bars.add_task(name, total=total)

    def advance(self, count: int = 1) -> None:
        """See ``Progress``."""
        if self._task is not None:
            self._bars.advance(self._task, count)

    def note(self, text: str) -> None:
        """See ``Progress``."""
        self._bars.console.print(text, highlight=False, markup=False)

    def _finish(self) -> None:
        if self._task is not None:
            whole = self._bars.tasks[-1].total or self._bars.tasks[-1].completed or 1
            self._bars.update(self._task, total=whole, completed=whole)

    @contextmanager
    def running(self) -> Iterator[RichProgress]:
        """Bars are shown inside."""
        with self._bars:
            yield self


@contextmanager
def progress(silent: bool) -> Iterator[Progress]:
    """A progress display for the duration of a run; silent when asked, and where stderr is no terminal."""
    import sys

    if silent or not sys.stderr.isatty():
        yield Silent()
        return
    with RichProgress().running() as bars:
        yield bars
