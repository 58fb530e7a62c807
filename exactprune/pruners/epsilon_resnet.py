"""epsilon-ResNet: a residual block whose response stays within epsilon becomes the identity, strictly.

X. Yu, Z. Yu, S. Ramalingam, "Learning strict identity mappings in deep residual networks", CVPR 2018, Eqs. 2-4. A block is
H(x) = x + S(F(x)) with S(F) = 0 if abs(F) <= epsilon for *every* element of the response over the whole batch, and
S(F) = F otherwise. The gate is written with four ReLUs so that it is sparsity-promoting in training: with
s = max(relu(F - epsilon) + relu(-F - epsilon)),

    gate = relu(-L relu(1 - L s) + 1),   L = 10^6,

is 0 where s is (up to about 1 / L) zero and 1 otherwise. Early blocks get a side path with its own classifier and
cross entropy, so that they see a gradient while later blocks are still off. A block that is the identity on all data is
removed for real.

Choices left open: epsilon belongs to each block; a side loss is the caller's to add (``EpsilonNet.side_loss``). As a
pruner, ``sparsity`` is the share of blocks that go, the blocks of least max abs(F) over the data first; with ``epsilon``
given, exactly the blocks whose gate is 0 on all data go, whatever the sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exactprune.errors import OptionError
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, require
from exactprune.pruners.selection import count, smallest

SLOPE = 1e6


def gate(response: Tensor, epsilon: float | Tensor) -> Tensor:
    """0 if abs(response) <= epsilon everywhere, else 1, as four ReLUs (a scalar)."""
    excess = (torch.relu(response - epsilon) + torch.relu(-response - epsilon)).max()
    return torch.relu(-SLOPE * torch.relu(1 - SLOPE * excess) + 1)


class EpsilonBlock(nn.Module):
    """x + gate(F(x)) F(x).

    Attributes:
        body: F.
        epsilon: the threshold.
    """

    def __init__(self, body: nn.Module, epsilon: float = 1.0) -> None:
        super().__init__()
        require(epsilon >= 0, "epsilon", epsilon, "a number >= 0")
        self.body = body
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Map x to x, or to x + F(x) where the response exceeds epsilon anywhere in the batch."""
        response = self.body(x)
        return x + gate(response, self.epsilon) * response


class SideOutput(nn.Module):
    """A classifier on an intermediate response: batch norm, ReLU, mean over positions, linear."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) from (N, channels, H, W)."""
        return self.linear(torch.relu(self.norm(x)).mean((2, 3)))


class EpsilonNet(nn.Module):
    """A chain of layers and blocks with a side path after one of them.

    Attributes:
        layers: the chain; ``EpsilonBlock`` among them.
        side: classifier on the response after ``after`` layers, or None.
        after: where the side path leaves.
    """

    def __init__(self, layers: nn.Sequential, side: nn.Module | None = None, after: int = 0) -> None:
        super().__init__()
        self.layers, self.side, self.after = layers, side, after

    def forward(self, x: Tensor) -> Tensor:
        """The main path's output."""
        return self.layers(x)

    def side_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of the side path, to be added to the loss with the caller's weight.

        Raises:
            OptionError: there is no side path.
        """
        if self.side is None:
            raise OptionError("this EpsilonNet has no side path; give one, for example SideOutput(channels, classes)")
        return nn.functional.cross_entropy(self.side(self.layers[:self.after](x)), y)


@dataclass(frozen=True)
class EpsilonOptions:
    """Options of ``epsilon-resnet``.

    Attributes:
        epsilon: remove exactly the blocks whose response never exceeds this; -1 to go by the sparsity, -2 to take
            every block's own epsilon.
    """

    epsilon: float = -1.0

    def __post_init__(self) -> None:
        require(self.epsilon >= 0 or self.epsilon in (-1, -2), "epsilon", self.epsilon,
                "a number >= 0, -1 (go by the sparsity) or -2 (each block's own)")


class EpsilonResNet(Pruner[EpsilonOptions]):
    """Removal of residual blocks that are the identity."""

    name: ClassVar[str] = "epsilon-resnet"
    prunes = "blocks"
    when: ClassVar[str] = "after training with gates"
    reference: ClassVar[str] = "Yu et al. 2018, Eqs. 2-4"
    data = "inputs"
    Options = EpsilonOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """max abs(F) of every block over all data, gates open: the least epsilon that would close it."""
        return largest_responses(problem)

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Blocks become ``nn.Identity``; the masks show all their weights as removed."""
        scores = self.score(problem)
        names = list(scores)
        flat = torch.stack([scores[name].reshape(()) for name in names])
        gone = {names[i] for i in self._gone(problem, flat, names, sparsity)}
        units = {name: torch.tensor([name not in gone]) for name in names}
        masks = {name: torch.full(shape, not any(name.startswith(f"{block}.") for block in gone), device=problem.device)
                 for name, shape in problem.shapes.items()}
        return Plan(masks, scores=scores, units=units, replaced={name: nn.Identity() for name in gone})

    def _gone(self, problem: Problem, flat: Tensor, names: list[str], sparsity: float) -> list[int]:
        number = count(sparsity, len(flat))
        if self.options.epsilon == -1:
            return smallest(flat, number).tolist()
        own = [problem.module.get_submodule(name).epsilon for name in names]
        limits = flat.new_tensor(own if self.options.epsilon == -2 else [self.options.epsilon] * len(names))
        closed = torch.stack([gate(value, limit) for value, limit in zip(flat, limits)]) == 0
        return closed.nonzero().flatten().tolist()


def largest_responses(problem: Problem) -> dict[str, Tensor]:
    """max abs(F(x)) of every block, block name -> scalar, with all gates open.

    Raises:
        OptionError: the module has no ``EpsilonBlock``.
    """
    blocks = {name: part for name, part in problem.model.named_modules() if isinstance(part, EpsilonBlock)}
    if not blocks:
        raise OptionError("epsilon-resnet removes residual blocks; build the network with "
                          "exactprune.pruners.epsilon_resnet.EpsilonBlock (layers outside of one are not touched)")
    found = {name: torch.zeros((), dtype=problem.dtype, device=problem.device) for name in blocks}

    def record(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = torch.maximum(found[name], output.detach().abs().max())

        return blocks[name].body.register_forward_hook(hook)

    handles = [record(name) for name in blocks]
    before = {name: block.epsilon for name, block in blocks.items()}
    try:
        for block in blocks.values():
            block.epsilon = 0.0
        with torch.no_grad():
            for x in problem.inputs.split(problem.batch):
                problem.model(x)
    finally:
        for handle in handles:
            handle.remove()
        for name, block in blocks.items():
            block.epsilon = before[name]
    problem.cost.samples = len(problem.inputs)
    return found

