"""Small multiples: one panel a method, over the ratio, each with the same controls, so that no legend has to be searched.

Every panel has the dense network (dashed), magnitude and random pruning (grey), the lossless network (a diamond at its own
ratio) and its method in colour. The ratio goes by powers of two, a deviation by powers of ten, with 0 on a line of its
own at the bottom. Text stays inside the drawing, which keeps its shape; equal facts give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320.0, 190.0
LEFT, RIGHT, WIDE, TOP, BOTTOM = 44.0, 308.0, 520.0, 10.0, 160.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values over the ratio: (ratio, value), and half the height of the error bars, if any."""

    css: str
    points: tuple[Point, ...]
    errors: tuple[float, ...] = ()
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """Places of ratios and values.

    Attributes:
        ratios: ticks of the ratio.
        ticks: (value, label) from the bottom up.
        place: value -> share of the height, 0 at the bottom.
    """

    ratios: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]
    place: Callable[[float], float]

    def x(self, ratio: float) -> float:
        """Where a ratio is."""
        most = math.log2(max(*self.ratios, 2.0))
        return LEFT + 10 + (RIGHT - LEFT - 18) * min(max(math.log2(max(ratio, 1e-9)) / most, 0.0), 1.0)

    def y(self, value: float) -> float:
        """Where a value is."""
        return BOTTOM - (BOTTOM - TOP) * min(max(self.place(value), 0.0), 1.0)


def share_axes(ratios: Sequence[float]) -> Axes:
    """For shares from 0 to 100 %."""
    ticks = tuple((k / 4, f"{25 * k} %") for k in range(5))
    return Axes(_with_one(ratios), ticks, lambda share: share)


def deviation_axes(ratios: Sequence[float], values: Sequence[float]) -> Axes:
    """For deviations: powers of ten, and 0 below them."""
    logs = [math.log10(v) for v in values if 0 < v < math.inf]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-1, 0)
    low, high = max(low, high - 12), max(high, low + 1)
    step = max(1, math.ceil((high - low) / 4))

    def place(value: float) -> float:
        if value <= 0:
            return 0.0
        exact = math.log10(value) if value < math.inf else high
        return 0.12 + 0.88 * min(max((exact - low) / (high - low), 0.0), 1.0)

    ticks = [(10.0**k, _power(k)) for k in range(low, high + 1, step)]
    return Axes(_with_one(ratios), ((0.0, "0"), *ticks), place)


def panel(axes: Axes, lines: Sequence[Line], label: str, *, band: tuple[Sequence[Point], Sequence[Point]] | None = None,
          dense: float = 0.0, lossless: Point | None = None) -> Markup:
    """One drawing.

    Args:
        axes: see ``Axes``.
        lines: in drawing order, the method last.
        label: what it shows, for those who do not see it.
        band: lower and upper points with an area between.
        dense: value of the original.
        lossless: ratio and value of the lossless network.
    """
    parts = [_frame(axes)]
    if band is not None:
        around = [*band[0], *reversed(band[1])]
        parts.append(f'<path class="band" d="M{"L".join(_at(axes, p) for p in around)}Z"/>' if len(around) > 2 else "")
    parts.append(f'<path class="dense" d="M{_n(LEFT)} {_n(axes.y(dense))}H{_n(RIGHT)}"/>')
    parts += [_line(axes, line) for line in lines]
    if lossless is not None:
        parts.append(_diamond(axes.x(lossless[0]), axes.y(lossless[1])))
    return Markup(f'<svg class="panel" viewBox="0 0 {_n(WIDTH)} {_n(HEIGHT)}" role="img" aria-label="{escape(label)}">'
                  f'{"".join(parts)}</svg>')


def curve_panel(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """What is left of neurons and parameters over the certified deviation: powers of ten, and 0 at the left."""
    eps = [float(row["eps"]) for row in rows]
    logs = [math.log10(e) for e in eps if e > 0] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    share = share_axes((2.0,))

    def x(value: float) -> float:
        return LEFT + 8 if value <= 0 else LEFT + 40 + (WIDE - LEFT - 52) * (math.log10(value) - low) / (high - low)

    step = max(1, math.ceil((high - low) / 6))
    places = [(LEFT + 8, "0"), *((x(10.0**k), _power(k)) for k in range(low, high + 1, step))]
    parts = [_rows(share, WIDE), *(_below(at, text) for at, text in places), _below((LEFT + WIDE) / 2, "certified deviation", 2)]
    for css, key in (("magnitude", "parameters"), ("method", "neurons")):
        points = [(x(e), share.y(row[key] / max(row[f"{key}_before"], 1))) for e, row in zip(eps, rows, strict=True)]
        path = f"M{_n(points[0][0])} {_n(points[0][1])}" + "".join(f"H{_n(a)}V{_n(b)}" for a, b in points[1:]) + f"H{_n(WIDE)}"
        parts.append(f'<path class="{css}" d="{path}"/>')
        parts += [f'<circle class="{css} dot" cx="{_n(a)}" cy="{_n(b)}" r="3"/>' for a, b in dict.fromkeys(points)]
    said = "; ".join(f"{row['certified']}: {row['neurons']:,} neurons, {row['parameters']:,} parameters" for row in rows)
    label = f"Left at each certified deviation: {said}"
    return Markup(f'<svg class="panel broad" viewBox="0 0 {_n(WIDE + 8)} {_n(HEIGHT)}" role="img" aria-label="{escape(label)}">'
                  f'{"".join(parts)}</svg>')


def bars(names: Sequence[str], before: Sequence[float], after: Sequence[float], label: str) -> Markup:
    """Outputs of two networks side by side, one row an output, the largest of each in full colour."""
    low, high = min(0.0, *before, *after), max(0.0, *before, *after)
    span, height = (high - low) or 1.0, 15.0
    left = 12 + 5 * max((len(_shortened(name)) for name in names), default=0)

    def bar(value: float, y: float, css: str) -> str:
        ends = sorted(left + (200 - left) * (end - low) / span for end in (0.0, value))
        return f'<rect class="{css}" x="{_n(ends[0])}" y="{_n(y)}" width="{_n(max(ends[1] - ends[0], 0.5))}" height="5"/>'

    rows = []
    for i, name in enumerate(names):
        y, best = height * i, (i == _argmax(before), i == _argmax(after))
        rows.append(f'<text class="{"best" if any(best) else "rest-text"}" x="{_n(left - 6)}" y="{_n(y + 10)}" text-anchor="end">'
                    f"{escape(_shortened(name))}</text>"
                    + bar(before[i], y + 1.5, "first" if best[0] else "first faint")
                    + bar(after[i], y + 7.5, "second" if best[1] else "second faint"))
    return Markup(f'<svg class="outputs" viewBox="0 0 204 {_n(height * len(names) + 2)}" role="img" aria-label="{escape(label)}">'
                  f'{"".join(rows)}</svg>')


# -- parts ---------------------------------------------------------------------------------------------------------------


def _frame(axes: Axes) -> str:
    columns = [_below(axes.x(r), f"{r:g}x") for r in _apart(axes)]
    return _rows(axes, RIGHT) + "".join(columns) + _below((LEFT + RIGHT) / 2, "ratio", 2)


def _below(x: float, text: str, line: int = 1) -> str:
    """Text under the drawing, in the first line or in the second."""
    y = BOTTOM + 15 if line == 1 else HEIGHT - 2
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="middle">{text}</text>'


def _rows(axes: Axes, right: float) -> str:
    """Lines across at the ticks, with their labels."""
    return "".join(f'<path class="grid" d="M{_n(LEFT)} {_n(axes.y(v))}H{_n(right)}"/>'
                   f'<text x="{_n(LEFT - 4)}" y="{_n(axes.y(v) + 4)}" text-anchor="end">{text}</text>' for v, text in axes.ticks)


def _apart(axes: Axes) -> list[float]:
    """Ticks of the ratio that do not overlap."""
    kept: list[float] = []
    for ratio in axes.ratios:
        if not kept or axes.x(ratio) - axes.x(kept[-1]) >= 26:
            kept.append(ratio)
    return kept


def _line(axes: Axes, line: Line) -> str:
    if not line.points:
        return ""
    parts = [f'<path class="{line.css}" d="M{"L".join(_at(axes, p) for p in line.points)}"/>']
    for (ratio, value), error in zip(line.points, line.errors):
        if error:
            x = _n(axes.x(ratio))
            parts.append(f'<path class="{line.css}" d="M{x} {_n(axes.y(value - error))}V{_n(axes.y(value + error))}"/>')
    if line.dots:
        parts += [f'<circle class="{line.css} dot" cx="{_n(axes.x(r))}" cy="{_n(axes.y(v))}" r="3"/>' for r, v in line.points]
    return "".join(parts)


def _diamond(x: float, y: float, size: float = 6.0) -> str:
    corners = ((x, y - size), (x + size, y), (x, y + size), (x - size, y))
    return f'<path class="diamond" d="M{"L".join(f"{_n(a)} {_n(b)}" for a, b in corners)}Z"/>'


def _at(axes: Axes, point: Point) -> str:
    return f"{_n(axes.x(point[0]))} {_n(axes.y(point[1]))}"


def _with_one(ratios: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({1.0, *map(float, ratios)}))


_SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(k: int) -> str:
    return {0: "1", 1: "10", 2: "100"}.get(k, "10" + str(k).translate(_SUPER))


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _shortened(name: str) -> str:
    return name if len(name) <= 10 else name[:9] + "…"


def _n(value: float) -> str:
    """A coordinate with at most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def numbers(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> tuple[Point, ...]:
    """(ratio, value) of summary rows."""
    return tuple((float(row["ratio"]), value(row)) for row in rows)
