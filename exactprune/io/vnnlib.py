"""The input box of a VNN-LIB 1.0 file (https://www.vnnlib.org): an SMT-LIB subset with inputs X_i and outputs Y_j.

Only the box on X matters here; assertions on Y, disjunctions included, are skipped. Decimal numbers are read as the
nearest float64, as every reader of the format does, and the box with those endpoints is then taken exactly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from exactprune.domain import Box
from exactprune.errors import DomainError

Expression = str | list["Expression"]

_TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")
_INPUT = re.compile(r"X_?(\d+)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MAX_BYTES = 1 << 30


def load_vnnlib(path: str | os.PathLike[str]) -> Box:
    """The box on X_0 .. X_n-1, flat.

    Raises:
        DomainError: the file cannot be read, an input lacks a bound, bounds contradict each other, or the inputs are
            restricted by something that is not a box.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DomainError(f"{path}: is larger than 1 GiB, which no VNN-LIB file should be")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DomainError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from None
    except UnicodeDecodeError:
        raise DomainError(f"{path}: is not text; give a VNN-LIB 1.0 file") from None
    try:
        return _box(text, path.name)
    except DomainError as error:
        raise DomainError(f"{path}: {error}") from None


def _box(text: str, name: str) -> Box:
    inputs: set[int] = set()
    bounds: dict[int, tuple[float, float]] = {}
    for command in _parse(text):
        if not isinstance(command, list) or not command:
            raise DomainError(f"'{_text(command)}' stands outside a command; give a VNN-LIB 1.0 file")
        if command[0] in ("declare-const", "declare-fun") and len(command) > 2:
            inputs |= {i for i in [_variable(command[1])] if i is not None}
        elif command[0] == "assert" and len(command) == 2:
            for i, low, high in _bounds(command[1]):
                old = bounds.get(i, (-np.inf, np.inf))
                bounds[i] = (max(old[0], low), min(old[1], high))
        elif command[0] == "assert":
            raise DomainError(f"'{_text(command)}' is not an assertion of one formula")
    return _checked(inputs, bounds, name)


def _checked(inputs: set[int], bounds: dict[int, tuple[float, float]], name: str) -> Box:
    if not inputs or inputs != set(range(len(inputs))) or not set(bounds) <= inputs:
        raise DomainError("declares no inputs, or not all of X_0 .. X_n-1 that it uses; give a VNN-LIB 1.0 file")
    pairs = [bounds.get(i, (-np.inf, np.inf)) for i in range(len(inputs))]
    for i, (low, high) in enumerate(pairs):
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DomainError(
                f"input X_{i} has no {'upper' if np.isfinite(low) else 'lower'} bound; every input needs both"
            )
        if low > high:
            raise DomainError(f"bounds of input X_{i} contradict each other: {low!r} > {high!r}")
    return Box(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]), f"VNN-LIB {name}")


def _bounds(formula: Expression) -> Iterator[tuple[int, float, float]]:
    """(input, lower, upper) for every bound that ``formula`` puts on an input.

    Raises:
        DomainError: it restricts the inputs in another way.
    """
    if not _mentions_input(formula):
        return
    head, parts = (formula[0], formula[1:]) if isinstance(formula, list) and formula else (formula, [])
    if head == "and" or (head == "or" and len(parts) == 1):
        for part in parts:
            yield from _bounds(part)
    elif head == "or":
        raise DomainError(
            f"'{_text(formula)}' is a disjunction over inputs, which is not a box; split the file into one per box"
        )
    elif head in ("<=", ">=", "<", ">", "=") and len(parts) == 2:
        yield _comparison(str(head), parts, formula)
    else:
        raise DomainError(f"'{_text(formula)}' is not a bound on one input; only boxes are understood")


def _comparison(sign: str, parts: Sequence[Expression], formula: Expression) -> tuple[int, float, float]:
    left, right = parts
    if _variable(left) is None:
        left, right, sign = right, left, {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "=": "="}[sign]
    i, value = _variable(left), _number(right)
    if i is None or value is None:
        raise DomainError(f"'{_text(formula)}' is not a bound on one input; only boxes are understood")
    return i, value if sign in (">=", ">", "=") else -np.inf, value if sign in ("<=", "<", "=") else np.inf


def _variable(expression: Expression) -> int | None:
    match = _INPUT.fullmatch(expression) if isinstance(expression, str) else None
    return int(match[1]) if match else None


def _number(expression: Expression) -> float | None:
    """A decimal, or ``(- decimal)`` as SMT-LIB writes negative ones."""
    if isinstance(expression, list) and len(expression) == 2 and expression[0] == "-":
        inner = _number(expression[1])
        return None if inner is None else -inner
    if isinstance(expression, str) and _NUMBER.fullmatch(expression):
        return float(expression)
    return None


def _mentions_input(expression: Expression) -> bool:
    if isinstance(expression, str):
        return _variable(expression) is not None
    return any(_mentions_input(part) for part in expression)


def _parse(text: str) -> list[Expression]:
    """The s-expressions of ``text``."""
    stack: list[list[Expression]] = [[]]
    for token in _TOKEN.findall(text):
        if token.startswith(";"):
            continue
        if token == "(":
            stack.append([])
            if len(stack) > 100:
                raise DomainError("is nested more than 100 deep; give a VNN-LIB 1.0 file")
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) == 1:
            raise DomainError("has a ')' too many; is the file damaged?")
        else:
            done = stack.pop()
            stack[-1].append(done)
    if len(stack) != 1:
        raise DomainError("ends inside a '('; is the file truncated?")
    return stack[0]


def _text(expression: Expression) -> str:
    words = expression if isinstance(expression, str) else f"({' '.join(_text(e) for e in expression[:6])})"
    return words if len(words) <= 80 else words[:77] + "..."
