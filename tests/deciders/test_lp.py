"""LP bounds and their multipliers: the multipliers alone, put into the certificate's inequality, give the same
bound."""

from __future__ import annotations

import numpy as np
import pytest
from exact_truth import exact_ranges_1d, extremum_by_phases, interval_bounds, mlp, random_1d, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune.deciders.highs import HighsOptions, SolveStatus
from exactprune.deciders.lp import LayerLP, LayerMultipliers, lp_multipliers
from exactprune.domain import Box, uniform
from exactprune.network import Network
from exactprune.ops import Affine


def certificate_bound(
    network: Network,
    box: Box,
    low: list[np.ndarray],
    high: list[np.ndarray],
    layer: int,
    neuron: int,
    sign: int,
    multipliers: dict[int, LayerMultipliers],
) -> float:
    """Upper bound on sign * z_hat by docs/certificate.md, "The one inequality", in float64 for MLPs."""
    affine = [n.op for n in network.nodes if isinstance(n.op, Affine)]
    v, total = sign * affine[layer].weight[neuron], sign * float(affine[layer].bias[neuron])
    for j in reversed(range(layer)):
        lo, hi = low[j], high[j]
        with np.errstate(divide="ignore", invalid="ignore"):
            fixed = np.where(v >= 0, v * hi / (hi - lo), np.where(hi > -lo, v, 0.0))
        a = np.where(hi <= 0, 0.0, np.where(lo >= 0, v, fixed))
        if j in multipliers:
            dense = multipliers[j].dense(lo.size)
            a = np.where(np.isnan(dense), a, dense)

        def left(t: np.ndarray, v: np.ndarray = v, a: np.ndarray = a) -> np.ndarray:
            return v * np.maximum(t, 0) - a * t

        c = np.maximum(left(lo), left(hi))
        total += np.where((lo < 0) & (hi > 0), np.maximum(c, 0), c).sum() + a @ affine[j].bias
        v = a @ affine[j].weight
    return total + np.maximum(v * box.lower, v * box.upper).sum()


@pytest.mark.parametrize("seed", range(8))
def test_multipliers_prove_the_lp_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = random_mlp(rng, [5, 16, 16, 12, 3], spread=0.5 * (seed % 3))
    box = uniform(-1, 1, (5,))
    low, high = interval_bounds(network, box)
    for layer in (0, 1, 2):
        for side, sign in (("upper", 1), ("lower", -1)):
            for found in lp_multipliers(network, box, low, high, layer, [0, 5], side):
                proved = sign * certificate_bound(
                    network, box, low, high, layer, found.neuron, sign, dict(found.multipliers)
                )
                fixed = sign * certificate_bound(network, box, low, high, layer, found.neuron, sign, {})
                scale = max(1.0, abs(fixed))
                assert found.reason == ""
                assert proved == pytest.approx(found.value, abs=1e-7 * scale)
                assert sign * found.value <= sign * fixed + 1e-7 * scale, "the LP is at least as tight as CROWN"
                assert np.all(found.point >= box.lower)
                assert np.all(found.point <= box.upper)


def test_multipliers_of_active_neurons_that_have_columns() -> None:
    rng = np.random.default_rng(0)
    network = random_mlp(rng, [300, 6, 120, 4, 1])
    arrays = [(n.op.weight, n.op.bias) for n in network.nodes if isinstance(n.op, Affine)]
    network = mlp([(arrays[0][0], arrays[0][1] + 9.0), *arrays[1:]])
    box = uniform(-0.5, 0.5, (300,))
    low, high = interval_bounds(network, box)
    lp = LayerLP(network, box, low, high, 2)
    found = lp.bound(0, "upper")
    assert found.multipliers[0].neurons.tolist() == list(range(6))
    proved = certificate_bound(network, box, low, high, 2, 0, 1, dict(found.multipliers))
    assert proved == pytest.approx(found.value, abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_a_full_leaf_is_exact(seed: int) -> None:
    """With every phase fixed the LP bound is the maximum over that activation region; the best leaf is the maximum."""
    rng = np.random.default_rng(seed)
    network = random_mlp(rng, [3, 4, 1, 1])
    box = uniform(-1, 1, (3,))
    low, high = interval_bounds(network, box)
    lp = LayerLP(network, box, low, high, 1)
    split = np.flatnonzero((low[0] < 0) & (high[0] > 0))
    leaves = [lp.bound(0, "upper", {(0, int(i)): bool(pattern >> b & 1) for b, i in enumerate(split)})
              for pattern in range(2**split.size)]
    values = [leaf.value for leaf in leaves if leaf.outcome.optimal]
    assert max(values) == pytest.approx(extremum_by_phases(network, box, 1, 0, 1), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_an_empty_leaf_has_multipliers_that_prove_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, box = random_mlp(rng, [3, 8, 8, 1, 1]), uniform(-1, 1, (3,))
    low, high = interval_bounds(network, box)
    lp = LayerLP(network, box, low, high, 2)
    split = [(k, int(i)) for k in range(2) for i in np.flatnonzero((low[k] < 0) & (high[k] > 0))]
    empty = 0
    for _ in range(20):
        phases = {at: bool(rng.random() < 0.5) for at in split}
        side, sign = ("upper", 1) if rng.random() < 0.5 else ("lower", -1)
        found = lp.bound(0, side, phases)
        if found.outcome.status is SolveStatus.INFEASIBLE:
            cut_low, cut_high = [a.copy() for a in low], [a.copy() for a in high]
            for (layer, i), active in phases.items():
                (cut_low if active else cut_high)[layer][i] = 0.0
            proved = sign * certificate_bound(network, box, cut_low, cut_high, 2, 0, sign, dict(found.multipliers))
            assert sign * proved < 0
            assert sign * proved <= sign * found.value + 1e-6, (
                "at these multipliers the certificate is at least as tight"
            )
            empty += 1
    assert empty > 5


def test_a_time_out_still_gives_a_valid_bound_or_none() -> None:
    rng = np.random.default_rng(0)
    network = random_mlp(rng, [20, 60, 60, 1])
    box = uniform(-1, 1, (20,))
    low, high = interval_bounds(network, box)
    lp = LayerLP(network, box, low, high, 1, options=HighsOptions(time_limit=60))
    exact = lp.bound(0, "upper").value
    stopped = LayerLP(network, box, low, high, 1).bound(0, "upper", time_limit=0.0)
    assert stopped.value >= exact - 1e-6
    assert np.isfinite(stopped.value) or stopped.reason


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_never_tighter_than_the_truth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network, box = random_1d(rng)
    low, high = interval_bounds(network, box)
    layer = len(network.relus) - 1
    lp = LayerLP(network, box, low, high, layer)
    for neuron, (least, most) in enumerate(exact_ranges_1d(network, box)[layer]):
        scale = 1e-6 * max(1.0, float(most), -float(least))
        assert lp.bound(neuron, "upper").value >= float(most) - scale
        assert lp.bound(neuron, "lower").value <= float(least) + scale


@pytest.mark.slow
def test_never_tighter_than_the_truth_at_length() -> None:
    for seed in range(2000):
        test_never_tighter_than_the_truth.hypothesis.inner_test(seed)  # type: ignore[attr-defined]
