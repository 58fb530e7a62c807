"""``.safetensors`` (https://github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header,
raw bytes.

A ``state_dict`` without code by design; it says nothing about how the layers are connected, so it needs an
architecture.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from exactprune.errors import LoadError
from exactprune.io.pt import from_state_dict
from exactprune.network import Network

MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def load_safetensors(path: Path, arch: str | None, input_shape: tuple[int, ...] | None) -> Network:
    """A ReLU network of Linear layers from its weights.

    Raises:
        LoadError: the file is damaged, or there is no ``arch``, or it does not fit.
    """
    state = read_safetensors(path)
    if arch is None:
        raise LoadError("holds weights only, which does not say how its layers are connected; give the architecture "
                        "(--arch 784-100-10 for a ReLU network of Linear layers)")
    return from_state_dict(in_order(state), arch, path.stem, input_shape)


def in_order(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Layers by the number in their names (the file itself keeps no order: ``layer.10`` stands before ``layer.2``).

    Raises:
        LoadError: there are several layers and their names do not number them.
    """
    layers = {k.rpartition(".")[0] for k in state}
    found = {name: re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in layers}
    frames = {(m[1], m[3]) if m else None for m in found.values()}
    if len(layers) > 1 and (len(frames) > 1 or None in frames):
        raise LoadError(
            f"the order of its layers {sorted(layers)} is not known; load it in Python with arch= an example module"
        )
    rank = {name: int(m[2]) if m else 0 for name, m in found.items()}
    return {k: state[k] for k in sorted(state, key=lambda k: rank[k.rpartition(".")[0]])}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name -> array, in the order of the data (bfloat16 as float32, exactly).

    Raises:
        LoadError: the file is truncated or malformed.
    """
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else MAX_HEADER + 1
    if length > min(MAX_HEADER, len(data) - 8):
        raise LoadError("is not a complete safetensors file; download or save it again")
    try:
        header = json.loads(data[8:8 + length])
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        ordered = sorted(entries, key=lambda k: (entries[k]["data_offsets"][0], k))
        return {name: _array(entries[name], data[8 + length:]) for name in ordered}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise LoadError(f"its header is malformed ({error}); download or save it again") from None


def _array(entry: Mapping[str, object], data: bytes) -> np.ndarray:
    start, end = (int(n) for n in entry["data_offsets"])  # type: ignore[union-attr]
    shape = tuple(int(n) for n in entry["shape"])  # type: ignore[union-attr]
    dtype = np.dtype(_DTYPES[str(entry["dtype"])])
    if not 0 <= start <= end <= len(data) or end - start != prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} does not fit its bytes")
    array = np.frombuffer(data[start:end], dtype).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array.copy()
