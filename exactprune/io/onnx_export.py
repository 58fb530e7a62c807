"""Networks as ``.onnx``: opset 17, the network's dtype, the original's input and output names and axes.

Every operator is written as the ONNX operator of the same meaning with the stored numbers as they are, so reading the
file back gives the same network, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exactprune.errors import LoadError
from exactprune.io import atomic
from exactprune.io.tidy import without_empty
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Shape, Transpose

OPSET = 17
IR_VERSION = 8
Axes = tuple[int | str, ...]


def save_onnx(network: Network, path: str | os.PathLike[str]) -> None:
    """Write ``network`` to ``path``, atomically.

    Raises:
        OptionError: the place cannot be written.
    """
    atomic.write_bytes(path, to_onnx(network).SerializeToString(deterministic=True))


def to_onnx(network: Network) -> ModelProto:
    """``network`` as a checked ONNX model."""
    writer = _Writer(without_empty(network))
    model = helper.make_model(writer.graph(), producer_name="exactprune", ir_version=IR_VERSION,
                              opset_imports=[helper.make_opsetid("", OPSET)])
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise LoadError(f"{network.name}: cannot be written as ONNX ({' '.join(str(error).split())[:160]})") from None
    return model


def has_batch(axes: Axes | None, shape: Shape) -> bool:
    """Whether full ``axes`` are a batch axis before ``shape``."""
    return axes is None or axes[1:] in (shape, ("...",))


class _Writer:
    """One model; ``nodes`` and ``weights`` grow."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.names = {network.interface.input_name, network.interface.output_name}
        self.labels: set[str] = set()
        self.values = {INPUT: network.interface.input_name}

    def graph(self) -> onnx.GraphProto:
        """The whole graph."""
        network, ends = self.network, self.network.interface
        kind = helper.np_dtype_to_tensor_dtype(network.dtype)
        source = _full(ends.input_axes, network.input_shape)
        target = _full(ends.output_axes, network.output_shape)
        batched_in, batched_out = has_batch(source, network.input_shape), has_batch(target, network.output_shape)
        if not batched_in:
            self.values[INPUT] = self._add("Reshape", "input/batch", [ends.input_name], shape=(1, *network.input_shape))
        for position, node in enumerate(network.nodes):
            last = position == network.output and batched_out
            self.values[position] = self._node(
                node, network.shape_of(node.inputs[0]), ends.output_name if last else None
            )
        if not batched_out:
            sizes = tuple(n for n in target if isinstance(n, int))
            self._add("Reshape", "output/batch", [self.values[network.output]], output=ends.output_name, shape=sizes)
        elif not network.nodes:
            self._add("Identity", "identity", [self.values[INPUT]], output=ends.output_name)
        return helper.make_graph(
            self.nodes,
            network.name,
            [helper.make_tensor_value_info(ends.input_name, kind, source)],
            [helper.make_tensor_value_info(ends.output_name, kind, target)],
            self.weights,
        )

    def _node(self, node: Node, shape: Shape, output: str | None) -> str:
        """Append the node (a Scale may need two) and give the name of its value."""
        inputs = [self.values[i] for i in node.inputs]
        steps = list(_steps(node.op, shape, self.network.dtype))
        for i, (kind, arrays, attributes) in enumerate(steps):
            last = i == len(steps) - 1
            name = node.name if last else f"{node.name}/{kind}"
            constants = [self._weight(f"{node.name}.{field}", array) for field, array in arrays]
            inputs = [self._add(kind, name, inputs + constants, output if last else None, **attributes)]
        return inputs[0]

    def _add(self, kind: str, name: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        output = output or self._unique(name)
        if "shape" in attributes:
            sizes = np.array(attributes.pop("shape"), np.int64)
            inputs = [*inputs, self._weight(f"{name}.shape", sizes)]
        label = self._unique(name, self.labels)
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=label, **attributes))
        return output

    def _weight(self, name: str, array: np.ndarray) -> str:
        name = self._unique(name)
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def _unique(self, name: str, used: set[str] | None = None) -> str:
        """``name``, or the first of name_2, name_3, ... that is not in ``used`` (the values' names by default)."""
        used = self.names if used is None else used
        found, count = name or "value", 1
        while found in used:
            count += 1
            found = f"{name or 'value'}_{count}"
        used.add(found)
        return found


Step = tuple[str, list[tuple[str, np.ndarray]], dict[str, object]]


def _steps(op: Op, shape: Shape, dtype: np.dtype) -> Iterator[Step]:
    """(ONNX operator, constant inputs, attributes) that compute ``op`` on an input of ``shape``."""
    match op:
        case Affine():
            yield "Gemm", [("weight", op.weight), ("bias", op.bias)], {"transB": 1}
        case Conv2d():
            yield (
                "Conv",
                [("weight", op.weight), ("bias", op.bias)],
                {
                    "kernel_shape": op.kernel,
                    "strides": op.stride,
                    "pads": op.padding,
                    "dilations": op.dilation,
                    "group": op.groups,
                },
            )
        case Scale():
            yield from _scale_steps(op)
        case ReLU() | Add():
            yield {"ReLU": "Relu"}.get(op.kind, op.kind), [], {}
        case MaxPool2d():
            yield (
                "MaxPool",
                [],
                {"kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding, "dilations": op.dilation},
            )
        case AvgPool2d():
            yield "AveragePool", [], {"kernel_shape": op.kernel, "strides": op.stride, "pads": op.padding,
                                      "count_include_pad": int(op.count_include_pad)}
        case Reshape() if len(op.shape) == 1 and prod(shape):
            yield "Flatten", [], {"axis": 1}
        case Reshape():
            yield "Reshape", [], {"shape": (-1, *op.shape)}
        case Transpose():
            yield "Transpose", [], {"perm": (0, *(p + 1 for p in op.permutation))}
        case Pad():
            ends = [p[0] for p in op.pads], [p[1] for p in op.pads]
            pads = np.array([0, *ends[0], 0, *ends[1]], np.int64)
            yield "Pad", [("pads", pads), ("value", np.array(op.value, dtype))], {}
        case _:
            raise LoadError(f"{op.kind}: has no ONNX form here")


def _scale_steps(op: Scale) -> Iterator[Step]:
    """A product, a sum, or both; what changes nothing and is a bare number is left out."""
    plain = op.scale.ndim == 0 and bool(op.scale == 1)
    still = op.shift.ndim == 0 and bool(op.shift == 0)
    if not plain or still:
        yield "Mul", [("scale", op.scale)], {}
    if not still:
        yield "Add", [("shift", op.shift)], {}


def _full(axes: Axes | None, shape: Shape) -> Axes:
    if axes is None or axes[1:] == ("...",):
        return ("batch", *shape)
    return axes
