"""Reading ``network.npz``, the canonical network as written beside certificates, and ``domain.npz``."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.checker.network import FORMAT, CheckError, Network, Node, Op

LARGEST = 4 << 30


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The members of an ``.npz`` file, without unpickling anything.

    Raises:
        CheckError: missing, damaged, or far larger inside than outside.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(i.file_size for i in archive.infolist()) > max(LARGEST, 4 * path.stat().st_size):
                raise CheckError(f"{path.name}: a decompression bomb")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise CheckError(f"{path.name}: not a readable npz file ({type(error).__name__}: {error})") from None


def read(path: Path) -> Network:
    """The network in a ``network.npz``.

    Raises:
        CheckError: it is not one.
    """
    members = arrays(path)
    try:
        graph = json.loads(str(members["graph"]))
        if graph["format"] != FORMAT:
            raise CheckError(f"{path.name}: format {graph['format']!r}")
        nodes = tuple(_node(item, index, members) for index, item in enumerate(graph["nodes"]))
        return Network(nodes, tuple(int(n) for n in graph["input_shape"]), str(graph["dtype"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckError(f"{path.name}: not a network ({type(error).__name__}: {error})") from None


def _node(item: Any, index: int, members: dict[str, np.ndarray]) -> Node:
    start = f"node{index}."
    found = {name.removeprefix(start): a for name, a in members.items() if name.startswith(start)}
    settings = {str(k): _tuples(v) for k, v in item["settings"].items()}
    return Node(Op(str(item["op"]), found, settings), tuple(int(i) for i in item["inputs"]))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def domain(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``lower`` and ``upper`` of a ``domain.npz``.

    Raises:
        CheckError: it is not one.
    """
    members = arrays(path)
    if not {"lower", "upper"} <= set(members) or any(members[k].dtype != np.float64 for k in ("lower", "upper")):
        raise CheckError(f"{path.name}: needs float64 arrays lower and upper")
    return members["lower"], members["upper"]
