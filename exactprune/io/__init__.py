"""Model files and boxes in, model files out. Importing this package imports neither torch nor onnx."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from exactprune.errors import ExactPruneError, LoadError, OptionError
from exactprune.io.vnnlib import load_vnnlib

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from exactprune.network import Network

__all__ = ["load", "load_vnnlib", "save", "to_torch"]

SUFFIXES = (".pt", ".pth", ".pt2", ".onnx", ".npz", ".safetensors")


def load(source: str | os.PathLike[str] | torch.nn.Module, *, input_shape: Sequence[int] | None = None,
         arch: str | torch.nn.Module | None = None) -> Network:
    """A model file, or a ``torch.nn.Module``, as a Network.

    Args:
        source: path of a .pt, .pth, .pt2, .onnx, .npz (as ``exactprune`` writes it) or .safetensors file, or a module.
        input_shape: without batch axis; needed for modules and for .pt files that start with a convolution.
        arch: for a state_dict (.pt or .safetensors): ``"784-100-10"``, or a module of the same architecture.

    Raises:
        LoadError: the file is missing, damaged, unsafe or of another kind.
        UnsupportedOpError: an operator has no sound treatment.
        WeightError: a weight is NaN or infinite, or has the wrong shape.
        ShapeError: shapes do not fit, or are not known.
    """
    shape = None if input_shape is None else tuple(int(n) for n in input_shape)
    if shape is not None and (not shape or min(shape) < 1):
        raise OptionError(f"input shape {shape}: give positive sizes without the batch axis, for example 3,32,32")
    if not isinstance(source, str | os.PathLike):
        from exactprune.io.module import load_module

        return load_module(source, input_shape=shape)
    path = Path(source)
    _check_file(path)
    try:
        return _load_file(path, shape, arch)
    except ExactPruneError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None
    except MemoryError:
        raise LoadError(f"{path}: needs more memory than there is; use a larger machine") from None
    except Exception as error:  # a setting of an unexpected kind, deep inside a damaged or hostile file
        words = " ".join(str(error).split())[:160]
        raise LoadError(f"{path}: is malformed ({type(error).__name__}: {words}); save or export it again") from error


def _load_file(path: Path, shape: tuple[int, ...] | None, arch: str | torch.nn.Module | None) -> Network:
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".safetensors") and arch is not None and not isinstance(arch, str):
        from exactprune.io.module import load_into

        return load_into(path, arch, shape)
    if arch is not None and suffix not in (".pt", ".pth", ".safetensors"):
        raise OptionError(f"{path}: an architecture is for a state_dict (.pt, .safetensors) only; leave it out")
    assert arch is None or isinstance(arch, str)
    if suffix in (".pt", ".pth"):
        from exactprune.io.pt import load_pt

        return load_pt(path, input_shape=shape, arch=arch)
    if suffix == ".onnx":
        from exactprune.io.onnx import load_onnx

        return load_onnx(path, input_shape=shape)
    if suffix == ".pt2":
        from exactprune.io.pt2 import load_pt2

        return load_pt2(path, input_shape=shape)
    if suffix == ".npz":
        from exactprune.io.npz import load_npz

        return load_npz(path)
    if suffix == ".safetensors":
        from exactprune.io.safetensors import load_safetensors

        return load_safetensors(path, arch, shape)
    raise LoadError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")


def save(network: Network, path: str | os.PathLike[str]) -> None:
    """Write ``network``, atomically, in the format that the name's ending says.

    ``.onnx`` (opset 17), ``.pt`` (an ``nn.Sequential``), ``.pt2`` (a torch.export program) or ``.npz`` (the canonical
    form).

    Raises:
        OptionError: the ending is another, or the place cannot be written.
        UnsupportedOpError: a ``.pt`` is wanted and the network is not a chain of ``torch.nn`` layers.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx":
        from exactprune.io.onnx_export import save_onnx as writer
    elif suffix in (".pt", ".pth"):
        from exactprune.io.torch_export import save_pt as writer
    elif suffix == ".pt2":
        from exactprune.io.torch_export import save_pt2 as writer
    elif suffix == ".npz":
        from exactprune.io.npz import save_npz as writer
    else:
        raise OptionError(f"{path}: cannot tell the format from the name; end it in .onnx, .pt, .pt2 or .npz")
    writer(network, path)


def to_torch(network: Network) -> torch.nn.Module:
    """``network`` as a PyTorch module in evaluation mode that takes (batch, *input_shape)."""
    from exactprune.io.torch_export import to_torch as convert

    return convert(network)


def _check_file(path: Path) -> None:
    """The file exists, is a readable plain file, and is not empty.

    Raises:
        LoadError: it is not.
    """
    try:
        if path.is_dir():
            raise LoadError(f"{path}: is a folder; give a model file ({', '.join(SUFFIXES)})")
        with path.open("rb") as file:
            if not file.read(1):
                raise LoadError(f"{path}: is empty; download or save it again")
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from None
