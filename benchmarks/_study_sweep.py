"""L1 sweep on Fashion-MNIST: how an L1 term on the weights trades accuracy for neurons that can be removed.

The table of Serra, Yu, Kumar and Ramalingam (NeurIPS 2021, arXiv 2102.07804), on the architectures of models/: each is trained
with several weights of the L1 term and several seeds, then verified and compressed on the unit box.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _study_cells import ROOT, Cells, Data, Facts, examined
from torch import nn

import exactprune
from exactprune.domain import uniform
from exactprune.io.atomic import replacing
from exactprune.training import DataSet, TrainOptions, accuracy, train

NETWORKS = ROOT / "build" / "study"


@dataclass(frozen=True)
class Sweep:
    """One architecture of the sweep.

    Attributes:
        name: of the architecture; widths: of its layers.
        epochs: of training.
        seeds: of the first weights and of the order of samples.
        l1: weights of the L1 term.
        limit: seconds for the exact stage of verify.
    """

    name: str
    widths: tuple[int, ...]
    epochs: int = 15
    seeds: tuple[int, ...] = (0, 1)
    l1: tuple[float, ...] = (0.0, 2e-5, 5e-5, 1e-4, 2e-4)
    limit: float = 60.0


SWEEPS = (
    Sweep("2x100", (784, 100, 100, 10), seeds=(0, 1, 2)),
    Sweep("2x200", (784, 200, 200, 10)),
    Sweep("2x800", (784, 800, 800, 10), epochs=10, seeds=(0,), l1=(0.0, 2e-5, 5e-5, 1e-4)),
    Sweep("5x100", (784, *[100] * 5, 10)),
)


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear-ReLU-...-Linear with torch's first weights of that seed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def options(sweep: Sweep, l1: float, seed: int) -> TrainOptions:
    """SGD with momentum, batches of 128, cosine schedule."""
    return TrainOptions(epochs=sweep.epochs, batch=128, lr=0.1, l1=l1, seed=seed)


def sweep_cells(cells: Cells, data: DataSet) -> list[Facts]:
    """Every cell of the sweep."""
    test: Data = (data.x_test.numpy(), data.y_test.numpy())
    return [cells.get(f"{s.name}_l1_{l1:g}_seed_{seed}",
                      {"architecture": s.name, "widths": s.widths, "limit": s.limit, "training": asdict(options(s, l1, seed))},
                      lambda s=s, l1=l1, seed=seed: one(s, l1, seed, data, test))
            for s in SWEEPS for l1 in s.l1 for seed in s.seeds]


def one(sweep: Sweep, l1: float, seed: int, data: DataSet, test: Data) -> Facts:
    """Train, verify and compress one network."""
    file, spent = trained(sweep, l1, seed, data)
    network = exactprune.load(file)
    return {"training": spent, **examined(file, network, uniform(0.0, 1.0, network.input_shape), test, sweep.limit)}


def trained(sweep: Sweep, l1: float, seed: int, data: DataSet) -> tuple[Path, dict[str, Any]]:
    """The trained network's file, with seconds, final training loss and training accuracy."""
    NETWORKS.mkdir(parents=True, exist_ok=True)
    file = NETWORKS / f"{sweep.name}_l1_{l1:g}_seed_{seed}.pt"
    cpu = time.process_time()
    done = train(mlp(sweep.widths, seed), data.x, data.y, options(sweep, l1, seed))
    with replacing(file) as scratch:
        torch.save(done.module, scratch)
    return file, {"seconds": done.seconds, "cpu seconds": time.process_time() - cpu,
                  "loss": done.losses[-1], "accuracy": accuracy(done.module, data.x, data.y)}
