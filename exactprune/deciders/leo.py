"""LEO: two MILPs per neuron (Serra, Kumar, Ramalingam, *Lossless compression of deep neural networks*, CPAIOR 2020,
section 4).

Layer by layer, neuron by neuron: maximise z_hat, then -z_hat, over the exact big-M model of the layers before. As in
the authors' implementation a solve ends when its dual bound falls below zero (the neuron cannot be active,
respectively inactive) or a solution above zero is found; the bound found becomes the neuron's big-M for the layers
after, and neurons found stable lose their binary there. The bounds given are interval bounds in the published method;
any others serve.

Here for comparison and cross-checks. What it returns are suggestions; bounds that it tightens are the solver's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from exactprune.claim import Status
from exactprune.deciders.highs import HighsOptions
from exactprune.deciders.milp import decide_neuron
from exactprune.deciders.outcome import LayerSuggestions, Suggestion
from exactprune.domain import Box
from exactprune.formulations.bigm import build
from exactprune.network import Network


def decide(network: Network, box: Box, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray], *,
           neurons: Mapping[int, Iterable[int]] | None = None, options: HighsOptions | None = None,
           time_limit: float = np.inf, cancel: threading.Event | None = None) -> tuple[LayerSuggestions, ...]:
    """Suggestions for every ReLU layer.

    Args:
        network, box: what is asked about.
        lower, upper: bounds of every ReLU layer; interval bounds in the published method.
        neurons: layer -> neurons to ask about; all neurons of all layers by default.
        options: of each solve.
        time_limit: seconds for everything; what is left is unknown.
        cancel: ends the rest as unknown.
    """
    began = time.perf_counter()
    options = options or HighsOptions()
    low, high = ([np.array(a, np.float64).ravel() for a in bounds] for bounds in (lower, upper))
    layers = []
    for layer in range(len(network.relus)):
        chosen = np.arange(low[layer].size) if neurons is None else np.fromiter(neurons.get(layer, ()), np.int64)
        start = time.perf_counter()
        found = _layer(network, box, low, high, layer, chosen, options, began + time_limit, cancel)
        layers.append(LayerSuggestions(layer, found, time.perf_counter() - start))
        _tighten(low[layer], high[layer], found)
    return tuple(layers)


def _layer(network: Network, box: Box, low: list[np.ndarray], high: list[np.ndarray], layer: int, neurons: np.ndarray,
           options: HighsOptions, until: float, cancel: threading.Event | None) -> tuple[Suggestion, ...]:
    if not neurons.size:
        return ()
    model = build(network, box, low, high, target=layer, neurons=neurons)
    found = []
    for neuron in neurons:
        left = max(0.0, until - time.perf_counter()) / 2
        limits = replace(options, time_limit=min(options.time_limit, left))
        found.append(decide_neuron(model, int(neuron), options=limits, cancel=cancel))
    return tuple(found)


def _tighten(low: np.ndarray, high: np.ndarray, found: Iterable[Suggestion]) -> None:
    """The layer's bounds from what was found, in place (the arrays are copies made by ``decide``)."""
    for s in found:
        upper, lower = min(high[s.neuron], s.upper), max(low[s.neuron], s.lower)
        if lower <= upper:
            low[s.neuron], high[s.neuron] = lower, upper
        if s.status is Status.INACTIVE:
            high[s.neuron] = max(low[s.neuron], min(high[s.neuron], 0.0))
        elif s.status is Status.ACTIVE:
            low[s.neuron] = min(high[s.neuron], max(low[s.neuron], 0.0))
