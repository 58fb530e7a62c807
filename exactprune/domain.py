"""Domain: the box of inputs a claim is about, with float64 endpoints that are taken exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from exactprune.errors import DomainError
from exactprune.ops import Shape, frozen


@dataclass(frozen=True, eq=False)
class Box:
    """All x with lower <= x <= upper, elementwise.

    Attributes:
        lower, upper: float64, in the input's shape.
        source: in words, where the box comes from.

    Raises:
        DomainError: shapes differ, an endpoint is NaN or infinite, or lower > upper somewhere.
    """

    lower: np.ndarray
    upper: np.ndarray
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            object.__setattr__(self, name, frozen(np.asarray(getattr(self, name), dtype=np.float64)))
        if self.lower.shape != self.upper.shape:
            raise DomainError(f"box ({self.source}): lower has shape {self.lower.shape}, upper {self.upper.shape}")
        for name, array in (("lower", self.lower), ("upper", self.upper)):
            bad = np.flatnonzero(~np.isfinite(array))
            if bad.size:
                raise DomainError(f"box ({self.source}): {name} is {array.flat[bad[0]]} at flat index {bad[0]} "
                                  f"({bad.size} such); every input needs finite bounds")
        crossed = np.flatnonzero(self.lower > self.upper)
        if crossed.size:
            i = crossed[0]
            raise DomainError(f"box ({self.source}): lower {float(self.lower.flat[i])!r} > upper "
                              f"{float(self.upper.flat[i])!r} at flat index {i} ({crossed.size} such); repair them")

    @property
    def shape(self) -> Shape:
        """The input's shape."""
        return self.lower.shape

    @cached_property
    def sha256(self) -> str:
        """Hash of shape and endpoints (little-endian float64), not of ``source``."""
        data = repr(list(self.shape)).encode()
        for array in (self.lower, self.upper):
            data += array.astype("<f8").tobytes()
        return hashlib.sha256(b"exactprune-box/1" + data).hexdigest()

    def contains(self, x: np.ndarray) -> np.ndarray:
        """Which points of a batch (batch, *shape) lie in the box, exactly: booleans of shape (batch,)."""
        axes = tuple(range(1, x.ndim))
        return np.asarray(((x >= self.lower) & (x <= self.upper)).all(axis=axes))

    def reshaped(self, shape: Shape) -> Box:
        """The same box for inputs of another shape with as many values.

        Raises:
            DomainError: the number of values differs.
        """
        if self.shape == shape:
            return self
        if self.lower.size != int(np.prod(shape)):
            raise DomainError(f"box ({self.source}): has {self.lower.size} values, the network's input "
                              f"{list(shape)} has {int(np.prod(shape))}")
        return Box(self.lower.reshape(shape), self.upper.reshape(shape), self.source)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform points, shape (count, *shape), float64, inside the box exactly."""
        x = self.lower + rng.random((count, *self.shape)) * (self.upper - self.lower)
        return np.clip(x, self.lower, self.upper)

    def corners(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random corners, shape (count, *shape), float64."""
        return np.where(rng.random((count, *self.shape)) < 0.5, self.lower, self.upper)

    def __repr__(self) -> str:
        low, high = self.lower.min(initial=np.inf), self.upper.max(initial=-np.inf)
        return f"Box({list(self.shape)}, from {low:.6g} to {high:.6g}, {self.source})"


def uniform(lower: float, upper: float, shape: Sequence[int]) -> Box:
    """The same interval for every input."""
    shape = tuple(shape)
    words = f"[{lower:g}, {upper:g}] for every input"
    return Box(np.full(shape, lower, np.float64), np.full(shape, upper, np.float64), words)


def around(center: np.ndarray, epsilon: float, clip: tuple[float, float] | None = None) -> Box:
    """The L-infinity ball around ``center``, clipped; endpoints are rounded to float64 once and then taken exactly.

    Raises:
        DomainError: ``epsilon`` is negative or not finite, or clipping leaves nothing.
    """
    if not (np.isfinite(epsilon) and epsilon >= 0):
        raise DomainError(f"epsilon is {epsilon}; give a finite number >= 0")
    center = np.asarray(center, np.float64)
    lower, upper = center - epsilon, center + epsilon
    if clip is not None:
        lower, upper = np.maximum(lower, clip[0]), np.minimum(upper, clip[1])
    words = f"L-infinity ball of radius {epsilon:g}" + (f" clipped to [{clip[0]:g}, {clip[1]:g}]" if clip else "")
    return Box(lower, upper, words)


def of_data(data: np.ndarray, margin: float = 0.0) -> Box:
    """Per-feature minimum and maximum of data of shape (samples, *shape), widened by ``margin`` on both sides.

    Raises:
        DomainError: there is no sample, or ``margin`` is negative or not finite.
    """
    data = np.asarray(data, np.float64)
    if data.ndim < 2 or not len(data):
        raise DomainError(f"data of shape {data.shape} has no samples; give (samples, *input shape)")
    if not (np.isfinite(margin) and margin >= 0):
        raise DomainError(f"margin is {margin}; give a finite number >= 0")
    words = f"per-feature range of {len(data)} samples" + (f", margin {margin:g}" if margin else "")
    return Box(data.min(axis=0) - margin, data.max(axis=0) + margin, words)
