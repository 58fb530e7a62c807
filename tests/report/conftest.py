from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from exactprune.claim import LayerVerdict, Method, Status
from exactprune.domain import uniform
from exactprune.network import INPUT, Node, build
from exactprune.ops import Affine, Conv2d, ReLU, Reshape
from exactprune.options import VerifyOptions


def conv_network():
    """1x3x3 -> conv of 2 channels (2x2) -> ReLU -> flatten -> 3 -> ReLU -> 2, seeded."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s).astype(np.float32) for s in [(2, 1, 2, 2), (2,), (3, 8), (3,), (2, 3), (2,)]]
    return build([Node("conv", Conv2d(weights[0], weights[1]), (INPUT,)), Node("relu1", ReLU(), (0,)),
                  Node("flat", Reshape((8,)), (1,)), Node("fc", Affine(weights[2], weights[3]), (2,)),
                  Node("relu2", ReLU(), (3,)), Node("out", Affine(weights[4], weights[5]), (4,))],
                 (1, 3, 3), np.float32, name="tiny")


@pytest.fixture
def network():
    return conv_network()


@pytest.fixture
def verification(network):
    """A result with every status, an infinite bound, a bound of 17 digits, and a reason with a comma and quotes."""
    first = LayerVerdict(0, "relu1", (2, 2, 2), [1, 1, 2, 2, 3, 3, 3, 0], [1, 2, 1, 3, 5, 5, 4, 0],
                         [-1.0, -np.inf, 0.1, 0.30000000000000004, -1, -1, -1, -5e-324],
                         [0.0, -0.1, np.inf, 1, 1, 1, 1, 1e300], {7: 'time limit, "best" bound 3'})
    second = LayerVerdict(1, "relu2", (3,), [1, 2, 3], [9, 11, 8], [-2, 1, -1], [-1, 2, 1])
    layers = (first, second)
    totals = {"neurons": 11, **{s.word: sum(la.count(s) for la in layers) for s in Status if s} , "unknown": 1}
    return SimpleNamespace(
        network=network, domain=uniform(0, 1, (1, 3, 3)), options=VerifyOptions(), layers=layers,
        stages=(SimpleNamespace(name="interval relu1", seconds=0.75, settled=3, detail="x"),
                SimpleNamespace(name="interval relu2", seconds=0.5, settled=2, detail="y"),
                SimpleNamespace(name="crown", seconds=float("nan"), settled=np.int64(8), detail="two layers")),
        records=({"record": "header", "format": "exactprune-certificate/1"}, {"record": "crown", "layer": 0}),
        seconds=1.25, versions={"exactprune": "0.1.0"}, hardware={"cpu": "x", "cores": 2},
        totals=totals, check={"accepted": 10, "rejected": 0, "seconds": 0.1}, method=Method)
