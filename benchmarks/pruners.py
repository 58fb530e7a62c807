"""Seconds and peak memory of every pruning method at 90 % on fashion 2x100 and 2x800, and of WoodFisher's block inverse.

    python benchmarks/pruners.py [--models fashion_2x100 fashion_2x800] [--samples 1000] [--methods ...] [--json FILE]

Each method runs in a process of its own, so peak memory is that method's. "Refused" is the method's own message where a
network is too large for it. The dense implementation next to a method is the obvious one: all per-sample gradients as one
matrix and, where it fits in --memory GiB, the whole n x n inverse. The block inverse is compared with the time that its
floating-point operations take at this machine's measured GEMM rate, both in one thread and interleaved.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import exactprune
from exactprune.errors import ExactPruneError
from exactprune.io import to_torch
from exactprune.pruners.problem import working_copy
from exactprune.pruners.woodfisher import block_inverse
from exactprune.training import load_data

MODELS = Path(__file__).resolve().parents[1] / "models"
METHODS: dict[str, dict[str, Any]] = {
    "random": {}, "magnitude": {}, "snip": {}, "grasp": {}, "synflow": {}, "obd": {}, "obs": {},
    "woodfisher": {"block": 784}, "mlprune": {}, "cbs": {}, "obc": {}, "sparsegpt": {}, "wanda": {}, "nisp": {},
    "scaling-up": {},
}


def one(model: str, method: str, samples: int) -> dict[str, Any]:
    """Run one method in this process."""
    data = load_data("fashion-mnist").first(samples)
    network = exactprune.load(MODELS / f"{model}.pt")
    try:
        result = exactprune.prune(network, method, 0.9, data, **METHODS[method])
    except ExactPruneError as error:
        return {"refused": str(error)}
    report = result.report
    return {"seconds": report.seconds, "mib": report.peak_bytes / 2**20, "gradients": report.gradients,
            "sparsity": report.sparsity}


def dense(model: str, samples: int, memory: float) -> dict[str, Any]:
    """Empirical Fisher OBS the obvious way: one backward pass per sample, one big matrix, one big inverse."""
    data = load_data("fashion-mnist").first(samples)
    module = working_copy(to_torch(exactprune.load(MODELS / f"{model}.pt")), torch.float64)
    weights = [p for p in module.parameters() if p.dim() > 1]
    n = sum(w.numel() for w in weights)
    began = time.perf_counter()
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(
        torch.nn.functional.cross_entropy(module(data.x[i:i + 1].double()), data.y[i:i + 1]), weights)])
        for i in range(min(samples, int(memory * 2**30 / 8 / n)))]
    seconds = (time.perf_counter() - began) / len(rows) * samples
    needs = 8 * n * n / 2**30
    return {"gradient_seconds": seconds, "extrapolated_from": len(rows),
            "inverse": f"{needs:,.0f} GiB, does not fit" if needs > memory else "fits"}


def block(repeats: int = 9) -> dict[str, float]:
    """Inverse of a 784-dimensional block from 1,000 gradients, against GEMM."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(1, 1000, 784, generator=generator, dtype=torch.float64)
    matrix = torch.randn(1000, 784, generator=generator, dtype=torch.float64)
    flops = 2 * 1000 * 784**2 + 784**3  # G^T G, then a Cholesky inverse (n^3 / 3 + 2 n^3 / 3)
    gemm, inverse, recursion = [], [], []
    for i in range(repeats):
        gemm.append(_seconds(lambda: matrix.T @ matrix) / (2 * 1000 * 784**2) * flops)
        inverse.append(_seconds(lambda: block_inverse(gradients, 1e-5)))
        if i < 2:
            recursion.append(_seconds(lambda: _recursion(gradients[0], 1e-5)))
    return {"inverse_ms": 1e3 * median(inverse), "gemm_ms_of_its_flops": 1e3 * median(gemm),
            "ratio": median(a / b for a, b in zip(inverse, gemm)), "rank_one_recursion_ms": 1e3 * median(recursion)}


def _recursion(gradients: torch.Tensor, damping: float) -> torch.Tensor:
    inverse = torch.eye(gradients.shape[1], dtype=gradients.dtype) / damping
    for g in gradients:
        along = inverse @ g
        inverse.addr_(along, along / (len(gradients) + g @ along), alpha=-1)
    return inverse


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["fashion_2x100", "fashion_2x800"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--memory", type=float, default=4.0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per method")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(one(*given.one, given.samples)))
        return
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                               "threads": 1, "samples": given.samples, "block": block()}
    print("block inverse:", results["block"], flush=True)
    for model in given.models:
        results[model] = {"dense": dense(model, given.samples, given.memory)}
        print(model, "dense:", results[model]["dense"], flush=True)
        for method in given.methods:
            results[model][method] = _run(model, method, given.samples, given.limit)
            print(model, method, results[model][method], flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def _run(model: str, method: str, samples: int, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--samples", str(samples), "--one", model, method]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"stopped": f"after {limit:g} s"}
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-300:]}


if __name__ == "__main__":
    main()
