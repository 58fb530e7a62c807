"""Pictures of a report as inline SVG: small, without text that would shrink, the same bytes for the same facts.

The drawing stretches with the page (``preserveAspectRatio="none"``); labels stand in a column of their own, so they
keep their size on a phone. Colours are CSS classes, so light, dark and paper each have their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 1000.0, 200.0
STATUSES = ("inactive", "unstable", "unknown", "active")  # left to right in the interval picture
_MOST_BARS = 400
_MOST_CELLS = 40_000
_THIN = 4.0
_AXIS = 72.0


def interval_plot(layer: Mapping[str, Any], kinds: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Pre-activation intervals of a layer, sorted by status, then by midpoint; zero is marked.

    Heights go by a signed square root, so that small bounds show next to large ones. Layers of more than 400
    neurons are drawn in bins: a bin reaches from its smallest lower to its largest upper bound.

    Returns:
        ``svg``, ``axis`` (its labels, also SVG), ``bins`` (neurons a bar), ``clipped`` (bars that leave the picture).
    """
    lower, upper, status = _columns(layer, kinds)
    bars = _bars(lower, upper, status)
    low, high = _limits(bars)
    paths = "".join(_status_path(bars, k, low, high) for k in range(len(STATUSES)))
    zero = HEIGHT * _place(0.0, low, high)
    line = f'<path class="zero" d="M0 {_n(zero)}H{_n(WIDTH)}"/>'
    label = f"Layer {layer['layer']}: pre-activation intervals of {layer['neurons']} neurons, sorted; zero is marked"
    clipped = int(((bars[:, 1] < low) | (bars[:, 2] > high)).sum())
    return {"svg": _svg(paths + line, label, HEIGHT), "axis": _axis(high, low, zero),
            "bins": -(-layer["neurons"] // max(len(bars), 1)) if layer["neurons"] > _MOST_BARS else 1, "clipped": clipped}


def share_bar(counts: Mapping[str, int], order: Sequence[str], label: str) -> Markup:
    """One horizontal bar, cut in proportion to counts."""
    total, start, parts = sum(counts[name] for name in order) or 1, 0.0, ""
    for name in order:
        width = WIDTH * counts[name] / total
        parts += f'<rect class="{name}" x="{_n(start)}" y="0" width="{_n(width)}" height="16"/>' if width else ""
        start += width
    return _svg(parts, label, 16)


def heat_map(channels: Mapping[str, Sequence[float]], order: Sequence[str], label: str) -> Markup:
    """One row a status, one column a channel; the darker, the larger the share of the channel's positions."""
    count = max(len(channels[order[0]]), 1)
    cells = [_cell(name, row, channel, share, WIDTH / count) for row, name in enumerate(order)
             for channel, share in enumerate(channels[name]) if share]
    return _svg("".join(cells), label, 30 * len(order))


def _cell(name: str, row: int, channel: int, share: float, step: float) -> str:
    return (f'<rect class="{name}" x="{_n(channel * step)}" y="{30 * row + 2}" width="{_n(step * 0.94)}" height="26" '
            f'opacity="{_n(0.12 + 0.88 * share)}"><title>channel {channel}: {100 * share:.4g} % {name}</title></rect>')


def position_map(layer: Mapping[str, Any], label: str) -> dict[str, Any] | None:
    """Every position of a layer of images by the share of its proved interval above 0; each channel is a tile, row by row.

    Returns:
        ``svg`` and ``columns`` (tiles a row); None where the shape is no image, or cells would be too many to see.
    """
    shape = tuple(layer["shape"])
    if len(shape) != 3 or not 0 < np.prod(shape) <= _MOST_CELLS:
        return None
    level = _levels(*(np.array([float(v) for v in layer[name]]) for name in ("lower", "upper"))).reshape(shape)
    columns = shape[0] if shape[0] <= 16 else max(1, min(shape[0], round(np.sqrt(4 * shape[0] * shape[1] / shape[2]))))
    high, wide = shape[1] + 1, shape[2] + 1
    parts = [f'<path class="h{k}" d="{_cells(level == k, columns, high, wide)}"/>' for k in np.unique(level).tolist()]
    size = f"{columns * wide - 1} {-(-shape[0] // columns) * high - 1}"
    svg = Markup(f'<svg class="map" viewBox="0 0 {size}" shape-rendering="crispEdges" role="img" aria-label="{escape(label)}">'
                 f'{"".join(parts)}</svg>')
    return {"svg": svg, "columns": columns}


def _levels(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """0 where never above 0, 10 where never below, 1 to 9 in between by the share of the interval above 0."""
    lower, upper = (np.clip(np.nan_to_num(v, nan=0.0), -1e300, 1e300) / 2 for v in (lower, upper))
    share = np.divide(upper, upper - lower, out=np.full(lower.shape, 0.5), where=upper > lower)
    return np.where(upper <= 0, 0, np.where(lower >= 0, 10, np.clip(np.rint(10 * share), 1, 9))).astype(int)


def _cells(mask: np.ndarray, columns: int, high: int, wide: int) -> str:
    """Path of the cells of a mask (channels, height, width): one rectangle a run in a row."""
    channel, row, column = np.nonzero(np.diff(mask.astype(np.int8), axis=2, prepend=0) == 1)
    ends = np.nonzero(np.diff(mask.astype(np.int8), axis=2, append=0) == -1)[2]
    x, y = channel % columns * wide + column, channel // columns * high + row
    return "".join(f"M{a} {b}h{n}v1h-{n}z" for a, b, n in zip(x.tolist(), y.tolist(), (ends - column + 1).tolist(), strict=True))


def _axis(high: float, low: float, zero: float) -> Markup:
    """Labels of the axis' ends and of zero, at their heights."""
    ends = [(12.0, short(high)), (HEIGHT - 3, short(low))]
    labels = ends + ([(zero + 4, "0")] if 26 < zero < HEIGHT - 20 else [])
    texts = "".join(f'<text x="{_n(_AXIS - 2)}" y="{_n(y)}" text-anchor="end">{escape(text)}</text>' for y, text in labels)
    return Markup(f'<svg class="labels" viewBox="0 0 {_n(_AXIS)} {_n(HEIGHT)}" aria-hidden="true">{texts}</svg>')


def short(value: float) -> str:
    """Three digits, for an axis."""
    return f"{value:.3g}"


# -- intervals -----------------------------------------------------------------------------------------------------


def _columns(layer: Mapping[str, Any], kinds: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    words = np.array([STATUSES.index(kind["status"]) for kind in kinds] or [0])
    lower, upper = (np.array([float(v) for v in layer[name]], float) for name in ("lower", "upper"))
    return (np.nan_to_num(lower, nan=-np.inf, neginf=-np.inf, posinf=np.inf),
            np.nan_to_num(upper, nan=np.inf, neginf=-np.inf, posinf=np.inf), words[np.asarray(layer["kind"], int)])


def _bars(lower: np.ndarray, upper: np.ndarray, status: np.ndarray) -> np.ndarray:
    """Rows (status, lower, upper, neurons), in drawing order."""
    share, rows = _MOST_BARS / max(len(status), 1), []
    middle = np.nan_to_num(np.clip(lower, -1e300, 1e300) / 2 + np.clip(upper, -1e300, 1e300) / 2)
    for k in range(len(STATUSES)):
        found = np.flatnonzero(status == k)
        found = found[np.lexsort((found, middle[found]))]
        bins = len(found) if share >= 1 else max(1, round(len(found) * share))
        rows += [(k, lower[part].min(), upper[part].max(), part.size) for part in np.array_split(found, bins or 1) if part.size]
    return np.array(rows, float).reshape(-1, 4)


def _limits(bars: np.ndarray) -> tuple[float, float]:
    """Ends of the axis: everything, unless a few bars are many times longer than the others."""
    ends = bars[:, 1:3][np.isfinite(bars[:, 1:3])]
    if not ends.size or not np.abs(ends).max():
        return -1.0, 1.0
    size = np.abs(ends)
    most = float(size.max())
    usual = 1.5 * float(np.quantile(size, 0.95))
    cut = usual if 0 < usual < most / 3 else most
    low, high = max(float(ends.min()), -cut), min(float(ends.max()), cut)
    return min(1.04 * low, -0.04 * high if high > 0 else low), max(1.04 * high, -0.04 * low if low < 0 else high)


def _status_path(bars: np.ndarray, status: int, low: float, high: float) -> str:
    step = WIDTH / max(len(bars), 1)
    gap = 0.15 * step if len(bars) <= 150 else 0.0
    parts = []
    for i in np.flatnonzero(bars[:, 0] == status).tolist():
        top, bottom = (HEIGHT * _place(bars[i, column], low, high) for column in (2, 1))
        if bottom - top < _THIN:  # made visible, away from zero
            top, bottom = (top, top + _THIN) if STATUSES[status] == "inactive" else (bottom - _THIN, bottom)
        parts.append(f"M{_n(i * step + gap)} {_n(top)}H{_n((i + 1) * step - gap)}V{_n(bottom)}H{_n(i * step + gap)}Z")
    return f'<path class="{STATUSES[status]}" d="{"".join(parts)}"/>' if parts else ""


def _place(value: float, low: float, high: float) -> float:
    """Height of a value as a share of the picture, from the top, on a signed square root scale."""
    top, bottom, here = (float(np.sign(v) * np.sqrt(abs(v))) for v in (high, low, np.clip(value, low, high)))
    return min(max((top - here) / (top - bottom), 0.0), 1.0)


def _svg(body: str, label: str, height: float) -> Markup:
    text = escape(label)
    return Markup(f'<svg viewBox="0 0 {_n(WIDTH)} {_n(height)}" preserveAspectRatio="none" role="img" aria-label="{text}">'
                  f"{body}</svg>")


def _n(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".").replace("-0.00", "0") or "0"
