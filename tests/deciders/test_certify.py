"""From proofs to certificates: rejected claims become unknown, coarse numbers are sharpened, unreadable layers are left out."""

from __future__ import annotations

import numpy as np
import pytest
from exact_regions import exact_ranges
from exact_truth import mlp
from verified import deep_case, small_case

from exactprune import checker
from exactprune.claim import Method, Status
from exactprune.deciders.cascade import Cascade, Effort
from exactprune.deciders.certify import certify
from exactprune.deciders.proofs import Multipliers, Tree, quantise
from exactprune.domain import uniform
from exactprune.progress import Silent

CAP = 1 << 30


def finished(network, box, **effort) -> Cascade:
    cascade = Cascade(network, box, Effort(**effort), Silent())
    cascade.run()
    return cascade


def sound(result, network, box) -> None:
    for verdict, ranges in zip(result.layers, exact_ranges(network, box)):
        for i, (low, high) in enumerate(ranges):
            assert verdict.status[i] != Status.INACTIVE or high <= 0
            assert verdict.status[i] != Status.ACTIVE or low >= 0
            assert verdict.status[i] != Status.UNSTABLE or low < 0 < high
            assert verdict.lower[i] <= low and high <= verdict.upper[i]


@pytest.mark.parametrize("seed", [1, 2, 4, 5])
@pytest.mark.parametrize("lie", [Status.INACTIVE, Status.ACTIVE, Status.UNSTABLE])
def test_claims_without_proof_become_unknown(seed: int, lie: Status) -> None:
    network, box = small_case(seed)
    cascade = finished(network, box)
    for k, layer in enumerate(cascade.layers):
        for i in range(len(layer.status)):
            if layer.status[i] != lie and (lie != Status.UNSTABLE or layer.status[i] in (Status.INACTIVE, Status.ACTIVE)):
                layer.status[i], layer.method[i] = lie, Method.BRANCH_AND_BOUND
        if lie != Status.UNSTABLE:
            neurons = np.arange(len(layer.status))
            cascade._narrow(k, neurons, 1 if lie == Status.INACTIVE else -1, np.zeros(len(neurons)))
    result = certify(cascade, {}, CAP)
    assert result.rejected > 0
    sound(result, network, box)
    reasons = [reason for v in result.layers for reason in v.reasons.values()]
    assert any("the checker does not accept it" in reason or "the checker cannot" in reason for reason in reasons)
    report = checker.check(network, box.lower, box.upper, [*result.records])
    assert report.accepted and sum(report.counts[w] for w in ("inactive", "active", "unstable")) == result.accepted


def test_a_wrong_tree_costs_its_verdict_and_taints_no_bound() -> None:
    network, box = small_case(1)
    cascade = finished(network, box, exact=False)
    ranges = exact_ranges(network, box)
    layer, neuron = next((k, i) for k in (1, 2) for i, (low, high) in enumerate(ranges[k]) if low < 0 < high)
    none = Multipliers({}, {})
    cascade.layers[layer].status[neuron] = Status.UNKNOWN
    cascade.proofs.append(Tree(layer, neuron, 1, [None], [none]))
    cascade._proved(layer, neuron, 1, Method.BRANCH_AND_BOUND)
    assert cascade.layers[layer].status[neuron] == Status.INACTIVE
    result = certify(cascade, {}, CAP)
    assert result.layers[layer].status[neuron] == Status.UNKNOWN
    sound(result, network, box)
    assert not any(record["record"] == "tree" for record in result.records), "a proof of nothing is left out"


def test_a_cap_drops_trees_and_their_verdicts() -> None:
    network, box = deep_case()
    cascade = finished(network, box)
    whole, capped = certify(cascade, {}, CAP), certify(cascade, {}, 1)
    assert sum(r["record"] == "tree" for r in whole.records) > 0 == sum(r["record"] == "tree" for r in capped.records)
    assert capped.accepted < whole.accepted
    assert checker.check(network, box.lower, box.upper, [*capped.records]).accepted


def test_overflow_leaves_later_layers_unknown_and_the_rest_proved() -> None:
    rng = np.random.default_rng(0)
    network = mlp([(rng.normal(size=(4, 2)), np.array([9.0, -9.0, 0.0, 0.0])), (1e300 * rng.random((3, 4)), np.zeros(3)),
                   (1e300 * rng.normal(size=(3, 3)), np.zeros(3)), (np.ones((1, 3)), np.zeros(1))])
    box = uniform(-1, 1, (2,))
    result = certify(finished(network, box), {}, CAP)
    assert result.layers[0].status[:2].tolist() == [Status.ACTIVE, Status.INACTIVE]
    assert (result.layers[2].status == Status.UNKNOWN).all()
    assert all(result.layers[2].reasons.values())
    assert checker.check(network, box.lower, box.upper, [*result.records]).accepted


@pytest.mark.parametrize("bits", [10, 16, 24, 40])
def test_quantised_multipliers_are_within_half_a_unit(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.normal(size=(5, 7)) * 10.0 ** rng.uniform(-200, 200, (5, 1))
    values[2] = 0
    integers, shift = quantise(values, bits)
    back = np.ldexp(integers.astype(float), -shift[:, None])
    top = np.abs(values).max(axis=1, keepdims=True)
    assert (np.abs(back - values) <= top * 2.0**-bits).all() and (np.abs(integers) <= 2**bits).all()
