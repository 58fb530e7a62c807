"""Branch and bound as tasks: trees that cover the box, decisions against exact ranges, limits, purity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_regions import exact_ranges
from verified import deep_case, small_case

from exactprune.bounds.layerwise import start
from exactprune.bounds.program import compile_network
from exactprune.deciders.proofs import Tree
from exactprune.deciders.tasks import Setting, Task, bounds_before, run_task


def setting(network, box, layer: int, memory: int = 1 << 28) -> Setting:
    program = compile_network(network)
    state = start(program, *program.box(box))
    for k in range(layer):
        state.enter(k)
        state.crown(k, state.open_rows(k))
    lower, upper = bounds_before(state, layer)
    return Setting(network, box, lower, upper, layer, "cpu", memory)


def questions(count: int, seconds: float = 20.0, nodes: int = 2000) -> Task:
    return Task(np.tile(np.arange(count), 2), np.repeat([1, -1], count), seconds, nodes)


def splits_form_a_full_tree(tree: Tree) -> None:
    """Preorder of a full binary tree, no neuron split twice on a path."""
    stack: list[frozenset] = [frozenset()]
    for split in tree.splits:
        path = stack.pop()
        if split is not None:
            assert split not in path and split[0] < tree.layer
            stack += [path | {split}] * 2
    assert not stack
    assert len(tree.leaves) == sum(split is None for split in tree.splits)


@pytest.mark.parametrize("seed", range(8))
def test_decisions_agree_with_exact_ranges(seed: int) -> None:
    network, box = small_case(seed)
    layer = len(network.relus) - 1
    ranges = exact_ranges(network, box)[layer]
    result = run_task(setting(network, box, layer), questions(len(ranges)))
    before = network.nodes[network.relus[layer]].inputs[0]
    values = network.evaluate_nodes(result.points.reshape(-1, *network.input_shape))[before]
    for decision in result.decisions:
        low, high = ranges[decision.neuron]
        most = high if decision.sign > 0 else -low
        assert (decision.tree is not None) + decision.refuted + bool(decision.reason) == 1
        if decision.tree is not None:
            assert most <= 0
            splits_form_a_full_tree(decision.tree)
        elif decision.refuted:
            assert most > 0 and (decision.sign * values[:, decision.neuron] > 0).any()
        else:
            assert abs(float(most)) < 1e-6, decision.reason


def test_hard_questions_need_trees() -> None:
    network, box = deep_case()
    result = run_task(setting(network, box, 2), questions(6))
    trees = [d.tree for d in result.decisions if d.tree is not None and len(d.tree.leaves) > 1]
    assert trees
    for tree in trees:
        splits_form_a_full_tree(tree)


def test_a_task_is_a_pure_function() -> None:
    network, box = deep_case()
    given = setting(network, box, 2)
    first, second = run_task(given, questions(6)), run_task(setting(network, box, 2), questions(6))
    np.testing.assert_array_equal(first.points, second.points)
    for a, b in zip(first.decisions, second.decisions, strict=True):
        assert (a.refuted, a.reason, a.bound, a.nodes) == (b.refuted, b.reason, b.bound, b.nodes)
        assert (a.tree is None) == (b.tree is None)
        assert a.tree is None or a.tree.record(24) == b.tree.record(24)  # type: ignore[union-attr]


def test_limits_end_with_reasons() -> None:
    network, box = deep_case()
    given = setting(network, box, 2)
    slow = run_task(given, questions(6, seconds=0.0))
    assert all(d.reason.startswith("time limit") for d in slow.decisions if d.tree is None and not d.refuted)
    few = run_task(given, questions(6, nodes=3))
    left = [d for d in few.decisions if d.tree is None and not d.refuted]
    assert left and all("gave up" in d.reason and d.bound > 0 for d in left)


def test_little_memory_changes_no_decision() -> None:
    network, box = deep_case()
    much, little = (run_task(setting(network, box, 2, memory), questions(6)) for memory in (1 << 30, 1 << 16))
    for a, b in zip(much.decisions, little.decisions, strict=True):
        assert (a.tree is None, a.refuted) == (b.tree is None, b.refuted)


def test_bounds_that_overflowed_are_no_reason_to_fail() -> None:
    network, box = deep_case()
    good = setting(network, box, 2)
    wide = tuple(np.full_like(a, np.inf) for a in good.upper)
    broken = Setting(network, box, tuple(-a for a in wide), wide, 2, "cpu", 1 << 28)
    result = run_task(broken, questions(6, nodes=4))
    assert all(d.reason or d.refuted or d.tree is not None for d in result.decisions)
    assert not any(torch.isnan(torch.tensor(d.bound)) for d in result.decisions)
