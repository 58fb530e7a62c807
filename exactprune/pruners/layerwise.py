"""What the reconstruction-based methods share: the Hessian of a layer's output error.

For a layer with inputs a_n (all positions), the error of changed weights w' in one row is
(1/N) sum_n ((w - w')^T a_n)^2, whose Hessian is H = 2/N sum_n a_n a_n^T for every row; with groups, one H per group. Inputs
that are always zero ("dead") have no curvature: H gets a one on the diagonal there, and their weights are zero and go first.
Inputs come from the module as given; layers are pruned independently, so the result does not depend on their order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from exactprune.pruners.problem import Problem, owners_of
from exactprune.pruners.protocol import Plan, Pruner, finite
from exactprune.pruners.selection import count
from exactprune.pruners.taps import patches

Options = TypeVar("Options")
Tick = Callable[[int], None]  # told how many more rows are done


def input_moments(problem: Problem) -> dict[str, Tensor]:
    """sum_n a_n a_n^T over samples and positions, parameter name -> (groups, K, K).

    Raises:
        DataError: there are no inputs, or a layer's inputs are not finite.
    """
    owners = owners_of(problem.model)
    total: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            a = patches(layer, inputs[0].detach())
            total[name] = total.get(name, torch.zeros((), dtype=a.dtype, device=a.device)) + \
                torch.einsum("ngkl,ngjl->gkj", a, a)

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layers in owners.items() for layer in layers]
    try:
        with torch.no_grad():
            for x in problem.inputs.split(problem.batch):
                problem.model(x)
    finally:
        for handle in handles:
            handle.remove()
    problem.cost.samples = len(problem.inputs)
    for name in owners:
        if name not in total:
            size = problem.shapes[name][1:].numel()
            total[name] = torch.zeros(1, size, size, dtype=problem.dtype, device=problem.device)
    return finite(total, "the inputs' second moments")


class LayerPruner(Pruner[Options], Generic[Options]):
    """A method that prunes every layer by itself, each to the sparsity asked for."""

    data = "inputs"

    @abstractmethod
    def prune_rows(self, weight: Tensor, hessian: Tensor, number: int, tick: Tick) -> tuple[Tensor, Tensor]:
        """Prune a matrix.

        Args:
            weight: (rows, K).
            hessian: (K, K), positive semidefinite.
            number: how many entries go.
            tick: told how many more rows are done.

        Returns:
            Mask and new weights, both (rows, K).
        """

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Every layer by itself; rows of one group share a Hessian."""
        moments = input_moments(problem)
        masks, values = {}, {}
        tick = problem.ticker(sum(len(weight) for weight in problem.weights.values()))
        for name, weight in problem.weights.items():
            hessian = 2 / len(problem.inputs) * moments[name]
            masks[name], values[name] = self._layer(weight, hessian, count(sparsity, weight.numel()), tick)
        return Plan(masks, values)

    def _layer(self, weight: Tensor, hessian: Tensor, number: int, tick: Tick) -> tuple[Tensor, Tensor]:
        groups = weight.flatten(1).chunk(len(hessian))
        shares = _shares(number, [g.numel() for g in groups])
        done = [self.prune_rows(g, h, k, tick) for g, h, k in zip(groups, hessian, shares)]
        mask, value = (torch.cat(parts).view_as(weight) for parts in zip(*done))
        return mask, value * mask


def without_dead(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and H with dead inputs made harmless."""
    dead = hessian.diagonal() == 0
    return weight.masked_fill(dead, 0), hessian + torch.diag(dead.to(hessian.dtype))


def _shares(number: int, sizes: list[int]) -> list[int]:
    """``number`` split in proportion to ``sizes``, in whole numbers that add up exactly."""
    total, done, shares = sum(sizes), 0, []
    for end in torch.tensor(sizes).cumsum(0).tolist():
        shares.append(number * end // total - done)
        done += shares[-1]
    return shares


def damped(hessian: Tensor, relative: float) -> Tensor:
    """H + relative * mean(diag H) * I."""
    return hessian + relative * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype,
                                                                      device=hessian.device)


def positive_definite(hessian: Tensor) -> Tensor:
    """H, or H + I where H is not positive definite (few samples), as in the OBC authors' code."""
    _, info = torch.linalg.cholesky_ex(hessian)
    return hessian if int(info) == 0 else hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def inverse(hessian: Tensor) -> Tensor:
    """The inverse of ``positive_definite``."""
    return torch.cholesky_inverse(torch.linalg.cholesky(positive_definite(hessian)))
