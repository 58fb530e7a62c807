"""Measuring two networks by running them: agreement, latency, bytes. Nothing here is a claim about all inputs.

Agreement is measured in the network's own dtype, on random points, corners and given data, and next to it the original
against itself at another batch size: float addition is not associative, so the original does not agree with itself bit
for bit either, and that difference is the scale on which to read the other one.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from exactprune.compress.deviation import evaluate_with_error
from exactprune.compress.levels import Level, measured
from exactprune.domain import Box
from exactprune.errors import ShapeError
from exactprune.network import Network

_WORK = 2e9  # multiply-accumulates of a search, about
_EXACT = 3e6  # multiply-accumulates of a network that is evaluated in rationals
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """f against g on a set of inputs, in the networks' own dtype.

    Attributes:
        inputs: how many.
        largest: largest absolute difference of any output.
        flips: inputs whose largest output is another one.
        itself: largest absolute difference of f at one batch size from f at another.
        runner: what ran the networks, ``torch`` or ``numpy``.
    """

    inputs: int
    largest: float
    flips: int
    itself: float
    runner: str

    @property
    def level(self) -> Level:
        """The level ``measured``."""
        return measured(self.largest, self.inputs)


@dataclass(frozen=True)
class Latency:
    """Median seconds of one call at one batch size."""

    batch: int
    before: float
    after: float


def compare(f: Network, g: Network, domain: Box, *, data: np.ndarray | None = None, points: int = 1000,
            corners: int = 1000, seed: int = 0, other_batch: int = 7) -> Agreement:
    """Run f and g on random points, corners and data.

    Args:
        f, g: original and compressed network.
        domain: box to sample from.
        data: shape (samples, *input shape), optional; not required to lie in the box.
        points, corners: how many of each.
        seed: of the random generator.
        other_batch: second batch size for f against itself.

    Raises:
        ShapeError: input or output shapes differ.
    """
    if (f.input_shape, f.output_shape) != (g.input_shape, g.output_shape):
        raise ShapeError(f"compare: {f.name} maps {f.input_shape} to {f.output_shape}, {g.name} {g.input_shape} to "
                         f"{g.output_shape}; give networks with one interface")
    rng = np.random.default_rng(seed)
    x = np.concatenate([domain.sample(points, rng), domain.corners(corners, rng), _data(f, data)]).astype(f.dtype)
    (run_f, runner), (run_g, _) = runner_of(f), runner_of(g)
    a, b, c = _batched(run_f, x, 256), _batched(run_g, x, 256), _batched(run_f, x, other_batch)
    flips = (a.argmax(axis=1) != b.argmax(axis=1)).sum() if a.size else 0
    return Agreement(len(x), _largest(a, b), int(flips), _largest(a, c), runner)


def _data(network: Network, data: np.ndarray | None) -> np.ndarray:
    return np.empty((0, *network.input_shape)) if data is None else np.reshape(data, (-1, *network.input_shape))


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _batched(run: Run, x: np.ndarray, size: int) -> np.ndarray:
    if not len(x):
        return np.empty((0, 0))
    return np.concatenate([run(x[i:i + size]).reshape(len(x[i:i + size]), -1) for i in range(0, len(x), size)])


def runner_of(network: Network) -> tuple[Run, str]:
    """How to run a network: a torch module where ``exactprune.io`` can make one, else plain numpy; and its name."""
    module = _torch_module(network)
    if module is None:
        return network.evaluate, "numpy"
    import torch

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return run, "torch"


def _torch_module(network: Network) -> Any:
    to_torch = getattr(importlib.import_module("exactprune.io"), "to_torch", None)
    return None if to_torch is None else to_torch(network).eval()


def latency(f: Network, g: Network, *, batches: Sequence[int] = (1, 64), repeats: int = 30,
            seed: int = 0) -> list[Latency]:
    """Median wall-clock seconds of a call, f and g alternating so that both see the same machine."""
    rng = np.random.default_rng(seed)
    (run_f, _), (run_g, _) = runner_of(f), runner_of(g)
    found = []
    for batch in batches:
        x = rng.random((batch, *f.input_shape)).astype(f.dtype)
        _ = run_f(x), run_g(x)
        pairs = [(_seconds(run_f, x), _seconds(run_g, x)) for _ in range(repeats)]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        found.append(Latency(batch, before, after))
    return found


def _seconds(run: Run, x: np.ndarray) -> float:
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def weight_bytes(network: Network) -> int:
    """Bytes of the stored arrays."""
    return sum(array.nbytes for node in network.nodes for _, array in node.op.arrays())


@dataclass(frozen=True, eq=False)
class Found:
    """The largest deviation that a search found: a lower bound of the true one, next to a certified upper bound.

    Attributes:
        deviation: abs(f - g) at ``point``: in float64, less what that may be off there, or, of small networks, in rationals,
            rounded down.
        point: an input in the box, float64.
    """

    deviation: float
    point: np.ndarray


def search_deviation(f: Network, g: Network, domain: Box, *, starts: int = 32, rounds: int = 12,
                     seed: int = 0) -> Found:
    """Look for an input of the box where f and g differ most: random starts, then steps to where the gradient points.

    Half of the starts step towards the corner that the gradient of abs(f - g) points to, half along its sign; a step that
    does not help is halved for that start alone. Small networks get more starts.

    Args:
        f, g: networks with one interface.
        domain: the box.
        starts: random points and corners to start from.
        rounds: steps.
        seed: of the starts.
    """
    import torch

    from exactprune.compress.differentiable import compile_network, output_of

    rng = np.random.default_rng(seed)
    programs = [compile_network(network) for network in (f, g)]
    lower, upper = programs[0].box(domain)
    more = int(np.clip(_WORK / max(f.macs + g.macs, 1) / 3 / rounds, 1, 32))
    best = _starts(f, g, domain, starts * more, rng)
    share = torch.ones(len(best), 1, dtype=torch.float64)
    along = (torch.arange(len(best)) % 2 == 0)[:, None]
    for _ in range(rounds * min(more, 4)):
        points = torch.tensor(best, requires_grad=True)
        gap = _gap(output_of, programs, points)
        (slope,) = torch.autograd.grad(gap.sum(), points)
        here = points.detach()
        corner = torch.where(slope > 0, upper, torch.where(slope < 0, lower, here))
        moved = torch.where(along, here + share * (corner - here), here + share * (upper - lower) * slope.sign() / 2)
        moved = moved.clamp(min=lower, max=upper)
        better = (_gap(output_of, programs, moved) > gap)[:, None]
        best = torch.where(better, moved, here).numpy()
        share = torch.where(better, share, share / 2)
    return _certain(f, g, best.reshape(-1, *domain.shape))


def _starts(f: Network, g: Network, domain: Box, count: int, rng: np.random.Generator) -> np.ndarray:
    """The most promising of many random points and corners, (2 count, inputs)."""
    points = np.concatenate([domain.sample(2 * count, rng), domain.corners(2 * count, rng)])
    with np.errstate(all="ignore"):
        gaps = np.abs(f.evaluate(points, np.float64) - g.evaluate(points, np.float64)).reshape(len(points), -1).max(axis=1)
    best = np.argsort(-np.nan_to_num(gaps, nan=0.0), kind="stable")[:count]
    return np.concatenate([points[best], points[rng.permutation(len(points))[:count]]]).reshape(2 * count, -1)


def _gap(output_of: Any, programs: Any, points: Any) -> Any:
    first, second = (output_of(program, points) for program in programs)
    return (first - second).abs().amax(dim=1)


def _certain(f: Network, g: Network, points: np.ndarray) -> Found:
    (a, wrong_a), (b, wrong_b) = evaluate_with_error(f, points), evaluate_with_error(g, points)
    seen = np.nan_to_num(np.abs(a - b).reshape(len(points), -1).max(axis=1, initial=0.0), nan=0.0)
    sure = (np.abs(a - b) - wrong_a - wrong_b).reshape(len(points), -1).max(axis=1, initial=0.0)
    winner = int(np.nan_to_num(sure, nan=0.0).argmax())
    found = Found(max(0.0, float(sure[winner])), points[winner])
    if max(f.macs, g.macs) > _EXACT or not seen.max(initial=0.0):
        return found
    likely = int(seen.argmax())
    exact = difference_at(f, g, points[likely])
    return Found(exact, points[likely]) if exact > found.deviation else found


def difference_at(f: Network, g: Network, x: np.ndarray) -> float:
    """The largest abs(f - g) of any output at one float64 point, computed in rationals and rounded down."""
    from exactprune.bounds.difference import joint_network
    from exactprune.bounds.forward import exact_preactivations

    joint = joint_network(f, g)
    values = exact_preactivations(joint.network, x, joint.last, range(int(np.prod(f.output_shape))))
    largest = max((abs(value) for value in values), default=Fraction(0))
    near = float(largest)
    return near if Fraction(near) <= largest else math.nextafter(near, 0.0)
