"""The largest difference of two networks by splitting the input box, best bound first.

A piece of the box gets the bounds of ``bounds.difference`` and is cut in the middle of the input that its open bounds
react to most (smear rule, as in ``input_split``); its centre and the corners of its linear bounds are tried as points. A
piece is closed when its bound is at most (1 + gap) times the largest difference found. The pieces cover the box, so the
largest bound of all of them is a bound on the box: sound at any moment, and as tight as asked once nothing is open.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.crown import crown_rows
from exactprune.bounds.difference import Alone, Joint, difference_bounds
from exactprune.bounds.program import Program
from exactprune.deciders.difference_search import Largest, Search, bound_corners

BATCH = 128


@dataclass(frozen=True, eq=False)
class Closed:
    """How far splitting got.

    Attributes:
        upper: (outputs,) sound bounds of abs(A - B) over the box.
        found: the largest differences met.
        count: how many pieces were bounded.
        reason: why it ended early; empty when the gap is closed.
    """

    upper: np.ndarray
    found: Largest
    count: int
    reason: str


@dataclass(order=True)
class _Piece:
    key: float
    number: int
    lower: np.ndarray = field(compare=False)
    upper: np.ndarray = field(compare=False)
    bound: np.ndarray = field(compare=False)
    sensitivity: np.ndarray = field(compare=False)


class BoxSplit:
    """One run.

    Args:
        program: of ``joint.network``.
        joint: with or without deltas.
        search: judges points.
        upper: (outputs,) what is known of the whole box.
        found: points so far.
        gap: relative gap to reach.
        tolerance: stop also when abs(A - B) <= tolerance is decided; None to go on.
        deadline: on the clock of ``time.monotonic``.
        boxes: pieces at most.
        alone: what is known of A's and B's neurons over the whole box.
    """

    words = "box splitting"

    def __init__(self, program: Program, joint: Joint, search: Search, upper: np.ndarray, found: Largest, *, gap: float,
                 tolerance: float | None, deadline: float, boxes: int = 1_000_000, alone: Alone | None = None) -> None:
        self.program, self.joint, self.search, self.found = program, joint, search, found
        self.gap, self.tolerance, self.deadline, self.limit, self.alone = gap, tolerance, deadline, boxes, alone
        self.closed = np.zeros_like(upper)
        self.heap: list[_Piece] = []
        self.count = 0
        self.rows = torch.arange(search.outputs, device=program.device)
        low, high = (t.cpu().numpy()[None] for t in (search.lower, search.upper))
        self._bound(low, high, upper[None])

    def run(self) -> Closed:
        """Split until the gap is closed, the tolerance is decided, or time is up; may be called again with more time."""
        reason = ""
        while self.heap and not reason:
            if self._enough():
                break
            if monotonic() > self.deadline or self.count >= self.limit:
                reason = f"{'time' if monotonic() > self.deadline else 'piece'} limit after {self.count} pieces of the box"
            else:
                self._round()
        return Closed(self._upper(), self.found, self.count, reason)

    def _upper(self) -> np.ndarray:
        return np.max([self.closed, *(piece.bound for piece in self.heap)], axis=0)

    def _enough(self) -> bool:
        top, best = max(-self.heap[0].key, float(self.closed.max(initial=0.0))), float(self.found.lower.max(initial=0.0))
        return self.tolerance is not None and (top <= self.tolerance or best > self.tolerance)

    def _target(self) -> float:
        return (1 + self.gap) * float(self.found.lower.max(initial=0.0))

    def _round(self) -> None:
        lows, highs, bounds = [], [], []
        while self.heap and len(lows) < BATCH:
            piece = heapq.heappop(self.heap)
            cut = None if -piece.key <= self._target() else _halves(piece)
            if cut is None:
                self.closed = np.maximum(self.closed, piece.bound)
            else:
                for low, high in cut:
                    lows.append(low)
                    highs.append(high)
                    bounds.append(piece.bound)
        if lows:
            self._bound(np.array(lows), np.array(highs), np.array(bounds))

    def _bound(self, lows: np.ndarray, highs: np.ndarray, parents: np.ndarray) -> None:
        lower, upper = (torch.tensor(t, device=self.program.device) for t in (lows, highs))
        bounds, sensitivity = self._bounds(lower, upper)
        bounds = np.minimum(bounds, parents)
        self.found = self.found.joined(self.search.judge(0.5 * lower + 0.5 * upper))
        for i, bound in enumerate(bounds):
            self.count += 1
            key = -float(bound.max(initial=0.0))
            heapq.heappush(self.heap, _Piece(key, self.count, lows[i], highs[i], bound, sensitivity[i]))

    def _bounds(self, lower: Tensor, upper: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """((pieces, outputs) bounds, (pieces, inputs) how much the widest bounds react)."""
        state = difference_bounds(self.program, self.joint, lower, upper, alone=self.alone)
        sizes: list[Tensor] = []
        crown_rows(self.program, self.joint.last, self.rows, state.known, state.relaxations, sensitivity=sizes)
        last = state.at(self.joint.last)
        top = torch.maximum(-last.lower, last.upper).nan_to_num(torch.inf)
        weight = (top >= self._target()).to(top.dtype)
        reach = (torch.cat(sizes, dim=1) * weight[:, :, None]).sum(dim=1) * (upper - lower)
        self.found = self.found.joined(self.search.judge(bound_corners(state, self.joint)))
        return top.cpu().numpy(), (reach + 1e-9 * (upper - lower)).nan_to_num(0.0).cpu().numpy()


def _halves(piece: _Piece) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Both halves, or None where floats are too coarse to cut."""
    middle = 0.5 * piece.lower + 0.5 * piece.upper
    score = np.where((middle > piece.lower) & (middle < piece.upper), piece.sensitivity, -1.0)
    i = int(score.argmax()) if score.size else 0
    if not score.size or score[i] < 0:
        return None
    left, right = piece.upper.copy(), piece.lower.copy()
    left[i] = right[i] = middle[i]
    return [(piece.lower, left), (right, piece.upper)]
