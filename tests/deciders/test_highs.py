"""HiGHS behind its module: every status, every refusal, and the cases in which its plain answers are wrong."""

from __future__ import annotations

import threading
import time

import highspy
import numpy as np
import pytest
from exact_truth import exact_ranges_1d, interval_bounds, mlp, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from exactprune.claim import Status
from exactprune.deciders import milp
from exactprune.deciders.highs import HighsOptions, Sense, SolveStatus, WarmLP, refusal, solve, version, weak_duality
from exactprune.domain import uniform
from exactprune.formulations.arrays import Columns, MilpArrays, Rows
from exactprune.formulations.bigm import build


def program(c, rows=None, low=None, high=None, col_low=None, col_high=None, integer=None, offset=0.0) -> MilpArrays:
    c = np.asarray(c, float)
    n = c.size
    A = sparse.csr_array(np.atleast_2d(np.zeros((0, n)) if rows is None else np.asarray(rows, float)))
    m = A.shape[0]
    none = np.zeros(n, int)
    return MilpArrays(
        c, offset, A, np.full(m, -np.inf) if low is None else low, np.full(m, np.inf) if high is None else high,
        np.zeros(n) if col_low is None else col_low, np.ones(n) if col_high is None else col_high,
        np.zeros(n) if integer is None else integer, Columns(none, none, none, none, none),
        Rows(np.zeros(m, int), np.zeros(m, int), np.zeros(m, int), np.ones(m)))


def knapsack(size: int, seed: int = 0) -> MilpArrays:
    """Market split: tiny to write down, hard for branch and bound."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 99, (4, size))
    half = rows.sum(axis=1) // 2
    slack = np.kron(np.eye(4), [1.0, -1.0])
    return program(np.r_[np.zeros(size), np.full(8, -1.0)], np.c_[rows, slack], half, half,
                   col_high=np.r_[np.ones(size), np.full(8, 1e4)], integer=np.r_[np.ones(size), np.zeros(8)])


class TestStatuses:
    def test_lp_optimum_with_duals(self) -> None:
        outcome = solve(program([3.0, 2.0], [[1, 1]], high=[1.5], offset=1.0), "max")
        assert outcome.optimal
        assert outcome.reason == ""
        assert outcome.objective == pytest.approx(5.0)
        assert outcome.dual_bound == pytest.approx(5.0)
        assert outcome.row_duals == pytest.approx([2.0])
        np.testing.assert_allclose(outcome.x, [1, 0.5])

    def test_minimum(self) -> None:
        outcome = solve(program([3.0, 2.0], [[1, 1]], low=[1.5]), "min")
        assert (outcome.objective, outcome.dual_bound) == (pytest.approx(3.5), pytest.approx(3.5))

    def test_milp_optimum(self) -> None:
        outcome = solve(program([5.0, 4.0, 3.0], [[2, 3, 1]], high=[4.0], integer=[1, 1, 1]), "max")
        assert outcome.optimal
        assert outcome.dual_bound == pytest.approx(8.0)
        assert outcome.row_duals is None

    def test_no_rows_and_no_objective(self) -> None:
        assert solve(program([1.0, -1.0]), "max").dual_bound == pytest.approx(1.0)
        assert solve(program([0.0], offset=-2.0), "max").dual_bound == -2.0

    def test_no_columns(self) -> None:
        outcome = solve(program([], offset=-2.0), "max")
        assert (outcome.optimal, outcome.dual_bound, WarmLP(program([], offset=3.0), "max").solve().dual_bound) == (
            True,
            -2.0,
            3.0,
        )
        empty = program([], np.zeros((1, 0)), low=[1.0])
        assert solve(empty, "max").status is SolveStatus.INFEASIBLE

    def test_an_infeasible_milp_tells_nothing(self) -> None:
        outcome = solve(program([1.0, 1.0], [[1, 1]], low=[3.0], integer=[1, 1]), "max")
        assert outcome.status is SolveStatus.INFEASIBLE
        assert outcome.dual_bound == np.inf
        assert outcome.reason

    @pytest.mark.parametrize("sense", ["max", "min"])
    def test_an_infeasible_lp_comes_with_a_proof(self, sense: Sense) -> None:
        arrays = program([1.0, 1.0], [[1, 1], [1, -1]], low=[3.0, -np.inf], high=[np.inf, 0.5])
        outcome = solve(arrays, sense)
        assert outcome.status is SolveStatus.INFEASIBLE
        assert outcome.row_duals is not None
        sign = 1 if sense == "max" else -1
        assert sign * outcome.dual_bound < 0
        assert weak_duality(arrays, outcome.row_duals, sense) == outcome.dual_bound

    def test_unbounded_is_an_error(self) -> None:
        outcome = solve(program([1.0], col_high=[np.inf]), "max")
        assert outcome.status is SolveStatus.ERROR
        assert outcome.dual_bound == np.inf

    def test_a_time_out_gives_the_dual_bound_not_the_incumbent(self) -> None:
        outcome = solve(knapsack(40), "max", HighsOptions(time_limit=0.5))
        assert outcome.status is SolveStatus.TIME_LIMIT
        assert outcome.reason == "time limit"
        assert outcome.seconds < 5
        assert outcome.dual_bound >= -1e-6, "zero slack may be reachable for all HiGHS knows"
        assert not outcome.objective > outcome.dual_bound
        assert outcome.x is None or outcome.objective < -0.5

    def test_cancel_from_another_thread(self) -> None:
        cancel = threading.Event()
        threading.Timer(0.3, cancel.set).start()
        began = time.perf_counter()
        outcome = solve(knapsack(40), "max", HighsOptions(time_limit=30), cancel=cancel)
        assert outcome.status is SolveStatus.STOPPED
        assert time.perf_counter() - began < 10

    def test_stop_rule_sees_incumbent_and_bound(self) -> None:
        seen: list[tuple[float, float]] = []

        def stop(incumbent: float, bound: float) -> bool:
            seen.append((incumbent, bound))
            return incumbent > -1e9

        outcome = solve(knapsack(40), "max", HighsOptions(time_limit=30), stop=stop)
        assert outcome.status is SolveStatus.STOPPED
        assert seen[-1][0] > -1e9
        assert outcome.x is not None

    def test_improving_solutions_and_start(self) -> None:
        found: list[np.ndarray] = []
        arrays = knapsack(12)
        first = solve(arrays, "max", HighsOptions(time_limit=20), improving=found.append)
        assert first.optimal
        assert found
        again = solve(arrays, "max", HighsOptions(time_limit=20), start=first.x)
        assert again.objective == pytest.approx(first.objective)

    def test_options_are_recorded(self) -> None:
        record = HighsOptions(time_limit=3).record()
        assert record["time_limit"] == 3
        assert record["version"] == version()
        assert record["threads"] == 1

    def test_an_option_that_highs_does_not_take(self) -> None:
        with pytest.raises(ValueError, match="mip_rel_gap"):
            solve(program([1.0]), "max", HighsOptions(mip_gap=-1.0))

    def test_other_thread_counts(self) -> None:
        for threads in (1, 2, 1):
            assert solve(knapsack(8), "max", HighsOptions(threads=threads, time_limit=20)).optimal


class TestRefusals:
    good = program([1.0, 1.0], [[1.0, 2.0]], low=[0.0], high=[1.0])

    @pytest.mark.parametrize(("change", "words"), [
        ({"c": [np.nan, 1]}, "1 NaN in the objective"),
        ({"c": [np.inf, 1]}, "1 infinite values in the objective"),
        ({"A": sparse.csr_array([[np.nan, 1.0]])}, "1 NaN in the matrix"),
        ({"A": sparse.csr_array([[np.inf, 1.0]])}, "infinite values in the matrix"),
        ({"A": sparse.csr_array([[1e16, 1.0]])}, "too large"),
        ({"A": sparse.csr_array([[1e-9, 1.0]])}, "would drop"),
        ({"A": sparse.csr_array([[-1e-12, 1.0]])}, "would drop"),
        ({"row_lower": [2.0]}, "row 0 has lower"),
        ({"row_upper": [np.nan]}, "NaN in the row bounds"),
        ({"col_lower": [0.0, 1.5]}, "column 1 has lower"),
        ({"col_upper": [1.0, 1e21]}, "too large"),
        ({"col_upper": [np.nan, 1.0]}, "NaN in the column bounds"),
        ({"offset": np.nan}, "offset"),
    ])
    def test_refused_with_the_reason(self, change: dict, words: str) -> None:
        from dataclasses import replace

        bad = replace(self.good, **{k: v if k in ("A", "offset") else np.array(v) for k, v in change.items()})
        assert words in (refusal(bad) or "")
        for outcome in (solve(bad, "max"), WarmLP(bad, "max").solve()):
            assert outcome.status is SolveStatus.ERROR
            assert outcome.reason.startswith("refused: ")
            assert outcome.dual_bound == np.inf
            assert outcome.x is None

    def test_the_good_one_is_not_refused(self) -> None:
        assert refusal(self.good) is None
        assert solve(self.good, "max").optimal

    def test_a_warm_lp_refuses_a_bad_change_and_goes_on(self) -> None:
        lp = WarmLP(self.good, "max")
        assert "NaN" in lp.solve(np.array([np.nan, 1.0])).reason
        assert "lower" in lp.solve(col_lower=np.array([0.0, 2.0])).reason
        assert lp.solve().optimal


class TestPlainHighsIsWrong:
    """Why the refusals exist: the plain solver's answers to the same inputs (DESIGN 2)."""

    weight = np.array([[38.14555740356445], [4.355520725250244], [0.10518612712621689]])
    bias = np.array([-5.195638656616211, -4.320352077484131, -0.051050830632448196])
    out, constant = (
        np.array([[1.081760287284851, 3.6640846729278564, 3.692793369293213]]),
        np.array([-35.97267493689556]),
    )
    network = mlp([(weight, bias), (out, constant), (np.eye(1), np.zeros(1))])
    box = uniform(0, 1, (1,))

    def plain(self) -> highspy.HighsModelStatus:
        """The big-M MILP "exists z >= 0", as it is usually written."""
        low, high = interval_bounds(self.network, self.box)
        h = highspy.Highs()
        h.setOptionValue("output_flag", False)
        x, total = h.addVariable(0, 1), 0
        for i in range(3):
            form = self.weight[i, 0] * x + self.bias[i]
            z, d = h.addVariable(0, highspy.kHighsInf), h.addBinary()
            h.addConstr(z >= form)
            h.addConstr(z <= form - low[0][i] * (1 - d))
            h.addConstr(z <= high[0][i] * d)
            total = total + self.out[0, i] * z
        h.addConstr(total + self.constant[0] >= 0)
        h.run()
        return h.getModelStatus()

    def test_an_exact_maximum_of_1e_5_is_called_infeasible(self) -> None:
        assert 0 < exact_ranges_1d(self.network, self.box)[1][0][1] < 1.1e-5
        assert self.plain() == highspy.HighsModelStatus.kInfeasible, "HiGHS has changed: update DESIGN and docs"

    def test_ours_does_not_suggest_inactive(self) -> None:
        low, high = interval_bounds(self.network, self.box)
        (suggestion,) = milp.decide(self.network, self.box, low, high, 1, np.array([0])).suggestions
        assert suggestion.status in (Status.UNSTABLE, Status.UNKNOWN)
        assert suggestion.upper > 0

    def test_nan_is_solved_and_tiny_coefficients_are_dropped(self) -> None:
        h = highspy.Highs()
        h.setOptionValue("output_flag", False)
        x = h.addVariable(0, 1)
        h.addConstr(x * float("nan") <= 1)
        h.run()
        assert h.getModelStatus() == highspy.HighsModelStatus.kOptimal
        h = highspy.Highs()
        h.setOptionValue("output_flag", False)
        h.addVar(0, 1e9)
        added = h.addRow(-highspy.kHighsInf, 0.5, 1, np.array([0], np.int32), np.array([1e-9]))
        assert added == highspy.HighsStatus.kWarning
        h.changeColCost(0, 1.0)
        h.changeObjectiveSense(highspy.ObjSense.kMaximize)
        h.run()
        assert h.getObjectiveValue() == pytest.approx(1e9), "the row is gone: the maximum should be 5e8"


class TestWarmLP:
    @pytest.mark.parametrize("seed", range(5))
    def test_agrees_with_a_fresh_solver(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        network = random_mlp(rng, [4, 10, 8, 1])
        box = uniform(-1, 1, (4,))
        low, high = interval_bounds(network, box)
        model = build(network, box, low, high, target=1, binaries=False)
        warm = WarmLP(model.arrays, "max")
        for step in range(12):
            c, offset = model.objective(int(rng.integers(8)))
            c, offset = (c, offset) if rng.random() < 0.5 else (-c, -offset)
            fixed = {(0, int(i)): bool(rng.random() < 0.5) for i in rng.integers(0, 10, step % 4)}
            bottom, top = model.phases(fixed)
            got = warm.solve(c, offset, bottom, top)
            expected = solve(model.arrays.with_objective(c, offset).with_bounds(bottom, top), "max")
            assert got.status is expected.status
            assert not got.optimal or got.dual_bound == pytest.approx(expected.dual_bound, abs=1e-7)

    def test_time_limits_are_for_each_solve(self) -> None:
        lp = WarmLP(program([1.0, 2.0], [[1, 1]], high=[1.0]), "max", HighsOptions(time_limit=5))
        for _ in range(3):
            assert lp.solve(time_limit=1.0).optimal


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_row_duals_give_a_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, point = rng.normal(size=(5, 4)), rng.random(4)
    value = rows @ point
    low = np.where(rng.random(5) < 0.3, -np.inf, value - rng.random(5))
    high = np.where(rng.random(5) < 0.3, np.inf, value + rng.random(5))
    arrays = program(rng.normal(size=4), rows, low, high)
    y = rng.normal(size=5)
    assert weak_duality(arrays, y, "max") >= arrays.c @ point - 1e-12
    assert weak_duality(arrays, y, "min") <= arrays.c @ point + 1e-12
    best = solve(arrays, "max")
    assert best.row_duals is not None
    assert weak_duality(arrays, best.row_duals, "max") == pytest.approx(best.objective, abs=1e-7)
