"""Input splitting: pieces that cover the box, claims against exact ranges, limits with reasons, records the checker accepts."""

from __future__ import annotations

from time import monotonic

import numpy as np
import pytest
import torch
from exact_regions import exact_ranges
from verified import small_case

from exactprune import VerifyOptions, verify
from exactprune.bounds.layerwise import start
from exactprune.bounds.program import compile_network
from exactprune.claim import Method, Status
from exactprune.deciders.input_split import InputSplit, Question, SplitLimits


def run(seed: int, seconds: float = 20.0, **limits: int):
    network, box = small_case(seed)
    program = compile_network(network)
    state = start(program, *program.box(box))
    for layer in range(program.layers):
        state.enter(layer)
    questions = [Question(k, n, s) for k in range(program.layers) for n in range(state.at(k).lower.shape[1]) for s in (1, -1)]
    ranges = exact_ranges(network, box)
    truth = np.array([ranges[q.layer][q.neuron][1] if q.sign > 0 else -ranges[q.layer][q.neuron][0] for q in questions])
    refuted = np.array([t > 0 for t in truth])
    tried: list[torch.Tensor] = []

    def witness(points: torch.Tensor) -> np.ndarray:
        tried.append(points)
        return refuted if len(tried) > 3 else np.zeros(len(questions), bool)

    result = InputSplit(program, state.known, questions, witness, SplitLimits(monotonic() + seconds, **limits)).run()
    return questions, truth, result, torch.cat(tried) if tried else torch.zeros(0, 1), box


@pytest.mark.parametrize("seed", range(10))
def test_what_is_proved_is_true_and_what_is_clear_is_proved(seed: int) -> None:
    questions, truth, result, tried, box = run(seed)
    for i in range(len(questions)):
        assert not result.proved[i] or truth[i] <= 0
        assert result.proved[i] or truth[i] > -1e-5 or i in result.reasons
        assert result.proved[i] or truth[i] > -1e-3, f"clearly stable, open: {result.reasons.get(i)}"
    assert bool(((tried >= torch.tensor(box.lower)) & (tried <= torch.tensor(box.upper))).all())


def test_limits_end_with_reasons() -> None:
    _, truth, result, _, _ = run(2, seconds=0.0)
    assert all("time limit" in reason for reason in result.reasons.values()) and result.reasons
    _, _, result, _, _ = run(2, boxes=1, batch=1)
    assert all(truth[i] <= 0 for i in np.flatnonzero(result.proved))
    assert any("gave up" in reason for reason in result.reasons.values())


def test_the_batch_changes_no_proof() -> None:
    found = [run(4, batch=batch)[2].proved for batch in (1, 7, 512)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("seed", [4, 5, 7, 8, 10, 11])
def test_the_checker_accepts_its_boxes(seed: int) -> None:
    network, box = small_case(seed)
    result = verify(network, box, VerifyOptions(decider="input-split"))
    assert result.check is not None and result.check["rejected"] == 0


def test_it_settles_what_bounds_leave_open() -> None:
    used = 0
    for seed in range(20):
        result = verify(*small_case(seed), VerifyOptions(decider="input-split"))
        used += sum(int(((v.method == Method.INPUT_SPLIT) & (v.status != Status.UNKNOWN)).sum()) for v in result.layers)
    assert used > 0
