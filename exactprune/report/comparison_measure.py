"""What is counted and measured of a network: sizes, layers, bytes on disk, times of a call dense and sparse.

A weight is an entry of an array of two or more axes. Multiply-accumulates are counted twice: all that a dense kernel does,
and those with a non-zero weight. Times are medians; the networks that are compared take turns, so that all see the same
machine. The sparse version keeps every matrix of a linear layer in compressed rows (torch's CSR kernels); convolutions
stay dense, as torch has no sparse ones.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exactprune.errors import ExactPruneError
from exactprune.io import save, to_torch
from exactprune.network import Network
from exactprune.ops import Affine, Conv2d

BATCHES = (1, 64, 1024)
_LEAST, _MOST = 7, 51


# -- sizes ---------------------------------------------------------------------------------------------------------------


def arrays_of(network: Network) -> list[np.ndarray]:
    """Every stored array."""
    return [a for node in network.nodes for a in vars(node.op).values() if isinstance(a, np.ndarray)]


def weights_of(network: Network) -> tuple[int, int]:
    """Weights, and how many are not 0."""
    arrays = [a for a in arrays_of(network) if a.ndim >= 2]
    return sum(a.size for a in arrays), sum(int(np.count_nonzero(a)) for a in arrays)


def layers_of(network: Network) -> list[dict[str, Any]]:
    """Every linear layer and convolution: its node, weights, and how many are not 0."""
    return [{"name": node.name, "kept": int(np.count_nonzero(node.op.weight)), "total": int(node.op.weight.size)}
            for node in network.nodes if isinstance(node.op, Affine | Conv2d)]


def nonzero_macs(network: Network) -> int:
    """Multiply-accumulates with a weight that is not 0, for one input."""
    return sum(_nonzero_macs(node.op, [network.shape_of(i) for i in node.inputs]) for node in network.nodes)


def _nonzero_macs(op: Any, shapes: list[tuple[int, ...]]) -> int:
    if isinstance(op, Affine):
        return int(np.count_nonzero(op.weight))
    if isinstance(op, Conv2d):
        return int(np.count_nonzero(op.weight)) * prod(op.output_shape(*shapes)[1:])
    return op.macs(*shapes)


def sizes(network: Network, original: Network) -> dict[str, Any]:
    """Everything that is counted; ratios are those to ``original``."""
    total, kept = weights_of(network)
    nonzero = sum(int(np.count_nonzero(a)) for a in arrays_of(network))
    return {"weights_kept": kept, "weights": weights_of(original)[0], "parameters_stored": network.parameters,
            "parameters_nonzero": nonzero, "ratio_stored": original.parameters / max(network.parameters, 1),
            "ratio_nonzero": original.parameters / max(nonzero, 1), "neurons": network.neurons, "macs": nonzero_macs(network),
            "macs_dense": network.macs, "weights_stored": total, "bytes": bytes_on_disk(network),
            "bytes_sparse": bytes_sparse(network), "layers": layers_of(network)}


def bytes_on_disk(network: Network) -> int:
    """Of the file that ``exactprune.save`` writes: .pt, or .onnx where a network is no chain."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("g.pt", "g.onnx"):
            try:
                save(network, Path(scratch) / name)
            except ExactPruneError:
                continue
            return (Path(scratch) / name).stat().st_size
    return sum(a.nbytes for a in arrays_of(network))


def bytes_sparse(network: Network) -> int:
    """Of a .pt file whose weights are in compressed rows wherever that is smaller."""
    stored = {f"{k}.{i}": _smaller(a) for k, node in enumerate(network.nodes)
              for i, a in enumerate(v for v in vars(node.op).values() if isinstance(v, np.ndarray))}
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(stored, Path(scratch) / "g.pt")
        return (Path(scratch) / "g.pt").stat().st_size


def _smaller(array: np.ndarray) -> Any:
    if array.ndim < 2:
        return torch.from_numpy(np.array(array))
    matrix = np.array(array).reshape(len(array), -1)
    index = np.uint16 if max(matrix.shape) < 2**16 else np.int32
    rows, columns = np.nonzero(matrix)
    parts = [matrix[rows, columns], columns.astype(index), np.bincount(rows, minlength=len(matrix)).astype(np.int32)]
    packed = [torch.from_numpy(p.view(np.int16) if p.dtype == np.uint16 else p) for p in parts]
    return packed if sum(p.nbytes for p in parts) < matrix.nbytes else torch.from_numpy(matrix)


# -- times ---------------------------------------------------------------------------------------------------------------


def times(original: Network, network: Network, seconds: float = 0.15) -> dict[str, Any]:
    """Median seconds of a call at every batch size: ``network``, its sparse version, and ``original`` in turns with them.

    Args:
        original, network: of one interface.
        seconds: to spend at each batch size, as far as 7 to 51 rounds allow.
    """
    calls = [to_torch(original), to_torch(network)]
    sparse = _sparse(to_torch(network))
    calls += [] if sparse is None else [sparse]
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        x = torch.rand((batch, *original.input_shape), generator=generator).to(_dtype(original))
        medians = _medians(calls, x, seconds)
        names = (f"latency_dense_{batch}", f"latency_{batch}", f"sparse_latency_{batch}")
        found |= dict(zip(names, (*medians, None), strict=False))
    return found


def _dtype(network: Network) -> torch.dtype:
    return torch.float64 if network.dtype == np.float64 else torch.float32


def _medians(calls: Sequence[nn.Module], x: Tensor, seconds: float) -> list[float]:
    with torch.inference_mode():
        for call in calls:
            call(x)
        rows, end = [], time.perf_counter() + seconds
        while len(rows) < _LEAST or (len(rows) < _MOST and time.perf_counter() < end):
            order = sorted(range(len(calls)), key=lambda k: (k + len(rows)) % len(calls))
            taken = {k: _seconds(calls[k], x) for k in order}
            rows.append([taken[k] for k in range(len(calls))])
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _seconds(call: nn.Module, x: Tensor) -> float:
    began = time.perf_counter()
    call(x)
    return time.perf_counter() - began


class _SparseLinear(nn.Module):
    """A linear layer whose matrix is in compressed rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight.detach().to_sparse_csr()
        self.bias = layer.bias.detach()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs) -> (batch, outputs)."""
        return (torch.sparse.mm(self.weight, x.t()) + self.bias).t()


def _sparse(module: nn.Module) -> nn.Module | None:
    """``module`` with sparse linear layers; None where it has none, or torch has no such kernel."""
    found = [(parent, name, layer) for parent in module.modules() for name, layer in parent.named_children()
             if isinstance(layer, nn.Linear) and layer.bias is not None and layer.weight.numel()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that these kernels are in beta
            for parent, name, layer in found:
                setattr(parent, name, _SparseLinear(layer))
    except (RuntimeError, NotImplementedError):
        return None
    return module if found else None
