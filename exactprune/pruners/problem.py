"""What a pruner is given: a module, data, a loss, and the weights that may go.

Prunable are the weights of ``nn.Linear`` and ``nn.Conv2d`` (subclasses included), in the order of
``module.named_parameters()``; a weight shared by two layers counts once. Biases and normalisation parameters are never
pruned. The *global index* of a weight is its place in the concatenation of the flattened prunable parameters in that
order; it breaks every tie.

Scores are computed in float64, in evaluation mode (batch norm with its running statistics, no dropout), whatever the
module's own dtype and mode, on a copy: the caller's module is never touched. Losses are averaged over samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn

from exactprune.errors import DataError, OptionError, WeightError

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> one loss per sample, shape (N,)
Masks: TypeAlias = dict[str, Tensor]
Progress: TypeAlias = Callable[[int, int], None]  # (done, of how many)
PRUNABLE = (nn.Linear, nn.Conv2d)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits, one value per sample."""
    return nn.functional.cross_entropy(output, target, reduction="none").flatten(1).mean(1) if output.dim() > 2 else \
        nn.functional.cross_entropy(output, target, reduction="none")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, summed over outputs, one value per sample; its output Hessian is the identity."""
    return 0.5 * (output - target.reshape(output.shape)).square().flatten(1).sum(1)


LOSSES: Mapping[str, Loss] = {"cross-entropy": cross_entropy, "squared-error": squared_error}


@dataclass
class Cost:
    """What a method used up.

    Attributes:
        gradients: gradients, or Hessian-vector products (two each), one per sample.
        samples: distinct samples read.
        seconds: wall-clock seconds.
        peak_bytes: largest memory above the start: CUDA's own count, or the process's resident size.
    """

    gradients: int = 0
    samples: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Problem:
    """A module to prune, with everything a saliency may need.

    Attributes:
        module: the caller's module; read, never changed.
        x: inputs (N, ...), or None for methods without data.
        y: targets (N,) class numbers (cross entropy), or floats (squared error); or None.
        loss: one loss per sample; chosen by the dtype of ``y`` if None.
        batch: samples per pass, a limit on memory and nothing else.
        dtype: of the computation.
        cost: counted while the problem is worked on.
        previous: masks that already hold (gradual pruning): what they removed stays removed.
        progress: told (done, of how many) by methods that take long.

    Raises:
        DataError: ``x`` and ``y`` do not fit, or are empty.
        OptionError: nothing is prunable.
        WeightError: a weight is NaN or infinite.
    """

    module: nn.Module
    x: Tensor | None = None
    y: Tensor | None = None
    loss: Loss | None = None
    batch: int = 256
    dtype: torch.dtype = torch.float64
    cost: Cost = field(default_factory=Cost)
    previous: Masks | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise OptionError(f"{type(self.module).__name__}: has no nn.Linear or nn.Conv2d weight to prune")
        for name, weight in self.module.named_parameters():
            bad = weight.numel() - int(weight.isfinite().sum())
            if bad:
                raise WeightError(f"parameter '{name}': {bad} of {weight.numel()} values are NaN or infinite; "
                                  "repair or retrain the model")
        if self.x is not None:
            _check_data(self.x, self.y)

    @cached_property
    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Prunable parameter name -> the layer it belongs to, in the order of ``named_parameters``."""
        return layers_of(self.module)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the prunable parameters, in order."""
        return tuple(self.layers)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every prunable parameter."""
        return {name: layer.weight.shape for name, layer in self.layers.items()}

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    @cached_property
    def device(self) -> torch.device:
        """Where the module lives."""
        return next(self.module.parameters()).device

    @cached_property
    def model(self) -> nn.Module:
        """A float64 copy in evaluation mode, without gradients of its own."""
        return working_copy(self.module, self.dtype)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Prunable parameters of ``model``, detached."""
        return {name: layer.weight.detach() for name, layer in layers_of(self.model).items()}

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the module's device, floats in ``dtype``.

        Raises:
            DataError: there are none.
        """
        if self.x is None or self.y is None:
            raise DataError("this method needs data: give x of shape (N, ...) and y of shape (N,)")
        x, y = self.x.to(self.device), self.y.to(self.device)
        return (x.to(self.dtype) if x.is_floating_point() else x), (y.to(self.dtype) if y.is_floating_point() else y)

    @cached_property
    def inputs(self) -> Tensor:
        """Inputs alone, for methods that need no targets.

        Raises:
            DataError: there are none.
        """
        if self.x is None:
            raise DataError("this method needs data: give x of shape (N, ...)")
        return self.x.to(self.device, self.dtype) if self.x.is_floating_point() else self.x.to(self.device)

    def ticker(self, total: int) -> Callable[[int], None]:
        """A function that adds up what is done of ``total`` and tells ``progress``."""
        done = 0

        def tick(more: int = 1) -> None:
            nonlocal done
            done += more
            if self.progress is not None:
                self.progress(done, total)

        return tick

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """One loss per sample."""
        chosen = self.loss or (squared_error if target.is_floating_point() else cross_entropy)
        return chosen(output, target)


def owners_of(module: nn.Module) -> dict[str, list[nn.Linear | nn.Conv2d]]:
    """Prunable parameter name -> every layer that uses it, each parameter once, in the order of ``named_parameters``."""
    found: dict[int, list[nn.Linear | nn.Conv2d]] = {}
    for layer in module.modules():
        if isinstance(layer, PRUNABLE):
            found.setdefault(id(layer.weight), []).append(layer)
    return {name: found[id(p)] for name, p in module.named_parameters() if id(p) in found}


def layers_of(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Prunable parameter name -> the first layer that uses it."""
    return {name: owners[0] for name, owners in owners_of(module).items()}


def used_once(module: nn.Module) -> bool:
    """Whether no module stands in two places and no two modules share a parameter."""
    places = [part for _, part in module.named_modules(remove_duplicate=False)]
    owned = [p for part in places for p in part.parameters(recurse=False)]
    return len(owned) == len({id(p) for p in owned})


def working_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy in ``dtype`` and evaluation mode whose parameters take gradients."""
    copied = copy.deepcopy(module).to(dtype).eval()
    return copied.requires_grad_(True)


def _check_data(x: Tensor, y: Tensor | None) -> None:
    if x.dim() < 1 or len(x) == 0:
        raise DataError(f"x has shape {tuple(x.shape)}: give at least one sample, (N, ...) with N >= 1")
    if y is not None and len(y) != len(x):
        raise DataError(f"x has {len(x)} samples and y has {len(y)}: give one target per sample")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise DataError(f"x holds NaN or infinity in {int((~x.isfinite()).sum())} places; repair the data")
