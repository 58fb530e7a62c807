"""Any ``torch.nn.Module`` in Python, through ``torch.export`` (https://docs.pytorch.org/docs/stable/export.html).

The module is traced at batch one, serialised in memory and read by the ``.pt2`` reader, so a module and its ``.pt2``
file give the same network.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exactprune.errors import LoadError, OptionError, ShapeError, UnsupportedOpError
from exactprune.io.archive import read, tensors
from exactprune.io.pt2 import load_pt2
from exactprune.io.safetensors import read_safetensors
from exactprune.network import Interface, Network


def load_module(module: object, *, input_shape: tuple[int, ...] | None = None, name: str | None = None) -> Network:
    """The network that a module computes in its present mode.

    Args:
        module: must be traceable by ``torch.export``; its weights are copied.
        input_shape: without batch axis; may be left out where the first layer is ``nn.Linear``.
        name: of the network; the class's name by default.

    Raises:
        OptionError: ``module`` is not a module.
        UnsupportedOpError: it cannot be traced, or uses an operator without a sound treatment.
        ShapeError: the input's shape is needed.
    """
    if not isinstance(module, nn.Module):
        raise OptionError(f"a {type(module).__name__} was given; give a path or a torch.nn.Module")
    _check_mode(module)
    leaves = [m for m in module.modules() if not list(m.children()) and not isinstance(m, nn.Dropout | nn.Identity)]
    first = leaves[0] if leaves else None
    shape = input_shape or _first_shape(leaves)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    network = load_pt2(_exported(module, shape, dtype), name=name or type(module).__name__)
    axes = ("batch", "...") if isinstance(first, nn.Flatten) and len(shape) == 1 else None
    interface = Interface(network.interface.input_name, input_axes=axes)
    return type(network)(network.nodes, network.input_shape, network.dtype, network.name, network.notes, interface)


def _check_mode(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and (layer.training or layer.running_mean is None):
            raise UnsupportedOpError(
                f"layer '{name}' ({type(layer).__name__}): is in training mode, or keeps no running "
                "statistics, so its output depends on the batch; call model.eval() first"
            )


def _first_shape(leaves: list[nn.Module]) -> tuple[int, ...]:
    rest = [m for m in leaves if not isinstance(m, nn.Flatten)]
    if rest and isinstance(rest[0], nn.Linear):
        return (rest[0].in_features,)
    raise ShapeError("the module does not tell the size of its input; give input_shape=(C, H, W)")


def _exported(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> io.BytesIO:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    module = module if device.type == "cpu" else copy.deepcopy(module).cpu()
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(module, (torch.zeros(1, *shape, dtype=dtype),)), buffer)
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise UnsupportedOpError(
            f"{type(module).__name__}: torch.export cannot trace it with input (1, {', '.join(map(str, shape))}) "
            f"({type(error).__name__}: {words})"
        ) from None
    buffer.seek(0)
    return buffer


def load_into(path: Path, example: object, input_shape: tuple[int, ...] | None = None) -> Network:
    """The network of a ``state_dict`` file, with the architecture of an example module (which stays as it is).

    Raises:
        LoadError: the file holds no state_dict, or one that does not fit the module strictly.
        OptionError: ``example`` is not a module.
    """
    if not isinstance(example, nn.Module):
        raise OptionError(f"arch is a {type(example).__name__}; give '784-100-10' or a torch.nn.Module")
    state = read_safetensors(path) if path.suffix.lower() == ".safetensors" else tensors(read(path))
    if state is None:
        raise LoadError("holds no state_dict; leave arch out for a whole model")
    module = copy.deepcopy(example)
    _fill(path, module, state)
    return load_module(module, input_shape=input_shape, name=path.stem)


def _fill(path: Path, module: nn.Module, state: Mapping[str, np.ndarray]) -> None:
    """Load strictly, each tensor in the dtype that the file has."""
    given = {k: torch.from_numpy(np.ascontiguousarray(a).reshape(a.shape).copy()) for k, a in state.items()}
    floats = {a.dtype for a in given.values() if a.is_floating_point()}
    if torch.float64 in floats:
        module.double()
    try:
        module.load_state_dict(given, strict=True)
    except RuntimeError as error:
        raise LoadError(f"does not fit the example module ({' '.join(str(error).split())[:200]})") from None
