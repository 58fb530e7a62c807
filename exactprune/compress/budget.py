"""The largest deviation that is allowed: ``exact``, ``rounding`` or a number.

``rounding`` is 2^-20 R for float32 and 2^-49 R for float64, where R is the largest absolute output that is attained at
a point found in the domain: eight units in the last place at the top of the output range, of the order of what the
original differs from itself across batch sizes. R comes from a witness, so loose bounds cannot inflate it, and the
witness' value is rounded down by its evaluation error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from exactprune.compress.deviation import evaluate_with_error
from exactprune.domain import Box
from exactprune.errors import OptionError
from exactprune.network import Network

_SHARE = {"float32": 2.0**-20, "float64": 2.0**-49}


@dataclass(frozen=True, eq=False)
class Budget:
    """The allowed deviation.

    Attributes:
        eps: of any output, anywhere on the domain.
        reach: R, a lower bound of the largest absolute output on the domain (0 where it was not needed).
        witness: the point where it is attained, or None.
        name: as asked for.
    """

    eps: float
    reach: float
    witness: np.ndarray | None
    name: str


def budget_of(network: Network, domain: Box, max_deviation: str | float, data: np.ndarray | None = None) -> Budget:
    """The budget that an option asks for.

    Args:
        network: the original network.
        domain: the box.
        max_deviation: ``exact``, ``rounding``, or a finite number >= 0.
        data: points (samples, *input shape) that may serve as witnesses where they lie in the box.

    Raises:
        OptionError: anything else.
    """
    if max_deviation == "exact":
        return Budget(0.0, 0.0, None, "exact")
    if max_deviation == "rounding":
        reach, witness = largest_output(network, domain, data)
        return Budget(reach * _SHARE[network.dtype.name], reach, witness, "rounding")
    try:
        eps = float(max_deviation)
    except (TypeError, ValueError):
        eps = math.nan
    if not (math.isfinite(eps) and eps >= 0):
        raise OptionError(f"max deviation is {max_deviation!r}; give exact, rounding, or a finite number >= 0")
    return Budget(eps, 0.0, None, f"{eps:g}")


def largest_output(network: Network, domain: Box, data: np.ndarray | None = None, *, seed: int = 0,
                   work: float = 2e9) -> tuple[float, np.ndarray]:
    """A lower bound of the largest absolute output on the domain, and the point where it is attained.

    Random points, corners and data, then gradient steps to corners from the best of them.

    Args:
        network: any network.
        domain: the box.
        data: points that may serve as well.
        seed: of the random points.
        work: multiply-accumulates to spend, about.
    """
    rng = np.random.default_rng(seed)
    points = int(np.clip(work / max(network.macs, 1) / 2, 8, 512))
    x = np.concatenate([domain.sample(points, rng), domain.corners(points, rng), _inside(domain, data)])
    best = x[np.argsort(_score(network, x))[-8:]]
    best = np.concatenate([best, _climbed(network, domain, best)])
    value, error = evaluate_with_error(network, best)
    certain = np.nan_to_num((np.abs(value) - error).reshape(len(best), -1).max(axis=1), nan=-np.inf, posinf=-np.inf)
    winner = int(certain.argmax())
    return max(0.0, math.nextafter(float(certain[winner]), 0.0)), best[winner]


def _inside(domain: Box, data: np.ndarray | None) -> np.ndarray:
    if data is None:
        return np.empty((0, *domain.shape))
    x = np.reshape(data, (-1, *domain.shape)).astype(np.float64)
    return x[domain.contains(x)]


def _score(network: Network, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        out = network.evaluate(x, np.float64).reshape(len(x), -1)
    return np.nan_to_num(np.abs(out).max(axis=1), nan=0.0, posinf=0.0)


def _climbed(network: Network, domain: Box, x: np.ndarray, rounds: int = 4) -> np.ndarray:
    """The corners that the gradient of the largest absolute output points to, ``rounds`` times; a heuristic."""
    import torch

    from exactprune.compress.differentiable import compile_network, output_of

    program = compile_network(network)
    lower, upper = program.box(domain)
    points = torch.tensor(x.reshape(len(x), -1))
    for _ in range(rounds):
        points.requires_grad_(True)
        best = output_of(program, points).abs().amax(dim=1).sum()
        (slope,) = torch.autograd.grad(best, points)
        moved = torch.where(slope > 0, upper, torch.where(slope < 0, lower, points.detach()))
        points = moved.detach()
    return points.numpy().reshape(len(x), *domain.shape)
