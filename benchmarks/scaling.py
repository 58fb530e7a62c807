"""What more workers would buy: recorded task times of one run, replayed on W simulated workers.

    python benchmarks/scaling.py model.onnx --vnnlib box.vnnlib --batches 4 --output reports/decide/scaling.json

The exact stage of the cascade comes in batches: the tasks of one layer and round, all known at once, none of which
sees another's result; the next batch needs them all. The run is made once, serially, without a time limit; what is
recorded is each batch's payload, each task's processor seconds, and those spent outside tasks. ``--batches`` ends a
run that would take hours after so many of them: every recorded task ran to its end. The simulation hands the tasks of
a batch out in order, each to the worker that is free first (list scheduling, as every executor here does; Graham
1969: at most 2 - 1/W times the optimum), adds a cost per task for the scheduler and one payload transfer per worker
and batch over a shared link, and keeps what is outside tasks serial (Amdahl). So it shows the speed-up and what
limits it: serial part, longest task of each batch, too few tasks, payloads, or the scheduler.
"""

from __future__ import annotations

import argparse
import heapq
import json
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import rivals
import torch

import exactprune
from exactprune.deciders import cascade as cascade_module
from exactprune.deciders.cascade import Cascade, Effort
from exactprune.deciders.tasks import Setting, Task, TaskResult, run_task

NO_LIMIT = 1e6
WORKERS = (1, 2, 4, 8, 16, 32, 64, 100)


@dataclass(frozen=True)
class Batch:
    """A layer's questions, seconds of each task, in order, and the payload in bytes."""

    layer: int
    questions: int
    seconds: tuple[float, ...]
    payload: int


@dataclass(frozen=True)
class Cluster:
    """What it costs beyond the tasks: seconds per task (dask's scheduler needs about 1 ms), bytes per second of the
    link."""

    per_task: float = 1e-3
    bandwidth: float = 1e8


def record(network: exactprune.Network, box: exactprune.Box, most: int) -> tuple[list[Batch], dict[str, float], int]:
    """At most so many batches of one serial run, the seconds outside of them by stage, and how many neurons stayed
    unknown."""
    batches: list[Batch] = []
    spent = 0.0

    def run(setting: Setting, tasks: Sequence[Task]) -> Iterator[tuple[int, TaskResult]]:
        nonlocal spent
        if len(batches) >= most:
            return
        seconds = []
        for index, task in enumerate(tasks):
            began = time.process_time()
            result = run_task(setting, task)
            seconds.append(time.process_time() - began)
            yield index, result
        spent += sum(seconds)
        asked = sum(len(task.neurons) for task in tasks)
        batches.append(Batch(setting.layer, asked, tuple(seconds), len(pickle.dumps(setting, protocol=5))))
        print(f"layer {setting.layer}: {asked} questions, {len(tasks)} tasks, {sum(seconds):.1f} s", file=sys.stderr)

    stages = Stages()
    began = time.process_time()
    cascade = Cascade(network, box, Effort(time_limit=NO_LIMIT), stages, run)
    cascade.run()
    unknown = int(sum((layer.status == 0).sum() for layer in cascade.layers))
    outside = stages.seconds() | {"all": time.process_time() - began - spent}
    return batches, outside, unknown


class Stages(rivals.Silent):
    """Processor seconds of witnesses, bounds and the rest, by the names that the cascade tells."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.marks.append((name.split()[0].rstrip(","), time.process_time()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, the branch and bound stages left out: tasks run inside them."""
        found: dict[str, float] = {}
        for (name, began), (_, ended) in pairwise(self.marks):
            if name != "branch":
                found[name] = found.get(name, 0.0) + ended - began
        return found


def makespan(batch: Batch, workers: int, cluster: Cluster) -> float:
    """Seconds of one batch on so many workers."""
    ship = batch.payload / cluster.bandwidth
    free = [ship * (i + 1) for i in range(min(workers, len(batch.seconds)))]  # one after the other over the link
    heapq.heapify(free)
    end = 0.0
    for handed, seconds in enumerate(batch.seconds):
        start = max(heapq.heappop(free), (handed + 1) * cluster.per_task)
        end = max(end, start + seconds)
        heapq.heappush(free, start + seconds)
    return end


def simulate(batches: Sequence[Batch], outside: float, workers: int, cluster: Cluster) -> dict[str, float]:
    """Seconds on so many workers, with what no number of workers can go below."""
    total = outside + sum(makespan(b, workers, cluster) for b in batches)
    serial = outside + sum(sum(b.seconds) for b in batches)
    return {"workers": workers, "seconds": total, "speed-up": serial / total,
            "outside tasks": outside, "longest tasks": sum(max(b.seconds, default=0.0) for b in batches),
            "payloads": sum(b.payload for b in batches) / cluster.bandwidth * min(workers, 10**9),
            "scheduler": sum(len(b.seconds) for b in batches) * cluster.per_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--vnnlib", type=Path)
    parser.add_argument("--batches", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--questions", type=int, default=cascade_module.QUESTIONS_A_TASK, help="in a task")
    parser.add_argument(
        "--per-task", type=float, default=Cluster.per_task, help="seconds of the scheduler for each task"
    )
    parser.add_argument("--bandwidth", type=float, default=Cluster.bandwidth, help="bytes per second")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    network = exactprune.load(given.model)
    box = exactprune.load_vnnlib(given.vnnlib).reshaped(network.input_shape) if given.vnnlib else \
        exactprune.uniform(0.0, 1.0, network.input_shape)
    cascade_module.QUESTIONS_A_TASK = given.questions
    batches, outside, unknown = record(network, box, given.batches)
    cluster = Cluster(given.per_task, given.bandwidth)
    rows = [simulate(batches, outside["all"], workers, cluster) for workers in WORKERS]
    result = {
        "model": given.model.name,
        "vnnlib": given.vnnlib.name if given.vnnlib else None,
        "unknown": unknown,
        "tasks": sum(len(b.seconds) for b in batches),
        "questions a task": given.questions,
        "seconds outside tasks": {k: round(v, 3) for k, v in outside.items()},
        "cluster": {"seconds a task": cluster.per_task, "bytes a second": cluster.bandwidth},
        "batches": [{"layer": b.layer, "questions": b.questions, "seconds": [round(s, 4) for s in b.seconds],
                     "payload": b.payload} for b in batches],
        "simulated": rows,
    }
    for row in rows:
        print(f"{row['workers']:>4} workers {row['seconds']:>9.2f} s  {row['speed-up']:>6.1f}x", file=sys.stderr)
    limits = {k: round(float(rows[-1][k]), 3) for k in ("outside tasks", "longest tasks", "payloads", "scheduler")}
    print(f"{result['tasks']} tasks in {len(batches)} batches, {unknown} unknown; seconds that limit it: {limits}")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
