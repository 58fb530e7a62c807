"""report.md: the run as a page to read, to paste into an issue or a pull request. Made from run.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from exactprune.report.tables import size_words, stages_by_kind, total_methods

_COUNTS = ("neurons", "inactive", "active", "unstable", "unknown")


def run_markdown(summary: Mapping[str, Any]) -> str:
    """GitHub-flavoured Markdown of a run.

    Args:
        summary: what run.json holds.
    """
    parts = (_title, _layers, _methods, _stages, _evidence, _setting)
    return "\n\n".join(part(summary) for part in parts) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the others numbers, aligned right."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    lines = [columns, rule, *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _title(summary: Mapping[str, Any]) -> str:
    model, totals = summary["model"], summary["totals"]
    name = _cell(model["path"] or model["name"])
    return (f"# {name}\n\nOver the domain *{_cell(summary['domain']['source'])}*, as a real function of the stored "
            f"weights: of {totals['neurons']:,} ReLU neurons, {totals['inactive']:,} are stably inactive, "
            f"{totals['active']:,} stably active, {totals['unstable']:,} unstable, {totals['unknown']:,} unknown.")


def _layers(summary: Mapping[str, Any]) -> str:
    rows = [[str(layer["layer"]), layer["node"], *(layer[c] for c in _COUNTS)] for layer in summary["layers"]]
    return "## Layers\n\n" + table(["layer", "node", *_COUNTS],
                                   [*rows, ["all", "", *(summary["totals"][c] for c in _COUNTS)]], left=2)


def _methods(summary: Mapping[str, Any]) -> str:
    rows = [[name, count, *(layer["methods"].get(name, 0) for layer in summary["layers"])]
            for name, count in total_methods(summary).items()]
    columns = ["settled by", "neurons", *(f"layer {layer['layer']}" for layer in summary["layers"])]
    return "## Methods\n\n" + table(columns, rows)


def _stages(summary: Mapping[str, Any]) -> str:
    rows: list[list[object]] = [[kind, sum(float(s["seconds"]) for s in stages), sum(s["settled"] for s in stages)]
                                for kind, stages in stages_by_kind(summary).items()]
    rows.append(["whole run", summary["seconds"], ""])
    return "## Time\n\n" + table(["stage", "seconds", "settled"], rows)


def _evidence(summary: Mapping[str, Any]) -> str:
    certificate = summary["certificate"]
    text = f"`{certificate['file']}`: {certificate['records']:,} records, {size_words(certificate['bytes'])}."
    checked = certificate["checked"]
    if checked:
        text += (f" The independent checker accepted {checked['accepted']:,} verdicts and rejected "
                 f"{checked['rejected']:,} in {checked['seconds']:.2f} s.")
    return f"## Evidence\n\n{text}"


def _setting(summary: Mapping[str, Any]) -> str:
    rows = [["network sha256", summary["model"]["network_sha256"]], ["domain sha256", summary["domain"]["sha256"]]]
    rows += [[f"option {name}", str(value)] for name, value in summary["options"].items()]
    rows += [[f"version {name}", value] for name, value in summary["versions"].items()]
    rows += [[f"hardware {name}", str(value)] for name, value in summary["hardware"].items()]
    return "## Setting\n\n" + table(["what", "value"], rows, left=2)
