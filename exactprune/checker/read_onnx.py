"""Reading ``.onnx`` models (https://onnx.ai/onnx/repo-docs/IR.html) at batch one: the checker's own small reader.

A name stands for a constant (numpy) or for a ``Tensor``. Operators of opset 7 and later that a ReLU network needs are
known; anything else ends with a CheckError, and the checker then needs a ``network.npz``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.checker.assemble import Graph, Tensor
from exactprune.checker.network import CheckError, Network, OpenShapeError, Shape, UnknownError
from exactprune.checker.protobuf import Message

LARGEST = 4 << 30
OLDEST_OPSET = 7
FLOATS = {1: "<f4", 10: "<f2", 11: "<f8"}
DTYPES = {**FLOATS, 2: "|u1", 3: "|i1", 5: "<i2", 6: "<i4", 7: "<i8", 9: "|b1"}
TYPED = {"<f4": 4, "<f8": 10}

Value = np.ndarray | Tensor | None


def read(path: Path, input_shape: Shape | None = None) -> Network:
    """The network of an ONNX file.

    Args:
        path: of the file.
        input_shape: without batch axis, where the file leaves an axis other than the batch open.

    Raises:
        CheckError: damaged, or something that this reader does not know.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise CheckError("too large")
        return _network(Message(path.read_bytes()), input_shape)
    except CheckError as error:
        raise type(error)(f"{path.name}: {error}") from None
    except (OSError, ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        raise CheckError(f"{path.name}: not readable ({type(error).__name__}: {error})") from None


def _network(model: Message, input_shape: Shape | None) -> Network:
    opsets = [o.int(2) for o in model.messages(8) if o.text(1) in ("", "ai.onnx")]
    graph = model.message(7)
    if graph is None or not opsets or min(opsets) < OLDEST_OPSET or graph.has(15) or model.has(25):
        raise UnknownError("no graph of standard operators, opset 7 or later")
    values: dict[str, Value] = {"": None, **dict(_named(t) for t in graph.messages(5))}
    inputs = [i for i in graph.messages(11) if i.text(1) not in values]
    outputs = [o.text(1) for o in graph.messages(12)]
    if len(inputs) != 1 or len(outputs) != 1:
        raise CheckError(f"{len(inputs)} inputs and {len(outputs)} outputs; one of each is read")
    shape, kind = _input_shape(inputs[0], input_shape)
    built = Graph(shape, double=kind == 11)
    values[inputs[0].text(1)] = built.input
    for node in graph.messages(1):
        _read_node(built, node, values, min(opsets))
    result = values.get(outputs[0])
    if not isinstance(result, Tensor):
        raise CheckError("its output does not depend on its input")
    return built.network(result)


def _input_shape(given: Message, wanted: Shape | None) -> tuple[Shape, int]:
    """The input's full shape at batch one, and its element type."""
    kind = given.message(2)
    tensor = kind.message(1) if kind else None
    if tensor is None or tensor.int(1) not in FLOATS:
        raise CheckError("its input is no float tensor")
    described = tensor.message(2)
    if described is None:
        if wanted is None:
            raise OpenShapeError("it does not say the shape of its input; give --input-shape")
        return (1, *wanted), tensor.int(1)
    axes = [d.int(1) if d.int(1) > 0 else None for d in described.messages(1)]
    batched = len(axes) > 1 and axes[0] in (None, 1)
    own = axes[1:] if batched else axes
    if wanted is not None:
        if len(own) != len(wanted) or any(a is not None and a != w for a, w in zip(own, wanted, strict=True)):
            raise CheckError(f"its input {axes} does not fit {wanted}")
        own = list(wanted)
    if any(a is None for a in own):
        raise OpenShapeError(f"its input has the dynamic shape {axes}; give --input-shape")
    return tuple(int(a or 0) for a in ((1, *own) if batched else own)), tensor.int(1)


def _named(tensor: Message) -> tuple[str, np.ndarray]:
    return tensor.text(8), _array(tensor)


def _array(tensor: Message) -> np.ndarray:
    """A TensorProto's numbers."""
    dtype, shape = DTYPES.get(tensor.int(2)), tensor.ints(1)
    if dtype is None or tensor.has(13) or tensor.int(14) or tensor.has(3) or any(n < 0 for n in shape):
        raise CheckError(f"a weight of type {tensor.int(2)}, or stored elsewhere")
    if tensor.has(9):
        flat = np.frombuffer(tensor.data(9) or b"", dtype)
    elif dtype in TYPED:
        flat = np.frombuffer(tensor.packed(TYPED[dtype]), dtype)
    elif dtype == "<f2":
        flat = np.array(tensor.ints(5), np.uint16).view("<f2")
    else:
        flat = np.array(tensor.ints(7 if dtype == "<i8" else 5)).astype(dtype)
    if flat.size != prod(shape):
        raise CheckError(f"a weight of shape {shape} has {flat.size} values")
    return flat.reshape(shape)


class _View:
    """One node: inputs and attributes."""

    def __init__(self, node: Message, values: dict[str, Value], opset: int) -> None:
        self.kind, self.opset = node.text(4), opset
        self.inputs = [values[name] for name in node.texts(1)]
        self.outputs = [name for name in node.texts(2) if name]
        attributes = node.messages(5)
        self.attributes = {a.text(1): a for a in attributes}
        if len(attributes) != len(self.attributes):
            raise CheckError(f"{self.kind}: an attribute stands twice")

    def int(self, key: str, default: int) -> int:
        return self.attributes[key].int(3) if key in self.attributes else default

    def float(self, key: str, default: float) -> float:
        return self.attributes[key].float(2, 0.0) if key in self.attributes else default

    def ints(self, key: str, default: Sequence[int]) -> list[int]:
        return self.attributes[key].ints(8) if key in self.attributes else list(default)

    def word(self, key: str, default: str) -> str:
        return self.attributes[key].text(4) if key in self.attributes else default

    def tensor(self, index: int) -> Tensor:
        value: Any = self.inputs[index] if index < len(self.inputs) else None
        self.require(isinstance(value, Tensor), f"input {index} is no computed tensor")
        return value

    def optional(self, index: int) -> np.ndarray | None:
        value: Any = self.inputs[index] if index < len(self.inputs) else None
        self.require(not isinstance(value, Tensor), f"input {index} is no constant")
        return value

    def array(self, index: int) -> np.ndarray:
        value = self.optional(index)
        self.require(value is not None, f"input {index} is missing")
        return value  # type: ignore[return-value]

    def listed(self, key: str, index: int) -> list[int] | None:
        if key in self.attributes:
            return self.ints(key, ())
        value = self.optional(index)
        return None if value is None else [int(v) for v in value.reshape(-1)]

    def require(self, fine: bool, what: str) -> None:
        if not fine:
            raise UnknownError(f"{self.kind}: {what}; the checker's reader does not know it")


def _read_node(graph: Graph, node: Message, values: dict[str, Value], opset: int) -> None:
    view = _View(node, values, opset)
    view.require(node.text(7) in ("", "ai.onnx"), f"operators of {node.text(7)}")
    view.require(len(view.outputs) == 1 and view.outputs[0] not in values,
                 "several outputs, or one name for two values")
    values[view.outputs[0]] = _value(graph, view)


def _value(graph: Graph, view: _View) -> Any:
    if view.kind == "Shape":
        source: Any = view.inputs[0]
        view.require(not view.attributes, "only a part of the shape")
        return np.array(source.shape, np.int64)
    if not any(isinstance(i, Tensor) for i in view.inputs):
        view.require(view.kind in _CONSTANTS, "on constants")
        return _CONSTANTS[view.kind](view)
    view.require(view.kind in _KNOWN, "operator")
    return _KNOWN[view.kind](graph, view)


# -- constants ---------------------------------------------------------------------------------------------------------


def _constant(view: _View) -> np.ndarray:
    if "value" in view.attributes:
        tensor = view.attributes["value"].message(5)
        view.require(tensor is not None, "no value")
        return _array(tensor)  # type: ignore[arg-type]
    if "value_ints" in view.attributes:
        return np.array(view.ints("value_ints", ()), np.int64)
    if "value_int" in view.attributes:
        return np.array(view.int("value_int", 0), np.int64)
    view.require("value_float" in view.attributes, "a value")
    return np.array(view.float("value_float", 0.0), np.float32)


def _unsqueezed(view: _View) -> np.ndarray:
    return np.expand_dims(view.array(0), tuple(view.listed("axes", 1) or ()))


_CONSTANTS: dict[str, Callable[[_View], np.ndarray]] = {
    "Constant": _constant,
    "Identity": lambda v: v.array(0),
    "Gather": lambda v: np.take(v.array(0), v.array(1), axis=v.int("axis", 0)),
    "Concat": lambda v: np.concatenate([v.array(i) for i in range(len(v.inputs))], axis=v.int("axis", 0)),
    "Unsqueeze": _unsqueezed,
    "Squeeze": lambda v: np.squeeze(v.array(0), None if (a := v.listed("axes", 1)) is None else tuple(a)),
    "Transpose": lambda v: np.transpose(v.array(0), v.ints("perm", range(v.array(0).ndim - 1, -1, -1))),
    "Reshape": lambda v: v.array(0).reshape([int(n) for n in v.array(1)]),
    "Neg": lambda v: -v.array(0),
    "Add": lambda v: v.array(0) + v.array(1),
    "Sub": lambda v: v.array(0) - v.array(1),
    "Mul": lambda v: v.array(0) * v.array(1),
}


# -- operators ---------------------------------------------------------------------------------------------------------


def _gemm(graph: Graph, view: _View) -> Tensor:
    x, matrix = view.tensor(0), graph.numbers(view.array(1))
    view.require(not view.int("transA", 0) and matrix.ndim == 2, "a transposed input")
    weight = _scaled(matrix if view.int("transB", 0) else matrix.T, view.float("alpha", 1.0))
    third = view.optional(2)
    if third is None:
        return graph.linear(x, weight, None)
    bias = _scaled(graph.numbers(third), view.float("beta", 1.0))
    view.require(bias.size in (1, len(weight)), "a bias of another size")
    return graph.linear(x, weight, np.broadcast_to(bias.reshape(1), (len(weight),))
                        if bias.size == 1 else bias.reshape(-1))


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    return array if factor == 1 else (array.astype(np.float64) * factor).astype(array.dtype)


def _matmul(graph: Graph, view: _View) -> Tensor:
    left, right = view.inputs
    on_left = isinstance(left, Tensor)
    x, matrix = view.tensor(0 if on_left else 1), graph.numbers(view.array(1 if on_left else 0))
    view.require(matrix.ndim == 2 and not (on_left and isinstance(right, Tensor)), "this product")
    y = graph.linear(x, matrix.T, None) if on_left else graph.left_product(x, matrix)
    return Tensor(y.position, (*[1] * (2 - len(y.shape)), *y.shape)) if len(x.shape) > 1 else y


def _add(graph: Graph, view: _View) -> Tensor:
    x, y = view.inputs
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return graph.add(x, y)
    at = 0 if isinstance(x, Tensor) else 1
    return graph.shifted(view.tensor(at), graph.numbers(view.array(1 - at)))


def _sub(graph: Graph, view: _View) -> Tensor:
    x, y = view.inputs
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return graph.add(x, graph.times(y, np.asarray(-1.0)))
    if isinstance(x, Tensor):
        return graph.shifted(x, -graph.numbers(view.array(1)))
    constant = graph.numbers(view.array(0))
    return graph.scale(view.tensor(1), np.full((), -1, constant.dtype), constant)


def _mul(graph: Graph, view: _View) -> Tensor:
    at = 0 if isinstance(view.inputs[0], Tensor) else 1
    return graph.times(view.tensor(at), graph.numbers(view.array(1 - at)))


def _div(graph: Graph, view: _View) -> Tensor:
    divisor = np.asarray(graph.numbers(view.array(1)))
    view.require(bool(np.all(divisor != 0)), "a division by zero")
    return graph.times(view.tensor(0), np.asarray(1 / divisor, dtype=divisor.dtype))


def _clip(graph: Graph, view: _View) -> Tensor:
    low: Any = view.float("min", -1.0) if view.opset < 11 else view.optional(1)
    high: Any = view.float("max", np.inf) if view.opset < 11 else view.optional(2)
    unbounded = high is None or float(np.asarray(high)) >= float(np.finfo(np.float32).max)
    view.require(low is not None and float(np.asarray(low)) == 0 and unbounded, "bounds other than max(x, 0)")
    return graph.relu(view.tensor(0))


def _windows(view: _View, kernel: Sequence[int], x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(stride, dilation, padding); one dimension becomes height 1."""
    rank = len(kernel)
    stride, dilation = view.ints("strides", [1] * rank), view.ints("dilations", [1] * rank)
    pads = view.ints("pads", [0] * 2 * rank)
    view.require(rank in (1, 2) and len(x.shape) == rank + 2 and len(stride) == len(dilation) == rank
                 and len(pads) == 2 * rank, "these windows")
    mode = view.word("auto_pad", "NOTSET")
    view.require(mode in ("NOTSET", "", "VALID", "SAME_UPPER", "SAME_LOWER"), "auto_pad")
    if mode == "VALID":
        pads = [0] * 2 * rank
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
                 for n, s, k, d in zip(x.shape[2:], stride, kernel, dilation, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = small + large if mode == "SAME_UPPER" else large + small
    view.require(min(*pads, 0) == 0 and min(*stride, *dilation, *kernel) > 0, "these windows")
    one, none = ((1,), (0,)) if rank == 1 else ((), ())
    return (*one, *stride), (*one, *dilation), (*none, *pads[:rank], *none, *pads[rank:])


def _conv(graph: Graph, view: _View) -> Tensor:
    x, weight, bias = view.tensor(0), graph.numbers(view.array(1)), view.optional(2)
    stride, dilation, padding = _windows(view, weight.shape[2:], x)
    weight = weight[:, :, None, :] if weight.ndim == 3 else weight
    settings: dict[str, object] = {"stride": stride, "padding": padding, "dilation": dilation,
                                   "groups": view.int("group", 1)}
    return graph.convolution(x, weight, None if bias is None else graph.numbers(bias), settings)


def _batch_norm(graph: Graph, view: _View) -> Tensor:
    view.require(not view.int("training_mode", 0), "training mode")
    arrays = [view.array(i) for i in (1, 2, 3, 4)]
    return graph.batch_norm(view.tensor(0), *arrays, eps=view.float("epsilon", float(np.float32(1e-5))))


def _kernel(view: _View) -> tuple[tuple[int, ...], list[int]]:
    given = view.ints("kernel_shape", ())
    return (1, *given) if len(given) == 1 else tuple(given), given


def _max_pool(graph: Graph, view: _View) -> Tensor:
    kernel, given = _kernel(view)
    view.require(not view.int("storage_order", 0), "storage_order")
    stride, dilation, padding = _windows(view, given, view.tensor(0))
    return graph.max_pool(view.tensor(0), kernel, stride, padding, dilation, bool(view.int("ceil_mode", 0)))


def _avg_pool(graph: Graph, view: _View) -> Tensor:
    kernel, given = _kernel(view)
    stride, dilation, padding = _windows(view, given, view.tensor(0))
    view.require(set(dilation) == {1}, "dilation")
    include = bool(view.int("count_include_pad", 0))
    return graph.avg_pool(view.tensor(0), kernel, stride, padding, include, bool(view.int("ceil_mode", 0)))


def _reduce_mean(graph: Graph, view: _View) -> Tensor:
    x, axes = view.tensor(0), view.listed("axes", 1) or []
    image = len(x.shape) == 4 and sorted(a % 4 for a in axes) == [2, 3]
    view.require(image, "a mean over other axes than height and width")
    y = graph.mean_image(x)
    return y if view.int("keepdims", 1) else Tensor(y.position, y.shape[:2])


def _flatten(graph: Graph, view: _View) -> Tensor:
    x, axis = view.tensor(0), view.int("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    return graph.reshape(x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


def _reshape(graph: Graph, view: _View) -> Tensor:
    x, shape = view.tensor(0), view.listed("shape", 1) or []
    if not view.int("allowzero", 0):
        shape = [x.shape[i] if n == 0 and i < len(x.shape) else n for i, n in enumerate(shape)]
    return graph.reshape(x, shape)


def _squeeze(graph: Graph, view: _View) -> Tensor:
    x, axes = view.tensor(0), view.listed("axes", 1)
    rank = len(x.shape)
    drop = {i for i in range(1, rank) if x.shape[i] == 1} if axes is None else {a % rank for a in axes}
    view.require(all(x.shape[i] == 1 for i in drop), "axes that are not of length one")
    return graph.reshape(x, [n for i, n in enumerate(x.shape) if i not in drop])


def _unsqueeze(graph: Graph, view: _View) -> Tensor:
    x, axes = view.tensor(0), view.listed("axes", 1) or []
    rank = len(x.shape) + len(axes)
    new, rest = {a % rank for a in axes}, iter(x.shape)
    return graph.reshape(x, [1 if i in new else next(rest) for i in range(rank)])


def _pad(graph: Graph, view: _View) -> Tensor:
    x, pads = view.tensor(0), view.listed("pads", 1) or []
    view.require(view.word("mode", "constant") == "constant", "this mode of padding")
    value: Any = view.float("value", 0.0) if view.opset < 11 else view.optional(2)
    axes, rank = view.optional(3), len(x.shape)
    places = list(range(rank)) if axes is None else [int(a) % rank for a in axes.reshape(-1)]
    full = [(0, 0)] * rank
    for i, axis in enumerate(places):
        full[axis] = (pads[i], pads[i + len(places)])
    return graph.pad(x, full, 0.0 if value is None else float(np.asarray(value)))


def _dropout(graph: Graph, view: _View) -> Tensor:
    training = view.optional(2)
    view.require(training is None or not np.any(training), "training mode")
    return view.tensor(0)


def _transpose(graph: Graph, view: _View) -> Tensor:
    x = view.tensor(0)
    return graph.transpose(x, view.ints("perm", range(len(x.shape) - 1, -1, -1)))


_KNOWN: dict[str, Callable[[Graph, _View], Tensor]] = {
    "Gemm": _gemm, "MatMul": _matmul, "Add": _add, "Sub": _sub, "Mul": _mul, "Div": _div, "Conv": _conv, "Clip": _clip,
    "Neg": lambda g, v: g.times(v.tensor(0), np.asarray(-1.0)), "Relu": lambda g, v: g.relu(v.tensor(0)),
    "BatchNormalization": _batch_norm, "MaxPool": _max_pool, "AveragePool": _avg_pool, "ReduceMean": _reduce_mean,
    "GlobalAveragePool": lambda g, v: g.mean_image(v.tensor(0)), "Flatten": _flatten, "Reshape": _reshape,
    "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Pad": _pad, "Dropout": _dropout,
    "Identity": lambda g, v: v.tensor(0),
}
