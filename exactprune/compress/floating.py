"""Level ``float(eps)``: how far f and g can be apart when they are run in their own dtype, in any order of summation.

Let u be the unit roundoff of the dtype (2^-24 for float32) and gamma_n = n u / (1 - n u). A computed sum of n products
is off by at most gamma_n times the sum of the magnitudes, in any order, with or without fused multiply-adds (Higham 2002,
section 3.1). With m >= the magnitude of what an operator reads on the box and e a bound on its error so far,

    e_out = |W| e + gamma_(n+2) (|W| (m + e) + |b|) + (n + 2) tiny,

where ``tiny``, the smallest normal number, pays for underflow, flushed to zero or not. m comes from sound bounds over the
box (the verdicts' included), so the result holds at every input of the box that is a number of the dtype. ReLU and max
pooling round nothing and are 1-Lipschitz. Where a sum of magnitudes could overflow, nothing is claimed. Not covered: TF32 and
half precision, and convolutions that are not sums of products (Winograd, FFT).

    |fl(f) - fl(g)| <= |f - g| + |fl(f) - f| + |fl(g) - g|

is the claim. It is a worst case over all roundings, so it is thousands of times larger than what is ever seen, and is
reported, never used as a budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exactprune.claim import LayerVerdict
from exactprune.compress.deviation import absolute, gamma, inflated, terms
from exactprune.compress.enclosure import enclosures
from exactprune.compress.levels import Kind, Level, floating
from exactprune.domain import Box
from exactprune.network import INPUT, Network
from exactprune.ops import Conv2d, MaxPool2d, Op


def forward_error(network: Network, domain: Box, verdicts: Sequence[LayerVerdict]) -> np.ndarray:
    """Bound on abs(computed - exact) of every output, for every input of the box that is a number of the dtype.

    Args:
        network: run in its own dtype.
        domain: the box.
        verdicts: one per ReLU layer, whose bounds hold for this network.

    Returns:
        float64, of the output's shape; infinite where something could overflow.
    """
    at = enclosures(network, domain, verdicts)
    errors = {INPUT: np.zeros(network.input_shape)}
    for position, node in enumerate(network.nodes):
        sizes = [np.maximum(np.abs(at[i][0]), np.abs(at[i][1])) + errors[i] for i in node.inputs]
        errors[position] = _after(node.op, [errors[i] for i in node.inputs], sizes, np.finfo(network.dtype))
    return errors[network.output]


def _after(op: Op, errors: list[np.ndarray], sizes: list[np.ndarray], kind: np.finfo) -> np.ndarray:
    """The error behind one operator from the errors and the magnitudes before it."""
    n, unit = terms(op), float(kind.eps) / 2
    carried = (op if isinstance(op, MaxPool2d) else absolute(op)).evaluate(*(e[None] for e in errors))[0]
    if not n:
        return carried
    total = inflated(_magnitude(op, sizes), n + 2)
    if n * unit > 0.5 or not total.max(initial=0.0) < float(kind.max) / 2:
        return np.full(total.shape, np.inf)
    return inflated(carried, n) + inflated(gamma(n, unit) * total, 2) + n * float(kind.tiny)


def _magnitude(op: Op, sizes: list[np.ndarray]) -> np.ndarray:
    """Sum of the magnitudes of all terms, the constant included."""
    constant = np.abs(np.asarray(getattr(op, "bias", getattr(op, "shift", np.zeros(()))), np.float64))
    total = absolute(op).evaluate(*(s[None] for s in sizes))[0]
    return total + (constant[:, None, None] if isinstance(op, Conv2d) else constant)


def float_level(f: Network, g: Network, domain: Box, before: Sequence[LayerVerdict], after: Sequence[LayerVerdict],
                level: Level) -> Level | None:
    """The level ``float(eps)`` of a compression.

    Args:
        f, g: original and compressed network.
        domain: the box.
        before: verdicts of f; after: of g.
        level: what is claimed of f and g as real functions.

    Returns:
        None where ``level`` is no proof, or where something could overflow.
    """
    if level.kind not in (Kind.EXACT, Kind.CERTIFIED):
        return None
    total = forward_error(f, domain, before) + forward_error(g, domain, after)
    eps = float(inflated(level.eps + np.asarray(total), 4).max(initial=level.eps))
    return floating(eps) if np.isfinite(eps) else None
