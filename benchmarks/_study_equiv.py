"""``equiv`` on a network and what ``compress`` made of it at several budgets, and on two networks trained apart."""

from __future__ import annotations

import time

import _compress_cases as inputs
from _study_cells import Cells, Facts

import exactprune
from exactprune.options import CompressOptions, VerifyOptions

PAIRS = (("digits_2x32", ("exact", "rounding")), ("fashion_2x100", ("exact", "rounding", 1e-2)),
         ("fashion_5x100", ("exact", "rounding", 1e-2)), ("fashion_2x800", ("exact", "rounding")),
         ("fashion_resnet", ("rounding",)))
APART = ("fashion_2x100", "fashion_2x100_plain")


def equiv_cells(cells: Cells) -> list[Facts]:
    """One cell a pair."""
    found = {case.name: case for case in inputs.cases()}
    rows = [pair(cells, found[name], b) for name, budgets in PAIRS for b in budgets]
    return [*rows, apart(cells, *(found[name] for name in APART))]


def pair(cells: Cells, case: inputs.Case, budget: str | float) -> Facts:
    """A network and its compression at one budget."""
    def make() -> Facts:
        network, box = case.load()
        smaller = exactprune.compress(exactprune.verify(network, box, VerifyOptions(time_limit=60)),
                                      options=CompressOptions(max_deviation=budget))
        return {"A": case.name, "B": str(budget), "eps": smaller.level.eps, **bounded(network, smaller.network, box)}

    return cells.get(f"{case.name}_{budget}", {"model": case.name, "budget": budget}, make)


def apart(cells: Cells, a: inputs.Case, b: inputs.Case) -> Facts:
    """Two networks that were trained apart."""
    def make() -> Facts:
        network, box = a.load()
        return {"A": a.name, "B": f"{b.name} (trained apart)", "eps": None, **bounded(network, b.load()[0], box)}

    return cells.get(f"{a.name}_{b.name}", {"models": [a.name, b.name]}, make)


def bounded(a: exactprune.Network, b: exactprune.Network, box: exactprune.Box) -> Facts:
    """Certified and found largest difference, and what it took."""
    cpu = time.process_time()
    found = exactprune.equiv(a, b, box)
    return {"upper": found.upper, "lower": found.lower, "ratio": found.upper / found.lower if found.lower > 0 else None,
            "cpu seconds": time.process_time() - cpu}
