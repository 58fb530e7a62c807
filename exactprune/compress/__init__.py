"""Compression: a smaller network that provably computes the same function on the domain.

``compress_network(network, domain, verdicts)`` is the entry. ``compress.plan`` decides what goes, ``compress.apply``
makes the smaller network, ``compress.rules`` holds one rule a file, and ``compress.measure`` compares two networks by
running them.
"""

from exactprune.compress.levels import EXACT, Kind, Level, certified, floating, measured
from exactprune.compress.plan import Removal
from exactprune.compress.rewrite import Rewrite, Step, compress_network

__all__ = ["EXACT", "Kind", "Level", "Removal", "Rewrite", "Step", "certified", "compress_network", "floating",
           "measured"]
