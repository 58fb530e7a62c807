"""Bounds on pre-activations over a region, by intervals and by backward substitution with given or fixed multipliers.

The one inequality (docs/certificate.md): for z_hat in [l, u] and ANY a,
``v * relu(z_hat) <= a * z_hat + max of v * relu(t) - a * t over t in {l, u} and 0 if l < 0 < u``,
because the difference of both sides is linear on either side of 0. The multipliers a are hints: a bad one gives a weak
bound, never a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from exactprune.checker import dyadic
from exactprune.checker.backward import Substitution
from exactprune.checker.dyadic import Array, Dyadic
from exactprune.checker.forward import ForwardStep
from exactprune.checker.layers import (
    AvgPool,
    Interval,
    Layer,
    Linear,
    MaxPool,
    ReLU,
    Sum,
    interval,
    layers,
    support,
)
from exactprune.checker.layers import gather_constants as constants
from exactprune.checker.network import INPUT, CheckError, Network

MEMORY = 300e6  # bytes that one batch of rows may take, roughly
CLOSE = 1e-3  # a bound that misses 0 by less than this part of the neuron's range is computed again exactly,
ROUGH = 2.0**-14  # or by less than this part of the largest term of its coarse computation,
EXACT_ROWS = 200  # for at most so many rows of a batch
TOGETHER = 1 << 18  # numbers of a batch of rows at a node: what caches hold
SLOPE = 60  # bits of a fixed slope u / (u - l) in exact arithmetic


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Given multipliers ``values * 2**-shift`` of one ReLU layer where ``given`` holds.

    Attributes:
        values: int64 (rows, neurons).
        shift: int64 (rows,).
        given: bool (rows, neurons).
    """

    values: Array
    shift: Array
    given: Array

    def rows(self, part: slice | Array) -> Multipliers:
        """Some of the rows."""
        return Multipliers(self.values[part], self.shift[part], self.given[part])


Pair = tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Region:
    """Where the rows of a batch live: boxes of inputs with bounds of earlier layers, ``entries`` of them.

    Attributes:
        box: lower and upper of the input, (1 or entries, *input shape).
        relu: ReLU layer -> lower and upper pre-activation bounds, (1 or entries, neurons).
        pool: max pool node -> lower and upper bounds of its input, (1 or entries, *shape).
        index: the entry of every row; None if row i has entry i, or there is only one.
    """

    box: Pair
    relu: Mapping[int, Pair]
    pool: Mapping[int, Pair]
    index: Array | None = None

    def rows(self, part: slice | Array, count: int) -> Region:
        """The region for some of its ``count`` rows, without the entries that they do not use."""
        index = (np.arange(count) if self.index is None else self.index)[part]
        used, place = np.unique(index, return_inverse=True)

        def take(pair: Pair) -> Pair:
            return pair if len(pair[0]) == 1 else (pair[0][used], pair[1][used])

        relu, pool = ({k: take(p) for k, p in pairs.items()} for pairs in (self.relu, self.pool))
        plain = len(used) == len(index) and bool((used == index).all())
        return Region(take(self.box), relu, pool, None if plain else place)

    def pick(self, entries: Array) -> Array:
        """What belongs to every row, from what belongs to every entry; (1 or rows, ...)."""
        return entries if len(entries) == 1 or self.index is None else entries[self.index]

    def interval(self, pair: Pair) -> Interval:
        """Bounds as exact integers, flat, one row each (or one for all)."""
        lower, upper = (b.reshape(len(b), -1) for b in pair)
        found = interval(lower, upper, True)
        return Interval(self.pick(found.low), self.pick(found.high), self.pick(found.exponent))


@dataclass(eq=False)
class Bounds:
    """The network over the domain, and the bounds proved so far.

    Attributes:
        lower, upper: per ReLU layer reached so far, float64 (neurons,), rounded outward from what was proved.
        ranges: per node, float64 interval bounds (1, *shape).
    """

    network: Network
    box: tuple[Array, Array]
    lower: list[Array] = field(default_factory=list)
    upper: list[Array] = field(default_factory=list)
    ranges: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers: list[Layer] = layers(self.network)
        self.layer_of = {node: k for k, node in enumerate(self.network.relus)}
        self.before = {self.network.nodes[node].inputs[0]: k for node, k in self.layer_of.items()}
        self.ranges[INPUT] = (self.box[0][None], self.box[1][None])
        self.coarse = Substitution(self)
        self._forward: dict[int, ForwardStep | None] = {}
        self.widest = max([int(np.prod(self.network.shape_of(i))) for i in range(INPUT, len(self.layers))], default=1)

    def reach(self, layer: int) -> None:
        """Interval bounds for every node up to the input of a ReLU layer, from the bounds known by now."""
        while len(self.lower) <= layer:
            node = self.network.relus[len(self.lower)]
            for position in range(max(self.ranges) + 1, node):
                self._reach_node(position)
            lower, upper = self.ranges[self.network.nodes[node].inputs[0]]
            self.lower.append(lower.reshape(-1).copy())
            self.upper.append(upper.reshape(-1).copy())

    def _reach_node(self, position: int) -> None:
        layer, inputs = self.layers[position], self.network.nodes[position].inputs
        if isinstance(layer, ReLU):
            shape, k = (1, *layer.shape), self.layer_of[position]
            found = layer.interval([(self.lower[k].reshape(shape), self.upper[k].reshape(shape))], True)
        else:
            layer.prepare(*self.ranges[inputs[0]])
            found = self.node_range(position, [self.ranges[i] for i in inputs], True)
        if not (np.isfinite(found[0]).all() and np.isfinite(found[1]).all()):
            raise CheckError(f"node {position}: its interval bounds leave the range of float64")
        self.ranges[position] = found

    def node_range(self, position: int, inputs: list[Pair], exact: bool) -> Pair:
        """Bounds of a node without bounds of its own over boxes of its inputs: (1, *shape) where exact, else (boxes, *shape)."""
        layer, linear = self.layers[position], self.forward_step(position)
        if linear is not None:
            try:
                return linear.range(*inputs[0], signs=exact)
            except OverflowError:
                pass
        return layer.interval(inputs, exact)

    def direct(self, position: int) -> bool:
        """Whether a ReLU reads one linear map of the input, shifted and scaled at most: intervals lose nothing there."""
        seen = 0
        while position != INPUT:
            position = self.network.nodes[position].inputs[0]
            layer = None if position == INPUT else self.layers[position]
            seen += isinstance(layer, Linear)
            if isinstance(layer, ReLU | MaxPool | AvgPool | Sum) or seen > 1:
                return False
        return True

    def forward_step(self, position: int) -> ForwardStep | None:
        """The forward step of a node with weights, if it has one."""
        if position not in self._forward:
            layer = self.layers[position]
            try:
                self._forward[position] = ForwardStep(layer) if isinstance(layer, Linear) else None
            except OverflowError:
                self._forward[position] = None
        return self._forward[position]

    def narrow(self, layer: int, neurons: Array, side: str, values: Array) -> None:
        """Intersect with proved bounds (values bound z_hat above for "upper", -z_hat above for "lower")."""
        if side == "upper":
            self.upper[layer][neurons] = np.minimum(self.upper[layer][neurons], values)
        else:
            self.lower[layer][neurons] = np.maximum(self.lower[layer][neurons], -values)

    def domain(self, layer: int) -> Region:
        """The whole domain with the bounds of the layers before ``layer``."""
        pools = {i: self.ranges[self.network.nodes[i].inputs[0]] for i in self.ranges
                 if i != INPUT and isinstance(self.layers[i], MaxPool)}
        known = {k: (self.lower[k][None], self.upper[k][None]) for k in range(layer)}
        return Region(self.ranges[INPUT], known, pools)

    # -- backward substitution ---------------------------------------------------------------------------------

    def decide(self, layer: int, neurons: Array, signs: Array, region: Region,
               hints: Mapping[int, Multipliers] | None = None) -> Array:
        """As ``maximise``, coarse first; the rows that rounding may have kept from 0 again, exactly."""
        hints = hints or {}
        values, size = self._maximise_all(layer, neurons, signs, region, hints, False)
        width = self.upper[layer][neurons] - self.lower[layer][neurons]
        close = np.flatnonzero((values > 0) & (values <= np.maximum(CLOSE * width, ROUGH * size)))
        close = close[np.argsort(values[close], kind="stable")][:EXACT_ROWS]
        if len(close):
            again = {k: h.rows(close) for k, h in hints.items()}
            better = self.maximise(layer, neurons[close], signs[close], region.rows(close, len(neurons)), again,
                                   exact=True)
            values[close] = np.minimum(values[close], better)
        return values

    def maximise(self, layer: int, neurons: Array, signs: Array, region: Region,
                 hints: Mapping[int, Multipliers] | None = None, exact: bool = False) -> Array:
        """Upper bounds of sign * z_hat of neurons of a ReLU layer, one row each.

        Args:
            layer: number of the ReLU layer.
            neurons, signs: int64 (rows,).
            region: for these rows.
            hints: ReLU layer -> given multipliers (rows, ...).
            exact: without rounding, in Python integers.

        Returns:
            float64 (rows,), rounded up.
        """
        return self._maximise_all(layer, neurons, signs, region, hints or {}, exact)[0]

    def _maximise_all(self, layer: int, neurons: Array, signs: Array, region: Region, hints: Mapping[int, Multipliers],
                      exact: bool) -> tuple[Array, Array]:
        """The bounds, and the largest term on the way (roughly: it only tells what is worth a second look)."""
        size = max(1, int(MEMORY / (self.widest * 800))) if exact else max(32, TOGETHER // self.widest)
        parts = [slice(i, i + size) for i in range(0, len(neurons), size)]
        maximise = self._maximise_exactly if exact else self.coarse.maximise
        found = [maximise(layer, neurons[p], signs[p], region.rows(p, len(neurons)),
                          {k: h.rows(p) for k, h in hints.items()}) for p in parts]
        if not found:
            return np.zeros(0), np.zeros(0)
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _maximise_exactly(self, layer: int, neurons: Array, signs: Array, region: Region,
                          hints: Mapping[int, Multipliers]) -> tuple[Array, Array]:
        start = self.network.nodes[self.network.relus[layer]].inputs[0]
        pending, total = self._start(start, neurons, signs)
        largest = np.zeros(len(neurons))
        for position in range(start, INPUT - 1, -1):
            v = pending.pop(position, None)
            if v is None:
                continue
            largest = np.maximum(largest, self._magnitude(v, position))
            if position == INPUT:
                total = dyadic.add(total, support(v, region.interval(region.box)))
                break
            w, constant = self._step(position, replace(v, values=v.values.astype(object)), region, hints)
            total = dyadic.add(total, constant) if constant else total
            for source in self.network.nodes[position].inputs:
                pending[source] = dyadic.add(pending.get(source), w)
        assert total is not None
        return dyadic.to_float_up(total), largest

    def _magnitude(self, v: Dyadic, position: int) -> Array:
        lower, upper = self.ranges[position]
        span = max(np.abs(lower).max(initial=0.0), np.abs(upper).max(initial=0.0))
        with np.errstate(over="ignore"):
            return np.ldexp(span, np.clip(dyadic.row_width(v.values) + v.exponent, -2000, 2000))

    def _start(self, node: int, neurons: Array, signs: Array) -> tuple[dict[int, Dyadic], Dyadic | None]:
        layer = self.layers[node] if node != INPUT else None
        if isinstance(layer, Linear) and len(set(signs.tolist())) == 1:
            found = layer.rows(neurons, int(signs[0]))
            if found is not None:
                return {self.network.nodes[node].inputs[0]: found[0]}, found[1]
        shape = self.network.shape_of(node)
        unit = np.zeros((len(neurons), int(np.prod(shape))), np.int64)
        unit[np.arange(len(neurons)), neurons] = signs
        zero = np.zeros(len(neurons), np.int64)
        return {node: Dyadic(unit.reshape(-1, *shape), zero)}, Dyadic(zero.astype(object), zero)

    def _step(self, position: int, v: Dyadic, region: Region,
              hints: Mapping[int, Multipliers]) -> tuple[Dyadic, Dyadic | None]:
        layer = self.layers[position]
        if isinstance(layer, MaxPool):
            return layer.relax(v, *(region.pick(b) for b in region.pool[position]), exact=True)
        if not isinstance(layer, ReLU):
            return layer.backward(v, True)
        k = self.layer_of[position]
        flat = replace(v, values=v.values.reshape(len(v.values), -1))
        w, constant = relax(flat, k, region, hints.get(k))
        return replace(w, values=w.values.reshape(v.values.shape)), constant


def relax(v: Dyadic, layer: int, region: Region, hint: Multipliers | None) -> tuple[Dyadic, Dyadic]:
    """v . relu(z_hat) <= a . z_hat + c for z_hat in the region's bounds of a ReLU layer, exactly."""
    bounds = region.interval(region.relu[layer])
    if hint is not None:
        v = _common_grid(v, hint)
    a = _fixed(v.values, region, layer)
    if hint is not None:
        given = dyadic.shift_left(hint.values.astype(object), (-hint.shift - v.exponent)[:, None]) * v.divisor
        a = np.where(hint.given, given, a)
    low, high = bounds.low, bounds.high
    c = np.maximum(v.values * np.maximum(low, 0) - a * low, v.values * np.maximum(high, 0) - a * high)
    c = np.where((low < 0) & (high > 0) & (c < 0), 0, c)
    total = constants(c, v.exponent, bounds.exponent)
    return Dyadic(a, v.exponent, v.divisor), replace(total, divisor=v.divisor)


def _fixed(v: Array, region: Region, layer: int) -> Array:
    """The fixed rule: 0 if u <= 0; v if l >= 0; else v u / (u - l) for v >= 0, and for v < 0, v if u > -l else 0."""
    lower, upper = region.relu[layer]
    with np.errstate(all="ignore"):
        ratio = np.clip(np.nan_to_num(upper / (upper - lower), nan=0.5), 0.0, 1.0)
    chord = np.where(upper <= 0, 0.0, np.where(lower >= 0, 1.0, ratio))
    above = np.rint(np.ldexp(chord, SLOPE)).astype(np.int64).astype(object)
    below = np.where((upper <= 0) | ((lower < 0) & (upper <= -lower)), 0, 1 << SLOPE).astype(object)
    return (v * np.where(v >= 0, region.pick(above), region.pick(below)) + (1 << (SLOPE - 1))) >> SLOPE


def _common_grid(v: Dyadic, hint: Multipliers) -> Dyadic:
    """The rows on a finer grid that holds the given multipliers too."""
    exponent = np.minimum(v.exponent, -hint.shift)
    return Dyadic(dyadic.shift_left(v.values.astype(object), (v.exponent - exponent)[:, None]), exponent, v.divisor)
