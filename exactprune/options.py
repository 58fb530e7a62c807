"""What a user can choose, as frozen values that are checked once, when they are made.

Every field has the name and the default of the command line's option of the same name (``time_limit`` is
``--time-limit``); docs/config.md lists them. Sizes in bytes may be given as text, ``"2G"`` or ``"512MiB"``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from exactprune.errors import OptionError

GIB = 2**30
DECIDERS = ("auto", "branch-and-bound", "milp", "scaling-up", "leo", "input-split", "lp")
Decider = Literal["auto", "branch-and-bound", "milp", "scaling-up", "leo", "input-split", "lp"]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_DASK = re.compile(r"dask://[^\s/:]+:\d+")


def bytes_of(text: str | int) -> int:
    """Number of bytes in a size such as ``2G``, ``512M`` or ``1000000`` (units are powers of 1024).

    Raises:
        OptionError: ``text`` is no size.
    """
    found = _SIZE.fullmatch(str(text))
    if not found:
        raise OptionError(f"size {str(text)!r}: give a number of bytes, or one with a unit such as 2G or 512M")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class VerifyOptions:
    """How a verification runs. None of these changes what a verdict means, only which verdicts are found.

    Attributes:
        exact: Decide the neurons that bounds and witnesses leave open; without it they stay unknown.
        decider: What decides open neurons; auto picks by size and measured progress.
        time_limit: Seconds for the search; interval bounds and the certificate come on top.
        jobs: Worker processes for the exact stage.
        executor: Where the exact stage runs: serial, process or dask://HOST:PORT (several jobs: at least process).
        device: Where bounds are computed: cpu, cuda, or cuda:N.
        memory: Bytes the bound computations may use.
        seed: Seed of every random choice.
        solver: Pyomo solver for the readable formulations (scaling-up); the others talk to HiGHS directly.
        certificate_cap: Largest certificate file in bytes; verdicts that no longer fit are unknown.

    Raises:
        OptionError: a value lies outside its range.
    """

    exact: bool = True
    decider: Decider = "auto"
    time_limit: float = 600.0
    jobs: int = 1
    executor: str = "serial"
    device: str = "cpu"
    memory: int = 2 * GIB
    seed: int = 0
    solver: str = "appsi_highs"
    certificate_cap: int = 2 * GIB

    def __post_init__(self) -> None:
        for name in ("memory", "certificate_cap"):
            object.__setattr__(self, name, bytes_of(getattr(self, name)))
        if self.jobs > 1 and self.executor == "serial":
            object.__setattr__(self, "executor", "process")
        _require(self.decider in DECIDERS, "decider", self.decider, f"one of {', '.join(DECIDERS)}")
        _require(self.time_limit > 0, "time-limit", self.time_limit, "seconds > 0")
        _require(self.jobs >= 1, "jobs", self.jobs, "a whole number >= 1")
        _require(self.executor in ("serial", "process") or _matches(_DASK, self.executor), "executor", self.executor,
                 "serial, process or dask://HOST:PORT")
        _require(_matches(_DEVICE, self.device), "device", self.device, "cpu, cuda or cuda:N")
        _require(self.memory >= 2**24, "memory", self.memory, "at least 16M")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2^63 - 1")
        _require(bool(self.solver), "solver", self.solver, "the name of a Pyomo solver")
        _require(self.certificate_cap > 0, "certificate-cap", self.certificate_cap, "a size > 0")


@dataclass(frozen=True)
class CompressOptions:
    """What a compression may change, and how it is measured.

    Attributes:
        max_deviation: exact (identities in rationals only), rounding (at most 2^-20 of the largest output found,
            float32, or 2^-49, float64), or a number: the certified maximum of abs(f - g) over the domain.
        samples: Random points, and as many random corners, on which f and g are compared.
        seed: Seed of these points.
        preserve: argmax: also certify which given data keep their class; where max_deviation is rounding, the budget
            is then the largest one with which all of them do, otherwise at most that. none: no such claim.

    Raises:
        OptionError: a value lies outside its range.
    """

    max_deviation: str | float = "rounding"
    samples: int = 1000
    seed: int = 0
    preserve: str = "none"

    def __post_init__(self) -> None:
        if self.max_deviation not in ("exact", "rounding"):
            object.__setattr__(self, "max_deviation", _deviation(self.max_deviation))
        _require(self.samples >= 1, "samples", self.samples, "a whole number >= 1")
        _require(self.preserve in ("none", "argmax"), "preserve", self.preserve, "none or argmax")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2^63 - 1")


def _deviation(value: str | float) -> float:
    words = "exact, rounding or a finite number >= 0"
    try:
        number = float(value)
    except ValueError:
        raise OptionError(f"--max-deviation is {value!r}; give {words}") from None
    _require(math.isfinite(number) and number >= 0, "max-deviation", value, words)
    return number


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None


def _require(holds: bool, name: str, value: object, words: str) -> None:
    if not holds:
        raise OptionError(f"--{name} is {value!r}; give {words}")
