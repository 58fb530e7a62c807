"""HiGHS, and the only module that talks to it (Huangfu and Hall, *Parallelizing the dual revised simplex method*,
2018).

What comes back is a value that never raises hopes: for deciding, only ``dual_bound`` may be read. For a MILP it is
HiGHS' own dual bound (on a time-out the objective is merely an incumbent). For an LP it is recomputed here from the
row duals y by weak duality,

    max c.x  <=  sum_i max(y_i L_i, y_i U_i) + sum_j max((c - A'y)_j l_j, (c - A'y)_j u_j),

which holds for any y, optimal or not (Neumaier and Shcherbina, *Safe bounds in linear and mixed-integer linear
programming*, 2004), up to float64 rounding. Neither is rigorous: tolerances of 1e-7 hide inside a MILP, so a bound
from here *suggests* a verdict and a certificate has to confirm it.

HiGHS solves a model with a NaN to "Optimal", calls lower > upper "Infeasible" and drops coefficients up to 1e-9 with a
warning only, so such models are refused before they are passed, with the reason.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Literal

import highspy
import numpy as np
from scipy import sparse

from exactprune.formulations.arrays import MilpArrays, power_of_two_below

Sense = Literal["max", "min"]
Stop = Callable[[float, float], bool]
HARMLESS = "non-empty integrality"  # an LP is passed with integrality 0 for every column
SMALLEST, LARGEST, INFINITE = 1e-9, 1e15, 1e20


class SolveStatus(Enum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    TIME_LIMIT = "time limit"
    STOPPED = "stopped"
    ERROR = "error"


@dataclass(frozen=True)
class HighsOptions:
    """What HiGHS is told, recorded with every result.

    Attributes:
        time_limit: seconds.
        threads: for one solve.
        mip_gap: relative gap at which a MILP counts as optimal.
        tolerance: primal and dual feasibility tolerance.
        presolve: whether to presolve.
        seed: of HiGHS' random choices.
    """

    time_limit: float = 60.0
    threads: int = 1
    mip_gap: float = 0.0
    tolerance: float = 1e-7
    presolve: bool = True
    seed: int = 0

    def settings(self) -> dict[str, int | float | str]:
        """HiGHS' own option names and values."""
        return {
            "threads": self.threads, "time_limit": float(self.time_limit), "mip_rel_gap": self.mip_gap,
            "primal_feasibility_tolerance": self.tolerance, "dual_feasibility_tolerance": self.tolerance,
            "presolve": "on" if self.presolve else "off", "random_seed": self.seed,
        }

    def record(self) -> dict[str, object]:
        """JSON-able, with the solver's version."""
        return {"solver": "HiGHS", "version": version(), **asdict(self)}


@dataclass(frozen=True, eq=False)
class HighsOutcome:
    """How a solve ended and what is known.

    Attributes:
        status: see ``SolveStatus``.
        reason: in words, empty when optimal.
        sense: of the objective.
        objective: value of ``x``; NaN without a solution. Never decides anything.
        dual_bound: no feasible point is beyond it, up to the solver's tolerances; infinite when nothing is known. For
            an LP without points it is the bound that a Farkas proof gives, an arbitrary number beyond zero.
        x: best solution, or None.
        row_duals: y of an LP in the convention reduced costs = c - A'y, or None. If the LP has no points, they prove
            that.
        nodes: branch-and-bound nodes.
        iterations: simplex iterations.
        seconds: wall clock.
        warnings: what HiGHS warned about while solving.
    """

    status: SolveStatus
    reason: str
    sense: Sense
    objective: float = float("nan")
    dual_bound: float = float("inf")
    x: np.ndarray | None = None
    row_duals: np.ndarray | None = None
    nodes: int = 0
    iterations: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = field(default=())

    @property
    def optimal(self) -> bool:
        """Whether HiGHS claims optimality."""
        return self.status is SolveStatus.OPTIMAL


def version() -> str:
    """Version of the HiGHS library."""
    return f"{highspy.HIGHS_VERSION_MAJOR}.{highspy.HIGHS_VERSION_MINOR}.{highspy.HIGHS_VERSION_PATCH}"


def refusal(arrays: MilpArrays) -> str | None:
    """Why this model must not be given to HiGHS, in one line; None if it may."""
    for words, array, infinite in (("objective", arrays.c, False), ("matrix", arrays.A.data, False),
                                   ("row bounds", np.r_[arrays.row_lower, arrays.row_upper], True),
                                   ("column bounds", np.r_[arrays.col_lower, arrays.col_upper], True)):
        if np.isnan(array).any():
            return f"{int(np.isnan(array).sum())} NaN in the {words}"
        if not infinite and not np.isfinite(array).all():
            return f"{int((~np.isfinite(array)).sum())} infinite values in the {words}"
        if (np.isfinite(array) & (np.abs(array) >= (INFINITE if infinite else LARGEST))).any():
            return f"values too large for HiGHS in the {words} (up to {np.abs(array[np.isfinite(array)]).max():.3g})"
    if not np.isfinite(arrays.offset):
        return f"the objective's offset is {arrays.offset}"
    for words, lower, upper in (
        ("row", arrays.row_lower, arrays.row_upper),
        ("column", arrays.col_lower, arrays.col_upper),
    ):
        crossed = np.flatnonzero(lower > upper)
        if crossed.size:
            i = int(crossed[0])
            return f"{words} {i} has lower {lower[i]!r} > upper {upper[i]!r} ({crossed.size} such)"
    return _refuse_small(arrays)


def _refuse_small(arrays: MilpArrays) -> str | None:
    small = (arrays.A.data != 0) & (np.abs(arrays.A.data) <= SMALLEST)
    if small.any():
        return (f"{int(small.sum())} matrix coefficients of absolute value <= {SMALLEST:g}, which HiGHS would drop; "
                "rescale or relax the rows")
    return None


def solve(arrays: MilpArrays, sense: Sense, options: HighsOptions | None = None, *, stop: Stop | None = None,
          cancel: threading.Event | None = None, start: np.ndarray | None = None,
          improving: Callable[[np.ndarray], None] | None = None) -> HighsOutcome:
    """One solve in a fresh solver.

    Args:
        arrays: the program; with integers it is solved as a MILP.
        sense: "max" or "min".
        options: see ``HighsOptions``.
        stop: called with (incumbent, dual bound) now and then during a MILP; True ends the solve (status ``STOPPED``).
        cancel: when set, from any thread, the solve ends soon.
        start: a solution to start a MILP from (repaired or ignored if infeasible).
        improving: called with each better solution of a MILP, in the solver's own thread.
    """
    began = time.perf_counter()
    options = options or HighsOptions()
    why = refusal(arrays)
    if why is not None:
        return HighsOutcome(SolveStatus.ERROR, f"refused: {why}", sense, dual_bound=_unknown(sense))
    if not arrays.c.size:
        return _constant(arrays, sense)
    session = _Session(arrays, sense, options, cancel)
    if session.failed is not None:
        return session.failed
    session.listen(stop, improving)
    if start is not None:
        session.start_from(start)
    return session.run(began)


class WarmLP:
    """One LP kept in the solver while its objective and column bounds change, each solve from the last basis.

    After a new objective the basis is primal feasible (primal simplex), after new bounds dual feasible (dual
    simplex). A solve that ends in an error clears the solver, so the next one starts from scratch.
    """

    def __init__(self, arrays: MilpArrays, sense: Sense, options: HighsOptions | None = None,
                 cancel: threading.Event | None = None) -> None:
        self._arrays = arrays.relaxed()
        self._sense: Sense = sense
        self._options = options or HighsOptions()
        self._refused = refusal(self._arrays)
        constant = not self._arrays.c.size
        self._session = None if self._refused or constant else _Session(self._arrays, sense, self._options, cancel)
        self._last = (self._arrays.c, self._arrays.col_lower, self._arrays.col_upper)

    @property
    def arrays(self) -> MilpArrays:
        """The program without its changes."""
        return self._arrays

    def solve(self, c: np.ndarray | None = None, offset: float = 0.0, col_lower: np.ndarray | None = None,
              col_upper: np.ndarray | None = None, time_limit: float | None = None) -> HighsOutcome:
        """Solve with this objective and these column bounds (the model's own where None)."""
        began = time.perf_counter()
        base = self._arrays
        now = base.with_objective(base.c if c is None else c, offset if c is not None else base.offset)
        now = now.with_bounds(base.col_lower if col_lower is None else col_lower,
                              base.col_upper if col_upper is None else col_upper)
        why = self._refused or refusal(now)
        if why is not None:
            return HighsOutcome(SolveStatus.ERROR, f"refused: {why}", self._sense, dual_bound=_unknown(self._sense))
        if self._session is None:
            return _constant(now, self._sense)
        if self._session.failed is not None:
            return self._session.failed
        self._session.change(now, self._options.time_limit if time_limit is None else time_limit)
        outcome = self._session.run(began)
        if outcome.status is SolveStatus.ERROR:
            self._session.forget()
        return outcome


def _constant(arrays: MilpArrays, sense: Sense) -> HighsOutcome:
    """The outcome of a program without columns, which HiGHS calls empty: its offset, if 0 satisfies every row."""
    if np.any(arrays.row_lower > 0) or np.any(arrays.row_upper < 0):
        return HighsOutcome(
            SolveStatus.INFEASIBLE, "no columns, and a row excludes 0", sense, dual_bound=_unknown(sense)
        )
    return HighsOutcome(SolveStatus.OPTIMAL, "", sense, arrays.offset, arrays.offset, np.zeros(0),
                        np.zeros(arrays.A.shape[0]))


def _unknown(sense: Sense) -> float:
    return np.inf if sense == "max" else -np.inf


class _Session:
    """One HiGHS object; the objective is scaled by a power of two so that tolerances are relative to it."""

    def __init__(self, arrays: MilpArrays, sense: Sense, options: HighsOptions, cancel: threading.Event | None) -> None:
        self.sense: Sense = sense
        self.options, self.cancel = options, cancel
        self.warnings: list[str] = []
        self.improving: Callable[[np.ndarray], None] | None = None
        self.highs: Any = highspy.Highs()
        self.highs.setOptionValue("log_to_console", False)
        self.highs.cbLogging.subscribe(self._log)
        for name, value in options.settings().items():
            if self.highs.setOptionValue(name, value) != highspy.HighsStatus.kOk:
                raise ValueError(f"HiGHS does not take option {name} = {value!r}")
        if cancel is not None:
            self.highs.cbSimplexInterrupt.subscribe(self._interrupt)
            self.highs.cbIpmInterrupt.subscribe(self._interrupt)
        self.arrays, self.scale = arrays, self._scale(arrays)
        self.failed = self._pass(arrays)

    def _scale(self, arrays: MilpArrays) -> float:
        return float(1.0 / power_of_two_below(np.abs(arrays.c).max(initial=0.0)))

    def _pass(self, arrays: MilpArrays) -> HighsOutcome | None:
        A: Any = sparse.csr_array(arrays.A)
        sense = highspy.ObjSense.kMaximize if self.sense == "max" else highspy.ObjSense.kMinimize
        status = self.highs.passModel(
            A.shape[1], A.shape[0], A.nnz, int(highspy.MatrixFormat.kRowwise), int(sense), arrays.offset * self.scale,
            arrays.c * self.scale, arrays.col_lower, arrays.col_upper, arrays.row_lower, arrays.row_upper,
            A.indptr.astype(np.int32), A.indices.astype(np.int32), A.data.astype(np.float64),
            arrays.integrality.astype(np.int32))
        if status == highspy.HighsStatus.kOk:
            return None
        words = "; ".join(self.warnings) or str(status)
        return HighsOutcome(SolveStatus.ERROR, f"refused: HiGHS does not take the model as it is: {words}", self.sense,
                            dual_bound=_unknown(self.sense))

    # -- callbacks ---------------------------------------------------------------------------------------------

    def _log(self, event: Any) -> None:
        serious = event.data_out.log_type in (highspy.HighsLogType.kWarning, highspy.HighsLogType.kError)
        if serious and HARMLESS not in event.message:
            self.warnings.append(event.message.strip())

    def _interrupt(self, event: Any) -> None:
        if self.cancel is not None and self.cancel.is_set():
            event.interrupt()

    def listen(self, stop: Stop | None, improving: Callable[[np.ndarray], None] | None) -> None:
        def check(event: Any) -> None:
            out = event.data_out
            if stop is not None and stop(out.mip_primal_bound / self.scale, out.mip_dual_bound / self.scale):
                event.interrupt()
            self._interrupt(event)

        if stop is not None or self.cancel is not None:
            self.highs.cbMipInterrupt.subscribe(check)
        if improving is not None:
            self.highs.cbMipImprovingSolution.subscribe(lambda event: improving(np.array(event.data_out.mip_solution)))

    # -- running -----------------------------------------------------------------------------------------------

    def start_from(self, x: np.ndarray) -> None:
        solution = highspy.HighsSolution()
        solution.col_value = list(map(float, x))
        self.highs.setSolution(solution)

    def change(self, arrays: MilpArrays, time_limit: float) -> None:
        every = np.arange(arrays.c.size, dtype=np.int32)
        new_objective = not np.array_equal(arrays.c, self.arrays.c) or arrays.offset != self.arrays.offset
        new_bounds = not (np.array_equal(arrays.col_lower, self.arrays.col_lower)
                          and np.array_equal(arrays.col_upper, self.arrays.col_upper))
        self.arrays, self.scale = arrays, self._scale(arrays)
        if new_objective:
            self.highs.changeColsCost(every.size, every, arrays.c * self.scale)
            self.highs.changeObjectiveOffset(arrays.offset * self.scale)
        if new_bounds:
            self.highs.changeColsBounds(every.size, every, arrays.col_lower, arrays.col_upper)
        self.highs.setOptionValue("simplex_strategy", 4 if new_objective and not new_bounds else 1)
        self.highs.setOptionValue("time_limit", self.highs.getRunTime() + float(time_limit))

    def forget(self) -> None:
        self.highs.clearSolver()

    def run(self, began: float) -> HighsOutcome:
        self.warnings.clear()
        not_started = highspy.HighsModelStatus.kNotset
        if self.highs.run() == highspy.HighsStatus.kError and self.highs.getModelStatus() == not_started:
            highspy.Highs.resetGlobalScheduler(True)  # it was started with another number of threads
            self.highs.run()
        status, reason = _read(self.highs)
        info, solution = self.highs.getInfo(), self.highs.getSolution()
        integer = bool(self.arrays.integrality.any())
        has_x = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        x = np.array(solution.col_value) if has_x else None
        if x is not None and not np.isfinite(x).all():
            status, reason, x = SolveStatus.ERROR, "HiGHS returned a solution that is not finite", None
        duals = np.array(solution.row_dual) / self.scale if not integer and solution.dual_valid else None
        if status is SolveStatus.INFEASIBLE:
            duals = None if integer else self._farkas()
        bound = info.mip_dual_bound / self.scale if integer else self._weak_duality(duals)
        unknown = status is SolveStatus.ERROR or (status is SolveStatus.INFEASIBLE and duals is None)
        if unknown or not np.isfinite(bound):
            bound = _unknown(self.sense)
        objective = float(self.arrays.c @ x + self.arrays.offset) if x is not None else np.nan
        nodes, iterations = max(0, int(info.mip_node_count)), max(0, int(info.simplex_iteration_count))
        return HighsOutcome(status, reason, self.sense, objective, float(bound), x, duals, nodes, iterations,
                            time.perf_counter() - began, tuple(self.warnings))

    def _farkas(self) -> np.ndarray | None:
        """Row duals that prove, by weak duality, that an LP has no points: a dual ray, taken far enough; None if HiGHS'
        ray does not prove it. The bound they give lies beyond zero by what y = 0 gives on the other side."""
        _, exists, ray = self.highs.getDualRay()
        if not exists or ray is None or not np.isfinite(ray).all():
            return None
        sign = 1.0 if self.sense == "max" else -1.0
        feasibility = self.arrays.with_objective(np.zeros(self.arrays.c.size))
        worth, y = min((sign * weak_duality(feasibility, s * np.asarray(ray), self.sense), s) for s in (1.0, -1.0))
        start = abs(weak_duality(self.arrays, np.zeros(len(ray)), self.sense))
        return (2 * start + 1.0) / -worth * y * np.asarray(ray) if worth < 0 and np.isfinite(start / worth) else None

    def _weak_duality(self, y: np.ndarray | None) -> float:
        """The LP's dual bound at y; y_i of the wrong sign for a one-sided row is replaced by 0."""
        if y is None or y.size != self.arrays.A.shape[0] or not np.isfinite(y).all():
            return _unknown(self.sense)
        return weak_duality(self.arrays, y, self.sense)


def weak_duality(arrays: MilpArrays, y: np.ndarray, sense: Sense) -> float:
    """The dual bound that any row duals y give (float64, not outward rounded); see the top of the file."""
    if sense == "min":
        negated = arrays.with_objective(-arrays.c, -arrays.offset)
        return -weak_duality(negated, -np.asarray(y), "max")
    y = np.where((y > 0) & np.isinf(arrays.row_upper) | (y < 0) & np.isinf(arrays.row_lower), 0.0, y)
    reduced = arrays.c - arrays.A.T @ y
    side = np.where(y > 0, arrays.row_upper, arrays.row_lower)
    edge = np.where(reduced > 0, arrays.col_upper, arrays.col_lower)
    rows = np.where(y != 0, y * np.where(y != 0, side, 0.0), 0.0).sum()
    columns = (reduced * np.where(reduced != 0, edge, 0.0)).sum()
    return float(arrays.offset + rows + columns)


_STATUS = {
    "kOptimal": (SolveStatus.OPTIMAL, ""),
    "kInfeasible": (SolveStatus.INFEASIBLE, "HiGHS claims that there is no solution"),
    "kTimeLimit": (SolveStatus.TIME_LIMIT, "time limit"),
    "kInterrupt": (SolveStatus.STOPPED, "stopped"),
    "kHighsInterrupt": (SolveStatus.STOPPED, "stopped"),
    "kObjectiveBound": (SolveStatus.STOPPED, "objective bound reached"),
    "kObjectiveTarget": (SolveStatus.STOPPED, "objective target reached"),
    "kSolutionLimit": (SolveStatus.STOPPED, "solution limit"),
    "kIterationLimit": (SolveStatus.TIME_LIMIT, "iteration limit"),
    "kMemoryLimit": (SolveStatus.ERROR, "out of memory"),
    "kUnbounded": (SolveStatus.ERROR, "HiGHS claims that a bounded model is unbounded"),
    "kUnboundedOrInfeasible": (SolveStatus.ERROR, "HiGHS claims unbounded or infeasible"),
}


def _read(highs: Any) -> tuple[SolveStatus, str]:
    """Every model status as ours; one that is not listed is an error."""
    status = highs.getModelStatus()
    return _STATUS.get(status.name, (SolveStatus.ERROR, f"HiGHS ended with status {highs.modelStatusToString(status)}"))


