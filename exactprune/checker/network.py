"""The network as the checker sees it: operators in topological order, their stored floats, their shapes, their hash.

``INPUT`` (-1) stands for the network's input; the last node is the output. The canonical form (what ``tidy`` returns)
and
the hash are those of the certificate's header, so a certificate belongs to one function in one dtype, whatever its
file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

INPUT = -1
FORMAT = "exactprune-network/1"
Shape = tuple[int, ...]


class CheckError(Exception):
    """A file is malformed, or holds something the checker has no treatment for: everything is rejected."""


class UnknownError(CheckError):
    """A sound model file with something that the checker's readers do not know."""


class OpenShapeError(CheckError):
    """A model file does not tell the shape of its input."""


@dataclass(frozen=True, eq=False)
class Op:
    """One operator: its kind, its arrays, and its other settings (``stride``, ``padding``, ...)."""

    kind: str
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Node:
    """An operator and the positions of the nodes it reads."""

    op: Op
    inputs: tuple[int, ...]


FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "Affine": ({"weight", "bias"}, set()),
    "Conv2d": ({"weight", "bias"}, {"stride", "padding", "dilation", "groups"}),
    "Scale": ({"scale", "shift"}, set()),
    "ReLU": (set(), set()),
    "Add": (set(), set()),
    "MaxPool2d": (set(), {"kernel", "stride", "padding", "dilation"}),
    "AvgPool2d": (set(), {"kernel", "stride", "padding", "count_include_pad"}),
    "Reshape": (set(), {"shape"}),
    "Transpose": (set(), {"permutation"}),
    "Pad": (set(), {"pads", "value"}),
}


@dataclass(frozen=True, eq=False)
class Network:
    """Operators in topological order over stored float32 or float64 arrays.

    Raises:
        CheckError: an unknown operator, shapes that do not fit, a NaN or infinite weight, a wrong order.
    """

    nodes: tuple[Node, ...]
    input_shape: Shape
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise CheckError(f"network of dtype {self.dtype}; only float32 and float64 are checked")
        for position, node in enumerate(self.nodes):
            _check_node(position, node, self.dtype)
        _ = self.shapes

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Output shape of every node, without batch axis."""
        shapes: list[Shape] = []
        for position, node in enumerate(self.nodes):
            given = [self.input_shape if i == INPUT else shapes[i] for i in node.inputs]
            shapes.append(output_shape(f"node {position} ({node.op.kind})", node.op, given))
        return tuple(shapes)

    def shape_of(self, position: int) -> Shape:
        """Output shape of a node, or the input's."""
        return self.input_shape if position == INPUT else self.shapes[position]

    @cached_property
    def relus(self) -> tuple[int, ...]:
        """Positions of the ReLU nodes: ReLU layer k is ``relus[k]``."""
        return tuple(i for i, node in enumerate(self.nodes) if node.op.kind == "ReLU")

    @cached_property
    def sha256(self) -> str:
        """Hash of operators, wiring, dtype and every stored bit; names play no part."""
        nodes = [_describe(node) for node in self.nodes]
        data = {"format": FORMAT, "dtype": self.dtype, "input_shape": list(self.input_shape), "nodes": nodes}
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of(network: Any) -> Network:
    """The checker's copy of any object with ``nodes`` (``op.kind``, ``op.arrays()``, ``op.settings()``, ``inputs``),
    ``input_shape`` and ``dtype``."""
    if isinstance(network, Network):
        return network
    nodes = tuple(Node(Op(n.op.kind, dict(n.op.arrays()), dict(n.op.settings())), tuple(n.inputs))
                  for n in network.nodes)
    return Network(nodes, tuple(network.input_shape), str(np.dtype(network.dtype).name))


def domain_sha256(lower: np.ndarray, upper: np.ndarray) -> str:
    """Hash of a box: its shape and its float64 endpoints."""
    data = repr([int(n) for n in lower.shape]).encode() + lower.astype("<f8").tobytes() + upper.astype("<f8").tobytes()
    return hashlib.sha256(b"exactprune-box/1" + data).hexdigest()


def tidy(nodes: Iterable[Node], output: int, input_shape: Sequence[int], dtype: str) -> Network:
    """The canonical network: arrays in ``dtype``; reshapes that change nothing dropped, a reshape of a reshape merged,
    nodes that do not reach ``output`` dropped."""
    given = list(nodes)
    place: dict[int, int] = {INPUT: INPUT}
    kept: list[Node] = []
    shapes: list[Shape] = []
    needed = reaching(given, output)
    for position, node in enumerate(given):
        if position not in needed:
            continue
        inputs = tuple(place[i] for i in node.inputs)
        if node.op.kind == "Reshape":
            while inputs[0] != INPUT and kept[inputs[0]].op.kind == "Reshape":
                inputs = kept[inputs[0]].inputs
            source = tuple(input_shape) if inputs[0] == INPUT else shapes[inputs[0]]
            if source == tuple(node.op.settings["shape"]):
                place[position] = inputs[0]
                continue
        op = replace(node.op, arrays={k: np.array(a, dtype=dtype, order="C") for k, a in node.op.arrays.items()})
        read = [tuple(input_shape) if i == INPUT else shapes[i] for i in inputs]
        shapes.append(output_shape(f"node {position} ({op.kind})", op, read))
        place[position] = len(kept)
        kept.append(Node(op, inputs))
    used = sorted(reaching(kept, place[output]))
    place = {INPUT: INPUT} | {old: new for new, old in enumerate(used)}
    final = tuple(Node(kept[i].op, tuple(place[j] for j in kept[i].inputs)) for i in used)
    return Network(final, tuple(int(n) for n in input_shape), dtype)


def reaching(nodes: Sequence[Node], output: int) -> set[int]:
    """The positions that ``output`` depends on, itself included."""
    found: set[int] = set()
    stack = [output]
    while stack:
        position = stack.pop()
        if position != INPUT and position not in found:
            found.add(position)
            stack.extend(nodes[position].inputs)
    return found


def _describe(node: Node) -> dict[str, object]:
    arrays = {name: {"shape": list(a.shape),
                     "sha256": hashlib.sha256(a.astype(a.dtype.newbyteorder("<")).tobytes()).hexdigest()}
              for name, a in node.op.arrays.items()}
    return {"op": node.op.kind, "inputs": list(node.inputs), "settings": node.op.settings, "arrays": arrays}


def _check_node(position: int, node: Node, dtype: str) -> None:
    where = f"node {position} ({node.op.kind})"
    if node.op.kind not in FIELDS:
        raise CheckError(f"{where}: unknown operator")
    arrays, settings = FIELDS[node.op.kind]
    if set(node.op.arrays) != arrays or set(node.op.settings) != settings:
        raise CheckError(f"{where}: has arrays {sorted(node.op.arrays)} and settings {sorted(node.op.settings)}")
    if len(node.inputs) != (2 if node.op.kind == "Add" else 1) or not all(INPUT <= i < position for i in node.inputs):
        raise CheckError(f"{where}: reads {node.inputs}, which are not earlier nodes")
    for name, array in node.op.arrays.items():
        if array.dtype != np.dtype(dtype) or not np.isfinite(array).all():
            raise CheckError(f"{where}: {name} is not finite {dtype}")


def output_shape(where: str, op: Op, shapes: Sequence[Shape]) -> Shape:
    """Shape of the result, or a CheckError that begins with ``where``."""
    try:
        found = _SHAPES[op.kind](op, *shapes)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise CheckError(f"{where}: does not fit its inputs {list(shapes)} ({error})") from None
    if found is None or any(n < 0 for n in found):
        raise CheckError(f"{where}: does not fit its inputs {list(shapes)}")
    return tuple(int(n) for n in found)


def _affine_shape(op: Op, shape: Shape) -> Shape | None:
    weight, bias = op.arrays["weight"], op.arrays["bias"]
    fits = weight.ndim == 2 and bias.shape == weight.shape[:1] and shape == weight.shape[1:]
    return bias.shape if fits else None


def _window_shape(shape: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any = (1, 1)) -> Shape | None:
    channels, height, width = shape
    top, left, bottom, right = padding
    if min(padding) < 0 or min(*kernel, *stride, *dilation) < 1:
        return None
    spare = [size - (k - 1) * d - 1 for size, k, d in
             zip((height + top + bottom, width + left + right), kernel, dilation, strict=True)]
    return None if min(spare) < 0 else (channels, spare[0] // stride[0] + 1, spare[1] // stride[1] + 1)


def _conv_shape(op: Op, shape: Shape) -> Shape | None:
    weight, groups = op.arrays["weight"], op.settings["groups"]
    s = op.settings
    fits = (weight.ndim == 4 and op.arrays["bias"].shape == weight.shape[:1] and groups >= 1
            and weight.shape[0] % groups == 0 and len(shape) == 3 and shape[0] == weight.shape[1] * groups)
    found = _window_shape(shape, weight.shape[2:], s["stride"], s["padding"], s["dilation"]) if fits else None
    return found and (weight.shape[0], *found[1:])


def _max_pool_shape(op: Op, shape: Shape) -> Shape | None:
    s = op.settings
    wide = any(p >= (k - 1) * d + 1 for p, k, d in zip(s["padding"], (*s["kernel"], *s["kernel"]),
                                                       (*s["dilation"], *s["dilation"]), strict=True))
    return None if wide else _window_shape(shape, s["kernel"], s["stride"], s["padding"], s["dilation"])


def _scale_shape(op: Op, shape: Shape) -> Shape | None:
    return shape if np.broadcast_shapes(shape, *(a.shape for a in op.arrays.values())) == shape else None


def _reshape_shape(op: Op, shape: Shape) -> Shape | None:
    return tuple(op.settings["shape"]) if prod(op.settings["shape"]) == prod(shape) else None


def _transpose_shape(op: Op, shape: Shape) -> Shape | None:
    permutation = op.settings["permutation"]
    return tuple(shape[i] for i in permutation) if sorted(permutation) == list(range(len(shape))) else None


def _pad_shape(op: Op, shape: Shape) -> Shape | None:
    pads = op.settings["pads"]
    if len(pads) != len(shape) or any(min(p) < 0 for p in pads) or not np.isfinite(op.settings["value"]):
        return None
    return tuple(n + before + after for n, (before, after) in zip(shape, pads, strict=True))


_SHAPES: dict[str, Any] = {
    "Affine": _affine_shape,
    "Conv2d": _conv_shape,
    "Scale": _scale_shape,
    "ReLU": lambda op, shape: shape,
    "Add": lambda op, a, b: a if a == b else None,
    "MaxPool2d": _max_pool_shape,
    "AvgPool2d": lambda op, s: _window_shape(s, op.settings["kernel"], op.settings["stride"], op.settings["padding"]),
    "Reshape": _reshape_shape,
    "Transpose": _transpose_shape,
    "Pad": _pad_shape,
}
