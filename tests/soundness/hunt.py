"""The soundness hunt: random small networks against exact rational evaluation; every violation is a bug.

For each seed: one network and box (``random_networks.case``), the box's corners, random points, and the points at which the
relaxations themselves are largest, evaluated exactly. Checked against them: interval, CROWN and alpha-CROWN bounds,
branch-and-bound proofs, and the verdicts and bounds of ``exactprune.verify`` (whose stable verdicts must also hold on the exact
range where the network has one input).

    python tests/soundness/hunt.py --networks 20000 --jobs 2
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "helpers"))

from exact_evaluation import exact_layers
from random_networks import Case, case, sample_points

SEARCH_EVERY = 3  # branch and bound on every n-th network
VERIFY_EVERY = 4  # the whole of verify() on every n-th network
EXTREME_EVERY = 10  # an overflowing or vanishing network every so often


def chosen(seed: int) -> Case:
    """The case of a seed: every tenth is an extreme one."""
    if seed % EXTREME_EVERY == 0:
        return case(seed, "huge" if seed % (2 * EXTREME_EVERY) == 0 else "vanishing")
    return case(seed)


class Hunt:
    """All checks of one case; violations are collected as text."""

    def __init__(self, given: Case) -> None:
        import torch

        from exactprune.bounds.program import compile_network

        self.torch, self.case, self.network, self.box = torch, given, given.network, given.box
        self.rng = np.random.default_rng([given.seed, 5])
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.program = compile_network(self.network)
        self.points = sample_points(self.box, self.rng, 12)
        self.trees: list = []
        self.claims: list[tuple[str, int, int, int, float]] = []  # (method, layer, neuron, sign, upper bound of sign * z_hat)

    def run(self, whole: bool) -> None:
        """Collect claims first, then compare all of them with exact values."""
        self.bounds()
        if self.case.seed % SEARCH_EVERY == 0:
            self.branch_and_bound()
        result = self.verify() if whole else None
        self.least, self.most = self.extremes()
        for method, layer, neuron, sign, bound in self.claims:
            reached = self.most[layer][neuron] if sign > 0 else -self.least[layer][neuron]
            self.counts[method] += 1
            if np.isnan(bound) or not reached <= bound:
                self.fail(f"{method}: layer {layer} neuron {neuron}: {'max' if sign > 0 else 'max of -z_hat'} {float(reached)!r} "
                          f"> bound {bound!r}")
        for tree in self.trees:
            self.counts["branch-and-bound"] += 1
            reached = self.most[tree.layer][tree.neuron] if tree.sign > 0 else -self.least[tree.layer][tree.neuron]
            if reached > 0:
                self.counts["wrong trees, checked"] += 1
                if self.accepted(tree):
                    self.fail(f"branch-and-bound: layer {tree.layer} neuron {tree.neuron} sign {tree.sign}: {float(reached)!r}")
        if result is not None:
            self.verdicts(result)

    def accepted(self, tree) -> bool:
        """Whether the checker accepts a tree (a leaf may be an LP's, which only suggests)."""
        from exactprune import checker
        from exactprune.claim import Status
        from exactprune.deciders.certify import claims_record, header
        from exactprune.deciders.proofs import crown_record

        sizes = [int(np.prod(self.network.shapes[i])) for i in self.network.relus]
        status = [np.zeros(n, np.int8) for n in sizes]
        status[tree.layer][tree.neuron] = Status.INACTIVE if tree.sign > 0 else Status.ACTIVE
        lemmas = [crown_record(k, np.arange(n)) for k, n in enumerate(sizes[: tree.layer])]
        claims = [claims_record(k, s) for k, s in enumerate(status)]
        records = [header(self.network, self.box, {}), *lemmas, tree.record(40), *claims]
        return checker.check(self.network, self.box.lower, self.box.upper, records).accepted

    def fail(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(f"seed {self.case.seed} ({self.case.family}, {self.network.dtype}): {text}")

    def claim_all(self, method: str, layer: int, lower, upper) -> None:
        """Bounds of a whole layer, arrays or tensors of its size."""
        for i, (low, up) in enumerate(zip(lower.reshape(-1).tolist(), upper.reshape(-1).tolist())):
            self.claims += [(method, layer, i, 1, up), (method, layer, i, -1, -low)]

    def bounds(self) -> None:
        """Interval, CROWN (of every row, open or not), alpha-CROWN."""
        from exactprune.bounds.crown import crown_rows
        from exactprune.bounds.dual import initial_rows, optimise
        from exactprune.bounds.interval import interval_bounds
        from exactprune.bounds.layerwise import start

        torch = self.torch
        box = self.program.box(self.box)
        for k, found in enumerate(interval_bounds(self.program, *box)):
            self.claim_all("interval", k, found.lower, found.upper)
        state = start(self.program, *box)
        extra = []
        for k in range(self.program.layers):
            state.enter(k)
            every = torch.arange(self.program.sizes[self.program.preactivation(k)]) if self.program.preactivation(k) >= 0 else \
                torch.arange(self.box.lower.size)
            low, up = crown_rows(self.program, k, every, state.known, state.relaxations)
            self.claim_all("crown", k, low, up)
            state.narrow(k, every, low, up)
            signs = torch.cat([torch.ones(len(every)), -torch.ones(len(every))]).to(torch.float64)
            rows = initial_rows(self.program, k, every.repeat(2), signs, state.known)
            solved = optimise(self.program, rows, state.known, 4)
            self.claims += [("alpha-crown", k, i, int(s), b) for i, s, b in
                            zip(every.repeat(2).tolist(), signs.tolist(), solved.bound.tolist())]
            pick = self.rng.choice(2 * len(every), min(4, 2 * len(every)), replace=False)
            extra.append(solved.solution.corner.numpy()[pick])
        self.state = state
        extra = np.concatenate(extra) if extra else np.zeros((0, self.box.lower.size))
        self.points = np.concatenate([self.points, extra[np.isfinite(extra).all(axis=1)]])
        self.points = np.clip(self.points, self.box.lower.reshape(-1), self.box.upper.reshape(-1))

    def branch_and_bound(self) -> None:
        """A few questions of the last two layers as a task: a proof claims a maximum <= 0."""
        from exactprune.deciders.tasks import Setting, Task, bounds_before, run_task

        for layer in range(max(0, self.program.layers - 2), self.program.layers):
            size = self.program.sizes[self.program.preactivation(layer)] if self.program.preactivation(layer) >= 0 else 0
            if not size:
                continue
            lower, upper = bounds_before(self.state, layer)
            setting = Setting(self.network, self.box, lower, upper, layer, "cpu", 1 << 26)
            neurons = self.rng.integers(0, size, 3)
            signs = self.rng.choice([-1, 1], 3)
            found = run_task(setting, Task(neurons, signs, 2.0, 24))
            self.trees += [d.tree for d in found.decisions if d.tree is not None]
            if len(found.points):
                self.points = np.concatenate([self.points, found.points[:4]])

    def verify(self):
        """The whole path."""
        from exactprune import VerifyOptions, verify

        result = verify(self.network, self.box, VerifyOptions(time_limit=3.0))
        for v in result.layers:
            self.claim_all("verify bounds", v.layer, v.lower, v.upper)
        return result

    def extremes(self) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
        """Exact least and most over the points, per layer and neuron."""
        layers = exact_layers(self.network, self.points)
        return [[min(c) for c in zip(*rows)] for rows in layers], [[max(c) for c in zip(*rows)] for rows in layers]

    def verdicts(self, result) -> None:
        """No stable verdict may be contradicted by a point, no unstable one by exact ranges."""
        ranges = self.ranges()
        for v in result.layers:
            for i, status in enumerate(v.status.tolist()):
                least, most = self.least[v.layer][i], self.most[v.layer][i]
                self.counts["verdict " + ("unknown", "inactive", "active", "unstable")[status]] += 1
                if (status == 1 and most > 0) or (status == 2 and least < 0):
                    self.fail(f"verdict {status} at layer {v.layer} neuron {i}, seen {float(least)!r}..{float(most)!r}")
                if ranges is not None:
                    low, high = ranges[v.layer][i]
                    wrong = (status == 1 and high > 0) or (status == 2 and low < 0) or (status == 3 and not low < 0 < high)
                    if wrong:
                        self.fail(f"verdict {status} at layer {v.layer} neuron {i}, exact range {float(low)!r}..{float(high)!r}")
        if result.check is None or result.check["rejected"]:
            self.counts["verify: claims given up"] += 1

    def ranges(self):
        """Exact ranges of networks with one input that are chains of affine layers."""
        from exact_truth import exact_ranges_1d

        from exactprune.ops import Affine, ReLU

        kinds = [n.op for n in self.network.nodes]
        alternating = [isinstance(op, Affine if i % 2 == 0 else ReLU) for i, op in enumerate(kinds)]
        return exact_ranges_1d(self.network, self.box) if self.network.input_shape == (1,) and all(alternating) else None


def hunt(seed: int, whole: bool | None = None) -> tuple[list[str], Counter[str]]:
    """All checks of one seed: (violations, counts). An exception is a violation."""
    try:
        found = Hunt(chosen(seed))
        found.run(seed % VERIFY_EVERY == 0 if whole is None else whole)
    except Exception:
        text = traceback.format_exc().strip().splitlines()
        return [f"seed {seed}: exception {text[-1]} at {' | '.join(t.strip() for t in text[-7:-1])}"], Counter()
    return found.violations, found.counts


def part(seeds: list[int]) -> tuple[list[str], Counter[str]]:
    """Many seeds in one process."""
    import torch

    torch.set_num_threads(1)
    violations: list[str] = []
    counts: Counter[str] = Counter()
    for seed in seeds:
        wrong, more = hunt(seed)
        violations += wrong
        counts += more
        counts["networks"] += 1
    return violations, counts


def main() -> int:
    """Run, report, exit 1 on any violation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    began, counts, violations = time.perf_counter(), Counter(), []
    seeds = range(args.first, args.first + args.networks)
    parts = [list(seeds[i : i + 50]) for i in range(0, len(seeds), 50)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for n, (wrong, more) in enumerate(pool.map(part, parts), 1):
            counts += more
            violations += wrong
            for line in wrong:
                print(line, flush=True)
            if n % 20 == 0:
                seconds = time.perf_counter() - began
                print(f"{counts['networks']:,} networks, {len(violations)} violations, {seconds:.0f} s", flush=True)
    print(f"{counts.pop('networks'):,} networks in {time.perf_counter() - began:.0f} s: {len(violations)} violations")
    for name, count in sorted(counts.items()):
        print(f"  {name:<28} {count:>10,} compared")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
