"""Training that can be repeated: the same options and seed give the same weights, interrupted or not.

One step is w <- w - lr * (momentum-averaged gradient of the mean loss + l1 * sign(w)), or Adam's (D. Kingma, J. Ba, ICLR
2015). Where a mask removed a weight, its gradient is set to zero before the step, the weight and the optimizer's averages
after it: momentum never revives a mask. The order of samples comes from a generator of its own, seeded by (seed, epoch), so a
run that is resumed at an epoch sees the same batches.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exactprune.errors import DataError, OptionError

AfterStep = Callable[[int, nn.Module, torch.optim.Optimizer], None]
SampleLoss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> one loss per sample


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        epochs: passes over the data.
        batch: samples per step.
        optimizer: sgd or adam.
        lr: learning rate at the start.
        momentum: of sgd.
        weight_decay: times w, added to the gradient.
        l1: weight of the L1 term over the weights of Linear and Conv2d layers (not biases).
        schedule: constant, cosine (to 0 over all steps) or step (a tenth at half and at three quarters).
        seed: of the order of samples and of dropout.
        deterministic: use deterministic kernels only.
    """

    epochs: int = 10
    batch: int = 64
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 0.0
    l1: float = 0.0
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    seed: int = 0
    deterministic: bool = True

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "epochs", self.epochs, "a whole number >= 0")
        _require(self.batch >= 1, "batch", self.batch, "a whole number >= 1")
        _require(self.optimizer in ("sgd", "adam"), "optimizer", self.optimizer, "sgd or adam")
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "a number > 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "a number from 0 to below 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        _require(self.l1 >= 0, "l1", self.l1, "a number >= 0")
        _require(self.schedule in ("constant", "cosine", "step"), "schedule", self.schedule, "constant, cosine or step")


@dataclass(frozen=True, eq=False)
class Trained:
    """What training gave.

    Attributes:
        module: a trained copy, in evaluation mode.
        losses: mean training loss of every epoch.
        snapshots: step -> state_dict after that many steps, for rewinding.
        steps: number of steps done.
        seconds: wall-clock seconds.
    """

    module: nn.Module
    losses: tuple[float, ...]
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0


def train(module: nn.Module, x: Tensor, y: Tensor, options: TrainOptions | None = None, *,
          masks: Mapping[str, Tensor] | None = None, snapshots: Sequence[int] = (), after_step: AfterStep | None = None,
          checkpoint: Path | None = None, resume: bool = False,
          progress: Callable[[int, int], None] | None = None, loss: SampleLoss | None = None,
          start: int = 0) -> Trained:
    """Train a copy of ``module`` by cross entropy (integer targets) or half the squared error (float targets).

    Args:
        module: where to start; not changed.
        x: inputs (N, ...).
        y: targets (N,).
        options: see ``TrainOptions``.
        masks: parameter name -> True where the weight may be other than zero. ``after_step`` may change them.
        snapshots: numbers of steps after which to keep the state (0 is the start).
        after_step: called after every step with (steps done, module, optimizer).
        checkpoint: file written after every epoch.
        resume: start from ``checkpoint`` where it exists.
        progress: called with (steps done, steps in all).
        loss: maps (outputs, targets) to one loss per sample, if neither fits.
        start: step to begin at, with its batches and its learning rate: ``module`` is the state after so many steps.

    Raises:
        DataError: there are no samples, or the loss is NaN or infinite.
        OptionError: a mask does not fit, or the checkpoint is of another run.
    """
    options = options or TrainOptions()
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"training data: x has {len(x)} samples and y has {len(y)}; give one target for each, at least one")
    run = _Run(copy.deepcopy(module).train(), x, y, options, masks or {}, checkpoint, loss or sample_losses)
    steps = options.epochs * run.steps
    if not 0 <= start <= steps:
        raise OptionError(f"training from step {start}: there are {steps} ({options.epochs} epochs of {run.steps}); give a "
                          "smaller step or more epochs")
    begin = time.perf_counter()
    done, losses, state = run.restore() if resume else (0, [], None)
    kept = {0: _state(run.module)} if 0 in snapshots else {}
    with _repeatable(options, x.device, state):
        for epoch in range(max(done, start // run.steps), options.epochs):
            losses.append(run.epoch(epoch, start, snapshots, kept, after_step, progress))
            run.store(epoch + 1, losses)
    return Trained(run.module.eval(), tuple(losses), kept, steps, time.perf_counter() - begin)


class _Run:
    """One training run: module, optimizer, schedule and masks together."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, options: TrainOptions, masks: Mapping[str, Tensor],
                 checkpoint: Path | None, loss: SampleLoss) -> None:
        self.module, self.x, self.y, self.options, self.checkpoint, self.loss = module, x, y, options, checkpoint, loss
        self.masks = masks
        self.steps = -(-len(x) // options.batch)
        self.optimizer = _optimizer(module, options)
        self.parameters = dict(module.named_parameters())
        self.penalised = [m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)] if options.l1 else []
        _check_masks(masks, self.parameters)
        self._hold()

    def epoch(self, epoch: int, start: int, snapshots: Sequence[int], kept: dict[int, dict[str, Tensor]],
              after_step: AfterStep | None, progress: Callable[[int, int], None] | None) -> float:
        """One pass, but for the steps before ``start``; the mean loss."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(_mixed(self.options.seed, epoch)))
        total, seen = 0.0, 0
        for step, batch in enumerate(order.split(self.options.batch), epoch * self.steps):
            if step < start:
                continue
            total, seen = total + self._step(step, self.x[batch], self.y[batch]) * len(batch), seen + len(batch)
            if after_step is not None:
                after_step(step + 1, self.module, self.optimizer)
            if step + 1 in snapshots:
                kept[step + 1] = _state(self.module)
            if progress is not None:
                progress(step + 1, self.options.epochs * self.steps)
        return total / seen

    def _step(self, step: int, x: Tensor, y: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * _factor(self.options.schedule, step / (self.options.epochs * self.steps))
        self.optimizer.zero_grad()
        loss = self.loss(self.module(x), y).mean()
        if not bool(loss.isfinite()):
            raise DataError(f"the training loss is {loss.item()} at step {step}; lower lr, or check the data")
        (loss + self.options.l1 * sum((w.abs().sum() for w in self.penalised), loss.new_zeros(()))).backward()
        self._hold_gradients()
        self.optimizer.step()
        self._hold()
        return loss.item()

    def _hold_gradients(self) -> None:
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    @torch.no_grad()
    def _hold(self) -> None:
        """Zero where masks say so: the weights, and what the optimizer remembers of them."""
        for name, mask in self.masks.items():
            weight = self.parameters[name]
            weight.mul_(mask)
            for memory in self.optimizer.state.get(weight, {}).values():
                if isinstance(memory, Tensor) and memory.shape == weight.shape:
                    memory.mul_(mask)

    def store(self, epoch: int, losses: list[float]) -> None:
        """Write the checkpoint, in one piece."""
        if self.checkpoint is None:
            return
        scratch = self.checkpoint.with_name(self.checkpoint.name + ".part")
        torch.save({"epoch": epoch, "losses": losses, "options": asdict(self.options), "samples": len(self.x),
                    "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "random": torch.get_rng_state()}, scratch)
        os.replace(scratch, self.checkpoint)  # noqa: PTH105

    def restore(self) -> tuple[int, list[float], Tensor | None]:
        """Epochs done, their losses and the state of dropout, from the checkpoint if it is there.

        Raises:
            OptionError: it is of another run.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0, [], None
        kept: dict[str, Any] = torch.load(self.checkpoint, weights_only=True, map_location=self.x.device)
        if kept["options"] != asdict(self.options) or kept["samples"] != len(self.x):
            raise OptionError(f"{self.checkpoint}: is of another run (other options or data); delete it or do not resume")
        self.module.load_state_dict(kept["module"])
        self.optimizer.load_state_dict(kept["optimizer"])
        return kept["epoch"], list(kept["losses"]), kept["random"].cpu()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adam":
        return torch.optim.Adam(module.parameters(), options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(module.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay)


def _factor(schedule: str, share: float) -> float:
    """Learning rate at ``share`` of the way, as a multiple of the first."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "step":
        return 0.1 ** ((share >= 0.5) + (share >= 0.75))
    return 1.0


def _mixed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


@contextmanager
def _repeatable(options: TrainOptions, device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Seeds dropout, asks for deterministic kernels, and puts everything back afterwards.

    cuBLAS refuses to be deterministic without a fixed workspace, which only the environment can ask for.
    """
    if options.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        if state is not None:
            torch.set_rng_state(state)
        torch.use_deterministic_algorithms(options.deterministic or before, warn_only=warn)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)


def _check_masks(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise OptionError(f"mask '{name}' of shape {tuple(mask.shape)}: the module has no such parameter; "
                              f"it has {', '.join(parameters)}")


def sample_losses(output: Tensor, target: Tensor) -> Tensor:
    """One loss per sample: half the squared error for float targets, else cross entropy."""
    if target.is_floating_point():
        return 0.5 * (output - target.reshape(output.shape)).square().flatten(1).sum(1)
    return nn.functional.cross_entropy(output, target, reduction="none")


@torch.no_grad()
def mean_loss(module: nn.Module, x: Tensor, y: Tensor, batch: int = 2000) -> float:
    """Mean loss in evaluation mode."""
    return _mean(module, x, y, batch, sample_losses)


@torch.no_grad()
def accuracy(module: nn.Module, x: Tensor, y: Tensor, batch: int = 2000) -> float:
    """Share of samples whose largest output is their class, in evaluation mode."""
    return _mean(module, x, y, batch, lambda output, target: (output.argmax(1) == target).float())


def _mean(module: nn.Module, x: Tensor, y: Tensor, batch: int, value: Callable[[Tensor, Tensor], Tensor]) -> float:
    if len(x) == 0:
        raise DataError("there are no samples to measure on; give test data")
    was = module.training
    module.eval()
    try:
        parts = [value(module(a), b).double().sum() for a, b in zip(x.split(batch), y.split(batch))]
    finally:
        module.train(was)
    return float(torch.stack(parts).sum() / len(x))


def _require(holds: bool, name: str, value: object, words: str) -> None:
    if not holds:
        raise OptionError(f"training option {name} is {value!r}; give {words}")
