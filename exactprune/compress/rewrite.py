"""Rewrite: the result of compressing a network, and the entry point ``compress_network``.

Rules are applied to a fixed point: f = f_0 -> f_1 -> ... -> g, where each step is an identity on D or has a certified
deviation, and the claim about g is the sum (``compress.levels``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from exactprune.claim import LayerVerdict, Status
from exactprune.compress.apply import Origin, State, apply
from exactprune.compress.budget import Budget, budget_of
from exactprune.compress.collapse import collapse
from exactprune.compress.dependents import remove_dependents
from exactprune.compress.joint import BOXES, Joint, applies, joint, sampled
from exactprune.compress.levels import EXACT, Level, certified, upward
from exactprune.compress.linear import Applied, shrink_linear
from exactprune.compress.plan import Plan, Removal, plan_exact, removals_of
from exactprune.compress.polish import Polished, polished
from exactprune.compress.reads import unread_inputs
from exactprune.compress.rules.forward import Cleared, forward_redundant
from exactprune.compress.skips import promising, skips, split, worthwhile
from exactprune.compress.twins import absorb_twins
from exactprune.compress.units import units_of
from exactprune.domain import Box
from exactprune.errors import DomainError, OptionError
from exactprune.network import Network

_WORTH_ANOTHER = 0.2  # share of the budget that has to be left for another round
_TWINS = 0.25  # share of the budget that proportional neurons may use
_TRIALS = 6  # skips that are left out one by one, each with everything done afresh
_NOMINAL = (32768, 4096, 512, 64, 8)  # times the budget that a sum of worst cases may reach if the joint one is bounded
_POLISH = 100  # times the budget that is seen at most, if weights are rounded again
_LOOSE = 60  # times the largest deviation seen: a claim above is bounded afresh, aiming for half of that


@dataclass(frozen=True, eq=False)
class Step:
    """One rewrite of the chain.

    Attributes:
        rule: its name.
        text: one sentence for people.
        data: everything needed to redo or check it, JSON-able.
        level: what is claimed about this step alone.
    """

    rule: str
    text: str
    data: dict[str, object] = field(default_factory=dict)
    level: Level = EXACT

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        level = {"kind": self.level.kind.name.lower(), "eps": self.level.eps}
        return {"rule": self.rule, "text": self.text, "level": level, "data": self.data}


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A compressed network and what is claimed about it.

    Attributes:
        network: the smaller network, same interface.
        removals: every unit that went, in the original numbering.
        steps: the chain of rewrites.
        level: the claim about the whole chain.
        origin: per ReLU layer of ``network``: the original layer and the original unit of each unit (-1: a new one).
        verdicts: per ReLU layer of ``network``.
        dead_inputs: flat indices of inputs that nothing reads (they stay: the interface does not change).
        budget: the largest deviation that was allowed.
        reach: largest absolute output attained at a point found in D, rounded down; 0 when no budget needed it.
        boxes: the sub-boxes on which the joint deviation is bounded, where that is what the level rests on.
        cleared: the original without neurons that nothing sees (``rules.forward``), where there are any.
    """

    network: Network
    removals: tuple[Removal, ...]
    steps: tuple[Step, ...]
    level: Level
    origin: tuple[Origin, ...]
    verdicts: tuple[LayerVerdict, ...]
    dead_inputs: tuple[int, ...] = ()
    budget: float = 0.0
    reach: float = 0.0
    boxes: Joint | None = None
    cleared: Cleared | None = None

    @property
    def eps(self) -> float:
        """Certified bound on max over D and outputs of abs(f - g); 0 when exact."""
        return self.level.eps

    @property
    def rewrites(self) -> tuple[dict[str, object], ...]:
        """The chain of rewrites as JSON-able data."""
        return tuple(step.as_dict() for step in self.steps)

    def __repr__(self) -> str:
        rules: dict[str, int] = {}
        for removal in self.removals:
            rules[removal.rule] = rules.get(removal.rule, 0) + 1
        found = ", ".join(f"{n} {rule}" for rule, n in sorted(rules.items())) or "nothing"
        return (f"Rewrite({self.level}; {self.network.neurons:,} neurons and {self.network.parameters:,} parameters "
                f"left; removed units: {found})")


def compress_network(network: Network, domain: Box, layers: Sequence[LayerVerdict], *,
                     max_deviation: str | float = "rounding", data: np.ndarray | None = None) -> Rewrite:
    """Remove what is proved to change nothing on the domain, or at most as much as allowed.

    Args:
        network: any network.
        domain: the box the verdicts are about.
        layers: one verdict per ReLU layer, in order.
        max_deviation: ``exact`` (identities only), ``rounding`` (2^-20 R for float32, 2^-49 R for float64, see
            ``compress.budget``), or the largest allowed deviation of any output.
        data: inputs (samples, *input shape) that may serve as witnesses of R.

    Returns:
        the smaller network with the level of the claim; the network itself when nothing can go.

    Raises:
        DomainError: the box does not have the input's size.
        OptionError: verdicts do not fit the network's ReLU layers, or ``max_deviation`` is none of the above.
    """
    _check(network, domain, layers)
    budget, cleared = budget_of(network, domain, max_deviation, data), forward_redundant(network, domain, layers)
    found = _compressed(cleared.network, domain, cleared.verdicts, budget)
    return _with_cleared(found, cleared, network) if cleared.units else found


def _compressed(network: Network, domain: Box, layers: Sequence[LayerVerdict], budget: Budget) -> Rewrite:
    found = _with_skips(network, domain, layers, budget)
    if not (budget.eps > 0 and applies(network, domain)):
        return found
    found = _tightened(network, domain, layers, _further(network, domain, layers, budget, found))
    return found if budget.reach else _no_larger(network, domain, layers, budget, found)


def _no_larger(network: Network, domain: Box, layers: Sequence[LayerVerdict], budget: Budget, found: Rewrite) -> Rewrite:
    """The result at ``rounding``, where that is within the budget and smaller: more budget is spent on other rewrites,
    of which the joint deviation need not be provable."""
    least = budget_of(network, domain, "rounding")
    if not 0 < least.eps < budget.eps:
        return found
    other = _compressed(network, domain, layers, least)
    return replace(other, budget=budget.eps, reach=0.0) if _size(other.network) < _size(found.network) else found


def _with_cleared(rewrite: Rewrite, cleared: Cleared, network: Network) -> Rewrite:
    """What nothing sees went by this rule, though it is rule ``unread`` that took it out."""
    gone = {(layer, int(unit)) for layer, units in cleared.units.items() for unit in units}
    hidden = [r.rule == "unread" and (r.layer, r.index) in gone for r in rewrite.removals]
    removals = tuple(replace(r, rule="forward") if h else r for r, h in zip(rewrite.removals, hidden, strict=True))
    steps = tuple(Step("forward", f"layer {layer}: nothing sees {len(units)} neurons that are not stable",
                       {"layer": layer, "units": [int(u) for u in units]}) for layer, units in cleared.units.items())
    return replace(rewrite, removals=removals, steps=(*steps, *rewrite.steps), cleared=cleared,
                   dead_inputs=unread_inputs(network))


def _with_skips(network: Network, domain: Box, layers: Sequence[LayerVerdict], budget: Budget) -> Rewrite:
    """Everything within the budget; skips become mixers where that pays, by exact rules alone or by merging."""
    given, tried = start(network, layers), {}

    def rewritten(chosen: Sequence[int]) -> Rewrite:
        if tuple(chosen) not in tried:
            tried[tuple(chosen)] = _rewritten(network, domain, layers, budget, budget.eps, chosen)
        return tried[tuple(chosen)]

    def size(smaller: Network) -> tuple[int, ...]:
        return *_size(smaller), smaller.macs

    chosen = worthwhile(range(len(skips(network))), lambda some: size(shrink(split(given, some))[0].network))
    more = sorted({*chosen, *promising(network, layers)} if budget.eps > 0 else chosen)
    if more != chosen:
        chosen = min((chosen, worthwhile(more, lambda some: size(rewritten(some).network), _TRIALS)),
                     key=lambda some: size(rewritten(some).network))
    return rewritten(chosen)


def _rewritten(network: Network, domain: Box, layers: Sequence[LayerVerdict], budget: Budget, nominal: float,
               chosen: Sequence[int] = ()) -> Rewrite:
    """Everything that fits ``nominal`` by the sum over the rewrites, with the ``chosen`` skips as mixers."""
    state, removals, steps = _split(start(network, layers), chosen)
    state, more, further = _twins(state, domain, nominal * _TWINS)
    removals, steps = removals + more, steps + further
    state, more, further = _dependents(state)
    removals, steps = removals + more, steps + further
    state, more, further = _collapsed(state, domain, 0.0)
    removals, steps = removals + more, steps + further
    if nominal > 0:
        spent = sum((step.level for step in steps), EXACT).eps
        state, more, further = _spend(state, domain, nominal - spent)
        removals, steps = removals + more, steps + further
        left = math.nextafter(nominal - sum((step.level for step in steps), EXACT).eps, -math.inf)
        state, more, further = _twins(state, domain, max(left, 0.0))
        removals, steps = removals + more, steps + further
    state, more, further = shrink(state, linearise=True)
    removals, steps = removals + more, steps + further
    left = math.nextafter(nominal - sum((step.level for step in steps), EXACT).eps, -math.inf)
    state, more, further = _collapsed(state, domain, max(left, 0.0))
    removals, steps = removals + more, steps + further
    level = sum((step.level for step in steps), EXACT)
    return Rewrite(state.network, tuple(removals), tuple(steps), level, state.origin, state.verdicts,
                   unread_inputs(network), budget.eps, budget.reach)


def _further(network: Network, domain: Box, layers: Sequence[LayerVerdict], budget: Budget, found: Rewrite) -> Rewrite:
    """What goes beyond the sum of worst cases, where the joint deviation of the result is proved to be within the budget."""
    left, tried = BOXES, {found.network.sha256}
    for times in _NOMINAL:
        more = _rewritten(network, domain, layers, budget, times * budget.eps)
        if more.network.sha256 in tried or _size(more.network) >= _size(found.network):
            continue
        tried.add(more.network.sha256)
        seen = sampled(network, more.network, domain)
        if 0 < seen <= _POLISH * budget.eps:
            more = _polished(network, domain, more)
            seen = sampled(network, more.network, domain)
        if seen <= budget.eps / 2:
            proved = joint(network, domain, layers, more, budget.eps * 0.97, left)
            if proved is not None and proved.eps <= budget.eps:
                return _with(more, proved)
            left = left // 2
    return found


def _polished(network: Network, domain: Box, rewrite: Rewrite) -> Rewrite:
    """The same with the weights behind merged units rounded together, where that helps."""
    state, done = polished(network, domain, rewrite)
    steps = tuple(_polish_step(found) for found in done)
    return replace(rewrite, network=state.network, verdicts=state.verdicts, steps=rewrite.steps + steps,
                   level=sum((s.level for s in steps), rewrite.level))


def _polish_step(found: Polished) -> Step:
    text = (f"layer {found.layer}: {found.moved} weights and biases behind the linear units rounded together, largest deviation "
            f"seen {found.before:.3g} before, {found.after:.3g} after")
    data = {"layer": found.layer, "moved": found.moved, "before": found.before, "after": found.after}
    return Step("polish", text, data, certified(float(np.max(found.deviation, initial=0.0))))


def _tightened(network: Network, domain: Box, layers: Sequence[LayerVerdict], found: Rewrite) -> Rewrite:
    """The same rewrite with a smaller claim, where the one it has is far above all deviations seen."""
    seen = sampled(network, found.network, domain) if found.eps else 0.0
    if found.eps <= _LOOSE * seen or not found.eps:
        return found
    proved = joint(network, domain, layers, found, _LOOSE / 2 * seen)
    return found if proved is None or proved.eps >= found.eps else _with(found, proved)


def _with(rewrite: Rewrite, proved: Joint) -> Rewrite:
    text = f"the deviation of all rewrites together, bounded on {proved.leaves:,} sub-boxes: at most {upward(proved.eps)}"
    step = Step("joint", text, {"boxes": proved.leaves, "eps": proved.eps}, certified(proved.eps))
    before = tuple(s for s in rewrite.steps if s.rule != "joint")
    return replace(rewrite, level=certified(proved.eps), boxes=proved, steps=(*before, step))


def _dependents(state: State) -> tuple[State, list[Removal], list[Step]]:
    """Linear neurons that are exact combinations of others go, then exact rules again."""
    after, done = remove_dependents(state)
    if not done:
        return state, [], []
    removals, steps = [], []
    for found in done:
        layer, origin = state.origin[found.layer] if found.layer >= 0 else (-1, np.full(max(found.channels) + 1, -1))
        units = [int(origin[c]) for c in found.channels]
        size = prod(state.verdicts[found.layer].shape[1:]) if found.layer >= 0 else 0
        removals += [Removal(layer, unit, "dependence", EXACT, size) for unit in units if unit >= 0]
        where = f"layer {layer}" if layer >= 0 else "an affine map with no ReLU behind"
        text = f"{where}: {len(units)} neurons or channels are exact linear combinations of others, which took them over"
        steps.append(Step("dependence", text, {"layer": layer, "units": units}))
    after, more, further = shrink(after)
    return after, removals + more, steps + further


def _twins(state: State, domain: Box, budget: float) -> tuple[State, list[Removal], list[Step]]:
    """Proportional neurons become one, then exact rules again."""
    after, done = absorb_twins(state, domain, budget)
    if not done:
        return state, [], []
    removals, steps = [], []
    for found in done:
        layer, origin = state.origin[found.layer]
        level, size = certified(found.eps), prod(state.verdicts[found.layer].shape[1:])
        pairs = [[int(origin[t.kept]), int(origin[t.gone]), t.ratio] for t in found.twins]
        removals += [Removal(layer, gone, "duplicate", level, size) for _, gone, _ in pairs]
        text = f"layer {layer}: {len(pairs)} neurons or channels are multiples of others, output deviation {level}"
        steps.append(Step("duplicate", text, {"layer": layer, "kept_gone_ratio": pairs}, level))
    after, more, further = shrink(after)
    return after, removals + more, steps + further


def _spend(state: State, domain: Box, budget: float) -> tuple[State, list[Removal], list[Step]]:
    """Certified rewrites, then exact ones, until nothing gets smaller or little of the budget is left."""
    removals: list[Removal] = []
    steps: list[Step] = []
    left = budget
    while True:
        after, applied = shrink_linear(state, domain, left)
        for found in applied:
            removals += _merged_removals(state, found)
            steps.append(_linear_step(state, found))
            left = math.nextafter(left - steps[-1].level.eps, -math.inf)
        after, more, further = _collapsed(after, domain, max(left, 0.0))
        if not (applied or further):
            return state, removals, steps
        left = math.nextafter(left - sum((step.level for step in further), EXACT).eps, -math.inf)
        removals, steps = removals + more, steps + further
        state, more, further = shrink(after)
        removals, steps = removals + more, steps + further
        if left < _WORTH_ANOTHER * budget:
            return state, removals, steps


def _split(state: State, chosen: Sequence[int]) -> tuple[State, list[Removal], list[Step]]:
    """Skips become mixers, then exact rules."""
    names = [state.network.nodes[skip.add].name for i, skip in enumerate(skips(state.network)) if i in chosen]
    after, removals, steps = shrink(split(state, chosen) if names else state)
    text = f"the skip into {', '.join(names)} is written as a mixer with weights 1, which ties no channels together"
    return after, removals, [*([Step("skip", text, {"nodes": names})] if names else []), *steps]


def _collapsed(state: State, domain: Box, budget: float) -> tuple[State, list[Removal], list[Step]]:
    """Mixers with no ReLU between become one, or fewer parameters, then exact rules again."""
    after, done = collapse(state, domain, budget)
    if not done:
        return state, [], []
    steps = [Step(a.candidate.rule, f"{len(a.candidate.channels)} channels with no ReLU between two affine maps became "
                  f"{0 if a.candidate.rule == 'fold' else len(a.candidate.units.v)}, output deviation at most {upward(a.eps)}",
                  {"new_units": 0 if a.candidate.rule == "fold" else len(a.candidate.units.v),
                   "deviation": [float(d) for d in a.deviation.ravel()]}, certified(a.eps)) for a in done]
    after, more, further = shrink(after)
    return after, more, steps + further


def _merged_removals(state: State, found: Applied) -> list[Removal]:
    layer, origin = state.origin[found.candidate.layer]
    size = prod(state.verdicts[found.candidate.layer].shape[1:])
    old = origin[found.candidate.channels]
    relaxed, rule = set(origin[found.candidate.relaxed].tolist()), found.candidate.unstable_rule
    return [Removal(layer, int(u), rule if u in relaxed else found.candidate.rule, certified(found.eps), size)
            for u in old if u >= 0]


def _linear_step(state: State, found: Applied) -> Step:
    c, (layer, origin) = found.candidate, state.origin[found.candidate.layer]
    gone, units = len(c.channels), 0 if c.rule == "fold" else len(c.units.v)
    kinds = f"{gone - len(c.relaxed)} stably active" + (f" and {len(c.relaxed)} {c.unstable_rule}" if len(c.relaxed) else "")
    text = (f"layer {layer}: {kinds} neurons, all there are, folded into the next affine map" if c.rule == "fold"
            else f"layer {layer}: {kinds} neurons or channels became {units} linear units")
    data = {"layer": layer, "units": [int(u) for u in origin[c.channels]], "new_units": units,
            c.unstable_rule: [int(u) for u in origin[c.relaxed]], "slopes": [float(s) for s in c.slopes],
            "deviation": [float(d) for d in found.deviation.ravel()]}
    return Step(c.rule, f"{text}, output deviation at most {upward(found.eps)}", data, certified(found.eps))


def start(network: Network, layers: Sequence[LayerVerdict]) -> State:
    """The state before the first rewrite."""
    axes = units_of(network).axis
    shapes = [network.shapes[i] for i in network.relus]
    return State(network, tuple(layers), tuple((k, np.arange(shape[axes[position]] if shape else 1))
                                               for k, (position, shape) in enumerate(zip(network.relus, shapes))))


def shrink(state: State, *, linearise: bool = False) -> tuple[State, list[Removal], list[Step]]:
    """Apply exact plans until the network does not get smaller any more."""
    removals: list[Removal] = []
    steps: list[Step] = []
    while True:
        plan = plan_exact(state.network, state.verdicts, linearise=linearise)
        smaller = state if plan.empty else apply(state, plan)
        if _size(smaller.network) == _size(state.network):
            return state, removals, steps
        gone = _gone(plan, state, smaller)
        removals += gone
        steps.append(_step(state, plan, gone))
        state = smaller


def _gone(plan: Plan, before: State, after: State) -> list[Removal]:
    """The plan's removals, and units of layers that no path to the output passes any more."""
    shapes = [before.network.shapes[i] for i in before.network.relus]
    planned = removals_of(plan, before.origin, shapes)
    left = {layer for layer, _ in after.origin}
    found = {(r.layer, r.index) for r in planned}
    for (layer, units), verdict, shape in zip(before.origin, before.verdicts, shapes, strict=True):
        if layer not in left:
            size = prod(shape) // max(len(units), 1)
            active = bool((verdict.status == Status.ACTIVE).all())
            rule = "linear" if active and before.network.relus[verdict.layer] in plan.identities else "unread"
            planned += [Removal(layer, int(u), rule, EXACT, size) for u in units
                        if u >= 0 and (layer, int(u)) not in found]
    return planned


def _size(network: Network) -> tuple[int, int, int]:
    return network.parameters, network.neurons, len(network.nodes)


def _step(state: State, plan: Plan, gone: Sequence[Removal]) -> Step:
    names = [state.network.nodes[i].name for i in plan.identities]
    if names:
        return Step("identity", f"{', '.join(names)} equal an input of theirs on the domain and went", {"nodes": names})
    rules: dict[str, dict[str, list[int]]] = {}
    for removal in gone:
        rules.setdefault(removal.rule, {}).setdefault(str(removal.layer), []).append(removal.index)
    counts = ", ".join(f"{sum(map(len, by.values()))} {rule}" for rule, by in rules.items())
    folded = {state.network.nodes[i].name: [float(b) for b in bias] for i, bias in plan.biases.items()}
    text = f"removed {counts or 'units outside the ReLU layers'}" + ("; constants folded exactly" if folded else "")
    return Step("remove", text, {"units": rules, "biases": folded})


def _check(network: Network, domain: Box, layers: Sequence[LayerVerdict]) -> None:
    if domain.shape != network.input_shape:
        raise DomainError(f"box of shape {list(domain.shape)} for a network whose input has shape "
                          f"{list(network.input_shape)}; use Box.reshaped")
    expected = [network.shapes[i] for i in network.relus]
    given = [tuple(v.shape) for v in layers]
    if given != expected or [v.layer for v in layers] != list(range(len(expected))):
        raise OptionError(f"verdicts of shapes {given} for ReLU layers of shapes {expected}; give one per layer, "
                          "in order")
