"""Seconds and peak memory of every pruning method at 90 % on fashion 2x100 and 2x800, and of WoodFisher's block inverse.

    python benchmarks/pruners.py [--models ...] [--only NAME ...] [--samples 1000] [--out FILE] [--again]
    python benchmarks/pruners.py --write docs/pruners.md       # only the tables, from the recorded numbers

Each entry runs in a process of its own, so peak memory is that method's; times are processor and wall-clock seconds of one
thread, the decision alone (no loading). On a busy machine the processor seconds are what counts; the load is recorded.
"refused" is the method's own message where a network is too large for it or of the wrong kind. Rows are written as they
come, and a run goes on where it was interrupted (``--again`` measures anew).

The dense implementation beside an entry is the obvious one for the same numbers: one backward pass a sample and output for
curvature diagonals, the recursion of rank-one steps for WoodFisher's blocks, one row after the other with its whole inverse
for layer-wise OBS; it is timed on a part and extrapolated to the whole, or, where it needs the n x n matrix, its size is given.
The block inverse is compared with the time that its floating-point operations take at the GEMM rate measured in between.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _pruner_records import into, read_rows, write
from torch import Tensor

import exactprune
from exactprune.errors import ExactPruneError
from exactprune.pruners import decide, make
from exactprune.pruners.gradients import parameters
from exactprune.pruners.problem import Problem
from exactprune.pruners.woodfisher import block_inverse
from exactprune.pruning.api import as_module
from exactprune.pruning.facts import measured
from exactprune.training import load_data

MODELS = Path(__file__).resolve().parents[1] / "models"
SPARSITY = 0.9
GIB = 2**30
TRAINING = {"epochs": 1}
BLOCK = """The inverse of a 784-dimensional block from 1,000 gradients takes {ratio:.2f} times as long as its floating-point
operations take in GEMM ({block_inverse_ms:.0f} ms and {gemm_ms_of_its_flops:.0f} ms, medians, interleaved); the recursion of
rank-one steps takes {rank_one_recursion_ms:,.0f} ms.
"""
ENTRIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("random", "magnitude", "snip", "grasp", "synflow", "obd", "obs")},
    "obs, by neuron": ("obs", {"block": "neuron", "damping": 1e-4}),
    "woodfisher": ("woodfisher", {}), "woodfisher, blocks of 784": ("woodfisher", {"block": 784}),
    "mlprune": ("mlprune", {}), "cbs": ("cbs", {}), "cbs, 400 samples": ("cbs", {"samples": 400}),
    "obc": ("obc", {}), "sparsegpt": ("sparsegpt", {}), "wanda": ("wanda", {}),
    "nisp": ("nisp", {}), "nisp, budget of MACs": ("nisp", {"budget": "macs"}), "scaling-up": ("scaling-up", {}),
    **{f"{name}, 1 epoch": (name, TRAINING) for name in ("lottery", "set", "dsr", "deep-r")},
    "epsilon-resnet": ("epsilon-resnet", {}),
}


def one(model: str, entry: str, samples: int) -> dict[str, Any]:
    """Run one entry in this process; the decision is what is timed."""
    method, options = ENTRIES[entry]
    problem, pruner = problem_of(model, samples), make(method, **options)
    problem.model, problem.data  # noqa: B018 (made before the clock starts)
    began = time.process_time()
    try:
        with measured(problem.cost, problem.device):
            plan = decide(pruner, problem, SPARSITY)
    except ExactPruneError as error:
        return {"refused": str(error)}
    spent = time.process_time() - began
    counted = plan.masks if plan.units is None else plan.units
    removed = sum(int((~kept).sum()) for kept in counted.values())
    return {"processor_seconds": round(spent, 3), "seconds": round(problem.cost.seconds, 3),
            "peak_mib": round(problem.cost.peak_bytes / 2**20, 1), "gradients": problem.cost.gradients, "removed": removed}


# -- the obvious dense implementations ---------------------------------------------------------------------------------


def problem_of(model: str, samples: int) -> Problem:
    data = load_data("fashion-mnist").first(samples)
    return Problem(as_module(exactprune.load(MODELS / f"{model}.pt")), data.x, data.y)


def dense(model: str, samples: int, entry: str) -> dict[str, Any]:
    """Seconds of the obvious implementation, or the size of the matrix that it needs."""
    problem = problem_of(model, samples)
    if entry in ("obs", "cbs", "mlprune"):
        return {"dense": f"{8 * problem.size**2 / GIB:,.0f} GiB matrix"}
    work = {"obd": diagonal_by_samples, "woodfisher, blocks of 784": recursion_by_blocks, "obc": obc_by_rows}.get(entry)
    return {} if work is None else {"dense_processor_seconds": round(work(problem), 2)}


def diagonal_by_samples(problem: Problem, measured: int = 20) -> float:
    """The Gauss-Newton diagonal with one backward pass per sample and output."""
    weights, total = parameters(problem), [torch.zeros_like(w) for w in parameters(problem)]

    def sample(i: int) -> None:
        output = problem.model(problem.data[0][i:i + 1])[0]
        p = output.detach().softmax(0)
        root = torch.linalg.cholesky(torch.diag(p) - torch.outer(p, p) + 1e-12 * torch.eye(len(p), dtype=p.dtype))
        for column in root.T:
            for sum_, g in zip(total, torch.autograd.grad(output @ column, weights, retain_graph=True)):
                sum_ += g.square()

    return _seconds(lambda: [sample(i) for i in range(measured)]) / measured * len(problem.data[0])


def recursion_by_blocks(problem: Problem, measured: int = 2) -> float:
    """Sherman-Morrison, one gradient after the other, for blocks of 784."""
    gradients = torch.randn(len(problem.data[0]), 784, dtype=torch.float64)
    return _seconds(lambda: [recursion(gradients, 1e-5) for _ in range(measured)]) / measured * problem.size / 784


def obc_by_rows(problem: Problem) -> float:
    """One row after the other, with a rank-one update of its whole inverse at every step."""
    total = 0.0
    for weight in problem.weights.values():
        columns = weight[0].numel()
        root = torch.randn(columns, 2 * columns, dtype=torch.float64)
        inverse = torch.linalg.inv(root @ root.T)
        total += len(weight) * _seconds(partial(_row, weight[0].flatten().clone(), inverse))
    return total


def _row(w: Tensor, inverse: Tensor) -> None:
    alive = torch.ones_like(w, dtype=torch.bool)
    for _ in range(len(w)):
        diagonal = inverse.diagonal()
        q = int((w.square() / diagonal).masked_fill(~alive, torch.inf).argmin())
        w -= w[q] / diagonal[q] * inverse[q]
        inverse -= torch.outer(inverse[q], inverse[q] / diagonal[q])
        alive[q] = False
        inverse[q, q] = 1


def recursion(gradients: Tensor, damping: float) -> Tensor:
    """The paper's Eq. 8, as written."""
    inverse = torch.eye(gradients.shape[1], dtype=gradients.dtype) / damping
    for g in gradients:
        along = inverse @ g
        inverse.addr_(along, along / (len(gradients) + g @ along), alpha=-1)
    return inverse


def block(repeats: int = 9) -> dict[str, float]:
    """Inverse of a 784-dimensional block from 1,000 gradients, against GEMM, interleaved."""
    gradients = torch.randn(1, 1000, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.randn(1000, 784, dtype=torch.float64)
    product = 2 * 1000 * 784**2
    flops = product + 784**3  # G^T G, then a Cholesky inverse (n^3 / 3 + 2 n^3 / 3)
    gemm, inverse = [], []
    for _ in range(repeats):
        gemm.append(_seconds(lambda: matrix.T @ matrix) / product * flops)
        inverse.append(_seconds(lambda: block_inverse(gradients, 1e-5)))
    steps = _seconds(lambda: recursion(gradients[0], 1e-5))
    return {"block_inverse_ms": round(1e3 * median(inverse), 1), "gemm_ms_of_its_flops": round(1e3 * median(gemm), 1),
            "ratio": round(median(a / b for a, b in zip(inverse, gemm)), 3), "rank_one_recursion_ms": round(1e3 * steps, 1)}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# -- the page ----------------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> str:
    """The block inverse, then one table a model."""
    head = "| method | processor s | seconds | peak MiB | obvious dense implementation |\n|---|---|---|---|---|"
    text = [BLOCK.format(**r) for r in rows if "ratio" in r]
    for model in dict.fromkeys(r["model"] for r in rows if "ratio" not in r):
        lines = [f"\n`{model}`:\n", head, *(_line(r) for r in rows if r["model"] == model)]
        absent = [f"`{name}`" for name in ENTRIES if not any((r["model"], r["entry"]) == (model, name) for r in rows)]
        text.append("\n".join(lines) + "\n" + (f"\nNot measured: {', '.join(absent)}.\n" if absent else ""))
    return "".join(text)


def _line(r: dict[str, Any]) -> str:
    beside = r.get("dense") or (f"{r['dense_processor_seconds']:,.1f} processor s" if "dense_processor_seconds" in r else "")
    if "seconds" in r:
        return f"| {r['entry']} | {r['processor_seconds']:,.2f} | {r['seconds']:,.2f} | {r['peak_mib']:,.0f} | {beside} |"
    why = f"refused: {r['refused']}".split(";")[0].split("):")[0] if "refused" in r else r.get("stopped", "failed")
    return f"| {r['entry']} | {why} | | | {beside} |"


# -- the run -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["fashion_2x100", "fashion_2x800"])
    parser.add_argument("--only", nargs="*", help="entries; all by default")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per entry")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already, too")
    parser.add_argument("--out", type=Path, default=Path("reports/pruners/cost.json"))
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="rows of other processes to add")
    parser.add_argument("--write", type=Path, help="page that gets the tables; nothing is measured")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(one(*given.one, given.samples)))
        return
    rows = read_rows(given.out)
    if given.join:
        joined = {(r["model"], r["entry"]): r for path in (given.out, *given.join) for r in read_rows(path)}
        rows = sorted(joined.values(), key=_place)
        write(given.out, settings(given), rows)
    elif not given.write:
        rows = run(given, rows)
    text = tables(rows)
    given.out.with_suffix(".md").write_text(text)
    if given.write:
        into(given.write, "cost", text)
    print(text)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    entries = {name: {"method": m, "options": o} for name, (m, o) in ENTRIES.items()}
    return {"sparsity": SPARSITY, "samples": given.samples, "entries": entries}


def run(given: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure what is missing, or everything asked for with ``--again``; each row replaces its older self."""
    wanted = [(m, e) for m in ("block", *given.models) for e in (["block"] if m == "block" else ENTRIES)
              if given.only is None or e in given.only]
    for model, entry in wanted:
        if not given.again and any((r["model"], r["entry"]) == (model, entry) for r in rows):
            continue
        found = block() if entry == "block" else \
            _run(model, entry, given.samples, given.limit) | dense(model, given.samples, entry)
        new = {"model": model, "entry": entry, "load": round(os.getloadavg()[0], 1)} | found
        rows = sorted([r for r in rows if (r["model"], r["entry"]) != (model, entry)] + [new], key=_place)
        write(given.out, settings(given), rows)
        print(new, flush=True)
    return rows


def _place(row: dict[str, Any]) -> tuple[bool, str, int]:
    return row["model"] != "block", row["model"], ["block", *ENTRIES].index(row["entry"])


def _run(model: str, entry: str, samples: int, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--samples", str(samples), "--one", model, entry]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"stopped": f"stopped after {limit:g} s"}
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-300:]}


if __name__ == "__main__":
    main()
