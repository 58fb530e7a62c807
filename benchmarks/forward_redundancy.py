"""How much forward and relaxed redundancy trained networks hold, neuron by neuron, after the usual compression.

    python benchmarks/forward_redundancy.py                      # every dense network that is there, about ten minutes
    python benchmarks/forward_redundancy.py --only robot,cartpole
    python benchmarks/forward_redundancy.py --costs              # processor times again, nothing else (under a minute)

For every neuron that is still not stable after compressing at ``rounding``: the largest deviation of the output that is found
when it is left out, passed on as it is, or replaced by a constant or by the moved chord of its range. Found at random points,
corners and points where the neuron is most and least active; what stays below 1e-4 there is searched by gradients. So
counts are upper bounds of what could go one at a time, whatever a proof can do. Next to it: what rule ``forward`` removes,
and its processor time. Verdicts are those of the compression table. Written to reports/history/forward.csv; networks that are
there and were not asked for stay.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import time
from typing import Any

import _compress_cases as inputs
import numpy as np
import torch
from _compress_cases import ROOT, Case

from exactprune.bounds.program import Program
from exactprune.claim import LayerVerdict, Status
from exactprune.compress import compress_network
from exactprune.compress.differentiable import compile_network, values_of
from exactprune.compress.rules.forward import forward_redundant
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Affine

OUT = ROOT / "reports" / "history" / "forward.csv"
CLOSE, FAR = 1e-4, 1e-2
Values = dict[int, torch.Tensor]


def after(program: Program, values: Values, relu: int, new: torch.Tensor) -> torch.Tensor:
    """The output of a chain when a ReLU's outputs are ``new``."""
    for position in range(relu + 1, len(program.network.nodes)):
        mapping = program.maps[position]
        new = new.clamp(min=0) if mapping is None else mapping.forward(new) + (0.0 if mapping.bias is None else mapping.bias)
    return new


def deviation(program: Program, values: Values, relu: int, unit: int, line: tuple[float, float]) -> torch.Tensor:
    """abs(f - f with a line for one neuron), (points,)."""
    new = values[relu].clone()
    new[:, unit] = line[0] * values[program.network.nodes[relu].inputs[0]][:, unit] + line[1]
    return (after(program, values, relu, new) - values[program.network.output]).abs().amax(dim=1)


def climbed(program: Program, source: int, units: np.ndarray, box: Box, x: torch.Tensor, sign: int) -> torch.Tensor:
    """A point for each neuron where it is as large (sign 1) or small (-1) as 40 steps find."""
    low, high = program.box(box)
    with torch.no_grad():
        start = (sign * values_of(program, x)[source]).argmax(dim=0)[units]
    at, rows = x[start].clone(), range(len(units))
    for step in range(40):
        at.requires_grad_(True)
        (slope,) = torch.autograd.grad((sign * values_of(program, at)[source][rows, units]).sum(), at)
        at = (at.detach() + 0.2 * 0.85**step * (high - low) * slope.sign()).clamp(low, high)
    return at


def searched(program: Program, relu: int, unit: int, line: tuple[float, float], box: Box, x: torch.Tensor) -> float:
    """The largest deviation after steps along the gradient's sign, and to the corner it points to."""
    low, high = program.box(box)
    share, even = torch.ones(len(x), 1, dtype=torch.float64), (torch.arange(len(x)) % 2 == 0)[:, None]
    best = 0.0
    for _ in range(40):
        x = x.detach().requires_grad_(True)
        gap = deviation(program, values_of(program, x), relu, unit, line)
        (slope,) = torch.autograd.grad(gap.sum(), x)
        here, best = x.detach(), max(best, float(gap.detach().max()))
        corner = torch.where(slope > 0, high, torch.where(slope < 0, low, here))
        stepped = (here + share * (high - low) * slope.sign() / 2).clamp(low, high)
        moved = torch.where(even, here + share * (corner - here), stepped)
        with torch.no_grad():
            better = (deviation(program, values_of(program, moved), relu, unit, line) > gap)[:, None]
        x, share = torch.where(better, moved, here), torch.where(better, share, share / 2)
    return best


def lines(low: float, high: float) -> dict[str, tuple[float, float]]:
    """What takes a neuron's place: slope and shift."""
    chord = high / (high - low)
    return {"left out": (0.0, 0.0), "passed on": (1.0, 0.0), "constant": (0.0, high / 2), "chord": (chord, -low * chord / 2)}


def loose(verdict: LayerVerdict) -> np.ndarray:
    """Neurons that are not stable."""
    return np.flatnonzero(~np.isin(verdict.status, (Status.INACTIVE, Status.ACTIVE)))


def neurons(g: Network, box: Box, verdicts: tuple[LayerVerdict, ...], data: Any) -> list[tuple[float, float]]:
    """(deviation when left out, the least of all replacements) of every neuron of a chain that is not stable."""
    program, rng = compile_network(g), np.random.default_rng(0)
    count = int(np.clip(6e7 / g.macs, 200, 4000))
    points = [box.sample(count, rng), box.corners(count, rng), *([data[0][:200].astype(np.float64)] if data is not None else [])]
    x, found = torch.tensor(np.concatenate(points).reshape(-1, int(np.prod(g.input_shape)))), []
    layers = [(relu, loose(v)) for relu, v in zip(g.relus, verdicts, strict=True)]
    x = torch.cat([x, *(climbed(program, g.nodes[relu].inputs[0], units, box, x, sign) for relu, units in layers if units.size
                        for sign in (1, -1))])
    with torch.no_grad():
        values = values_of(program, x)
    for relu, units in layers:
        for unit in units:
            z = values[g.nodes[relu].inputs[0]][:, unit]
            if not (z.min() < 0 < z.max()):
                continue  # no point found has one of the phases
            worst = {}
            for name, line in lines(float(z.min()), float(z.max())).items():
                with torch.no_grad():
                    gap = deviation(program, values, relu, int(unit), line)
                worst[name] = float(gap.max())
                if worst[name] <= CLOSE:
                    order = torch.cat([gap.argsort(descending=True)[:96], z.argsort()[:16], z.argsort(descending=True)[:64]])
                    worst[name] = max(worst[name], searched(program, relu, int(unit), line, box, x[order]))
            found.append((worst["left out"], min(worst.values())))
    return found


def costs(f: Network, box: Box, known: Any) -> Any:
    """Compression and rule ``forward`` alone, each with its processor time."""
    found = []
    for work in (compress_network, forward_redundant):
        began = time.process_time()
        found.append((work(f, box, known), time.process_time() - began))
    return found


def costs_again(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    f, box = case.load()
    (_, spent), (cleared, rule) = costs(f, box, inputs.verdicts(case, f, box, 60.0).layers)
    return {**row, "forward removes": sum(len(u) for u in cleared.units.values()), "forward seconds": f"{rule:.2f}",
            "compress seconds": f"{spent:.2f}"}


def one(case: Case) -> dict[str, Any] | None:
    f, box = case.load()
    if not all(isinstance(n.op, Affine) or n.op.kind in ("ReLU", "Reshape", "Scale") for n in f.nodes):
        return None
    known, data = inputs.verdicts(case, f, box, 60.0).layers, inputs.samples(case, f, box)
    (rewrite, spent), (cleared, rule) = costs(f, box, known)
    g = rewrite.network
    each = neurons(g, box, rewrite.verdicts, data) if g.relus else []
    limits = {"rounding": rewrite.budget, "1e-4": CLOSE, "1e-2": FAR}
    return {"network": case.name, "not stable": sum(len(loose(v)) for v in rewrite.verdicts), "both phases met": len(each),
            **{f"left out {name}": sum(a <= t for a, _ in each) for name, t in limits.items()},
            **{f"best {name}": sum(b <= t for _, b in each) for name, t in limits.items()},
            "largest output": f"{rewrite.reach:.3g}", "forward removes": sum(len(u) for u in cleared.units.values()),
            "forward seconds": f"{rule:.2f}", "compress seconds": f"{spent:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, comma separated")
    parser.add_argument("--costs", action="store_true", help="processor times only")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    if OUT.exists():
        with OUT.open(newline="") as file:
            rows = {row["network"]: row for row in csv.DictReader(file)}
    for case in inputs.chosen(asked.only, inputs.cases()):
        row = costs_again(case, rows[case.name]) if asked.costs and case.name in rows else None if asked.costs else one(case)
        if row is None:
            continue
        print(row, flush=True)
        rows[case.name] = row
        with OUT.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))


if __name__ == "__main__":
    main()
