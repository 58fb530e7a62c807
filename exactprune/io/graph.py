"""What all loaders share: a graph under construction, in which every tensor knows its full shape.

A loader reads its file with a batch of one. A tensor is then a list of numbers in C order plus a *full* shape, the
shape that the file gives it (batch axis included). A network's node has a shape of its own (without batch axis, flat
behind an ``Affine``); where an operator needs another layout of the same numbers, a ``Reshape`` goes in between, and
``network.build`` drops those that change nothing. So a batch axis that is moved, merged, missing or kept as a leading
1 needs no special case: at batch one all of these are layouts of the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from exactprune.errors import ShapeError, UnsupportedOpError, WeightError
from exactprune.io.batchnorm import BatchNorm, fold
from exactprune.network import INPUT, Interface, Network, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Reshape, Scale, Shape, Transpose

SOFT_HEADS = frozenset(
    {
        "Softmax",
        "LogSoftmax",
        "Sigmoid",
        "Tanh",
        "softmax",
        "log_softmax",
        "_softmax",
        "_log_softmax",
        "sigmoid",
        "tanh",
        "Softmax2d",
        "Softmin",
        "LogSigmoid",
    }
)


@dataclass(frozen=True)
class Tensor:
    """The output of a node (or the network's input) in the layout that the file gives it.

    Attributes:
        position: of the node.
        shape: full shape, for a batch of one.
    """

    position: int
    shape: Shape

    @property
    def layout(self) -> Shape:
        """``shape`` without a leading batch axis of one."""
        return without_batch(self.shape)


def without_batch(shape: Sequence[int]) -> Shape:
    """A full shape without its leading axis where that is 1 and not the only one."""
    return tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)


def unsupported(name: str, kind: str, why: str = "") -> UnsupportedOpError:
    """The error for an operator, or a setting of one, that has no sound treatment."""
    if kind.split(".")[0] in SOFT_HEADS:
        why = "it is not piecewise linear; export the model without its final " + kind
    words = why or "no sound treatment for this operator; docs/operators.md lists what is supported"
    return UnsupportedOpError(f"node '{name}' ({kind}): {words}")


class Graph:
    """Nodes in topological order while a file is read; ``network`` ends it.

    Args:
        name: of the model, for people.
        input_shape: full shape of the input.
        double: the input is float64.
        dynamic: the first axis is a batch axis of any size, so that squeezing all axes keeps it.
    """

    def __init__(self, name: str, input_shape: Sequence[int], double: bool = False, dynamic: bool = False) -> None:
        self.name, self.dynamic = name, dynamic
        self.input = Tensor(INPUT, tuple(input_shape))
        self.notes: list[str] = []
        self._nodes: list[Node] = []
        self._shapes: list[Shape] = []
        self._open_bias: set[int] = set()
        if len(self.input.shape) > 1 and self.input.shape[0] != 1:
            self.note(
                f"the first axis of the input has {self.input.shape[0]} entries: part of the input, not a batch axis"
            )
        self._dtypes: set[np.dtype] = {np.dtype(np.float64)} if double else set()

    # -- numbers -----------------------------------------------------------------------------------------------

    def numbers(self, name: str, array: np.ndarray) -> np.ndarray:
        """A weight as float32 or float64; 16-bit floats are widened exactly and noted.

        Raises:
            WeightError: it does not hold real floating-point numbers.
        """
        array = np.asarray(array)
        if array.dtype in (np.float32, np.float64):
            self._dtypes.add(array.dtype.newbyteorder("="))
            return array
        if array.dtype.name not in ("float16", "bfloat16"):
            raise WeightError(
                f"node '{name}': a weight has dtype {array.dtype}; convert the model to float32 or float64"
            )
        self.note(f"{array.dtype.name} weights were converted to float32, exactly")
        self._dtypes.add(np.dtype(np.float32))
        return array.astype(np.float32)

    def note(self, words: str) -> None:
        """Say once what was done to the numbers."""
        if words not in self.notes:
            self.notes.append(words)

    @property
    def dtype(self) -> np.dtype:
        """float64 where any weight (or the input) is, else float32."""
        return np.dtype(np.float64 if np.dtype(np.float64) in self._dtypes else np.float32)

    # -- nodes -------------------------------------------------------------------------------------------------

    def emit(self, name: str, op: Op, *inputs: int) -> int:
        """Append a node and give its position."""
        try:
            shape = op.output_shape(*(self._shape(i) for i in inputs))
        except ShapeError as error:
            raise ShapeError(f"node '{name}': {error}") from None
        if prod(shape) > 2**31:
            raise ShapeError(f"node '{name}': its output of shape {shape} is larger than any sound network's")
        self._nodes.append(Node(name, op, inputs))
        self._shapes.append(shape)
        return len(self._nodes) - 1

    def laid(self, name: str, x: Tensor, shape: Sequence[int]) -> int:
        """Position of a node with the values of ``x`` in ``shape``."""
        if self._shape(x.position) == tuple(shape):
            return x.position
        return self.emit(f"{name}/reshape", Reshape(tuple(int(n) for n in shape)), x.position)

    def _shape(self, position: int) -> Shape:
        return self.input.layout if position == INPUT else self._shapes[position]

    def elementwise(self, name: str, op: Op, x: Tensor) -> Tensor:
        """An operator that does not care about the layout."""
        return Tensor(self.emit(name, op, x.position), x.shape)

    def relu(self, name: str, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return self.elementwise(name, ReLU(), x)

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x + y for two tensors of one size.

        Raises:
            UnsupportedOpError: one of them would have to be enlarged.
        """
        shape = _broadcast(name, x.shape, y.shape)
        if prod(shape) != prod(x.shape) or prod(shape) != prod(y.shape):
            raise unsupported(
                name, "Add", f"adds tensors of shapes {x.shape} and {y.shape}; only equal sizes are supported"
            )
        layout = without_batch(shape)
        return Tensor(self.emit(name, Add(), self.laid(name, x, layout), self.laid(name, y, layout)), shape)

    def times(self, name: str, x: Tensor, factor: np.ndarray | float) -> Tensor:
        """factor * x; a constant added next becomes its shift (s * x + 0 + c = s * x + c)."""
        y = self.scale(name, x, factor, np.zeros_like(factor, shape=()))
        self._open_bias.add(y.position)
        return y

    def shifted(self, name: str, x: Tensor, shift: np.ndarray | float) -> Tensor:
        """x + shift."""
        return self.scale(name, x, np.ones_like(shift, shape=()), shift)

    def scale(self, name: str, x: Tensor, scale: np.ndarray | float, shift: np.ndarray | float) -> Tensor:
        """scale * x + shift with constants that broadcast to x.

        Raises:
            UnsupportedOpError: the constants would enlarge x.
        """
        arrays = [np.asarray(a) for a in (scale, shift)]
        shape = _broadcast(name, x.shape, *(a.shape for a in arrays))
        if prod(shape) != prod(x.shape):
            raise unsupported(
                name,
                "constant",
                f"a constant of shape {arrays[0].shape or arrays[1].shape} enlarges a tensor of "
                f"shape {x.shape}; repeat the computation in the model instead",
            )
        layout = without_batch(shape)
        fitted = [_fitted(a, len(layout)) for a in arrays]
        return Tensor(self.emit(name, Scale(*fitted), self.laid(name, x, layout)), shape)

    def divide(self, name: str, x: Tensor, divisor: np.ndarray | float) -> Tensor:
        """x / divisor as a product with 1/divisor, rounded to the divisor's dtype."""
        divisor = np.asarray(divisor)
        if not np.all(divisor != 0):
            raise WeightError(f"node '{name}' (Div): divides by zero")
        if np.any(np.abs(np.frexp(divisor)[0]) != 0.5):
            self.note(f"division at '{name}' is a product with the rounded reciprocal")
        return self.times(name, x, np.asarray(1 / divisor, dtype=divisor.dtype))

    def linear(self, name: str, x: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> Tensor:
        """weight @ v + bias for every vector v along the last axis of x; weight has shape (outputs, inputs)."""
        outputs, inputs = weight.shape
        if not x.shape or x.shape[-1] != inputs:
            raise ShapeError(f"node '{name}': takes vectors of {inputs} values, was given shape {x.shape}")
        rows = prod(x.shape[:-1])
        if rows == 1:
            y = self._affine(name, x, weight, bias)
            return Tensor(y, (*x.shape[:-1], outputs))
        columns = self.emit(f"{name}/transpose", Transpose((1, 0)), self.laid(name, x, (rows, inputs)))
        image = self.emit(f"{name}/reshape", Reshape((inputs, rows, 1)), columns)
        y = self._convolution(name, image, Conv2d(weight[:, :, None, None], _bias(weight, bias)), bias is None)
        y = self.emit(f"{name}/reshape", Reshape((outputs, rows)), y)
        return Tensor(self.emit(f"{name}/transpose", Transpose((1, 0)), y), (*x.shape[:-1], outputs))

    def left_product(self, name: str, x: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> Tensor:
        """weight @ x over the last but one axis of x (``MatMul`` with the constant on the left)."""
        outputs, inputs = weight.shape
        if inputs not in (x.shape[-2:-1] or x.shape) or prod(x.shape[:-2]) != 1:
            raise ShapeError(f"node '{name}': a {outputs} x {inputs} matrix from the left does not fit shape {x.shape}")
        columns = x.shape[-1] if len(x.shape) > 1 else 1
        shape = (*x.shape[:-2], outputs, columns) if len(x.shape) > 1 else (outputs,)
        if columns == 1:
            return Tensor(self._affine(name, x, weight, bias), shape)
        image = self.laid(name, x, (inputs, columns, 1))
        op = Conv2d(weight[:, :, None, None], _bias(weight, bias))
        return Tensor(self._convolution(name, image, op, bias is None), shape)

    def _affine(self, name: str, x: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> int:
        y = self.emit(name, Affine(weight, _bias(weight, bias)), self.laid(name, x, (weight.shape[1],)))
        if bias is None:
            self._open_bias.add(y)
        return y

    def _convolution(self, name: str, x: int, op: Conv2d, open_bias: bool) -> int:
        y = self.emit(name, op, x)
        if open_bias:
            self._open_bias.add(y)
        return y

    # -- images ------------------------------------------------------------------------------------------------

    def image(self, name: str, kind: str, x: Tensor) -> int:
        """Position of x as (channels, height, width); a 1-D signal gets height 1.

        Raises:
            ShapeError: x is not one image or one signal.
        """
        if len(x.shape) not in (3, 4) or x.shape[0] != 1:
            raise ShapeError(
                f"node '{name}' ({kind}): takes (batch, channels, height, width), was given shape {x.shape}; a "
                "fixed batch other than 1 is not supported, export with a batch of 1 or a dynamic batch axis"
            )
        shape = x.shape[1:] if len(x.shape) == 4 else (x.shape[1], 1, x.shape[2])
        return self.laid(name, x, shape)

    def spatial(self, name: str, kind: str, x: Tensor, op: Op) -> Tensor:
        """A convolution or pool on x; a 1-D signal comes back as one."""
        y = self.emit(name, op, self.image(name, kind, x))
        channels, height, width = self._shapes[y]
        return Tensor(y, (1, channels, height, width) if len(x.shape) == 4 else (1, channels, width))

    def convolution(self, name: str, x: Tensor, op: Conv2d, open_bias: bool) -> Tensor:
        """``op`` on x; ``open_bias``: a constant added next is its bias."""
        y = self.spatial(name, "Conv", x, op)
        if open_bias:
            self._open_bias.add(y.position)
        return y

    def batch_norm(self, name: str, x: Tensor, gamma: np.ndarray | None, beta: np.ndarray | None, mean: np.ndarray,
                   var: np.ndarray, eps: float) -> Tensor:
        """Batch norm in evaluation mode over the axis behind the batch axis."""
        if len(x.shape) < 2 or x.shape[0] != 1:
            raise ShapeError(f"node '{name}' (batch norm): takes (batch, channels, ...), was given shape {x.shape}")
        gamma = np.ones_like(mean) if gamma is None else gamma
        beta = np.zeros_like(mean) if beta is None else beta
        numbers = [self.numbers(name, a) for a in (gamma, beta, mean, var)]
        op = BatchNorm(*numbers, eps=float(eps), rank=len(x.shape) - 1)
        return Tensor(self.emit(name, op, self.laid(name, x, x.shape[1:])), x.shape)

    def max_pool(self, name: str, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int],
                 padding: tuple[int, int, int, int], dilation: tuple[int, int], ceil_mode: bool) -> Tensor:
        """Max pooling; rounding up is the same as padding below and on the right, since padding never wins."""
        if ceil_mode:
            padding = self._ceiled(name, x, kernel, stride, padding, dilation)
        _check_padding(name, "MaxPool", padding, [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)])
        return self.spatial(name, "MaxPool", x, MaxPool2d(kernel, stride, padding, dilation))

    def avg_pool(self, name: str, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int],
                 padding: tuple[int, int, int, int], count_include_pad: bool, ceil_mode: bool) -> Tensor:
        """Average pooling.

        Raises:
            UnsupportedOpError: rounding up would add windows that reach beyond the padding.
        """
        if ceil_mode and self._ceiled(name, x, kernel, stride, padding, (1, 1)) != padding:
            raise unsupported(name, "AveragePool", "ceil_mode adds partial windows; export with ceil_mode=False")
        _check_padding(name, "AveragePool", padding, kernel)
        include = count_include_pad or not any(padding)
        return self.spatial(name, "AveragePool", x, AvgPool2d(kernel, stride, padding, include))

    def _ceiled(self, name: str, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int],
                padding: tuple[int, int, int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
        _, *size = self._shape(self.image(name, "pool", x))
        extra = [
            ceil_extra(size[i], padding[i], padding[i + 2], (kernel[i] - 1) * dilation[i] + 1, stride[i])
            for i in (0, 1)
        ]
        return (padding[0], padding[1], padding[2] + extra[0], padding[3] + extra[1])

    def adaptive_avg_pool(self, name: str, x: Tensor, size: Sequence[int | None]) -> Tensor:
        """Average over equal blocks.

        Raises:
            UnsupportedOpError: the blocks would be unequal.
        """
        _, *given = self._shape(self.image(name, "AdaptiveAvgPool", x))
        wanted = [g if s is None else s for g, s in zip(given[-len(size):], size, strict=True)]
        wanted = [1] * (2 - len(wanted)) + wanted
        if any(s < 1 or g % s for g, s in zip(given, wanted, strict=True)):
            raise unsupported(name, "AdaptiveAvgPool", f"output size {wanted} does not divide input size {given}")
        block = (given[0] // wanted[0], given[1] // wanted[1])
        return self.avg_pool(name, x, block, block, (0, 0, 0, 0), True, False)

    def mean(self, name: str, x: Tensor, axes: Sequence[int], keepdims: bool) -> Tensor:
        """Mean over ``axes`` of the full shape."""
        axes = sorted(axis % len(x.shape) for axis in axes)
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        if axes == [len(shape) - 2, len(shape) - 1] and len(shape) == 4 and shape[0] == 1:
            block = (x.shape[2], x.shape[3])
            y = self.emit(name, AvgPool2d(block, block), self.laid(name, x, x.shape[1:]))
        else:
            y = self._mean_of_rows(name, x, axes)
        return Tensor(y, shape if keepdims else tuple(n for i, n in enumerate(shape) if i not in axes))

    def _mean_of_rows(self, name: str, x: Tensor, axes: Sequence[int]) -> int:
        kept = [i for i in range(len(x.shape)) if i not in axes]
        rows = self.transpose(f"{name}/transpose", x, (*kept, *axes))
        count = prod(x.shape[i] for i in axes)
        image = self.laid(name, rows, (prod(x.shape) // max(count, 1), 1, count))
        return self.emit(name, AvgPool2d((1, count), (1, count)), image)

    # -- layout ------------------------------------------------------------------------------------------------

    def reshape(self, name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same values in another full shape; one -1 is inferred."""
        shape = [int(n) for n in shape]
        rest = prod(n for n in shape if n != -1)
        if shape.count(-1) > 1 or (-1 in shape and (rest == 0 or prod(x.shape) % rest)):
            raise ShapeError(f"node '{name}': cannot lay {x.shape} out as {tuple(shape)}")
        shape = tuple(prod(x.shape) // rest if n == -1 else n for n in shape)
        if prod(shape) != prod(x.shape):
            raise ShapeError(
                f"node '{name}': cannot lay {x.shape} out as {shape}; a shape that depends on the batch size "
                "is not supported"
            )
        layout = without_batch(shape)
        return Tensor(self.emit(name, Reshape(layout), x.position), shape)

    def flatten(self, name: str, x: Tensor, start: int, end: int) -> Tensor:
        """Axes start..end (inclusive) as one."""
        rank = len(x.shape)
        start, end = start % rank, end % rank
        return self.reshape(name, x, (*x.shape[:start], prod(x.shape[start:end + 1]), *x.shape[end + 1:]))

    def squeeze(self, name: str, x: Tensor, axes: Sequence[int] | None) -> Tensor:
        """Drop axes of length one (all of them where ``axes`` is None, but not a dynamic batch axis)."""
        rank = len(x.shape)
        drop = (
            {i for i in range(int(self.dynamic), rank) if x.shape[i] == 1} if axes is None else {a % rank for a in axes}
        )
        if any(x.shape[i] != 1 for i in drop):
            raise ShapeError(f"node '{name}': cannot squeeze axes {sorted(drop)} of {x.shape}")
        return self.reshape(name, x, [n for i, n in enumerate(x.shape) if i not in drop])

    def unsqueeze(self, name: str, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Insert axes of length one."""
        rank = len(x.shape) + len(axes)
        new = {a % rank for a in axes}
        rest = iter(x.shape)
        return self.reshape(name, x, [1 if i in new else next(rest) for i in range(rank)])

    def transpose(self, name: str, x: Tensor, permutation: Sequence[int]) -> Tensor:
        """Axes of the full shape permuted."""
        permutation = [int(p) % len(x.shape) for p in permutation]
        shape = tuple(x.shape[p] for p in permutation)
        if x.shape[0] == 1 and permutation[0] == 0 and len(shape) > 1:
            inner = tuple(p - 1 for p in permutation[1:])
            return Tensor(self._permuted(name, self.laid(name, x, x.shape[1:]), inner), shape)
        return Tensor(self._permuted(name, self.laid(name, x, x.shape), tuple(permutation)), shape)

    def _permuted(self, name: str, x: int, permutation: tuple[int, ...]) -> int:
        """A transpose, or a reshape where only axes of length one move."""
        shape = self._shape(x)
        if sorted(permutation) != list(range(len(shape))):
            raise ShapeError(f"node '{name}': permutation {permutation} does not fit shape {shape}")
        moved = [p for p in permutation if shape[p] != 1]
        if moved == sorted(moved):
            return self.emit(name, Reshape(tuple(shape[p] for p in permutation)), x)
        return self.emit(name, Transpose(permutation), x)

    def pad(self, name: str, x: Tensor, pads: Sequence[tuple[int, int]], value: float) -> Tensor:
        """Constant padding of every axis of the full shape.

        Raises:
            UnsupportedOpError: it crops, pads the batch axis, or pads with something not finite.
        """
        if any(min(p) < 0 for p in pads) or (x.layout != x.shape and any(pads[0])) or not np.isfinite(value):
            raise unsupported(
                name,
                "Pad",
                f"pads {list(pads)} with {value}: only padding by >= 0 of non-batch axes with a "
                "finite number is supported",
            )
        shape = tuple(n + before + after for n, (before, after) in zip(x.shape, pads, strict=True))
        inner = tuple(pads)[len(x.shape) - len(x.layout):]
        return Tensor(self.emit(name, Pad(inner, float(value)), self.laid(name, x, x.layout)), shape)

    def concat(self, name: str, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors side by side: each padded with zeros to the full size, then added (exact)."""
        axis %= len(parts[0].shape)
        total, before, result = sum(p.shape[axis] for p in parts), 0, None
        for i, part in enumerate(parts):
            after = total - before - part.shape[axis]
            pads = [(before, after) if a == axis else (0, 0) for a in range(len(part.shape))]
            padded = self.pad(f"{name}/{i}", part, pads, 0.0)
            result = padded if result is None else self.add(f"{name}/+{i}", result, padded)
            before += part.shape[axis]
        assert result is not None
        return result

    # -- the end -----------------------------------------------------------------------------------------------

    def network(self, output: Tensor, interface: Interface | None = None) -> Network:
        """The finished network whose output is ``output``: batch norms folded, layout tidied."""
        if output.position == INPUT:
            output = Tensor(self.emit("output", Reshape(output.layout), INPUT), output.shape)
        elif self._shape(output.position) != output.layout:
            output = Tensor(self.laid("output", output, output.layout), output.shape)
        if np.dtype(np.float32) in self._dtypes and self.dtype == np.float64:
            self.note("float32 and float64 weights are mixed: all are taken as float64, exactly")
        nodes, at, place = _reaching(self._nodes, output.position)
        done = fold(nodes, at, self.dtype, {place[i] for i in self._open_bias if i in place})
        return build(done.nodes, self.input.layout, self.dtype, output=done.output, name=self.name,
                     notes=(*self.notes, *done.notes), interface=interface or Interface())


def _reaching(nodes: Sequence[Node], output: int) -> tuple[list[Node], int, dict[int, int]]:
    """The nodes that reach ``output``, its new position, and old position -> new position."""
    needed, stack = set(), [output]
    while stack:
        position = stack.pop()
        if position != INPUT and position not in needed:
            needed.add(position)
            stack.extend(nodes[position].inputs)
    place = {old: new for new, old in enumerate(sorted(needed))} | {INPUT: INPUT}
    kept = [Node(nodes[i].name, nodes[i].op, tuple(place[j] for j in nodes[i].inputs)) for i in sorted(needed)]
    return kept, place[output], place


def _broadcast(name: str, *shapes: Shape) -> Shape:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ShapeError(f"node '{name}': shapes {', '.join(map(str, shapes))} do not fit together") from None


def _bias(weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return np.zeros(weight.shape[0], weight.dtype) if bias is None else bias


def _fitted(array: np.ndarray, rank: int) -> np.ndarray:
    """``array`` without leading axes of length one beyond ``rank``."""
    return array.reshape(array.shape[max(0, array.ndim - rank):])


def _check_padding(name: str, kind: str, padding: tuple[int, int, int, int], spans: Sequence[int]) -> None:
    """No window lies wholly in the padding."""
    if any(padding[i] >= spans[i % 2] for i in range(4)):
        raise unsupported(name, kind, f"padding {padding} must be smaller than the window {tuple(spans)}")


def ceil_extra(size: int, before: int, after: int, span: int, stride: int) -> int:
    """Padding at the end that makes rounding down give what rounding up gives (PyTorch, ONNX: the last window must
    start inside the input or the padding before it)."""
    room = size + before + after - span
    count = -(-room // stride) + 1
    if (count - 1) * stride >= size + before:
        count -= 1
    return max(0, (count - 1) * stride - room)
