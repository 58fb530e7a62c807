"""One unit of exact work: some questions of one layer, decided by branch and bound. A pure function of its arguments.

Tasks are what executors run. The split of questions into tasks depends on the questions alone, never on the number of
workers, and a task does not see what others find, so results are the same wherever and in whatever order tasks run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.dual import Rows, initial_rows
from exactprune.bounds.forward import Forward, certain_sign
from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.layerwise import Layerwise, start
from exactprune.bounds.program import Program, compile_network
from exactprune.deciders.branch_and_bound import BranchAndBound, Decision, Limits, NodeLP, Relaxed, Splits
from exactprune.deciders.highs import HighsOptions
from exactprune.deciders.lp import LayerLP
from exactprune.deciders.proofs import Multipliers
from exactprune.domain import Box
from exactprune.network import INPUT, Network

QUESTIONS_A_TASK = 8  # 4, 8, 16 measured: docs/performance.md, "Deciding"
LP_AFTER = 32


@dataclass(frozen=True, eq=False)
class Setting:
    """What all tasks of one layer share; shipped to a worker once.

    Attributes:
        network: the network.
        box: the domain.
        lower, upper: per ReLU layer before ``layer``, float64 bounds; layers after are empty.
        layer: whose neurons are asked about.
        device: where to compute.
        memory: bytes a task may use.
    """

    network: Network
    box: Box
    lower: tuple[np.ndarray, ...]
    upper: tuple[np.ndarray, ...]
    layer: int
    device: str
    memory: int


@dataclass(frozen=True, eq=False)
class Task:
    """Questions: is signs * z_hat <= 0 on D?

    Attributes:
        neurons, signs: int64 arrays of equal length.
        seconds: time limit of the task.
        nodes: branch-and-bound nodes a question may take.
        lp_after: see ``branch_and_bound.Limits``.
    """

    neurons: np.ndarray
    signs: np.ndarray
    seconds: float
    nodes: int
    lp_after: int = LP_AFTER


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What became of a task's questions.

    Attributes:
        decisions: one a question, in order.
        points: float64 (n, inputs): counterexamples met, to be confirmed by the caller.
    """

    decisions: tuple[Decision, ...]
    points: np.ndarray


def restore(program: Program, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], until: int,
            memory: int = 1 << 31) -> Layerwise:
    """The bounds of all nodes before ReLU layer ``until`` from those of the ReLU layers."""
    state = start(program, *program.box(box), memory)
    for layer in range(until):
        state.propagate(layer)
        neurons = torch.arange(len(lower[layer]), device=program.device)
        state.narrow(layer, neurons, _row(lower[layer], program), _row(upper[layer], program))
    state.propagate(until)
    return state


def _row(array: np.ndarray, program: Program) -> Tensor:
    return torch.tensor(array, dtype=torch.float64, device=program.device)[None]


class _Prepared:
    """A worker's copy of a setting, compiled once."""

    def __init__(self, setting: Setting) -> None:
        self.program = compile_network(setting.network, setting.device)
        self.state = restore(self.program, setting.box, setting.lower, setting.upper, setting.layer, setting.memory)
        self.forward = Forward(setting.network, setting.device)
        self.errors = self.forward.box_errors(setting.box)


_PREPARED: dict[int, tuple[Setting, _Prepared]] = {}


def prepared(setting: Setting) -> _Prepared:
    """The compiled setting; only the latest one is kept."""
    found = _PREPARED.get(0)
    if found is None or found[0] is not setting:
        found = (setting, _Prepared(setting))
        _PREPARED[0] = found
    return found[1]


def run_task(setting: Setting, task: Task) -> TaskResult:
    """Decide the questions of a task."""
    ready = prepared(setting)
    program, known = ready.program, ready.state.known
    neurons = torch.tensor(task.neurons, device=program.device)
    signs = torch.tensor(task.signs, dtype=torch.float64, device=program.device)
    rows = initial_rows(program, setting.layer, neurons, signs, known)
    refuter = _Refuter(ready.forward, ready.errors, setting.layer)
    deadline = monotonic() + task.seconds
    limits = Limits(deadline, nodes=task.nodes, lp_after=task.lp_after, batch=_batch(program, rows, setting.memory))
    search = BranchAndBound(program, known, rows, refuter, limits, node_lp(setting, deadline, ready.state.at(setting.layer)))
    return TaskResult(tuple(search.run()), refuter.points())


def _batch(program: Program, rows: Rows, memory: int) -> int:
    widest = max(program.size(i) for i in range(INPUT, len(program.sizes)))
    return int(max(2, min(256, memory // (8 * 24 * widest * max(1, len(rows.alpha))))))


class _Refuter:
    """Says which points are certain counterexamples, and remembers one a question."""

    def __init__(self, forward: Forward, errors: Sequence[Tensor], layer: int) -> None:
        self.forward, self.error, self.layer = forward, errors[layer], layer
        self.found: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, points: Tensor, neurons: Tensor, signs: Tensor) -> Tensor:
        with torch.no_grad():
            values = self.forward.preactivations(points, self.layer)[self.layer]
        sign = certain_sign(values, self.error).gather(1, neurons[:, None])[:, 0]
        hit = sign == signs.to(sign.dtype)
        for i in torch.nonzero(hit).flatten().tolist():
            self.found.setdefault((int(neurons[i]), int(signs[i])), points[i].cpu().numpy())
        return hit

    def points(self) -> np.ndarray:
        return np.array(list(self.found.values())).reshape(-1, self.forward.inputs)


def node_lp(setting: Setting, deadline: float, interval: NodeBounds) -> NodeLP | None:
    """LP relaxations of nodes, on one warm LP that is built when first needed; None where bounds have overflowed.

    ``interval`` bounds the asked layer: an LP that is cut short may know less.
    """
    if not all(np.isfinite(bounds).all() for bounds in (*setting.lower[: setting.layer], *setting.upper[: setting.layer])):
        return None
    built: list[LayerLP] = []

    def solve(neuron: int, sign: int, splits: Splits) -> Relaxed:
        left = deadline - monotonic()
        if left <= 0:
            return Relaxed(float("inf"), None, None)
        if not built:
            built.append(LayerLP(setting.network, setting.box, setting.lower, setting.upper, setting.layer,
                                 options=HighsOptions()))
        phases = {(layer, index): phase > 0 for layer, index, phase in splits}
        found = built[0].bound(neuron, "upper" if sign > 0 else "lower", phases, time_limit=left)
        neurons: Mapping[int, np.ndarray] = {k: m.neurons for k, m in found.multipliers.items()}
        multipliers = Multipliers(neurons, {k: m.values[None] for k, m in found.multipliers.items()})
        point = None if found.point is None else np.clip(found.point.reshape(-1), setting.box.lower.reshape(-1),
                                                         setting.box.upper.reshape(-1))
        bound = min(sign * found.value, float(interval.upper[0, neuron] if sign > 0 else -interval.lower[0, neuron]))
        return Relaxed(bound if np.isfinite(bound) else float("inf"), multipliers if neurons else None, point)

    return solve


def bounds_before(state: Layerwise, layer: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(lower, upper) of the ReLU layers before ``layer`` as numpy arrays."""
    def flat(bounds: NodeBounds) -> tuple[np.ndarray, np.ndarray]:
        return bounds.lower[0].cpu().numpy(), bounds.upper[0].cpu().numpy()

    pairs = [flat(state.at(k)) for k in range(layer)]
    return tuple(low for low, _ in pairs), tuple(up for _, up in pairs)
