"""Reading a ``.pt`` file that holds a whole ``nn.Sequential``, without torch and without running anything from it.

The file is a zip archive of stored members: ``<root>/data.pkl``, a pickle in which every tensor refers to a storage,
and
``<root>/data/<key>``, the storages' bytes. The pickle machine is given inert stand-ins only; any other global ends it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from exactprune.checker.assemble import Graph, Tensor
from exactprune.checker.network import CheckError, Network, OpenShapeError, Shape, UnknownError

MAX_PICKLE = 64 << 20
MODULES = "torch.nn.modules."
STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8",
            "IntStorage": "<i4"}
IDENTITIES = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")


class Module:
    """A pickled ``torch.nn`` module: its class's name and its attributes."""

    path = ""

    def __new__(cls, *arguments: object) -> Module:
        """A module without arguments, as ``torch.save`` writes them."""
        if arguments:
            raise CheckError(f"the pickle makes a {cls.path} from arguments")
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Keep the attributes."""
        if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
            raise CheckError(f"the pickle gives a {self.path} a strange state")
        self.state: dict[str, Any] = state


class _Call:
    """A function in place of a global; the pickle can call it and nothing else."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise CheckError("the pickle tries to change a function")


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, program: bytes) -> None:
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._archive, self._root = archive, root
        self._classes: dict[str, type[Module]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> object:
        path = f"{module_name}.{global_name}"
        if path in _GLOBALS:
            return _GLOBALS[path]
        if module_name == "torch" and global_name in STORAGES:
            return _Call(lambda: STORAGES[global_name])
        if path.startswith(MODULES) and global_name.isidentifier():
            return self._classes.setdefault(path, type(global_name, (Module,), {"path": path}))
        raise CheckError(f"the pickle refers to {path}")

    def persistent_load(self, pid: Any, /) -> np.ndarray:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Call)):
            raise CheckError("the pickle refers to something that is not a storage")
        data = np.frombuffer(self._archive.read(f"{self._root}data/{pid[2]}"), str(pid[1]()))
        if len(data) != pid[4]:
            raise CheckError(f"storage {pid[2]} has {len(data)} values, not {pid[4]}")
        return data


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """A copy of a strided view, which must lie in its storage and not be larger."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, np.ndarray) or any(type(n) is not int or n < 0
                                                  for n in numbers) or len(size) != len(stride):
        raise CheckError("a tensor is malformed")
    if (len(rest) > 1 and rest[1]) or len(size) > 16:
        raise CheckError("a tensor carries hooks or too many axes")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if prod(size) else 0
    if prod(size) > len(storage) or (prod(size) and last >= len(storage)):
        raise CheckError(f"a tensor of shape {tuple(size)} does not lie in its storage")
    steps = [s * storage.itemsize for s in stride]
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False), order="C")


def _parameter(data: Any, *_: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise CheckError("a parameter is not a tensor")
    return data


_GLOBALS: dict[str, object] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch.Size": _Call(tuple),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild),
    "torch._utils._rebuild_parameter": _Call(_parameter),
}


def read(path: Path, input_shape: Shape | None = None) -> Network:
    """The network of a whole ``nn.Sequential``.

    Args:
        path: of the file.
        input_shape: without batch axis; needed where no Linear comes first.

    Raises:
        CheckError: damaged, unsafe, or a layer that this reader does not know.
    """
    layers = _leaves(_load(path))
    graph = Graph((1, *(input_shape or _input_shape(layers))))
    x = graph.input
    for name, module in layers:
        kind = module.path.rsplit(".", 1)[-1]
        if module.path not in _KNOWN:
            raise UnknownError(f"layer '{name}': {module.path} is not known to the checker's reader")
        x = _KNOWN[module.path](graph, _Layer(f"{name} ({kind})", module.state), x)
    return graph.network(x)


def _load(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [i.filename for i in infos]
            if any(i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1
                   for i in infos) or len(set(names)) != len(names):
                raise CheckError("its members are compressed, encrypted or doubled, which torch.save never does")
            roots = [n.removesuffix("data.pkl") for n in names if n.endswith("data.pkl") and n.count("/") <= 1]
            if len(roots) != 1 or sum(i.file_size for i in infos) > path.stat().st_size:
                raise CheckError("not what torch.save writes")
            order = f"{roots[0]}byteorder"
            if order in names and archive.read(order).strip() != b"little":
                raise CheckError("written on a big-endian machine")
            program = archive.read(roots[0] + "data.pkl")
            _scan(program)
            return _Unpickler(archive, roots[0], program).load()
    except CheckError as error:
        raise CheckError(f"{path.name}: {error}") from None
    except Exception as error:  # a hostile pickle can raise anything; nothing of it has run
        raise CheckError(f"{path.name}: not readable ({type(error).__name__}: {error})") from None


def _scan(program: bytes) -> None:
    """The pickle is complete and reserves no memory beyond its own size."""
    if len(program) > MAX_PICKLE:
        raise CheckError("its pickle is too large")
    for opcode, argument, _ in pickletools.genops(program):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(program):
            raise CheckError("its pickle reserves memory that it cannot need")


def _leaves(root: object) -> list[tuple[str, Module]]:
    """(name, layer) in order."""
    found: list[tuple[str, Module]] = []
    stack: list[tuple[str, object]] = [("", root)]
    for _ in range(100_000):
        if not stack:
            return found
        name, module = stack.pop()
        if not isinstance(module, Module) or not hasattr(module, "state"):
            raise UnknownError(f"layer '{name}' is no torch.nn layer; the checker reads whole nn.Sequential files only")
        _check_state(name, module.state)
        children = module.state.get("_modules") or {}
        if module.path == MODULES + "container.Sequential":
            stack += [(f"{name}.{k}" if name else str(k), m) for k, m in reversed(list(children.items()))]
        elif children:
            raise CheckError(f"layer '{name}' ({module.path}) contains other layers")
        else:
            found.append((name, module))
    raise CheckError("it has too many layers")


def _check_state(name: str, state: dict[str, Any]) -> None:
    """No hooks, no method of its own, tensors only where they belong."""
    for key, value in state.items():
        odd = isinstance(value, (Module, np.ndarray)) or key == "forward" or (key.endswith("_hooks") and value)
        if odd or (key in ("_parameters", "_buffers", "_modules") and not isinstance(value, dict)):
            raise CheckError(f"layer '{name}' has an attribute '{key}' that may change what it computes")


class _Layer:
    """A layer's settings and arrays, each checked when it is read."""

    def __init__(self, name: str, state: dict[str, Any]) -> None:
        self.name, self.state = name, state
        self.arrays = {**state.get("_buffers", {}), **state.get("_parameters", {})}

    def array(self, key: str, rank: int) -> np.ndarray:
        value = self.optional(key, rank)
        if value is None:
            raise CheckError(f"layer '{self.name}': no {key}")
        return value

    def optional(self, key: str, rank: int) -> np.ndarray | None:
        value = self.arrays.get(key)
        if value is not None and (not isinstance(value, np.ndarray) or value.ndim != rank):
            raise CheckError(f"layer '{self.name}': {key} is malformed")
        return value

    def get(self, key: str, default: object) -> Any:
        value = self.state.get(key, default)
        return default if value is None else value

    def pair(self, key: str, default: object) -> tuple[int, int]:
        value = self.get(key, default)
        pair = (value, value) if type(value) is int else value
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(v) is int and v >= 0 for v in pair)):
            raise CheckError(f"layer '{self.name}': {key} is {value!r}")
        return pair[0], pair[1]

    def require(self, fine: bool, what: str) -> None:
        if not fine:
            raise UnknownError(f"layer '{self.name}': {what}")


def _linear(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    bias = layer.optional("bias", 1)
    return graph.linear(x, graph.numbers(layer.array("weight", 2)), None if bias is None else graph.numbers(bias))


def _conv(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    weight, bias = graph.numbers(layer.array("weight", 4)), layer.optional("bias", 1)
    layer.require(layer.get("padding_mode", "zeros") == "zeros" and not layer.get("transposed", False),
                  "an unknown kind of convolution")
    dilation = layer.pair("dilation", 1)
    if layer.get("padding", 0) == "same":
        total = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        padding = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        padding = (0, 0, 0, 0) if layer.get("padding", 0) == "valid" else (*layer.pair("padding", 0),
                                                                           *layer.pair("padding", 0))
    settings = {"stride": layer.pair("stride", 1), "padding": padding, "dilation": dilation,
                "groups": layer.get("groups", 1)}
    layer.require(type(settings["groups"]) is int, "groups is no integer")
    return graph.convolution(x, weight, None if bias is None else graph.numbers(bias), settings)


def _batch_norm(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    layer.require(layer.get("training", True) is False, "a batch norm in training mode")
    mean, var = layer.array("running_mean", 1), layer.array("running_var", 1)
    eps = layer.get("eps", 1e-5)
    layer.require(isinstance(eps, (int, float)), "eps is no number")
    return graph.batch_norm(x, layer.optional("weight", 1), layer.optional("bias", 1), mean, var, float(eps))


def _max_pool(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    kernel, padding = layer.pair("kernel_size", None), layer.pair("padding", 0)
    layer.require(not layer.get("return_indices", False), "it returns indices")
    return graph.max_pool(x, kernel, layer.pair("stride", kernel), (*padding, *padding), layer.pair("dilation", 1),
                          bool(layer.get("ceil_mode", False)))


def _avg_pool(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    kernel, padding = layer.pair("kernel_size", None), layer.pair("padding", 0)
    layer.require(layer.get("divisor_override", None) is None, "divisor_override")
    return graph.avg_pool(x, kernel, layer.pair("stride", kernel), (*padding, *padding),
                          bool(layer.get("count_include_pad", True)), bool(layer.get("ceil_mode", False)))


def _adaptive(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    size, given = layer.get("output_size", None), x.shape[-2:]
    wanted = (size, size) if type(size) is int else size
    layer.require(isinstance(wanted, (tuple, list)) and len(wanted) == 2 and len(x.shape) == 4, "its output size")
    wanted = [g if w is None else w for g, w in zip(given, wanted, strict=True)]
    layer.require(all(type(w) is int and w > 0 and g % w == 0 for g, w in zip(given, wanted, strict=True)),
                  "unequal blocks")
    block = [g // w for g, w in zip(given, wanted, strict=True)]
    return graph.avg_pool(x, block, block, (0, 0, 0, 0), True)


def _flatten(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    start, end = layer.get("start_dim", 1), layer.get("end_dim", -1)
    layer.require(type(start) is int and type(end) is int and start % len(x.shape) != 0, "it mixes samples")
    return graph.flatten(x, start, end)


def _unflatten(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    axis, sizes = layer.get("dim", 1), layer.get("unflattened_size", ())
    fine = type(axis) is int and axis % len(x.shape) != 0 and isinstance(sizes, (tuple, list)) and all(type(n) is int
                                                                                                       for n in sizes)
    layer.require(fine, "its shape")
    axis %= len(x.shape)
    return graph.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))


def _pad(graph: Graph, layer: _Layer, x: Tensor) -> Tensor:
    sizes, value = layer.get("padding", ()), layer.get("value", 0.0)
    fine = isinstance(sizes, (tuple, list)) and len(sizes) == 4 and all(type(s) is int
                                                                        for s in sizes) and len(x.shape) == 4
    layer.require(fine and isinstance(value, (int, float)), "its padding")
    left, right, top, bottom = sizes
    return graph.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), float(value))


_KNOWN: dict[str, Callable[[Graph, _Layer, Tensor], Tensor]] = {
    MODULES + path: reader
    for path, reader in {
        "linear.Linear": _linear, "linear.Identity": lambda g, m, x: x, "conv.Conv2d": _conv,
        "activation.ReLU": lambda g, m, x: g.relu(x), "flatten.Flatten": _flatten, "flatten.Unflatten": _unflatten,
        "batchnorm.BatchNorm1d": _batch_norm, "batchnorm.BatchNorm2d": _batch_norm, "pooling.MaxPool2d": _max_pool,
        "pooling.AvgPool2d": _avg_pool, "pooling.AdaptiveAvgPool2d": _adaptive, "padding.ZeroPad2d": _pad,
        "padding.ConstantPad2d": _pad, **{f"dropout.{name}": lambda g, m, x: x for name in IDENTITIES[1:]},
    }.items()
}


def _input_shape(layers: Sequence[tuple[str, Module]]) -> Shape:
    """The input's shape where the first layer that tells it is a Linear, an Unflatten or a BatchNorm1d."""
    for name, module in layers:
        kind = module.path.rsplit(".", 1)[-1]
        if kind == "Linear":
            return (_Layer(name, module.state).array("weight", 2).shape[1],)
        if kind == "BatchNorm1d":
            return _Layer(name, module.state).array("running_mean", 1).shape
        if kind == "Unflatten":
            return (prod(module.state.get("unflattened_size", (0,))),)
        if kind not in (*IDENTITIES, "Flatten", "ReLU"):
            break
    raise OpenShapeError("the first layer does not tell the input's shape; give --input-shape C,H,W")
