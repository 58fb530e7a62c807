"""One contract, inherited by every executor; dask runs against a real scheduler and two worker processes over TCP."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from exactprune.errors import OptionError
from exactprune.executors import Executor, SerialExecutor, get_executor, in_order
from exactprune.executors.process import ProcessExecutor


def scaled_sum(shared: np.ndarray, item: int) -> float:
    return float((shared * item).sum())


def fails_on_two(shared: None, item: int) -> int:
    if item == 2:
        raise ValueError("two\nand more")
    return item


def loads(shared: Path, item: int) -> int:
    """Counts how often the payload was unpickled: each unpickling appends a line (see ``Counted``)."""
    time.sleep(0.02)
    return os.getpid()


class Counted:
    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        with Path(self.path).open("a") as file:
            file.write(f"{os.getpid()}\n")


def naps(shared: float, item: int) -> int:
    time.sleep(shared)
    return item


def dies_once(shared: str, item: int) -> int:
    """Kills its own process the first time item 3 is run."""
    marker = Path(shared)
    if item == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def always_dies(shared: None, item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def threads(shared: None, item: None) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


class Contract:
    """What every executor promises."""

    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        raise NotImplementedError

    def test_each_item_comes_back_once_with_the_serial_value(self, executor: Executor) -> None:
        shared = np.arange(1000) / 7
        results = list(executor.run(scaled_sum, range(25), shared=shared))
        expected = [r.value for r in SerialExecutor().run(scaled_sum, range(25), shared=shared)]
        assert sorted(r.index for r in results) == list(range(25))
        assert [r.value for r in in_order(results)] == expected
        assert all(not r.error and r.worker and r.seconds >= 0 for r in results)

    def test_no_items(self, executor: Executor) -> None:
        assert list(executor.run(scaled_sum, [], shared=1)) == []

    def test_an_exception_is_a_value_of_its_own_task_only(self, executor: Executor) -> None:
        results = in_order(executor.run(fails_on_two, range(4)))
        assert [r.value for r in results] == [0, 1, None, 3]
        assert [r.error for r in results] == ["", "", "ValueError: two", ""]

    def test_the_payload_is_loaded_once_per_worker_at_most(self, executor: Executor, tmp_path: Path) -> None:
        log = tmp_path / "loads"
        log.touch()
        pids = {r.value for r in executor.run(loads, range(20), shared=Counted(str(log)))}
        loaded = log.read_text().split()
        assert len(loaded) == len(set(loaded))
        assert isinstance(executor, SerialExecutor) or {str(p) for p in pids} <= set(loaded)

    def test_two_payloads_do_not_mix(self, executor: Executor) -> None:
        for factor in (1.0, 2.0, 1.0, 3.0):
            values = [r.value for r in in_order(executor.run(scaled_sum, [1, 2], shared=np.full(3, factor)))]
            assert values == [3 * factor, 6 * factor]

    def test_cancel_ends_the_rest(self, executor: Executor) -> None:
        cancel = threading.Event()
        results = []
        for result in executor.run(naps, range(40), shared=0.1, cancel=cancel):
            results.append(result)
            cancel.set()
        assert sorted(r.index for r in results) == list(range(40))
        finished = [r for r in results if not r.error]
        assert 1 <= len(finished) < 20
        assert {r.error for r in results if r.error} == {"cancelled"}

    def test_the_iterator_can_be_left_early_and_the_executor_used_again(self, executor: Executor) -> None:
        running = executor.run(naps, range(20), shared=0.02)
        next(running)
        running.close()  # type: ignore[attr-defined]
        assert [r.value for r in in_order(executor.run(naps, [5], shared=0.0))] == [5]

    def test_submit(self, executor: Executor) -> None:
        assert executor.submit(divmod, 7, 3).result(timeout=30) == (2, 1)
        assert isinstance(executor.submit(divmod, 7, 0).exception(timeout=30), ZeroDivisionError)


class TestSerial(Contract):
    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        with get_executor("serial") as executor:
            yield executor


class TestProcess(Contract):
    @pytest.fixture
    def executor(self, pool: Executor) -> Executor:
        return pool

    def test_a_worker_that_dies_changes_nothing(self, executor: Executor, tmp_path: Path) -> None:
        results = in_order(executor.run(dies_once, range(8), shared=str(tmp_path / "died")))
        assert [r.value for r in results] == [i * i for i in range(8)]
        assert (tmp_path / "died").exists()

    def test_a_task_that_kills_its_worker_costs_only_itself(self, executor: Executor) -> None:
        results = in_order(executor.run(always_dies, range(4)))
        assert [r.value for r in results] == [0, None, 2, 3]
        assert "died 3 times" in results[1].error

    def test_workers_have_one_thread_and_the_parent_is_left_alone(self, executor: Executor) -> None:
        before = os.environ.get("OMP_NUM_THREADS")
        assert [r.value for r in executor.run(threads, [None])] == ["1"]
        assert os.environ.get("OMP_NUM_THREADS") == before


class TestDask(Contract):
    @pytest.fixture
    def executor(self, client: Executor) -> Executor:
        return client

    def test_both_workers_are_used(self, executor: Executor) -> None:
        assert executor.jobs == 2
        assert len({r.worker for r in executor.run(naps, range(20), shared=0.02)}) == 2

    def test_a_worker_killed_in_mid_run_changes_nothing(self, executor: Executor, tmp_path: Path) -> None:
        results = in_order(executor.run(dies_once, range(8), shared=str(tmp_path / "died")))
        assert [(r.value, r.error) for r in results] == [(i * i, "") for i in range(8)]
        assert (tmp_path / "died").exists()

    def test_a_payload_may_come_later_than_its_task(self) -> None:
        from exactprune.executors import dask
        from exactprune.executors.payload import pack

        key, data = pack(["late"])
        worker = threading.Timer(0.3, lambda: dask.unpack(key, lambda: data))
        worker.start()
        assert dask._payload(key) == ["late"]


class TestGetExecutor:
    def test_auto_is_serial_for_one_job(self) -> None:
        assert isinstance(get_executor("auto", jobs=1), SerialExecutor)

    def test_auto_is_processes_for_more(self) -> None:
        with get_executor("auto", jobs=2) as executor:
            assert isinstance(executor, ProcessExecutor)
            assert executor.jobs == 2

    @pytest.mark.parametrize("spec", ["", "threads", "dask://", "dask"])
    def test_unknown_names(self, spec: str) -> None:
        with pytest.raises(OptionError, match="not known"):
            get_executor(spec)

    def test_no_jobs(self) -> None:
        with pytest.raises(OptionError, match="at least 1"):
            get_executor("process", jobs=0)

    def test_nobody_at_the_address(self) -> None:
        pytest.importorskip("distributed")
        from exactprune.executors.dask import DaskExecutor

        with pytest.raises(OptionError, match="no dask scheduler answers"):
            DaskExecutor("tcp://127.0.0.1:1", timeout=0.5)
