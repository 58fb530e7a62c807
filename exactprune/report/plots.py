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


def curve_plot(rows: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Neurons left at each allowed deviation, one bar a row, from 0 neurons at the bottom."""
    most = max((row["neurons"] for row in rows), default=1) or 1
    step = WIDTH / max(len(rows), 1)
    points = [(step * (i + 0.5), HEIGHT * (1 - row["neurons"] / most)) for i, row in enumerate(rows)]
    bars = "".join(f'<rect class="time" x="{_n(x - 0.35 * step)}" y="{_n(y)}" width="{_n(0.7 * step)}" '
                   f'height="{_n(HEIGHT - y)}"/>' for x, y in points)
    return _svg(bars + f'<path class="zero" d="M0 {_n(HEIGHT - 0.5)}H{_n(WIDTH)}"/>', label, HEIGHT)


def line_plot(series: Sequence[Sequence[float]], control: float | None, label: str, floor: float | None = None) -> dict[str, Any]:
    """One line a series, over equally spaced places; the control is a dashed line. Values that are not finite are left out.

    Returns:
        ``svg`` and ``axis`` (labels of its ends).
    """
    values = [v for line in series for v in line if np.isfinite(v)] + ([] if control is None else [control])
    low, high = min(values, default=0.0) if floor is None else floor, max(values, default=1.0)
    span = (high - low) or 1.0
    step = WIDTH / max(max(map(len, series), default=1), 1)
    parts = []
    for k, line in enumerate(series):
        points = [f"{_n(step * (i + 0.5))} {_n(6 + (HEIGHT - 12) * (high - v) / span)}" for i, v in enumerate(line)
                  if np.isfinite(v)]
        last = " last" if k == len(series) - 1 else ""
        parts.append(f'<path class="line c{k % 8}{last}" d="M{"L".join(points)}"/>' if points else "")
    if control is not None:
        parts.append(f'<path class="zero" d="M0 {_n(6 + (HEIGHT - 12) * (high - control) / span)}H{_n(WIDTH)}"/>')
    return {"svg": _svg("".join(parts), label, HEIGHT), "axis": _axis(high, low, -1.0), "low": low, "high": high}


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
