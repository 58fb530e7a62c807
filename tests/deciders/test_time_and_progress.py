"""The time limit covers everything that is optional, says so in the reasons, and the bars count what there is."""

from __future__ import annotations

import numpy as np
import pytest
from verified import deep_case

from exactprune import VerifyOptions, verify
from exactprune.domain import Box
from exactprune.network import Network, Node, build
from exactprune.ops import Affine, Conv2d, ReLU, Reshape


class Recorded:
    """Progress that writes down every stage: [name, total, advanced]."""

    def __init__(self) -> None:
        self.stages: list[list] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append([name, total, 0])

    def advance(self, count: int = 1) -> None:
        self.stages[-1][2] += count

    def note(self, text: str) -> None:
        raise AssertionError(text)


def convolutions(channels: int = 4, layers: int = 3, side: int = 8, seed: int = 0) -> tuple[Network, Box]:
    """A convolutional network wide enough that bounds leave neurons open."""
    random = np.random.default_rng(seed)
    nodes, given = [], 1
    for k in range(layers):
        weight = (random.standard_normal((channels, given, 3, 3)) / np.sqrt(given * 9)).astype(np.float32)
        bias = (0.3 * random.standard_normal(channels)).astype(np.float32)
        nodes += [Node(f"conv{k}", Conv2d(weight, bias, padding=(1, 1, 1, 1)), (len(nodes) - 1,)),
                  Node(f"relu{k}", ReLU(), (len(nodes),))]
        given = channels
    size = channels * side * side
    nodes += [Node("flat", Reshape((size,)), (len(nodes) - 1,)),
              Node("out", Affine(np.ones((1, size), np.float32), np.zeros(1, np.float32)), (len(nodes),))]
    network = build(nodes, (1, side, side), np.dtype(np.float32))
    return network, Box(np.zeros((1, side, side)), np.full((1, side, side), 0.6))


@pytest.mark.parametrize("exact", [True, False])
def test_a_tiny_limit_leaves_neurons_unknown_for_that_reason(exact: bool) -> None:
    network, box = convolutions()
    result = verify(network, box, VerifyOptions(exact=exact, time_limit=1e-6))
    reasons = [why for layer in result.layers for why in layer.reasons.values()]
    assert reasons and all("time limit" in why for why in reasons)
    assert not any(stage.name.startswith(("ascent", "alpha")) for stage in result.stages)
    longer = verify(network, box, VerifyOptions(exact=False, time_limit=30))
    assert longer.totals["unknown"] < result.totals["unknown"]
    for short, long in zip(result.layers, longer.layers, strict=True):  # no verdict is contradicted
        both = (short.status != 0) & (long.status != 0)
        assert (short.status[both] == long.status[both]).all()


def test_no_limit_at_all() -> None:
    network, box = deep_case()
    assert verify(network, box, VerifyOptions(time_limit=float("inf"))).totals["unknown"] == 0


def test_bars_never_pass_their_end_and_crown_and_the_certificate_reach_it() -> None:
    network, box = convolutions()
    told = Recorded()
    verify(network, box, VerifyOptions(exact=False), progress=told)
    counted = [stage for stage in told.stages if stage[1] is not None]
    assert all(done <= total for _, total, done in counted), counted
    for word in ("witnesses", "crown", "ascent", "alpha-crown", "certificate"):
        assert any(name.startswith(word) for name, _, _ in counted), word
    whole = [stage for stage in counted if stage[0].startswith(("crown", "certificate"))]
    assert all(done == total for _, total, done in whole), whole
