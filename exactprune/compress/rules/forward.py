"""Rule ``forward``: a neuron that is not stable, but whose removal nothing downstream sees (forward redundancy).

Neuron v goes although it is active somewhere on D, because wherever it is, every neuron w that reads it is off, with it and
without it: with t_w the pre-activation of w less its negative weights on the neurons that go,

    t_w <= 0 wherever z_v >= 0,   for every w with a weight on v.

Then every ReLU behind has the value it had, for every x in D. Level: ``exact``. (Lahav and Katz, "Pruning and slicing neural
networks using formal verification", FMCAD 2021, forward redundancy; they remove one neuron at a time and ask a verifier.)

1. Sampling: a neuron that is active at a point where a reader of it is on is no candidate. Gradient search, aimed at such
   points, looks again at those that are left. This is what the rule costs where there is nothing to find.
2. Proof of all (v, w) (``compress.implications``): one backward substitution with the phase z_v >= 0 as a constraint, else an LP,
   else branch and bound over phases. What is not proved stays, and the rest is proved anew without it.
3. The checker's own code decides (``checker.redundant``), on bounds that a bundle can prove; its records go into the bundle.

It applies to layers that only affine maps in front of one ReLU each read. *Unknown* neurons are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from exactprune.checker import redundant
from exactprune.checker.bounds import Bounds
from exactprune.checker.network import of as checked
from exactprune.checker.redundant import Reader
from exactprune.claim import LayerVerdict, Status
from exactprune.deciders.proofs import Record
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Affine

POINTS, STEPS, STARTS = 512, 24, 4
MOST = 256  # candidates of a layer that are looked at closely


@dataclass(frozen=True, eq=False)
class Cleared:
    """The network without what nothing sees: same shapes, the neurons' outgoing weights are 0.

    Attributes:
        network: equal to the given one on the domain.
        verdicts: true of it.
        units: ReLU layer -> neurons that nothing reads any more.
        records: what the checker needs, in the order in which they went.
    """

    network: Network
    verdicts: tuple[LayerVerdict, ...]
    units: dict[int, np.ndarray]
    records: tuple[Record, ...]


def forward_redundant(network: Network, domain: Box, verdicts: Sequence[LayerVerdict]) -> Cleared:
    """Find and prove forward redundant neurons, layer by layer.

    Args:
        network: any network.
        domain: the box.
        verdicts: one per ReLU layer; they say which neurons are not stable, and what is known about bounds.
    """
    cleared = Cleared(network, tuple(verdicts), {}, ())
    found = candidates(network, domain, verdicts)
    if not found:
        return cleared
    from exactprune.compress.implications import bundle_bounds, decided

    bounds = bundle_bounds(network, domain, verdicts)
    for layer in sorted(found):
        left = found[layer]
        while left.size:
            units, record = decided(cleared.network, domain, bounds, layer, left)
            if not units.size:
                break
            bounds, left = redundant.without(bounds, record), np.setdiff1d(left, units)
            cleared = _taken(cleared, bounds, layer, units, record)
    return cleared


def _taken(cleared: Cleared, bounds: Bounds, layer: int, units: np.ndarray, record: Record) -> Cleared:
    nodes = list(cleared.network.nodes)
    for reader in redundant.readers_of(bounds.network, layer):
        op = nodes[reader.node].op
        assert isinstance(op, Affine)
        weight = bounds.network.nodes[reader.node].op.arrays["weight"]
        nodes[reader.node] = replace(nodes[reader.node], op=Affine(weight, op.bias))
    verdicts = tuple(_moved(v, bounds) for v in cleared.verdicts)
    gone = np.union1d(cleared.units.get(layer, units), units)
    return Cleared(replace(cleared.network, nodes=tuple(nodes)), verdicts, {**cleared.units, layer: gone},
                   (*cleared.records, record))


def _moved(verdict: LayerVerdict, bounds: Bounds) -> LayerVerdict:
    """The verdict with lower bounds that are true of rows that have changed."""
    lower = np.minimum(verdict.lower, bounds.lower[verdict.layer])
    lost = (verdict.status == Status.ACTIVE) & (lower < 0)
    reasons = {**verdict.reasons, **{int(i): "an earlier layer was rewritten" for i in np.flatnonzero(lost)}}
    return replace(verdict, status=np.where(lost, Status.UNKNOWN, verdict.status), lower=lower, reasons=reasons)


# -- candidates -----------------------------------------------------------------------------------------------------


def candidates(network: Network, domain: Box, verdicts: Sequence[LayerVerdict]) -> dict[int, np.ndarray]:
    """Neurons that no point found speaks against, by layer."""
    f = checked(network)
    readers = {v.layer: redundant.readers_of(f, v.layer) for v in verdicts if (v.status == Status.UNSTABLE).any()}
    readers = {layer: found for layer, found in readers.items() if found}
    if not readers:
        return {}
    rng, size = np.random.default_rng(0), sum(int(np.prod(s)) for s in network.shapes)
    points = int(np.clip(2e7 / size, 32, POINTS))
    x = np.concatenate([domain.sample(points // 2, rng), domain.corners(points // 2, rng)])
    with np.errstate(all="ignore"):
        values = network.evaluate_nodes(x, np.float64)
    found: dict[int, np.ndarray] = {}
    for layer, of in readers.items():
        units = np.flatnonzero(verdicts[layer].status == Status.UNSTABLE)
        units = _unseen(network, values, layer, of, units)[:MOST]
        units = _searched(network, domain, x, values, layer, of, units) if units.size else units
        if units.size:
            found[layer] = units
    return found


def _weights(network: Network, reader: Reader) -> np.ndarray:
    op = network.nodes[reader.node].op
    assert isinstance(op, Affine)
    return op.weight.astype(np.float64)


def _unseen(network: Network, values: dict[int, np.ndarray], layer: int, readers: Sequence[Reader],
            units: np.ndarray) -> np.ndarray:
    """Units that are read, and active at no point at which a reader of theirs is on, with or without them."""
    active = values[network.relus[layer]][:, units]
    read = np.zeros(len(units), bool)
    seen = np.zeros(len(units), bool)
    for reader in readers:
        weight, z = _weights(network, reader)[:, units], values[reader.node]
        on = (active > 0).T.astype(np.float32) @ (z > 0).astype(np.float32) > 0  # (units, rows)
        read |= (weight != 0).any(axis=0)
        seen |= (on & (weight != 0).T).any(axis=1)
        for i in np.flatnonzero(~seen & (weight < 0).any(axis=0)):
            rows = np.flatnonzero(active[:, i] > 0)
            raised = z[rows] - active[rows, i, None] * np.minimum(weight[:, i], 0)
            seen[i] = ((raised > 0) & (weight[:, i] != 0)).any()
    return units[read & ~seen]


def _searched(network: Network, domain: Box, x: np.ndarray, values: dict[int, np.ndarray], layer: int,
              readers: Sequence[Reader], units: np.ndarray) -> np.ndarray:
    """Units for which gradient steps to where they are active, and then to where a reader is on, find nothing either.

    Those that are not met active are left alone: there is no sign that anything hides them.
    """
    import torch

    from exactprune.compress.differentiable import compile_network, values_of

    nodes = network.nodes[: max(reader.node for reader in readers) + 1]
    program, relu = compile_network(replace(network, nodes=nodes)), network.relus[layer]
    source = network.nodes[relu].inputs[0]
    low, high = program.box(domain)
    owner = np.repeat(np.arange(len(units)), STARTS)
    best = np.argsort(-values[source][:, units], axis=0)[:STARTS].T.reshape(-1)
    at = torch.tensor(x.reshape(len(x), -1)[best])
    weight = [torch.tensor(_weights(network, reader)).T for reader in readers]
    seen, met = np.zeros(len(units), bool), np.zeros(len(units), bool)
    for step in range(STEPS):
        left = ~seen[owner] & (met[owner] | (step < STEPS // 2))
        at, owner = at[torch.tensor(left)], owner[left]
        if not len(owner):
            break
        rows, unit = torch.arange(len(owner)), torch.tensor(units[owner])
        at.requires_grad_(True)
        now = values_of(program, at)
        z = now[source][rows, unit]
        tops = [torch.where(w[unit] != 0, now[r.node] + (-w[unit]).clamp(min=0) * z.clamp(min=0)[:, None], -torch.inf).amax(dim=1)
                for w, r in zip(weight, readers, strict=True)]
        top = torch.stack(tops).amax(dim=0)
        met[owner[(z > 0).numpy()]] = True
        seen[owner[((z > 0) & (top > 0)).numpy()]] = True
        (slope,) = torch.autograd.grad(torch.where(z > 0, top, z).sum(), at)
        at = (at.detach() + 0.3 * 0.85**step * (high - low) * slope.sign()).clamp(low, high)
    return units[met & ~seen]
