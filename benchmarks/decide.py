"""Deciding every neuron: the cascade with certificates against the published algorithms on HiGHS.

    python benchmarks/decide.py                                  # every network that is there
    python benchmarks/decide.py --only fashion_2x100,acas1_1_p1 --limit 120

One process, one thread, the same time limit for everyone; verdicts are compared wherever two sides have one. Raw
numbers go to ``reports/decide/`` (JSON and CSV) after every method, a table to the screen; what is there already and
was not asked for again stays, so that a long comparison can be made in parts. See benchmarks/rivals.py for what the
rivals are and how those that do not finish are extrapolated. Ratios are of processor seconds, which a busy machine
distorts little; wall-clock seconds stand next to them.
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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rivals
import torch
from rivals import Result

import exactprune
from exactprune.claim import Status
from exactprune.deciders.highs import version
from exactprune.domain import Box, uniform
from exactprune.network import Network
from exactprune.options import VerifyOptions

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", ROOT.parent / "shared"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
GIVEN = ("isa, our bounds", "leo, our bounds")
RIVALS = ("isa", "leo", *GIVEN, "isa, interval", "isa, gurobi")
COLUMNS = ("wall", "cpu", "finished", "asked", "total", "decided")
NOTE = ("Processor seconds, one thread. ~ extrapolated from a sample; > a lower bound: parts of the sample hit "
        "their limit. Ratios to ours with certificate and check; for rivals given our bounds, which prove nothing, to "
        "ours without.")
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


class Marks:
    """Progress that notes when the certificate begins: what comes before is what the rivals do too."""

    def __init__(self) -> None:
        self.searched = (time.perf_counter(), time.process_time())

    def stage(self, name: str, total: int | None = None) -> None:
        if name == "certificate":
            self.searched = (time.perf_counter(), time.process_time())

    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


def ours(network: Network, box: Box, limit: float, repeat: int) -> dict[str, object]:
    """Median of up to ``repeat`` runs (by processor seconds), with the verdicts."""
    runs = []
    while len(runs) < repeat and sum(r["wall"] for r in runs) < 60:
        marks, wall, cpu = Marks(), time.perf_counter(), time.process_time()
        result = exactprune.verify(network, box, VerifyOptions(time_limit=limit), progress=marks)
        runs.append({
            "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
            "wall, no certificate": marks.searched[0] - wall, "cpu, no certificate": marks.searched[1] - cpu,
            "finished": result.totals["unknown"] == 0, "totals": result.totals,
            "accepted": (result.check or {}).get("accepted"), "checker wall": (result.check or {}).get("seconds"),
            "stages": {s.name: round(s.seconds, 4) for s in result.stages},
            "statuses": ["".join(str(int(s)) for s in layer.status) for layer in result.layers]})
    runs.sort(key=lambda r: r["cpu"])
    return {**runs[(len(runs) - 1) // 2], "runs": len(runs), "cpu of all runs": [round(r["cpu"], 4) for r in runs]}


def contradictions(mine: dict, statuses: dict[tuple[int, int], Status]) -> list[list[int]]:
    """(layer, neuron, ours, theirs) where both decided, differently."""
    known = {(k, i): int(s) for k, layer in enumerate(mine["statuses"]) for i, s in enumerate(layer) if s != "0"}
    return [[*at, known[at], int(s)] for at, s in statuses.items() if at in known and known[at] != int(s)]


def rival(name: str, network: Network, box: Box, data: np.ndarray, limit: float, each: float) -> Result | str:
    """One rival's run; a string says why there is none."""
    if name == "isa":
        return rivals.isa_published(network, box, data, limit)
    if name == "leo":
        return rivals.leo_published(network, box, limit, each)
    if name == "isa, interval":
        return rivals.isa_interval(network, box, data, limit)
    if name == "isa, gurobi":
        return rivals.gurobi_isa(network, box, data, limit)
    given = rivals.known(network, box)
    r = rivals.isa_given(network, box, given, limit) if name == GIVEN[0] else \
        rivals.leo_given(network, box, given, limit, each)
    return replace(r, wall=r.wall + given.clock.wall, cpu=r.cpu + given.clock.cpu)


def run(case: Case, row: dict, chosen: Sequence[str], given: argparse.Namespace) -> Iterator[dict]:
    """The case's row, after each method; what is in the row already and was not chosen stays."""
    network, box = case.load()
    data, words = samples(case, network, box, given.samples)
    row = {"case": case.name, "neurons": network.neurons, "samples": words, "rivals": {}} | row
    if "ours" in chosen or "ours" not in row:
        row["ours"] = ours(network, box, given.limit, given.repeat)
        yield row
    for name in [n for n in RIVALS if n in chosen]:
        print(f"  {name}", file=sys.stderr, flush=True)
        load = os.getloadavg()[0]
        r = rival(name, network, box, data, given.limit, given.each)
        row["rivals"][name] = {"note": r} if isinstance(r, str) else {
            "wall": r.wall, "cpu": r.cpu, "finished": r.finished, "note": r.note, "asked": r.asked, "total": r.total,
            "decided": len(r.statuses), "contradictions": contradictions(row["ours"], r.statuses),
            "limit": given.limit, "each": given.each, "load": load}
        yield row


def ratio(row: dict, name: str) -> float:
    """A rival's processor seconds in units of ours; those given our bounds are compared without certificates."""
    mine = row["ours"]["cpu, no certificate" if name in GIVEN else "cpu"]
    return row["rivals"][name]["cpu"] / mine


def has(row: dict, name: str) -> bool:
    return "cpu" in row["rivals"].get(name, {})


def mark(r: dict) -> str:
    return "" if r["finished"] else ">" if "lower" in r["note"] else "~"


def table(rows: list[dict]) -> str:
    names = [n for n in RIVALS if any(has(row, n) for row in rows)]
    head = ["network", "neurons", "unknown", "ours [s]", "no certificate [s]", *(f"{n} [s] (ratio)" for n in names)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        mine = row["ours"]
        cells = [f"{mark(r := row['rivals'][n])}{r['cpu']:.3g} ({mark(r)}{ratio(row, n):.3g}x)" if has(row, n) else ""
                 for n in names]
        first = [row["case"], row["neurons"], mine["totals"]["unknown"], f"{mine['cpu']:.3f}",
                 f"{mine['cpu, no certificate']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*first, *cells])) + " |")
    medians = [f"{statistics.median(ratio(row, n) for row in rows if has(row, n)):.3g}x" for n in names]
    least = [f"{min(ratio(row, n) for row in rows if has(row, n)):.3g}x" for n in names]
    return "\n".join([*lines, f"| median | | | | | {' | '.join(medians)} |", f"| least | | | | | {' | '.join(least)} |",
                      "", NOTE])


def write(rows: list[dict], folder: Path, settings: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decide.json").write_text(json.dumps({"settings": settings, "cases": rows}, indent=1) + "\n")
    (folder / "decide.md").write_text(table(rows) + "\n")
    with (folder / "decide.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "neurons", "method", *COLUMNS, "contradictions", "ratio cpu", "note"])
        for row in rows:
            mine, n = row["ours"], row["neurons"]
            numbers = [mine["wall"], mine["cpu"], mine["finished"], n, n, n - mine["totals"]["unknown"], 0, 1]
            writer.writerow([row["case"], n, "ours", *numbers, ""])
            for name, r in row["rivals"].items():
                if has(row, name):
                    writer.writerow([row["case"], n, name, *(r[column] for column in COLUMNS),
                                     len(r["contradictions"]), ratio(row, name), r["note"]])


def stored(folder: Path) -> dict[str, dict]:
    """Rows of an earlier run in the folder, by case."""
    file = folder / "decide.json"
    return {row["case"]: row for row in json.loads(file.read_text())["cases"]} if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated case names, in this order")
    parser.add_argument("--methods", default="ours;" + ";".join(RIVALS), help=f"some of: ours; {'; '.join(RIVALS)}")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each method on each network")
    parser.add_argument("--each", type=float, default=10.0, help="seconds for each MILP of a sampled rival")
    parser.add_argument("--samples", type=int, default=10_000, help="random points where there is no data")
    parser.add_argument("--repeat", type=int, default=5, help="runs of ours, of which the median counts")
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "decide")
    given = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # read by the libraries when they are loaded: start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREADS, "1")})
    torch.set_num_threads(1)
    settings = {"threads": 1, "highs": version(), "torch": torch.__version__, "python": platform.python_version(),
                "machine": platform.machine(), "cpus": os.cpu_count()}
    known = {c.name: c for c in cases()}
    wanted = [known[name] for name in given.only.split(",")] if given.only else list(known.values())
    ours(*next(iter(known.values())).load(), given.limit, 1)  # warm up: imports and first-use costs are nobody's
    for case in wanted:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        for row in run(case, stored(given.output).get(case.name, {}), given.methods.split(";"), given):
            rows = stored(given.output) | {case.name: row}  # another process may have added rows meanwhile
            write([rows[name] for name in known if name in rows], given.output, settings)
        print(table([stored(given.output)[case.name]]).splitlines()[2], file=sys.stderr, flush=True)
    print(table(list(stored(given.output).values())))


if __name__ == "__main__":
    main()
