"""The networks of models/ and those of the shared folder that come with data, each on its own domain.

What is not there gets a row that says why. Domains that hold none of the test samples have no accuracy, and say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import _compress_cases as inputs
from _compress_cases import Case
from _study_cells import ROOT, Cells, Facts, examined

LIMIT = 60.0
SHARED = ("mnist_100-100", "cifar10_isa_116-248", "mnist256x2_0.03", "mnist256x2_0.05", "cifar_base_kw", "resnet_2b",
          "convnet_maxpool")
WHY_SHARED = "not in the shared folder (EXACTPRUNE_SHARED)"
WHY_BENCH = "too large to commit; make bench-models"


def network_cells(cells: Cells) -> list[Facts]:
    """One cell a network, or the reason why there is none."""
    found = {case.name: case for case in inputs.cases()}
    return [one(cells, found[name]) if name in found else {"name": name, "left out": why} for name, why in wanted()]


def wanted() -> Iterator[tuple[str, str]]:
    """Names, each with the reason that is given where it is missing."""
    known = json.loads((ROOT / "models" / "models.json").read_text())
    yield from ((name, "not in models/; make models") for name in known)
    yield "fashion_2x800_plain", WHY_BENCH
    yield from ((name, WHY_SHARED) for name in SHARED)


def one(cells: Cells, case: Case) -> Facts:
    """Verify and compress a network on its domain."""
    network, box = case.load()
    settings = {"network": network.sha256, "domain": box.sha256, "limit": LIMIT}
    data = inputs.samples(case, network, box)
    found = cells.get(case.name, settings, lambda: examined(case.model, network, box, data, LIMIT))
    return found | {"domain": box.source if case.vnnlib is None else case.vnnlib.name, "l1": case.l1}
