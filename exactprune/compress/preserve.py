"""Result-preserving compression: which inputs keep their class, certified (``--preserve argmax``).

Let abs(f - g) <= eps on the box, and let c be the class of x under f with margin f_c(x) - max_(j != c) f_j(x) > 2 eps.
Then g_c(x) >= f_c(x) - eps > f_j(x) + eps >= g_j(x) for every j != c: x keeps its class under g. So all inputs whose
margin exceeds 2 eps keep theirs, wherever in the box they are; how large that part of the box is can only be measured.
The largest eps with which every given input keeps its class is half of their least margin, less one bit.

Margins are lower bounds: outputs are computed in float64 at the exact point given, less their error bounds
(``compress.deviation``). All of this is about f and g as real functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from exactprune.compress.deviation import evaluate_with_error
from exactprune.domain import Box
from exactprune.errors import OptionError
from exactprune.network import Network


@dataclass(frozen=True, eq=False)
class Margins:
    """Lower bounds on how much larger the largest output is than the second.

    Attributes:
        data: one per given input; minus infinity for inputs outside the box, about which nothing is known.
        samples: one per random point of the box.
    """

    data: np.ndarray
    samples: np.ndarray

    @property
    def budget(self) -> float:
        """The largest eps with which every given input that has a class at all keeps it; 0 where none has."""
        certain = self.data[self.data > 0]
        return math.nextafter(float(certain.min()) / 2, 0.0) if certain.size else 0.0


@dataclass(frozen=True)
class Preserved:
    """What keeps its class under g.

    Attributes:
        inputs: number of given inputs.
        certified: of them, those that provably keep their class.
        undecided: those inside the box whose margin is too small to tell.
        outside: those outside the box.
        margin: 2 eps: every input of the box with a larger margin keeps its class.
        share: measured share of random points of the box whose margin is larger.
        samples: how many points that share rests on.
    """

    inputs: int
    certified: int
    undecided: int
    outside: int
    margin: float
    share: float
    samples: int

    @property
    def words(self) -> str:
        """For people, in one sentence or two."""
        rest = f", {self.undecided:,} not decided" if self.undecided else ""
        rest += f", {self.outside:,} outside the box" if self.outside else ""
        where = (f"every x in D whose largest output leads by more than {self.margin:.3g} keeps its class (measured: "
                 f"{self.share:.1%} of {self.samples:,} random points of D)")
        return f"{self.certified:,} of {self.inputs:,} given inputs provably keep their class{rest}; {where}"


def margins_of(network: Network, domain: Box, data: np.ndarray | None, *, samples: int = 1000, seed: int = 0) -> Margins:
    """Margins of given inputs and of random points.

    Args:
        network: the original, with two outputs or more.
        domain: the box that f - g is bounded on.
        data: shape (inputs, *input shape), or None.
        samples: number of random points.
        seed: of these.

    Raises:
        OptionError: the network has a single output, and so no classes.
    """
    if math.prod(network.output_shape) < 2:
        raise OptionError(f"--preserve argmax: {network.name} has one output, so there are no classes to keep")
    x = np.empty((0, *network.input_shape)) if data is None else np.reshape(data, (-1, *network.input_shape))
    x = x.astype(np.float64)
    known = np.where(domain.contains(x), _margins(network, x), -np.inf)
    return Margins(known, _margins(network, domain.sample(samples, np.random.default_rng(seed))))


def preserved(margins: Margins, eps: float) -> Preserved:
    """What provably keeps its class when abs(f - g) <= eps on the box."""
    keeps, outside = int((margins.data > 2 * eps).sum()), int(np.isneginf(margins.data).sum())
    share = float((margins.samples > 2 * eps).mean()) if margins.samples.size else 0.0
    return Preserved(margins.data.size, keeps, margins.data.size - keeps - outside, outside, math.nextafter(2 * eps, math.inf),
                     share, margins.samples.size)


def _margins(network: Network, x: np.ndarray, batch: int = 256) -> np.ndarray:
    parts = [_batch(network, x[i:i + batch]) for i in range(0, len(x), batch)]
    return np.concatenate([np.zeros(0), *parts])


def _batch(network: Network, x: np.ndarray) -> np.ndarray:
    """Rounded down; -2^1000 in place of a margin that is not finite, so that only inputs outside are at infinity."""
    with np.errstate(all="ignore"):
        value, error = (a.reshape(len(x), -1) for a in evaluate_with_error(network, x))
        best = value.argmax(axis=1)[:, None]
        lower = np.take_along_axis(np.nextafter(value - error, -np.inf), best, axis=1)[:, 0]
        upper = np.nextafter(value + error, np.inf)
        np.put_along_axis(upper, best, -np.inf, axis=1)
        found = np.nextafter(lower - upper.max(axis=1), -np.inf)
    return np.where(np.isfinite(found), found, -2.0**1000)
