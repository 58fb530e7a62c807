"""Small networks for every pruner test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pruning_oracle import SHARED, Oracle
from torch import nn


@pytest.fixture(scope="session")
def oracle() -> Callable[[str, str], Oracle]:
    if not (SHARED / "oracles" / "pruning").is_dir():
        pytest.skip(f"reference numbers are not in {SHARED} (set EXACTPRUNE_SHARED)")
    return Oracle


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
