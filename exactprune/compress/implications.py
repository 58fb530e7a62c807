"""Proofs that whenever one neuron is active, another is not: ``t_w <= 0 wherever z_v >= 0`` for rule ``forward``.

The checker's fixed slopes are tried first. Then the dual ascent of ``deciders.branch_and_bound`` with the phase z_v >= 0 fixed at
the root, whose multiplier beta is the price of that constraint (Wang et al. 2021, "Beta-CROWN"), the linear program of a node
where that is not enough, and splits of phases. Multipliers are written with as few bits as the checker accepts; ties (a
maximum of exactly 0) are left to its exact arithmetic. A point that shows the contrary ends the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import torch

from exactprune.bounds.dual import Optimised, Rows, initial_rows, optimise
from exactprune.checker import redundant, trees
from exactprune.checker.bounds import Bounds
from exactprune.checker.network import of as checked
from exactprune.checker.redundant import Claim, Reader
from exactprune.claim import LayerVerdict, Status
from exactprune.compress.differentiable import compile_network, values_of
from exactprune.deciders.branch_and_bound import BranchAndBound, Limits, Problem, Splits
from exactprune.deciders.proofs import Record, Tree
from exactprune.deciders.tasks import Setting, node_lp, restore
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Affine

NODES, SECONDS = 400, 20.0  # of branch and bound, a claim and a layer
EDGE = 1e-9  # of a row's range: what a linear program's maximum may miss 0 by
BITS = (10, 16, 24, 40)  # of the multipliers that a certificate stores

Proof = tuple[Claim, dict[str, Any]]

def bundle_bounds(network: Network, domain: Box, verdicts: Sequence[LayerVerdict]) -> Bounds:
    """The bounds that a bundle proves: what the verdicts say about signs, and backward substitution with the fixed slopes."""
    bounds = Bounds(checked(network), (domain.lower.astype(np.float64), domain.upper.astype(np.float64)))
    for k, verdict in enumerate(verdicts):
        bounds.reach(k)
        for side, status in (("upper", Status.INACTIVE), ("lower", Status.ACTIVE)):
            settled = np.flatnonzero(verdict.status == status)
            bounds.narrow(k, settled, side, np.zeros(len(settled)))
        neurons = np.flatnonzero(verdict.status != Status.INACTIVE)
        for sign, side in ((1, "upper"), (-1, "lower")):
            if k and neurons.size:
                values = bounds.decide(k, neurons, np.full(len(neurons), sign, np.int64), bounds.domain(k))
                bounds.narrow(k, neurons, side, values)
    return redundant.sharp(bounds)


def decided(network: Network, domain: Box, bounds: Bounds, layer: int, units: np.ndarray) -> tuple[np.ndarray, Record]:
    """The units that can be proved to go together, and the checker's record."""
    deadline = monotonic() + SECONDS

    def prove(these: np.ndarray) -> tuple[list[Proof], list[int]]:
        proofs: list[Proof] = []
        failed: list[int] = []
        for reader in redundant.readers_of(bounds.network, layer):
            claims = [c for c in redundant.claims_of(bounds, layer, these) if c.reader.node == reader.node]
            if claims:
                more, lost = _Prover(network, domain, bounds, layer, reader, these, deadline).run(claims)
                proofs, failed = proofs + more, failed + lost
        return proofs, failed

    proofs, failed = prove(units)
    if failed:  # each on its own; then together without the one that fails most
        units = np.array([u for u in units if u not in failed or not prove(np.array([u]))[1]], int)
        proofs, failed = prove(units)
    while failed:
        units = units[units != max(set(failed), key=failed.count)]
        proofs, failed = prove(units)
    return units, _record(layer, units, proofs)


def _record(layer: int, units: np.ndarray, proofs: Sequence[Proof]) -> Record:
    return {"record": "forward", "layer": layer, "units": units.tolist(),
            "trees": [{"unit": claim.unit, **proof} for claim, proof in proofs]}


class _Prover:
    """Claims about one reader: the checker alone, then one relaxation with tuned multipliers, LPs, branch and bound."""

    def __init__(self, network: Network, domain: Box, bounds: Bounds, layer: int, reader: Reader, units: np.ndarray,
                 deadline: float) -> None:
        self.at, self.layer, self.reader, self.deadline = redundant.raised(bounds, reader, units), layer, reader, deadline
        self.network, self.domain = _up_to(network, reader, self.at.network.nodes[reader.node].op.arrays["weight"], units), domain
        self.sizes = [len(b) for b in self.at.lower]

    def run(self, claims: list[Claim]) -> tuple[list[Proof], list[int]]:
        """(proofs of those that need one, the unit of every claim that is open)."""
        values = redundant.largest(self.at, self.layer, claims, [None] * len(claims))
        open_ = [c for c, value in zip(claims, values, strict=True) if not value <= 0]
        proofs: list[Proof] = []
        failed: list[int] = []
        for claim, tree in zip(open_, self._trees(open_, EDGE), strict=True):
            found = None if tree is None else self._accepted(claim, tree)
            if tree is not None and found is None:  # a tie whose multipliers are no integers over powers of two: split instead
                (tree,) = self._trees([claim], -EDGE)
                found = None if tree is None else self._accepted(claim, tree)
            if found is None:
                failed.append(claim.unit)
            else:
                proofs.append((claim, found))
        return proofs, failed

    def _accepted(self, claim: Claim, tree: Tree) -> dict[str, Any] | None:
        """The tree with as few bits as the checker accepts."""
        for bits in BITS:
            record: dict[str, Any] = tree.record(bits)
            proof = trees.read(record, self.sizes)
            if redundant.largest(self.at, self.layer, [claim], [proof])[0] <= 0:
                return record
        return None

    def _trees(self, claims: list[Claim], edge: float) -> list[Tree | None]:
        """Trees whose leaves have maxima of at most ``edge`` times the row's range, or nothing left to split."""
        if not claims:
            return []
        layer = self.reader.layer
        program = compile_network(self.network)
        lower, upper = tuple(self.at.lower[:layer]), tuple(self.at.upper[:layer])
        state = restore(program, self.domain, lower, upper, layer)
        rows = initial_rows(program, layer, torch.tensor([c.neuron for c in claims]),
                            torch.ones(len(claims), dtype=torch.float64), state.known)
        setting = Setting(self.network, self.domain, lower, upper, layer, "cpu", 1 << 30)
        lp = node_lp(setting, self.deadline, state.at(layer))
        limits = Limits(self.deadline, nodes=NODES, lp_after=0)
        search = _Given(program, state.known, rows, _nothing_refuted, limits, lp)
        search.given, search.edge = [(self.layer, c.unit, 1) for c in claims], edge
        return [decision.tree for decision in search.run()]


def _up_to(network: Network, reader: Reader, weight: np.ndarray, units: np.ndarray) -> Network:
    """The network up to the reader's ReLU, with other weights; one more row reads ``units``, so that LPs have them too."""
    nodes = list(network.nodes[: network.relus[reader.layer] + 1])
    op = nodes[reader.node].op
    assert isinstance(op, Affine)
    row = np.zeros((1, weight.shape[1]), weight.dtype)
    row[0, units] = 1
    wider = Affine(np.concatenate([weight, row]), np.concatenate([op.bias, np.zeros(1, op.bias.dtype)]))
    nodes[reader.node] = replace(nodes[reader.node], op=wider)
    return replace(network, nodes=tuple(nodes))


def _nothing_refuted(points: torch.Tensor, neurons: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(points), dtype=torch.bool)


class _Given(BranchAndBound):
    """Branch and bound whose roots have one phase fixed, ``given``, which is not part of the trees."""

    given: Sequence[tuple[int, int, int]]
    edge: float

    def _roots(self) -> None:
        sigma = {k: torch.zeros(t.shape, dtype=torch.int8) for k, t in self.rows.alpha.items()}
        beta = {k: torch.zeros(t.shape, dtype=torch.float64) for k, t in self.rows.alpha.items()}
        for row, (layer, unit, phase) in enumerate(self.given):
            sigma[layer][row, unit] = phase
        rows = Rows(self.layer, self.rows.neurons, self.rows.signs, self.rows.alpha, sigma, beta)
        solved = self._solve(rows, range(len(self.problems)), steps=2 * self.limits.steps)
        for i, problem in enumerate(self.problems):
            self._file(problem, 0, (self.given[i],), solved, i)

    def _solve(self, rows: Rows, problems: Sequence[int], steps: int) -> Optimised:
        solved = optimise(self.program, rows, self.known, steps)
        for points in (solved.solution.corner, solved.average):
            self._refute(points, problems)
        return solved

    def _refute(self, points: torch.Tensor, problems: Sequence[int]) -> None:
        """Give up where a point shows the neuron active and its reader on (up to rounding: nothing is claimed about it)."""
        values, chosen = values_of(self.program, points), [self.problems[i] for i in problems]
        layer = self.given[0][0]
        z = values[self.program.preactivation(layer)][range(len(chosen)), [self.given[i][1] for i in problems]]
        t = values[self.program.preactivation(self.layer)][range(len(chosen)), [p.neuron for p in chosen]]
        for i in torch.nonzero((z > 0) & (t > 0)).flatten().tolist():
            chosen[i].refuted = True

    def _closed_by_lp(self, problem: Problem, place: int, splits: Splits) -> bool:
        """A maximum of 0 closes a node too: the checker decides such ties."""
        if self.node_lp is None:
            return False
        relaxed = self.node_lp(problem.neuron, problem.sign, splits)
        edge = abs(self.edge) if len(splits) >= sum(map(len, self.unstable.values())) else self.edge
        if relaxed.bound <= edge * self._range(problem.neuron) and relaxed.multipliers is not None:
            problem.leaves[place] = relaxed.multipliers
            return True
        if relaxed.point is not None:
            self._refute(torch.tensor(relaxed.point).reshape(1, -1), [self.problems.index(problem)])
        return problem.refuted
