"""Make trained ReLU networks smaller and prove that nothing changed.

    import exactprune
    network = exactprune.load("models/fashion_2x100.pt")
    result = exactprune.verify(network)
    smaller = exactprune.compress(result)
    exactprune.save(smaller.network, "small.pt")

Names are imported when they are first used (PEP 562), so importing the package, its checker or its command line costs
neither torch nor a solver.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from exactprune.checker import check_run as check
    from exactprune.claim import LayerVerdict, Method, Status
    from exactprune.compress.slicing import load_split
    from exactprune.domain import Box, around, of_data, uniform
    from exactprune.equivalence import Equivalence, equiv
    from exactprune.errors import ExactPruneError
    from exactprune.io import load, load_vnnlib, save
    from exactprune.network import Network
    from exactprune.options import CompressOptions, VerifyOptions
    from exactprune.pipeline import Compression, Verification, compress, compress_split, verify
    from exactprune.pruning import PruneResult, prune
    from exactprune.report.record import read_run, write_run

_HOME = {
    "check": "checker:check_run",
    "LayerVerdict": "claim", "Method": "claim", "Status": "claim",
    "load_split": "compress.slicing",
    "Box": "domain", "around": "domain", "of_data": "domain", "uniform": "domain",
    "Equivalence": "equivalence", "equiv": "equivalence",
    "ExactPruneError": "errors",
    "load": "io", "load_vnnlib": "io", "save": "io",
    "Network": "network",
    "CompressOptions": "options", "VerifyOptions": "options",
    "Compression": "pipeline", "Verification": "pipeline", "compress": "pipeline",
    "compress_split": "pipeline", "verify": "pipeline",
    "PruneResult": "pruning", "prune": "pruning",
    "read_run": "report.record", "write_run": "report.record",
}

__all__ = [
    "Box", "CompressOptions", "Compression", "Equivalence", "ExactPruneError", "LayerVerdict", "Method", "Network", "PruneResult",
    "Status", "Verification", "VerifyOptions", "__version__", "around", "check", "compress", "compress_split", "equiv",
    "load", "load_split", "load_vnnlib", "of_data", "prune", "read_run", "save", "uniform", "verify", "write_run",
]


def __getattr__(name: str) -> Any:
    if name == "pruners":
        return import_module("exactprune.pruners")
    if name not in _HOME:
        raise AttributeError(f"module 'exactprune' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(f"exactprune.{module}"), attribute or name)
    if name != "compress":
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The package's own class: ``exactprune.compress`` is the function, also after the subpackage was imported.

    Importing ``exactprune.compress.plan`` makes the import system bind the subpackage to the name ``compress`` here;
    the setter lets that pass without effect. ``from exactprune.compress.plan import ...`` works as always.
    """

    @property
    def compress(self) -> Any:
        """See ``exactprune.pipeline.compress``."""
        return __getattr__("compress")

    @compress.setter
    def compress(self, value: object) -> None:
        """Ignore the import system's binding of the subpackage."""


if not TYPE_CHECKING:
    sys.modules[__name__].__class__ = _Package
