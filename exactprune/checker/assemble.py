"""From the layers of a model file to the canonical network: what the readers of ``.pt`` and ``.onnx`` files share.

Files are read at batch one. A ``Tensor`` is a node's output in the *full* shape the file gives it, batch axis
included; a
node's own shape has no batch axis, and a reshape goes in between where they differ. At the end constants added after a
product become its bias (0 + c), and a batch norm is folded, in float64 and in this order, rounded once to the dtype:
``s = gamma / sqrt(var + eps); weight' = weight * s; bias' = (bias - mean) * s + beta``; where there is no layer to fold
it into, it becomes a scale. Every claim is about the network that results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from exactprune.checker.network import INPUT, CheckError, Network, Node, Op, Shape, output_shape, reaching, tidy

LARGEST = 2**31  # values of one tensor


@dataclass(frozen=True)
class Tensor:
    """The output of node ``position`` in the full shape ``shape``."""

    position: int
    shape: Shape


def inner(shape: Sequence[int]) -> Shape:
    """A full shape without its leading axis where that is 1 and not the only one."""
    return tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)


class Graph:
    """Nodes in topological order while a file is read."""

    def __init__(self, shape: Sequence[int], double: bool = False) -> None:
        self.input = Tensor(INPUT, tuple(shape))
        self.double = double
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = []
        self.open: set[int] = set()  # products without a bias: a constant added next is their bias

    def numbers(self, array: np.ndarray) -> np.ndarray:
        """Weights as float32 or float64 (float16 is widened, exactly)."""
        array = np.asarray(array)
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise CheckError(f"a weight has dtype {array.dtype}")
        self.double = self.double or array.dtype == np.float64
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def shape(self, position: int) -> Shape:
        """A node's own shape."""
        return inner(self.input.shape) if position == INPUT else self.shapes[position]

    def emit(self, op: Op, *inputs: int) -> int:
        """Append a node."""
        where = f"layer {len(self.nodes)} ({op.kind})"
        given = [self.shape(i) for i in inputs]
        found = given[0] if op.kind == "BatchNorm" else output_shape(where, op, given)
        if prod(found) > LARGEST:
            raise CheckError(f"{where}: an output of shape {found} is too large")
        self.nodes.append(Node(op, inputs))
        self.shapes.append(found)
        return len(self.nodes) - 1

    def laid(self, x: Tensor, shape: Sequence[int]) -> int:
        """A node with the values of ``x`` in ``shape``."""
        if self.shape(x.position) == tuple(shape):
            return x.position
        return self.emit(Op("Reshape", {}, {"shape": tuple(int(n) for n in shape)}), x.position)

    # -- operators ---------------------------------------------------------------------------------------------

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return Tensor(self.emit(Op("ReLU"), x.position), x.shape)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y of one size."""
        shape = _broadcast(x.shape, y.shape)
        if prod(shape) != prod(x.shape) or prod(shape) != prod(y.shape):
            raise CheckError(f"a sum of shapes {x.shape} and {y.shape} enlarges one of them")
        return Tensor(self.emit(Op("Add"), self.laid(x, inner(shape)), self.laid(y, inner(shape))), shape)

    def scale(self, x: Tensor, scale: np.ndarray, shift: np.ndarray) -> Tensor:
        """scale * x + shift."""
        shape = _broadcast(x.shape, scale.shape, shift.shape)
        if prod(shape) != prod(x.shape):
            raise CheckError(f"a constant enlarges a tensor of shape {x.shape}")
        layout = inner(shape)
        arrays = {name: a.reshape(a.shape[max(0, a.ndim - len(layout)) :]) for name, a in (("scale", scale), ("shift",
                                                                                                              shift))}
        return Tensor(self.emit(Op("Scale", arrays), self.laid(x, layout)), shape)

    def times(self, x: Tensor, factor: np.ndarray) -> Tensor:
        """factor * x; a constant added next becomes its shift."""
        y = self.scale(x, factor, np.zeros((), factor.dtype))
        self.open.add(y.position)
        return y

    def shifted(self, x: Tensor, shift: np.ndarray) -> Tensor:
        """x + shift."""
        return self.scale(x, np.ones((), shift.dtype), shift)

    def linear(self, x: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> Tensor:
        """weight @ x + bias for one vector x; weight (outputs, inputs)."""
        outputs, inputs = weight.shape
        if not x.shape or x.shape[-1] != inputs or prod(x.shape[:-1]) != 1:
            raise CheckError(f"a matrix {weight.shape} does not fit one vector of shape {x.shape}")
        return Tensor(self._affine(x, weight, bias), (*x.shape[:-1], outputs))

    def left_product(self, x: Tensor, weight: np.ndarray) -> Tensor:
        """weight @ x for one column x."""
        outputs, inputs = weight.shape
        column = len(x.shape) < 2 or x.shape[-1] == 1
        if prod(x.shape) != inputs or not column:
            raise CheckError(f"a matrix {weight.shape} from the left does not fit one column of shape {x.shape}")
        return Tensor(self._affine(x, weight, None), (*x.shape[:-2], outputs, 1) if len(x.shape) > 1 else (outputs,))

    def _affine(self, x: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> int:
        zero = np.zeros(weight.shape[0], weight.dtype)
        y = self.emit(Op("Affine", {"weight": weight, "bias": zero if bias is None else bias}), self.laid(x,
                                                                                                          weight.shape[1:]))
        if bias is None:
            self.open.add(y)
        return y

    def spatial(self, x: Tensor, op: Op) -> Tensor:
        """A convolution or pool on an image, or on a signal as an image of height 1."""
        y = self.emit(op, self._image(x))
        channels, height, width = self.shapes[y]
        return Tensor(y, (1, channels, height, width) if len(x.shape) == 4 else (1, channels, width))

    def _image(self, x: Tensor) -> int:
        if len(x.shape) not in (3, 4) or x.shape[0] != 1:
            raise CheckError(f"a convolution or pool on shape {x.shape}")
        return self.laid(x, x.shape[1:] if len(x.shape) == 4 else (x.shape[1], 1, x.shape[2]))

    def convolution(self, x: Tensor, weight: np.ndarray, bias: np.ndarray | None, settings: dict[str,
                                                                                                 object]) -> Tensor:
        """A convolution; without a bias, a constant added next becomes it."""
        numbers = np.zeros(weight.shape[0], weight.dtype) if bias is None else bias
        y = self.spatial(x, Op("Conv2d", {"weight": weight, "bias": numbers}, settings))
        if bias is None:
            self.open.add(y.position)
        return y

    def max_pool(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], ceil_mode: bool) -> Tensor:
        """Max pooling; rounding up is padding below and on the right."""
        padding = self._ceiled(x, kernel, stride, padding, dilation) if ceil_mode else tuple(padding)
        settings = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": padding, "dilation": tuple(dilation)}
        return self.spatial(x, Op("MaxPool2d", {}, settings))

    def avg_pool(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                 count_include_pad: bool, ceil_mode: bool = False) -> Tensor:
        """Average pooling."""
        if ceil_mode and self._ceiled(x, kernel, stride, padding, (1, 1)) != tuple(padding):
            raise CheckError("average pooling with partial windows")
        settings = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": tuple(padding),
                    "count_include_pad": bool(count_include_pad) or not any(padding)}
        return self.spatial(x, Op("AvgPool2d", {}, settings))

    def _ceiled(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                dilation: Sequence[int]) -> tuple[int, ...]:
        size = self.shape(self._image(x))[1:]
        extra = []
        for i in (0, 1):
            room = size[i] + padding[i] + padding[i + 2] - ((kernel[i] - 1) * dilation[i] + 1)
            count = -(-room // stride[i]) + 1
            count -= (count - 1) * stride[i] >= size[i] + padding[i]  # the last window starts in the input or before it
            extra.append(max(0, (count - 1) * stride[i] - room))
        return (padding[0], padding[1], padding[2] + extra[0], padding[3] + extra[1])

    def mean_image(self, x: Tensor) -> Tensor:
        """The mean over height and width, kept as axes of length one."""
        if len(x.shape) != 4 or x.shape[0] != 1:
            raise CheckError(f"a global average of shape {x.shape}")
        block = (x.shape[2], x.shape[3])
        settings = {"kernel": block, "stride": block, "padding": (0, 0, 0, 0), "count_include_pad": True}
        return Tensor(self.emit(Op("AvgPool2d", {}, settings), self.laid(x, x.shape[1:])), (1, x.shape[1], 1, 1))

    def batch_norm(self, x: Tensor, gamma: np.ndarray | None, beta: np.ndarray | None, mean: np.ndarray,
                   var: np.ndarray,
                   eps: float) -> Tensor:
        """A batch norm in evaluation mode over the second axis."""
        gamma = np.ones_like(mean) if gamma is None else gamma
        beta = np.zeros_like(mean) if beta is None else beta
        arrays = {k: self.numbers(a) for k, a in (("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var))}
        fits = len(x.shape) > 1 and x.shape[0] == 1 and {a.shape for a in arrays.values()} == {x.shape[1:2]}
        with np.errstate(all="ignore"):
            if not (fits and all(np.isfinite(a).all() for a in arrays.values())
                    and (var.astype(np.float64) + eps > 0).all()):
                raise CheckError("a batch norm does not fit its input, or its statistics are not usable")
        op = Op("BatchNorm", arrays, {"eps": float(eps), "rank": len(x.shape) - 1})
        return Tensor(self.emit(op, self.laid(x, x.shape[1:])), x.shape)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same values in another full shape; one -1 is inferred."""
        rest = prod(n for n in shape if n != -1)
        if list(shape).count(-1) > 1 or (-1 in shape and (rest == 0 or prod(x.shape) % rest)):
            raise CheckError(f"cannot lay {x.shape} out as {tuple(shape)}")
        full = tuple(int(prod(x.shape) // rest if n == -1 else n) for n in shape)
        return Tensor(self.emit(Op("Reshape", {}, {"shape": inner(full)}), x.position), full)

    def flatten(self, x: Tensor, start: int, end: int) -> Tensor:
        """Axes start..end (inclusive) as one."""
        start, end = start % len(x.shape), end % len(x.shape)
        return self.reshape(x, (*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))

    def transpose(self, x: Tensor, permutation: Sequence[int]) -> Tensor:
        """Axes of the full shape permuted; where only axes of length one move, it is a reshape."""
        order = [int(p) % len(x.shape) for p in permutation]
        if sorted(order) != list(range(len(x.shape))):
            raise CheckError(f"permutation {order} of shape {x.shape}")
        shape = tuple(x.shape[p] for p in order)
        batched = x.shape[0] == 1 and order[0] == 0 and len(shape) > 1
        own = tuple(p - 1 for p in order[1:]) if batched else tuple(order)
        source = self.laid(x, x.shape[1:] if batched else x.shape)
        sizes = self.shape(source)
        moved = [p for p in own if sizes[p] != 1]
        still = Op("Reshape", {}, {"shape": tuple(sizes[p] for p in own)})
        op = still if moved == sorted(moved) else Op("Transpose", {}, {"permutation": own})
        return Tensor(self.emit(op, source), shape)

    def pad(self, x: Tensor, pads: Sequence[tuple[int, int]], value: float) -> Tensor:
        """Constant padding of the full shape."""
        layout = inner(x.shape)
        if len(pads) != len(x.shape) or any(min(p) < 0 for p in pads) or (layout != x.shape and any(pads[0])):
            raise CheckError(f"padding {list(pads)} of shape {x.shape}")
        shape = tuple(n + before + after for n, (before, after) in zip(x.shape, pads, strict=True))
        op = Op("Pad", {}, {"pads": tuple(tuple(p) for p in pads)[len(x.shape) - len(layout) :], "value": float(value)})
        return Tensor(self.emit(op, self.laid(x, layout)), shape)

    # -- the end -----------------------------------------------------------------------------------------------

    def network(self, output: Tensor) -> Network:
        """The canonical network that computes ``output``."""
        layout = inner(output.shape)
        if output.position == INPUT:
            output = Tensor(self.emit(Op("Reshape", {}, {"shape": layout}), INPUT), output.shape)
        last = self.laid(output, layout)
        folding = _Folding(self, last)
        return tidy(folding.kept, folding.place[last], inner(self.input.shape), folding.dtype)


class _Folding:
    """One pass over the nodes that reach the output: folds batch norms and constants into the layer before them."""

    def __init__(self, graph: Graph, output: int) -> None:
        self.nodes, self.dtype = graph.nodes, "float64" if graph.double else "float32"
        needed = sorted(reaching(graph.nodes, output))
        self.readers = Counter([i for position in needed for i in graph.nodes[position].inputs] + [output])
        self.kept: list[Node] = []
        self.place = {INPUT: INPUT}
        self.open: set[int] = set()
        for position in needed:
            self.place[position] = self._into(graph.nodes[position])
            if self.place[position] == len(self.kept):
                self._keep(graph.nodes[position], position in graph.open)

    def _keep(self, node: Node, is_open: bool) -> None:
        op = node.op
        if op.kind == "BatchNorm":
            s, shift = self._coefficients(op, np.zeros(1))
            shape = (-1, *[1] * (op.settings["rank"] - 1))
            op = Op("Scale", {"scale": s.astype(self.dtype).reshape(shape),
                              "shift": shift.astype(self.dtype).reshape(shape)})
        if is_open:
            self.open.add(len(self.kept))
        self.kept.append(Node(op, tuple(self.place[i] for i in node.inputs)))

    def _into(self, node: Node) -> int:
        """Place of the kept node that takes this one in, or the next free place."""
        source = node.inputs[0]
        folded = source != INPUT and self.readers[source] == 1 and (
            (node.op.kind == "BatchNorm" and self._norm(node.op, source))
                                                                    or (_is_shift(node.op) and self._shift(node.op,
                                                                                                           source)))
        return self.place[source] if folded else len(self.kept)

    def _producer(self, source: int) -> int:
        """Place of the layer before, seen through one reshape that nobody else reads."""
        node = self.nodes[source]
        through = node.op.kind == "Reshape" and node.inputs[0] != INPUT and self.readers[node.inputs[0]] == 1
        return self.place[node.inputs[0] if through else source]

    def _swap(self, at: int, arrays: dict[str, np.ndarray]) -> bool:
        node = self.kept[at]
        self.kept[at] = Node(Op(node.op.kind, {**node.op.arrays, **arrays}, node.op.settings), node.inputs)
        self.open.discard(at)
        return True

    @staticmethod
    def _coefficients(norm: Op, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gamma, beta, mean, var = (norm.arrays[k].astype(np.float64) for k in ("gamma", "beta", "mean", "var"))
        s = gamma / np.sqrt(var + np.float64(norm.settings["eps"]))
        return s, (bias.astype(np.float64) - mean) * s + beta

    def _norm(self, norm: Op, source: int) -> bool:
        at = self._producer(source)
        if at == INPUT or self.kept[at].op.kind not in ("Affine", "Conv2d"):
            return False
        before = self.kept[at].op.arrays
        if before["bias"].shape != norm.arrays["mean"].shape:
            return False
        s, bias = self._coefficients(norm, before["bias"])
        weight = before["weight"].astype(np.float64) * s.reshape(-1, *[1] * (before["weight"].ndim - 1))
        with np.errstate(over="ignore"):
            return self._swap(at, {"weight": weight.astype(self.dtype), "bias": bias.astype(self.dtype)})

    def _shift(self, op: Op, source: int) -> bool:
        at, shift = self._producer(source), op.arrays["shift"]
        if at not in self.open:
            return False
        before, after = self.kept[at].op, self.nodes[source].op
        if before.kind == "Scale":
            return self.place[source] == at and self._swap(at, {"shift": shift})
        size = before.arrays["bias"].shape[0]
        if before.kind == "Conv2d":
            plain = after.kind != "Reshape" and shift.shape == (size, 1, 1)
            return plain and self._swap(at, {"bias": shift.reshape(size)})
        shape = after.settings["shape"] if after.kind == "Reshape" else (size,)
        if _broadcast(shift.shape, shape) != tuple(shape):
            return False
        return self._swap(at, {"bias": np.broadcast_to(shift, shape).reshape(-1)})


def _is_shift(op: Op) -> bool:
    return op.kind == "Scale" and op.arrays["scale"].ndim == 0 and bool(op.arrays["scale"] == 1)


def _broadcast(*shapes: Sequence[int]) -> Shape:
    try:
        return tuple(int(n) for n in np.broadcast_shapes(*(tuple(s) for s in shapes)))
    except ValueError:
        raise CheckError(f"shapes {shapes} do not fit together") from None
