"""comparison.html: one file, without network access, that opens anywhere; equal facts give equal bytes.

Pictures first (a panel a method), then the tables, which sort and filter, then inputs whose class changed, then how to
repeat it. Pictures of inputs are PNG data; nothing is fetched, and only the page's own script and style may run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from exactprune.compress.levels import upward
from exactprune.report.comparison_tables import Cell, tables_of
from exactprune.report.html import asset, environment, policy
from exactprune.report.panels import Axes, Line, bars, deviation_axes, numbers, panel, share_axes

Summary = Mapping[str, Any]
MOST_OUTPUTS = 12
_SHADES = 10


def render_comparison(facts: Mapping[str, Any]) -> str:
    """The page of a comparison's facts (``comparison.run_study``)."""
    style, script = asset("report.css") + asset("panels.css") + asset("comparison.css"), asset("comparison.js")
    methods = list(dict.fromkeys(row["method"] for row in facts["summary"]))
    combined = [m for m in methods if m.startswith("lossless, then ")]
    drawn = _Drawing(facts)
    env = environment()
    env.filters |= {"shade": _shade}
    return env.get_template("comparison.html").render(
        f=facts, policy=policy(style, script), style=Markup(style), script=Markup(script), methods=methods, combined=combined,
        accuracy=[(m, drawn.accuracy(m)) for m in methods], deviation=[(m, drawn.deviation(m)) for m in methods],
        pairs=[(m, drawn.accuracy(m), drawn.deviation(m)) for m in combined], tables=tables_of(facts), cards=_cards(facts),
        unchanged=_unchanged(facts), settings=_settings(facts))


class _Drawing:
    """Panels of a comparison, all on the same axes."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts, self.rows = facts, {}
        for row in facts["summary"]:
            self.rows.setdefault(row["method"], []).append(row)
        ratios = facts["study"]["ratios"]
        lossless = facts["lossless"]
        keys = ("deviation_upper", "deviation_lower", "deviation_upper_pruned")
        bounds = [float(r[k]) for r in facts["summary"] for k in keys]
        self.share = share_axes(ratios)
        self.log = deviation_axes(ratios, [*bounds, float(lossless["deviation_upper"])])
        self.trained = bool(facts["study"]["finetune"])

    def accuracy(self, method: str) -> Markup:
        """Accuracy over the ratio, before and after training."""
        lines = [*self._controls(method, lambda r: r["accuracy"]["mean"])]
        rows = self.rows[method]
        if self.trained:
            lines.append(Line("before", numbers(rows, lambda r: r["accuracy_pruned"]["mean"])))
        errors = tuple(r["accuracy"]["std"] for r in rows)
        lines.append(Line("method", numbers(rows, lambda r: r["accuracy"]["mean"]), errors, True))
        said = ", ".join(f"{100 * r['accuracy']['mean']:.1f} % at {r['ratio']:g}x" for r in rows)
        return self._panel(self.share, lines, f"Accuracy of {method}: {said}", "accuracy")

    def deviation(self, method: str) -> Markup:
        """Certified and found deviation over the ratio, with the area between."""
        rows = self.rows[method]
        lower, upper = (numbers(rows, lambda r, k=k: float(r[k])) for k in ("deviation_lower", "deviation_upper"))
        lines = [*self._controls(method, lambda r: float(r["deviation_upper"])), Line("found", lower)]
        if self.trained:
            lines.append(Line("prior", numbers(rows, lambda r: float(r["deviation_upper_pruned"]))))
        lines.append(Line("method", upper, (), True))
        said = ", ".join(f"at most {upward(value) if value else 0} at {ratio:g}x" for ratio, value in upper)
        return self._panel(self.log, lines, f"Deviation of {method} from the original: {said}", "deviation_upper", (lower, upper))

    def _controls(self, method: str, value: Callable[[Summary], float]) -> list[Line]:
        names = [name for name in ("random", "magnitude") if name != method and name in self.rows]
        return [Line(name, numbers(self.rows[name], value)) for name in names]

    def _panel(self, axes: Axes, lines: Sequence[Line], label: str, key: str, band: Any = None) -> Markup:
        lossless, dense = self.facts["lossless"], self.facts["dense"]
        return panel(axes, lines, label, band=band, dense=float(dense[key]),
                     lossless=(lossless["ratio_stored"], float(lossless[key])))


# -- inputs whose class changed --------------------------------------------------------------------------------------------


def _cards(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One card per method and ratio with an example; ``first`` marks the smallest ratio of each method."""
    seen: set[str] = set()
    cards = []
    for s in sorted(facts["summary"], key=lambda s: s["ratio"]):
        if s["row"] is not None:
            cards.append(_card(facts, s) | {"first": s["method"] not in seen})
            seen.add(s["method"])
    order = list(dict.fromkeys(s["method"] for s in facts["summary"]))
    return sorted(cards, key=lambda c: (order.index(c["method"]), c["ratio"]))


def _card(facts: Mapping[str, Any], s: Summary) -> dict[str, Any]:
    row, names = facts["rows"][s["row"]], facts["data"]["classes"]
    example = row["counterexample"]
    before, after = example["original"], example["pruned"]
    shown = _outputs(before, after)
    said = [f"{_name(names, i)}: original {before[i]:.4g}, pruned {after[i]:.4g}" for i in shown]
    best = [max(range(len(v)), key=v.__getitem__) for v in (before, after)]
    label = example["label"]
    where = f"test sample {example['sample']:,}" if example["sample"] is not None else "an input of the domain, found by search"
    truth = f", in truth {_name(names, label)}" if isinstance(label, int) else ""
    drawn = bars([_name(names, i) for i in shown], [before[i] for i in shown], [after[i] for i in shown], "; ".join(said))
    return {"method": s["method"], "ratio": s["ratio"], "seed": row["seed"], "where": where + truth, "bars": drawn,
            "picture": example["picture"], "before": _name(names, best[0]), "after": _name(names, best[1]),
            "confirmed": example["confirmed"], "scores": (f"{before[best[0]]:.4g}", f"{after[best[1]]:.4g}")}


def _outputs(before: Sequence[float], after: Sequence[float]) -> list[int]:
    """All outputs, or where there are many, the largest of either network."""
    if len(before) <= MOST_OUTPUTS:
        return list(range(len(before)))
    top = sorted(range(len(before)), key=lambda i: (-max(before[i], after[i]), i))
    best = [max(range(len(v)), key=v.__getitem__) for v in (before, after)]
    return sorted({*best, *top[:MOST_OUTPUTS - 2]})


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if 0 <= index < len(names) else str(index)


def _unchanged(facts: Mapping[str, Any]) -> list[str]:
    """Methods and ratios without an example."""
    lossless = [] if facts["lossless"]["counterexample"] else ["lossless"]
    return lossless + [f"{s['method']} at {s['ratio']:g}x" for s in facts["summary"] if s["row"] is None]


def _settings(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    study = [(f"Study {name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value))
             for name, value in facts["study"].items() if value not in (None, "", {}, [])]
    return [("Network sha256", facts["model"]["network_sha256"]), ("Data", facts["data"]["name"]),
            ("Data sha256", facts["data"]["sha256"]), *study,
            *[(f"Version {name}", value) for name, value in facts["versions"].items()],
            *[(f"Hardware {name}", str(value)) for name, value in facts["hardware"].items()]]


def _shade(cell: Cell) -> str:
    """Class of a cell whose colour shows a share; a little shows too."""
    value = float(cell.value)
    return f"s{max(1, round(_SHADES * min(value, 1.0)))}" if value > 0 else "s0"
