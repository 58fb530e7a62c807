"""Points where two networks differ much: gradient ascent on the joint network from random points, corners and hints.

Every output and sign gets its own starts. Half of the rows step along the sign of the gradient, half towards the corner
it points to (Frank and Wolfe 1956), by a share of the box that falls from 1 to 1/500; the best point of each row is kept.
What a point counts for is its float64 difference less a rigorous error bound, and the winner's is computed in rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf, nextafter
from sys import float_info
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.crown import Backward, Trace, start_rows
from exactprune.bounds.difference import Joint
from exactprune.bounds.forward import Forward, exact_preactivations
from exactprune.bounds.layerwise import Layerwise
from exactprune.domain import Box
from exactprune.network import INPUT

ROWS = 1024
STEPS = 40
SHORTEST = 0.002


@dataclass(frozen=True, eq=False)
class Largest:
    """The largest differences found so far.

    Attributes:
        lower: (outputs,) float64: abs(A - B) is at least this at ``points``.
        points: (outputs, inputs) float64, in the box.
    """

    lower: np.ndarray
    points: np.ndarray

    def joined(self, other: Largest) -> Largest:
        """The better of both, output by output."""
        better = other.lower > self.lower
        return Largest(np.where(better, other.lower, self.lower), np.where(better[:, None], other.points, self.points))


class Search:
    """Points of one joint network and box.

    Args:
        joint: A and B side by side, without deltas.
        box: the domain.
        device: where to compute.
    """

    def __init__(self, joint: Joint, box: Box, device: str = "cpu") -> None:
        self.joint, self.box, self.forward = joint, box, Forward(joint.network, device)
        self.lower, self.upper = (torch.tensor(np.array(t), device=device).reshape(-1) for t in (box.lower, box.upper))
        self.outputs = self.forward.layer_sizes[joint.last]

    def value(self, x: Tensor) -> Tensor:
        """A - B in float64, (batch, outputs)."""
        return self.forward.preactivations(x, self.joint.last)[self.joint.last]

    def judge(self, x: Tensor) -> Largest:
        """What some points are worth, (batch, inputs) clipped to the box."""
        x = torch.minimum(torch.maximum(x, self.lower), self.upper)
        found = Largest(np.zeros(self.outputs), np.repeat(x[:1].cpu().numpy(), self.outputs, axis=0))
        for part in x.split(ROWS):
            values, errors = (t[self.joint.last] for t in self.forward.with_errors(part, self.joint.last))
            sure = torch.nan_to_num(values.abs() - errors, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
            best, row = sure.max(dim=0)
            found = found.joined(Largest(best.cpu().numpy(), part[row].cpu().numpy()))
        return found

    def climb(self, hints: Tensor, *, starts: int, seed: int, deadline: float = inf) -> Largest:
        """Ascend from ``starts`` points for every output and sign, and judge ``hints`` (points, inputs) too."""
        rng = np.random.default_rng(seed)
        found = self.judge(torch.cat([0.5 * (self.lower + self.upper)[None], hints]))
        goals = [(output, sign) for output in range(self.outputs) for sign in (1.0, -1.0)]
        for part in _chunks(goals, max(1, ROWS // starts)):
            if monotonic() > deadline:
                break
            rows = [goal for goal in part for _ in range(starts)]
            output = torch.tensor([o for o, _ in rows], device=self.lower.device)
            sign = torch.tensor([s for _, s in rows], dtype=torch.float64, device=self.lower.device)
            found = found.joined(self.judge(self._ascend(self._starts(found, output, rng), output, sign)))
        return found

    def _starts(self, found: Largest, output: Tensor, rng: np.random.Generator) -> Tensor:
        """A third uniform, a third corners, a third the best point so far with some inputs drawn anew."""
        count = len(output)
        uniform, corner = (f(count, rng).reshape(count, -1) for f in (self.box.sample, self.box.corners))
        mutant = np.where(rng.random(uniform.shape) < 0.2, corner, found.points[output.cpu().numpy()])
        kind = rng.integers(0, 3, (count, 1))
        return torch.tensor(np.where(kind == 0, uniform, np.where(kind == 1, corner, mutant)), device=self.lower.device)

    def _ascend(self, x: Tensor, output: Tensor, sign: Tensor) -> Tensor:
        best, top = x, torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        towards = (torch.arange(len(x), device=x.device) % 2 == 0)[:, None]
        width = self.upper - self.lower
        for step in range(STEPS):
            x = x.detach().requires_grad_()
            value = self.value(x).gather(1, output[:, None])[:, 0] * sign
            (slope,) = torch.autograd.grad(value.sum(), x)
            better = value.detach() > top
            best, top = torch.where(better[:, None], x.detach(), best), torch.where(better, value.detach(), top)
            share = SHORTEST ** (step / (STEPS - 1))
            corner = torch.where(slope > 0, self.upper, torch.where(slope < 0, self.lower, x.detach()))
            base = torch.where(better[:, None], x.detach(), best)
            moved = torch.where(towards, base + share * (corner - base), base + share * width * slope.sign())
            x = torch.minimum(torch.maximum(moved, self.lower), self.upper)
        return best

    def exact(self, found: Largest) -> tuple[Fraction, int, np.ndarray]:
        """(abs(A - B) as a rational, output, point) of the best point."""
        output = int(found.lower.argmax())
        point = found.points[output]
        values = exact_preactivations(self.joint.network, point, self.joint.last, range(self.outputs))
        best = max(range(self.outputs), key=lambda i: abs(values[i]))
        return abs(values[best]), best, point


def _chunks(items: Sequence[tuple[int, float]], size: int) -> list[Sequence[tuple[int, float]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def bound_corners(state: Layerwise, joint: Joint) -> Tensor:
    """The corners at which the linear bounds of A - B are largest and smallest, (boxes x 2 x outputs, inputs)."""
    program, box = state.program, state.known[INPUT]
    neurons = torch.arange(program.size(program.preactivation(joint.last)), device=program.device)
    trace, boxes = Trace(), len(box.lower)
    begin, rows, constant = start_rows(program, joint.last, neurons, state.known)
    total = torch.cat([constant, -constant]).expand(boxes, -1)
    Backward(program, state.known, state.relaxations, trace).run(begin, torch.cat([rows, -rows]).repeat(boxes, 1, 1), total)
    if trace.at_input is None:
        return box.lower
    return torch.where(trace.at_input > 0, box.upper[:, None], box.lower[:, None]).flatten(0, 1)


def rounded_down(value: Fraction) -> float:
    """The largest float64 that is at most ``value``."""
    if value >= Fraction(float_info.max):
        return float_info.max
    near = float(value)
    return near if Fraction(near) <= value else nextafter(near, -inf)
