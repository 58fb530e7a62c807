"""report.html: one file, without network access, that opens anywhere; report.md and report.json with the same facts.

The page's own script and style are named by their hashes in a Content-Security-Policy, so nothing that a model file puts
into a name can run. Facts reach the page through jinja2 with autoescape, the neuron table through a JSON island in
which ``<``, ``>`` and ``&`` are escaped. Bounds in the table have six digits, rounded outward: a shown bound is a bound.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from exactprune.compress.levels import upward
from exactprune.io.atomic import write_bytes
from exactprune.report import panels, plots
from exactprune.report.page import facts_of
from exactprune.report.page_markdown import report_markdown
from exactprune.report.record import read_run
from exactprune.report.strict import compact, pretty
from exactprune.report.tables import size_words

FILES = ("report.html", "report.md", "report.json")
_STATUSES = ("inactive", "active", "unstable", "unknown")
_FLOOR, _CEILING = Context(prec=6, rounding=ROUND_FLOOR), Context(prec=6, rounding=ROUND_CEILING)
_POWER = re.compile(r"\d[\d.]*e-\d+[.,]?")
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def write_report(folder: str | Path, output: str | Path | None = None, *,
                 curve: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Write report.html, report.md and report.json of a run folder.

    Args:
        folder: run folder of ``verify`` or ``compress``.
        output: folder for the three files, made when missing; by default the run folder itself.
        curve: rows of ``curve.removal_curve``; none leaves that section out.

    Returns:
        The facts, as report.json holds them.

    Raises:
        CertificateError: not a finished run folder, or its files contradict each other.
    """
    facts = facts_of(read_run(folder), curve)
    target = Path(folder if output is None else output)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, (render_html(facts), report_markdown(facts), pretty(facts)), strict=True):
        write_bytes(target / name, text.encode())
    return facts


def render_html(facts: Mapping[str, Any]) -> str:
    """The page of a run's facts; equal facts give equal bytes."""
    style, script = asset("report.css") + asset("panels.css"), asset("report.js")
    return environment().get_template("report.html").render(
        f=facts, policy=policy(style, script), style=Markup(style), script=Markup(script), island=Markup(island(facts)),
        statuses=_STATUSES, layers=[_drawn(layer, facts["kinds"]) for layer in facts["layers"]],
        curve=panels.curve_panel(facts["curve"]) if facts["curve"] else "",
        longest=max((float(s["seconds"]) for s in facts["stages"]), default=0.0) or 1.0)


def island(facts: Mapping[str, Any]) -> str:
    """The neuron table as JSON that is safe inside ``<script type="application/json">``."""
    layers = ",".join(_island_layer(layer) for layer in facts["layers"])
    return f'{{"kinds":{_safe(facts["kinds"])},"layers":[{layers}]}}'


def outward(value: float | str, up: bool) -> str:
    """A bound as a JSON value of at most six digits: a lower bound rounded down, an upper bound rounded up."""
    number = float(value)
    if not math.isfinite(number):
        return f'"{number}"'
    return str((_CEILING if up else _FLOOR).create_decimal_from_float(number))


def _island_layer(layer: Mapping[str, Any]) -> str:
    lower = ",".join(outward(value, False) for value in layer["lower"])
    upper = ",".join(outward(value, True) for value in layer["upper"])
    rest = _safe({name: layer[name] for name in ("layer", "node", "shape", "kind", "reasons")})
    return f'{rest[:-1]},"lower":[{lower}],"upper":[{upper}]}}'


def _safe(value: Any) -> str:
    return compact(value).translate(_ESCAPES)


def _drawn(layer: Mapping[str, Any], kinds: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A layer with its pictures."""
    where = f"layer {layer['layer']}"
    channels = layer["channels"]
    return {"facts": layer, "intervals": plots.interval_plot(layer, kinds),
            "bar": plots.share_bar(layer, _STATUSES, f"Share of each status in {where}"),
            "heat": channels and plots.heat_map(channels, _STATUSES, f"Share of each status by channel in {where}"),
            "where": channels and plots.position_map(layer, f"Share of the interval above 0 at every position of {where}"),
            "channels": channels and len(channels["inactive"])}


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy of a page with this style and script."""
    return (f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; base-uri 'none'; "
            "form-action 'none'")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def asset(name: str) -> str:
    """A file of the templates folder."""
    return files("exactprune.report").joinpath("templates", name).read_text(encoding="utf-8")


def environment() -> Environment:
    """Templates with autoescape, strict about what is missing."""
    env = Environment(loader=PackageLoader("exactprune.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                      lstrip_blocks=True)
    env.filters |= {"count": lambda n: f"{n:,}", "size": size_words, "seconds": _seconds, "change": _change, "whole": _whole,
                    "percent": lambda v: f"{100 * v:.2f} %", "up": lambda v: upward(float(v)) if float(v) else "0",
                    "digits": lambda v: f"{float(v):.3g}", "value": lambda v: v if isinstance(v, str) else json.dumps(v),
                    "share": lambda s, most: plots.share_bar({"time": s, "rest": max(most - s, 0)}, ("time", "rest"), "")}
    return env


def _whole(text: str) -> Markup:
    """Escaped text whose numbers like 4.47e-08 are not broken across lines."""
    return Markup(_POWER.sub(r'<span class="nowrap">\g<0></span>', str(escape(text))))


def _seconds(value: float | str) -> str:
    number = float(value)
    return f"{number:,.1f} s" if number >= 10 else f"{number:.2f} s" if number >= 0.01 else f"{1e3 * number:.2g} ms"


def _change(pair: Mapping[str, float]) -> str:
    return f"{100 * (pair['after'] - pair['before']) / pair['before']:+.1f} %" if pair["before"] else ""
