"""ScalingUp: lossless removal, behind the protocol of the approximate methods.

T. Serra, X. Yu, A. Kumar, S. Ramalingam, "Scaling up exact neural network compression by ReLU stability", NeurIPS 2021. This is
the project's own ``verify`` and ``compress``: neurons that are proved stably inactive go, stably active ones are merged
or folded within a certified budget. How much goes is what can be proved, not what is asked for: ``sparsity`` is ignored. The
masks show the stably inactive neurons' weights; ``Plan.smaller`` is the compressed network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from exactprune.domain import uniform
from exactprune.io import load, to_torch
from exactprune.options import CompressOptions, VerifyOptions
from exactprune.pipeline import Verification, compress, verify
from exactprune.pruners.chains import chain_of
from exactprune.pruners.nisp import unit_plan
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, no_score, require


@dataclass(frozen=True)
class ScalingUpOptions:
    """Options of ``scaling-up``.

    Attributes:
        low, high: the box of inputs.
        decider: see ``VerifyOptions``.
        time_limit: seconds for the exact stage.
        max_deviation: see ``CompressOptions``.
    """

    low: float = 0.0
    high: float = 1.0
    decider: str = "auto"
    time_limit: float = 600.0
    max_deviation: str | float = "rounding"

    def __post_init__(self) -> None:
        require(self.low <= self.high, "low", self.low, f"a number <= high ({self.high})")


class ScalingUp(Pruner[ScalingUpOptions]):
    """Lossless compression by ReLU stability."""

    name: ClassVar[str] = "scaling-up"
    prunes = "neurons"
    reference: ClassVar[str] = "Serra et al. 2021 (lossless)"
    data = "none"
    Options = ScalingUpOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """There is none: a neuron is proved removable, or stays."""
        raise no_score(self.name)

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Verify, compress; ``sparsity`` is ignored."""
        options, chain = self.options, chain_of(problem.model)
        shape = (chain.layer(chain.hidden[0]).weight.shape[1],) if problem.x is None else tuple(problem.x.shape[1:])
        wanted = VerifyOptions(decider=options.decider, time_limit=options.time_limit)  # pyright: ignore[reportArgumentType]
        with torch.random.fork_rng(devices=[]):  # tracing a module and building one draw random numbers
            network = load(problem.module, input_shape=shape)
            verification = verify(network, uniform(options.low, options.high, shape), wanted)
            smaller = compress(verification, options=CompressOptions(max_deviation=options.max_deviation))
            module = to_torch(smaller.network).to(problem.device)
        units = inactive_units(verification, list(chain.hidden), problem)
        plan = unit_plan(problem, chain, units, {})
        notes = (str(smaller), "the sparsity follows from what is proved; the one asked for is not used")
        return Plan(plan.masks, plan.values, units=units, smaller=module, notes=notes)


def inactive_units(verification: Verification, names: list[str], problem: Problem) -> dict[str, Tensor]:
    """Layer by layer, True where a neuron (channel) is not proved inactive everywhere."""
    units = {}
    for name, verdict, relu in zip(names, verification.layers, verification.network.relus):
        dead = np.asarray(verdict.status).reshape(verification.network.shapes[relu]) == 1
        dead = dead.reshape(len(dead), -1).all(1)
        units[name] = torch.from_numpy(~dead).to(problem.device)
    return units
