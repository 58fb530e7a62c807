"""Polish: weights behind merged units rounded together, for what reaches the output.

The outgoing weights U of merged units u(x), and the biases behind them, are numbers of the dtype. Rounded row by row they leave
an error of about a unit in the last place in each pre-activation z behind. What counts is J(x) times these errors, J
being the Jacobian of the output in z: few directions, over few regions of the domain, against one number to choose for every
weight. Moving weight (i, j) by t_ij units in the last place s_ij changes the deviation D(x) = f(x) - g(x) to

    D(x) - sum_ij J_i(x) u_j(x) s_ij t_ij

(biases: u = 1). Over sampled inputs, integers t that make the sum of squares plus lam abs(t)^2 small are a closest vector
problem, which nearest plane (Babai 1986, "On Lovasz' lattice reduction and the nearest lattice point problem") solves
approximately: one weight after the other is rounded, and those that follow make up for it.

Nothing here is believed: the step has a certified deviation of its own, and ``compress.joint`` bounds that of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from exactprune.checker import chains
from exactprune.checker.network import of as checked
from exactprune.compress.apply import State
from exactprune.compress.deviation import inflated, propagate_all
from exactprune.compress.linear import widened
from exactprune.domain import Box
from exactprune.network import Network
from exactprune.ops import Affine

if TYPE_CHECKING:
    from exactprune.compress.rewrite import Rewrite

_POINTS = 20_000  # sampled, and as many others to choose by
_NUMBERS = 2e7  # that a Jacobian at these points may have
_ROWS = 15_000  # equations, about
_WEIGHTS = 1500  # rounded together, at most
_MOVES = 64  # units in the last place, at most
_LAMS = (1e-3, 1e-4, 1e-5)  # of the largest column, that a unit in the last place costs


@dataclass(frozen=True, eq=False)
class Polished:
    """What moved behind one layer.

    Attributes:
        layer: number of the original's ReLU layer whose merged units' outgoing weights moved.
        moved: how many numbers.
        before, after: the largest abs(f - g) at inputs that played no part in the choice.
        deviation: bound on the change of each output, float64.
    """

    layer: int
    moved: int
    before: float
    after: float
    deviation: np.ndarray


def polished(network: Network, domain: Box, rewrite: Rewrite) -> tuple[State, list[Polished]]:
    """Round the weights behind merged units afresh, from the last layer to the first.

    Args:
        network: f, a chain of affine layers and ReLUs in float32.
        domain: the box.
        rewrite: what became of it.

    Returns:
        the network that deviates less at inputs that were not used, with its verdicts; and what moved: nothing, perhaps.
    """
    state, done = State(rewrite.network, rewrite.verdicts, rewrite.origin), []
    if state.network.dtype != np.float32 or chains.chain_of(checked(state.network)) is None:
        return state, done
    for layer in reversed(range(len(state.origin))):
        units = np.flatnonzero(state.origin[layer][1] < 0)
        after = _moved(network, domain, state, layer, units) if units.size else None
        if after is not None:
            state, found = after
            done.append(found)
    return state, done


def _moved(f: Network, domain: Box, state: State, layer: int, units: np.ndarray) -> tuple[State, Polished] | None:
    g, position = state.network, _reader(state.network, layer)
    op = g.nodes[position].op
    assert isinstance(op, Affine)
    numbers = np.concatenate([op.weight[:, units], op.bias[:, None]], axis=1)
    if numbers.size > _WEIGHTS:
        return None
    rng, count = np.random.default_rng(0), int(min(_POINTS, _NUMBERS / (np.prod(g.output_shape) * len(op.bias))))
    fit, test = (domain.sample(count, rng) for _ in range(2))
    steps = np.spacing(np.abs(numbers)).astype(np.float64)
    wanted, columns = _equations(g, layer, units, fit, _gaps(f, g, fit), steps)
    best, before = None, float(np.abs(_gaps(f, g, test)).max(initial=0.0))
    least = before
    for lam in _LAMS:
        moves = nearest(columns, wanted, lam).reshape(numbers.shape)
        stored = (numbers.astype(np.float64) + moves * steps).astype(numbers.dtype)
        weight = op.weight.copy()
        weight[:, units] = stored[:, :-1]
        nodes = list(g.nodes)
        nodes[position] = replace(nodes[position], op=Affine(weight, stored[:, -1].copy()))
        other = replace(g, nodes=tuple(nodes))
        size = float(np.abs(_gaps(f, other, test)).max(initial=0.0))
        if size < least:
            best, least = (other, stored), size
    if best is None:
        return None
    moved = propagate_all(g, {position: _change(state, layer, units, numbers, best[1])[None]})
    after = replace(widened(state, moved), network=best[0])
    return after, Polished(state.origin[layer][0], int((best[1] != numbers).sum()), before, least, moved[g.output][0])


def _reader(g: Network, layer: int) -> int:
    """The affine layer that reads a ReLU layer of a chain."""
    return next(i for i, node in enumerate(g.nodes) if i > g.relus[layer] and isinstance(node.op, Affine))


def _gaps(f: Network, g: Network, x: np.ndarray) -> np.ndarray:
    """f - g in float64, (points, outputs)."""
    with np.errstate(all="ignore"):
        return np.nan_to_num(f.evaluate(x, np.float64) - g.evaluate(x, np.float64)).reshape(len(x), -1)


def _equations(g: Network, layer: int, units: np.ndarray, x: np.ndarray, gaps: np.ndarray,
               steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deviations (rows,), and what a step of each number makes of them (rows, numbers), where most gets through."""
    network = checked(g)
    found = chains.chain_of(network)
    assert found is not None
    chain, flat = found[0], x.reshape(len(x), -1).astype(np.float64)
    z, y = [], chains.scaled(network, flat, flat)[0]
    for weight, bias in zip(chain.weights, chain.biases, strict=True):
        z.append(y @ weight.T + bias)
        y = np.maximum(z[-1], 0.0)
    jacobian = np.broadcast_to(chain.weights[-1], (len(x), *chain.weights[-1].shape))
    for k in range(chain.hidden - 1, layer, -1):
        jacobian = jacobian * (z[k] > 0)[:, None, :]
        jacobian = jacobian @ chain.weights[k] if k > layer + 1 else jacobian
    if layer + 1 == chain.hidden:
        jacobian = np.broadcast_to(np.eye(len(chain.biases[-1])), (len(x), *(2 * chain.biases[-1].shape)))
    outputs = jacobian.shape[1]
    rows = max(_ROWS, 3 * steps.size) // outputs
    top = np.argsort(-np.abs(jacobian).sum(axis=2).max(axis=1), kind="stable")[:rows]
    values = np.concatenate([np.maximum(z[layer][top][:, units], 0.0), np.ones((len(top), 1))], axis=1)
    columns = jacobian[top][:, :, :, None] * values[:, None, None, :] * steps
    return gaps[top].reshape(-1), columns.reshape(-1, steps.size)


def nearest(columns: np.ndarray, wanted: np.ndarray, lam: float) -> np.ndarray:
    """Integers t, (n,), with abs(wanted - columns t)^2 + (lam largest abs(column))^2 abs(t)^2 small: nearest plane.

    The column with the largest effect is rounded first. No more than ``_MOVES`` either way; all 0 where there is no effect.
    """
    size = np.linalg.norm(columns, axis=0)
    if not size.max(initial=0.0) > 0:
        return np.zeros(len(size))
    order = np.argsort(size, kind="stable")
    ridge = lam * size.max() * np.eye(len(size))
    q, r = np.linalg.qr(np.concatenate([columns[:, order], ridge]))
    goal, t = q.T @ np.concatenate([wanted, np.zeros(len(size))]), np.zeros(len(size))
    for i in range(len(size) - 1, -1, -1):
        t[i] = np.clip(np.rint((goal[i] - r[i, i + 1:] @ t[i + 1:]) / r[i, i]), -_MOVES, _MOVES)
    found = np.empty_like(t)
    found[order] = t
    return found


def _change(state: State, layer: int, units: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Bound on the change of each pre-activation behind: units lie between 0 and their upper bounds."""
    moved = np.abs(after.astype(np.float64) - before)
    reach = np.append(np.maximum(state.verdicts[layer].upper.reshape(-1)[units], 0.0), 1.0)
    return inflated(moved @ reach, len(reach) + 2)
