"""Verification gives the same verdicts and the same certificate whatever the executor and the number of workers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from exact_truth import random_mlp

from exactprune.claim import Status
from exactprune.deciders import cascade
from exactprune.domain import uniform
from exactprune.network import Network
from exactprune.options import VerifyOptions
from exactprune.pipeline import Verification, verify


@pytest.fixture(scope="module")
def network() -> Network:
    """Branch and bound is left with several questions, none of them hard: no time limit is near."""
    return random_mlp(np.random.default_rng(7), [9, 20, 40, 1], bias=1.5)


@pytest.fixture(scope="module", autouse=True)
def one_question_a_task() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "QUESTIONS_A_TASK", 1)
        yield


@pytest.fixture(scope="module")
def serial(network: Network) -> Verification:
    return verify(network, uniform(-1, 1, (9,)), VerifyOptions(executor="serial"))


def content(run: Verification) -> str:
    return json.dumps(list(run.records), sort_keys=True, default=repr)


def same(one: Verification, other: Verification) -> None:
    for a, b in zip(one.layers, other.layers, strict=True):
        for name in ("status", "method", "lower", "upper"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert dict(a.reasons) == dict(b.reasons)
    assert content(one) == content(other)


def test_the_example_is_worth_its_name(serial: Verification) -> None:
    details = [s.detail for s in serial.stages if s.name.startswith("branch and bound")]
    assert any(int(detail.split()[0]) >= 3 for detail in details), details
    assert serial.totals["unknown"] == 0
    assert all((layer.status != Status.UNKNOWN).all() for layer in serial.layers)


@pytest.mark.parametrize("jobs", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes(network: Network, serial: Verification, jobs: int) -> None:
    same(serial, verify(network, uniform(-1, 1, (9,)), VerifyOptions(executor="process", jobs=jobs)))


def test_dask(network: Network, serial: Verification, cluster: str) -> None:
    same(serial, verify(network, uniform(-1, 1, (9,)), VerifyOptions(executor=cluster.replace("tcp://", "dask://"))))
