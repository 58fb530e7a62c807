"""Input splitting: cut the box until bounds settle every neuron on every piece; for networks with few inputs.

All open neurons of all layers share one binary tree of boxes, and boxes are bounded in batches: interval bounds, intersected
with those of the whole domain, then CROWN for the rows still open on the box. A neuron is proved when the boxes on which it is
settled cover the domain. Boxes are cut in the middle of the input to which the open rows are most sensitive (smear rule; Wang et
al. 2018, "Formal security analysis of neural networks using symbolic intervals"). Centres of boxes are tried as witnesses.

Why sound: the pieces cover the domain and each claim on a piece is a sound bound there; the checker recomputes them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.crown import crown_rows
from exactprune.bounds.interval import NodeBounds, input_bounds, propagate
from exactprune.bounds.program import Program
from exactprune.bounds.relaxation import Relaxation, relax
from exactprune.deciders.proofs import Record, pack
from exactprune.network import INPUT

MARGIN = 2e-6  # of a neuron's range: what the checker's coarser multipliers may lose


@dataclass(frozen=True, eq=False)
class Question:
    """Is sign * z_hat <= 0 on D, for one neuron of one ReLU layer?"""

    layer: int
    neuron: int
    sign: int


@dataclass(frozen=True)
class SplitLimits:
    """When to give up.

    Attributes:
        deadline: on the clock of ``time.monotonic``.
        boxes: open boxes a question may have before it is given up.
        batch: boxes bounded at once.
    """

    deadline: float
    boxes: int = 30_000
    batch: int = 512


@dataclass(frozen=True, eq=False)
class SplitResult:
    """What became of the questions.

    Attributes:
        proved: which questions are proved.
        reasons: index of a question -> why it is open.
        record: the certificate record of all proofs; None if there is none.
        boxes: how many boxes were bounded.
    """

    proved: np.ndarray
    reasons: dict[int, str]
    record: Record | None
    boxes: int


@dataclass(eq=False)
class _Forest:
    """The tree of boxes as flat lists; node 0 is the domain."""

    dims: list[int] = field(default_factory=lambda: [-1])
    at: list[float] = field(default_factory=lambda: [0.0])
    children: list[tuple[int, int] | None] = field(default_factory=lambda: [None])
    claims: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def split(self, node: int, dim: int, at: float) -> tuple[int, int]:
        first = len(self.dims)
        self.dims[node], self.at[node], self.children[node] = dim, at, (first, first + 1)
        for _ in range(2):
            self.dims.append(-1)
            self.at.append(0.0)
            self.children.append(None)
        return first, first + 1


class InputSplit:
    """One run over questions of several layers.

    Args:
        program: the network.
        known: bounds of every node up to the last layer asked about (one group).
        questions: what to prove.
        refuted: called with points (batch, inputs); tries them as witnesses and returns which questions are settled as refuted
            by now, booleans (questions,).
        limits: when to give up.
        progress: called with the number of settled questions.
        margin: how far below 0 a bound has to be, in parts of the neuron's range on D, so that the checker's coarser
            arithmetic settles the box too.
    """

    def __init__(self, program: Program, known: dict[int, NodeBounds], questions: Sequence[Question],
                 refuted: Callable[[Tensor], np.ndarray], limits: SplitLimits,
                 progress: Callable[[int], None] | None = None, margin: float = MARGIN) -> None:
        self.program, self.known, self.questions = program, known, questions
        self.refuted, self.limits, self.progress = refuted, limits, progress
        self.layer_of = torch.tensor([q.layer for q in questions], device=program.device)
        self.neuron_of = torch.tensor([q.neuron for q in questions], device=program.device)
        self.sign_of = torch.tensor([float(q.sign) for q in questions], dtype=torch.float64, device=program.device)
        self.margin = margin * self._ranges()
        self.forest = _Forest()
        self.given_up = torch.zeros(len(questions), dtype=torch.bool, device=program.device)
        self.gone = torch.zeros_like(self.given_up)
        self.boxes = 0

    def run(self) -> SplitResult:
        """Split until everything is settled or given up."""
        box = self.known[INPUT]
        lower, upper = box.lower, box.upper
        wanted = torch.ones(1, len(self.questions), dtype=torch.bool, device=self.program.device)
        nodes = np.zeros(1, dtype=np.int64)
        timed_out = False
        while len(nodes):
            if monotonic() > self.limits.deadline:
                timed_out = True
                break
            lower, upper, wanted, nodes = self._round(lower, upper, wanted, nodes)
            if self.progress is not None:
                still = wanted.any(dim=0) if len(nodes) else torch.zeros_like(self.gone)
                self.progress(len(self.questions) - int(still.sum()))
        left = wanted.any(dim=0) if len(nodes) else torch.zeros_like(self.gone)
        return self._result(left, timed_out)

    def _ranges(self) -> Tensor:
        """Width of the bounds of every question's neuron on D."""
        width = []
        for q in self.questions:
            bounds = self.known[self.program.preactivation(q.layer)]
            width.append(float(bounds.upper[0, q.neuron] - bounds.lower[0, q.neuron]))
        return torch.tensor(width, dtype=torch.float64, device=self.program.device)

    # -- one round -----------------------------------------------------------------------------------------------------

    def _round(self, lower: Tensor, upper: Tensor, wanted: Tensor,
               nodes: np.ndarray) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """Bound the first boxes of the queue, and put what stays open, halved, at its end."""
        take = min(self.limits.batch, len(nodes))
        part_lower, part_upper, part_wanted, part = lower[:take], upper[:take], wanted[:take].clone(), nodes[:take]
        hit = torch.tensor(self.refuted(0.5 * part_lower + 0.5 * part_upper), device=self.program.device)
        self.gone |= hit
        part_wanted &= ~(self.gone | self.given_up)
        settled, score = self._bound(part_lower, part_upper, part_wanted)
        self._claim(part, settled)
        part_wanted &= ~settled
        keep = part_wanted.any(dim=1)
        children = self._halve(part_lower[keep], part_upper[keep], part_wanted[keep], part[keep.cpu().numpy()], score[keep])
        rest = wanted[take:] & ~(self.gone | self.given_up)
        alive = rest.any(dim=1)
        joined = tuple(torch.cat(pair) for pair in zip((lower[take:][alive], upper[take:][alive], rest[alive]), children[:3]))
        numbers = np.concatenate([nodes[take:][alive.cpu().numpy()], children[3]])
        self._give_up(joined[2])
        return joined[0], joined[1], joined[2], numbers

    def _give_up(self, wanted: Tensor) -> None:
        if len(wanted):
            self.given_up |= wanted.sum(dim=0) > self.limits.boxes

    def _bound(self, lower: Tensor, upper: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(which questions are settled on which box, sensitivity to each input): (boxes, questions), (boxes, inputs)."""
        self.boxes += len(lower)
        settled, score = torch.zeros_like(wanted), torch.zeros_like(lower)
        asked = wanted.any(dim=0)
        if not bool(asked.any()):
            return settled, score
        last = int(self.layer_of[asked].max())
        known: dict[int, NodeBounds] = {INPUT: input_bounds(lower, upper)}
        relaxations: dict[int, Relaxation] = {}
        for layer in range(last + 1):
            position = self.program.preactivation(layer)
            propagate(self.program, known, position)
            bounds = self._intersect(known[position], self.known[position])
            rows = torch.nonzero(((bounds.lower < 0) & (bounds.upper > 0)).any(dim=0)).flatten()
            sizes: list[Tensor] = []
            if len(rows):
                known[position] = bounds
                low, up = crown_rows(self.program, layer, rows, known, relaxations, sensitivity=sizes)
                bounds = self._narrowed(bounds, rows, low, up)
            known[position] = bounds
            relaxations[layer] = relax(self.program, layer, bounds)
            self._ask(layer, bounds, wanted, settled)
            if sizes:
                score += self._smear(layer, rows, torch.cat(sizes, dim=1), wanted & ~settled, 0.5 * (upper - lower))
        return settled, score

    def _intersect(self, here: NodeBounds, whole: NodeBounds) -> NodeBounds:
        return NodeBounds(torch.maximum(here.lower, whole.lower), torch.minimum(here.upper, whole.upper), whole.error)

    def _narrowed(self, bounds: NodeBounds, rows: Tensor, lower: Tensor, upper: Tensor) -> NodeBounds:
        """Narrow what is open on each box, and nothing else: a box's bounds must not depend on which boxes share its batch."""
        low, up = bounds.lower.clone(), bounds.upper.clone()
        open_ = (low[:, rows] < 0) & (up[:, rows] > 0)
        low[:, rows] = torch.where(open_, torch.maximum(low[:, rows], lower), low[:, rows])
        up[:, rows] = torch.where(open_, torch.minimum(up[:, rows], upper), up[:, rows])
        return NodeBounds(low, up, bounds.error)

    def _ask(self, layer: int, bounds: NodeBounds, wanted: Tensor, settled: Tensor) -> None:
        here = torch.nonzero(self.layer_of == layer).flatten()
        if len(here):
            sign, neurons = self.sign_of[here], self.neuron_of[here]
            top = torch.where(sign > 0, bounds.upper[:, neurons], -bounds.lower[:, neurons])
            settled[:, here] = (top <= -self.margin[here]) & wanted[:, here]

    def _smear(self, layer: int, rows: Tensor, sizes: Tensor, wanted: Tensor, radius: Tensor) -> Tensor:
        here = torch.nonzero(self.layer_of == layer).flatten()
        place = torch.full((self.program.sizes[self.program.preactivation(layer)],), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        at = place[self.neuron_of[here]]
        here, at = here[at >= 0], at[at >= 0]
        if not len(here):
            return torch.zeros_like(radius)
        reach = sizes[:, at] * radius.unsqueeze(1)
        share = reach / (reach.sum(dim=-1, keepdim=True) + 1e-300)
        return (share * wanted[:, here].unsqueeze(-1)).sum(dim=1)

    def _halve(self, lower: Tensor, upper: Tensor, wanted: Tensor, nodes: np.ndarray,
               score: Tensor) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        middle = 0.5 * lower + 0.5 * upper
        possible = (middle > lower) & (middle < upper)
        score = torch.where(possible, score + 1e-9 * (upper - lower), torch.full_like(score, -1.0))
        best, dim = score.max(dim=1) if len(score) else (score.new_zeros(0), torch.zeros(0, dtype=torch.long))
        self._mark_points(wanted[best < 0])
        usable = best >= 0
        lower, upper, wanted, middle, dim = lower[usable], upper[usable], wanted[usable], middle[usable], dim[usable]
        at = middle.gather(1, dim[:, None])
        ids = [self.forest.split(int(n), int(d), float(a))
               for n, d, a in zip(nodes[usable.cpu().numpy()], dim.tolist(), at[:, 0].tolist(), strict=True)]
        left_upper, right_lower = upper.scatter(1, dim[:, None], at), lower.scatter(1, dim[:, None], at)
        numbers = np.array([i for pair in ids for i in pair], dtype=np.int64).reshape(-1, 2)
        return (torch.cat([lower, right_lower]), torch.cat([left_upper, upper]), torch.cat([wanted, wanted]),
                np.concatenate([numbers[:, 0], numbers[:, 1]]))

    def _mark_points(self, wanted: Tensor) -> None:
        if len(wanted):
            self.given_up |= wanted.any(dim=0)

    def _claim(self, nodes: np.ndarray, settled: Tensor) -> None:
        rows = settled.cpu().numpy()
        for node, row in zip(nodes.tolist(), rows, strict=True):
            if row.any():
                self.forest.claims.setdefault(node, []).append(np.flatnonzero(row))

    # -- results -------------------------------------------------------------------------------------------------------

    def _result(self, left: Tensor, timed_out: bool) -> SplitResult:
        proved = (~left & ~self.gone & ~self.given_up).cpu().numpy()
        reasons = {}
        for i in np.flatnonzero(~proved & ~self.gone.cpu().numpy()):
            spent = f"after {self.boxes} boxes of input splitting"
            given_up = bool(self.given_up[i]) or not timed_out
            reasons[int(i)] = f"gave up {spent}" if given_up else f"time limit {spent}"
        return SplitResult(proved, reasons, self._record(proved) if proved.any() else None, self.boxes)

    def _record(self, proved: np.ndarray) -> Record:
        """The tree cut back to what the proved questions need, in preorder."""
        claims = {node: np.concatenate(found) for node, found in self.forest.claims.items()}
        claims = {node: found[proved[found]] for node, found in claims.items()}
        claims = {node: found for node, found in claims.items() if len(found)}
        needed = self._needed(claims)
        dims: list[int] = []
        at: list[float] = []
        listed: list[dict[str, object]] = []
        stack = [0]
        while stack:
            node = stack.pop()
            children = self.forest.children[node]
            inner = children is not None and any(needed[c] for c in children)
            listed.extend(self._claims_at(len(dims), claims.get(node)))
            dims.append(self.forest.dims[node] if inner else -1)
            at.append(self.forest.at[node] if inner else 0.0)
            if inner and children is not None:
                stack.extend((children[1], children[0]))
        return {"record": "boxes", "dims": pack(np.array(dims, np.int16)), "at": pack(np.array(at)), "claims": listed}

    def _needed(self, claims: dict[int, np.ndarray]) -> np.ndarray:
        needed = np.zeros(len(self.forest.dims), dtype=bool)
        needed[list(claims)] = True
        for node in range(len(needed) - 1, -1, -1):
            children = self.forest.children[node]
            if children is not None:
                needed[node] |= needed[children[0]] or needed[children[1]]
        return needed

    def _claims_at(self, place: int, found: np.ndarray | None) -> list[dict[str, object]]:
        if found is None:
            return []
        by_layer: dict[int, list[Question]] = {}
        for i in found:
            by_layer.setdefault(self.questions[i].layer, []).append(self.questions[i])
        return [{"node": place, "layer": layer, "upper": sorted(q.neuron for q in asked if q.sign > 0),
                 "lower": sorted(q.neuron for q in asked if q.sign < 0)} for layer, asked in sorted(by_layer.items())]
