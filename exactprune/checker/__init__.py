"""The independent checker of certificates: standard library and numpy only, exact integers, no tolerance.

``check_run(model, run)`` reads a model file with the checker's own reader and checks a run folder; ``check`` does the
same for a network and records in memory. What is written, and why accepting it is sound: docs/certificate.md.
"""

from exactprune.checker.engine import LayerReport, Report, check
from exactprune.checker.network import CheckError, Network, Node, Op
from exactprune.checker.readers import check_run, read_network

__all__ = ["CheckError", "LayerReport", "Network", "Node", "Op", "Report", "check", "check_run", "read_network"]
