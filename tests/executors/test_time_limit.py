"""An executor run ends with its time limit: what waits is cancelled, what starts late gets what is left."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest

from exactprune import pipeline
from exactprune.deciders.tasks import Setting, Task, TaskResult
from exactprune.executors import SerialExecutor
from exactprune.executors.process import ProcessExecutor
from exactprune.options import VerifyOptions


@dataclass(frozen=True, eq=False)
class Question(Task):
    """A task that takes all the time it is given, at most a second."""


def question(seconds: float) -> Question:
    return Question(np.array([0]), np.array([1]), seconds, 1)


def pretend(setting: Setting, task: Task) -> TaskResult:
    time.sleep(min(0.25, task.seconds))
    return TaskResult((), np.array([[task.seconds]]))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> pipeline._runner:
    monkeypatch.setattr(pipeline, "run_task", pretend)
    runner = pipeline._runner(VerifyOptions(executor="process", jobs=1))
    runner.executor = SerialExecutor()
    return runner


def test_tasks_share_one_limit(runner: pipeline._runner) -> None:
    began = time.monotonic()
    results = dict(runner._run(None, [question(0.6)] * 20))  # type: ignore[arg-type]
    assert time.monotonic() - began < 1.5
    assert sorted(results) == list(range(20))
    given = [float(r.points[0, 0]) for _, r in sorted(results.items()) if not r.decisions]
    assert 2 <= len(given) <= 4
    assert given == sorted(given, reverse=True)
    reasons = {d.reason for r in results.values() for d in r.decisions}
    assert reasons == {"time limit before it was tried"}


def test_each_batch_starts_its_own_clock(runner: pipeline._runner) -> None:
    for _ in range(2):
        ((_, result),) = runner._run(None, [question(0.2)])  # type: ignore[arg-type]
        assert float(result.points[0, 0]) == pytest.approx(0.2, abs=0.1)


def test_what_waits_for_a_process_is_cancelled(pool: ProcessExecutor) -> None:
    until = pipeline._Deadline(0.5)
    results = list(pool.run(_nap, range(40), cancel=until))
    assert {r.error for r in results} == {"", pipeline.CANCELLED}
    assert sum(not r.error for r in results) < 20


def _nap(shared: None, item: int) -> int:
    time.sleep(0.2)
    return item
