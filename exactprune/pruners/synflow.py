"""SynFlow: synaptic saliency of the data-free objective R = 1^T prod_l abs(W_l) 1, pruned in many small steps.

H. Tanaka, D. Kunin, D. Yamins, S. Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
flow", NeurIPS 2020, Eq. 3 and Algorithm 1: score = w dR/dw on the network whose every parameter is replaced by its
absolute value, for one input of ones; step i of n keeps the fraction (1 - sparsity)^(i / n). The saliency is conserved
per layer, so in many steps no layer is emptied while another has weights to give (Theorem 3).

Choices left open: n = 100; biases and running statistics enter by their absolute value too and batch norm is in
evaluation mode, as in the authors' code; every step ranks all weights, those already removed score 0 and, having gone
first, stay removed. ``score`` is the saliency of one step. The input's shape is that of one sample of ``x``, or, for a
network that starts with a Linear layer, its number of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exactprune.errors import DataError
from exactprune.pruners.gradients import derivative
from exactprune.pruners.problem import Problem, layers_of, working_copy
from exactprune.pruners.protocol import Plan, Pruner, finite, require
from exactprune.pruners.selection import count, drop_lowest


@dataclass(frozen=True)
class SynFlowOptions:
    """Options of ``synflow``.

    Attributes:
        iterations: number of pruning steps.
    """

    iterations: int = 100

    def __post_init__(self) -> None:
        require(self.iterations >= 1, "iterations", self.iterations, "a whole number >= 1")


class SynFlow(Pruner[SynFlowOptions]):
    """Iterative synaptic flow pruning."""

    name: ClassVar[str] = "synflow"
    when: ClassVar[str] = "before training"
    reference: ClassVar[str] = "Tanaka et al. 2020, Alg. 1"
    data = "none"
    Options = SynFlowOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """Synaptic flow of one step."""
        return self._flow(problem, _positive(problem), problem.previous or {})

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """``iterations`` steps of an exponential schedule; the last one keeps exactly the number asked for."""
        target, steps = count(sparsity, problem.size), self.options.iterations
        model, masks = _positive(problem), dict(problem.previous or {})
        scores: dict[str, Tensor] = {}
        for step in range(1, steps + 1):
            scores = self._flow(problem, model, masks)
            share = 1 - (1 - sparsity) ** (step / steps)
            number = target if step == steps else min(target, int(share * problem.size))
            masks = drop_lowest(scores, number, {name: ~mask for name, mask in masks.items()})
        return Plan(masks, scores=scores)

    def _flow(self, problem: Problem, model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """w dR/dw, 0 where a mask removed w.

        Raises:
            DataError: the flow overflows float64.
        """
        layers = layers_of(model)
        weights = [layer.weight for layer in layers.values()]
        with torch.no_grad():
            for name, layer in layers.items():
                if name in masks:
                    layer.weight.mul_(masks[name])
        flow = model(torch.ones(1, *_input_shape(problem), dtype=problem.dtype, device=problem.device)).sum()
        slopes = derivative(flow, weights)
        problem.cost.gradients += 1
        scores = {name: (w * s).detach().abs() for name, w, s in zip(layers, weights, slopes)}
        return finite(scores, "the synaptic flow")


def _positive(problem: Problem) -> nn.Module:
    model = working_copy(problem.module, problem.dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    return model


def _input_shape(problem: Problem) -> tuple[int, ...]:
    if problem.x is not None:
        return tuple(problem.x.shape[1:])
    first = next(iter(problem.layers.values()))
    if isinstance(first, nn.Conv2d):
        raise DataError("synflow needs the input shape of a convolutional network; give x (one sample is enough)")
    return (first.in_features,)
