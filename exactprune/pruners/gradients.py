"""Gradients and Hessian-vector products of the mean loss with respect to the prunable weights.

Every pass takes ``problem.batch`` samples; sums over batches are exact up to float64 rounding, so the batch size
changes memory and not the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exactprune.pruners.problem import Problem, layers_of
from exactprune.pruners.protocol import finite


def batches(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """The data in pieces of ``problem.batch`` samples."""
    x, y = problem.data
    problem.cost.samples = max(problem.cost.samples, len(x))
    yield from zip(x.split(problem.batch), y.split(problem.batch))


def parameters(problem: Problem) -> list[Tensor]:
    """Prunable parameters of the working copy, in order."""
    return [layer.weight for layer in layers_of(problem.model).values()]


def derivative(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False,
               retain_graph: bool | None = None) -> list[Tensor]:
    """d value / d input for every input; zero where it does not matter (the slopes of a linear loss are constants)."""
    if not value.requires_grad:
        return [torch.zeros_like(i) for i in inputs]
    found = torch.autograd.grad(value, inputs, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(i) if d is None else d for i, d in zip(inputs, found)]


def gradient(problem: Problem, temperature: float = 1.0) -> dict[str, Tensor]:
    """d/dw of the mean over samples of loss(f(x) / temperature, y).

    Raises:
        DataError: a component is NaN or infinite.
    """
    weights = parameters(problem)
    total = [torch.zeros_like(w) for w in weights]
    for x, y in batches(problem):
        loss = problem.losses(problem.model(x) / temperature, y).sum()
        for sum_, part in zip(total, derivative(loss, weights)):
            sum_ += part
        problem.cost.gradients += len(x)
    return finite({name: t / len(problem.data[0]) for name, t in zip(problem.names, total)}, "the gradient")


def hessian_vector(problem: Problem, vector: dict[str, Tensor], temperature: float = 1.0) -> dict[str, Tensor]:
    """H v for the Hessian of the mean loss over the prunable weights (Pearlmutter 1994), by double backpropagation.

    Raises:
        DataError: a component is NaN or infinite.
    """
    weights = parameters(problem)
    total = [torch.zeros_like(w) for w in weights]
    for x, y in batches(problem):
        loss = problem.losses(problem.model(x) / temperature, y).sum()
        slopes = derivative(loss, weights, create_graph=True)
        along = torch.stack([(s * vector[n]).sum() for s, n in zip(slopes, problem.names)]).sum()
        for sum_, part in zip(total, derivative(along, weights)):
            sum_ += part
        problem.cost.gradients += 2 * len(x)
    return finite({name: t / len(problem.data[0]) for name, t in zip(problem.names, total)}, "the Hessian product")
