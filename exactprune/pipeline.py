"""verify and compress: from a network and a domain to verdicts with certificates, and to a smaller network.

    network = exactprune.load("model.onnx")
    result = exactprune.verify(network, exactprune.uniform(0, 1, network.input_shape))
    smaller = exactprune.compress(result)
    exactprune.save(smaller.network, "small.onnx")
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from time import monotonic, perf_counter
from uuid import uuid4

import numpy as np

from exactprune.claim import LayerVerdict
from exactprune.compress.floating import float_level
from exactprune.compress.levels import Kind, Level
from exactprune.compress.measure import Agreement, Latency, compare, latency
from exactprune.compress.preserve import Margins, Preserved, margins_of, preserved
from exactprune.compress.rewrite import Rewrite, compress_network
from exactprune.compress.slicing import Dispatcher, Payoff, Piece, payoff, pieces_of
from exactprune.deciders.cascade import Asked, Cascade, Effort, RunTasks, Suggest
from exactprune.deciders.certify import certify
from exactprune.deciders.checkpoint import Checkpoint
from exactprune.deciders.highs import HighsOptions
from exactprune.deciders.outcome import LayerSuggestions
from exactprune.deciders.tasks import Setting, Task, TaskResult, run_task
from exactprune.domain import Box, uniform
from exactprune.errors import OptionError, ShapeError
from exactprune.network import Network
from exactprune.options import CompressOptions, VerifyOptions
from exactprune.progress import Progress, Silent

CANCELLED = "cancelled"  # what executors say of a task that was never started
_PACKAGES = ("exactprune", "torch", "numpy", "highspy")


@dataclass(frozen=True)
class Stage:
    """One line of the account: a stage's seconds, how many neurons it settled, and what it did."""

    name: str
    seconds: float
    settled: int
    detail: str


@dataclass(frozen=True, eq=False)
class Verification:
    """What is known about every ReLU neuron of a network over a domain.

    Attributes:
        network, domain, options: what was asked.
        layers: verdicts, one a ReLU layer in topological order.
        stages: what the time went into.
        records: the certificate, JSON-able, header first; ``report.record.write_run`` writes it.
        seconds: of everything.
        versions, hardware: for the record.
        check: what the independent checker said: accepted, rejected, seconds.
    """

    network: Network
    domain: Box
    options: VerifyOptions
    layers: tuple[LayerVerdict, ...]
    stages: tuple[Stage, ...]
    records: tuple[dict[str, object], ...]
    seconds: float
    versions: Mapping[str, str]
    hardware: Mapping[str, str | int]
    check: Mapping[str, float | int] | None = None

    @property
    def totals(self) -> dict[str, int]:
        """``{neurons, inactive, active, unstable, unknown}`` over all layers."""
        total: dict[str, int] = dict.fromkeys(("neurons", "inactive", "active", "unstable", "unknown"), 0)
        for layer in self.layers:
            for word, count in layer.counts().items():
                total[word] += count
        return total

    def __str__(self) -> str:
        head = f"{'layer':>5}  {'node':<20} {'neurons':>8} {'inactive':>9} {'active':>7} {'unstable':>9} {'unknown':>8}"
        rows = [(str(v.layer), v.node, v.counts()) for v in self.layers] + [("all", "", self.totals)]
        lines = [f"{k:>5}  {name:<20.20} {c['neurons']:>8,} {c['inactive']:>9,} {c['active']:>7,} {c['unstable']:>9,} "
                 f"{c['unknown']:>8,}" for k, name, c in rows]
        return "\n".join([f"{self.network.name} over {self.domain.source}, {self.seconds:.1f} s", head, *lines])

    __repr__ = __str__


@dataclass(frozen=True)
class Size:
    """Neurons, parameters and multiply-accumulates of a network."""

    neurons: int
    parameters: int
    macs: int


@dataclass(frozen=True, eq=False)
class Compression:
    """A smaller network and what is claimed about it.

    Attributes:
        original, network: before and after; the same input and output shapes.
        domain: where they agree.
        level: the claim (``exact`` or ``certified(eps)``), with the words that go with it.
        rewrite: every step, removal and its level.
        agreement: measured on points; ``latency``: measured.
        verification: the verdicts it rests on.
        options: what was asked.
        seconds: of the rewriting.
        margins: of the original's outputs, where classes are to be kept.
    """

    original: Network
    network: Network
    domain: Box
    level: Level
    rewrite: Rewrite
    agreement: Agreement
    latency: tuple[Latency, ...]
    verification: Verification
    options: CompressOptions = field(default_factory=CompressOptions)
    seconds: float = 0.0
    margins: Margins | None = None

    @cached_property
    def floating(self) -> Level | None:
        """The claim for IEEE execution in the network's dtype, any summation order; None where nothing can be claimed."""
        return float_level(self.original, self.network, self.domain, self.verification.layers, self.rewrite.verdicts, self.level)

    @property
    def preserved(self) -> Preserved | None:
        """Which inputs keep their class; None unless asked for, or where ``level`` is no proof."""
        if self.margins is None or self.level.kind > Kind.CERTIFIED:
            return None
        return preserved(self.margins, self.level.eps)

    @property
    def before(self) -> Size:
        """Size of the original."""
        return _size(self.original)

    @property
    def after(self) -> Size:
        """Size of the smaller network."""
        return _size(self.network)

    def __str__(self) -> str:
        a, b = self.before, self.after
        return (f"{self.original.name}: {a.neurons:,} -> {b.neurons:,} neurons, {a.parameters:,} -> {b.parameters:,} parameters, "
                f"{a.macs:,} -> {b.macs:,} MACs; {self.level}")

    __repr__ = __str__


def _size(network: Network) -> Size:
    return Size(network.neurons, network.parameters, network.macs)


def verify(network: Network, domain: Box | None = None, options: VerifyOptions | None = None, *,
           data: np.ndarray | None = None, progress: Progress | None = None,
           checkpoint: str | Path | None = None) -> Verification:
    """Decide for every ReLU neuron whether it is stably inactive, stably active, unstable, or (honestly) unknown.

    Args:
        network: from ``exactprune.load``.
        domain: the box; the unit box [0, 1] by default.
        options: how to run; none of them changes what a verdict means.
        data: points to try as witnesses, (samples, *input_shape).
        progress: told what happens.
        checkpoint: a file that keeps what is known; if it exists, the run goes on from there.

    Returns:
        Verdicts, each accepted by the independent checker, with the certificate.

    Raises:
        DomainError: the box does not fit the input.
        OptionError: the device is not there, or the checkpoint belongs to another run.
    """
    began, options, progress = perf_counter(), options or VerifyOptions(), progress or Silent()
    domain = (domain or uniform(0.0, 1.0, network.input_shape)).reshaped(network.input_shape)
    _check_device(options.device)
    data = _checked_data(network, data)
    keeper = None if checkpoint is None else Checkpoint(Path(checkpoint))
    effort = Effort(options.exact, options.decider, options.time_limit, options.memory, options.device, options.seed)
    with _runner(options) as run_tasks:
        cascade = Cascade(network, domain, effort, progress, run_tasks, _suggester(network, domain, options), data,
                          None if keeper is None else keeper.maybe)
        if keeper is not None:
            keeper.read(cascade)
        cascade.run()
    if keeper is not None:
        keeper.write(cascade)
    versions = _versions()
    certified = certify(cascade, versions, options.certificate_cap)
    stages = [Stage(s.name, s.seconds, s.settled, s.detail) for s in cascade.stages]
    stages.append(Stage("checker", certified.seconds, 0, f"{certified.accepted} accepted, {certified.rejected} rejected"))
    check = {"accepted": certified.accepted, "rejected": certified.rejected, "seconds": certified.seconds}
    return Verification(network, domain, options, certified.layers, tuple(stages), certified.records, perf_counter() - began,
                        versions, _hardware(options), check)


def compress(verification: Verification | Network, domain: Box | None = None, options: CompressOptions | None = None, *,
             data: np.ndarray | None = None, progress: Progress | None = None) -> Compression:
    """Make the network smaller by what is proved about it.

    Args:
        verification: from ``verify``; a network is verified first.
        domain: only with a network.
        options: the largest deviation allowed, and how the result is measured.
        data: inputs on which f and g are compared too, (samples, *input_shape).
        progress: told what happens.

    Returns:
        The smaller network with the claim's level; nothing is removed on ``unknown``.
    """
    options, progress = options or CompressOptions(), progress or Silent()
    if isinstance(verification, Network):
        verification = verify(verification, domain, data=data, progress=progress)
    elif domain is not None:
        raise OptionError("a verification has its domain already; give a network to choose another one")
    network, domain = verification.network, verification.domain
    began = perf_counter()
    progress.stage("compress")
    data = _checked_data(network, data)
    margins = _wanted_margins(network, domain, data, options)
    rewrite = compress_network(network, domain, verification.layers, max_deviation=_allowed(options, margins))
    seconds = perf_counter() - began
    progress.stage("measure")
    agreement = compare(network, rewrite.network, domain, data=data, points=options.samples,
                        corners=options.samples, seed=options.seed)
    return Compression(network, rewrite.network, domain, rewrite.level, rewrite, agreement,
                       tuple(latency(network, rewrite.network, seed=options.seed)), verification, options, seconds, margins)


@dataclass(frozen=True, eq=False)
class Split:
    """A network for every piece of the domain.

    Attributes:
        single: one smaller network for the whole domain, to compare with.
        parts: one compression a piece.
        dispatcher: picks the piece of an input and runs its network.
        payoff: whether that costs less than ``single``.
    """

    single: Compression
    parts: tuple[Compression, ...]
    dispatcher: Dispatcher
    payoff: Payoff

    def save(self, folder: str | Path, *, suffix: str = ".onnx") -> Path:
        """Write the networks and ``dispatch.json``; ``load_split(folder)`` reads them."""
        from exactprune.compress.slicing import write_split

        return write_split(folder, self.dispatcher.domain, self.dispatcher.pieces, suffix=suffix)

    def __str__(self) -> str:
        return f"{self.single.original.name} in {len(self.parts)} pieces. {self.payoff.words}"

    __repr__ = __str__


Judge = Callable[[Verification, np.ndarray | None], Compression]


def compress_split(network: Network, domain: Box | None = None, pieces: int = 2, options: CompressOptions | None = None,
                   verify_options: VerifyOptions | None = None, *, data: np.ndarray | None = None,
                   progress: Progress | None = None, judge: Judge | None = None) -> Split:
    """Cut the domain in pieces and make a smaller network for each.

    Args:
        network: from ``exactprune.load``.
        domain: the box; the unit box by default.
        pieces: how many; fewer where the box cannot be cut that often.
        options: of every compression; verify_options: of every verification.
        data: as in ``compress``; each piece is given those that lie in it.
        progress: told what happens.
        judge: compresses a verification with the data given; ``compress`` with ``options`` by default.

    Returns:
        the pieces' networks with a dispatcher, next to a single network for the whole domain.
    """
    options = options or CompressOptions()
    domain = (domain or uniform(0.0, 1.0, network.input_shape)).reshaped(network.input_shape)
    judge = judge or (lambda found, inside: compress(found, options=options, data=inside, progress=progress))
    data = _checked_data(network, data)
    single = compress(verify(network, domain, verify_options, data=data, progress=progress), options=options, data=data,
                      progress=progress)
    parts = []
    for box in pieces_of(network, domain, pieces, seed=options.seed):
        inside = None if data is None or not box.contains(data).any() else data[box.contains(data)]
        parts.append(judge(verify(network, box, verify_options, data=inside, progress=progress), inside))
    cut = tuple(Piece(part.domain, part.network, part.level) for part in parts)
    return Split(single, tuple(parts), Dispatcher(domain, cut), payoff(single.network, cut, domain))


def _wanted_margins(network: Network, domain: Box, data: np.ndarray | None, options: CompressOptions) -> Margins | None:
    if options.preserve == "none":
        return None
    return margins_of(network, domain, data, samples=options.samples, seed=options.seed)


def _allowed(options: CompressOptions, margins: Margins | None) -> str | float:
    """The budget: as asked, but not so much that a given input could lose its class."""
    wanted = options.max_deviation
    if margins is None or not margins.data.size or wanted == "exact":
        return wanted
    return margins.budget if wanted == "rounding" else min(float(wanted), margins.budget)


def _checked_data(network: Network, data: np.ndarray | None) -> np.ndarray | None:
    if data is None:
        return None
    data = np.asarray(data)
    if data.ndim < 1 or data[0].size != int(np.prod(network.input_shape)):
        raise ShapeError(f"data has shape {data.shape}; give (samples, {', '.join(map(str, network.input_shape))})")
    return data.reshape(len(data), *network.input_shape)


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise OptionError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _hardware(options: VerifyOptions) -> dict[str, str | int]:
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "none used"
    return {"machine": platform.machine(), "cpus": cpus, "threads": torch.get_num_threads(), "gpu": gpu}


# -- executors and solvers -----------------------------------------------------------------------------------------------


class _runner:  # noqa: N801 - used as a context manager function
    """The executor of the options as a ``RunTasks``; None (in this process) for the serial one."""

    def __init__(self, options: VerifyOptions) -> None:
        self.options, self.executor = options, None

    def __enter__(self) -> RunTasks | None:
        if self.options.executor == "serial":
            return None
        return self._run

    def _run(self, setting: Setting, tasks: Sequence[Task]) -> Iterator[tuple[int, TaskResult]]:
        from exactprune.executors import get_executor

        if self.executor is None:
            self.executor = get_executor(self.options.executor, self.options.jobs)
        until = _Deadline(max((task.seconds for task in tasks), default=0.0))
        batch = uuid4().hex
        for result in self.executor.run(_task_until, [(batch, task) for task in tasks], shared=setting, cancel=until):
            if result.value is not None:
                yield result.index, result.value
            else:
                late = until.is_set() and result.error == CANCELLED
                yield result.index, failed(tasks[result.index], "time limit before it was tried" if late else result.error)

    def __exit__(self, *error: object) -> None:
        if self.executor is not None:
            self.executor.close()


class _Deadline(Event):
    """Is set when so many seconds have passed: tasks that have not begun by then are cancelled."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = monotonic() + seconds

    def is_set(self) -> bool:
        """Whether the time is up."""
        return super().is_set() or monotonic() >= self._end


_BATCH: dict[str, float] = {}  # in a worker: when it met the latest batch, by its own clock


def _task_until(setting: Setting, item: tuple[str, Task]) -> TaskResult:
    """A task within what is left of its batch's time limit.

    Clocks of different machines cannot be compared, so a worker counts from its first task of the batch, which starts when
    the batch does on workers that are there by then.
    """
    batch, task = item
    if batch not in _BATCH:
        _BATCH.clear()
        _BATCH[batch] = monotonic()
    left = max(0.01, task.seconds - (monotonic() - _BATCH[batch]))
    return run_task(setting, replace(task, seconds=left))


def failed(task: Task, error: str) -> TaskResult:
    """The result of a task that raised or whose worker died: everything open, with the reason."""
    from exactprune.deciders.branch_and_bound import Decision

    open_ = tuple(Decision(int(n), int(s), None, False, error, float("inf"), 0)
                  for n, s in zip(task.neurons.tolist(), task.signs.tolist(), strict=True))
    return TaskResult(open_, np.empty((0, 0)))


def _suggester(network: Network, domain: Box, options: VerifyOptions) -> Suggest | None:
    ways = {"auto": _by_milp, "milp": _by_milp, "scaling-up": _by_scaling_up, "leo": _by_leo}
    way = ways.get(options.decider)
    return None if way is None else partial(way, network, domain, options)


def _by_milp(network: Network, domain: Box, options: VerifyOptions, asked: Asked, lower: Sequence[np.ndarray],
             upper: Sequence[np.ndarray], seconds: float) -> Iterator[LayerSuggestions]:
    from exactprune.deciders import milp

    end = monotonic() + (0.7 if options.decider == "milp" else 1.0) * seconds
    for layer, (positive, negative) in asked.items():
        neurons = np.unique(np.concatenate([positive, negative]))
        yield milp.decide(network, domain, lower[:layer], upper[:layer], layer, neurons, ask_positive=np.isin(neurons, positive),
                          ask_negative=np.isin(neurons, negative), time_limit=max(0.0, end - monotonic()))


def _by_scaling_up(network: Network, domain: Box, options: VerifyOptions, asked: Asked, lower: Sequence[np.ndarray],
                   upper: Sequence[np.ndarray], seconds: float) -> Iterable[LayerSuggestions]:
    from exactprune.deciders import scaling_up

    solver = None if options.solver == "appsi_highs" else options.solver
    return scaling_up.decide(network, domain, lower, upper, ask_positive={k: p for k, (p, _) in asked.items()},
                             ask_negative={k: n for k, (_, n) in asked.items()}, time_limit=0.7 * seconds, solver=solver)


def _by_leo(network: Network, domain: Box, options: VerifyOptions, asked: Asked, lower: Sequence[np.ndarray],
            upper: Sequence[np.ndarray], seconds: float) -> Iterable[LayerSuggestions]:
    from exactprune.deciders import leo

    neurons = {k: np.unique(np.concatenate(pair)) for k, pair in asked.items()}
    return leo.decide(network, domain, lower, upper, neurons=neurons, options=HighsOptions(), time_limit=0.7 * seconds)
