"""Per-sample gradients from what goes into a layer and what comes back to it.

A layer computes z = W a at one position (Linear) or several (Linear on sequences, Conv2d), so sample n's gradient of any
objective is the sum over positions of g a^T, with a the layer's input there and g the objective's gradient at z. One
backward pass over a batch gives a and g of every sample: samples are independent in evaluation mode. Nothing of the size
(samples x weights) is formed unless asked for, and then only the columns asked for. A layer that is called several
times, or shares its weight with another, adds positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from exactprune.errors import DataError, OptionError
from exactprune.pruners.gradients import batches
from exactprune.pruners.problem import Problem, owners_of

Calls = dict[str, list[tuple[nn.Linear | nn.Conv2d, Tensor, Tensor]]]  # name -> (layer, input, output) of every call
Objective = Callable[[Tensor, Tensor], list[Tensor]]  # (outputs, targets) -> scalars, each a sum over samples


@dataclass(frozen=True, eq=False)
class Factors:
    """Sample n's gradient is sum_l g[n, :, :, l] a[n, :, :, l]^T, group by group.

    Attributes:
        a: inputs, shape (N, groups, K, L).
        g: gradients at the output, shape (N, groups, O, L).
    """

    a: Tensor
    g: Tensor

    @property
    def size(self) -> int:
        """Number of weights: groups * O * K."""
        return self.g.shape[1] * self.g.shape[2] * self.a.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients of output channels start ... stop - 1, shape (N, (stop - start) * K)."""
        groups, outputs = self.g.shape[1:3]
        g = self.g.flatten(1, 2)
        if groups == 1:
            return torch.bmm(g[:, start:stop], self.a[:, 0].transpose(1, 2)).flatten(1)
        channel = torch.arange(start, stop, device=g.device)
        return torch.einsum("nol,nokl->nok", g[:, channel], self.a[:, channel // outputs]).flatten(1)

    def columns(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients of the flat weights start ... stop - 1, shape (N, stop - start)."""
        inputs = self.a.shape[2]
        first, last = start // inputs, -(-stop // inputs)
        return self.rows(first, last)[:, start - first * inputs:stop - first * inputs]

    @property
    def outer_products(self) -> bool:
        """Whether every sample's gradient is one outer product g a^T: one group, one position."""
        return self.a.shape[1] == self.a.shape[3] == 1

    def gram(self) -> Tensor:
        """<gradient_n, gradient_m> = (g_n . g_m)(a_n . a_m) where gradients are outer products, shape (N, N)."""
        a, g = self.a.flatten(1), self.g.flatten(1)
        return (a @ a.T) * (g @ g.T)

    def squares(self) -> Tensor:
        """Sum over samples of the squared gradient, flat, shape (size,)."""
        if self.a.shape[3] == 1:
            return torch.einsum("ngo,ngk->gok", self.g[..., 0].square(), self.a[..., 0].square()).flatten()
        return torch.cat([self.rows(i, i + 1).square().sum(0) for i in range(self.g.shape[1] * self.g.shape[2])])


def sample_factors(problem: Problem, objective: Objective | None = None) -> Iterator[list[dict[str, Factors]]]:
    """Batch by batch, for every objective, the factors of every prunable parameter.

    Args:
        problem: module and data.
        objective: scalars to differentiate; the sum of the losses by default.

    Raises:
        DataError: a gradient is NaN or infinite.
        OptionError: the module's first axis is not the batch, or a layer's forward is never called.
    """
    objective = objective or (lambda output, target: [problem.losses(output, target).sum()])
    for x, y in batches(problem):
        with _recording(problem.model) as calls:
            goals = objective(problem.model(x), y)
        _check_calls(calls, len(x))
        outputs = [out for found in calls.values() for _, _, out in found]
        results = []
        for i, goal in enumerate(goals):
            slopes = iter(torch.autograd.grad(goal, outputs, retain_graph=i + 1 < len(goals), allow_unused=True))
            results.append({name: _factors(name, [(layer, a, _or_zero(next(slopes), z)) for layer, a, z in found])
                            for name, found in calls.items()})
            problem.cost.gradients += len(x)
        yield results


def all_factors(problem: Problem, objective: Objective | None = None) -> list[dict[str, Factors]]:
    """``sample_factors`` for all samples at once."""
    parts = list(sample_factors(problem, objective))
    return [{name: Factors(torch.cat([p[i][name].a for p in parts]), torch.cat([p[i][name].g for p in parts]))
             for name in problem.names} for i in range(len(parts[0]))]


def first_samples(problem: Problem, samples: int) -> Problem:
    """The same with the first ``samples`` samples; 0 for all."""
    if not samples or samples >= len(problem.data[0]):
        return problem
    x, y = problem.data
    return replace(problem, x=x[:samples], y=y[:samples])


@contextmanager
def _recording(model: nn.Module) -> Iterator[Calls]:
    owners = owners_of(model)
    calls: Calls = {name: [] for name in owners}

    def hook(name: str) -> Callable[..., Tensor]:
        def record(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls[name].append((layer, inputs[0].detach(), output))
            return output.clone()  # an in-place activation then changes the clone

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layers in owners.items() for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_calls(calls: Calls, samples: int) -> None:
    for name, found in calls.items():
        if not found:
            raise OptionError(f"parameter '{name}': its layer is never called in the forward pass, so it has no "
                              "per-sample gradients; choose a method without them, such as magnitude or snip")
        for _, a, z in found:
            if a.shape[0] != samples or z.shape[0] != samples:
                raise OptionError(f"parameter '{name}': its layer reads {tuple(a.shape)} for a batch of {samples}; "
                                  "per-sample gradients need the batch as first axis everywhere")


def _or_zero(slope: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if slope is None else slope


def _factors(name: str, calls: list[tuple[nn.Linear | nn.Conv2d, Tensor, Tensor]]) -> Factors:
    parts = [(patches(layer, a), _positions(layer, g)) for layer, a, g in calls]
    factors = Factors(torch.cat([a for a, _ in parts], 3), torch.cat([g for _, g in parts], 3))
    if not bool(factors.g.isfinite().all()):
        bad = int((~factors.g.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"the gradients of '{name}' are NaN or infinite for {bad} of {len(factors.g)} samples; "
                        "check the data, the loss and the weights")
    return factors


def patches(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What a layer multiplies its weight with, shape (N, groups, K, L)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2).unsqueeze(1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = nn.functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.unflatten(1, (layer.groups, -1))


def _positions(layer: nn.Linear | nn.Conv2d, g: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1]).transpose(1, 2).unsqueeze(1)
    return g.flatten(2).unflatten(1, (layer.groups, -1))
