"""What dynamic sparse training methods share: train sparse from the start, rewire now and then.

The number of weights that are there never changes: what a rewiring drops, it grows elsewhere, and the first masks hold
exactly the number asked for. No rewiring follows the last step: what grew there would never be trained. Random choices
come from a CPU generator, so every device rewires alike.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from exactprune.pruners.lottery import training_data
from exactprune.pruners.problem import Problem, layers_of
from exactprune.pruners.protocol import Plan, Pruner, no_score, require
from exactprune.pruners.selection import count
from exactprune.training import TrainOptions, train


@dataclass(frozen=True)
class DynamicOptions(TrainOptions):
    """Options of dynamic sparse training, and those of training.

    Attributes:
        interval: steps between rewirings; 0 for once per epoch.
        start: how the first connections are spread: uniform (the same density in every layer) or erdos-renyi.
    """

    interval: int = 0
    start: Literal["uniform", "erdos-renyi"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.interval >= 0, "interval", self.interval, "a whole number >= 0")
        require(self.start in ("uniform", "erdos-renyi"), "start", self.start, "uniform or erdos-renyi")


Options = TypeVar("Options", bound=DynamicOptions)


class DynamicPruner(Pruner[Options], Generic[Options]):
    """A method that trains with a fixed number of connections and moves them."""

    when = "during training"

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """There is none: connections come and go in training."""
        raise no_score(self.name)

    @abstractmethod
    def rewire(self, weights: dict[str, Tensor], masks: dict[str, Tensor], lr: float, generator: torch.Generator) -> None:
        """Change ``masks`` and ``weights`` in place; the number of connections stays the same.

        Args:
            weights: parameter name -> the module's own weights.
            masks: parameter name -> True where a connection is.
            lr: the current learning rate.
            generator: of random choices.
        """

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Random connections, then training with rewirings."""
        options, (x, y) = self.options, training_data(problem)
        generator = torch.Generator().manual_seed(options.seed)
        masks = first_masks(problem, sparsity, options.start, generator)
        epoch = -(-len(x) // options.batch)
        interval, last = options.interval or epoch, options.epochs * epoch
        run = copy.deepcopy(self)  # a method may keep state (signs, a threshold) for one run

        def after_step(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if step % interval == 0 and step < last:
                weights = {name: layer.weight for name, layer in layers_of(module).items()}
                with torch.no_grad():
                    run.rewire(weights, masks, optimizer.param_groups[0]["lr"], generator)

        trained = train(problem.module, x, y, options, masks=masks, after_step=after_step, progress=problem.progress,
                        loss=problem.loss)
        problem.cost.gradients += options.epochs * len(x)
        return Plan(masks, {n: v.detach() for n, v in trained.module.state_dict().items() if v.is_floating_point()})


def first_masks(problem: Problem, sparsity: float, start: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random masks with exactly the number of connections asked for in all."""
    keep = problem.size - count(sparsity, problem.size)
    shapes = problem.shapes
    weight = [float(s.numel()) if start == "uniform" else float(s[0] + s[1:].numel()) for s in shapes.values()]
    shares = spread(keep, weight, [s.numel() for s in shapes.values()])
    masks = {}
    for (name, shape), number in zip(shapes.items(), shares):
        mask = torch.zeros(shape.numel(), dtype=torch.bool)
        mask[torch.randperm(shape.numel(), generator=generator)[:number]] = True
        masks[name] = mask.view(shape).to(problem.device)
    return masks


def spread(number: int, weight: list[float], room: list[int]) -> list[int]:
    """``number`` in whole parts in proportion to ``weight``, none above its ``room``; largest remainders round up."""
    full: set[int] = set()
    while True:
        left, free = number - sum(room[i] for i in full), [i for i in range(len(room)) if i not in full]
        total = sum(weight[i] for i in free)
        exact = {i: left * weight[i] / total if total > 0 else left / len(free) for i in free}
        over = {i for i in free if exact[i] > room[i]}
        if not over:
            break
        full |= over
    shares = [room[i] if i in full else int(exact[i]) for i in range(len(room))]
    for i in sorted(free, key=lambda i: int(exact[i]) - exact[i])[:number - sum(shares)]:
        shares[i] += 1
    return shares


def grow(mask: Tensor, number: int, generator: torch.Generator, forbidden: Tensor | None = None) -> Tensor:
    """Flat indices of ``number`` random places without a connection; ``forbidden`` ones only when no others are left."""
    flat = mask.flatten().cpu()
    avoid = torch.zeros_like(flat) if forbidden is None else forbidden.flatten().cpu()
    free, spare = (~flat & ~avoid).nonzero().flatten(), (~flat & avoid).nonzero().flatten()
    chosen = torch.cat([side[torch.randperm(len(side), generator=generator)] for side in (free, spare)])[:number]
    return chosen.to(mask.device)
