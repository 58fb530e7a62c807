"""The published algorithms, run on the same solver in the same process, as rivals for benchmarks/decide.py.

(a) ISA (Serra, Yu, Kumar, Ramalingam 2021): states seen on data are struck off, interval big-M, one MILP. As in the
    authors' code every neuron has a phase, and its big-M is twice its interval bound and at least 2.
(a') the same, but what interval bounds settle is left out and they are the big-M: what a careful user would run.
(b) LEO (Serra, Kumar, Ramalingam 2020): interval big-M, stable neurons eliminated, two MILPs per neuron.
(c) both with exactprune's bounds and witnesses: only what these leave open is asked.

All profit from our normalised columns. A rival that does not finish is extrapolated from a sample of its neurons: the
mean time of a sampled neuron of a layer, times that layer's neurons. A sampled neuron that hits its own limit counts
with that limit, so the estimate is then a lower bound and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from exactprune.claim import Status
from exactprune.deciders import leo, milp, scaling_up
from exactprune.deciders.cascade import Cascade, Effort
from exactprune.deciders.highs import HighsOptions
from exactprune.deciders.outcome import LayerSuggestions, all_preactivations
from exactprune.domain import Box
from exactprune.formulations.bigm import build
from exactprune.network import Network
from exactprune.ops import Add, MaxPool2d, ReLU

SAMPLE = 20
Neurons = Mapping[int, np.ndarray]


@dataclass
class Clock:
    """Wall and processor seconds of a stretch of work."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def measured(clock: Clock) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    clock.wall += time.perf_counter() - wall
    clock.cpu += time.process_time() - cpu


@dataclass
class Result:
    """What a rival took, and what it said.

    Attributes:
        wall, cpu: seconds, for everything or estimated for everything.
        finished: it ran to its end within the time limit.
        note: how an estimate was made; "lower bound" if a sampled part hit its limit.
        asked: neurons it was run on; ``total``: neurons it would have to be run on.
        statuses: (layer, neuron) -> status, where it decided.
    """

    wall: float
    cpu: float
    finished: bool
    note: str
    asked: int
    total: int
    statuses: dict[tuple[int, int], Status] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """exactprune's bounds and witnesses, and what they leave open."""

    lower: list[np.ndarray]
    upper: list[np.ndarray]
    positive: Neurons
    negative: Neurons
    clock: Clock

    @property
    def open(self) -> dict[int, np.ndarray]:
        return {k: np.union1d(self.positive[k], self.negative[k]) for k in self.positive}


class Silent:
    """No progress."""

    def stage(self, name: str, total: int | None = None) -> None: ...

    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


def known(network: Network, box: Box, seed: int = 0, repeat: int = 5) -> Known:
    """The first half of the cascade: bounds and witnesses, no exact stage; the median of ``repeat`` runs, as for ours."""
    runs = sorted((_known(network, box, seed) for _ in range(repeat)), key=lambda k: k.clock.cpu)
    return runs[(repeat - 1) // 2]


def _known(network: Network, box: Box, seed: int) -> Known:
    clock = Clock()
    with measured(clock):
        cascade = Cascade(network, box, Effort(exact=False, seed=seed), Silent())
        cascade.run()
    layers = range(len(network.relus))
    bounds = [cascade.state.at(k) for k in layers]
    lower, upper = ([getattr(b, side)[0].cpu().numpy() for b in bounds] for side in ("lower", "upper"))
    open_now = [cascade.layers[k].status == Status.UNKNOWN for k in layers]
    lacking = [cascade.search.lacking(k) for k in layers]
    positive, negative = ({k: np.flatnonzero(open_now[k] & lacking[k][side]) for k in layers} for side in (0, 1))
    return Known(lower, upper, positive, negative, clock)


def interval_bounds(network: Network, box: Box) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Interval bounds of every ReLU layer, by the package's own (sound) propagation."""
    from exactprune.bounds.layerwise import start
    from exactprune.bounds.program import compile_network

    program = compile_network(network, "cpu")
    state = start(program, *program.box(box))
    found = [state.propagate(k) for k in range(len(network.relus))]
    return [b.lower[0].numpy() for b in found], [b.upper[0].numpy() for b in found]


# -- ISA -----------------------------------------------------------------------------------------------------------


def isa_published(network: Network, box: Box, samples: np.ndarray, limit: float) -> Result:
    """(a): as published; a state that the solver claims is believed."""
    return _isa(network, box, samples, limit, published=True)


def isa_interval(network: Network, box: Box, samples: np.ndarray, limit: float) -> Result:
    """(a'): interval bounds used for all they give."""
    return _isa(network, box, samples, limit, published=False)


def _isa(network: Network, box: Box, samples: np.ndarray, limit: float, published: bool) -> Result:
    clock = Clock()
    with measured(clock):
        lower, upper = interval_bounds(network, box)
        if published:
            lower, upper = [2 * np.minimum(a, -1) for a in lower], [2 * np.maximum(a, 1) for a in upper]
        positive, negative = _unseen(network, samples, lower, upper)
        found = scaling_up.decide(
            network,
            box,
            lower,
            upper,
            ask_positive=positive,
            ask_negative=negative,
            time_limit=limit,
            confirm=False,
        )
    return _isa_result(network, box, lower, upper, positive, negative, found, clock, limit)


def isa_given(network: Network, box: Box, given: Known, limit: float) -> Result:
    """(c): ISA on what our bounds and witnesses leave open."""
    clock = Clock()
    with measured(clock):
        found = scaling_up.decide(network, box, given.lower, given.upper, ask_positive=given.positive,
                                  ask_negative=given.negative, time_limit=limit)
    return _isa_result(network, box, given.lower, given.upper, given.positive, given.negative, found, clock, limit)


def _unseen(network: Network, samples: np.ndarray, lower: Sequence[np.ndarray],
            upper: Sequence[np.ndarray]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Neurons never seen active, and never seen inactive, on samples; the bounds' stable neurons left out."""
    active, inactive = ([np.zeros(a.size, bool) for a in lower] for _ in range(2))
    for start in range(0, len(samples), 4096):
        for k, z_hat in enumerate(all_preactivations(network, samples[start:start + 4096])):
            active[k] |= (z_hat > 0).any(axis=0)
            inactive[k] |= (z_hat < 0).any(axis=0)
    split = [(a < 0) & (b > 0) for a, b in zip(lower, upper, strict=True)]
    return ({k: np.flatnonzero(s & ~active[k]) for k, s in enumerate(split)},
            {k: np.flatnonzero(s & ~inactive[k]) for k, s in enumerate(split)})


def _isa_result(network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], positive: Neurons,
                negative: Neurons, found: Sequence[LayerSuggestions], clock: Clock, limit: float) -> Result:
    statuses, asked = _statuses(found), sum(map(len, found))
    if len(statuses) == asked:
        return Result(clock.wall, clock.cpu, True, "", asked, asked, statuses)
    some_positive, some_negative = _first(positive, negative, SAMPLE)
    count = sum(map(len, some_positive.values())) + sum(map(len, some_negative.values()))
    part = Clock()
    with measured(part):
        again = scaling_up.decide(network, box, lower, upper, ask_positive=some_positive, ask_negative=some_negative,
                                  time_limit=limit / 2, confirm=False)
    complete = len(_statuses(again)) == sum(map(len, again))
    total = sum(map(len, positive.values())) + sum(map(len, negative.values()))
    factor = total / max(1, count)
    note = f"{total} states extrapolated from one MILP for {count} of them"
    if not complete:
        note += ", lower bound: it hit its limit"
    elif part.wall * factor <= clock.wall:
        note += ", lower bound: all of them at once hit the limit"
    return Result(
        max(clock.wall, part.wall * factor), max(clock.cpu, part.cpu * factor), False, note, asked, asked, statuses
    )


def _first(positive: Neurons, negative: Neurons, count: int) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """About ``count`` of the open states, spread evenly."""
    states = [(0, k, int(i)) for k, v in positive.items() for i in v] + [
        (1, k, int(i)) for k, v in negative.items() for i in v
    ]
    chosen = [states[i] for i in np.unique(np.linspace(0, len(states) - 1, min(count, len(states))).astype(int))]
    return tuple({k: np.array([i for s, layer, i in chosen if s == side and layer == k], np.int64) for k in positive}
                 for side in (0, 1))  # type: ignore[return-value]


# -- LEO -----------------------------------------------------------------------------------------------------------


def leo_published(network: Network, box: Box, limit: float, each: float) -> Result:
    """(b): as published; in full where a sample says that it can finish, else extrapolated from the sample."""
    clock = Clock()
    with measured(clock):
        lower, upper = interval_bounds(network, box)
    everything = {k: np.arange(a.size) for k, a in enumerate(lower)}
    sampled = _per_neuron(network, box, lower, upper, everything, None, each, limit / 2)
    if sampled.wall > limit:
        return sampled
    with measured(clock):
        found = leo.decide(network, box, lower, upper, options=HighsOptions(time_limit=limit), time_limit=limit)
    statuses, total = _statuses(found), sum(map(len, found))
    if len(statuses) < total:
        return sampled
    return Result(clock.wall, clock.cpu, True, "", total, total, statuses)


def leo_given(network: Network, box: Box, given: Known, limit: float, each: float) -> Result:
    """(c): up to two MILPs for each neuron that our bounds and witnesses leave open."""
    count = sum(map(len, given.open.values()))
    return _per_neuron(
        network, box, given.lower, given.upper, given.open, given, max(each, limit / max(1, 2 * count)), limit
    )


def _per_neuron(network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], neurons: Neurons,
                given: Known | None, each: float, limit: float) -> Result:
    """MILPs for all neurons of a layer if they fit into its share of the limit, else for a sample of at least 20 in
    all."""
    total, wall, cpu, asked, hit = 0, 0.0, 0.0, 0, 0
    statuses: dict[tuple[int, int], Status] = {}
    layers = [k for k, v in neurons.items() if len(v)]
    for layer in layers:
        here = neurons[layer]
        order = np.random.default_rng(layer).permutation(here)
        clock, done = Clock(), 0
        with measured(clock):
            model = build(network, box, lower, upper, target=layer, neurons=order)
        built = Clock(clock.wall, clock.cpu)
        least = min(len(order), -(-SAMPLE // len(layers)))
        for neuron in order.tolist():
            if done >= least and clock.wall > limit / len(layers):
                break
            sides = (
                (True, True)
                if given is None
                else (neuron in given.positive[layer], neuron in given.negative[layer])
            )
            with measured(clock):
                s = milp.decide_neuron(model, neuron, *sides, HighsOptions(time_limit=each))
            done += 1
            hit += s.status is Status.UNKNOWN
            if s.status is not Status.UNKNOWN:
                statuses[layer, neuron] = s.status
        scale = len(here) / max(1, done)
        wall += built.wall + (clock.wall - built.wall) * scale
        cpu += built.cpu + (clock.cpu - built.cpu) * scale
        total, asked = total + len(here), asked + done
    note = "" if asked == total else f"{total} neurons extrapolated from {asked}"
    if hit:
        note += f"{', ' if note else ''}lower bound: {hit} of {asked} hit {each:g} s"
    return Result(wall, cpu, asked == total and not hit, note, asked, total, statuses)


def _statuses(found: Sequence[LayerSuggestions]) -> dict[tuple[int, int], Status]:
    return {(s.layer, s.neuron): s.status for layer in found for s in layer if s.status is not Status.UNKNOWN}


def gurobi_isa(network: Network, box: Box, samples: np.ndarray, limit: float) -> Result | str:
    """(a) on gurobipy, where it is installed and its size-limited licence (2,000 columns, 2,000 rows) admits the
    network."""
    try:
        import gurobipy  # noqa: F401
    except ImportError:
        return "gurobipy is not installed"
    if sum(n.op.output_shape(*(network.shape_of(i) for i in n.inputs))[0] for n in network.nodes
           if isinstance(n.op, ReLU)) * 5 > 2000 or any(isinstance(n.op, Add | MaxPool2d) for n in network.nodes):
        return "larger than the size-limited licence"
    clock = Clock()
    try:
        with measured(clock):
            lower, upper = interval_bounds(network, box)
            lower, upper = [2 * np.minimum(a, -1) for a in lower], [2 * np.maximum(a, 1) for a in upper]
            positive, negative = _unseen(network, samples, lower, upper)
            found = scaling_up.decide(network, box, lower, upper, ask_positive=positive, ask_negative=negative,
                                      time_limit=limit, confirm=False, solver="gurobi")
    except Exception as error:  # whatever a licence problem raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    statuses, asked = _statuses(found), sum(map(len, found))
    return Result(clock.wall, clock.cpu, len(statuses) == asked, "", asked, asked, statuses)
