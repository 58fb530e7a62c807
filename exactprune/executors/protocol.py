"""Where tasks run, behind one small protocol.

A task is a module-level function ``task(shared, item)``. ``shared`` (network, bounds: large) goes to every worker
once; an
item (a neuron and its limits: small) goes with every task. Tasks must be idempotent and depend on their two arguments
only: then a task that ran on a worker that died is simply run again, and the values are the same whatever the
executor, the number of workers and the order of completion. An exception inside a task is a value,
``TaskResult.error``.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

Task = Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What became of one task.

    Attributes:
        index: place of the item in the sequence that was given.
        value: what the task returned; None with an error.
        error: why there is no value, one line; empty otherwise.
        seconds: run time on the worker.
        worker: host and process that ran it, for the log.
    """

    index: int
    value: Any
    error: str = ""
    seconds: float = 0.0
    worker: str = ""


class Executor(ABC):
    """Runs tasks. Use it as a context manager, or ``close`` it.

    Attributes:
        jobs: number of tasks that run at the same time, as far as known.
    """

    jobs: int

    @abstractmethod
    def run(self, task: Task, items: Sequence[Any], *, shared: Any = None,
            cancel: threading.Event | None = None) -> Iterator[TaskResult]:
        """Results in order of completion, exactly one for each item.

        Setting ``cancel`` (anything whose ``is_set`` turns true) ends tasks that have not started with the error
        ``cancelled``; running ones come back when they end. Closing the iterator early cancels likewise.
        """

    @abstractmethod
    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """One call as a ``concurrent.futures`` future."""

    @abstractmethod
    def close(self) -> None:
        """Release the workers that this executor started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_order(results: Iterable[TaskResult]) -> list[TaskResult]:
    """All results in order of the items."""
    return sorted(results, key=lambda result: result.index)


def invoke(task: Task, shared: Any, index: int, item: Any) -> TaskResult:
    """Run a task here and turn what it raises into a value."""
    began = time.perf_counter()
    value, error = None, ""
    try:
        value = task(shared, item)
    except MemoryError:
        error = "out of memory"
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return TaskResult(index, value, error, time.perf_counter() - began, f"{socket.gethostname()}:{os.getpid()}")


def cancelled(index: int) -> TaskResult:
    """The result of a task that was never started."""
    return TaskResult(index, None, "cancelled")
