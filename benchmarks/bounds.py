"""How fast are the bounds: sound float64 CROWN of every ReLU layer, against this machine's GEMM rate and against
auto_LiRPA.

    python benchmarks/bounds.py                                      # every network that is there
    AUTO_LIRPA=/path/to/auto_LiRPA python benchmarks/bounds.py       # with the rival's columns
    python benchmarks/bounds.py --only resnet_2b,fashion_5x100 --repeats 21

One process, the stated number of threads. Ours, the rival under each of its settings, and one large GEMM take turns,
so that a busy machine is busy for all; medians and minima of all turns are kept. Ratios are of medians.

``gemm_ms`` is what the products of the backward passes would take at the rate of that GEMM: 2 x multiply-adds x rows
that are open after interval bounds x 2 sides, for every dense or convolutional node a pass goes through on the full
feature map (the first one, which only picks rows of a matrix, left out). ``gemm_all_ms`` is the same for all rows
instead of the open ones.

Checked on each network: the rival's verdicts are among ours, and both sides' bounds enclose sampled pre-activations.
Raw numbers go to ``reports/bounds/`` (JSON, CSV, Markdown).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import _auto_lirpa
import numpy as np
import torch

import exactprune
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.layerwise import crown_bounds, first_is_exact, start
from exactprune.bounds.program import Program, compile_network
from exactprune.domain import Box, uniform
from exactprune.network import INPUT, Network, Node
from exactprune.network import build as build_network
from exactprune.ops import Affine, ReLU

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", ROOT.parent / "shared"))
SAMPLES, SEED = 2000, 0
GEMM = (1600, 800, 784)  # rows, inner, columns of the reference product
LIMITS = {"dense_2x800": 2.5, "fashion_2x800": 2.5, "dense_5x100": 4.0, "fashion_5x100": 4.0, "resnet_2b": 6.0}
FASTER = {"resnet_2b": 3.0, "dense_5x100": 3.0, "fashion_5x100": 3.0, "acas": 3.0}
COLUMNS = (
    "case",
    "neurons",
    "open_rows",
    "ours_ms",
    "ours_min_ms",
    "rival_ms",
    "rival_min_ms",
    "rival_setting",
    "ratio",
    "gemm_ms",
    "over_gemm",
    "gemm_all_ms",
    "settled_ours",
    "settled_rival",
    "rival_only",
    "enclosed_ours",
    "enclosed_rival",
    "target",
)


@dataclass(frozen=True)
class Case:
    """A network and its box."""

    name: str
    make: Callable[[], Network]
    vnnlib: Path | None = None
    given: bool = False  # one of the networks in the shared folder

    def load(self) -> tuple[Network, Box]:
        network = self.make()
        if self.vnnlib is not None:
            return network, exactprune.load_vnnlib(self.vnnlib).reshaped(network.input_shape)
        return network, uniform(0.0, 1.0, network.input_shape)


def random_dense(*widths: int) -> Network:
    """Dense ReLU network with He-uniform float32 weights (seeded), no dead neurons: every row of later layers is open
    on [0, 1]."""
    rng = np.random.default_rng(SEED)
    nodes: list[Node] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        limit = (6 / inputs) ** 0.5
        weight, bias = rng.uniform(-limit, limit, (outputs, inputs)), rng.uniform(-0.1, 0.1, outputs)
        nodes.append(Node(f"dense{i}", Affine(weight, bias), (len(nodes) - 1,)))
        if i < len(widths) - 2:
            nodes.append(Node(f"relu{i}", ReLU(), (len(nodes) - 1,)))
    return build_network(nodes, (widths[0],), np.float32, name="x".join(map(str, widths)))


def cases() -> list[Case]:
    """Random dense networks, those under models/, and those in the shared folder with their boxes."""
    models, nets = ROOT / "models", SHARED / "nets"
    found = [Case("dense_2x800", lambda: random_dense(784, 800, 800, 10)),
             Case("dense_5x100", lambda: random_dense(784, 100, 100, 100, 100, 100, 10))]
    for path in sorted([*models.glob("*.pt"), *models.glob("*.onnx")]):
        shape = (1, 28, 28) if "conv" in path.stem else None
        found.append(Case(path.stem, lambda path=path, shape=shape: exactprune.load(path, input_shape=shape)))
    for path in sorted([*nets.glob("*.pt"), *nets.glob("*.onnx")]):
        boxes = sorted(nets.glob(f"{_box_stem(path.stem)}*.vnnlib"))
        for box in boxes or [None]:
            name = path.stem if len(boxes) < 2 and not path.stem.startswith("ACAS") else _short(path.stem, box)
            found.append(Case(name, lambda path=path: exactprune.load(path), box, given=True))
    return found


def _box_stem(stem: str) -> str:
    return "acasxu" if stem.startswith("ACAS") else "mnistfc" if stem.startswith("mnist-net") else stem


def _short(stem: str, box: Path | None) -> str:
    assert box is not None
    prop = box.stem.split("prop_")[1]
    return f"acas_{stem[13:16]}_p{prop}" if stem.startswith("ACAS") else f"{stem}_eps{prop.split('_')[-1]}"


# -- the products of the backward passes -------------------------------------------------------------------------


def open_after_intervals(program: Program, lower: torch.Tensor, upper: torch.Tensor) -> dict[int, int]:
    """Layer -> rows that interval bounds (after CROWN on the layers before) leave open, where a pass is needed."""
    state, found = start(program, lower, upper), {}
    for layer in range(program.layers):
        state.enter(layer)
        if not first_is_exact(program, layer):
            found[layer] = len(state.open_rows(layer))
            state.crown(layer, state.open_rows(layer))
    return found


def macs_of_a_row(network: Network, layer: int) -> int:
    """Multiply-adds of taking one row from a ReLU layer's pre-activation back to the input."""
    reached, free = {network.nodes[network.relus[layer]].inputs[0]}, set()
    position = max(reached)
    free.update(_first_maps(network, position))
    total = 0
    for i in range(position, INPUT, -1):
        if i in reached:
            node = network.nodes[i]
            reached.update(node.inputs)
            if i not in free and node.op.kind in ("Affine", "Conv2d"):
                total += node.op.macs(network.shape_of(node.inputs[0]))
    return total


def _first_maps(network: Network, position: int) -> Iterator[int]:
    """The maps met first on the way back: applied to a unit row, they pick a row of a matrix."""
    if position == INPUT:
        return
    node = network.nodes[position]
    if node.op.kind == "Add" or node.op.kind in ("Reshape", "Transpose"):
        for i in node.inputs:
            yield from _first_maps(network, i)
    else:
        yield position


# -- measuring -------------------------------------------------------------------------------------------------


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """(processor, wall) seconds of a call, after one that brings its data and code back into the caches."""
    call()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def take_turns(calls: dict[str, Callable[[], object]], repeats: int, limit: float) -> dict[str, list[tuple[float, float]]]:
    """(processor, wall) seconds of every call: ``repeats`` turns, but no new one after the fifth and ``limit`` seconds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 5 and time.perf_counter() - begin > limit:
            break
        for name, call in calls.items():
            times[name].append(_seconds(call))
    return times


def gemm() -> Callable[[], object]:
    rows, inner, columns = GEMM
    a, b = torch.rand(rows, inner, dtype=torch.float64), torch.rand(inner, columns, dtype=torch.float64)
    out = torch.empty(rows, columns, dtype=torch.float64)
    return lambda: torch.mm(a, b, out=out)


def sampled(network: Network, box: Box) -> list[tuple[np.ndarray, np.ndarray]]:
    """Smallest and largest pre-activation of every ReLU layer seen on random points and corners, in float64."""
    wide, rng = network.astype(np.float64), np.random.default_rng(SEED)
    points = np.concatenate([box.sample(SAMPLES // 2, rng), box.corners(SAMPLES // 2, rng)])
    values: dict[int, np.ndarray] = {INPUT: points}
    for i, node in enumerate(wide.nodes):
        values[i] = node.op.evaluate(*(values[j] for j in node.inputs))
    at = [values[wide.nodes[r].inputs[0]].reshape(len(points), -1) for r in wide.relus]
    return [(z.min(axis=0), z.max(axis=0)) for z in at]


Pairs = list[tuple[np.ndarray, np.ndarray]]


def enclosed(bounds: Pairs, seen: Pairs) -> bool:
    """Whether the bounds hold the sampled values; 1e-9 of the range is left for the samples' own rounding."""
    return all(bool((low <= least + 1e-9 * (1 + abs(least))).all() and (most <= up + 1e-9 * (1 + abs(most))).all())
               for (low, up), (least, most) in zip(bounds, seen, strict=True))


def settled(bounds: Pairs) -> list[np.ndarray]:
    """Per layer: -1 stably inactive, 1 stably active, 0 open."""
    return [np.where(up <= 0, -1, np.where(low >= 0, 1, 0)) for low, up in bounds]


def run(case: Case, rival_version: str | None, repeats: int, limit: float) -> dict[str, object]:
    network, box = case.load()
    program = compile_network(network)
    lower, upper = program.box(box)

    def ours() -> tuple[NodeBounds, ...]:
        return crown_bounds(program, lower, upper)

    others, failed = _auto_lirpa.rivals(network, box) if rival_version else ([], {})
    calls: dict[str, Callable[[], object]] = {"ours": ours, "gemm": gemm(), **{r.setting: r.run for r in others}}
    torch.set_default_dtype(torch.float64)  # the rival makes some of its tensors in the default dtype
    try:
        times = take_turns(calls, repeats, limit)
    finally:
        torch.set_default_dtype(torch.float32)
    clock = 0 if torch.get_num_threads() == 1 else 1  # processor seconds mean nothing with several threads
    median = {name: statistics.median(t[clock] for t in turns) for name, turns in times.items()}
    least = {name: min(t[clock] for t in turns) for name, turns in times.items()}
    wall = {name: statistics.median(t[1] for t in turns) for name, turns in times.items()}
    best = min(others, key=lambda r: median[r.setting], default=None)
    rate = 2 * np.prod(GEMM) / median["gemm"]
    rows = open_after_intervals(program, lower, upper)
    flops = sum(4 * count * macs_of_a_row(network, layer) for layer, count in rows.items())
    every = sum(4 * program.size(program.preactivation(layer)) * macs_of_a_row(network, layer) for layer in rows)
    seen = sampled(network, box)
    mine = [(b.lower[0].numpy(), b.upper[0].numpy()) for b in ours()]
    row: dict[str, object] = {
        "case": case.name,
        "shared": case.given,
        "neurons": network.neurons,
        "box": box.source,
        "layers": program.layers,
        "open_rows": sum(rows.values()),
        "open_by_layer": list(rows.values()),
        "ours_ms": 1e3 * median["ours"],
        "ours_min_ms": 1e3 * least["ours"],
        "turns": len(times["ours"]),
        "gflops": rate / 1e9,
        "gemm_flop": flops,
        "gemm_ms": 1e3 * flops / rate,
        "gemm_all_ms": 1e3 * every / rate,
        "over_gemm": median["ours"] / (flops / rate) if flops else None,
        "settled_ours": sum(int((s != 0).sum()) for s in settled(mine)),
        "enclosed_ours": enclosed(mine, seen),
        "failed_settings": failed,
        "load": os.getloadavg()[0],
        "wall_ms": 1e3 * wall["ours"],
        "cpu_and_wall_ms": {k: [[round(1e3 * t, 4) for t in turn] for turn in v] for k, v in times.items()},
    }
    if best is not None:
        theirs = best.bounds()
        row |= {
            "rival_ms": 1e3 * median[best.setting],
            "rival_min_ms": 1e3 * least[best.setting],
            "rival_setting": best.setting,
            "ratio": median[best.setting] / median["ours"],
            "ratio_min": least[best.setting] / least["ours"],
            "rival_wall_ms": 1e3 * wall[best.setting], "ratio_wall": wall[best.setting] / wall["ours"],
            "settled_rival": sum(int((s != 0).sum()) for s in settled(theirs)),
            "enclosed_rival": enclosed(theirs, seen),
            "rival_only": sum(
                int(((b != 0) & (a != b)).sum()) for a, b in zip(settled(mine), settled(theirs), strict=True)
            ),
        }
    row["target"] = verdict(row)
    return row


def verdict(row: dict) -> str:
    """Which of the targets that apply are met."""
    name, words = row["case"], []
    if name in LIMITS:
        words.append(f"{'met' if row['over_gemm'] <= LIMITS[name] else 'MISSED'} (GEMM {LIMITS[name]:g}x)")
    factor = next((f for prefix, f in FASTER.items() if name.startswith(prefix)), 1.0 if row["shared"] else None)
    if factor and "ratio" in row:
        words.append(f"{'met' if row['ratio'] >= factor else 'MISSED'} (rival {factor:g}x)")
    checks = row["enclosed_ours"] and row.get("rival_only", 0) == 0
    return ", ".join(words) + ("" if checks else " CHECKS FAILED")


# -- output ----------------------------------------------------------------------------------------------------


def _cell(value: object, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(rows: list[dict], settings: dict[str, object]) -> str:
    """Markdown."""
    head = (
        "network",
        "neurons",
        "open rows",
        "ours [ms]",
        "auto_LiRPA [ms]",
        "faster",
        "GEMM [ms]",
        "ours / GEMM",
        "settled ours / rival",
        "targets",
    )
    lines = [f"{k}: {v}  " for k, v in settings.items()]
    clock = "processor" if settings.get("threads") == 1 else "wall"
    lines += ["", f"Medians of {clock} times, minima in brackets.", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        rival = f"{_cell(r['rival_ms'])} ({_cell(r['rival_min_ms'])})" if "rival_ms" in r else ""
        lines.append(
            f"| {r['case']} | {r['neurons']} | {r['open_rows']} | {_cell(r['ours_ms'])} ({_cell(r['ours_min_ms'])}) | {rival} | "
            f"{_cell(r.get('ratio'), 1)}x | {_cell(r['gemm_ms'])} | {_cell(r['over_gemm'], 1)} | "
            f"{r['settled_ours']} / {r.get('settled_rival', '')} | {r['target']} |"
        )
    return "\n".join(lines)


def write(rows: list[dict], folder: Path, settings: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bounds.json").write_text(json.dumps({"settings": settings, "cases": rows}, indent=1) + "\n")
    (folder / "bounds.md").write_text(table(rows, settings) + "\n")
    with (folder / "bounds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else "no AVX2"
        model = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
    return f"{model}, {flags}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated beginnings of case names")
    parser.add_argument("--repeats", type=int, default=31, help="turns for each network")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for each network, after the fifth turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "bounds")
    given = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(given.threads):  # read by the libraries when they are loaded: start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": str(given.threads)})
    torch.set_num_threads(given.threads)
    rival = _auto_lirpa.version()
    settings = {"command": " ".join(["python benchmarks/bounds.py", *sys.argv[1:]]),
                "machine": machine(), "threads": given.threads,
                "load average at the start": os.getloadavg(), "dtype": "float64", "seed": SEED, "torch": torch.__version__,
                "numpy": np.__version__, "python": platform.python_version(), "exactprune": exactprune.__version__,
                "auto_LiRPA": rival or "absent: set AUTO_LIRPA to a checkout for its columns",
                "reference GEMM": "x".join(map(str, GEMM))}
    wanted = [c for c in cases() if not given.only or c.name.startswith(tuple(given.only.split(",")))]
    rows: list[dict] = []
    for case in wanted:
        rows.append(run(case, rival, given.repeats, given.limit))
        settings["load average at the end"] = os.getloadavg()
        write(rows, given.output, settings)
        print(table(rows[-1:], {}).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows, settings))


if __name__ == "__main__":
    main()
