"""What could still be removed at which certified deviation: the same verdicts, compressed at several budgets."""

from __future__ import annotations

from typing import Any

from exactprune.compress.levels import upward
from exactprune.compress.rewrite import compress_network
from exactprune.errors import CertificateError
from exactprune.network import Network
from exactprune.report.record import RunRecord

SHARES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the largest output found on the domain


def removal_curve(network: Network, record: RunRecord) -> list[dict[str, Any]]:
    """Neurons and parameters left at ``exact``, ``rounding``, and shares of the largest output found.

    Args:
        network: the one the run is about.
        record: its run folder.

    Returns:
        Rows of ``allowed`` (text), ``certified`` (text, rounded up), ``eps``, ``neurons``, ``parameters``, and of the original
        ``neurons_before`` and ``parameters_before``.

    Raises:
        CertificateError: the run is about another network.
    """
    if network.sha256 != record.summary["model"]["network_sha256"]:
        raise CertificateError(f"{record.folder}: the model is not the one of this run; give the model with --model")
    rounding = compress_network(network, record.domain, record.layers, max_deviation="rounding")
    allowed: list[tuple[str, str | float]] = [("exact", "exact"), ("rounding", "rounding")]
    allowed += [(f"{share * rounding.reach:.3g} ({share:g} R)", share * rounding.reach) for share in SHARES
                if rounding.reach > 0]
    return [_row(text, network, record, budget) for text, budget in allowed]


def _row(text: str, network: Network, record: RunRecord, budget: str | float) -> dict[str, Any]:
    found = compress_network(network, record.domain, record.layers, max_deviation=budget)
    return {"allowed": text, "certified": upward(found.eps) if found.eps else "0", "eps": found.eps,
            "neurons": found.network.neurons, "parameters": found.network.parameters, "neurons_before": network.neurons,
            "parameters_before": network.parameters}
