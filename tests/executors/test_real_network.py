"""A trained network with questions that branch and bound must answer: serial and two dask workers over TCP leave the same
run folder, times and the executor's name aside; also when the worker that holds a task is killed.

    pytest -m slow tests/executors/test_real_network.py
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import exactprune
from exactprune.deciders import cascade
from exactprune.options import VerifyOptions
from exactprune.report.record import write_run

pytestmark = pytest.mark.slow
MODEL = Path(__file__).resolve().parents[2] / "models" / "fashion_5x100.pt"
FILES = ("neurons.csv", "domain.npz", "certificates.jsonl.gz")


class Killer:
    """Progress that kills the worker that is busy, once, soon after branch and bound has begun."""

    def __init__(self, address: str) -> None:
        self.address, self.killed = address, []
        self.thread = threading.Thread(target=self._kill)

    def stage(self, name: str, total: int | None = None) -> None:
        if name.startswith("branch and bound,") and self.thread.ident is None:
            self.thread.start()

    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def _kill(self) -> None:
        from distributed import Client

        with Client(self.address, set_as_default=False) as found:
            client: Any = found
            pids: Any = client.run(os.getpid)
            deadline = time.monotonic() + 60
            while not self.killed and time.monotonic() < deadline:
                busy = [worker for worker, tasks in client.processing().items() if tasks]
                if busy:
                    os.kill(pids[busy[0]], signal.SIGKILL)
                    self.killed.append(busy[0])
                time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def one_question_a_task() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "QUESTIONS_A_TASK", 1)
        yield


def run(folder: Path, executor: str, progress: Any = None) -> dict[str, Any]:
    network = exactprune.load(MODEL)
    box = exactprune.uniform(0.25, 0.5, network.input_shape)
    found = exactprune.verify(network, box, VerifyOptions(executor=executor, time_limit=600), progress=progress)
    return timeless(write_run(found, folder, model=MODEL))


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """run.json without seconds and without the executor's name."""
    options = {k: v for k, v in summary["options"].items() if k != "executor"}
    stages = [{k: v for k, v in stage.items() if k != "seconds"} for stage in summary["stages"]]
    certificate = summary["certificate"] | {"checked": {k: v for k, v in summary["certificate"]["checked"].items()
                                                        if k != "seconds"}}
    rest = {k: v for k, v in summary.items() if k != "seconds"}
    return rest | {"options": options, "stages": stages, "certificate": certificate}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("serial")
    return folder, run(folder, "serial")


def test_branch_and_bound_has_something_to_do(serial: tuple[Path, dict[str, Any]]) -> None:
    _, summary = serial
    asked = [int(s["detail"].split()[0]) for s in summary["stages"] if s["name"].startswith("branch and bound")]
    assert sum(asked) >= 2
    assert summary["totals"]["unknown"] == 0


def test_two_dask_workers(serial: tuple[Path, dict[str, Any]], cluster: str, tmp_path: Path) -> None:
    summary = run(tmp_path, cluster.replace("tcp://", "dask://"))
    assert summary == serial[1]
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (serial[0] / name).read_bytes(), name


def test_a_worker_killed_in_mid_run(serial: tuple[Path, dict[str, Any]], cluster: str, tmp_path: Path) -> None:
    killer = Killer(cluster)
    summary = run(tmp_path, cluster.replace("tcp://", "dask://"), killer)
    killer.thread.join(timeout=60)
    assert killer.killed
    assert summary == serial[1]
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (serial[0] / name).read_bytes(), name
