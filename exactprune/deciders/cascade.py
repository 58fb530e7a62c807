"""The cascade: every neuron's status, from the cheapest method that settles it, with the proof of every verdict.

Layer by layer: interval bounds, CROWN for the rows still open, witnesses by gradient ascent. Then alpha-CROWN for what lacks a
witness, and for unstable neurons of earlier layers while a later layer that lives on their bounds is open. What is open
then goes to the exact deciders: input splitting where there are few inputs, branch and bound over phases in rounds of
growing effort, so that the time goes where verdicts are cheapest, with a MILP as a last resort for witnesses. A verdict
is kept only when the independent checker accepts its record; otherwise it is ``unknown`` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, perf_counter

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.dual import initial_rows, optimise
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.layerwise import Layerwise, first_is_exact, start
from exactprune.bounds.program import compile_network
from exactprune.bounds.witness import WitnessSearch
from exactprune.claim import Method, Status
from exactprune.deciders.input_split import InputSplit, Question, SplitLimits
from exactprune.deciders.outcome import LayerSuggestions
from exactprune.deciders.proofs import Multipliers, Record, Tree, crown_record, linear_record
from exactprune.deciders.tasks import LP_AFTER, QUESTIONS_A_TASK, Setting, Task, TaskResult, bounds_before, run_task
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.progress import Progress

FEW_INPUTS = 8
ASCEND_AFTER = 2048  # boxes of input splitting, before gradient ascent is asked about what they leave open
MANY_QUESTIONS = 64  # above this, more restarts come before branch and bound
NODE_ROUNDS = (1024, 32_768, 1 << 22)  # nodes a layer, shared by its questions, 32 each at least
ALPHA_STEPS = 20
CROWN_FLOPS = 1e11  # of CROWN between two looks at the clock
PATIENCE = 1024  # targets of an ascent in a row that find nothing, the most promising first, before a layer is left
BARREN = 512  # questions of alpha-CROWN in a row that are not settled, the most promising first, before a layer is left
TIGHTEN_FLOPS = 3e11  # for tightening rows that already have witnesses, a layer
BITS = (16, 24, 40)

RunTasks = Callable[[Setting, Sequence[Task]], Iterable[tuple[int, TaskResult]]]
Asked = Mapping[int, tuple[np.ndarray, np.ndarray]]  # layer -> neurons that lack a positive, and a negative witness
Suggest = Callable[[Asked, Sequence[np.ndarray], Sequence[np.ndarray], float], Iterable[LayerSuggestions]]
_METHOD_OF = {"milp": Method.MILP, "scaling-up": Method.SCALING_UP, "leo": Method.LEO, "lp": Method.LP}


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        exact: decide what bounds and witnesses leave open.
        decider: ``auto``, ``branch-and-bound``, ``lp``, ``input-split``, or a solver that only suggests (``milp``,
            ``scaling-up``, ``leo``).
        time_limit: seconds for everything but interval bounds and the certificate, counted from the start; what comes before the
            exact stage gets half of them.
        memory: bytes.
        device: torch device.
        seed: of every random choice.
    """

    exact: bool = True
    decider: str = "auto"
    time_limit: float = 600.0
    memory: int = 2 << 30
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class StageTime:
    """One line of the account: seconds spent, neurons settled, in words what happened."""

    name: str
    seconds: float
    settled: int
    detail: str


@dataclass(eq=False)
class _Layer:
    status: np.ndarray
    method: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)

    def settle(self, neurons: np.ndarray, status: Status, method: Method) -> int:
        fresh = neurons[self.status[neurons] == Status.UNKNOWN]
        self.status[fresh], self.method[fresh] = status, method
        for i in fresh.tolist():
            self.reasons.pop(i, None)
        return len(fresh)


@dataclass(frozen=True, eq=False)
class _Linear:
    """alpha-CROWN rows: one-leaf proofs of one side."""

    layer: int
    neurons: np.ndarray
    sign: int
    multipliers: Multipliers
    rows: np.ndarray

    def record(self, bits: int) -> Record:
        return linear_record(self.layer, self.neurons, self.sign, self.multipliers, self.rows, bits)


@dataclass(frozen=True, eq=False)
class _Fixed:
    """A record that has no multipliers to quantise."""

    content: Record

    def record(self, bits: int) -> Record:
        return self.content


class Cascade:
    """One run. Use ``run`` once, then read ``layers``, ``state``, ``witnesses`` and ``proofs``.

    Args:
        network, box: what is verified.
        effort: how hard to try.
        progress: told what happens.
        run_tasks: executes branch-and-bound tasks; in this process by default.
        suggest: a solver's suggestions; asked first by the deciders that only suggest, late by ``auto``.
        data: witness candidates, (samples, *input_shape).
        on_stage: called after every stage, for checkpoints.
    """

    def __init__(self, network: Network, box: Box, effort: Effort, progress: Progress, run_tasks: RunTasks | None = None,
                 suggest: Suggest | None = None, data: np.ndarray | None = None,
                 on_stage: Callable[[Cascade], None] | None = None) -> None:
        self.network, self.box, self.effort, self.progress = network, box, effort, progress
        self.run_tasks, self.suggest, self.data, self.on_stage = run_tasks or _serial, suggest, data, on_stage
        self.program = compile_network(network, effort.device)
        self.state: Layerwise = start(self.program, *self.program.box(box), effort.memory)
        self.search = WitnessSearch(network, box, device=effort.device, seed=effort.seed, memory=min(effort.memory, 1 << 29))
        sizes = [self.program.sizes[i] for i in network.relus]
        self.layers = [_Layer(np.zeros(n, np.int8), np.zeros(n, np.int8)) for n in sizes]
        self.proofs: list[_Fixed | _Linear | Tree] = []
        self.stages: list[StageTime] = []
        self.sharpened = False
        self.before_split: dict[int, NodeBounds] = {}
        self.began = monotonic()
        self.adopted = 0  # so many of the proofs are from an earlier run's file

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything, in order."""
        self.began = monotonic()
        with self._stage("witnesses"):
            if self.data is not None:
                self.search.data(self.data)
            self.progress.stage("witnesses", self.search.corner_targets())
            self.search.corners(self.progress.advance)  # those of the first layer show most signs of all layers
            self.search.sample(1024)
        for layer in range(self.program.layers):
            self._bounds(layer)
        for layer in range(self.program.layers):
            if any(len(self._questions(k)[0]) for k in range(layer, self.program.layers)):
                self._sharpen(layer)
        if self.effort.exact:
            self._exact()
        self._explain()

    def adopt(self, records: Sequence[Record], points: np.ndarray, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray],
              reasons: Sequence[Mapping[int, str]]) -> None:
        """Go on from what an interrupted run knew; its proofs are checked at the end like any other."""
        self.proofs.extend(_Fixed(record) for record in records)
        self.adopted = len(self.proofs)
        self.search.try_points(points, Method.SAMPLE)
        for layer, (low, up) in enumerate(zip(lower, upper, strict=True)):
            if len(low):
                self.state.propagate(layer)
                neurons = np.arange(len(low))
                self._narrow(layer, neurons, 1, up)
                self._narrow(layer, neurons, -1, -low)
                self._settle_by_bounds(layer, Method.BRANCH_AND_BOUND)
                self.layers[layer].reasons.update(reasons[layer])
        self._note_unstable()

    @contextmanager
    def _stage(self, name: str, detail: str = "", total: int | None = None) -> Iterator[None]:
        began, before = perf_counter(), self._open_count()
        self.progress.stage(name, total)
        yield
        self._note_unstable()
        self.stages.append(StageTime(name, perf_counter() - began, before - self._open_count(), detail))
        if self.on_stage is not None:
            self.on_stage(self)

    def _open_count(self) -> int:
        return int(sum((layer.status == Status.UNKNOWN).sum() for layer in self.layers))

    def _note_unstable(self) -> None:
        for k, layer in enumerate(self.layers):
            positive, negative = self.search.lacking(k)
            seen = self.search.methods(k)
            here = np.flatnonzero(~positive & ~negative & (layer.status == Status.UNKNOWN) & (seen > 0))
            layer.method[here] = seen[here]
            layer.status[here] = Status.UNSTABLE
            for i in here.tolist():
                layer.reasons.pop(i, None)

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _bounds(self, layer: int) -> None:
        name = self.network.nodes[self.network.relus[layer]].name
        with self._stage(f"interval {name}"):
            self.state.enter(layer)
            self._settle_by_bounds(layer, Method.INTERVAL)
        rows = self.state.open_rows(layer)
        if len(rows) and not first_is_exact(self.program, layer):
            with self._stage(f"crown {name}", f"{len(rows)} rows", len(rows)):
                rows = self._crown(layer, rows)
                proved = self._settle_by_bounds(layer, Method.CROWN)
                needed = rows.cpu().numpy() if layer + 1 < self.program.layers else proved
                if len(needed):
                    self.proofs.append(_Fixed(crown_record(layer, needed)))
        targets, left = sum(int(mask.sum()) for mask in self.search.lacking(layer)), self._prepares_until() - monotonic()
        if targets and left > 0:
            with self._stage(f"ascent {name}", f"{targets} targets", targets):
                self.search.ascent(self._only(layer), rounds=1, patience=PATIENCE, time_limit=left,
                                   progress=self.progress.advance)

    def _crown(self, layer: int, rows: Tensor) -> Tensor:
        """CROWN for some rows, the most promising first, as far as time allows; returns those that were done."""
        cost = 4.0 * self.network.macs  # of a row, at most: two sides
        size = max(1, int(CROWN_FLOPS / (cost + 1)))
        if len(rows) > size:
            rows = rows[torch.tensor(self._by_promise(layer, rows.cpu().numpy()), device=rows.device)]
        done = 0
        for part in rows.split(size):
            if done and monotonic() > self._prepares_until():
                break
            self.state.crown(layer, part, self.progress.advance)
            done += len(part)
        return rows[:done]

    def _prepares_until(self) -> float:
        """When CROWN, ascent and alpha-CROWN have to leave the rest of the time to the exact stage."""
        return self.began + (0.5 if self.effort.exact else 1.0) * self.effort.time_limit

    def _sharpen(self, layer: int) -> None:
        """CROWN again over what was sharpened since, then alpha-CROWN."""
        if first_is_exact(self.program, layer):
            return
        name = self.network.nodes[self.network.relus[layer]].name
        rows = np.unique(self._questions(layer)[0])
        if self.sharpened and len(rows):
            with self._stage(f"crown {name}", f"{len(rows)} rows again", len(rows)):
                self.state.relaxations.clear()
                self.state.enter(layer)
                rows = self._crown(layer, torch.tensor(rows, device=self.program.device)).cpu().numpy()
                self.proofs.append(_Fixed(crown_record(layer, rows)))
                self._settle_by_bounds(layer, Method.CROWN)
        self._alpha(layer, name)

    def _settle_by_bounds(self, layer: int, method: Method) -> np.ndarray:
        """Note what the bounds fix; returns the neurons newly settled."""
        bounds = self.state.at(layer)
        lower, upper = bounds.lower[0].cpu().numpy(), bounds.upper[0].cpu().numpy()
        here = self.layers[layer]
        before = here.status.copy()
        here.settle(np.flatnonzero(upper <= 0), Status.INACTIVE, method)
        here.settle(np.flatnonzero(lower >= 0), Status.ACTIVE, method)
        self.search.rule_out(layer, upper <= 0, lower >= 0)
        return np.flatnonzero(before != here.status)

    def _only(self, layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
        masks = [self.search.lacking(k) for k in range(self.program.layers)]
        return [pair if k == layer else (np.zeros_like(pair[0]), np.zeros_like(pair[1])) for k, pair in enumerate(masks)]

    def _questions(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(neurons, signs) of one layer that are neither proved nor refuted."""
        positive, negative = self.search.lacking(layer)
        open_ = self.layers[layer].status == Status.UNKNOWN
        plus, minus = np.flatnonzero(positive & open_), np.flatnonzero(negative & open_)
        return np.concatenate([plus, minus]), np.concatenate([np.ones(len(plus), np.int64), -np.ones(len(minus), np.int64)])

    def _alpha(self, layer: int, name: str) -> None:
        questions = self._questions(layer)
        extra, order = self._tighten(layer, *questions), self._by_promise(layer, *questions)
        rows = len(order) + len(extra[0])
        if not rows or monotonic() > self._prepares_until():
            return
        with self._stage(f"alpha-crown {name}", f"{rows} rows", rows):
            self._alpha_rows(layer, questions[0][order], questions[1][order], BARREN)
            self._alpha_rows(layer, *extra)

    def _by_promise(self, layer: int, neurons: np.ndarray, signs: np.ndarray | None = None) -> np.ndarray:
        """Order of questions: first those whose bound is nearest to settling them, in parts of the neuron's range.

        Without ``signs``, the nearer of the two bounds counts.
        """
        bounds = self.state.at(layer)
        lower, upper = bounds.lower[0].cpu().numpy()[neurons], bounds.upper[0].cpu().numpy()[neurons]
        with np.errstate(all="ignore"):
            away = (np.minimum(upper, -lower) if signs is None else np.where(signs > 0, upper, -lower)) / (upper - lower)
        return np.argsort(np.nan_to_num(away, nan=np.inf), kind="stable")

    def _alpha_rows(self, layer: int, neurons: np.ndarray, signs: np.ndarray, patience: float = float("inf")) -> None:
        """alpha-CROWN on some rows, in parts; ends early when that settles nothing any more, or for lack of time."""
        step = min(512, max(1, int(self.effort.memory // (8 * 30 * max(self.program.sizes) * max(1, layer)))))
        barren = 0
        for at in range(0, len(neurons), step):
            if barren >= patience or monotonic() > self._prepares_until():
                return
            part, before = slice(at, at + step), len(self._questions(layer)[0])
            self._alpha_part(layer, neurons[part], signs[part])
            barren = 0 if len(self._questions(layer)[0]) < before else barren + len(neurons[part])
            self.progress.advance(len(neurons[part]))

    def _tighten(self, layer: int, neurons: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows worth tightening though they have witnesses: unstable neurons that later layers depend on."""
        rows = self.state.open_rows(layer).cpu().numpy()
        all_neurons, all_signs = np.tile(rows, 2), np.repeat([1, -1], len(rows))
        asked = set(zip(neurons.tolist(), signs.tolist(), strict=True))
        fresh = np.array([(n, s) not in asked for n, s in zip(all_neurons.tolist(), all_signs.tolist(), strict=True)], bool)
        cost = 6.0 * ALPHA_STEPS * self.network.macs * len(all_neurons)
        later = any(len(self._questions(k)[0]) for k in range(layer + 1, self.program.layers))
        if not later or cost > TIGHTEN_FLOPS:
            fresh[:] = False
        return all_neurons[fresh], all_signs[fresh]

    def _alpha_part(self, layer: int, neurons: np.ndarray, signs: np.ndarray) -> None:
        device = self.program.device
        rows = initial_rows(self.program, layer, torch.tensor(neurons, device=device),
                            torch.tensor(signs, dtype=torch.float64, device=device), self.state.known)
        solved = optimise(self.program, rows, self.state.known, ALPHA_STEPS)
        self.search.try_points(solved.solution.corner, Method.ASCENT, layer + 1)
        self.search.try_points(solved.average, Method.ASCENT, layer + 1)
        before = self.state.at(layer)
        bound = solved.bound.cpu().numpy()
        lower, upper = before.lower[0].cpu().numpy(), before.upper[0].cpu().numpy()
        old = np.where(signs > 0, upper[neurons], -lower[neurons])
        later = layer + 1 < self.program.layers
        gain = 0.005 * np.nan_to_num(upper - lower, posinf=0.0)[neurons]
        useful = (bound <= 0) | (later & (bound < old - gain))
        multipliers = self._multipliers(layer, solved.solution.multipliers)
        for sign in (1, -1):
            which = np.flatnonzero(useful & (signs == sign))
            if len(which):
                self.sharpened = True
                self.proofs.append(_Linear(layer, neurons[which], sign, multipliers, which))
                self._narrow(layer, neurons[which], sign, bound[which])
        self._settle_by_bounds(layer, Method.ALPHA_CROWN)

    def _multipliers(self, layer: int, values: dict[int, Tensor] | object) -> Multipliers:
        neurons, kept = {}, {}
        assert isinstance(values, dict)
        for k, a in values.items():
            bounds = self.state.at(k)
            unstable = torch.nonzero((bounds.lower[0] < 0) & (bounds.upper[0] > 0)).flatten()
            if len(unstable):
                neurons[k], kept[k] = unstable.cpu().numpy(), a[:, unstable].cpu().numpy()
        return Multipliers(neurons, kept)

    def _narrow(self, layer: int, neurons: np.ndarray, sign: int, bound: np.ndarray) -> None:
        at = torch.tensor(neurons, device=self.program.device)
        value = torch.tensor(bound, dtype=torch.float64, device=self.program.device)[None]
        wide = torch.full_like(value, torch.inf)
        lower, upper = (-wide, value) if sign > 0 else (-value, wide)
        self.state.narrow(layer, at, lower, upper)

    # -- exact ---------------------------------------------------------------------------------------------------------

    def _exact(self) -> None:
        deadline = self.began + self.effort.time_limit
        decider = self.effort.decider
        if decider == "lp":
            self._phase_round(1, deadline, lp_after=0)
            return
        if decider != "auto" and self._open_count() and self.suggest is not None and monotonic() < deadline:
            self._suggestions(deadline - monotonic())
        few = self.program.size(-1) <= FEW_INPUTS
        if self._open_count() and (decider == "input-split" or (decider == "auto" and few)):
            share = 1.0 if decider == "input-split" else 0.85
            self._input_split(monotonic() + share * max(0.0, deadline - monotonic()))
        if decider == "input-split":
            return
        many = sum(len(self._questions(k)[0]) for k in range(self.program.layers)) > MANY_QUESTIONS
        if many and not few:
            self._ascend_harder()
        self._phase_round(NODE_ROUNDS[0], deadline)
        if not many and not few:
            self._ascend_harder()
        self._phase_round(NODE_ROUNDS[1], deadline)
        if decider == "auto" and self.suggest is not None and self._open_count() and monotonic() < deadline:
            self._suggestions(0.3 * (deadline - monotonic()))
        self._phase_round(NODE_ROUNDS[2], deadline)

    def _ascend_harder(self) -> None:
        """More restarts for what is still open; where a proof is likely the first round of branch and bound has found it."""
        masks = self._lacking()
        if monotonic() < self.began + self.effort.time_limit and any(mask.any() for pair in masks for mask in pair):
            with self._stage("ascent", "more restarts"):
                self._ascend(masks, 60.0)

    def _lacking(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Which signs are asked about, (positive, negative) for every layer."""
        masks = []
        for layer in range(self.program.layers):
            neurons, signs = self._questions(layer)
            positive = np.zeros(len(self.layers[layer].status), bool)
            negative = positive.copy()
            positive[neurons[signs > 0]], negative[neurons[signs < 0]] = True, True
            masks.append((positive, negative))
        return masks

    def _ascend(self, masks: list[tuple[np.ndarray, np.ndarray]], at_most: float) -> None:
        self.search.ascent(masks, rounds=3, first=1, time_limit=min(at_most, 0.1 * self.effort.time_limit))

    def _input_split(self, deadline: float) -> None:
        questions = [Question(k, int(n), int(s)) for k in range(self.program.layers)
                     for n, s in zip(*self._questions(k), strict=True)]
        if not questions:
            return
        layer = np.array([q.layer for q in questions])
        neuron, sign = np.array([q.neuron for q in questions]), np.array([q.sign for q in questions])

        seen = [0]  # boxes: their centres refute most of what is false, and only the rest is worth an ascent

        def refuted(points: Tensor) -> np.ndarray:
            self.search.try_points(points, Method.INPUT_SPLIT)
            if seen[0] < ASCEND_AFTER <= seen[0] + len(points):
                self._ascend(self._lacking(), 5.0)
            seen[0] += len(points)
            hit = np.zeros(len(questions), bool)
            for k in set(layer.tolist()):
                positive, negative = self.search.lacking(k)
                here = layer == k
                hit[here] = np.where(sign[here] > 0, ~positive[neuron[here]], ~negative[neuron[here]])
            return hit

        with self._stage("input splitting", f"{len(questions)} questions"):
            self.progress.stage("input splitting", len(questions))
            done = [0]

            def moved(count: int) -> None:
                self.progress.advance(max(0, count - done[0]))
                done[0] = max(done[0], count)

            self.before_split = dict(self.state.known)
            result = InputSplit(self.program, self.state.known, questions, refuted, SplitLimits(deadline), moved).run()
            if result.record is not None:
                self.proofs.append(_Fixed(result.record))
            for i in np.flatnonzero(result.proved):
                self._proved(questions[i].layer, questions[i].neuron, questions[i].sign, Method.INPUT_SPLIT)
            for i, reason in result.reasons.items():
                self.layers[questions[i].layer].reasons[questions[i].neuron] = reason

    def split_again(self, questions: Sequence[Question], margin: float) -> bool:
        """Proofs with a wider margin for questions whose sub-boxes the checker did not accept; whether any is new."""
        known = dict(self.state.known)
        for layer in {q.layer for q in questions}:
            position = self.program.preactivation(layer)
            before, now = self.before_split.get(position, known[position]), known[position]
            here = torch.tensor([q.neuron for q in questions if q.layer == layer], device=self.program.device)
            lower, upper = now.lower.clone(), now.upper.clone()
            lower[:, here], upper[:, here] = before.lower[:, here], before.upper[:, here]
            known[position] = NodeBounds(lower, upper, now.error)
        limits = SplitLimits(monotonic() + max(10.0, 0.1 * self.effort.time_limit))
        nothing = np.zeros(len(questions), bool)
        result = InputSplit(self.program, known, questions, lambda _: nothing, limits, margin=margin).run()
        if result.record is not None:
            self.proofs.append(_Fixed(result.record))
        return result.record is not None

    def _proved(self, layer: int, neuron: int, sign: int, method: Method) -> None:
        self._narrow(layer, np.array([neuron]), sign, np.zeros(1))
        self._settle_by_bounds(layer, method)

    def _phase_round(self, budget: int, deadline: float, lp_after: int = LP_AFTER) -> None:
        for layer in range(self.program.layers):
            neurons, signs = self._questions(layer)
            left = deadline - monotonic()
            if len(neurons) and left > 0:
                nodes = max(32, budget // len(neurons)) if budget > 1 else 1
                name = self.network.nodes[self.network.relus[layer]].name
                with self._stage(f"branch and bound {name}", f"{len(neurons)} questions, up to {nodes} nodes each"):
                    self._phase_layer(layer, neurons, signs, nodes, left, lp_after)
            elif len(neurons):
                self._give_reason(layer, neurons, "time limit before it was tried")

    def _give_reason(self, layer: int, neurons: np.ndarray, reason: str) -> None:
        for i in neurons.tolist():
            self.layers[layer].reasons.setdefault(i, reason)

    def _phase_layer(self, layer: int, neurons: np.ndarray, signs: np.ndarray, nodes: int, seconds: float,
                     lp_after: int) -> None:
        lower, upper = bounds_before(self.state, layer)
        setting = Setting(self.network, self.box, lower, upper, layer, self.effort.device, self.effort.memory)
        order = np.lexsort((signs, neurons))
        parts = [order[i : i + QUESTIONS_A_TASK] for i in range(0, len(order), QUESTIONS_A_TASK)]
        tasks = [Task(neurons[p], signs[p], seconds, nodes, lp_after) for p in parts]
        self.progress.stage(f"branch and bound, layer {layer}", len(neurons))
        results: dict[int, TaskResult] = {}
        for i, result in self.run_tasks(setting, tasks):
            results[i] = result
            self.progress.advance(len(tasks[i].neurons))
        for i in sorted(results):
            self._take(layer, results[i])

    def _take(self, layer: int, result: TaskResult) -> None:
        if len(result.points):
            self.search.try_points(result.points, Method.BRANCH_AND_BOUND)
        for decision in result.decisions:
            if decision.tree is not None:
                self.proofs.append(decision.tree)
                self._proved(layer, decision.neuron, decision.sign, Method.BRANCH_AND_BOUND)
            elif decision.reason:
                self.layers[layer].reasons[decision.neuron] = f"{decision.reason}; bound {decision.bound:.3g}"

    def _suggestions(self, seconds: float) -> None:
        """A solver's word on every open neuron: witnesses are confirmed here, stable ones are left to be proved."""
        assert self.suggest is not None
        asked = {k: self._asked(k) for k in range(self.program.layers) if len(self._questions(k)[0])}
        lower, upper = bounds_before(self.state, self.program.layers)
        finite = [bool(np.isfinite(low).all() and np.isfinite(up).all()) for low, up in zip(lower, upper, strict=True)]
        for k in [k for k in asked if not all(finite[: k + 1])]:  # no solver takes such a model
            self._give_reason(k, np.concatenate(asked.pop(k)), "bounds overflowed")
        count = sum(len(positive) + len(negative) for positive, negative in asked.values())
        with self._stage("milp" if self.effort.decider == "auto" else self.effort.decider, f"{count} questions to the solver"):
            for found in self.suggest(asked, lower, upper, seconds):
                self._take_suggestions(found)

    def _asked(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        neurons, signs = self._questions(layer)
        return neurons[signs > 0], neurons[signs < 0]

    def _take_suggestions(self, found: LayerSuggestions) -> None:
        points = [p for s in found for p in (s.positive, s.negative) if p is not None]
        if points:
            inside = np.clip(np.array(points), self.box.lower, self.box.upper)
            self.search.try_points(inside, _METHOD_OF.get(self.effort.decider, Method.MILP))
        for s in found:
            if s.status in (Status.INACTIVE, Status.ACTIVE):
                self.layers[found.layer].reasons[s.neuron] = f"solver claims {s.status.word}"
            elif s.reason:
                self.layers[found.layer].reasons[s.neuron] = s.reason

    def _explain(self) -> None:
        why = "left open by bounds and witnesses" + ("" if self.effort.exact else " (no exact stage)")
        if monotonic() > self.began + self.effort.time_limit:
            why += ", time limit"
        for layer in self.layers:
            for i in np.flatnonzero(layer.status == Status.UNKNOWN).tolist():
                layer.reasons.setdefault(i, why)


def _serial(setting: Setting, tasks: Sequence[Task]) -> Iterator[tuple[int, TaskResult]]:
    end = monotonic() + max((t.seconds for t in tasks), default=0.0)
    for i, task in enumerate(tasks):
        left = max(0.01, end - monotonic())
        yield i, run_task(setting, Task(task.neurons, task.signs, min(task.seconds, left), task.nodes, task.lp_after))
