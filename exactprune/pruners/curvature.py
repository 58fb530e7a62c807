"""Second derivatives of the mean loss: diagonals and dense matrices over the prunable weights.

- ``hessian``: the exact Hessian.
- ``gauss-newton``: mean over samples of J^T S J with J the outputs' Jacobian and S the Hessian of the loss with respect to
  the outputs (for cross entropy diag(p) - p p^T). It equals the true Fisher matrix of a softmax or Gaussian output.
  Written as a sum over the columns s_c of a square root of S: one backward pass per output.
- ``fisher``: the empirical Fisher matrix, the mean over samples of g g^T.

In a network made of layers that are linear in their weights, each used once, and activations that are piecewise linear, each
output is piecewise linear in any single weight, so the diagonals of the Hessian and of the Gauss-Newton matrix are the same
almost everywhere. For other networks, Linear layers applied once per sample have d2L/dw_ok^2 = sum_n a_k^2 d2L/dz_o^2: one
Hessian-vector product per output neuron; elsewhere (convolutions under a smooth activation) one per weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from exactprune.errors import OptionError
from exactprune.io.torch_export import NetworkModule
from exactprune.pruners.gradients import batches, derivative, parameters
from exactprune.pruners.problem import Problem, owners_of, used_once
from exactprune.pruners.protocol import finite
from exactprune.pruners.selection import flatten
from exactprune.pruners.taps import Factors, Objective, all_factors, sample_factors

Curvature = Literal["hessian", "gauss-newton", "fisher"]
CURVATURES = ("hessian", "gauss-newton", "fisher")
PIECEWISE_LINEAR = {
    nn.Sequential, nn.Linear, nn.Conv2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Identity, nn.Dropout,
    nn.Flatten, nn.Unflatten, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ModuleList,
}
MAX_PRODUCTS = 20_000


def diagonal(problem: Problem, kind: Curvature) -> dict[str, Tensor]:
    """Diagonal of a curvature matrix.

    Raises:
        OptionError: an exact Hessian diagonal would take more than ``MAX_PRODUCTS`` products.
        DataError: an entry is NaN or infinite.
    """
    if kind == "hessian" and not is_piecewise_linear(problem.model):
        return finite(_hessian_diagonal(problem), "the Hessian's diagonal")
    objective = None if kind == "fisher" else output_roots(problem)
    total = {name: torch.zeros(shape.numel(), dtype=problem.dtype, device=problem.device)
             for name, shape in problem.shapes.items()}
    for results in sample_factors(problem, objective):
        for factors in results:
            for name, factor in factors.items():
                total[name] += factor.squares()
    samples = len(problem.data[0])
    return finite({name: (t / samples).view(problem.shapes[name]) for name, t in total.items()}, "the curvature")


def dense(problem: Problem, kind: Curvature) -> Tensor:
    """The whole matrix over the prunable weights, shape (n, n).

    Raises:
        DataError: an entry is NaN or infinite.
    """
    if kind == "hessian":
        return finite({"the weights": _dense_hessian(problem)}, "the Hessian")["the weights"]
    parts = all_factors(problem, None if kind == "fisher" else output_roots(problem))
    total = sum((_outer(factors) for factors in parts), torch.zeros((), dtype=problem.dtype, device=problem.device))
    return finite({"the weights": total / len(problem.data[0])}, "the curvature")["the weights"]


def neuron_blocks(problem: Problem, kind: Curvature) -> Iterator[Tensor]:
    """The diagonal blocks that belong to one output neuron (channel) each, (K, K), in global index order.

    Where a layer is applied once per sample, the gradients are g_no a_n, and the block is the weighted sum of a_n a_n^T.
    """
    parts, samples = all_factors(problem, None if kind == "fisher" else output_roots(problem)), len(problem.data[0])
    for name, shape in problem.shapes.items():
        layer = [factors[name] for factors in parts]
        if layer[0].outer_products:
            a = layer[0].a.flatten(1)
            share = torch.stack([f.g.flatten(1).square() for f in layer]).sum(0) / samples
            yield from (a.T @ (a * column[:, None]) for column in share.T)
        else:
            for o in range(shape[0]):
                rows = torch.cat([f.rows(o, o + 1) for f in layer])
                yield rows.T @ rows / samples


def _outer(factors: dict[str, Factors]) -> Tensor:
    rows = torch.cat([f.columns(0, f.size) for f in factors.values()], 1)
    return rows.T @ rows


def output_roots(problem: Problem) -> Objective:
    """Objectives whose gradients' outer products sum to the Gauss-Newton matrix: output . s_c for every c."""

    def objective(output: Tensor, target: Tensor) -> list[Tensor]:
        root = _root(_output_hessian(problem, output.detach(), target))
        return [(output.flatten(1) * root[:, :, c]).sum() for c in range(root.shape[2])]

    return objective


def _output_hessian(problem: Problem, output: Tensor, target: Tensor) -> Tensor:
    """Hessian of every sample's loss with respect to its outputs, shape (N, C, C).

    Raises:
        DataError: the loss's derivative is NaN or infinite.
    """
    free = output.clone().requires_grad_()
    slope, = torch.autograd.grad(problem.losses(free, target).sum(), free, create_graph=True)
    finite({"the outputs": slope.detach()}, "the loss's derivative")
    columns = [derivative(s, [free], retain_graph=True)[0].flatten(1) for s in slope.flatten(1).sum(0)]
    return torch.stack(columns, 2)


def _root(matrix: Tensor) -> Tensor:
    """s with s s^T = matrix for a batch of positive semidefinite matrices, columns of zeros dropped (but one)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    used = (root != 0).any(0).any(0)
    used[-1] = True  # a loss that is flat in its outputs has curvature zero, not none
    return root[:, :, used]


def is_piecewise_linear(module: nn.Module) -> bool:
    """Whether all parts are, by exact type, layers whose composition is piecewise linear in each single weight.

    That asks that no weight is used twice: no layer stands in two places, and no two layers share a parameter.
    """
    return used_once(module) and all(type(part) in PIECEWISE_LINEAR or _of_a_network(part) for part in module.modules())


def _of_a_network(part: nn.Module) -> bool:
    """Whether ``part`` was built from a Network: its operations are all of this kind."""
    return type(part).__module__ == NetworkModule.__module__


# -- exact Hessians ----------------------------------------------------------------------------------------------------


def _hessian_diagonal(problem: Problem) -> dict[str, Tensor]:
    total = {name: torch.zeros(shape, dtype=problem.dtype, device=problem.device)
             for name, shape in problem.shapes.items()}
    once = [name for name, layer in problem.layers.items() if isinstance(layer, nn.Linear)]
    for x, y in batches(problem):
        once = [name for name in once if _single_call(problem, name, x)]
        for name in once:
            total[name] += _linear_diagonal(problem, name, x, y)
    samples = len(problem.data[0])
    slow = [name for name in problem.names if name not in once]
    _check_products(sum(problem.shapes[name].numel() for name in slow))
    if slow:
        rows = {name: torch.cat(list(_hessian_rows(problem, name, diagonal=True))) for name in slow}
        total |= {name: row.view(problem.shapes[name]) * samples for name, row in rows.items()}
    return {name: t / samples for name, t in total.items()}


def _check_products(products: int) -> None:
    if products > MAX_PRODUCTS:
        raise OptionError(f"the exact diagonal of this network's Hessian takes {products:,} Hessian-vector products; "
                          "choose curvature gauss-newton or fisher")


def _calls(problem: Problem, name: str, x: Tensor, enable: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Output and the (input, pre-activation) pairs of every use of a weight in a forward pass."""
    found: list[tuple[Tensor, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found.append((inputs[0].detach(), output))
        return output.clone()

    handles = [layer.register_forward_hook(record) for layer in owners_of(problem.model)[name]]
    try:
        with torch.set_grad_enabled(enable):
            return problem.model(x), found
    finally:
        for handle in handles:
            handle.remove()


def _single_call(problem: Problem, name: str, x: Tensor) -> bool:
    _, found = _calls(problem, name, x[:1], enable=False)
    return len(found) == 1 and found[0][1].dim() == 2


def _linear_diagonal(problem: Problem, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Sum over samples of a_k^2 d2L/dz_o^2; one product per output, for all samples of the batch together."""
    output, ((a, z),) = _calls(problem, name, x, enable=True)
    slope, = torch.autograd.grad(problem.losses(output, y).sum(), z, create_graph=True)
    curvature = [derivative(slope[:, o].sum(), [z], retain_graph=True)[0][:, o] for o in range(z.shape[1])]
    problem.cost.gradients += 2 * len(x) * z.shape[1]
    return torch.stack(curvature, 1).T @ a.square()


def _hessian_rows(problem: Problem, name: str, diagonal: bool = False) -> Iterator[Tensor]:
    """Rows of the mean Hessian that belong to one parameter; only the diagonal entries if asked for."""
    weights = parameters(problem)
    place = problem.names.index(name)
    size = weights[place].numel()
    rows = torch.zeros(size, 1 if diagonal else problem.size, dtype=problem.dtype, device=problem.device)
    for x, y in batches(problem):
        slopes = derivative(problem.losses(problem.model(x), y).sum(), weights, create_graph=True)
        problem.cost.gradients += 2 * len(x) * size
        for i, slope in enumerate(slopes[place].flatten()):
            product = derivative(slope, weights, retain_graph=True)
            rows[i] += product[place].flatten()[i] if diagonal else flatten(product)
    yield rows / len(problem.data[0])


def _dense_hessian(problem: Problem) -> Tensor:
    rows = torch.cat([row for name in problem.names for row in _hessian_rows(problem, name)])
    return (rows + rows.T) / 2
