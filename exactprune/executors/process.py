"""Tasks on the processes of this machine (``concurrent.futures``, spawned, one numerical thread each).

The payload is written to a file once and read once by each worker. A worker that dies breaks a pool of
``concurrent.futures`` as a whole: the pool is made anew and what was in flight is run again, one task at a time, so
that a task that kills its worker is told from its neighbours; after ``ATTEMPTS`` it is given up with an error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from exactprune.executors.payload import pack, unpack
from exactprune.executors.protocol import Executor, Task, TaskResult, cancelled, invoke

ATTEMPTS = 3
POLL = 0.2
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessExecutor(Executor):
    """A pool of spawned processes."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._folder = tempfile.TemporaryDirectory(prefix="exactprune-")
        self._pool = _new_pool(jobs)

    def run(self, task: Task, items: Sequence[Any], *, shared: Any = None,
            cancel: threading.Event | None = None) -> Iterator[TaskResult]:
        """See ``Executor.run``."""
        key, path = self._ship(shared)
        waiting, suspects = deque(enumerate(items)), deque[tuple[int, Any]]()
        attempts = dict.fromkeys(range(len(items)), 0)
        flying: dict[Future[TaskResult], tuple[int, Any]] = {}
        try:
            while waiting or suspects or flying:
                if cancel is not None and cancel.is_set():
                    yield from self._drop(flying, waiting, suspects)
                self._fill(flying, waiting, suspects, (task, key, path))
                done, _ = wait(flying, timeout=POLL, return_when=FIRST_COMPLETED)
                broken = [f for f in done if isinstance(f.exception(), BrokenProcessPool)]
                for future in done - set(broken):
                    index, _ = flying.pop(future)
                    yield _result(future, index)
                if broken:
                    yield from self._recover(flying, suspects, attempts)
        finally:
            for future in flying:
                future.cancel()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """See ``Executor.submit``."""
        return self._pool.submit(function, *args)

    def close(self) -> None:
        """See ``Executor.close``."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._folder.cleanup()

    def _ship(self, shared: Any) -> tuple[str, str]:
        key, data = pack(shared)
        path = Path(self._folder.name) / key
        if not path.exists():
            path.write_bytes(data)
        return key, str(path)

    def _fill(self, flying: dict[Future[TaskResult], tuple[int, Any]], waiting: deque[tuple[int, Any]],
              suspects: deque[tuple[int, Any]], call: tuple[Task, str, str]) -> None:
        """Keep the workers busy; while there are suspects, run them alone."""
        room, source = (1, suspects) if suspects else (2 * self.jobs, waiting)
        while source and len(flying) < room:
            index, item = source.popleft()
            try:
                flying[self._pool.submit(_call, *call, index, item)] = (index, item)
            except BrokenProcessPool:
                source.appendleft((index, item))
                self._pool = _new_pool(self.jobs)

    def _recover(self, flying: dict[Future[TaskResult], tuple[int, Any]], suspects: deque[tuple[int, Any]],
                 attempts: dict[int, int]) -> Iterator[TaskResult]:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = _new_pool(self.jobs)
        for future, (index, item) in sorted(flying.items(), key=lambda entry: entry[1][0]):
            if future.done() and not future.cancelled() and future.exception() is None:
                yield future.result()
                continue
            attempts[index] += 1
            if attempts[index] < ATTEMPTS:
                suspects.append((index, item))
            else:
                yield TaskResult(index, None, f"the worker process died {ATTEMPTS} times (out of memory?)")
        flying.clear()

    @staticmethod
    def _drop(
        flying: dict[Future[TaskResult], tuple[int, Any]], *queues: deque[tuple[int, Any]]
    ) -> Iterator[TaskResult]:
        for queue in queues:
            yield from (cancelled(index) for index, _ in queue)
            queue.clear()
        for future in [f for f in flying if f.cancel()]:
            yield cancelled(flying.pop(future)[0])


def _result(future: Future[TaskResult], index: int) -> TaskResult:
    error = future.exception()
    if error is None:
        return future.result()
    return TaskResult(index, None, f"{type(error).__name__}: {error}".splitlines()[0])


def _call(task: Task, key: str, path: str, index: int, item: Any) -> TaskResult:
    return invoke(task, unpack(key, Path(path).read_bytes), index, item)


def _ready() -> None:
    """The first calls in a new pool: each makes it start a worker at once, since none is idle yet."""


def _new_pool(jobs: int) -> ProcessPoolExecutor:
    with _one_thread_each():
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        for _ in range(jobs):
            pool.submit(_ready)
    return pool


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Thread limits in the environment that workers inherit when they are spawned, and restored here."""
    before = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
