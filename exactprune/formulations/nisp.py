"""NISP's binary integer program as a Pyomo model: which neurons stay, under a budget.

R. Yu et al., "NISP: pruning networks using neuron importance score propagation", CVPR 2018, Eqs. 3-4 and 7-9: the loss of
weighted final responses is bounded by the importance of what goes, so the program is

    maximise sum_l sum_i s_li z_li,   z binary,   L_l <= sum_i z_li <= U_l,   cost(z) <= budget.

``cost`` is the number of neurons, of parameters, or of multiply-accumulates, in all. With c_l = sum_i z_li, layer l costs
alpha_l c_(l-1) c_l + beta_l c_l, a product of a count and a sum of binaries; t_li = c_(l-1) z_li is exact for binary z with
t_li >= c_(l-1) - N_(l-1) (1 - z_li), t_li >= 0, because the budget presses t down. This module states the model; it does not
solve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs: ``pair`` per (input kept, neuron kept), ``single`` per neuron kept.

    The last entry of a list of costs belongs to the output layer, whose neurons all stay.
    """

    pair: float
    single: float


def total_cost(counts: Sequence[int], costs: Sequence[LayerCost], inputs: int) -> float:
    """Cost of keeping ``counts[l]`` neurons of layer l; the output layer's count comes last."""
    before = (inputs, *counts[:-1])
    return sum(c.pair * n_in * n + c.single * n for c, n_in, n in zip(costs, before, counts))


def nisp_model(scores: Sequence[np.ndarray], least: Sequence[int], most: Sequence[int], costs: Sequence[LayerCost],
               inputs: int, outputs: int, budget: float) -> Any:
    """The program.

    Args:
        scores: importance of the neurons of every hidden layer.
        least: fewest neurons that stay, per layer.
        most: most neurons that stay, per layer.
        costs: of every hidden layer and of the output layer.
        inputs: number of inputs of the first layer (channels, or features).
        outputs: neurons of the output layer.
        budget: limit on the total cost.

    Returns:
        A ``pyomo.environ.ConcreteModel`` with binaries ``z[l, i]``.
    """
    import pyomo.environ

    pyo: Any = pyomo.environ
    model = pyo.ConcreteModel(name="nisp")
    places = [(layer, i) for layer, s in enumerate(scores) for i in range(len(s))]
    model.z = pyo.Var(places, domain=pyo.Binary)
    counts = [pyo.quicksum(model.z[layer, i] for i in range(len(s))) for layer, s in enumerate(scores)]
    model.importance = pyo.Objective(
        expr=pyo.quicksum(float(scores[layer][i]) * model.z[layer, i] for layer, i in places), sense=pyo.maximize)
    model.least = pyo.Constraint(range(len(scores)), rule=lambda m, layer: counts[layer] >= least[layer])
    model.most = pyo.Constraint(range(len(scores)), rule=lambda m, layer: counts[layer] <= most[layer])
    coupled = [(layer, i) for layer, i in places if layer > 0 and costs[layer].pair]
    model.t = pyo.Var(coupled, domain=pyo.NonNegativeReals)
    model.product = pyo.Constraint(coupled, rule=lambda m, layer, i: m.t[layer, i] >= counts[layer - 1]
                                   - len(scores[layer - 1]) * (1 - m.z[layer, i]))
    spent = [costs[-1].pair * outputs * (counts[-1] if scores else inputs), costs[-1].single * outputs]
    for layer in range(len(scores)):
        spent.append(costs[layer].single * counts[layer])
        if layer == 0:
            spent.append(costs[0].pair * inputs * counts[0])
    spent.append(pyo.quicksum(costs[layer].pair * model.t[layer, i] for layer, i in coupled))
    model.budget = pyo.Constraint(expr=sum(spent) <= budget)
    return model
