"""ISA: one MILP over the whole network that looks for activation states not seen yet.

Serra, Yu, Kumar, Ramalingam, *Scaling up exact neural network compression by ReLU stability*, NeurIPS 2021, section
5: to the big-M model of all layers, with phase z_i for neuron i, add indicators p_i (for neurons not yet seen active)
and q_i (not yet seen inactive),

    maximise  sum_{i in P} p_i + sum_{i in Q} q_i    subject to    p_i <= z_i,    q_i <= 1 - z_i.

A solution shows new states for as many neurons as it can; when the maximum is 0, the neurons left in P are stably
inactive and those left in Q stably active. It stands here twice: as arrays for the hot path and as a Pyomo model to
read, to check against, and for other solvers. Whether the bounds are interval bounds, as published, or better ones is
the caller's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

from exactprune.domain import Box
from exactprune.errors import SolverError
from exactprune.formulations.arrays import Columns, Kind, MilpArrays, RowKind, Rows
from exactprune.formulations.bigm import BigM, build
from exactprune.formulations.lowering import OUTSIDE, is_linear, windows
from exactprune.formulations.lowering import lower as lower_op
from exactprune.network import INPUT, Network
from exactprune.ops import MaxPool2d, ReLU

NeuronSets = Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class IsaModel:
    """The MILP as arrays, its objective set to all its indicators.

    Attributes:
        bigm: the network's part, with ``arrays`` that contain the indicators.
        active: layer -> columns of p, in the order of the neurons that were given.
        inactive: layer -> columns of q.
    """

    bigm: BigM
    active: Mapping[int, np.ndarray]
    inactive: Mapping[int, np.ndarray]

    @property
    def arrays(self) -> MilpArrays:
        """The program."""
        return self.bigm.arrays


def isa_arrays(
    network: Network,
    box: Box,
    lower: Sequence[np.ndarray],
    upper: Sequence[np.ndarray],
    unseen_active: NeuronSets,
    unseen_inactive: NeuronSets,
) -> IsaModel:
    """The ISA MILP.

    Args:
        network, box: what is modelled.
        lower, upper: bounds of every ReLU layer up to the last one asked about.
        unseen_active: layer -> neurons for P; all must be unstable under the bounds.
        unseen_inactive: layer -> neurons for Q, likewise.
    """
    layers = sorted(set(unseen_active) | set(unseen_inactive))
    none = np.zeros(0, np.int64)
    asked = {k: np.union1d(unseen_active.get(k, none), unseen_inactive.get(k, none)) for k in layers}
    base = build(network, box, lower, upper, asked={k: v for k, v in asked.items() if v.size})
    active, inactive = {}, {}
    arrays = base.arrays
    for kind, sets, columns in (
        (Kind.SEEN_ACTIVE, unseen_active, active),
        (Kind.SEEN_INACTIVE, unseen_inactive, inactive),
    ):
        for layer, neurons in sets.items():
            arrays, columns[layer] = _indicators(arrays, kind, layer, np.asarray(neurons, np.int64))
    objective = np.isin(arrays.columns.kind, (Kind.SEEN_ACTIVE, Kind.SEEN_INACTIVE)).astype(np.float64)
    return IsaModel(replace(base, arrays=arrays.with_objective(objective)), active, inactive)


def _indicators(arrays: MilpArrays, kind: Kind, layer: int, neurons: np.ndarray) -> tuple[MilpArrays, np.ndarray]:
    """Append p <= z (or q <= 1 - z) for some neurons of a layer, with 0 <= p, q <= 1."""
    phases, index = arrays.columns.where(Kind.PHASE, layer)
    order = np.argsort(index)
    phase = phases[order][np.searchsorted(index[order], neurons)]
    rows, width = arrays.A.shape
    n, columns = np.arange(neurons.size), width + np.arange(neurons.size)
    sign = -1.0 if kind == Kind.SEEN_ACTIVE else 1.0
    block = sparse.csr_array((np.r_[np.ones(n.size), np.full(n.size, sign)], (np.r_[n, n], np.r_[columns, phase])),
                             shape=(n.size, width + n.size))
    old = sparse.csr_array((arrays.A.data, arrays.A.indices, arrays.A.indptr), shape=(rows, width + n.size))
    limit = np.zeros(n.size) if kind == Kind.SEEN_ACTIVE else np.ones(n.size)
    c, r, one, zero = arrays.columns, arrays.rows, np.ones(n.size), np.zeros(n.size)
    return MilpArrays(
        np.r_[arrays.c, zero],
        arrays.offset,
        sparse.vstack([old, block], format="csr"),
        np.r_[arrays.row_lower, np.full(n.size, -np.inf)],
        np.r_[arrays.row_upper, limit],
        np.r_[arrays.col_lower, zero],
        np.r_[arrays.col_upper, one],
        np.r_[arrays.integrality, np.zeros(n.size, np.uint8)],
        Columns(
            np.r_[c.kind, np.full(n.size, kind)],
            np.r_[c.layer, np.full(n.size, layer)],
            np.r_[c.index, neurons],
            np.r_[c.shift, zero],
            np.r_[c.scale, one],
        ),
        Rows(
            np.r_[r.kind, np.full(n.size, RowKind.INDICATOR)],
            np.r_[r.layer, np.full(n.size, layer)],
            np.r_[r.index, neurons],
            np.r_[r.scale, one],
        ),
    ), columns


# -- the same to read, in Pyomo ----------------------------------------------------------------------------


def isa_pyomo(
    network: Network,
    box: Box,
    lower: Sequence[np.ndarray],
    upper: Sequence[np.ndarray],
    unseen_active: NeuronSets,
    unseen_inactive: NeuronSets,
) -> Any:
    """The ISA MILP as a Pyomo ``ConcreteModel``, written as in the paper.

    Variables: ``x`` inputs, ``h`` and ``hbar`` positive and negative part of a pre-activation, ``z`` phase, ``p`` and
        ``q``
    indicators; all but ``x`` are indexed by (ReLU layer, neuron) and exist where the bounds leave the neuron unstable.
    Arguments as for ``isa_arrays``.

    Raises:
        SolverError: Pyomo is not installed.
    """
    pyo = _pyomo()
    m = pyo.ConcreteModel(name="ISA")
    low, high = box.reshaped(network.input_shape).lower.ravel(), box.reshaped(network.input_shape).upper.ravel()
    top = max(set(unseen_active) | set(unseen_inactive))
    split = [(k, int(i)) for k in range(top + 1) for i in np.flatnonzero((lower[k] < 0) & (upper[k] > 0))]
    m.x = pyo.Var(range(low.size), bounds=lambda m, i: (float(low[i]), float(high[i])))
    m.h = pyo.Var(split, bounds=lambda m, k, i: (0.0, float(upper[k][i])))
    m.hbar = pyo.Var(split, bounds=lambda m, k, i: (0.0, -float(lower[k][i])))
    m.z = pyo.Var(split, domain=pyo.Binary)
    m.definition = pyo.ConstraintList(doc="pre-activation = h - hbar")
    m.pools = pyo.Block(pyo.Any)
    _propagate(pyo, m, network, lower, upper, top)
    m.positive_part = pyo.Constraint(split, rule=lambda m, k, i: m.h[k, i] <= float(upper[k][i]) * m.z[k, i])
    m.negative_part = pyo.Constraint(split, rule=lambda m, k, i: m.hbar[k, i] <= -float(lower[k][i]) * (1 - m.z[k, i]))
    P, Q = ([(k, int(i)) for k, neurons in sets.items() for i in neurons] for sets in (unseen_active, unseen_inactive))
    m.p = pyo.Var(P, bounds=(0, 1))
    m.q = pyo.Var(Q, bounds=(0, 1))
    m.seen_active = pyo.Constraint(P, rule=lambda m, k, i: m.p[k, i] <= m.z[k, i])
    m.seen_inactive = pyo.Constraint(Q, rule=lambda m, k, i: m.q[k, i] <= 1 - m.z[k, i])
    m.newly_seen = pyo.Objective(expr=pyo.quicksum(m.p.values()) + pyo.quicksum(m.q.values()), sense=pyo.maximize)
    return m


def _pyomo() -> Any:
    try:
        import pyomo.environ as pyo
    except ImportError:
        raise SolverError(
            "Pyomo is not installed; install exactprune[milp], or use the decider's own HiGHS arrays"
        ) from None
    return pyo


def _propagate(
    pyo: Any, m: Any, network: Network, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], top: int
) -> None:
    """Pyomo expressions of every node's output up to ReLU layer ``top``, adding the defining constraints on the way."""
    outputs: dict[int, list[Any]] = {INPUT: list(m.x.values())}
    layer_of = {node: k for k, node in enumerate(network.relus)}
    for position in range(network.relus[top] + 1):
        node = network.nodes[position]
        given = [outputs[i] for i in node.inputs]
        if isinstance(node.op, ReLU):
            outputs[position] = _relu(m, layer_of[position], given[0], lower, upper)
        elif isinstance(node.op, MaxPool2d):
            outputs[position] = _pool(pyo, m, position, node.op, network.shape_of(node.inputs[0]), given[0])
        elif is_linear(node.op):
            lowered = lower_op(node.op, *(network.shape_of(i) for i in node.inputs))
            sums = [float(c) for c in lowered.constant]
            for matrix, values in zip(lowered.matrices, given, strict=True):
                sums = [_row(pyo, matrix, i, values) + s for i, s in enumerate(sums)]
            outputs[position] = sums


def _row(pyo: Any, matrix: Any, i: int, values: list[Any]) -> Any:
    span = slice(matrix.indptr[i], matrix.indptr[i + 1])
    return pyo.quicksum(float(w) * values[j] for w, j in zip(matrix.data[span], matrix.indices[span], strict=True))


def _relu(m: Any, k: int, values: list[Any], lower: Sequence[np.ndarray], upper: Sequence[np.ndarray]) -> list[Any]:
    result = []
    for i, value in enumerate(values):
        if upper[k][i] <= 0:
            result.append(0.0)
        elif lower[k][i] >= 0:
            result.append(value)
        else:
            m.definition.add(value == m.h[k, i] - m.hbar[k, i])
            result.append(m.h[k, i])
    return result


def _pool(pyo: Any, m: Any, position: int, op: MaxPool2d, shape: tuple[int, ...], values: list[Any]) -> list[Any]:
    """o >= y_t; o <= y_t + (top - l_t)(1 - choice_t); one choice; with ranges by Pyomo's own interval arithmetic."""
    from pyomo.contrib.fbbt.expression_bounds_walker import ExpressionBoundsVisitor

    ranges = [ExpressionBoundsVisitor().walk_expression(v) for v in values]
    places = windows(shape, op.kernel, op.stride, op.padding, op.dilation)
    block = m.pools[position]
    block.o = pyo.Var(range(places[..., 0, 0].size))
    block.choice = pyo.Var(block.o.index_set(), range(places[0, 0, 0].size), domain=pyo.Binary)
    block.rules = pyo.ConstraintList()
    for output, window in enumerate(places.reshape(len(block.o), -1)):
        inside = [(t, place) for t, place in enumerate(window) if place != OUTSIDE]
        top = max(ranges[place][1] for _, place in inside)
        for t, place in inside:
            block.rules.add(block.o[output] >= values[place])
            block.rules.add(block.o[output] <= values[place] + (top - ranges[place][0]) * (1 - block.choice[output, t]))
        block.rules.add(pyo.quicksum(block.choice[output, t] for t, _ in inside) == 1)
    return list(block.o.values())
