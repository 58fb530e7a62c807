"""verify() as a whole: equal runs, any executor, any memory, interrupted runs; misuse is named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from exact_regions import exact_ranges
from verified import deep_case, same_layers, small_case, wrong_verdicts

import exactprune
from exactprune import VerifyOptions, checker, verify
from exactprune.claim import Status
from exactprune.domain import Box, uniform
from exactprune.errors import DomainError, OptionError, ShapeError
from exactprune.network import Network, Node, build
from exactprune.ops import Affine, ReLU


@pytest.fixture(scope="module")
def reference() -> exactprune.Verification:
    result = verify(*deep_case())
    assert result.totals["unknown"] == 0
    assert any(record["record"] == "tree" for record in result.records), "the case needs branch and bound"
    return result


def records(result: exactprune.Verification) -> str:
    return json.dumps(result.records)


def test_equal_runs_give_equal_verdicts_and_certificates(reference: exactprune.Verification) -> None:
    again = verify(*deep_case())
    same_layers(reference, again)
    assert records(reference) == records(again)
    assert [s.name for s in reference.stages] == [s.name for s in again.stages]


def test_processes_give_what_one_process_gives(reference: exactprune.Verification) -> None:
    result = verify(*deep_case(), VerifyOptions(jobs=2))
    assert result.options.executor == "process"
    same_layers(reference, result)
    assert records(reference) == records(result)


def test_little_memory_gives_the_same_verdicts(reference: exactprune.Verification) -> None:
    result = verify(*deep_case(), VerifyOptions(memory=2**24))
    for a, b in zip(reference.layers, result.layers, strict=True):
        np.testing.assert_array_equal(a.status, b.status)


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_never_contradicts(reference: exactprune.Verification, seed: int) -> None:
    result = verify(*deep_case(), VerifyOptions(seed=seed))
    for a, b in zip(reference.layers, result.layers, strict=True):
        both = (a.status != Status.UNKNOWN) & (b.status != Status.UNKNOWN)
        np.testing.assert_array_equal(a.status[both], b.status[both])


def test_the_certificate_stands_on_its_own(reference: exactprune.Verification) -> None:
    network, box = deep_case()
    lines = [json.loads(json.dumps(record)) for record in reference.records]
    report = checker.check(network, box.lower, box.upper, lines, exact=True)
    assert report.accepted and not report.error
    counted = {word: report.counts[word] for word in ("inactive", "active", "unstable")}
    assert counted == {word: reference.totals[word] for word in counted}


def test_without_the_exact_stage_what_is_open_says_so() -> None:
    result = verify(*deep_case(), VerifyOptions(exact=False))
    assert result.totals["unknown"] > 0
    for verdict in result.layers:
        assert set(verdict.reasons) == set(verdict.indices(Status.UNKNOWN).tolist())
        assert all("no exact stage" in reason for reason in verdict.reasons.values())


def test_no_time_leaves_reasons_and_nothing_wrong(reference: exactprune.Verification) -> None:
    result = verify(*deep_case(), VerifyOptions(time_limit=1e-3))
    assert result.totals["unknown"] > 0
    for a, b in zip(reference.layers, result.layers, strict=True):
        decided = b.status != Status.UNKNOWN
        np.testing.assert_array_equal(a.status[decided], b.status[decided])
        assert all(b.reasons[i] for i in b.indices(Status.UNKNOWN).tolist())


def test_a_cap_on_certificates_costs_verdicts_not_soundness(reference: exactprune.Verification) -> None:
    result = verify(*deep_case(), VerifyOptions(certificate_cap=500))
    assert result.totals["unknown"] > 0 and result.check is not None
    for a, b in zip(reference.layers, result.layers, strict=True):
        decided = b.status != Status.UNKNOWN
        np.testing.assert_array_equal(a.status[decided], b.status[decided])
    words = [reason for v in result.layers for reason in v.reasons.values()]
    assert any("does not fit into 500 bytes" in reason for reason in words)
    report = checker.check(*(deep_case()[0], deep_case()[1].lower, deep_case()[1].upper), [*result.records])
    assert report.accepted


def test_data_are_witnesses_only_inside_the_box() -> None:
    network, box = deep_case()
    rng = np.random.default_rng(0)
    inside, outside = box.sample(200, rng), 100 * rng.normal(size=(50, 9))
    result = verify(network, box, VerifyOptions(exact=False), data=np.concatenate([inside, outside, np.full((1, 9), np.nan)]))
    assert result.check is not None and result.check["rejected"] == 0


@pytest.mark.parametrize("seed", range(9))
def test_verdicts_and_bounds_hold_on_exact_ranges(seed: int) -> None:
    network, box = small_case(seed)
    assert not wrong_verdicts(verify(network, box), exact_ranges(network, box))


def test_networks_without_relus_or_with_one_on_the_input() -> None:
    affine = Node("a", Affine(np.ones((2, 3)), np.zeros(2)), (-1,))
    bare = verify(build([affine], (3,), np.float64))
    assert bare.layers == () and bare.totals["neurons"] == 0
    first = build([Node("r", ReLU(), (-1,)), Node("a", Affine(np.ones((2, 3)), np.zeros(2)), (0,))], (3,), np.float64)
    (layer,) = verify(first, Box(np.array([-1.0, 0.0, -3.0]), np.array([1.0, 2.0, -1.0]))).layers
    assert layer.status.tolist() == [Status.UNSTABLE, Status.ACTIVE, Status.INACTIVE]


def test_the_unit_box_is_the_default() -> None:
    result = verify(deep_case()[0])
    assert (result.domain.lower == 0).all() and (result.domain.upper == 1).all()
    assert "[0, 1]" in str(result)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda n: verify(n, uniform(0, 1, (4,))), DomainError, "9"),
    (lambda n: verify(n, data=np.zeros((3, 5))), ShapeError, "9"),
    (lambda n: verify(n, options=VerifyOptions(device="cuda:63")), OptionError, "cpu"),
    (lambda n: exactprune.compress(verify(n, options=VerifyOptions(exact=False)), uniform(0, 1, (9,))), OptionError, "network"),
])
def test_misuse_is_named(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call(deep_case()[0])


def test_the_order_of_neurons_changes_no_verdict() -> None:
    """A permuted hidden layer gives permuted verdicts."""
    network, box = small_case(4)
    order = np.random.default_rng(0).permutation(network.shapes[0][0])
    first, second = network.nodes[0].op, network.nodes[2].op
    assert isinstance(first, Affine) and isinstance(second, Affine)
    nodes = list(network.nodes)
    nodes[0] = replace(nodes[0], op=Affine(first.weight[order], first.bias[order]))
    nodes[2] = replace(nodes[2], op=Affine(second.weight[:, order], second.bias))
    permuted: Network = replace(network, nodes=tuple(nodes))
    a, b = verify(network, box), verify(permuted, box)
    np.testing.assert_array_equal(a.layers[0].status[order], b.layers[0].status)
    for left, right in zip(a.layers[1:], b.layers[1:], strict=True):
        np.testing.assert_array_equal(left.status, right.status)
