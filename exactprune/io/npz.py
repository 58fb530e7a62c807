"""``network.npz``: the canonical form of a network, written next to certificates (docs/certificate.md, "Files").

Member ``graph`` is the JSON text of ``Network.describe()`` with names added; member ``node<i>.<field>`` is an array of
node i. The hashes in ``graph`` are checked on reading.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.errors import ExactPruneError, LoadError
from exactprune.io import atomic
from exactprune.network import FORMAT, Interface, Network, Node
from exactprune.ops import OPERATORS, Op


def save_npz(network: Network, path: str | os.PathLike[str]) -> None:
    """Write ``network``, atomically.

    Raises:
        OptionError: the place cannot be written.
    """
    arrays = {f"node{i}.{name}": array for i, node in enumerate(network.nodes) for name, array in node.op.arrays()}
    graph = network.describe() | {
        "name": network.name,
        "notes": list(network.notes),
        "names": [n.name for n in network.nodes],
        "interface": asdict(network.interface),
    }
    buffer = io.BytesIO()
    np.savez(buffer, graph=np.array(json.dumps(graph, sort_keys=True)), **arrays)  # type: ignore[arg-type]
    atomic.write_bytes(path, buffer.getvalue())


def load_npz(path: Path) -> Network:
    """The network that ``save_npz`` wrote.

    Raises:
        LoadError: the file is damaged, or its arrays are not those that its graph names.
    """
    from exactprune.io.archive import open_zip

    with open_zip(path):
        pass
    try:
        with np.load(path, allow_pickle=False) as file:
            graph = json.loads(str(file["graph"]))
            arrays = {name: file[name] for name in file.files if name != "graph"}
        network = _network(graph, arrays, path.stem)
    except ExactPruneError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise LoadError(f"is not a network.npz that exactprune wrote ({error}); write it again") from None
    if json.loads(json.dumps(network.describe()["nodes"])) != graph["nodes"]:
        raise LoadError("an array differs from the hash in its graph; the file is damaged or was changed")
    return network


def _network(graph: Mapping[str, Any], arrays: Mapping[str, np.ndarray], stem: str) -> Network:
    if graph["format"] != FORMAT:
        raise LoadError(f"has format {graph['format']!r}, this version reads {FORMAT}")
    items, shape = graph["nodes"], graph["input_shape"]
    assert isinstance(items, list) and isinstance(shape, list)
    names = graph.get("names") or [f"node{i}" for i in range(len(items))]
    nodes = [Node(str(name), _op(item, i, arrays), tuple(int(j) for j in item["inputs"]))
             for i, (item, name) in enumerate(zip(items, names, strict=True))]  # type: ignore[call-overload]
    return Network(
        tuple(nodes),
        tuple(int(n) for n in shape),
        np.dtype(str(graph["dtype"])),
        str(graph.get("name", stem)),
        tuple(graph.get("notes", ())),
        Interface(**_tuples_in(graph.get("interface", {}))),
    )  # type: ignore[arg-type]


def _op(item: Mapping[str, object], index: int, arrays: Mapping[str, np.ndarray]) -> Op:
    kind = OPERATORS[str(item["op"])]
    stored = {f.name: arrays[f"node{index}.{f.name}"] for f in fields(kind) if f"node{index}.{f.name}" in arrays}
    settings = _tuples_in(item["settings"])
    return kind(**stored, **settings)


def _tuples_in(settings: object) -> dict[str, Any]:
    return {str(name): _tuples(value) for name, value in settings.items()}  # type: ignore[attr-defined]


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
