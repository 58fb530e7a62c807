"""Tasks one after the other in this process: the reference that the other executors must agree with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from exactprune.executors.protocol import Executor, Task, TaskResult, cancelled, invoke


class SerialExecutor(Executor):
    """Runs each task when its result is asked for."""

    jobs = 1

    def run(self, task: Task, items: Sequence[Any], *, shared: Any = None,
            cancel: threading.Event | None = None) -> Iterator[TaskResult]:
        """See ``Executor.run``."""
        for index, item in enumerate(items):
            stop = cancel is not None and cancel.is_set()
            yield cancelled(index) if stop else invoke(task, shared, index, item)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """See ``Executor.submit``."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to release."""
