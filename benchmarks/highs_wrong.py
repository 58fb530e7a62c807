"""How often HiGHS alone is wrong about a neuron, and what exactprune makes of the same networks.

Networks with one input in [-1, 1], eight hidden ReLU neurons and one asked ReLU neuron; every weight is a normal
number times 10^uniform(-4, 4). The truth is exact: breakpoints in rationals. Two families: `random`, and `tight`,
whose last bias is shifted so that the exact maximum is within 10^uniform(-9, -4) of zero relative to the neuron's
range, on either side: the cases on which pruning hangs.

    python benchmarks/highs_wrong.py --count 1000 --output reports/decide/highs_wrong.json

Columns: `infeasible` asks the big-M MILP "exists z >= 0" and reads Infeasible as inactive; `objective` maximises z
and reads an objective <= 0 as inactive; both with interval big-M in natural units and default options, as the rows
are usually written. `suggestion` is exactprune's MILP (normalised columns, dual bound, witness evaluated), which is
never believed; `verdict` is the whole pipeline with certificates. *lost* counts neurons called inactive although they
fire somewhere: removing them changes the function. *kept* counts dead neurons called alive: a missed saving only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Literal

import highspy
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from exact_truth import exact_ranges_1d, interval_bounds, mlp

from exactprune.claim import Status
from exactprune.deciders import milp
from exactprune.deciders.highs import version
from exactprune.domain import Box, uniform
from exactprune.network import Network
from exactprune.ops import Affine

Verdict = Literal["inactive", "fires", "unknown"]
METHODS = ("infeasible", "objective", "suggestion", "verdict")


def family(rng: np.random.Generator, tight: bool) -> tuple[Network, Box]:
    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 4, shape)

    arrays = [(draw(8, 1), draw(8)), (draw(1, 8), draw(1)), (np.ones((1, 1)), np.zeros(1))]
    network, box = mlp(arrays), uniform(-1, 1, (1,))
    if tight:
        low, high = exact_ranges_1d(network, box)[1][0]
        gap = Fraction(float(10.0 ** rng.uniform(-9, -4) * rng.choice([-1, 1]))) * max(high - low, Fraction(1, 10**6))
        arrays[1] = (arrays[1][0], np.array([float(Fraction(float(arrays[1][1][0])) - high + gap)]))
        network = mlp(arrays)
    return network, box


def plain(network: Network, box: Box, maximise: bool) -> Verdict:
    """The textbook big-M MILP on HiGHS with default options."""
    first, second = (n.op for n in network.nodes[:3:2])
    assert isinstance(first, Affine) and isinstance(second, Affine)
    low, high = interval_bounds(network, box)
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("time_limit", 20.0)
    h.setOptionValue("threads", 1)
    infinity = highspy.kHighsInf
    h.addVar(-1.0, 1.0)
    terms = [(0, 0.0)]
    for i in range(8):
        w, b, lo, hi = float(first.weight[i, 0]), float(first.bias[i]), float(low[0][i]), float(high[0][i])
        h.addVar(0.0, infinity)
        h.addVar(0.0, 1.0)
        z, d = 2 * i + 1, 2 * i + 2
        h.changeColIntegrality(d, highspy.HighsVarType.kInteger)
        row(h, b, infinity, [(z, 1.0), (0, -w)])
        row(h, -infinity, b - lo, [(z, 1.0), (0, -w), (d, -lo)])
        row(h, -infinity, 0.0, [(z, 1.0), (d, -hi)])
        terms.append((z, float(second.weight[0, i])))
    bias = float(second.bias[0])
    if not maximise:
        row(h, -bias, infinity, terms)
    else:
        for column, value in terms:
            h.changeColCost(column, value)
        h.changeObjectiveSense(highspy.ObjSense.kMaximize)
    h.run()
    status = h.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return "inactive"
    if status != highspy.HighsModelStatus.kOptimal:
        return "unknown"
    return "fires" if not maximise or h.getInfo().objective_function_value + bias > 0 else "inactive"


def row(h: highspy.Highs, low: float, high: float, terms: list[tuple[int, float]]) -> None:
    h.addRow(low, high, len(terms), np.array([t[0] for t in terms], np.int32), np.array([t[1] for t in terms]))


def suggestion(network: Network, box: Box) -> Verdict:
    low, high = interval_bounds(network, box)
    (found,) = milp.decide(network, box, low, high, 1, np.array([0]), time_limit=20.0)
    return "inactive" if found.status is Status.INACTIVE else "unknown" if found.status is Status.UNKNOWN else "fires"


def verdict(network: Network, box: Box) -> tuple[Verdict, int]:
    """The asked neuron's verdict by the pipeline, and how many of all nine verdicts are wrong."""
    from exactprune.options import VerifyOptions
    from exactprune.pipeline import verify

    layers = verify(network, box, VerifyOptions(time_limit=20.0)).layers
    wrong = 0
    for layer, ranges in zip(layers, exact_ranges_1d(network, box), strict=True):
        for status, (least, most) in zip(layer.status, ranges, strict=True):
            wrong += int((status == Status.INACTIVE and most > 0) or (status == Status.ACTIVE and least < 0)
                         or (status == Status.UNSTABLE and not least < 0 < most))
    status = Status(int(layers[1].status[0]))
    return ("inactive" if status is Status.INACTIVE else "unknown" if status is Status.UNKNOWN else "fires"), wrong


def run(count: int, tight: bool, pipeline: bool) -> dict[str, object]:
    tally = {m: {"lost": 0, "kept": 0, "unknown": 0, "seconds": 0.0} for m in METHODS if pipeline or m != "verdict"}
    wrong, fires = 0, 0
    for seed in range(count):
        network, box = family(np.random.default_rng([seed, int(tight)]), tight)
        truth = exact_ranges_1d(network, box)[1][0][1] > 0
        fires += truth
        for method, line in tally.items():
            began = time.perf_counter()
            if method == "verdict":
                answer, bad = verdict(network, box)
                wrong += bad
            else:
                answer = (
                    suggestion(network, box)
                    if method == "suggestion"
                    else plain(network, box, method == "objective")
                )
            line["seconds"] += time.perf_counter() - began
            line["lost"] += answer == "inactive" and truth
            line["kept"] += answer == "fires" and not truth
            line["unknown"] += answer == "unknown"
    return {"networks": count, "asked neuron fires": int(fires), "methods": tally,
            **({"wrong verdicts of exactprune, all neurons": wrong} if pipeline else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--no-pipeline", action="store_true", help="solvers only")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = {"HiGHS": version(), **{name: run(given.count, name == "tight", not given.no_pipeline)
                                     for name in ("random", "tight")}}
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
