"""Proofs as plain data: what a certificate stores of them, and how multipliers become integers.

The formats are those of docs/certificate.md. A multiplier is any number, so rounding one costs tightness and never
soundness: it is kept as an integer times a power of two, ``bits`` significant bits relative to the row's largest.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Record = dict[str, object]


def pack(array: np.ndarray) -> dict[str, object]:
    """An array as JSON-able data: dtype, shape, base64 of the little-endian bytes."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {"dtype": little.dtype.str.replace("|", "<"), "shape": list(array.shape),
            "data": base64.b64encode(little.tobytes()).decode("ascii")}


def pack_integers(values: np.ndarray) -> dict[str, object]:
    """Integers in the smallest dtype of <i1 <i2 <i4 <i8 that holds them."""
    top = int(np.abs(values).max(initial=0))
    for dtype in (np.int8, np.int16, np.int32):
        if top <= np.iinfo(dtype).max:
            return pack(values.astype(dtype))
    return pack(values.astype(np.int64))


def quantise(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers, shift) with values ~ integers * 2^-shift, ``bits`` bits for each row's largest; shapes (m, n) and (m,)."""
    top = np.abs(values).max(axis=1, initial=0.0)
    exponent = np.where(top > 0, np.frexp(np.where(top > 0, top, 1.0))[1], 0)
    shift = bits - exponent
    return np.rint(np.ldexp(values, shift[:, None])).astype(np.int64), shift.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Coefficients put on pre-activations, some rows of them.

    Attributes:
        neurons: layer -> indices that have one.
        values: layer -> float64 (rows, len(neurons[layer])).
    """

    neurons: Mapping[int, np.ndarray]
    values: Mapping[int, np.ndarray]

    def records(self, bits: int, rows: slice | np.ndarray = slice(None)) -> list[Record]:
        """The ``multipliers`` list of a record."""
        found = []
        for layer, neurons in self.neurons.items():
            integers, shift = quantise(self.values[layer][rows], bits)
            found.append({"layer": layer, "neurons": pack_integers(neurons), "shift": shift.tolist(),
                          "values": pack_integers(integers)})
        return found


@dataclass(frozen=True, eq=False)
class Tree:
    """A proof by phase splits: preorder of (layer, neuron) splits and leaves (None), multipliers a leaf (one row each).

    The first subtree of a split is the inactive phase.
    """

    layer: int
    neuron: int
    sign: int
    splits: Sequence[tuple[int, int] | None]
    leaves: Sequence[Multipliers]

    def record(self, bits: int) -> Record:
        """The certificate record."""
        return {"record": "tree", "layer": self.layer, "neuron": self.neuron, "side": "upper" if self.sign > 0 else "lower",
                "splits": [list(s) if s is not None else None for s in self.splits],
                "leaves": [leaf.records(bits) for leaf in self.leaves]}


def crown_record(layer: int, neurons: np.ndarray, side: str = "both") -> Record:
    """Narrow these rows by CROWN with the fixed slopes."""
    return {"record": "crown", "layer": layer, "neurons": pack_integers(np.asarray(neurons)), "side": side}


def linear_record(layer: int, neurons: np.ndarray, sign: int, multipliers: Multipliers, rows: np.ndarray, bits: int) -> Record:
    """Narrow these rows, on one side, with given multipliers (``rows`` of them)."""
    return {"record": "linear", "layer": layer, "neurons": pack_integers(np.asarray(neurons)),
            "side": "upper" if sign > 0 else "lower", "multipliers": multipliers.records(bits, rows)}
