"""A network as a chain of layers: which neurons there are, who reads them, and what keeping one costs.

For methods that remove neurons. The module is a (nested) ``nn.Sequential`` of Linear, Conv2d (no groups), ReLU, BatchNorm,
Dropout, pooling, Flatten and Identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exactprune.errors import OptionError
from exactprune.formulations.nisp import LayerCost
from exactprune.pruners.problem import used_once

LAYERS = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SHAPING = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True, eq=False)
class Chain:
    """The parts of a sequential network in order.

    Attributes:
        parts: (name, module), containers left out.
        weighted: places of the Linear and Conv2d layers among them.
    """

    parts: tuple[tuple[str, nn.Module], ...]

    @property
    def weighted(self) -> tuple[int, ...]:
        """Places of the layers with weights."""
        return tuple(i for i, (_, part) in enumerate(self.parts) if isinstance(part, LAYERS))

    @property
    def hidden(self) -> tuple[str, ...]:
        """Names of the weights of all layers but the last."""
        return tuple(f"{self.parts[i][0]}.weight" for i in self.weighted[:-1])

    def layer(self, name: str) -> nn.Linear | nn.Conv2d:
        """The layer that owns a weight."""
        found = dict(self.parts)[name.removesuffix(".weight")]
        assert isinstance(found, LAYERS)
        return found


def chain_of(module: nn.Module) -> Chain:
    """``module`` as a chain.

    Raises:
        OptionError: it is no sequential network of known layers, or has no hidden layer.
    """
    if not isinstance(module, nn.Sequential):
        raise OptionError(f"removing neurons needs an nn.Sequential (or a network that is a chain), not "
                          f"{type(module).__name__}; choose a method that prunes weights")
    if not used_once(module):
        raise OptionError("a layer or a parameter stands in two places of this network, so its neurons cannot be removed in one; "
                          "give every layer its own weights")
    chain = Chain(tuple(_parts(module, "")))
    for name, part in chain.parts:
        known = isinstance(part, (*LAYERS, *NORMS, *SHAPING, *POOLS, nn.ReLU))
        if not known or (isinstance(part, nn.Conv2d) and part.groups > 1):
            raise OptionError(f"layer '{name}' ({type(part).__name__}): removing neurons knows Linear, Conv2d without "
                              "groups, ReLU, BatchNorm, Dropout, pooling and Flatten only")
    if len(chain.weighted) < 2:
        raise OptionError("this network has no hidden layer, so there are no neurons to remove")
    return chain


def _parts(module: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_children():
        if isinstance(part, nn.Sequential):
            yield from _parts(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def final_response(chain: Chain, x: Tensor) -> Tensor:
    """Input of the last layer with weights, flat, shape (N, features)."""
    with torch.no_grad():
        for _, part in chain.parts[:chain.weighted[-1]]:
            x = part(x)
    return x.flatten(1)


def absolute(part: nn.Module, x: Tensor) -> Tensor:
    """A part with absolute weights, no bias, and no rectification; pooling sums its window."""
    if isinstance(part, nn.Linear):
        return nn.functional.linear(x, part.weight.abs())
    if isinstance(part, nn.Conv2d):
        padded = nn.functional.pad(x, part._reversed_padding_repeated_twice)
        return nn.functional.conv2d(padded, part.weight.abs(), None, part.stride, 0, part.dilation)
    if isinstance(part, NORMS):
        scale = _scale(part).abs()
        return x * scale.view(1, -1, *(1 for _ in x.shape[2:]))
    if isinstance(part, nn.MaxPool2d):
        return _max_pool_sum(part, x)
    if isinstance(part, nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.Flatten):
        return part(x)
    return x


def _scale(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    weight = norm.weight if norm.affine else torch.ones_like(norm.running_var)
    return weight / (norm.running_var + norm.eps).sqrt()


def _max_pool_sum(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """Every input of a window gets the window's whole importance: an upper bound on abs(max a - max b)."""
    size = (pool.kernel_size,) * 2 if isinstance(pool.kernel_size, int) else pool.kernel_size
    kernel = x.new_ones(x.shape[1], 1, *size)
    return nn.functional.conv2d(x, kernel, None, pool.stride or pool.kernel_size, pool.padding, pool.dilation, x.shape[1])


def costs(chain: Chain, shapes: dict[str, tuple[int, ...]], budget: str) -> tuple[list[LayerCost], int]:
    """Cost of every layer in ``neurons``, ``parameters`` or ``macs``, and the first layer's number of inputs.

    Args:
        chain: the network.
        shapes: name of a part -> its output shape for one sample.
        budget: what is counted.
    """
    names = [chain.parts[i][0] for i in chain.weighted]
    layers = [chain.layer(name) for name in names]
    found, before = [], 1
    for name, layer in zip(names, layers):
        units = layer.weight.shape[1] if not found else before
        per_pair = layer.weight[0].numel() / units
        positions = 1 if isinstance(layer, nn.Linear) else shapes[name][1] * shapes[name][2]
        last = name == names[-1]
        if budget == "neurons":
            found.append(LayerCost(0.0, 0.0 if last else 1.0))
        elif budget == "parameters":
            found.append(LayerCost(per_pair, float(layer.bias is not None) + 2 * _normed(chain, name)))
        else:
            found.append(LayerCost(per_pair * positions, 0.0))
        before = layer.weight.shape[0]
    return found, layers[0].weight.shape[1]


def _normed(chain: Chain, name: str) -> bool:
    place = [n for n, _ in chain.parts].index(name) + 1
    return place < len(chain.parts) and isinstance(chain.parts[place][1], NORMS)
