"""A pool of two processes, and a dask cluster of two worker processes on localhost, each started once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exactprune.executors import Executor, get_executor


@pytest.fixture(scope="session")
def pool() -> Iterator[Executor]:
    with get_executor("process", jobs=2) as executor:
        yield executor


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and two worker processes on localhost, started as on a real cluster."""
    pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("dask")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    file = folder / "scheduler.json"
    log = (folder / "log").open("wb")

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=log,
                                start_new_session=True)

    scheduler = start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                      "--idle-timeout", "1800",
                      "--scheduler-file", str(file))
    deadline = time.time() + 60
    while not (file.exists() and file.read_text().strip()) and time.time() < deadline:
        time.sleep(0.1)
    workers = [start("distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard",
                     "--name", f"w{i}") for i in range(2)]
    address = json.loads(file.read_text())["address"]
    try:
        from distributed import Client

        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in [*workers, scheduler]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        log.close()


@pytest.fixture(scope="session")
def client(cluster: str) -> Iterator[Executor]:
    with get_executor(cluster.replace("tcp://", "dask://")) as executor:
        yield executor
