"""Interval bound propagation (IBP), sound in float64.

For y = M x + b and lower <= x <= upper: max(M,0) lower + min(M,0) upper + b <= y <= max(M,0) upper + min(M,0) lower + b (Moore;
Gowal et al. 2018, "On the effectiveness of interval bound propagation", eq. 3-4). Each computed sum is widened by gamma times
the sum of the absolute terms, so the result is sound for any order of summation; where all terms are 0 nothing is added,
so a neuron that is exactly 0 stays exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exactprune.bounds.linear_maps import LinearMap, MoveMap
from exactprune.bounds.program import LARGE, TINY, Program
from exactprune.network import INPUT
from exactprune.ops import Add, MaxPool2d, ReLU


@dataclass(frozen=True, eq=False)
class NodeBounds:
    """Bounds on a node's flat output over ``groups`` boxes.

    Attributes:
        lower, upper: float64 of shape (groups, size).
        error: float64 of shape (size,): sum of the absolute terms of the node's own sum, abs(M) H + abs(b), where H
            bounds the node's input; what gamma multiplies when this node is substituted. None where nothing is rounded.
    """

    lower: Tensor
    upper: Tensor
    error: Tensor | None = None

    @property
    def magnitude(self) -> Tensor:
        """Bound on the absolute value, (groups, size)."""
        return torch.maximum(self.lower.abs(), self.upper.abs())


def input_bounds(lower: Tensor, upper: Tensor) -> NodeBounds:
    """Bounds of the input node; endpoints too large to compute with count as infinite."""
    return _finite(lower, upper, None)


def interval_node(program: Program, position: int, known: dict[int, NodeBounds]) -> NodeBounds:
    """Interval bounds of one node from the bounds of the nodes it reads.

    Args:
        program: the network.
        position: which node.
        known: bounds of (at least) the nodes it reads; for a ReLU, of its pre-activation.

    Returns:
        Sound bounds; infinite where the arithmetic overflowed or produced NaN.
    """
    node = program.network.nodes[position]
    given = [known[i] for i in node.inputs]
    mapping = program.maps[position]
    if mapping is not None:
        return _linear(program, mapping, given[0])
    match node.op:
        case ReLU():
            return NodeBounds(given[0].lower.clamp(min=0), given[0].upper.clamp(min=0))
        case Add():
            return _add(program, given[0], given[1])
        case MaxPool2d():
            return _max_pool(program, position, given[0])
    raise AssertionError(node.op.kind)


def _finite(lower: Tensor, upper: Tensor, error: Tensor | None) -> NodeBounds:
    infinity = torch.tensor(torch.inf, dtype=torch.float64, device=lower.device)
    bad = ~((lower.abs() <= LARGE) & (upper.abs() <= LARGE))  # NaN too
    if bad.any():
        lower, upper = lower.masked_fill(bad, -infinity), upper.masked_fill(bad, infinity)
        error = torch.nan_to_num(error, nan=torch.inf) if error is not None else None
    return NodeBounds(lower, upper, error)


def _linear(program: Program, mapping: LinearMap, x: NodeBounds) -> NodeBounds:
    if isinstance(mapping, MoveMap):
        if mapping.bias is None:
            return NodeBounds(mapping.forward(x.lower), mapping.forward(x.upper))
        error = mapping.bias.abs() + mapping.forward(x.magnitude).amax(dim=0)
        return _finite(mapping.forward(x.lower) + mapping.bias, mapping.forward(x.upper) + mapping.bias, error)
    groups = len(x.lower)
    magnitude = x.magnitude.amax(dim=0, keepdim=True)
    plus = mapping.forward(torch.cat([x.lower, x.upper, magnitude]), "plus")
    minus = mapping.forward(torch.cat([x.upper, x.lower, magnitude]), "minus")
    bias = 0.0 if mapping.bias is None else mapping.bias
    error = (plus[-1] - minus[-1] + torch.as_tensor(bias).abs()) * (1 + program.gamma)
    if bool((x.lower >= 0).all()):
        slack = (plus[:-1] - minus[:-1] + torch.as_tensor(bias).abs()) * program.gamma
    else:
        slack = (error * program.gamma).expand(2 * groups, -1)
    lost = TINY * _may_underflow(mapping, magnitude)
    slack, error = slack + TINY * (slack > 0) + lost, error + lost
    total = plus[:-1] + minus[:-1] + bias
    return _finite(total[:groups] - slack[:groups], total[groups:] + slack[groups:], error)


def _may_underflow(mapping: LinearMap, magnitude: Tensor) -> bool:
    """Whether a product of a weight and an input, neither of them 0, can be so small that it loses bits or vanishes."""
    smallest = magnitude[magnitude > 0]
    return bool(len(smallest)) and mapping.smallest * float(smallest.min()) < 2.0**-900


def _add(program: Program, a: NodeBounds, b: NodeBounds) -> NodeBounds:
    slack = (a.magnitude + b.magnitude) * program.gamma
    return _finite(a.lower + b.lower - slack, a.upper + b.upper + slack, None)


def _max_pool(program: Program, position: int, x: NodeBounds) -> NodeBounds:
    lower, upper = (pool_windows(program, position, t).amax(dim=-1) for t in (x.lower, x.upper))
    return NodeBounds(lower, upper)


def pool_windows(program: Program, position: int, x: Tensor, fill: float = -torch.inf) -> Tensor:
    """Windows of a max pool: (groups, inputs) -> (groups, outputs, window), padded places filled with ``fill``."""
    node = program.network.nodes[position]
    op, shape = node.op, program.network.shape_of(node.inputs[0])
    assert isinstance(op, MaxPool2d)
    top, left, bottom, right = op.padding
    padded = F.pad(x.reshape(len(x), *shape), (left, right, top, bottom), value=fill)
    span_y, span_x = (op.kernel[0] - 1) * op.dilation[0] + 1, (op.kernel[1] - 1) * op.dilation[1] + 1
    view = padded.unfold(2, span_y, op.stride[0]).unfold(3, span_x, op.stride[1])
    return view[..., :: op.dilation[0], :: op.dilation[1]].reshape(len(x), program.sizes[position], -1)


def propagate(program: Program, known: dict[int, NodeBounds], until: int) -> None:
    """Fill ``known`` with interval bounds of every node up to ``until`` that it lacks, in topological order."""
    for position in range(until + 1):
        if position not in known:
            known[position] = interval_node(program, position, known)


def interval_bounds(program: Program, lower: Tensor, upper: Tensor) -> tuple[NodeBounds, ...]:
    """Interval bounds of the pre-activations of every ReLU layer over boxes (groups, inputs)."""
    known = {INPUT: input_bounds(lower, upper)}
    if program.layers:
        propagate(program, known, program.preactivation(program.layers - 1))
    return tuple(known[program.preactivation(k)] for k in range(program.layers))
