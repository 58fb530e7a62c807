"""The lottery ticket procedure: train, prune a fifth of what remains by magnitude, rewind, repeat.

J. Frankle, M. Carbin, "The lottery ticket hypothesis: finding sparse, trainable neural networks", ICLR 2019, Section 2; rewinding
to an early step k instead of the start: J. Frankle, G. Dziugaite, D. Roy, M. Carbin, "Linear mode connectivity and the
lottery ticket hypothesis", ICML 2020. Round i removes ``rate`` of the weights that remain (the last round whatever
is missing to the exact number), by abs(w) after training; every parameter then goes back to its value after k steps of the
first training, removed weights stay zero, and so do the optimizer's averages of them. Training goes on from step k: its batches,
its learning rates.

Choices left open: all layers are ranked together (``scope``); the optimizer's averages start afresh every round; the
plan's values are the ticket trained once more, or the ticket itself (``finish`` = ticket).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from exactprune.errors import OptionError
from exactprune.pruners.problem import Problem, Progress, layers_of
from exactprune.pruners.protocol import Plan, Pruner, no_score, require
from exactprune.pruners.selection import Scope, count, drop_lowest
from exactprune.training import Trained, TrainOptions, train


@dataclass(frozen=True)
class LotteryOptions(TrainOptions):
    """Options of ``lottery``, and those of training.

    Attributes:
        rate: share of the remaining weights that goes per round.
        rewind: step to go back to; 0 is the start.
        finish: trained or ticket: what the plan's values are.
        scope: global or layer.
    """

    rate: float = 0.2
    rewind: int = 0
    finish: Literal["trained", "ticket"] = "trained"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.rate < 1, "rate", self.rate, "a number between 0 and 1")
        require(self.rewind >= 0, "rewind", self.rewind, "a whole number >= 0")
        require(self.finish in ("trained", "ticket"), "finish", self.finish, "trained or ticket")
        require(self.scope in ("global", "layer"), "scope", self.scope, "global or layer")


class Lottery(Pruner[LotteryOptions]):
    """Iterative magnitude pruning with rewinding."""

    name: ClassVar[str] = "lottery"
    when: ClassVar[str] = "during training"
    reference: ClassVar[str] = "Frankle & Carbin 2019, Sec. 2"
    Options = LotteryOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """There is none: magnitudes are compared after each training."""
        raise no_score(self.name)

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Rounds of training and pruning until exactly the number asked for is gone."""
        options, (x, y) = self.options, training_data(problem)
        count(sparsity, problem.size)
        masks = dict(problem.previous or everything(problem))
        module, shares = problem.module, self.schedule(sparsity)
        first = {"snapshots": (options.rewind,)}
        trainings = len(shares) + (options.finish == "trained")

        def trained(place: int, **more: Any) -> Trained:
            """One training, from the start or from the step rewound to."""
            problem.cost.gradients += options.epochs * len(x) - more.get("start", 0) * options.batch
            return train(module, x, y, options, masks=masks, loss=problem.loss,
                         progress=one_of(problem.progress, place, trainings), **more)

        ticket: dict[str, Tensor] = {}
        for place, share in enumerate(shares):
            result = trained(place, **({"start": options.rewind} if ticket else first))
            ticket = ticket or self._rewound(result)
            weights = {name: layer.weight.detach() for name, layer in layers_of(result.module).items()}
            masks = next_masks(weights, masks, share, options.scope)
            module = result.module
            module.load_state_dict(ticket)
        if options.finish == "trained":
            module = trained(len(shares), start=options.rewind).module
        return Plan(masks, {n: v.detach() for n, v in module.state_dict().items() if v.is_floating_point()})

    def _rewound(self, result: Trained) -> dict[str, Tensor]:
        if self.options.rewind not in result.snapshots:
            raise OptionError(f"option rewind is {self.options.rewind}; a training has {result.steps} steps: give at most that")
        return result.snapshots[self.options.rewind]

    def schedule(self, sparsity: float) -> list[float]:
        """Sparsity after every round."""
        shares, left = [], 1.0
        while left * (1 - self.options.rate) > 1 - sparsity + 1e-12:
            left *= 1 - self.options.rate
            shares.append(1 - left)
        return [*shares, sparsity]


def next_masks(weights: dict[str, Tensor], masks: dict[str, Tensor], sparsity: float,
               scope: Scope = "global") -> dict[str, Tensor]:
    """Masks at ``sparsity``: what is gone stays gone, then the smallest abs(w) go."""
    scores = {name: w.abs().to(torch.float64) for name, w in weights.items()}
    removed = {name: ~mask for name, mask in masks.items()}
    if scope == "layer":
        return {n: drop_lowest({n: s}, count(sparsity, s.numel()), removed)[n] for n, s in scores.items()}
    return drop_lowest(scores, count(sparsity, sum(s.numel() for s in scores.values())), removed)


def one_of(progress: Progress | None, place: int, number: int) -> Progress | None:
    """What the training at ``place`` of ``number`` equal ones tells ``progress``."""
    return None if progress is None else lambda done, total: progress(place * total + done, number * total)


def everything(problem: Problem) -> dict[str, Tensor]:
    """Masks that remove nothing."""
    return {name: torch.ones(shape, dtype=torch.bool, device=problem.device) for name, shape in problem.shapes.items()}


def training_data(problem: Problem) -> tuple[Tensor, Tensor]:
    """The data in the module's own dtype, on its device."""
    x, y = problem.data
    own = next(problem.module.parameters()).dtype
    problem.cost.samples = len(x)
    return (x.to(own) if x.is_floating_point() else x), (y.to(own) if y.is_floating_point() else y)
