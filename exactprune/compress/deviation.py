"""How far a deviation inside a network can reach its output, and how far a float64 evaluation is off.

Let two runs of one network differ by at most e, elementwise, at some tensor. Through a linear operator the difference
is at most abs(M) e; ReLU and max pooling are 1-Lipschitz; an addition adds. Where the larger run is known to stay below
u + e at a ReLU, both results lie in [0, max(0, u + e)], so the difference is at most that.

The bounds are evaluated in float64 as sums of non-negative terms: a computed sum of n such products is at least the
exact one divided by (1 + gamma_n) (Higham 2002, section 3.1), so each is multiplied by 1 + 2 gamma_(n+2) and TINY pays
for underflow: rounding only ever makes them larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from exactprune.compress.enclosure import Interval
from exactprune.network import INPUT, Network
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, Op, Pad, ReLU, Scale

UNIT = 2.0**-53
TINY = 2.0**-960


def gamma(n: int, unit: float = UNIT) -> float:
    """An upper bound of n u / (1 - n u)."""
    return 1.01 * n * unit / (1 - n * unit)


def absolute(op: Op) -> Op:
    """The linear operator abs(M), without constants; ReLU, pools and moves as they are."""
    if isinstance(op, Affine | Conv2d):
        return replace(op, weight=np.abs(op.weight).astype(np.float64), bias=np.zeros(op.bias.shape))
    if isinstance(op, Scale):
        return Scale(np.abs(op.scale).astype(np.float64), np.zeros(op.shift.shape))
    return replace(op, value=0.0) if isinstance(op, Pad) else op


def terms(op: Op) -> int:
    """The most roundings any one result goes through."""
    match op:
        case Affine():
            return op.weight.shape[1] + 2
        case Conv2d():
            return prod(op.weight.shape[1:]) + 2
        case AvgPool2d():
            return prod(op.kernel) + 2
        case Scale() | Add():
            return 3
    return 0


def inflated(value: np.ndarray, n: int) -> np.ndarray:
    """An upper bound of a sum of n non-negative products from its computed value."""
    return value * (1 + 2 * gamma(n + 2)) + TINY * (value > 0) if n else value


def propagate(network: Network, start: int, error: np.ndarray, at: Mapping[int, Interval] | None = None) -> np.ndarray:
    """Bound on the deviation of the output, given one on the tensor at ``start``; everything before is equal.

    Args:
        network: the network both runs go through after ``start``.
        start: position of the tensor that deviates.
        error: non-negative float64, shape (batch, *shape of that tensor): bounds to propagate, one a row.
        at: enclosures of the tensors in one of the two runs, to cut what a ReLU lets through.

    Returns:
        shape (batch, *output shape).
    """
    return propagate_many(network, {start: error}, at)


def propagate_many(network: Network, errors: Mapping[int, np.ndarray],
                   at: Mapping[int, Interval] | None = None) -> np.ndarray:
    """As ``propagate`` for deviations that are brought in at several tensors at once."""
    return propagate_all(network, errors, at)[network.output]


def propagate_all(network: Network, errors: Mapping[int, np.ndarray],
                  at: Mapping[int, Interval] | None = None) -> dict[int, np.ndarray]:
    """As ``propagate_many``, for every tensor that deviates, and for the output in any case."""
    found = dict(errors)
    batch = len(next(iter(errors.values())))
    first = min(errors)
    for position in range(first + 1, len(network.nodes)):
        node = network.nodes[position]
        if not any(i in found for i in node.inputs):
            continue
        given = [found.get(i, np.zeros((batch, *network.shape_of(i)))) for i in node.inputs]
        through = _through(node.op, given, at.get(node.inputs[0]) if at else None)
        found[position] = through + found[position] if position in errors else through
    return {network.output: np.zeros((batch, *network.output_shape))} | found


def _through(op: Op, given: list[np.ndarray], at: Interval | None) -> np.ndarray:
    if isinstance(op, ReLU):
        (error,) = given
        return error if at is None else np.minimum(error, inflated(np.maximum(at[1] + error, 0.0), 2))
    if isinstance(op, MaxPool2d):
        return op.evaluate(*given)
    return inflated(absolute(op).evaluate(*given), terms(op))


def evaluate_with_error(network: Network, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output at float64 points and a bound on how far each computed value is from the exact one.

    Args:
        network: any network.
        x: shape (batch, *input shape), read exactly as float64.
    """
    values: dict[int, np.ndarray] = {INPUT: np.asarray(x, np.float64)}
    errors: dict[int, np.ndarray] = {INPUT: np.zeros_like(values[INPUT])}
    for position, node in enumerate(network.nodes):
        inputs = [values[i] for i in node.inputs]
        values[position] = node.op.evaluate(*inputs)
        carried = _through(node.op, [errors[i] for i in node.inputs], None)
        errors[position] = carried + _own(node.op, inputs)
    return values[network.output], errors[network.output]


def _own(op: Op, inputs: list[np.ndarray]) -> np.ndarray | float:
    """Rounding errors of one operator: gamma times the sum of the absolute terms."""
    n = terms(op)
    if not n:
        return 0.0
    size = absolute(op).evaluate(*(np.abs(x) for x in inputs))
    constant = getattr(op, "bias", getattr(op, "shift", np.zeros(())))
    constant = np.abs(constant.astype(np.float64))
    size = size + (constant[:, None, None] if isinstance(op, Conv2d) else constant)
    return inflated(gamma(n) * size, n) + n * TINY
