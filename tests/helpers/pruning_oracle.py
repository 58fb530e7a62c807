"""What the reference implementations of pruning methods compute, where the shared folder is there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
SPARSITIES = (0.3, 0.5, 0.8, 0.9, 0.95)


class Oracle:
    """``{model}.npz`` as a float64 module with its data, and one reference implementation's arrays."""

    def __init__(self, model: str, reference: str) -> None:
        folder = SHARED / "oracles" / "pruning"
        data = np.load(folder / f"{model}.npz")
        self.arrays = np.load(folder / f"{model}.{reference}.npz")
        self.module = sequential({k[3:]: torch.tensor(data[k]) for k in data.files if k.startswith("sd.")}).double()
        self.x, self.y = torch.tensor(data["x"]).double(), torch.tensor(data["y"])

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.tensor(self.arrays[key])

    def by_layer(self, key: str) -> dict[str, torch.Tensor]:
        """``key`` with ``{}`` for the layer's index, as {parameter name: tensor}."""
        return {f"{k}.weight": self[key.format(k)] for k in (0, 2)}


def sequential(state: dict[str, torch.Tensor]) -> nn.Sequential:
    hidden, inputs = state["0.weight"].shape
    bias = "0.bias" in state
    net = nn.Sequential(nn.Linear(inputs, hidden, bias), nn.ReLU(), nn.Linear(hidden, len(state["2.weight"]), bias))
    net.load_state_dict(state)
    return net


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def disagreeing(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor],
                scores: dict[str, torch.Tensor] | None = None) -> int:
    """Weights removed by one and kept by the other, those aside that tie with the last one removed."""
    wrong = flat(mine) != flat(theirs).bool()
    if scores is not None:
        s = flat(scores)
        edge = s[~flat(mine)].max()
        wrong &= ~torch.isclose(s, edge, rtol=1e-9, atol=0)
    return int(wrong.sum())
