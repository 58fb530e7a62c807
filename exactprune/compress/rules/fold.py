"""Rule ``fold``: a layer that is linear on the domain disappears into the mixers that read it.

If all neurons of a layer are stably active, or if no ReLU stands behind it, the layer after sees
W_2 (W_1 x + b_1) + b_2 = W_2 W_1 x + (W_2 b_1 + b_2): one affine map with m n weights where there were k (n + m). A layer
that is a sum of mixers becomes a sum again, W_2 W_1 x_1 + W_2 W_1' x_2. Convolutions compose in the same way where one of the
two has a 1 x 1 kernel (stride 1, no padding): a 1 x 1 convolution of what a convolution gives is a convolution with the
same windows, and so is a convolution of a 1 x 1 convolution; where the second pads zeros, the first may not have a bias,
since padding comes between.

Level: ``exact`` where every product and constant is a number of the dtype (compared in integers, any size), else
``certified(eps)``, eps from rounding. Taken when it leaves fewer parameters than r linear units (``rules.merge``), which
need r (n + m).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from exactprune.checker import dyadic
from exactprune.compress.block import Block, Units, placed
from exactprune.compress.surroundings import Surroundings, columns_of, mixer
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, Conv2d, Op


def foldable(network: Network, where: Surroundings) -> bool:
    """Whether every reader can take over every feeder as one mixer."""
    pairs = ((mixer(network, f), mixer(network, r.position)) for f in where.feeders for r in where.readers)
    return not where.between and all(_compose(first, second) for first, second in pairs)


def _compose(first: Affine | Conv2d, second: Affine | Conv2d) -> bool:
    if isinstance(first, Affine) or isinstance(second, Affine):
        return isinstance(first, Affine) and isinstance(second, Affine)
    return _pointwise(first) or _pointwise(second)


def _pointwise(op: Conv2d) -> bool:
    return op.kernel == op.stride == (1, 1) and not any(op.padding)


def unpadded(block: Block) -> Block | None:
    """The block as a fold sees it: where zeros are padded in, windows may hold zeros; None if the layer has constants there."""
    if not block.padded:
        return block
    zeros = replace(block, padded=False, lower=np.minimum(block.lower, 0.0), upper=np.maximum(block.upper, 0.0))
    return None if block.b_in.any() else zeros


def folded(block: Block) -> Units:
    """The product as stored weights: V is W_out W_in rounded, U the identity (exact, and not stored)."""
    with np.errstate(over="ignore"):
        stored = block.product.astype(block.dtype)
    return placed(block, stored, np.eye(len(stored), dtype=block.dtype), tune=False)


def exactly(block: Block, units: Units) -> bool:
    """Whether a fold changes nothing at all: its weights and biases against the products, in integers of any size."""
    if block.padded or units.c.any() or not np.isfinite(units.v).all() or (block.product != units.v).any():
        return False
    constants = _integers(np.append(block.b_out.astype(np.float64), units.d))
    rows, scale = _times(block.w_out, block.b_in[:, None])
    least = min(scale, constants[1])
    total = constants[0].astype(object) << (constants[1] - least)
    rest = total[:len(block.b_out)] - total[len(block.b_out):]
    np.add.at(rest, block.owner, rows[:, 0] << (scale - least))
    return not rest.any() and _equal(_times(block.w_out, block.w_in), _integers(units.v))


def _integers(values: np.ndarray) -> tuple[np.ndarray, int]:
    return dyadic.exact_int(values.astype(np.float64))


def _times(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """The exact product of two matrices of stored numbers, as Python integers and an exponent."""
    (left, i), (right, j) = _integers(a), _integers(b)
    return dyadic.product(left, dyadic.matrix(right, j, len(b) or 1)).astype(object), i + j


def _equal(a: tuple[np.ndarray, int], b: tuple[np.ndarray, int]) -> bool:
    least = min(a[1], b[1])
    return bool((a[0] << (a[1] - least) == b[0].astype(object) << (b[1] - least)).all())


def without(network: Network, where: Surroundings, units: Units) -> tuple[list[Node], dict[int, int]]:
    """The readers read what the feeders read: the new nodes, and the new position of each old one.

    The hub, the feeders and the sums between them are still there, and are read by nothing.
    """
    nodes: list[Node] = []
    place = {INPUT: INPUT}
    rows = dict(zip((r.position for r in where.readers), _rows_of(network, where), strict=True))
    for position, node in enumerate(network.nodes):
        if position in rows:
            nodes += _sum(len(nodes), node, _composed(network, where, position, units, rows[position]), place)
        else:
            nodes.append(replace(node, inputs=tuple(place[i] for i in node.inputs)))
        place[position] = len(nodes) - 1
    return nodes, place


def _rows_of(network: Network, where: Surroundings) -> list[tuple[slice, slice]]:
    """For each reader: its rows of the block, and its outputs."""
    found, row, output = [], 0, 0
    for reader in where.readers:
        op = mixer(network, reader.position)
        count = len(op.bias) * (op.kernel[0] * op.kernel[1] if isinstance(op, Conv2d) else 1)
        found.append((slice(row, row + count), slice(output, output + len(op.bias))))
        row, output = row + count, output + len(op.bias)
    return found


def _composed(network: Network, where: Surroundings, reader: int, units: Units,
              part: tuple[slice, slice]) -> list[tuple[Op, int]]:
    """For each feeder, the reader's weights times its own, and the position it reads; the first carries the constants."""
    found: list[tuple[Op, int]] = []
    for feeder, v in zip(where.feeders, columns_of(network, where, units.v[part[0]]), strict=True):
        bias = np.zeros_like(units.d[part[1]]) if found else units.d[part[1]]
        op = _product(mixer(network, feeder), mixer(network, reader), v, bias)
        found.append((op, network.nodes[feeder].inputs[0]))
    return found


def _product(first: Affine | Conv2d, second: Affine | Conv2d, v: np.ndarray, bias: np.ndarray) -> Op:
    """``second`` after ``first`` as one operator, from the rows V of the block."""
    if isinstance(first, Affine) or isinstance(second, Affine):
        return Affine(v, bias)
    if _pointwise(second):
        return replace(first, weight=v, bias=bias)
    weight = v.reshape(len(second.bias), -1, v.shape[1]).transpose(0, 2, 1)
    return replace(second, weight=weight.reshape(len(second.bias), -1, *second.kernel), bias=bias)


def _sum(start: int, node: Node, parts: list[tuple[Op, int]], place: dict[int, int]) -> list[Node]:
    """Nodes for the sum of some mixers; the last one takes the place of ``node``."""
    if len(parts) == 1:
        return [Node(node.name, parts[0][0], (place[parts[0][1]],))]
    nodes = [Node(f"{node.name}.{i}", op, (place[source],)) for i, (op, source) in enumerate(parts)]
    total = start
    for i in range(1, len(parts)):
        name = node.name if i == len(parts) - 1 else f"{node.name}.sum{i}"
        nodes.append(Node(name, Add(), (total, start + i)))
        total = start + len(nodes) - 1
    return nodes
