"""``.pt`` and ``.pth``: a whole ``nn.Sequential`` (nested too), or a ``state_dict`` with its architecture.

``archive`` turns the file into inert records; this file gives them a meaning. Only the exact ``torch.nn`` classes
below are known, and only where nothing in the record could make PyTorch compute something else: no hooks, no attribute
that holds a tensor or a module outside its place, no ``forward``. Batch norm must be in evaluation mode; dropout is
the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from exactprune.errors import LoadError, OptionError, ShapeError, UnsupportedOpError, WeightError
from exactprune.io.archive import REMEDY, Module, read, tensors
from exactprune.io.graph import Graph, Tensor, unsupported
from exactprune.network import Interface, Network
from exactprune.ops import Conv2d, Shape, pair

MAX_LAYERS = 20_000
_PLAIN = (str, int, float, bool, type(None))
_IDENTITY = frozenset(
    {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}
)


def load_pt(path: Path, *, input_shape: Shape | None = None, arch: str | None = None) -> Network:
    """The network in a ``.pt`` file.

    Args:
        path: of the file.
        input_shape: without batch axis; needed where the first layer does not tell it (a convolution).
        arch: for a ``state_dict``: ``"784-100-10"``, the sizes of a ReLU network of Linear layers.

    Raises:
        LoadError: the file is damaged, unsafe, or holds something else.
        UnsupportedOpError, WeightError, ShapeError: see the classes.
    """
    value = read(path)
    state = tensors(value)
    if state is None and isinstance(value, dict):
        state = next((s for key in ("state_dict", "model_state_dict", "model") if (s := tensors(value.get(key)))), None)
    if isinstance(value, Module):
        if arch is not None:
            raise OptionError(f"holds a whole model, so an architecture ({arch}) cannot be given as well")
        return from_module(value, path.stem, input_shape)
    if state is None:
        raise LoadError(f"holds {_words(value)}, not a model; save an nn.Sequential or a state_dict")
    if arch is None:
        raise LoadError("holds a state_dict, which does not say how its layers are connected; give the architecture "
                        "(--arch 784-100-10 for a ReLU network of Linear layers), or save the whole nn.Sequential")
    return from_state_dict(state, arch, path.stem, input_shape)


def from_state_dict(state: Mapping[str, np.ndarray], arch: str, name: str, input_shape: Shape | None = None) -> Network:
    """A ReLU network of Linear layers, the weights taken in the order of the ``state_dict``.

    Raises:
        LoadError: names or shapes do not fit ``arch``.
    """
    sizes = parse_arch(arch)
    weights = [(k, a) for k, a in state.items() if k.rpartition(".")[2] == "weight"]
    biases = {k.rpartition(".")[0]: a for k, a in state.items() if k.rpartition(".")[2] == "bias"}
    other = sorted(set(state) - {k for k, _ in weights} - {f"{k}.bias" if k else "bias" for k in biases})
    wanted = [(outputs, inputs) for inputs, outputs in pairwise(sizes)]
    given = [a.shape for _, a in weights]
    if other or given != wanted:
        what = f"also {other[0]}" if other else f"weights of shapes {given}"
        raise LoadError(f"the architecture {arch} needs weights of shapes {wanted}, the state_dict has {what}")
    graph = Graph(name, (1, *(input_shape or sizes[:1])))
    x = graph.flatten("flatten", graph.input, 1, -1)
    for i, (key, weight) in enumerate(weights):
        layer = key.rpartition(".")[0] or str(i)
        x = graph.relu(f"{layer}.relu", x) if i else x
        bias = biases.pop(layer, None)
        x = graph.linear(layer, x, graph.numbers(layer, weight), None if bias is None else graph.numbers(layer, bias))
    if biases:
        raise LoadError(f"the state_dict has biases without weights: {sorted(biases)}")
    return graph.network(x)


def parse_arch(arch: str) -> tuple[int, ...]:
    """``"784-100-10"`` as (784, 100, 10).

    Raises:
        OptionError: it is not of that form.
    """
    parts = arch.replace("x", "-").split("-")
    if len(parts) < 2 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise OptionError(f"architecture '{arch}': give the layer sizes joined by '-', for example 784-100-100-10")
    return tuple(int(p) for p in parts)


def from_module(root: Module, name: str, input_shape: Shape | None = None) -> Network:
    """The network of a ``Module`` record."""
    layers = list(_leaves(root))
    shape = input_shape or _input_shape(layers)
    graph = Graph(name, (1, *shape))
    x = graph.input
    for layer, module in layers:
        reader = _READERS.get(module.kind)
        if reader is None or module.path not in _CLASSES:
            raise unsupported(layer, module.kind)
        x = reader(graph, _Layer(layer, module), x)
    return graph.network(x, _interface(layers, shape))


def _interface(layers: Sequence[tuple[str, Module]], shape: Shape) -> Interface:
    """A model that starts by flattening takes its flat input in any layout."""
    first = next((m.kind for _, m in layers if m.kind not in _IDENTITY), "")
    return Interface(input_axes=("batch", "...")) if first == "Flatten" and len(shape) == 1 else Interface()


def _leaves(root: Module) -> list[tuple[str, Module]]:
    """(dotted name, module) of every layer in order."""
    found: list[tuple[str, Module]] = []
    stack: list[tuple[str, object]] = [("", root)]
    visited = 0
    while stack:
        layer, module = stack.pop()
        visited += 1
        if visited > MAX_LAYERS:
            raise LoadError(f"has more than {MAX_LAYERS:,} layers; {REMEDY}")
        if not isinstance(module, Module):
            raise LoadError(f"layer '{layer}' is {_words(module)}, not a torch.nn layer; {REMEDY}")
        _check_record(layer or "model", module)
        children = _dictionary(module, "_modules")
        if module.path != "torch.nn.modules.container.Sequential":
            if children:
                raise UnsupportedOpError(
                    f"layer '{layer}' ({module.kind}) contains other layers, only nn.Sequential may; {REMEDY}"
                )
            found.append((layer or "0", module))
            continue
        stack.extend((f"{layer}.{k}" if layer else str(k), m) for k, m in reversed(children.items()))
    return found


def _check_record(layer: str, module: Module) -> None:
    """Nothing in the record changes what PyTorch would compute.

    Raises:
        LoadError: hooks, a ``forward`` of its own, or a tensor or layer where none belongs.
    """
    for key, value in _state(module).items():
        if key.endswith("_hooks") and value:
            raise LoadError(f"layer '{layer}' ({module.kind}) carries {key.strip('_')}; remove them, then save again")
        if key == "forward" or (
            isinstance(value, Module | np.ndarray) and key not in ("_parameters", "_buffers", "_modules")
        ):
            raise LoadError(
                f"layer '{layer}' ({module.kind}) has an attribute '{key}' of its own, which may change what it "
                "computes; save a plain layer"
            )


def _state(module: Module) -> dict[str, object]:
    return getattr(module, "state", {})


def _dictionary(module: Module, key: str) -> dict[str, object]:
    value = _state(module).get(key)
    return value if isinstance(value, dict) else {}


class _Layer:
    """One layer's name and settings, each read with its type checked."""

    def __init__(self, name: str, module: Module) -> None:
        self.name, self.kind = name, module.kind
        self._state = _state(module)
        self._arrays = {**_dictionary(module, "_buffers"), **_dictionary(module, "_parameters")}

    def array(self, key: str, rank: int) -> np.ndarray:
        """The tensor ``key``, which must have ``rank`` axes."""
        value = self._arrays.get(key)
        if not isinstance(value, np.ndarray) or value.ndim != rank:
            shape = value.shape if isinstance(value, np.ndarray) else "nothing"
            raise WeightError(
                f"layer '{self.name}' ({self.kind}): {key} should be a tensor with {rank} axes, the file has {shape}"
            )
        return value

    def optional(self, key: str, rank: int) -> np.ndarray | None:
        """The tensor ``key``, or None where the layer has none."""
        return None if self._arrays.get(key) is None else self.array(key, rank)

    def setting(self, key: str, default: object = None) -> object:
        """A plain attribute; older files lack some."""
        value = self._state.get(key, default)
        plain = isinstance(value, _PLAIN) or (
            isinstance(value, tuple | list) and all(isinstance(v, _PLAIN) for v in value)
        )
        if not plain:
            raise LoadError(f"layer '{self.name}' ({self.kind}): setting {key} is {_words(value)}")
        return value

    def pair(self, key: str, default: object = None) -> tuple[int, int]:
        """A setting of one or two integers >= 0; one dimension is widened to height 1 by the caller."""
        value = self.setting(key, default)
        value = default if value is None else value
        numbers = (value, value) if isinstance(value, int) else value
        if (
            isinstance(numbers, tuple | list)
            and len(numbers) == 2
            and all(isinstance(v, int) and v >= 0 for v in numbers)
        ):
            return pair(numbers)
        raise LoadError(
            f"layer '{self.name}' ({self.kind}): setting {key} is {value!r}; two integers >= 0 are expected"
        )

    def single(self, key: str, default: int) -> int:
        """A setting of a 1-D layer: one integer >= 0, alone or in a tuple."""
        value = self.setting(key, default)
        value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
        if isinstance(value, int) and value >= 0:
            return value
        raise LoadError(f"layer '{self.name}' ({self.kind}): setting {key} is {value!r}; an integer >= 0 is expected")

    def refuse(self, why: str) -> UnsupportedOpError:
        """The error for a setting without a sound treatment."""
        return UnsupportedOpError(f"layer '{self.name}' ({self.kind}): {why}")


def _identity(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    return x


def _relu(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    return graph.relu(layer.name, x)


def _linear(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    weight, bias = layer.array("weight", 2), layer.optional("bias", 1)
    return graph.linear(layer.name, x, graph.numbers(layer.name, weight),
                        None if bias is None else graph.numbers(layer.name, bias))


def _conv(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    flat = layer.kind == "Conv1d"
    weight, bias = graph.numbers(layer.name, layer.array("weight", 3 if flat else 4)), layer.optional("bias", 1)
    if flat:
        weight = weight[:, :, None, :]
    if layer.setting("padding_mode", "zeros") != "zeros":
        raise layer.refuse(f"padding mode {layer.setting('padding_mode')!r}; only 'zeros' is supported")
    if layer.setting("transposed", False) or any(_ints(layer.setting("output_padding", (0, 0)))):
        raise layer.refuse("transposed convolutions are not supported")
    read = (lambda key, default: (default, layer.single(key, default))) if flat else layer.pair
    stride, dilation = read("stride", 1), read("dilation", 1)
    padding = _same(layer, weight.shape[2:], dilation) or _both(
        read("padding", 0) if not flat else (0, layer.single("padding", 0))
    )
    groups = layer.single("groups", 1)
    bias = np.zeros(weight.shape[0], weight.dtype) if bias is None else graph.numbers(layer.name, bias)
    _check_strides(layer, stride, dilation)
    return graph.convolution(layer.name, x, Conv2d(weight, bias, stride, padding, dilation, groups), False)


def _ints(value: object) -> Sequence[object]:
    return value if isinstance(value, tuple | list) else (value,)


def _both(padding: tuple[int, int]) -> tuple[int, int, int, int]:
    return (*padding, *padding)


def _same(layer: _Layer, kernel: Sequence[int], dilation: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of the words that PyTorch allows as padding."""
    word = layer.setting("padding", 0)
    if word == "valid":
        return (0, 0, 0, 0)
    if word != "same":
        return None
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)


def _check_strides(layer: _Layer, *pairs: tuple[int, int]) -> None:
    if min(min(p) for p in pairs) < 1:
        raise layer.refuse("kernel, stride and dilation must be at least 1")


def _flatten(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    start, end = (int(layer.setting(k, d)) for k, d in (("start_dim", 1), ("end_dim", -1)))  # type: ignore[arg-type]
    if start % len(x.shape) == 0:
        raise layer.refuse("start_dim=0 mixes the samples of a batch; use start_dim=1")
    return graph.flatten(layer.name, x, start, end)


def _unflatten(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    axis, sizes = layer.setting("dim", 1), layer.setting("unflattened_size")
    if not isinstance(axis, int) or not isinstance(sizes, tuple | list) or axis % len(x.shape) == 0:
        raise layer.refuse(f"dim {axis!r} and unflattened_size {sizes!r} are not an axis and a shape")
    axis %= len(x.shape)
    inner = graph.reshape(
        layer.name, Tensor(x.position, x.shape), (*x.shape[:axis], *map(int, sizes), *x.shape[axis + 1 :])
    )  # type: ignore[arg-type]
    return inner


def _batch_norm(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    mean, var = layer.optional("running_mean", 1), layer.optional("running_var", 1)
    if layer.setting("training", True) or mean is None or var is None:
        raise layer.refuse(
            "is in training mode, or keeps no running statistics, so its output depends on the batch; call "
            "model.eval() and save again"
        )
    eps = layer.setting("eps", 1e-5)
    gamma, beta = layer.optional("weight", 1), layer.optional("bias", 1)
    return graph.batch_norm(layer.name, x, gamma, beta, mean, var, float(eps))  # type: ignore[arg-type]


def _max_pool(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    if layer.setting("return_indices", False):
        raise layer.refuse("return_indices=True gives two outputs")
    kernel = layer.pair("kernel_size")
    stride, dilation, padding = layer.pair("stride", kernel), layer.pair("dilation", 1), layer.pair("padding", 0)
    _check_strides(layer, kernel, stride, dilation)
    return graph.max_pool(
        layer.name, x, kernel, stride, _both(padding), dilation, bool(layer.setting("ceil_mode", False))
    )


def _avg_pool(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    if layer.setting("divisor_override") is not None:
        raise layer.refuse("divisor_override is not supported")
    kernel = layer.pair("kernel_size")
    stride, padding = layer.pair("stride", kernel), layer.pair("padding", 0)
    _check_strides(layer, kernel, stride)
    return graph.avg_pool(layer.name, x, kernel, stride, _both(padding), bool(layer.setting("count_include_pad", True)),
                          bool(layer.setting("ceil_mode", False)))


def _adaptive(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    size = layer.setting("output_size")
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(s is None or isinstance(s, int) for s in size):
        raise layer.refuse(f"output_size is {size!r}; two integers are expected")
    return graph.adaptive_avg_pool(layer.name, x, size)  # type: ignore[arg-type]


def _pad(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    sizes, value = layer.setting("padding"), layer.setting("value", 0.0)
    if (
        not isinstance(sizes, tuple | list)
        or len(sizes) != 4
        or not all(isinstance(s, int) for s in sizes)
        or len(x.shape) != 4
    ):
        raise layer.refuse(f"padding {sizes!r} on an input of shape {x.shape}; four integers on an image are expected")
    left, right, top, bottom = (int(s) for s in sizes)  # type: ignore[arg-type]
    return graph.pad(layer.name, x, ((0, 0), (0, 0), (top, bottom), (left, right)), float(value))  # type: ignore[arg-type]


_Reader = Callable[[Graph, _Layer, Tensor], Tensor]
_READERS: dict[str, _Reader] = {
    "Linear": _linear, "Conv1d": _conv, "Conv2d": _conv, "ReLU": _relu, "Flatten": _flatten, "Unflatten": _unflatten,
    "BatchNorm1d": _batch_norm, "BatchNorm2d": _batch_norm, "MaxPool2d": _max_pool, "AvgPool2d": _avg_pool,
    "AdaptiveAvgPool2d": _adaptive, "ZeroPad2d": _pad, "ConstantPad2d": _pad, **dict.fromkeys(_IDENTITY, _identity),
}
_HOMES = {"linear": ("Linear", "Identity"), "conv": ("Conv1d", "Conv2d"), "activation": ("ReLU",),
          "flatten": ("Flatten", "Unflatten"), "batchnorm": ("BatchNorm1d", "BatchNorm2d"),
          "pooling": ("MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"), "padding": ("ZeroPad2d", "ConstantPad2d"),
          "dropout": tuple(sorted(_IDENTITY - {"Identity"}))}
_CLASSES = frozenset(f"torch.nn.modules.{home}.{kind}" for home, kinds in _HOMES.items() for kind in kinds)


def _input_shape(layers: Sequence[tuple[str, Module]]) -> Shape:
    """The input's shape where the first layer with weights tells it.

    Raises:
        ShapeError: it does not.
    """
    for name, module in layers:
        if module.kind == "Linear":
            return (_Layer(name, module).array("weight", 2).shape[1],)
        if module.kind == "BatchNorm1d":
            layer = _Layer(name, module)
            mean = layer.optional("running_mean", 1)
            return (0,) if mean is None else mean.shape
        if module.kind == "Unflatten":
            sizes = _Layer(name, module).setting("unflattened_size")
            return (int(np.prod(sizes)),)  # type: ignore[arg-type]
        if module.kind not in _IDENTITY | {"Flatten", "ReLU"}:
            break
    first = f"its first layer, '{layers[0][0]}' ({layers[0][1].kind})," if layers else "a model without layers"
    raise ShapeError(f"{first} does not tell the size of the input; give --input-shape C,H,W (input_shape= in Python)")


def _words(value: object) -> str:
    return f"a {type(value).__name__}"
