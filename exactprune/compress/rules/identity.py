"""Rule ``identity``: operators that are the identity on the domain go.

- Add with an operand that is 0 on D equals the other operand.
- With ``linearise``: a ReLU node all of whose neurons are stably active equals its input (z_hat >= 0 on D).

Level: ``exact``, deviation 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exactprune.claim import LayerVerdict, Status
from exactprune.compress.constants import Constant
from exactprune.network import Network
from exactprune.ops import Add


def identities(network: Network, constants: Mapping[int, Constant], verdicts: Sequence[LayerVerdict],
               linearise: bool) -> dict[int, int]:
    """Position of a node -> position of the tensor that it equals on the domain."""
    found = {}
    for position, node in enumerate(network.nodes):
        if isinstance(node.op, Add):
            zero = [i for i, source in enumerate(node.inputs) if constants[source].zero.all()]
            if zero:
                found[position] = node.inputs[1 - zero[0]]
    if linearise:
        found |= {network.relus[v.layer]: network.nodes[network.relus[v.layer]].inputs[0] for v in verdicts
                  if v.status.size and (v.status == Status.ACTIVE).all()}
    return found
