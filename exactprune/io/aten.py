"""The ATen operators of a ``torch.export`` program, read at batch one.

``Call`` is one operator call with its arguments by name (https://docs.pytorch.org/docs/stable/torch.compiler_ir.html);
a value is a ``Tensor`` of the graph under construction, a constant (numpy), a number, or None. Calls on constants
alone are evaluated by PyTorch itself, for the operators of a short list only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from exactprune.errors import LoadError, ShapeError, UnsupportedOpError
from exactprune.io.graph import Graph, Tensor, unsupported
from exactprune.ops import Conv2d

FOLDABLE = frozenset(
    {
        "abs",
        "add",
        "alias",
        "arange",
        "cat",
        "clone",
        "contiguous",
        "detach",
        "detach_",
        "div",
        "expand",
        "eye",
        "flatten",
        "full",
        "lift_fresh_copy",
        "linalg_vector_norm",
        "matmul",
        "mean",
        "mul",
        "neg",
        "norm",
        "numpy_T",
        "ones",
        "ones_like",
        "permute",
        "pow",
        "reciprocal",
        "reshape",
        "rsqrt",
        "rsub",
        "select",
        "slice",
        "sqrt",
        "squeeze",
        "stack",
        "sub",
        "sum",
        "t",
        "to",
        "_to_copy",
        "transpose",
        "unsqueeze",
        "view",
        "zeros",
        "zeros_like",
        "_weight_norm",
        "_weight_norm_interface",
        "mm",
        "tril",
        "triu",
    }
)
INTEGERS: Mapping[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b}
MAX_CONSTANT = 1 << 28


@dataclass(frozen=True)
class Call:
    """One operator call.

    Attributes:
        name: of its result, for people.
        target: ``torch.ops.aten.<operator>.<overload>`` or ``_operator.<function>``.
        arguments: by name; absent ones have their default.
    """

    name: str
    target: str
    arguments: Mapping[str, object]

    @property
    def operator(self) -> str:
        """The operator's own name, for example ``conv2d``."""
        parts = self.target.split(".")
        return parts[3] if self.target.startswith("torch.ops.aten.") and len(parts) > 3 else parts[-1]

    def get(self, key: str, default: object = None) -> object:
        """An argument that may be absent."""
        value = self.arguments.get(key)
        return default if value is None else value

    def tensor(self, *keys: str) -> Tensor:
        """The argument under the first of ``keys``, which must depend on the network's input."""
        value = next((self.arguments[k] for k in keys if k in self.arguments), None)
        if isinstance(value, Tensor):
            return value
        raise self.refuse(f"{keys[0]} is a constant, where only a computed tensor is supported")

    def array(self, graph: Graph, key: str) -> np.ndarray:
        """A weight."""
        value = self.optional(graph, key)
        if value is None:
            raise self.refuse(f"{key} is missing")
        return value

    def optional(self, graph: Graph, key: str) -> np.ndarray | None:
        """A weight that may be absent."""
        value = self.arguments.get(key)
        if isinstance(value, Tensor):
            raise self.refuse(f"{key} is computed from the network's input, where only a constant is supported")
        return None if value is None else graph.numbers(self.name, np.asarray(value))

    def ints(self, key: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """One integer or several."""
        value = self.get(key, default)
        values = (value,) if isinstance(value, int) else value
        if isinstance(values, list | tuple) and all(isinstance(v, int) for v in values):
            return tuple(values)
        raise self.refuse(f"{key} is {value!r}, where integers are expected")

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        return bool(self.get(key, default))

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.get(key, default)
        if isinstance(value, int | float):
            return float(value)
        raise self.refuse(f"{key} is {value!r}, where a number is expected")

    def refuse(self, why: str) -> UnsupportedOpError:
        """The error for a setting without a sound treatment."""
        return unsupported(self.name, self.operator, why)


def evaluate(graph: Graph, call: Call) -> object:
    """The value of ``call``; None for calls that only check something.

    Raises:
        UnsupportedOpError: the operator, or a setting of it, is not supported.
    """
    values = [v for a in call.arguments.values() for v in (a if isinstance(a, list | tuple) else (a,))]
    if call.operator in (
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range_for_size",
        "sym_constrain_range",
    ):
        return None
    if call.target.startswith("_operator."):
        return _integer(call, values)
    if call.operator == "sym_size":
        shape = call.tensor("self").shape
        return shape[call.ints("dim")[0]]
    if not any(isinstance(v, Tensor) for v in values):
        return _folded(call)
    reader = _READERS.get(call.operator)
    if reader is None or not call.target.startswith("torch.ops.aten."):
        raise unsupported(call.name, call.operator)
    return reader(graph, call)


def _integer(call: Call, values: Sequence[object]) -> int:
    function = INTEGERS.get(call.operator)
    if function is None or len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise unsupported(call.name, call.target, "only integer arithmetic on sizes is supported")
    return function(*values)  # type: ignore[arg-type]


def _folded(call: Call) -> np.ndarray:
    """A call on constants, evaluated by PyTorch."""
    import torch

    if call.operator not in FOLDABLE or not call.target.startswith("torch.ops.aten."):
        raise unsupported(call.name, call.operator)
    sizes = call.arguments.get("size")
    if isinstance(sizes, list | tuple) and prod(int(n) for n in sizes) > MAX_CONSTANT:
        raise ShapeError(
            f"node '{call.name}' ({call.operator}): makes a constant of shape {list(sizes)}, which is too large"
        )
    overload = call.target.split(".")[4]
    function = getattr(getattr(torch.ops.aten, call.operator), overload)
    skip = ("device", "pin_memory", "layout", "memory_format")
    given = {
        k: getattr(torch, str(v)) if k == "dtype" else _to_torch(v)
        for k, v in call.arguments.items()
        if k not in skip and v is not None
    }
    names = [a.name for a in function._schema.arguments]
    positional = []
    for name in names:
        if name not in given or function._schema.arguments[len(positional)].kwarg_only:
            break
        positional.append(given.pop(name))
    try:
        with torch.no_grad():
            result = function(*positional, **given)
    except Exception as error:
        raise LoadError(
            f"node '{call.name}' ({call.operator}): cannot be evaluated ({' '.join(str(error).split())[:160]})"
        ) from None
    return (result[0] if isinstance(result, tuple) else result).numpy()


def _to_torch(value: object) -> object:
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return [_to_torch(v) for v in value] if isinstance(value, list | tuple) else value


# -- products --------------------------------------------------------------------------------------------------


def _linear(graph: Graph, call: Call) -> Tensor:
    return graph.linear(call.name, call.tensor("input"), call.array(graph, "weight"), call.optional(graph, "bias"))


def _matmul(graph: Graph, call: Call) -> Tensor:
    left, right = call.arguments["self"], call.arguments.get("other", call.arguments.get("mat2"))
    return _product(graph, call, left, right, None)


def _product(graph: Graph, call: Call, left: object, right: object, bias: np.ndarray | None) -> Tensor:
    data, matrix = (left, right) if isinstance(left, Tensor) else (right, left)
    if not isinstance(data, Tensor) or isinstance(matrix, Tensor):
        raise call.refuse("multiplies two computed tensors; only a product with a constant is supported")
    weight = graph.numbers(call.name, np.asarray(matrix))
    if weight.ndim > 2 and prod(weight.shape[:-2]) == 1 and len(data.shape) >= weight.ndim:
        weight = weight.reshape(weight.shape[-2:])
    if weight.ndim not in (1, 2):
        raise call.refuse(f"a stack of matrices of shape {weight.shape} is not supported")
    if weight.ndim == 1:
        matrix = weight.reshape(1, -1)
        y = (
            graph.linear(call.name, data, matrix, bias)
            if data is left
            else graph.left_product(call.name, data, matrix, bias)
        )
        return Tensor(y.position, y.shape[:-1] if data is left else (*y.shape[:-2], *y.shape[-1:]))
    if data is left:
        return graph.linear(call.name, data, weight.T, bias)
    return graph.left_product(call.name, data, weight, bias)


def _addmm(graph: Graph, call: Call) -> Tensor:
    first = call.arguments["self"]
    factors = call.number("alpha", 1.0), call.number("beta", 1.0)
    if factors != (1.0, 1.0):
        raise call.refuse("factors alpha and beta other than 1 are not supported")
    y = _product(graph, call, call.arguments["mat1"], call.arguments["mat2"], None)
    if isinstance(first, Tensor):
        return graph.add(f"{call.name}/add", y, first)
    return graph.shifted(f"{call.name}/bias", y, graph.numbers(call.name, np.asarray(first)))


# -- elementwise -----------------------------------------------------------------------------------------------


def _constant(graph: Graph, call: Call, value: object) -> np.ndarray:
    """A tensor constant, or a Python number (which takes the dtype of the tensor it meets)."""
    if isinstance(value, int | float):
        return np.asarray(float(value))
    return graph.numbers(call.name, np.asarray(value))


def _add(graph: Graph, call: Call) -> Tensor:
    return _sum(graph, call, call.arguments["self"], call.arguments["other"], 1.0)


def _sub(graph: Graph, call: Call) -> Tensor:
    return _sum(graph, call, call.arguments["self"], call.arguments["other"], -1.0)


def _rsub(graph: Graph, call: Call) -> Tensor:
    return _sum(graph, call, call.arguments["other"], call.arguments["self"], -1.0)


def _sum(graph: Graph, call: Call, x: object, y: object, sign: float) -> Tensor:
    """x + sign * y."""
    if call.number("alpha", 1.0) != 1:
        raise call.refuse("alpha other than 1 is not supported")
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        y = y if sign == 1 else graph.times(f"{call.name}/neg", y, np.asarray(sign))
        return graph.add(call.name, x, y)
    if isinstance(x, Tensor):
        return graph.shifted(call.name, x, sign * _constant(graph, call, y))
    assert isinstance(y, Tensor)
    constant = _constant(graph, call, x)
    return graph.shifted(call.name, y, constant) if sign == 1 else graph.scale(call.name, y, np.asarray(sign), constant)


def _mul(graph: Graph, call: Call) -> Tensor:
    x, y = call.arguments["self"], call.arguments["other"]
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        raise call.refuse("multiplies two computed tensors; only a product with a constant is supported")
    data, factor = (x, y) if isinstance(x, Tensor) else (y, x)
    assert isinstance(data, Tensor)
    return graph.times(call.name, data, _constant(graph, call, factor))


def _div(graph: Graph, call: Call) -> Tensor:
    if call.get("rounding_mode") is not None or isinstance(call.arguments["other"], Tensor):
        raise call.refuse("only division by a constant is supported")
    return graph.divide(call.name, call.tensor("self"), _constant(graph, call, call.arguments["other"]))


def _neg(graph: Graph, call: Call) -> Tensor:
    return graph.times(call.name, call.tensor("self"), np.asarray(-1.0))


def _relu(graph: Graph, call: Call) -> Tensor:
    return graph.relu(call.name, call.tensor("self"))


def _clamp(graph: Graph, call: Call) -> Tensor:
    if call.get("max") is not None or call.get("min") != 0:
        raise call.refuse(f"clamps to [{call.get('min')}, {call.get('max')}]; only max(x, 0) is supported")
    return graph.relu(call.name, call.tensor("self"))


def _threshold(graph: Graph, call: Call) -> Tensor:
    if call.number("threshold", 1.0) != 0 or call.number("value", 1.0) != 0:
        raise call.refuse("only max(x, 0) is supported")
    return graph.relu(call.name, call.tensor("self"))


def _identity(graph: Graph, call: Call) -> Tensor:
    return call.tensor("self", "input")


def _dropout(graph: Graph, call: Call) -> Tensor:
    if call.flag("train"):
        graph.note(f"dropout at '{call.name}' is taken as in evaluation mode, the identity")
    return call.tensor("input", "self")


def _cast(graph: Graph, call: Call) -> Tensor:
    if call.get("dtype") not in (None, "float32", "float64"):
        raise call.refuse("only casts to float32 and float64 are supported")
    if call.get("dtype") is not None:
        graph.note(f"the cast at '{call.name}' is taken as the identity: claims are about real functions")
    return call.tensor("self")


# -- images ----------------------------------------------------------------------------------------------------


def _pair(call: Call, key: str, default: Sequence[int], rank: int) -> tuple[int, int]:
    """One or two integers >= 0; in one dimension the height's is ``default``'s neutral value."""
    values = call.ints(key, default) or tuple(default)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank or min(values) < 0:
        raise call.refuse(f"{key} is {list(values)}")
    neutral = 0 if key == "padding" else 1
    return (neutral, values[0]) if rank == 1 else (values[0], values[1])


def _conv(graph: Graph, call: Call) -> Tensor:
    weight = call.array(graph, "weight")
    rank = weight.ndim - 2
    if rank not in (1, 2) or call.flag("transposed"):
        raise call.refuse("only 1-D and 2-D convolutions that are not transposed are supported")
    weight = weight[:, :, None, :] if rank == 1 else weight
    stride, dilation = _pair(call, "stride", (1,), rank), _pair(call, "dilation", (1,), rank)
    if min(*stride, *dilation) < 1:
        raise call.refuse("stride and dilation must be at least 1")
    padding = _conv_padding(call, weight.shape[2:], dilation, rank)
    bias = call.optional(graph, "bias")
    numbers = np.zeros(weight.shape[0], weight.dtype) if bias is None else bias
    op = Conv2d(weight, numbers, stride, padding, dilation, call.ints("groups", (1,))[0])
    return graph.convolution(call.name, call.tensor("input"), op, bias is None)


def _conv_padding(call: Call, kernel: Sequence[int], dilation: Sequence[int], rank: int) -> tuple[int, int, int, int]:
    word = call.get("padding")
    if word == "valid":
        return (0, 0, 0, 0)
    if word == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    padding = _pair(call, "padding", (0,), rank)
    return (*padding, *padding)


def _batch_norm(graph: Graph, call: Call) -> Tensor:
    mean, var = call.optional(graph, "running_mean"), call.optional(graph, "running_var")
    if call.flag("training") or mean is None or var is None:
        raise call.refuse(
            "is in training mode, or keeps no running statistics, so its output depends on the batch; call "
            "model.eval() first"
        )
    gamma, beta = call.optional(graph, "weight"), call.optional(graph, "bias")
    return graph.batch_norm(call.name, call.tensor("input"), gamma, beta, mean, var, call.number("eps", 1e-5))


def _rank(call: Call) -> int:
    return 1 if "1d" in call.operator else 2


def _max_pool(graph: Graph, call: Call) -> Tensor:
    rank = _rank(call)
    kernel = _pair(call, "kernel_size", (), rank)
    given = call.ints("stride", ()) or call.ints("kernel_size")
    stride = (1, given[-1]) if rank == 1 else (given[0], given[-1])
    padding, dilation = _pair(call, "padding", (0,), rank), _pair(call, "dilation", (1,), rank)
    return graph.max_pool(
        call.name, call.tensor("self"), kernel, stride, (*padding, *padding), dilation, call.flag("ceil_mode")
    )


def _avg_pool(graph: Graph, call: Call) -> Tensor:
    rank = _rank(call)
    if call.get("divisor_override") is not None:
        raise call.refuse("divisor_override is not supported")
    kernel = _pair(call, "kernel_size", (), rank)
    given = call.ints("stride", ()) or call.ints("kernel_size")
    stride = (1, given[-1]) if rank == 1 else (given[0], given[-1])
    padding = _pair(call, "padding", (0,), rank)
    return graph.avg_pool(call.name, call.tensor("self"), kernel, stride, (*padding, *padding),
                          call.flag("count_include_pad", True), call.flag("ceil_mode"))


def _adaptive(graph: Graph, call: Call) -> Tensor:
    return graph.adaptive_avg_pool(call.name, call.tensor("self"), call.ints("output_size"))


def _mean(graph: Graph, call: Call) -> Tensor:
    x = call.tensor("self")
    return graph.mean(call.name, x, _axes(call, x), call.flag("keepdim"))


def _sum_axes(graph: Graph, call: Call) -> Tensor:
    x = call.tensor("self")
    axes = _axes(call, x)
    count = prod(x.shape[a % len(x.shape)] for a in axes)
    y = graph.mean(f"{call.name}/mean", x, axes, call.flag("keepdim"))
    return graph.times(call.name, y, np.asarray(float(count)))


def _axes(call: Call, x: Tensor) -> tuple[int, ...]:
    axes = call.ints("dim", ()) or tuple(range(len(x.shape)))
    if x.shape != x.layout and 0 in {a % len(x.shape) for a in axes}:
        raise call.refuse("reduces the batch axis, which mixes the samples of a batch")
    return axes


# -- layout ----------------------------------------------------------------------------------------------------


def _flatten(graph: Graph, call: Call) -> Tensor:
    x = call.tensor("self")
    return graph.flatten(call.name, x, call.ints("start_dim", (0,))[0], call.ints("end_dim", (-1,))[0])


def _view(graph: Graph, call: Call) -> Tensor:
    key = "shape" if "shape" in call.arguments else "size"
    return graph.reshape(call.name, call.tensor("self"), call.ints(key))


def _unflatten(graph: Graph, call: Call) -> Tensor:
    x, axis, sizes = call.tensor("self"), call.ints("dim")[0], call.ints("sizes")
    axis %= len(x.shape)
    if -1 in sizes:
        rest = prod(n for n in sizes if n != -1)
        sizes = tuple(x.shape[axis] // rest if n == -1 else n for n in sizes)
    return graph.reshape(call.name, x, (*x.shape[:axis], *sizes, *x.shape[axis + 1:]))


def _squeeze(graph: Graph, call: Call) -> Tensor:
    x = call.tensor("self")
    if "dim" not in call.arguments:
        return graph.squeeze(call.name, x, None)
    return graph.squeeze(call.name, x, [a for a in call.ints("dim") if x.shape[a] == 1])


def _unsqueeze(graph: Graph, call: Call) -> Tensor:
    return graph.unsqueeze(call.name, call.tensor("self"), call.ints("dim"))


def _permute(graph: Graph, call: Call) -> Tensor:
    return graph.transpose(call.name, call.tensor("self"), call.ints("dims"))


def _swap(graph: Graph, call: Call) -> Tensor:
    x = call.tensor("self")
    order = list(range(len(x.shape)))
    first, second = (call.ints(k, d)[0] for k, d in (("dim0", (0,)), ("dim1", (1,))))
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return graph.transpose(call.name, x, order)


def _pad(graph: Graph, call: Call) -> Tensor:
    x, pads = call.tensor("self"), call.ints("pad")
    if call.get("mode", "constant") != "constant":
        raise call.refuse(f"mode {call.get('mode')!r}; only constant padding is supported")
    full = [(0, 0)] * len(x.shape)
    for i in range(len(pads) // 2):
        full[-1 - i] = (pads[2 * i], pads[2 * i + 1])
    return graph.pad(call.name, x, full, call.number("value", 0.0))


def _cat(graph: Graph, call: Call) -> Tensor:
    parts = call.arguments["tensors"]
    if not isinstance(parts, list | tuple) or not all(isinstance(p, Tensor) for p in parts):
        raise call.refuse("joins constants to computed tensors, which is not supported")
    return graph.concat(call.name, parts, call.ints("dim", (0,))[0])


_READERS: dict[str, Callable[[Graph, Call], Tensor]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "add": _add,
    "add_": _add,
    "sub": _sub,
    "sub_": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "mul_": _mul,
    "div": _div,
    "div_": _div,
    "neg": _neg,
    "relu": _relu,
    "relu_": _relu,
    "clamp": _clamp,
    "clamp_": _clamp,
    "clamp_min": _clamp,
    "clamp_min_": _clamp,
    "threshold": _threshold,
    "conv1d": _conv,
    "conv2d": _conv,
    "convolution": _conv,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "max_pool1d": _max_pool,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool1d": _adaptive,
    "adaptive_avg_pool2d": _adaptive,
    "_adaptive_avg_pool2d": _adaptive,
    "mean": _mean,
    "sum": _sum_axes,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "_unsafe_view": _view,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    "transpose": _swap,
    "t": _swap,
    "numpy_T": _swap,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "cat": _cat,
    "to": _cast,
    "_to_copy": _cast,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "alpha_dropout": _dropout,
    "feature_alpha_dropout": _dropout,
    "native_dropout": _dropout,
    "dropout_": _dropout,
    **dict.fromkeys(("clone", "contiguous", "detach", "detach_", "alias", "lift_fresh_copy"), _identity),
}
