"""From the domain options to a box, one way at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from exactprune.cli.arguments import DomainFlags
from exactprune.cli.arrays import read_npy, read_npz, read_samples
from exactprune.domain import Box, around, of_data, uniform
from exactprune.errors import DomainError, OptionError
from exactprune.network import Network

T = TypeVar("T")
_WAYS = ("domain", "domain_box", "vnnlib", "center", "domain_data")
_NEEDS = {"epsilon": "center", "clip": "center", "margin": "domain_data"}


def check_flags(flags: DomainFlags) -> str | None:
    """Which way was chosen (a field of ``DomainFlags``), None when no domain is given.

    Raises:
        OptionError: two ways at once, or an option without the one it belongs to.
    """
    given = [way for way in _WAYS if getattr(flags, way) is not None]
    if len(given) > 1:
        raise OptionError(f"the domain is given {len(given)} times: {', '.join(map(_flag, given))}; keep one of them")
    for option, way in _NEEDS.items():
        if getattr(flags, option) is not None and way not in given:
            raise OptionError(f"{_flag(option)} belongs to {_flag(way)}, which is not given; add it")
    if given == ["center"] and flags.epsilon is None:
        raise OptionError("--center needs a radius; add --epsilon")
    return given[0] if given else None


def build_domain(flags: DomainFlags, network: Network) -> Box:
    """The box the options describe, in the network's input shape; the unit box when they say nothing.

    Raises:
        OptionError: the options contradict each other.
        DomainError: the box is empty, not finite, or not of the input's size.
        LoadError: a file cannot be read.
    """
    way = check_flags(flags)
    if way is None:
        return uniform(0.0, 1.0, network.input_shape)
    return _BUILDERS[way](flags, network).reshaped(network.input_shape)


def _uniform(flags: DomainFlags, network: Network) -> Box:
    low, high = _some(flags.domain)
    return uniform(low, high, network.input_shape)


def _box(flags: DomainFlags, network: Network) -> Box:
    path = _some(flags.domain_box)
    lower, upper = read_npz(path, ("lower", "upper"), "--domain-box")
    return Box(lower, upper, f"box of {path}")


def _vnnlib(flags: DomainFlags, network: Network) -> Box:
    from exactprune.io import load_vnnlib

    return load_vnnlib(_some(flags.vnnlib))


def _ball(flags: DomainFlags, network: Network) -> Box:
    path = _some(flags.center)
    center = read_npy(path, "--center")
    if center.size != int(np.prod(network.input_shape)):
        raise DomainError(f"--center {path}: has shape {center.shape}, the network's input {list(network.input_shape)}")
    return around(center.reshape(network.input_shape), _some(flags.epsilon), flags.clip)


def _data(flags: DomainFlags, network: Network) -> Box:
    samples = read_samples(_some(flags.domain_data), network.input_shape, "--domain-data")
    return of_data(samples, flags.margin or 0.0)


def _some(value: T | None) -> T:
    assert value is not None
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_BUILDERS: dict[str, Callable[[DomainFlags, Network], Box]] = {
    "domain": _uniform, "domain_box": _box, "vnnlib": _vnnlib, "center": _ball, "domain_data": _data}
