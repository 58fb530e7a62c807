"""Strict reading of certificate records: sizes, ranges, dtypes and duplicates are checked before anything is used."""

from __future__ import annotations

import base64
import binascii
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.checker.bounds import Multipliers
from exactprune.checker.dyadic import Array
from exactprune.checker.network import CheckError

FORMAT = "exactprune-certificate/1"
INTEGERS = ("<i1", "<i2", "<i4", "<i8")
MOST = 1 << 28  # elements of one packed array
LONGEST = 1 << 30  # characters of one line
SHIFT = 1200  # largest magnitude of a multiplier's power of two

Json = dict[str, Any]


def read_lines(path: Path) -> Iterator[Json]:
    """The records of a ``certificates.jsonl.gz``.

    Raises:
        CheckError: missing, truncated, not gzip, not JSON lines.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            while line := lines.readline(LONGEST):
                if not line.endswith("\n"):
                    raise CheckError(f"{path.name}: a line is cut off or too long")
                yield json.loads(line, parse_constant=_no_constant)
    except (OSError, EOFError, ValueError, RecursionError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise CheckError(f"{path.name}: not readable as gzip of JSON lines ({type(error).__name__}: {error})") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number here")


def fields(record: Any, *names: str) -> list[Any]:
    """The values of exactly these fields of a record (besides "record")."""
    if not isinstance(record, dict) or set(record) - {"record"} != set(names):
        raise CheckError(f"a {kind_of(record)} record needs exactly the fields {', '.join(names)}")
    return [record[name] for name in names]


def kind_of(record: Any) -> str:
    """The record's kind, for messages."""
    kind = record.get("record") if isinstance(record, dict) else None
    return kind if isinstance(kind, str) else "nameless"


def whole(value: Any, low: int, high: int, what: str) -> int:
    """An integer in [low, high)."""
    if type(value) is not int or not low <= value < high:
        raise CheckError(f"{what} is {value!r}; expected an integer from {low} to {high - 1}")
    return value


def choice(value: Any, words: Iterable[str], what: str) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in words:
        raise CheckError(f"{what} is {value!r}; expected one of {', '.join(words)}")
    return value


def listed(value: Any, what: str) -> list[Any]:
    """A JSON list."""
    if not isinstance(value, list):
        raise CheckError(f"{what} is not a list")
    return value


def unpack(value: Any, dtypes: tuple[str, ...], what: str) -> Array:
    """A packed array."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data"}:
        raise CheckError(f"{what} is not a packed array")
    dtype = choice(value["dtype"], dtypes, f"{what}: dtype")
    shape = [whole(n, 0, MOST, f"{what}: a size") for n in listed(value["shape"], f"{what}: shape")]
    size = int(np.prod(shape, dtype=object)) if shape else 1
    try:
        data = base64.b64decode(value["data"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise CheckError(f"{what}: data is not base64") from None
    if size > MOST or len(data) != size * np.dtype(dtype).itemsize:
        raise CheckError(f"{what}: {len(data)} bytes do not fill {shape} of {dtype}")
    array = np.frombuffer(data, dtype).reshape(shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CheckError(f"{what}: holds NaN or infinity")
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def integers(value: Any, low: int, high: int, what: str) -> Array:
    """A list of integers in [low, high), packed or plain, as int64."""
    if isinstance(value, dict):
        array = unpack(value, INTEGERS, what)
        if array.ndim != 1:
            raise CheckError(f"{what} is not a list")
    else:
        given = listed(value, what)
        if any(type(n) is not int or not low <= n < high for n in given):
            raise CheckError(f"{what}: expected integers from {low} to {high - 1}")
        array = np.array(given, np.int64)
    if array.size and not (low <= array.min() and array.max() < high):
        raise CheckError(f"{what}: expected integers from {low} to {high - 1}")
    return array


def indices(value: Any, count: int, what: str) -> Array:
    """Distinct indices below ``count``."""
    array = integers(value, 0, count, what)
    if len(np.unique(array)) != len(array):
        raise CheckError(f"{what}: an index stands twice")
    return array


def multipliers(value: Any, sizes: list[int], rows: int) -> dict[int, tuple[Array, Array, Array]]:
    """A record's multipliers: layer -> (neurons (n,), shift (rows,), values (rows, n)), layers below len(sizes)."""
    found: dict[int, tuple[Array, Array, Array]] = {}
    for entry in listed(value, "multipliers"):
        layer, neurons, shift, values = fields(entry, "layer", "neurons", "shift", "values")
        layer = whole(layer, 0, len(sizes), "multipliers: layer")
        if layer in found:
            raise CheckError(f"multipliers: layer {layer} stands twice")
        chosen = indices(neurons, sizes[layer], "multipliers: neurons")
        shifts = integers(shift, -SHIFT, SHIFT, "multipliers: shift")
        array = unpack(values, INTEGERS, "multipliers: values")
        if shifts.shape != (rows,) or array.shape != (rows, len(chosen)) or (array == np.iinfo(np.int64).min).any():
            raise CheckError(f"multipliers: {array.shape} values, {len(shifts)} shifts for {rows} x {len(chosen)}")
        found[layer] = chosen, shifts, array
    return found


def dense(entries: list[dict[int, tuple[Array, Array, Array]]], sizes: list[int]) -> dict[int, Multipliers]:
    """The multipliers of several one-row entries (or one entry of many rows) as arrays over all neurons of a layer."""
    rows = [next((len(shift) for _, shift, _ in entry.values()), 1) for entry in entries]
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(int)
    found: dict[int, Multipliers] = {}
    for layer in sorted({k for entry in entries for k in entry}):
        shape = (int(starts[-1]), sizes[layer])
        table = Multipliers(np.zeros(shape, np.int64), np.zeros(shape[0], np.int64), np.zeros(shape, bool))
        for start, entry in zip(starts, entries, strict=False):
            if layer in entry:
                neurons, shift, values = entry[layer]
                part = slice(start, start + len(shift))
                table.shift[part] = shift
                table.values[part, neurons] = values
                table.given[part, neurons] = True
        found[layer] = table
    return found
