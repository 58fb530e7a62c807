"""Compression's memory is linear in the parameters."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from exactprune import VerifyOptions, load, verify
from exactprune.compress import compress_network

MODELS = Path(__file__).parents[2] / "models"
BYTES = 64  # per parameter: sixteen copies in float32


def _peak(name: str) -> tuple[int, int]:
    """(parameters, peak bytes allocated while compressing)."""
    network = load(MODELS / name)
    given = verify(network, options=VerifyOptions(exact=False))
    tracemalloc.start()
    compress_network(network, given.domain, given.layers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return network.parameters, peak


def test_memory_is_linear_in_the_parameters() -> None:
    small, large = _peak("fashion_2x200.pt"), _peak("fashion_2x800.pt")
    assert large[1] - small[1] <= BYTES * (large[0] - small[0])
    assert large[1] <= BYTES * large[0]
