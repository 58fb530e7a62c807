"""Interval bound propagation (IBP), sound in float64.

For y = M x + b and lower <= x <= upper: max(M,0) lower + min(M,0) upper + b <= y <= max(M,0) upper + min(M,0) lower + b (Moore;
Gowal et al. 2018, "On the effectiveness of interval bound propagation", eq. 3-4). Each computed sum is widened by gamma times
the sum of the absolute terms, so the result is sound for any order of summation; where all terms are 0 nothing is added,
so a neuron that is exactly 0 stays exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    _balls: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @property
    def magnitude(self) -> Tensor:
        """Bound on the absolute value, (groups, size)."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def ball(self, gamma: float) -> Tensor:
        """Middle of the first box, and its radius enlarged by gamma times the magnitude: (2, size)."""
        if gamma not in self._balls:
            lower, upper = self.lower[0], self.upper[0]
            middle = 0.5 * lower + 0.5 * upper
            radius = torch.maximum(upper - middle, middle - lower) * (1 + 2.0**-50)
            wider = (radius + gamma * (radius + middle.abs())) * (1 + 1e-15) + TINY
            self._balls[gamma] = torch.stack([middle, wider])
        return self._balls[gamma]


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
    if lower.numel() and float(lower.min()) >= -LARGE and float(upper.max()) <= LARGE:  # false for NaN
        return NodeBounds(lower, upper, error)
    bad = ~((lower.abs() <= LARGE) & (upper.abs() <= LARGE))
    lower, upper = lower.masked_fill(bad, -torch.inf), upper.masked_fill(bad, torch.inf)
    return NodeBounds(lower, upper, torch.nan_to_num(error, nan=torch.inf) if error is not None else None)


def _linear(program: Program, mapping: LinearMap, x: NodeBounds) -> NodeBounds:
    if isinstance(mapping, MoveMap):
        if mapping.bias is None:
            return NodeBounds(mapping.forward(x.lower), mapping.forward(x.upper))
        error = mapping.bias.abs() + mapping.forward(x.magnitude).amax(dim=0)
        return _finite(mapping.forward(x.lower) + mapping.bias, mapping.forward(x.upper) + mapping.bias, error)
    groups = len(x.lower)
    positive = x.lower.numel() > 0 and float(x.lower.min()) >= 0
    magnitude = x.upper if positive else x.magnitude
    if groups > 1:
        magnitude = magnitude.amax(dim=0, keepdim=True)
    shared = positive and groups == 1  # the magnitude is a row already
    plus, minus = mapping.split(torch.cat([x.lower, x.upper] if shared else [x.lower, x.upper, magnitude]))
    error = plus[-1] - minus[-1]
    plus, swapped = plus[: 2 * groups], minus[: 2 * groups].roll(groups, 0)
    total, size = plus + swapped, plus - swapped if positive else error.repeat(2 * groups, 1)
    if mapping.bias is not None:
        total, size, error = total.add_(mapping.bias), size.add_(mapping.bias_size), error.add_(mapping.bias_size)
    slack, error = size.mul_(program.gamma * (1 + 1e-6)), error.mul_(1 + program.gamma)
    slack.add_(slack > 0, alpha=TINY)
    if _may_underflow(mapping, magnitude):
        slack, error = slack + TINY, error + TINY
    return _finite(total[:groups].sub_(slack[:groups]), total[groups:].add_(slack[groups:]), error)


def _may_underflow(mapping: LinearMap, magnitude: Tensor) -> bool:
    """Whether a product of a weight and an input, neither of them 0, can be so small that it loses bits or vanishes."""
    smallest = torch.where(magnitude > 0, magnitude, 1.0).min() if magnitude.numel() else 1.0
    return mapping.smallest * float(smallest) < 2.0**-900


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


def pool_choice(program: Program, position: int, x: NodeBounds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each window of a max pool: (input chosen, whether it is always the maximum, largest upper bound, magnitude)."""
    finite = x.lower.clamp(min=torch.finfo(x.lower.dtype).min)  # so that no place in the padding ties with an input
    low, up = pool_windows(program, position, finite), pool_windows(program, position, x.upper)
    count = torch.arange(x.lower.shape[1], dtype=torch.float64, device=x.lower.device)
    places = pool_windows(program, position, count[None], fill=-1.0)[0].long()
    best = low.argmax(dim=-1, keepdim=True)
    others = up.scatter(-1, best, -torch.inf).amax(dim=-1)
    wins = low.gather(-1, best)[..., 0] >= others
    chosen = places.expand(len(low), -1, -1).gather(-1, best)[..., 0]
    return chosen, wins, up.amax(dim=-1), x.magnitude.gather(1, chosen)


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
