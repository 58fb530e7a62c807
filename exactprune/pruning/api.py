"""``prune``: run a method on a model and account for it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exactprune.errors import DataError, OptionError, UnsupportedOpError
from exactprune.io import load, to_torch
from exactprune.io.torch_export import to_sequential
from exactprune.network import Network
from exactprune.pruners import Loss, Plan, Problem, Pruner, apply, decide, make
from exactprune.pruners.problem import Progress
from exactprune.pruning.facts import PruneReport, densities, layer_positions, measured
from exactprune.pruning.shrink import shrink
from exactprune.training import DataSet, TrainOptions, load_data, train

Data = str | Path | DataSet | tuple[Tensor, Tensor] | Tensor | Iterable[Any] | None


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned model.

    Attributes:
        module: the pruned module, in evaluation mode; masked, or physically smaller with ``structured``.
        masks: parameter name of the *given* module -> True where the weight stays.
        plan: the method's answer: masks, values, scores, units.
        report: the account.
        network: the same as an exactprune Network, where a Network was given or ``structured`` asked for.
    """

    module: nn.Module
    masks: dict[str, Tensor]
    plan: Plan
    report: PruneReport
    network: Network | None = None

    def __repr__(self) -> str:
        return str(self.report)


def prune(model: Network | nn.Module, method: str | Pruner[Any] = "magnitude", sparsity: float = 0.9, data: Data = None,
          *, loss: Loss | None = None, finetune: TrainOptions | None = None, structured: bool = False,
          progress: Progress | None = None, **options: Any) -> PruneResult:
    """Prune a copy of a model.

    Args:
        model: a ``torch.nn.Module`` with Linear or Conv2d layers, or a Network from ``exactprune.load``.
        method: a name (see ``exactprune.pruners.names()``) or a pruner.
        sparsity: fraction of the weights (or neurons, or blocks) that goes, 0 to 1, kept exactly.
        data: ``(x, y)``, x alone, a loader of (x, y) batches, a ``DataSet``, or a name or file for ``load_data``.
        loss: maps (outputs, targets) to one loss per sample; by default cross entropy or half the squared error.
        finetune: train afterwards with the masks kept.
        structured: make the result physically smaller where whole neurons or channels died.
        progress: told (done, of how many) by methods that take long, and by fine-tuning.
        options: the method's options.

    Raises:
        OptionError: the method, an option or the sparsity is wrong.
        DataError: data are missing or empty, or give gradients that are not finite.
    """
    module = as_module(model) if isinstance(model, Network) else model
    if options and not isinstance(method, str):
        raise OptionError(f"option {next(iter(options))!r}: {method.name} has its options already; give them to its class")
    pruner = make(method, **options) if isinstance(method, str) else method
    x, y = samples(data, module, model.input_shape if isinstance(model, Network) else None)
    problem = Problem(module, x, y, loss, progress=progress)
    with measured(problem.cost, problem.device):
        plan = decide(pruner, problem, sparsity)
    pruned = plan.smaller if plan.smaller is not None and structured else apply(module, plan).eval()
    pruned = _finetuned(pruned, plan, problem, finetune) if finetune else pruned
    shape = _shape(model, x)
    network = None
    if structured and plan.smaller is None:
        network = shrink(load(pruned, input_shape=shape))
        pruned = as_module(network)
    elif isinstance(model, Network) or structured:
        network = load(pruned, input_shape=shape)
    return PruneResult(pruned, plan.masks, plan, account(pruner, problem, plan, sparsity, pruned, shape), network)


def as_module(network: Network) -> nn.Module:
    """An ``nn.Sequential`` where the network is a chain, any module otherwise."""
    try:
        return to_sequential(network)
    except UnsupportedOpError:
        return to_torch(network)


def _finetuned(module: nn.Module, plan: Plan, problem: Problem, options: TrainOptions) -> nn.Module:
    x, y = problem.data
    own = next(problem.module.parameters()).dtype
    names = dict(module.named_parameters())
    masks = {name: mask for name, mask in plan.masks.items() if name in names and plan.smaller is not module}
    return train(module, x.to(own) if x.is_floating_point() else x, y.to(own) if y.is_floating_point() else y, options,
                 masks=masks, progress=problem.progress, loss=problem.loss).module


def _shape(model: Network | nn.Module, x: Tensor | None) -> tuple[int, ...] | None:
    if isinstance(model, Network):
        return model.input_shape
    return None if x is None else tuple(x.shape[1:])


def samples(data: Data, module: nn.Module, shape: tuple[int, ...] | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Inputs and targets as two tensors on the module's device.

    Raises:
        DataError: ``data`` is of another kind, or empty.
    """
    if data is None:
        return None, None
    if isinstance(data, str | Path):
        data = load_data(data)
    if isinstance(data, DataSet):
        data = data.shaped(shape) if shape else data
        pair: tuple[Tensor, Tensor | None] = (data.x, data.y)
    elif isinstance(data, Tensor):
        pair = (data, None)
    elif isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        pair = data
    elif isinstance(data, Iterable):
        pair = _collected(data)
    else:
        raise DataError(f"data is a {type(data).__name__}; give (x, y), a loader of (x, y) batches, a DataSet or a name")
    device = next(module.parameters()).device
    return pair[0].to(device), None if pair[1] is None else pair[1].to(device)


def _collected(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    if not batches:
        raise DataError("the data loader gave no batch; give at least one sample")
    if not all(isinstance(b, tuple | list) and len(b) == 2 for b in batches):
        raise DataError("the data loader must give pairs (x, y) of tensors")
    return torch.cat([torch.as_tensor(b[0]) for b in batches]), torch.cat([torch.as_tensor(b[1]) for b in batches])


def account(pruner: Pruner[Any], problem: Problem, plan: Plan, sparsity: float, pruned: nn.Module,
            shape: tuple[int, ...] | None) -> PruneReport:
    """The report of one pruning."""
    dtype = next(problem.module.parameters()).dtype
    sample = problem.inputs[:1].to(dtype) if problem.x is not None else \
        None if shape is None else torch.zeros(1, *shape, dtype=dtype, device=problem.device)
    module = copy.deepcopy(problem.module)
    layers = densities(module, plan.masks, sample)
    dense = None if sample is None else layer_positions(module, sample)
    removed = sum(layer.total - layer.kept for layer in layers)
    stored = sum(p.numel() for p in pruned.parameters())
    kept = sum(p.numel() for p in problem.module.parameters()) - removed
    units = None if plan.units is None else list(plan.units.values())
    asked = asdict(pruner.options) if is_dataclass(pruner.options) and not isinstance(pruner.options, type) else {}
    return PruneReport(
        pruner.name, {k: v for k, v in asked.items() if not isinstance(v, Tensor)}, pruner.prunes, float(sparsity),
        removed / problem.size, removed, problem.size,
        None if units is None else sum(int((~u).sum()) for u in units), None if units is None else sum(u.numel() for u in units),
        layers, kept, stored,
        None if dense is None else sum(layer.macs or 0 for layer in layers),
        None if dense is None else sum(n * problem.shapes[name].numel() for name, n in dense.items()),
        problem.cost.gradients, problem.cost.samples, problem.cost.seconds, problem.cost.peak_bytes,
        plan.notes + tuple(f"layer {layer.name} collapsed: its output no longer depends on its input"
                           for layer in layers if layer.collapsed))

