"""NISP: importance of the final responses, propagated back to every neuron; the least important neurons go.

R. Yu, A. Li, C.-F. Chen, J.-H. Lai, V. Morariu, X. Han, M. Gao, C.-Y. Lin, L. Davis, "NISP: pruning networks using neuron
importance score propagation", CVPR 2018. The final response layer (input of the classifier) is ranked, by Inf-FS on its
responses or by a given vector; importance flows back through absolute weights (Eq. 9), s_k = abs(W_(k+1))^T s_(k+1),
since ReLU and pooling are 1-Lipschitz, and bounds the change of the weighted final responses. Minimising that bound is a
binary integer program (``exactprune.formulations.nisp``):

- with a number of neurons per layer (the paper's), its solution is closed: the most important ones stay;
- with a budget on neurons, parameters or multiply-accumulates of the whole network it is solved exactly by HiGHS through
  Pyomo.

Choices left open: a channel's importance is the sum over its positions; batch norm contributes abs(scale); max pooling passes
a window's importance to each of its inputs; in budget forms importances are divided by their layer's total (``normalise``),
because sums grow from layer to layer, and every layer keeps at least one neuron. The sparsity is the share of
each layer's neurons that goes, or of the budget's quantity. Removed neurons have zero weights in and out, zero bias
and zero batch-norm parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from exactprune.errors import OptionError, SolverError
from exactprune.formulations.nisp import LayerCost, nisp_model, total_cost
from exactprune.pruners.chains import NORMS, Chain, absolute, chain_of, costs, final_response
from exactprune.pruners.inf_fs import inf_fs
from exactprune.pruners.problem import Problem
from exactprune.pruners.protocol import Plan, Pruner, finite, require
from exactprune.pruners.selection import count, drop_lowest

BUDGETS = ("layer", "neurons", "parameters", "macs")
RANKINGS = ("inf-fs", "pyifs", "ones", "given")


@dataclass(frozen=True, eq=False)
class NispOptions:
    """Options of ``nisp``.

    Attributes:
        ranking: importance of the final responses: inf-fs, pyifs (the package's variant), ones, or given.
        importance: the vector for ``ranking`` given.
        alpha: of Inf-FS.
        budget: layer (closed form), neurons, parameters or macs (of the whole network).
        normalise: divide importances by their layer's total (budget forms).
        time_limit: seconds for the solver.
        solver: any Pyomo solver.
    """

    ranking: Literal["inf-fs", "pyifs", "ones", "given"] = "inf-fs"
    importance: Tensor | None = None
    alpha: float = 0.5
    budget: Literal["layer", "neurons", "parameters", "macs"] = "layer"
    normalise: bool = True
    time_limit: float = 60.0
    solver: str = "appsi_highs"

    def __post_init__(self) -> None:
        require(self.ranking in RANKINGS, "ranking", self.ranking, ", ".join(RANKINGS))
        require((self.importance is not None) == (self.ranking == "given"), "importance", self.importance,
                "a vector with ranking given, and nothing otherwise")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "a number from 0 to 1")
        require(self.budget in BUDGETS, "budget", self.budget, ", ".join(BUDGETS))
        require(self.time_limit > 0, "time_limit", self.time_limit, "seconds > 0")


class Nisp(Pruner[NispOptions]):
    """Neuron importance score propagation."""

    name: ClassVar[str] = "nisp"
    prunes = "neurons"
    reference: ClassVar[str] = "Yu et al. 2018, Eqs. 4, 9"
    data = "inputs"
    Options = NispOptions

    def score(self, problem: Problem) -> dict[str, Tensor]:
        """Importance of the neurons (channels) of every hidden layer, weight name -> (neurons,)."""
        chain = chain_of(problem.model)
        responses = self._responses(chain, problem)
        return finite(propagate(chain, problem.inputs[:1], self._final(responses)), "the importance")

    def _responses(self, chain: Chain, problem: Problem) -> Tensor:
        parts = [final_response(chain, x) for x in problem.inputs.split(problem.batch)]
        problem.cost.samples = len(problem.inputs)
        return torch.cat(parts)

    def _final(self, responses: Tensor) -> Tensor:
        if self.options.ranking == "given":
            assert self.options.importance is not None
            given = self.options.importance.to(responses).flatten()
            require(len(given) == responses.shape[1], "importance", f"of {len(given)} numbers",
                    f"{responses.shape[1]} numbers, one per final response")
            return given
        if self.options.ranking == "ones":
            return torch.ones_like(responses[0])
        return inf_fs(responses, self.options.alpha, "paper" if self.options.ranking == "inf-fs" else "pyifs")

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """The neurons that stay, by the closed form or the program."""
        scores, chain = self.score(problem), chain_of(problem.model)
        if self.options.budget == "layer":
            units = {n: drop_lowest({n: s}, count(sparsity, len(s)))[n] for n, s in scores.items()}
            return unit_plan(problem, chain, units, scores)
        shapes = output_shapes(chain, problem.inputs[:1])
        prices, inputs = costs(chain, shapes, self.options.budget)
        outputs = chain.parts[chain.weighted[-1]][0]
        sizes = [len(s) for s in scores.values()] + [chain.layer(outputs).weight.shape[0]]
        limit = (1 - count(sparsity, 1_000_000) / 1_000_000) * total_cost(sizes, prices, inputs)
        if self.options.budget == "neurons":
            limit = sum(sizes[:-1]) - count(sparsity, sum(sizes[:-1]))
        values = [_share(s) if self.options.normalise else s for s in scores.values()]
        kept = solve(values, prices, inputs, sizes[-1], limit, self.options)
        units = {name: mask.to(problem.device) for name, mask in zip(scores, kept)}
        return unit_plan(problem, chain, units, scores)


def _share(scores: Tensor) -> Tensor:
    total = scores.sum()
    return scores / total if total > 0 else scores


def propagate(chain: Chain, sample: Tensor, final: Tensor) -> dict[str, Tensor]:
    """Importance of every hidden layer's neurons, and of the network's inputs under the name ``input``.

    The backward pass through absolute weights: importance is the gradient of <final, responses>.
    """
    x = torch.zeros_like(sample, dtype=final.dtype).requires_grad_()
    taps: list[Tensor] = []
    value = x
    for place, (_, part) in enumerate(chain.parts[:chain.weighted[-1]]):
        value = absolute(part, value)
        if place in chain.weighted:
            taps.append(value)
    slopes = torch.autograd.grad((value.flatten(1) * final).sum(), taps)
    return {name: slope.detach()[0].reshape(slope.shape[1], -1).sum(1) for name, slope in zip(chain.hidden, slopes)}


def input_importance(chain: Chain, sample: Tensor, final: Tensor) -> Tensor:
    """Importance of every input, in the shape of one sample."""
    x = torch.zeros_like(sample, dtype=final.dtype).requires_grad_()
    value = x
    for _, part in chain.parts[:chain.weighted[-1]]:
        value = absolute(part, value)
    return torch.autograd.grad((value.flatten(1) * final).sum(), x)[0][0].detach()


def output_shapes(chain: Chain, sample: Tensor) -> dict[str, tuple[int, ...]]:
    """Output shape of every part for one sample."""
    shapes = {}
    with torch.no_grad():
        for name, part in chain.parts:
            sample = part(sample)
            shapes[name] = tuple(sample.shape[1:])
    return shapes


def solve(scores: list[Tensor], prices: list[LayerCost], inputs: int, outputs: int, limit: float,
          options: NispOptions) -> list[Tensor]:
    """The neurons that stay, proved optimal by the solver.

    Raises:
        OptionError: not even one neuron per layer fits the budget.
        SolverError: Pyomo or the solver is not installed, or no optimum was proved in time.
    """
    if total_cost([*(1 for _ in scores), outputs], prices, inputs) > limit:
        raise OptionError(f"the budget {limit:,.0f} does not hold one neuron per layer; give a smaller sparsity")
    try:
        import pyomo.environ as pyo
    except ImportError:
        raise SolverError("nisp with a budget needs Pyomo; pip install 'exactprune[milp]'") from None
    values = [s.cpu().numpy() for s in scores]
    model = nisp_model(values, [1] * len(values), [len(v) for v in values], prices, inputs, outputs, limit)
    solver: Any = pyo.SolverFactory(options.solver)
    if not solver.available(exception_flag=False):
        raise SolverError(f"Pyomo's solver {options.solver!r} is not installed; install it, or leave the default")
    if options.solver == "appsi_highs":
        solver.config.time_limit = options.time_limit
        solver.highs_options = {"mip_rel_gap": 0.0, "mip_abs_gap": 0.0}
    result = solver.solve(model, load_solutions=False)
    if result.solver.termination_condition != pyo.TerminationCondition.optimal:
        raise SolverError(f"no optimum was proved in {options.time_limit:g} s "
                          f"({result.solver.termination_condition}); give a larger time_limit")
    model.solutions.load_from(result) if options.solver != "appsi_highs" else solver.load_vars()
    kept = [torch.tensor([model.z[layer, i].value > 0.5 for i in range(len(v))]) for layer, v in enumerate(values)]
    _check(kept, prices, inputs, outputs, limit)
    return kept


def _check(kept: list[Tensor], prices: list[LayerCost], inputs: int, outputs: int, limit: float) -> None:
    """The rounded solution is checked here; a solver's word is not enough."""
    spent = total_cost([*(int(k.sum()) for k in kept), outputs], prices, inputs)
    if spent > limit * (1 + 1e-9) or not all(bool(k.any()) for k in kept):
        raise SolverError(f"the solver's answer costs {spent:,.0f}, the budget is {limit:,.0f}; try another solver")


def unit_plan(problem: Problem, chain: Chain, units: dict[str, Tensor], scores: dict[str, Tensor]) -> Plan:
    """Masks and values that switch the removed neurons off."""
    masks, values = {}, {}
    before: Tensor | None = None
    for place in chain.weighted:
        name = chain.parts[place][0]
        weight, stay = f"{name}.weight", units.get(f"{name}.weight")
        mask = torch.ones(problem.shapes[weight], dtype=torch.bool, device=problem.device)
        if before is not None:
            mask &= _columns(before, mask.shape[1]).view(1, -1, *(1 for _ in mask.shape[2:]))
        if stay is not None:
            mask &= stay.view(-1, *(1 for _ in mask.shape[1:]))
            values |= _switched_off(chain, place, stay)
        masks[weight], before = mask, stay
    return Plan(masks, values, scores=scores, units=units)


def _columns(units: Tensor, inputs: int) -> Tensor:
    """Which inputs of the next layer stay: a channel feeds several after a Flatten."""
    return units.repeat_interleave(inputs // len(units))


def _switched_off(chain: Chain, place: int, stay: Tensor) -> dict[str, Tensor]:
    """Bias and batch norm of a layer's removed neurons, zero."""
    values = {}
    for name, part in chain.parts[place:place + 2]:
        if isinstance(part, nn.Linear | nn.Conv2d) and part is chain.parts[place][1] and part.bias is not None:
            values[f"{name}.bias"] = part.bias.detach() * stay
        if isinstance(part, NORMS) and part.affine:
            values[f"{name}.weight"] = part.weight.detach() * stay
            values[f"{name}.bias"] = part.bias.detach() * stay
    return values

