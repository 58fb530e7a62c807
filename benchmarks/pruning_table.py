"""Real test loss of pruned networks: methods x sparsities x seeds, after pruning and after the same fine-tuning.

    python benchmarks/pruning_table.py [--seeds 5] [--epochs 10] [--finetune 2] [--samples 1000] [--markdown FILE]

Every seed trains its own dense fashion 784-100-100-10 network; each method prunes it by 50, 80, 90 and 95 % with gradients
of the first --samples training images; then test loss and accuracy, before and after fine-tuning with masks kept. obs is
refused at this size (89,400 weights) and is listed as refused; "obc" is the exact layer-wise OBS.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import exactprune
from exactprune.errors import ExactPruneError
from exactprune.training import DataSet, TrainOptions, accuracy, load_data, mean_loss, train

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
METHODS: dict[str, dict[str, Any]] = {
    "random": {}, "magnitude": {}, "obd": {}, "obs": {}, "woodfisher": {"block": 784, "damping": 1e-3},
    "cbs": {"damping": 1e-3}, "obc": {"damping": 0.01},
}


def dense(data: DataSet, seed: int, epochs: int) -> nn.Module:
    """A trained 784-100-100-10 network."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    return train(net, data.x, data.y, TrainOptions(epochs=epochs, seed=seed)).module


def measure(net: nn.Module, data: DataSet) -> dict[str, float]:
    return {"loss": mean_loss(net, data.x_test, data.y_test), "accuracy": accuracy(net, data.x_test, data.y_test)}


def row(net: nn.Module, data: DataSet, method: str, sparsity: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    options = METHODS[method] | ({"seed": seed} if method == "random" else {})
    try:
        result = exactprune.prune(net, method, sparsity, data.first(given.samples), **options)
    except ExactPruneError as error:
        return {"refused": str(error)}
    tuned = train(result.module, data.x, data.y, TrainOptions(epochs=given.finetune, lr=0.01, seed=seed), masks=result.masks)
    return {"pruned": measure(result.module, data), "tuned": measure(tuned.module, data)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | sparsity | loss after pruning | accuracy | loss after fine-tuning | accuracy |",
             "|---|---|---|---|---|---|"]
    for method in METHODS:
        for sparsity in SPARSITIES:
            found = [r for r in rows if r["method"] == method and r["sparsity"] == sparsity]
            if found and "refused" in found[0]:
                lines.append(f"| {method} | {sparsity:.0%} | refused | | | |")
            elif found:
                cells = [_cell([r[stage][what] for r in found]) for stage in ("pruned", "tuned") for what in ("loss", "accuracy")]
                lines.append(f"| {method} | {sparsity:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--finetune", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load_data("fashion-mnist"), []
    for seed in range(given.seeds):
        net = dense(data, seed, given.epochs)
        print(seed, "dense", measure(net, data), flush=True)
        for method in METHODS:
            for sparsity in SPARSITIES:
                rows.append({"seed": seed, "method": method, "sparsity": sparsity,
                             **row(net, data, method, sparsity, seed, given)})
                print(rows[-1], flush=True)
    print(table(rows))
    if given.markdown:
        given.markdown.write_text(table(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
