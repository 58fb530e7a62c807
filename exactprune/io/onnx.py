"""``.onnx`` models (https://onnx.ai/onnx/operators), read at batch one.

The file is checked by ``onnx.checker``, brought to opset 13 or later where it is older than 7, and then walked once in
topological order. A name stands either for a constant (numpy) or for a ``Tensor`` of the graph under construction.
Nodes whose inputs are all constants are evaluated by ``onnx.reference``; ``Shape`` of a tensor is a constant too,
since all shapes are known once the batch axis is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from exactprune.errors import ExactPruneError, LoadError, ShapeError, UnsupportedOpError, WeightError
from exactprune.io.graph import Graph, Tensor, unsupported
from exactprune.network import Interface, Network
from exactprune.ops import Conv2d, Shape

Value = np.ndarray | Tensor | None

OLDEST_OPSET = 7
_BATCH = {"?": "batch"}
MAX_CONSTANT = 1 << 28
FOLDABLE = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "Identity",
        "Mul",
        "Neg",
        "Range",
        "ReduceProd",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
        "Greater",
        "Less",
        "Max",
        "Min",
        "Ceil",
        "Pow",
        "Reciprocal",
        "Not",
        "And",
        "Or",
        "Tile",
    }
)


def load_onnx(path: Path, *, input_shape: Shape | None = None) -> Network:
    """The network in an ONNX file.

    Args:
        path: of the file.
        input_shape: without batch axis, for files whose input has dynamic axes other than the batch.

    Raises:
        LoadError: the file is damaged or not ONNX.
        UnsupportedOpError, WeightError, ShapeError: see the classes.
    """
    model = _read(path)
    given, output = _ends(path, model)
    shape = _full_shape(path, given, input_shape)
    double = given.type.tensor_type.elem_type == TensorProto.DOUBLE
    graph = Graph(path.stem, shape, double, isinstance((_axes(given) or ("?",))[0], str))
    if given.type.tensor_type.elem_type == TensorProto.FLOAT16:
        graph.note("the model computes in float16; its weights, exact in float32, are what every claim is about")
    values: dict[str, Value] = {"": None, given.name: graph.input}
    values |= {t.name: _array(t, t.name) for t in model.graph.initializer}
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for index, node in enumerate(model.graph.node):
        _read_node(graph, node, index, values, opset)
    result = values.get(output.name)
    if not isinstance(result, Tensor):
        raise UnsupportedOpError(f"its output '{output.name}' does not depend on its input")
    return graph.network(result, _interface(given, output, shape, result.shape))


def _read(path: Path) -> ModelProto:
    try:
        model = onnx.load(path)
        if not model.graph.node and not model.opset_import:
            raise ValueError("no graph")
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        if not all(o.type.tensor_type.HasField("shape") for o in model.graph.output):
            model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return _converted(model)
    except onnx.checker.ValidationError as error:
        raise LoadError(f"is not a valid ONNX model ({_line(error)}); export it again") from None
    except ExactPruneError:
        raise
    except Exception as error:
        raise LoadError(
            f"is not a complete ONNX file ({type(error).__name__}: {_line(error)}); download or export it again"
        ) from None


def _converted(model: ModelProto) -> ModelProto:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions:
        raise LoadError("the model uses no standard ONNX operators; export it again")
    if min(versions) >= OLDEST_OPSET:
        return model
    from onnx import version_converter

    return version_converter.convert_version(model, 13)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


# -- input and output ------------------------------------------------------------------------------------------


def _ends(path: Path, model: ModelProto) -> tuple[ValueInfoProto, ValueInfoProto]:
    """The one input that is not a weight, and the one output."""
    weights = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    outputs = list(model.graph.output)
    if model.graph.sparse_initializer:
        raise UnsupportedOpError("has sparse weights; export it with dense ones")
    if len(inputs) != 1 or len(outputs) != 1:
        names = [i.name for i in inputs], [o.name for o in outputs]
        raise UnsupportedOpError(f"has inputs {names[0]} and outputs {names[1]}; one of each is supported")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
        raise UnsupportedOpError(f"its input '{inputs[0].name}' is not a float tensor; only float inputs are supported")
    return inputs[0], outputs[0]


def _axes(value: ValueInfoProto) -> tuple[int | str, ...]:
    """Sizes as the file has them; a dynamic axis is its name, or ``?``."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or "?" for d in dims)


def _full_shape(path: Path, given: ValueInfoProto, wanted: Shape | None) -> Shape:
    """The input's full shape at batch one.

    Raises:
        ShapeError: an axis other than the batch axis is dynamic and not given, or ``wanted`` contradicts the file.
    """
    axes = _axes(given)
    if not given.type.tensor_type.HasField("shape"):
        if wanted is None:
            raise ShapeError("does not say the shape of its input; give --input-shape (input_shape= in Python)")
        return (1, *wanted)
    has_batch = len(axes) > 1 and (isinstance(axes[0], str) or axes[0] == 1)
    inner = axes[1:] if has_batch else axes
    if wanted is not None:
        if len(inner) != len(wanted) or any(isinstance(a, int) and a != w for a, w in zip(inner, wanted, strict=True)):
            raise ShapeError(f"its input is {list(axes)}, which does not fit input shape {list(wanted)}")
        inner = wanted
    if any(isinstance(a, str) for a in inner):
        raise ShapeError(f"its input has the dynamic shape {list(axes)}; give --input-shape (input_shape= in Python)")
    return tuple(int(a) for a in ((1, *inner) if has_batch else inner))


def _interface(given: ValueInfoProto, output: ValueInfoProto, shape: Shape, result: Shape) -> Interface:
    """Names and axes of the file's ends, with the shapes found at batch one."""
    source, axes = _axes(given), _axes(output)
    return Interface(given.name, output.name, _settled(source, shape), _settled(axes, result))


def _settled(axes: Sequence[int | str], shape: Shape) -> tuple[int | str, ...]:
    """``axes`` with every dynamic one but the batch axis replaced by its size."""
    sized = zip(axes, shape, strict=True) if len(axes) == len(shape) else ((n, n) for n in shape)
    return tuple(_BATCH.get(a, a) if i == 0 and isinstance(a, str) else n for i, (a, n) in enumerate(sized))


# -- constants -------------------------------------------------------------------------------------------------


def _array(tensor: TensorProto, name: str) -> np.ndarray:
    try:
        return np.array(numpy_helper.to_array(tensor))
    except Exception as error:
        raise WeightError(
            f"weight '{name}': its data does not fit its shape {list(tensor.dims)} ({_line(error)}); export the "
            "model again"
        ) from None


def _folded(node: NodeProto, name: str, inputs: Sequence[Value], opset: int) -> np.ndarray:
    """A node of constants, evaluated."""
    from onnx.reference import ReferenceEvaluator

    if node.op_type in ("ConstantOfShape", "Expand", "Tile"):
        shape = np.asarray(inputs[0] if node.op_type == "ConstantOfShape" else inputs[1])
        if prod(int(n) for n in shape.reshape(-1)) > MAX_CONSTANT:
            raise ShapeError(
                f"node '{name}' ({node.op_type}): makes a constant of shape {shape.tolist()}, which is too large"
            )
    if node.op_type == "Range" and len(inputs) == 3:
        start, stop, step = (float(np.asarray(v)) for v in inputs)  # type: ignore[arg-type]
        if step == 0 or abs((stop - start) / step) > MAX_CONSTANT:
            raise ShapeError(f"node '{name}' (Range): makes a constant that is too large")
    feeds = {n: v for n, v in zip(node.input, inputs, strict=True) if n}
    try:
        return np.asarray(next(iter(ReferenceEvaluator(node, opsets={"": opset}).run(None, feeds))))
    except Exception as error:
        raise LoadError(
            f"node '{name}' ({node.op_type}): cannot be evaluated ({_line(error)}); export the model again"
        ) from None


# -- nodes -----------------------------------------------------------------------------------------------------


def _read_node(graph: Graph, node: NodeProto, index: int, values: dict[str, Value], opset: int) -> None:
    name = node.name or (node.output[0] if node.output and node.output[0] else f"{node.op_type}_{index}")
    if node.domain not in ("", "ai.onnx"):
        raise unsupported(name, f"{node.domain}.{node.op_type}")
    missing = [i for i in node.input if i not in values]
    if missing:
        raise LoadError(
            f"node '{name}' ({node.op_type}): reads '{missing[0]}', which nothing writes; export the model again"
        )
    inputs = [values[i] for i in node.input]
    view = _View(name, node, inputs, opset)
    extra = [o for o in node.output[1:] if o]
    if extra and node.op_type not in ("Dropout", "BatchNormalization", "MaxPool"):
        raise unsupported(name, node.op_type, f"has several outputs ({list(node.output)})")
    values[node.output[0]] = _value(graph, view)


def _value(graph: Graph, view: _View) -> Value:
    node, inputs = view.node, view.inputs
    if node.op_type == "Constant":
        return view.constant()
    if node.op_type in ("Shape", "Size") and isinstance(inputs[0], Tensor):
        return view.shape(inputs[0])
    if not any(isinstance(i, Tensor) for i in inputs):
        if node.op_type not in FOLDABLE:
            raise unsupported(
                view.name, node.op_type, "this operator on constants is not supported; export with constant folding"
            )
        return _folded(node, view.name, inputs, view.opset)
    reader = _READERS.get(node.op_type)
    if reader is None:
        raise unsupported(view.name, node.op_type)
    return reader(graph, view)


@dataclass(frozen=True)
class _View:
    """One node: its inputs and attributes, each read with its kind checked."""

    name: str
    node: NodeProto
    inputs: Sequence[Value]
    opset: int

    @property
    def attributes(self) -> Mapping[str, object]:
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    def get(self, key: str, default: object = None) -> object:
        """An attribute; strings as str."""
        value = self.attributes.get(key, default)
        return value.decode() if isinstance(value, bytes) else value

    def ints(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of integers."""
        value = self.get(key, None)
        return tuple(default) if value is None else tuple(int(v) for v in value)  # type: ignore[union-attr]

    def tensor(self, index: int) -> Tensor:
        """Input ``index``, which must depend on the network's input."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if not isinstance(value, Tensor):
            raise self.refuse(f"input {index} is a constant, where only a computed tensor is supported")
        return value

    def optional(self, index: int) -> np.ndarray | None:
        """Input ``index`` as a constant, or None where it is absent."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if isinstance(value, Tensor):
            raise self.refuse(f"input {index} is computed from the network's input, where only a constant is supported")
        return value

    def array(self, index: int) -> np.ndarray:
        """Input ``index``, which must be a constant."""
        value = self.optional(index)
        if value is None:
            raise self.refuse(f"input {index} is missing")
        return value

    def listed(self, key: str, index: int) -> tuple[int, ...] | None:
        """Integers given as an attribute (older opsets) or as an input (newer ones)."""
        if key in self.attributes:
            return self.ints(key, ())
        value = self.optional(index)
        return None if value is None else tuple(int(v) for v in value.reshape(-1))

    def refuse(self, why: str) -> UnsupportedOpError:
        """The error for a setting without a sound treatment."""
        return unsupported(self.name, self.node.op_type, why)

    def constant(self) -> np.ndarray:
        """The value of a ``Constant`` node."""
        attributes = self.attributes
        if "value" in attributes:
            return _array(attributes["value"], self.name)  # type: ignore[arg-type]
        for key, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                           ("value_ints", np.int64)):
            if key in attributes:
                return np.asarray(attributes[key], dtype=dtype)
        raise self.refuse("holds neither a tensor nor numbers")

    def shape(self, x: Tensor) -> np.ndarray:
        """The value of a ``Shape`` or ``Size`` node."""
        if self.node.op_type == "Size":
            return np.array(prod(x.shape), np.int64)
        start, end = self.get("start", 0), self.get("end", None)
        return np.array(x.shape[start:end], np.int64)  # type: ignore[misc]


def _gemm(graph: Graph, view: _View) -> Tensor:
    alpha, beta = float(view.get("alpha", 1.0)), float(view.get("beta", 1.0))  # type: ignore[arg-type]
    left, right = view.inputs[0], view.inputs[1]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        raise view.refuse("multiplies two computed tensors; only a product with a constant is supported")
    data, matrix = (left, right) if isinstance(left, Tensor) else (right, left)
    assert isinstance(data, Tensor) and isinstance(matrix, np.ndarray)
    turn_data, turn_matrix = (
        view.get("transA" if data is left else "transB", 0),
        view.get("transB" if data is left else "transA", 0),
    )
    x = graph.transpose(f"{view.name}/transpose", data, (1, 0)) if turn_data else data
    weight = _scaled(graph, view.name, graph.numbers(view.name, matrix.T if turn_matrix else matrix), alpha)
    third = view.inputs[2] if len(view.inputs) > 2 else None
    bias = (
        None
        if third is None or isinstance(third, Tensor)
        else _scaled(graph, view.name, graph.numbers(view.name, third), beta)
    )
    y = _product(graph, view, x, weight, data is left, bias)
    if isinstance(third, Tensor):
        y = graph.add(
            f"{view.name}/add", y, third if beta == 1 else graph.times(f"{view.name}/beta", third, np.asarray(beta))
        )
    return y


def _scaled(graph: Graph, name: str, array: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1:
        return array
    if abs(np.frexp(factor)[0]) != 0.5:
        graph.note(f"the factor {factor:g} at '{name}' was multiplied into the weights, rounded")
    return (array.astype(np.float64) * factor).astype(array.dtype)


def _product(
    graph: Graph, view: _View, x: Tensor, matrix: np.ndarray, data_left: bool, bias: np.ndarray | None
) -> Tensor:
    """x @ matrix or matrix @ x, plus a bias that broadcasts to the result."""
    outputs = matrix.shape[1] if data_left else matrix.shape[0]
    rows = 1 if len(x.shape) < 2 else (prod(x.shape[:-1]) if data_left else x.shape[-1])
    vector = None if bias is None else _bias_vector(bias, outputs, rows, data_left)
    product = graph.linear if data_left else graph.left_product
    y = product(view.name, x, matrix.T if data_left else matrix, vector)
    return y if bias is None or vector is not None else graph.shifted(f"{view.name}/bias", y, bias)


def _bias_vector(bias: np.ndarray, outputs: int, rows: int, data_left: bool) -> np.ndarray | None:
    """``bias`` as one number per output, or None where it differs between rows."""
    if bias.size == 1:
        return np.broadcast_to(bias.reshape(1), (outputs,))
    fits = bias.size == outputs and (
        rows == 1 or (bias.shape[-1] == outputs if data_left else bias.shape == (outputs, 1))
    )
    return bias.reshape(outputs) if fits else None


def _matmul(graph: Graph, view: _View) -> Tensor:
    left, right = view.inputs
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        raise view.refuse("multiplies two computed tensors; only a product with a constant is supported")
    x, matrix = (left, right) if isinstance(left, Tensor) else (right, left)
    assert isinstance(x, Tensor) and isinstance(matrix, np.ndarray)
    weight = graph.numbers(view.name, matrix)
    vector = weight.ndim == 1
    weight = weight.reshape((-1, 1) if x is left else (1, -1)) if vector else weight
    rank = max(weight.ndim, len(x.shape))
    if weight.ndim > 2 and prod(weight.shape[:-2]) != 1:
        raise view.refuse(f"a stack of matrices of shape {matrix.shape} is not supported")
    y = _product(graph, view, x, weight.reshape(weight.shape[-2:]), x is left, None)
    if vector:
        shape = y.shape[:-1] if x is left else (*y.shape[:-2], *y.shape[-1:])
        return Tensor(y.position, shape)
    return Tensor(y.position, (*[1] * (rank - len(y.shape)), *y.shape)) if len(x.shape) > 1 else y


def _add(graph: Graph, view: _View) -> Tensor:
    x, y = view.inputs
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return graph.add(view.name, x, y)
    data, constant = (x, y) if isinstance(x, Tensor) else (y, x)
    assert isinstance(data, Tensor) and constant is not None and not isinstance(constant, Tensor)
    return graph.shifted(view.name, data, graph.numbers(view.name, constant))


def _sub(graph: Graph, view: _View) -> Tensor:
    x, y = view.inputs
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return graph.add(view.name, x, graph.times(f"{view.name}/neg", y, np.asarray(-1.0)))
    if isinstance(x, Tensor):
        return graph.shifted(view.name, x, -graph.numbers(view.name, view.array(1)))
    constant = graph.numbers(view.name, view.array(0))
    return graph.scale(view.name, view.tensor(1), np.full((), -1, constant.dtype), constant)


def _mul(graph: Graph, view: _View) -> Tensor:
    x, y = view.inputs
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        raise view.refuse("multiplies two computed tensors; only a product with a constant is supported")
    data, at = (view.tensor(0), 1) if isinstance(x, Tensor) else (view.tensor(1), 0)
    return graph.times(view.name, data, graph.numbers(view.name, view.array(at)))


def _div(graph: Graph, view: _View) -> Tensor:
    return graph.divide(view.name, view.tensor(0), graph.numbers(view.name, view.array(1)))


def _neg(graph: Graph, view: _View) -> Tensor:
    return graph.times(view.name, view.tensor(0), np.asarray(-1.0))


def _relu(graph: Graph, view: _View) -> Tensor:
    return graph.relu(view.name, view.tensor(0))


def _clip(graph: Graph, view: _View) -> Tensor:
    low = view.get("min") if view.opset < 11 else view.optional(1)
    high = view.get("max") if view.opset < 11 else view.optional(2)
    unbounded = high is None or float(np.asarray(high)) >= float(np.finfo(np.float32).max)
    if low is None or float(np.asarray(low)) != 0 or not unbounded:
        raise view.refuse(f"clips to [{low}, {high}]; only max(x, 0) is supported")
    return graph.relu(view.name, view.tensor(0))


def _max(graph: Graph, view: _View) -> Tensor:
    constants = [i for i in view.inputs if isinstance(i, np.ndarray)]
    data = [i for i in view.inputs if isinstance(i, Tensor)]
    if len(constants) != 1 or len(data) != 1 or np.any(constants[0]) or prod(constants[0].shape) != 1:
        raise view.refuse("only max(x, 0) is supported")
    return graph.relu(view.name, data[0])


def _windows(
    view: _View, kernel: Sequence[int], x: Tensor
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]:
    """(stride, dilation, padding) of a convolution or pool; a 1-D one gets height 1."""
    rank = len(kernel)
    stride, dilation = view.ints("strides", [1] * rank), view.ints("dilations", [1] * rank)
    pads = list(view.ints("pads", [0] * 2 * rank))
    if rank not in (1, 2) or len(x.shape) != rank + 2 or not len(stride) == len(dilation) == len(pads) // 2 == rank:
        raise view.refuse(f"kernel {list(kernel)} on shape {x.shape}: only 1-D and 2-D windows are supported")
    pads = _auto_pads(view, pads, kernel, stride, dilation, x.shape[2:])
    if min(pads) < 0 or min(*stride, *dilation, *kernel) < 1:
        raise view.refuse(f"pads {pads}, strides {stride}, dilations {dilation} are not usable")
    if rank == 1:
        return (1, stride[0]), (1, dilation[0]), (0, pads[0], 0, pads[1])
    return (stride[0], stride[1]), (dilation[0], dilation[1]), (pads[0], pads[1], pads[2], pads[3])


def _auto_pads(view: _View, pads: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
               size: Sequence[int]) -> list[int]:
    mode = view.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return list(pads)
    if mode == "VALID":
        return [0] * len(pads)
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise view.refuse(f"auto_pad {mode!r} is not known")
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    total = [max(0, (-(-n // s) - 1) * s + span - n) for n, s, span in zip(size, stride, spans, strict=True)]
    small = [t // 2 for t in total]
    large = [t - t // 2 for t in total]
    return small + large if mode == "SAME_UPPER" else large + small


def _conv(graph: Graph, view: _View) -> Tensor:
    x, weight, bias = view.tensor(0), graph.numbers(view.name, view.array(1)), view.optional(2)
    stride, dilation, padding = _windows(view, weight.shape[2:], x)
    weight = weight[:, :, None, :] if weight.ndim == 3 else weight
    numbers = np.zeros(weight.shape[0], weight.dtype) if bias is None else graph.numbers(view.name, bias)
    op = Conv2d(weight, numbers, stride, padding, dilation, int(view.get("group", 1)))  # type: ignore[arg-type]
    return graph.convolution(view.name, x, op, bias is None)


def _batch_norm(graph: Graph, view: _View) -> Tensor:
    if view.get("training_mode", 0) or len([o for o in view.node.output if o]) > 1:
        raise view.refuse("is in training mode, so its output depends on the batch; export after model.eval()")
    gamma, beta, mean, var = (view.array(i) for i in (1, 2, 3, 4))
    return graph.batch_norm(view.name, view.tensor(0), gamma, beta, mean, var, float(view.get("epsilon", 1e-5)))  # type: ignore[arg-type]


def _kernel(view: _View) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(kernel as a pair, kernel as given)."""
    given = view.ints("kernel_shape", ())
    return ((1, given[0]) if len(given) == 1 else (given[0], given[-1])) if given else (0, 0), given


def _max_pool(graph: Graph, view: _View) -> Tensor:
    if view.get("storage_order", 0) or len([o for o in view.node.output if o]) > 1:
        raise view.refuse("gives indices; only the values are supported")
    kernel, given = _kernel(view)
    stride, dilation, padding = _windows(view, given, view.tensor(0))
    return graph.max_pool(view.name, view.tensor(0), kernel, stride, padding, dilation, bool(view.get("ceil_mode", 0)))


def _avg_pool(graph: Graph, view: _View) -> Tensor:
    kernel, given = _kernel(view)
    stride, dilation, padding = _windows(view, given, view.tensor(0))
    if dilation != (1, 1):
        raise view.refuse("dilated average pooling is not supported")
    include = bool(view.get("count_include_pad", 0))
    return graph.avg_pool(
        view.name, view.tensor(0), kernel, stride, padding, include or not any(padding), bool(view.get("ceil_mode", 0))
    )


def _global_avg_pool(graph: Graph, view: _View) -> Tensor:
    x = view.tensor(0)
    return graph.mean(view.name, x, range(2, len(x.shape)), True)


def _global_max_pool(graph: Graph, view: _View) -> Tensor:
    x = view.tensor(0)
    size = (x.shape[2], x.shape[3]) if len(x.shape) == 4 else (1, x.shape[-1])
    return graph.max_pool(view.name, x, size, size, (0, 0, 0, 0), (1, 1), False)


def _reduce_mean(graph: Graph, view: _View) -> Tensor:
    x, axes = view.tensor(0), view.listed("axes", 1)
    if axes is None and view.get("noop_with_empty_axes", 0):
        return x
    axes = axes or tuple(range(len(x.shape)))
    _keep_batch(view, x, axes)
    return graph.mean(view.name, x, axes, bool(view.get("keepdims", 1)))


def _reduce_sum(graph: Graph, view: _View) -> Tensor:
    x, axes = view.tensor(0), view.listed("axes", 1)
    if axes is None and view.get("noop_with_empty_axes", 0):
        return x
    axes = axes or tuple(range(len(x.shape)))
    _keep_batch(view, x, axes)
    count = prod(x.shape[a % len(x.shape)] for a in axes)
    y = graph.mean(f"{view.name}/mean", x, axes, bool(view.get("keepdims", 1)))
    return graph.times(view.name, y, np.asarray(float(count)))


def _keep_batch(view: _View, x: Tensor, axes: Sequence[int]) -> None:
    if x.shape != x.layout and 0 in {a % len(x.shape) for a in axes}:
        raise view.refuse("reduces the batch axis, which mixes the samples of a batch")


def _flatten(graph: Graph, view: _View) -> Tensor:
    x, axis = view.tensor(0), int(view.get("axis", 1))  # type: ignore[arg-type]
    axis = axis + len(x.shape) if axis < 0 else axis
    return graph.reshape(view.name, x, (prod(x.shape[:axis]), prod(x.shape[axis:])))


def _reshape(graph: Graph, view: _View) -> Tensor:
    x, shape = view.tensor(0), list(view.listed("shape", 1) or ())
    if not view.get("allowzero", 0):
        shape = [x.shape[i] if n == 0 and i < len(x.shape) else n for i, n in enumerate(shape)]
    return graph.reshape(view.name, x, shape)


def _transpose(graph: Graph, view: _View) -> Tensor:
    x = view.tensor(0)
    return graph.transpose(view.name, x, view.ints("perm", range(len(x.shape) - 1, -1, -1)))


def _squeeze(graph: Graph, view: _View) -> Tensor:
    return graph.squeeze(view.name, view.tensor(0), view.listed("axes", 1))


def _unsqueeze(graph: Graph, view: _View) -> Tensor:
    return graph.unsqueeze(view.name, view.tensor(0), view.listed("axes", 1) or ())


def _pad(graph: Graph, view: _View) -> Tensor:
    x, pads = view.tensor(0), view.listed("pads", 1) or ()
    if view.get("mode", "constant") != "constant":
        raise view.refuse(f"mode {view.get('mode')!r}; only constant padding is supported")
    value = view.get("value", 0.0) if view.opset < 11 else view.optional(2)
    axes = view.optional(3)
    rank = len(x.shape)
    places = range(rank) if axes is None else [int(a) % rank for a in axes.reshape(-1)]
    full = [(0, 0)] * rank
    for i, axis in enumerate(places):
        full[axis] = (int(pads[i]), int(pads[i + len(places)]))
    return graph.pad(view.name, x, full, 0.0 if value is None else float(np.asarray(value)))


def _concat(graph: Graph, view: _View) -> Tensor:
    parts = [view.tensor(i) for i in range(len(view.inputs))]
    return graph.concat(view.name, parts, int(view.get("axis", 1)))  # type: ignore[arg-type]


def _dropout(graph: Graph, view: _View) -> Tensor:
    training = view.optional(2)
    if training is not None and bool(np.any(training)):
        raise view.refuse("is in training mode; export after model.eval()")
    if len([o for o in view.node.output if o]) > 1:
        raise view.refuse("gives its mask as an output; export after model.eval()")
    return view.tensor(0)


def _identity(graph: Graph, view: _View) -> Tensor:
    return view.tensor(0)


def _cast(graph: Graph, view: _View) -> Tensor:
    target = view.get("to")
    if target not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        raise view.refuse("only casts to float32 and float64 are supported")
    graph.note(f"the cast at '{view.name}' is taken as the identity: claims are about real functions")
    return view.tensor(0)


_READERS: dict[str, Callable[[Graph, _View], Tensor]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Neg": _neg,
    "Relu": _relu,
    "Clip": _clip,
    "Max": _max,
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "MaxPool": _max_pool,
    "AveragePool": _avg_pool,
    "GlobalAveragePool": _global_avg_pool,
    "GlobalMaxPool": _global_max_pool,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Concat": _concat,
    "Dropout": _dropout,
    "Identity": _identity,
    "Cast": _cast,
}
