"""Real networks against the stability oracles (shared/oracles): enclosures, statuses, counts; skipped where they are missing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import exactprune
from exactprune import VerifyOptions, verify
from exactprune.bounds.interval import interval_bounds
from exactprune.bounds.layerwise import crown_bounds
from exactprune.bounds.program import compile_network
from exactprune.claim import Status
from exactprune.domain import Box, uniform

SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))
ORACLES = SHARED / "oracles" / "stability"
MODELS = {"acas1_1": "ACASXU_run2a_1_1_batch_2000.onnx", "acas3_3": "ACASXU_run2a_3_3_batch_2000.onnx",
          "mnist256x2": "mnist-net_256x2.onnx", "resnet2b": "resnet_2b.onnx"}
CASES = ("acas1_1__p1", "acas1_1__p3", "acas1_1__whole", "acas3_3__p1", "mnist256x2__eps0.03", "mnist256x2__eps0.05",
         "mnist256x2__whole", "resnet2b__prop_0_eps_0.008")
BOUND_CASES = [pytest.param(c, marks=pytest.mark.slow if c.startswith("resnet") else ()) for c in CASES]

pytestmark = pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no oracles at {ORACLES}; set EXACTPRUNE_SHARED")


@cache
def oracle(name: str) -> dict[str, np.ndarray]:
    with np.load(ORACLES / f"{name}.npz") as data:
        return dict(data)


@cache
def network(name: str) -> exactprune.Network:
    return exactprune.load(SHARED / "nets" / MODELS[name.partition("__")[0]])


def box(name: str) -> Box:
    return Box(oracle(name)["box_lo"], oracle(name)["box_hi"]).reshaped(network(name).input_shape)


@cache
def bounded(name: str) -> exactprune.Verification:
    """Bounds and witnesses only."""
    torch.set_num_threads(1)
    return verify(network(name), box(name), VerifyOptions(exact=False))


@cache
def decided(name: str, seconds: float = 120.0) -> exactprune.Verification:
    return verify(network(name), box(name), VerifyOptions(time_limit=seconds))


def layers(name: str) -> int:
    return sum(key.endswith("_status") for key in oracle(name))


def slack(values: np.ndarray) -> np.ndarray:
    """The oracle's values are those of a float64 forward pass: off by rounding."""
    return 1e-9 * (1 + np.abs(values))


def encloses(name: str, layer: int, lower: np.ndarray, upper: np.ndarray) -> None:
    least, most = oracle(name)[f"L{layer}_minseen"], oracle(name)[f"L{layer}_maxseen"]
    assert (lower <= least + slack(least)).all() and (upper >= most - slack(most)).all()


def never_contradicts(name: str, result: exactprune.Verification) -> None:
    for verdict in result.layers:
        status = oracle(name)[f"L{verdict.layer}_status"]
        both = (status > 0) & (verdict.status > 0)
        np.testing.assert_array_equal(verdict.status[both], status[both])
        encloses(name, verdict.layer, verdict.lower, verdict.upper)


def settled(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    return (upper <= 0) | (lower >= 0)


@pytest.mark.parametrize("name", BOUND_CASES)
def test_bounds_enclose_and_crown_settles_what_the_oracle_s_does(name: str) -> None:
    program = compile_network(network(name))
    given = program.box(box(name))
    assert program.layers == layers(name)
    ours, theirs = 0, 0
    for layer, (interval, crown) in enumerate(zip(interval_bounds(program, *given), crown_bounds(program, *given))):
        for bounds in (interval, crown):
            encloses(name, layer, bounds.lower[0].numpy(), bounds.upper[0].numpy())
        mine = settled(crown.lower[0].numpy(), crown.upper[0].numpy())
        other = settled(oracle(name)[f"crown_f64_L{layer}_lb"], oracle(name)[f"crown_f64_L{layer}_ub"])
        ours, theirs = ours + int(mine.sum()), theirs + int(other.sum())
        missed = np.flatnonzero(other & ~mine)
        assert not len(missed), f"layer {layer}: neurons {missed} are settled by the oracle's CROWN and not by ours"
    assert ours >= theirs


@pytest.mark.parametrize("name", BOUND_CASES)
def test_alpha_crown_settles_what_the_oracle_s_does(name: str) -> None:
    result = bounded(name)
    never_contradicts(name, result)
    assert result.check is not None and result.check["rejected"] <= 0.001 * result.totals["neurons"]  # given up: unknown
    ours, theirs, missed = 0, 0, []
    for verdict in result.layers:
        lower, upper = (oracle(name).get(f"alayer_f64_L{verdict.layer}_{side}") for side in ("lb", "ub"))
        if lower is None or upper is None:
            continue
        stable = np.isin(verdict.status, (Status.INACTIVE, Status.ACTIVE))
        ours, theirs = ours + int(stable.sum()), theirs + int(settled(lower, upper).sum())
        missed += [(verdict.layer, int(i)) for i in np.flatnonzero(settled(lower, upper) & ~stable)]
    assert ours >= theirs
    assert len(missed) <= 0.01 * theirs, f"settled by the oracle's alpha-CROWN and not by ours: {missed}"


COUNTS = {"acas1_1__p1": (161, 28, 111), "acas1_1__p3": (158, 75, 67), "acas3_3__p1": (115, 21, 164)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n != "acas1_1__p3" else ()) for n in COUNTS])
def test_every_neuron_of_acas_is_decided(name: str) -> None:
    result = decided(name)
    never_contradicts(name, result)
    totals = result.totals
    assert (totals["inactive"], totals["active"], totals["unstable"]) == COUNTS[name]


@pytest.mark.slow
def test_the_whole_box_of_acas_leaves_at_most_nine_open_in_a_minute() -> None:
    result = decided("acas1_1__whole", 60.0)
    never_contradicts("acas1_1__whole", result)
    assert result.totals["unknown"] <= 9


@pytest.mark.parametrize("domain", [pytest.param("eps0.03"), pytest.param("eps0.05", marks=pytest.mark.slow),
                                    pytest.param("whole", marks=pytest.mark.slow)])
def test_every_neuron_of_mnist_256x2_is_decided(domain: str) -> None:
    result = decided(f"mnist256x2__{domain}")
    never_contradicts(f"mnist256x2__{domain}", result)
    assert result.totals["unknown"] == 0
    assert result.check is not None and result.check["rejected"] == 0


@pytest.mark.slow
def test_resnet_verdicts_are_never_contradicted() -> None:
    never_contradicts("resnet2b__prop_0_eps_0.008", decided("resnet2b__prop_0_eps_0.008", 60.0))


def test_the_paper_s_compressed_cifar_network() -> None:
    result = verify(exactprune.load(SHARED / "nets" / "cifar10_isa_116-248.pt"), uniform(0, 1, (3072,)))
    assert [(v.count(Status.ACTIVE), v.count(Status.UNSTABLE)) for v in result.layers] == [(85, 31), (116, 132)]
    assert result.totals["unknown"] == result.totals["inactive"] == 0


@pytest.mark.slow
def test_the_mnist_100_100_network_has_nothing_stable() -> None:
    result = verify(exactprune.load(SHARED / "nets" / "mnist_100-100.pt"), uniform(0, 1, (784,)))
    assert result.totals == {"neurons": 200, "inactive": 0, "active": 0, "unstable": 200, "unknown": 0}
