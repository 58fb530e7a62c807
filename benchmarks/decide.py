"""Deciding every neuron: the cascade with certificates against the published algorithms on HiGHS.

    python benchmarks/decide.py                                  # every network that is there
    python benchmarks/decide.py --only fashion_2x100,acas1_1_p1 --limit 120

One process, one thread, the same time limit for everyone; verdicts are compared wherever two sides have one. Raw
numbers go to ``reports/decide/`` (JSON and CSV), a table to the screen. See benchmarks/rivals.py for what the rivals
are and how those that do not finish are extrapolated. Ratios are of processor seconds, which a busy machine does not
distort; wall-clock seconds stand next to them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rivals
import torch
from rivals import Clock, Result, measured

import exactprune
from exactprune.claim import Status
from exactprune.deciders.highs import version
from exactprune.domain import Box, uniform
from exactprune.network import Network
from exactprune.options import VerifyOptions

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", ROOT.parent / "shared"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
RIVALS = ("isa", "leo", "isa, interval", "isa, our bounds", "leo, our bounds")
GIVEN = RIVALS[3:]
COLUMNS = ("wall", "cpu", "finished", "asked", "total", "decided", "contradictions", "ratio cpu")
NOTE = ("Processor seconds, one thread. ~ extrapolated from a sample; > a lower bound: parts of the sample hit "
        "their limit.")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Case:
    name: str
    model: Path
    vnnlib: Path | None = None

    def load(self) -> tuple[Network, Box]:
        network = exactprune.load(self.model)
        if self.vnnlib is not None:
            return network, exactprune.load_vnnlib(self.vnnlib).reshaped(network.input_shape)
        return network, uniform(0.0, 1.0, network.input_shape)


def cases() -> list[Case]:
    models, nets = ROOT / "models", SHARED / "nets"
    own = [Case(p.stem, p) for p in sorted(models.glob("*.pt")) if "conv" not in p.stem]
    given = [
        Case("mnist256x2_eps0.03", nets / "mnist-net_256x2.onnx", nets / "mnistfc-prop_0_0.03.vnnlib"),
        Case("mnist256x2_eps0.05", nets / "mnist-net_256x2.onnx", nets / "mnistfc-prop_0_0.05.vnnlib"),
        Case("acas1_1_p1", nets / "ACASXU_run2a_1_1_batch_2000.onnx", nets / "acasxu-prop_1.vnnlib"),
        Case("mnist_100-100", nets / "mnist_100-100.pt"),
        Case("cifar10_isa_116-248", nets / "cifar10_isa_116-248.pt"),
    ]
    return own + [c for c in given if c.model.exists()]


def samples(case: Case, network: Network, box: Box, count: int) -> tuple[np.ndarray, str]:
    """The training data the network was made from, as in the paper; random points of the box where there is none."""
    file = FASHION / "train-images-idx3-ubyte.gz"
    if case.name.startswith("fashion") and file.exists() and network.input_shape == (784,):
        with gzip.open(file) as stream:
            pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 784)
        return pixels / np.float64(255), f"{len(pixels)} training images"
    rng = np.random.default_rng(0)
    return np.concatenate(
        [box.sample(count // 2, rng), box.corners(count // 2, rng)]
    ), f"{count} random points and corners"


def ours(network: Network, box: Box, limit: float) -> tuple[Result, dict[str, object]]:
    clock = Clock()
    with measured(clock):
        result = exactprune.verify(network, box, VerifyOptions(time_limit=limit))
    statuses = {(k, i): Status(int(s)) for k, layer in enumerate(result.layers) for i, s in enumerate(layer.status)
                if s != Status.UNKNOWN}
    neurons = result.totals["neurons"]
    return Result(clock.wall, clock.cpu, result.totals["unknown"] == 0, "", neurons, neurons, statuses), {
        "totals": result.totals, "checker seconds": (result.check or {}).get("seconds"),
        "stages": {s.name: round(s.seconds, 4) for s in result.stages}}


def contradictions(mine: Result, other: Result) -> int:
    return sum(mine.statuses[at] is not status for at, status in other.statuses.items() if at in mine.statuses)


def run(case: Case, limit: float, each: float, chosen: set[str], points: int) -> dict[str, object]:
    network, box = case.load()
    mine, detail = ours(network, box, limit)
    data, words = samples(case, network, box, points)
    found: dict[str, Result] = {}
    if "isa" in chosen:
        found["isa"] = rivals.isa_published(network, box, data, limit)
    if "leo" in chosen:
        found["leo"] = rivals.leo_published(network, box, limit, each)
    if "isa, interval" in chosen:
        found["isa, interval"] = rivals.isa_interval(network, box, data, limit)
    if chosen & set(GIVEN):
        given = rivals.known(network, box)
        for name, run_rival in ((GIVEN[0], lambda: rivals.isa_given(network, box, given, limit)),
                                (GIVEN[1], lambda: rivals.leo_given(network, box, given, limit, each))):
            if name in chosen:
                result = run_rival()
                result.wall, result.cpu = result.wall + given.clock.wall, result.cpu + given.clock.cpu
                found[name] = result
    gurobi = rivals.gurobi_isa(network, box, data, limit)
    return {
        "case": case.name,
        "neurons": network.neurons,
        "samples": words,
        "gurobi": gurobi if isinstance(gurobi, str) else gurobi.wall,
        "ours": {"wall": mine.wall, "cpu": mine.cpu, "finished": mine.finished, **detail},
        "rivals": {
            name: {
                "wall": r.wall,
                "cpu": r.cpu,
                "finished": r.finished,
                "note": r.note,
                "asked": r.asked,
                "total": r.total,
                "decided": len(r.statuses),
                "contradictions": contradictions(mine, r),
                "ratio cpu": r.cpu / mine.cpu,
                "ratio wall": r.wall / mine.wall,
            }
            for name, r in found.items()
        },
    }


def table(rows: list[dict]) -> str:
    lines = ["| network | neurons | ours [s] | unknown | " + " | ".join(f"{n} [s] (ratio)" for n in RIVALS) + " |",
             "|---" * (4 + len(RIVALS)) + "|"]
    for row in rows:
        cells = []
        for name in RIVALS:
            r = row["rivals"].get(name)
            mark = "" if r is None else "" if r["finished"] else ">" if "lower" in r["note"] else "~"
            cells.append("" if r is None else f"{mark}{r['cpu']:.1f} ({mark}{r['ratio cpu']:.0f}x)")
        lines.append(
            f"| {row['case']} | {row['neurons']} | {row['ours']['cpu']:.2f} | {row['ours']['totals']['unknown']} | "
            + " | ".join(cells)
            + " |"
        )
    medians = [_median(rows, name) for name in RIVALS]
    return "\n".join(
        [
            *lines,
            "| median | | | | " + " | ".join(medians) + " |",
            "",
            NOTE,
        ]
    )


def _median(rows: list[dict], name: str) -> str:
    ratios = [row["rivals"][name]["ratio cpu"] for row in rows if name in row["rivals"]]
    return f"{statistics.median(ratios):.0f}x" if ratios else ""


def write(rows: list[dict], folder: Path, settings: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decide.json").write_text(json.dumps({"settings": settings, "cases": rows}, indent=1) + "\n")
    (folder / "decide.md").write_text(table(rows) + "\n")
    with (folder / "decide.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "neurons", "method", *COLUMNS, "note"])
        for row in rows:
            mine, n = row["ours"], row["neurons"]
            numbers = [mine["wall"], mine["cpu"], mine["finished"], n, n, n - mine["totals"]["unknown"], 0, 1]
            writer.writerow([row["case"], n, "ours", *numbers, ""])
            for name, r in row["rivals"].items():
                writer.writerow([row["case"], n, name, *(r[column] for column in COLUMNS), r["note"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated case names")
    parser.add_argument("--rivals", default=";".join(RIVALS), help=f"some of: {'; '.join(RIVALS)}")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each method on each network")
    parser.add_argument("--each", type=float, default=10.0, help="seconds for each MILP of a sampled rival")
    parser.add_argument("--samples", type=int, default=10_000, help="random points where there is no data")
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "decide")
    given = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # read by the libraries when they are loaded: start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, "1")})
    torch.set_num_threads(1)
    settings = {"limit": given.limit, "each": given.each, "threads": 1, "highs": version(), "torch": torch.__version__,
                "python": platform.python_version(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    wanted = [c for c in cases() if not given.only or c.name in given.only.split(",")]
    rivals.known(*cases()[0].load())  # warm up: imports and first-use costs are nobody's
    rows: list[dict] = []
    for case in wanted:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        rows.append(run(case, given.limit, given.each, set(given.rivals.split(";")), given.samples))
        write(rows, given.output, settings)
        print(table(rows[-1:]).splitlines()[2], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
