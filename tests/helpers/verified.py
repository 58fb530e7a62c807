"""Verdicts of ``verify`` against exact ranges; networks that need every stage."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from exact_regions import exact_ranges
from exact_truth import random_1d, random_mlp

import exactprune
from exactprune import VerifyOptions
from exactprune.claim import Status
from exactprune.domain import Box
from exactprune.network import Network

Ranges = list[list[tuple[Fraction, Fraction]]]


def small_case(seed: int) -> tuple[Network, Box]:
    """A random network with 1 to 3 inputs, few enough neurons for exact enumeration."""
    rng = np.random.default_rng([seed, 11])
    if seed % 3 == 0:
        return random_1d(rng)
    inputs = 1 + seed % 3
    sizes = [inputs, *rng.integers(2, 5, 3 if inputs == 2 else 2).tolist(), 1]
    network = random_mlp(rng, sizes, spread=float(rng.choice([0.0, 0.5])), bias=float(rng.choice([0.3, 1.0])))
    return network, Box(-rng.random(inputs), rng.random(inputs))


def wrong_verdicts(result: exactprune.Verification, ranges: Ranges) -> list[tuple[int, int, int]]:
    """(layer, neuron, status) of every verdict or bound that the exact ranges contradict."""
    found = []
    for verdict, layer in zip(result.layers, ranges, strict=True):
        for i, (low, high) in enumerate(layer):
            status = Status(int(verdict.status[i]))
            holds = {Status.INACTIVE: high <= 0, Status.ACTIVE: low >= 0, Status.UNSTABLE: low < 0 < high, Status.UNKNOWN: True}
            if not holds[status] or not verdict.lower[i] <= low or not high <= verdict.upper[i]:
                found.append((verdict.layer, i, int(status)))
            assert status != Status.UNKNOWN or verdict.reasons[i]
    return found


def open_though_clear(result: exactprune.Verification, ranges: Ranges) -> list[tuple[int, int]]:
    """Unknown neurons whose extremes are not within 1e-6 of 0."""
    return [(v.layer, i) for v, layer in zip(result.layers, ranges, strict=True) for i, (low, high) in enumerate(layer)
            if v.status[i] == Status.UNKNOWN and min(abs(float(low)), abs(float(high))) > 1e-6]


def agree(seeds: range, decider: str, **options: object) -> int:
    """Number of neurons left open though clear; no verdict is wrong."""
    left = 0
    for seed in seeds:
        network, box = small_case(seed)
        ranges = exact_ranges(network, box)
        result = exactprune.verify(network, box, VerifyOptions(decider=decider, time_limit=20, **options))  # type: ignore[arg-type]
        assert not wrong_verdicts(result, ranges), seed
        left += len(open_though_clear(result, ranges))
    return left


def deep_case(seed: int = 4, inputs: int = 9) -> tuple[Network, Box]:
    """More inputs than input splitting takes; bounds and witnesses leave neurons to branch and bound."""
    rng = np.random.default_rng([seed, 23])
    network = random_mlp(rng, [inputs, 10, 8, 6, 2], bias=0.5)
    return network, Box(-0.6 * np.ones(inputs), 0.6 * np.ones(inputs))


def same_layers(first: exactprune.Verification, second: exactprune.Verification, bounds: bool = True) -> None:
    """Equal statuses and reasons; equal bounds and methods too unless told otherwise."""
    for a, b in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(a.status, b.status)
        assert dict(a.reasons) == dict(b.reasons)
        if bounds:
            np.testing.assert_array_equal(a.method, b.method)
            np.testing.assert_array_equal(a.lower, b.lower)
            np.testing.assert_array_equal(a.upper, b.upper)
