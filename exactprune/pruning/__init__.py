"""``exactprune.prune``: from a model and a method to a pruned model and an honest report."""

from __future__ import annotations

from exactprune.pruning.api import PruneResult, prune
from exactprune.pruning.facts import LayerDensity, PruneReport
from exactprune.pruning.scaling_up import ScalingUp

__all__ = ["LayerDensity", "PruneReport", "PruneResult", "ScalingUp", "prune"]
