"""Tasks on a dask.distributed cluster, through ``Client.get_executor()`` (Rocklin, *Dask*, 2015).

The payload travels as a worker plugin: the scheduler gives it to every worker once, also to workers that join later
or are restarted. A task whose worker dies is run again by the scheduler, up to its ``allowed-failures``; what it
gives up on comes back with an error. Workers need the same version of exactprune, and one thread each (``dask worker
--nthreads 1``) is best.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from time import monotonic, sleep
from typing import Any

from exactprune.errors import OptionError
from exactprune.executors.payload import pack, unpack
from exactprune.executors.protocol import Executor, Task, TaskResult, cancelled, invoke

POLL = 0.2
ARRIVES = 30.0  # seconds that a payload may take to reach a worker
RETRIES = 3


class DaskExecutor(Executor):
    """Somebody's cluster; closing this leaves the cluster as it is."""

    def __init__(self, address: str, timeout: float = 10.0) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise OptionError("dask.distributed is not installed; install exactprune[dask]") from None
        try:
            self._client: Any = Client(address, timeout=timeout, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise OptionError(f"no dask scheduler answers at {address} ({type(error).__name__}); start one with "
                              "'dask scheduler', or check the address") from None
        self._executor = self._client.get_executor(pure=False, retries=RETRIES)
        self.jobs = max(1, sum(self._client.nthreads().values()))

    def run(self, task: Task, items: Sequence[Any], *, shared: Any = None,
            cancel: threading.Event | None = None) -> Iterator[TaskResult]:
        """See ``Executor.run``."""
        key, data = pack(shared)
        name = f"exactprune-{key}"
        self._client.register_plugin(_payload_plugin(key, data), name=name)
        flying = {self._executor.submit(_call, task, key, index, item): index for index, item in enumerate(items)}
        try:
            while flying:
                if cancel is not None and cancel.is_set():
                    for future in [f for f in flying if f.cancel()]:
                        yield cancelled(flying.pop(future))
                done, _ = wait(flying, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    yield _result(future, flying.pop(future))
        finally:
            for future in flying:
                future.cancel()
            self._client.unregister_worker_plugin(name)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """See ``Executor.submit``."""
        return self._executor.submit(function, *args)

    def close(self) -> None:
        """See ``Executor.close``. A cluster that is gone already is no error: there is nothing left to release."""
        with contextlib.suppress(Exception):
            self._executor.shutdown(wait=False)
        self._client.close()


def _payload_plugin(key: str, data: bytes) -> Any:
    from distributed import WorkerPlugin

    class Payload(WorkerPlugin):
        """Loads the payload when it reaches a worker."""

        def setup(self, worker: Any) -> None:
            """Called once on each worker."""
            unpack(key, lambda: data)

    return Payload()


def _missing() -> bytes:
    raise LookupError("the payload has not reached this worker")


def _payload(key: str) -> Any:
    """The payload; a worker that has just been restarted may be given tasks a moment before it."""
    end = monotonic() + ARRIVES
    while True:
        try:
            return unpack(key, _missing)
        except LookupError:
            if monotonic() > end:
                raise
            sleep(POLL)


def _call(task: Task, key: str, index: int, item: Any) -> TaskResult:
    return invoke(task, _payload(key), index, item)


def _result(future: Future[TaskResult], index: int) -> TaskResult:
    try:
        return future.result()
    except CancelledError:
        return cancelled(index)
    except Exception as error:
        return TaskResult(index, None, f"{type(error).__name__}: {error}".splitlines()[0])
