"""What a pruned module is: how much is gone, where, what is left to compute, and what deciding it cost."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from exactprune.pruners.problem import Cost, owners_of

_INTERVAL = 0.005


@dataclass(frozen=True)
class LayerDensity:
    """How much of a layer is left.

    Attributes:
        name: the weight.
        kept: weights that stay.
        total: weights there were.
        macs: multiply-accumulates with a weight that stays, for one input; None where no input shape is known.
    """

    name: str
    kept: int
    total: int
    macs: int | None

    @property
    def density(self) -> float:
        """Share of the weights that stays."""
        return self.kept / self.total

    @property
    def collapsed(self) -> bool:
        """Whether nothing is left, so that the layer's output no longer depends on its input."""
        return self.kept == 0


@dataclass(frozen=True)
class PruneReport:
    """The account of one pruning. A mask makes nothing smaller: ``parameters_stored`` says what is still stored.

    Attributes:
        method, options: what was asked for.
        prunes: what the sparsity counts: weights, neurons or blocks.
        sparsity_asked: as given.
        sparsity: share of the prunable weights that is gone.
        removed, prunable: numbers of weights.
        units_removed, units: numbers of neurons or blocks, where the method removes those.
        layers: one entry a prunable parameter.
        parameters, parameters_stored: numbers that are not zeroed by a mask, and that the module stores.
        macs, macs_dense: multiply-accumulates with kept weights, and with all, for one input; None where unknown.
        gradients, samples, seconds, peak_bytes: cost of deciding.
        notes: sentences for people.
    """

    method: str
    options: dict[str, Any]
    prunes: str
    sparsity_asked: float
    sparsity: float
    removed: int
    prunable: int
    units_removed: int | None
    units: int | None
    layers: tuple[LayerDensity, ...]
    parameters: int
    parameters_stored: int
    macs: int | None
    macs_dense: int | None
    gradients: int
    samples: int
    seconds: float
    peak_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of weights of which nothing is left."""
        return tuple(layer.name for layer in self.layers if layer.collapsed)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with densities."""
        layers = [asdict(layer) | {"density": layer.density, "collapsed": layer.collapsed} for layer in self.layers]
        return asdict(self) | {"layers": layers, "collapsed": list(self.collapsed)}

    def __str__(self) -> str:
        head = (f"{self.method}: {self.removed:,} of {self.prunable:,} weights removed (sparsity {self.sparsity:.6g}), "
                f"{self.seconds:.2f} s, {self.gradients:,} gradients, {self.samples:,} samples, "
                f"{self.peak_bytes / 2**20:,.0f} MiB")
        rows = [f"  {row.name}: {row.kept:,} of {row.total:,} kept ({row.density:.4f})"
                + (", COLLAPSED: its output is constant" if row.collapsed else "") for row in self.layers]
        return "\n".join([head, *rows, *(f"  {note}" for note in self.notes)])


def densities(module: nn.Module, masks: Mapping[str, Tensor], sample: Tensor | None) -> tuple[LayerDensity, ...]:
    """One entry per prunable parameter of ``module``."""
    positions = {} if sample is None else layer_positions(module, sample)
    found = []
    for name, mask in masks.items():
        kept, where = int(mask.sum()), positions.get(name)
        found.append(LayerDensity(name, kept, mask.numel(), None if where is None else kept * where))
    return tuple(found)


def layer_positions(module: nn.Module, sample: Tensor) -> dict[str, int]:
    """How often each weight is multiplied for one input (1 for Linear on vectors), parameter name -> positions."""
    owners = owners_of(module)
    found = dict.fromkeys(owners, 0)

    def hook(name: str) -> Any:
        def record(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] += output[0].numel() // layer.weight.shape[0]

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layers in owners.items() for layer in layers]
    was = module.training
    try:
        with torch.no_grad():
            module.eval()(sample)
    finally:
        module.train(was)
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def measured(cost: Cost, device: torch.device) -> Iterator[None]:
    """Write seconds and peak memory of the block into ``cost``.

    On CUDA the allocator's own peak; on a CPU the resident size, sampled every few milliseconds, above its value at the
    start, so short peaks may be missed.
    """
    began = perf_counter()
    with _cuda_peak(cost, device) if device.type == "cuda" else _resident_peak(cost):
        yield
    cost.seconds = perf_counter() - began


@contextmanager
def _cuda_peak(cost: Cost, device: torch.device) -> Iterator[None]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    torch.cuda.synchronize(device)
    cost.peak_bytes = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _resident_peak(cost: Cost) -> Iterator[None]:
    start, stop = _resident(), threading.Event()
    peak = [start]

    def watch() -> None:
        while not stop.wait(_INTERVAL):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        cost.peak_bytes = max(peak[0], _resident()) - start


def _resident() -> int:
    """Resident bytes of this process, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
