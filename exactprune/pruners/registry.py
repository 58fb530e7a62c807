"""Which methods there are: the built-in ones, those registered in code, and those of installed packages.

Built-in methods are named by module and class and imported when first used. ``scaling-up`` lives above this package, because it
runs the whole pipeline; naming it here does not import it.

A package adds a method by an entry point of the group ``exactprune.pruners`` that names a ``Pruner`` class::

    [project.entry-points."exactprune.pruners"]
    my-method = "my_package:MyPruner"
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from exactprune.errors import OptionError
from exactprune.pruners.protocol import Pruner

GROUP = "exactprune.pruners"
BUILT_IN = {
    "random": "random:Random", "magnitude": "magnitude:Magnitude",
    "snip": "snip:Snip", "grasp": "grasp:Grasp", "synflow": "synflow:SynFlow",
    "obd": "obd:Obd", "obs": "obs:Obs", "woodfisher": "woodfisher:WoodFisher",
    "mlprune": "mlprune:MLPrune", "cbs": "cbs:Cbs", "obc": "obc:Obc", "sparsegpt": "sparsegpt:SparseGpt",
    "wanda": "wanda:Wanda", "nisp": "nisp:Nisp", "lottery": "lottery:Lottery",
    "set": "set:SparseEvolutionary", "dsr": "dsr:Dsr", "deep-r": "deep_r:DeepR",
    "epsilon-resnet": "epsilon_resnet:EpsilonResNet", "scaling-up": "exactprune.pruning.scaling_up:ScalingUp",
}
_REGISTERED: dict[str, type[Pruner[Any]]] = {}


def register(cls: type[Pruner[Any]]) -> type[Pruner[Any]]:
    """Make a method known under its name; usable as a decorator.

    Raises:
        OptionError: ``cls`` is not a final ``Pruner``, or the name belongs to another method.
    """
    _check(cls, getattr(cls, "name", "?"))
    if cls.name in BUILT_IN or _REGISTERED.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise OptionError(f"pruning method {cls.name!r} exists already; give yours another name")
    _REGISTERED[cls.name] = cls
    return cls


def methods() -> dict[str, type[Pruner[Any]]]:
    """Every method by name: built-in, registered, installed."""
    return {name: method(name) for name in names()}


def names() -> tuple[str, ...]:
    """Names of every method, without importing any."""
    return tuple(dict.fromkeys((*BUILT_IN, *_REGISTERED, *_installed())))


def method(name: str) -> type[Pruner[Any]]:
    """The class behind a name; ``_`` and ``-`` are the same.

    Raises:
        OptionError: there is none, or an installed one cannot be loaded.
    """
    wanted = name.replace("_", "-").lower()
    if wanted in BUILT_IN:
        module, _, attribute = BUILT_IN[wanted].partition(":")
        return getattr(import_module(module if "." in module else f"exactprune.pruners.{module}"), attribute)
    if wanted in _REGISTERED:
        return _REGISTERED[wanted]
    installed = _installed()
    if wanted in installed:
        return _load(installed[wanted])
    near = get_close_matches(wanted, names(), 1)
    raise OptionError(f"no pruning method {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}"
                      f"there are {', '.join(names())}")


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> type[Pruner[Any]]:
    try:
        cls = point.load()
    except Exception as error:
        raise OptionError(f"pruning method {point.name!r} ({point.value}) cannot be loaded: {error}") from error
    _check(cls, point.name)
    return cls


def _check(cls: object, name: str) -> None:
    if not (inspect.isclass(cls) and issubclass(cls, Pruner) and not inspect.isabstract(cls)):
        raise OptionError(f"pruning method {name!r}: {cls!r} is not a class that implements exactprune.pruners.Pruner")
