"""Backward substitution through a network in coarse arithmetic: upper bounds of sign * z_hat for a batch of rows.

The operators' steps on ``coarse.Rows``; what has no step of its own here goes through ``layers`` as integers. The maths is
in ``bounds`` (the one inequality) and ``coarse`` (why rounding is sound).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from exactprune.checker import coarse, dyadic
from exactprune.checker.coarse import Part, Rows
from exactprune.checker.dyadic import Array, Dyadic
from exactprune.checker.layers import Layer, Linear, MaxPool, Permute, ReLU, Sum
from exactprune.checker.network import INPUT

if TYPE_CHECKING:
    from exactprune.checker.bounds import Bounds, Multipliers, Region

HALF = 26  # bits of the lower part of an integer that is too wide for float64


class Substitution:
    """The coarse steps of one network's operators; weights are cut once, when a row first meets them."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.network, self.layers = bounds, bounds.network, bounds.layers
        self._steps: dict[int, LinearStep] = {}
        self._shifts: dict[int, Array | None] = {}

    def maximise(self, layer: int, neurons: Array, signs: Array, region: Region,
                 hints: Mapping[int, Multipliers]) -> tuple[Array, Array]:
        """Upper bounds (rows,), infinite where coarse arithmetic cannot say, and the largest term on the way, roughly."""
        try:
            total, largest = self._walk(layer, neurons, signs.astype(np.float64), region, hints)
        except OverflowError:
            total = largest = np.full(len(neurons), np.inf)
        return np.where(np.isnan(total), np.inf, total), np.where(np.isnan(largest), np.inf, largest)

    def _walk(self, layer: int, neurons: Array, signs: Array, region: Region,
              hints: Mapping[int, Multipliers]) -> tuple[Array, Array]:
        pending: dict[int, list[Part]] = {}
        total = self._start(self.network.nodes[self.network.relus[layer]].inputs[0], neurons, signs, pending)
        largest = np.zeros(len(neurons))
        for position in range(max(pending), INPUT - 1, -1):
            parts = pending.pop(position, None)
            if parts is None:
                continue
            v, constant, top = coarse.gather(parts, self._shift(position))
            total = total if constant is None else dyadic.add_up(total, constant)
            largest = np.maximum(largest, self._magnitude(position, top))
            if position == INPUT:
                low, high = (region.pick(b.reshape(len(b), -1)).T for b in region.box)
                total = dyadic.add_up(total, coarse.support(v, low, high))
                continue
            found, constant = self._step(position, v, region, hints)
            total = total if constant is None else dyadic.add_up(total, constant)
            for source in self.network.nodes[position].inputs:
                pending.setdefault(source, []).extend(found)
        return total, largest

    def _magnitude(self, position: int, top: Array) -> Array:
        lower, upper = self.bounds.ranges[position]
        span = max(np.abs(lower).max(initial=0.0), np.abs(upper).max(initial=0.0))
        with np.errstate(over="ignore"):
            return np.ldexp(span, np.clip(top, -2000, 2000))

    def _shift(self, position: int) -> Array | None:
        """s (n, 1) with s <= y for the values y of a node on the domain, or None for 0: fixed when first asked for."""
        if position not in self._shifts:
            layer = None if position == INPUT else self.layers[position]
            if layer is None:
                found = coarse.shift_below(self.bounds.box[0].reshape(-1))
            elif isinstance(layer, Permute) or type(layer) is Layer:  # the same numbers in another order
                found = self._shift(self.network.nodes[position].inputs[0])
                if found is not None:
                    point = found.reshape(1, *layer.shape)
                    found = layer.interval([(point, point)], False)[0]
            else:
                found = coarse.shift_below(np.minimum(self._lower(position), 0.0))
            self._shifts[position] = None if found is None else found.reshape(-1, 1)
        return self._shifts[position]

    def _lower(self, position: int) -> Array:
        lower = self.bounds.ranges[position][0].reshape(-1)
        known = self.bounds.before.get(position)
        return lower if known is None or known >= len(self.bounds.lower) else np.maximum(lower, self.bounds.lower[known])

    # -- where rows begin ------------------------------------------------------------------------------------------

    def _start(self, node: int, neurons: Array, signs: Array, pending: dict[int, list[Part]]) -> Array:
        """The rows sign * y[neuron] of a node, passed on to what it reads where that is quick; returns constants."""
        layer = self.layers[node] if node != INPUT else None
        if isinstance(layer, Linear):
            weight, bias = layer.unit_rows(neurons)
            source = self.network.nodes[node].inputs[0]
            moved = self._shift(source) is not None
            most = np.abs(weight.reshape(-1, len(neurons))).max(axis=0, initial=0.0)
            exponent = np.frexp(most)[1].astype(np.int64) - 53  # a row of the largest value 2**52 and more will be rounded
            part = Part(coarse.outward(coarse.scaled_up(weight * signs, -exponent)), exponent, moved)
            pending.setdefault(source, []).append(part)
            return self._linear(node).constants(neurons, signs) if moved else bias * signs
        if isinstance(layer, Sum):
            total = np.zeros(len(neurons))
            for source in self.network.nodes[node].inputs:
                total = dyadic.add_up(total, self._start(source, neurons, signs, pending))
            return total
        shape = self.network.shape_of(node)
        unit = np.zeros((prod(shape), len(neurons)))
        unit[neurons, np.arange(len(neurons))] = signs
        pending.setdefault(node, []).append(Part(unit.reshape(*shape, -1), np.zeros(len(neurons), np.int64)))
        return np.zeros(len(neurons))

    # -- steps -----------------------------------------------------------------------------------------------------

    def _step(self, position: int, v: Rows, region: Region,
              hints: Mapping[int, Multipliers]) -> tuple[list[Part], Array | None]:
        layer = self.layers[position]
        if isinstance(layer, ReLU):
            return self._relu(position, v, region, hints)
        if isinstance(layer, Linear):
            return self._linear(position)(v)
        if isinstance(layer, Sum):
            return [Part(v.values, v.exponent)], None
        if isinstance(layer, Permute):
            order = (*(int(i) for i in np.argsort(layer.op.settings["permutation"])), v.values.ndim - 1)
            return [Part(v.values.transpose(order), v.exponent)], None
        if type(layer) is Layer:
            return [Part(v.values.reshape(*layer.shape, -1), v.exponent)], None
        return self._as_integers(layer, position, v, region)

    def _linear(self, position: int) -> LinearStep:
        if position not in self._steps:
            layer = self.layers[position]
            assert isinstance(layer, Linear)
            self._steps[position] = LinearStep(layer, self._shift(self.network.nodes[position].inputs[0]))
        return self._steps[position]

    def _relu(self, position: int, v: Rows, region: Region,
              hints: Mapping[int, Multipliers]) -> tuple[list[Part], Array]:
        k = self.bounds.layer_of[position]
        hint = hints.get(k)
        given = None if hint is None else (hint.values.T, hint.shift, hint.given.T)
        flat = Rows(v.values.reshape(-1, v.values.shape[-1]), v.exponent)
        a, constant = coarse.relax(flat, coarse.lines(*region.relu[k]), region.index, given)
        return [Part(a.values.reshape(v.values.shape), a.exponent)], constant

    def _as_integers(self, layer: Layer, position: int, v: Rows, region: Region) -> tuple[list[Part], Array | None]:
        """A step of ``layers``, rows first; its integers of up to 62 bits become two parts."""
        number = Dyadic(np.ascontiguousarray(np.moveaxis(v.values, -1, 0)).astype(np.int64), v.exponent)
        if isinstance(layer, MaxPool):
            w, constant = layer.relax(number, *(region.pick(b) for b in region.pool[position]), exact=False)
        else:
            w, constant = layer.backward(number, False)
        values = np.ascontiguousarray(np.moveaxis(dyadic.narrow(w.values), 0, -1))
        if values.dtype == object or w.divisor != 1:
            raise OverflowError("a row is too wide for coarse arithmetic")
        parts = [Part((values >> HALF).astype(np.float64), w.exponent + HALF),
                 Part((values & ((1 << HALF) - 1)).astype(np.float64), w.exponent)]
        return parts, None if constant is None else dyadic.to_float_up(constant)


class LinearStep:
    """v . (W x + b) = (v W) . (x - s) + v . (W s + b) for an affine layer or a convolution, W cut into limbs."""

    def __init__(self, layer: Linear, shift: Array | None) -> None:
        self.layer = layer
        self.cut = coarse.cut_weights(layer.weight, layer.backward_terms)  # limbs (G, O, K)
        bias = np.ascontiguousarray(layer.bias[0]).reshape(-1)
        self.low, self.high = (b.reshape(-1, 1) for b in self._bias(bias, shift))

    def _bias(self, bias: Array, shift: Array | None) -> tuple[Array, Array]:
        """W s + b, with s taken by the limbs, widened by what the weights' grid misses of W x and of W s.

        Limbs and shifts have fewer bits together than limbs and rows, so their products are exact as well.
        """
        low, high, size = bias, bias, self.layer.size.reshape(-1)
        if shift is not None:
            size = dyadic.add_up(size, np.abs(shift.reshape(-1)))
            point = shift.reshape(1, *self.layer.shape)
            for limb, exponent in zip(self.cut.limbs, self.cut.exponents, strict=True):
                value = self.layer.forward(point, limb).reshape(-1)
                low = -dyadic.add_up(-low, coarse.scaled_up(-value, exponent))
                high = dyadic.add_up(high, coarse.scaled_up(value, exponent))
        if self.cut.error is None:
            return low, high
        most = np.array(float(self.layer.weight.shape[2]) * size.max(initial=0.0) * (1 + 2.0**-40))
        error = coarse.scaled_up(most, self.cut.error)
        return -dyadic.add_up(-low, error), dyadic.add_up(high, error)

    def constants(self, neurons: Array, signs: Array) -> Array:
        """Upper bounds of sign * (W s + b) of some neurons."""
        return np.where(signs > 0, self.high[neurons, 0], -self.low[neurons, 0])

    def __call__(self, v: Rows) -> tuple[list[Part], Array]:
        constant = coarse.support(v, self.low, self.high)
        products = self._affine(v.values) if self.layer.windows is None else self._convolution(v.values)
        return [Part(p, v.exponent + e, True) for p, e in zip(products, self.cut.exponents, strict=True)], constant

    def _affine(self, v: Array) -> list[Array]:
        live = np.flatnonzero(v.any(axis=1))
        if len(live) > 0.7 * len(v):
            return [limb[0].T @ v for limb in self.cut.limbs]
        some = v[live]
        return [limb[0][live].T @ some for limb in self.cut.limbs]

    @cached_property
    def _stacked(self) -> Array:
        """(G, limbs * K, O)."""
        return np.ascontiguousarray(np.concatenate([limb.transpose(0, 2, 1) for limb in self.cut.limbs], axis=1))

    def _convolution(self, v: Array) -> list[Array]:
        windows = self.layer.windows
        assert windows is not None
        groups, rows = self.layer.groups, v.shape[-1]
        columns = np.matmul(self._stacked, v.reshape(groups, -1, prod(windows.out) * rows))
        places = prod(windows.kernel)
        split = columns.reshape(groups, len(self.cut.limbs), -1, places, *windows.out, rows)
        return [windows.scatter_rows(split[:, i].reshape(-1, places, *windows.out, rows))
                for i in range(len(self.cut.limbs))]
