"""Executors: serial, processes of this machine, a dask cluster. Results do not depend on which one is used."""

from __future__ import annotations

import os

from exactprune.errors import OptionError
from exactprune.executors.protocol import Executor, Task, TaskResult, in_order
from exactprune.executors.serial import SerialExecutor

__all__ = ["Executor", "SerialExecutor", "Task", "TaskResult", "get_executor", "in_order"]


def get_executor(spec: str = "auto", jobs: int | None = None) -> Executor:
    """An executor by name.

    Args:
        spec: "serial", "process", "dask://host:port" (or any address that dask understands, such as "tls://..."), or
            "auto": serial for one job, processes for more.
        jobs: number of processes; the CPUs of this process by default. Ignored by serial and dask.

    Raises:
        OptionError: the name is unknown, ``jobs`` is below 1, or the cluster cannot be reached.
    """
    if jobs is not None and jobs < 1:
        raise OptionError(f"jobs is {jobs}; give at least 1")
    count = jobs or len(os.sched_getaffinity(0))
    if spec == "serial" or (spec == "auto" and count == 1):
        return SerialExecutor()
    if spec in ("process", "processes", "auto"):
        from exactprune.executors.process import ProcessExecutor

        return ProcessExecutor(count)
    scheme, separator, rest = spec.partition("://")
    if separator and rest:
        from exactprune.executors.dask import DaskExecutor

        return DaskExecutor(f"tcp://{rest}" if scheme == "dask" else spec)
    raise OptionError(f"executor '{spec}' is not known; give serial, process or dask://host:port")
