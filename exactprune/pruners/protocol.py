"""The protocol: a pruner reads a ``Problem`` and answers with a ``Plan``.

A plan says which weights stay (exactly as many as asked for) and which stored values change besides (OBS-type methods
move the weights that stay; training-based methods return trained ones). It changes nothing itself; ``apply`` does, on a
copy. A method is one final class derived from ``Pruner`` or, where a saliency is all there is, from ``ScorePruner``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from exactprune.errors import DataError, OptionError
from exactprune.pruners.problem import Problem
from exactprune.pruners.selection import Scope, count, keep_largest

Prunes = Literal["weights", "neurons", "blocks"]


@dataclass(frozen=True)
class NoOptions:
    """For methods without a choice."""


@dataclass(frozen=True)
class ScoreOptions:
    """Options of every method that ranks weights.

    Attributes:
        scope: rank all weights together (global), or the weights of each layer (layer).
    """

    scope: Scope = "global"

    def __post_init__(self) -> None:
        require(self.scope in ("global", "layer"), "scope", self.scope, "global or layer")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pruner decided.

    Attributes:
        masks: prunable parameter name -> True where the weight stays.
        values: parameter or buffer name -> its new value, for everything that changes besides masking.
        scores: the saliencies, where the method has them; larger means kept.
        units: for methods that remove neurons, name -> True where the output neuron (channel) stays.
        replaced: submodule name -> what takes its place (blocks that became the identity).
        smaller: a physically smaller module that takes the original's place, from methods that make one.
        notes: sentences for people.
    """

    masks: dict[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] | None = None
    units: dict[str, Tensor] | None = None
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    smaller: nn.Module | None = None
    notes: tuple[str, ...] = ()


Options = TypeVar("Options")


class Pruner(ABC, Generic[Options]):
    """One pruning method.

    Attributes:
        name: as typed by a user.
        prunes: weights, neurons or blocks: what the sparsity counts.
        when: before, after or during training.
        reference: paper and equation.
        data: whether it needs x and y ("none", "inputs" or "labels").
        Options: its frozen dataclass of options.
    """

    name: ClassVar[str]
    prunes: ClassVar[Prunes] = "weights"
    when: ClassVar[str] = "after training"
    reference: ClassVar[str]
    data: ClassVar[Literal["none", "inputs", "labels"]] = "labels"
    Options: ClassVar[type] = NoOptions

    def __init__(self, options: Options | None = None) -> None:
        self.options: Options = self.Options() if options is None else options

    @abstractmethod
    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """Decide. ``sparsity`` is the fraction of what ``prunes`` names that goes, 0 to 1.

        Raises:
            OptionError: the method cannot do this (too large, unknown structure).
            DataError: data are missing, or give gradients that are not finite.
        """

    @abstractmethod
    def score(self, problem: Problem) -> dict[str, Tensor]:
        """Saliency of every weight (or unit), larger means kept.

        Raises:
            OptionError: the method has no saliency.
        """


class ScorePruner(Pruner[Options], Generic[Options]):
    """A method that removes the weights of lowest saliency, once."""

    def plan(self, problem: Problem, sparsity: float) -> Plan:
        """The weights with the lowest saliencies go, ties by the global index."""
        scores = self.score(problem)
        scope: Scope = getattr(self.options, "scope", "global")
        return Plan(keep_largest(scores, sparsity, scope, gone(problem)), scores=scores)


def gone(problem: Problem) -> Mapping[str, Tensor] | None:
    """Where ``problem.previous`` has removed weights already."""
    return None if problem.previous is None else {name: ~mask for name, mask in problem.previous.items()}


def no_score(name: str) -> OptionError:
    """The error of a method without saliencies."""
    return OptionError(f"method {name!r} has no saliency for single weights; ask for its mask instead")


def make_options(cls: type[Pruner[Any]], given: Mapping[str, Any]) -> Any:
    """``cls.Options`` from keywords.

    Raises:
        OptionError: a name is unknown.
    """
    known = [f.name for f in fields(cls.Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise OptionError(f"method {cls.name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    check_types(cls.Options, given)
    return cls.Options(**given)


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def check_types(cls: type, given: Mapping[str, Any]) -> None:
    """Refuse values of another type than the fields of the dataclass ``cls`` have.

    Raises:
        OptionError: one is; a whole number passes for a number.
    """
    hints = get_type_hints(cls)
    for name, value in given.items():
        kinds = set(get_args(hints[name])) or {hints[name]}
        kinds = {type(kind) for kind in kinds} if get_origin(hints[name]) is Literal else kinds
        words = " or ".join(WORDS[kind] for kind in WORDS if kind in kinds)
        require(not kinds <= set(WORDS) or _fits(value, kinds), name, value, words)


def _fits(value: object, kinds: set[type]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, Integral):
        return not kinds.isdisjoint({int, float})
    return float in kinds if isinstance(value, Real) else isinstance(value, tuple(kinds))


def require(holds: bool, name: str, value: object, words: str) -> None:
    """Raise OptionError unless ``holds``."""
    if not holds:
        raise OptionError(f"option {name} is {value!r}; give {words}")


def finite(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """``tensors`` as a dict.

    Raises:
        DataError: one holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise DataError(f"{what} of '{name}': {bad} of {tensor.numel()} values are NaN or infinite; "
                            "check the data, the loss and the weights")
    return dict(tensors)


def decide(pruner: Pruner[Any], problem: Problem, sparsity: float) -> Plan:
    """``pruner.plan`` with its input checked before and its answer after.

    Raises:
        OptionError: the sparsity is not in [0, 1], or the method cannot do this.
        DataError: data are missing, or give curvature or values that are not finite.
    """
    count(sparsity, 1)
    try:
        plan = pruner.plan(problem, sparsity)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise DataError(f"{pruner.name}: a matrix of second derivatives cannot be inverted ({str(error)[:80]}); "
                        "give a larger damping, and check the scale of the data") from None
    finite({name: v for name, v in plan.values.items() if v.is_floating_point()}, "the new value")
    return plan


def apply(module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``module`` with the plan carried out: new values stored, removed weights exactly zero."""
    pruned = copy.deepcopy(module)
    state = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    with torch.no_grad():
        for name, value in plan.values.items():
            state[name].copy_(value.to(state[name].dtype))
        for name, mask in plan.masks.items():
            state[name].masked_fill_(~mask.to(state[name].device), 0)
    for name, replacement in plan.replaced.items():
        parent, _, child = name.rpartition(".")
        setattr(pruned.get_submodule(parent), child, replacement)
    return pruned
