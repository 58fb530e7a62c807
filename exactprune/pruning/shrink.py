"""Physically smaller networks from masked ones, where whole neurons or channels died.

A neuron all of whose incoming weights are zero is a constant, and one all of whose outgoing weights are zero is not
read: the project's own compression removes both, exactly. It is asked about a box so wide that nothing is stable but such
neurons, so that approximate pruning and lossless compression are not mixed up: |x| <= 2^20.
"""

from __future__ import annotations

from exactprune.domain import uniform
from exactprune.network import Network
from exactprune.options import CompressOptions, VerifyOptions
from exactprune.pipeline import compress, verify

WIDE = 2.0**20


def shrink(network: Network) -> Network:
    """``network`` without dead and unread neurons; equal to it as a real function on |x| <= 2^20."""
    domain = uniform(-WIDE, WIDE, network.input_shape)
    verification = verify(network, domain, VerifyOptions(exact=False))
    return compress(verification, options=CompressOptions(max_deviation="exact", samples=10)).network
