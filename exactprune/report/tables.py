"""Tables and sentences for a terminal, through rich; plain text when piped."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from exactprune.claim import Method

PIPE_WIDTH = 140
_FEW = 6
_LEFT = ("layer", "node", "settled by", "stage", "detail", "quantity", "removed by")
_COUNTS = ("neurons", "inactive", "active", "unstable", "unknown")


Report = list[Table | str]


def rendered(report: Report) -> str:
    """Text for stdout: in colour and at the terminal's width on a terminal; plain, wide and unwrapped when piped."""
    tty = sys.stdout.isatty()
    width = None if tty or "COLUMNS" in os.environ else PIPE_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for item in report:
            console.print(item, soft_wrap=isinstance(item, str) and not tty)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def verify_report(summary: Mapping[str, Any], folder: str | None) -> Report:
    """What ``verify`` prints: model, domain, tables of layers and stages, the claim in words, the run folder."""
    return [*_heading(summary), "", layer_table(summary), "", method_table(summary), "", stage_table(summary), "",
            *verify_words(summary, folder)]


def layer_table(summary: Mapping[str, Any]) -> Table:
    """One row a ReLU layer with its counts and the seconds of the stages that were about it alone, and the totals."""
    table = _table("layer", "node", *_COUNTS, "seconds")
    for layer in summary["layers"]:
        spent = sum(float(s["seconds"]) for s in summary["stages"] if _about(s["name"], layer["node"]))
        table.add_row(str(layer["layer"]), layer["node"], *(_int(layer[c]) for c in _COUNTS), _seconds(spent))
    table.add_section()
    table.add_row("all", "", *(_int(summary["totals"][c]) for c in _COUNTS), _seconds(summary["seconds"]))
    return table


def method_table(summary: Mapping[str, Any]) -> Table:
    """One row a method that settled neurons; one column a layer where there are few."""
    layers = summary["layers"] if len(summary["layers"]) <= _FEW else []
    table = _table("settled by", "neurons", *(f"layer {layer['layer']}" for layer in layers))
    for name, count in total_methods(summary).items():
        table.add_row(name, _int(count), *(_int(layer["methods"].get(name, 0)) for layer in layers))
    return table


def stage_table(summary: Mapping[str, Any]) -> Table:
    """One row a kind of stage, over all layers: seconds, neurons settled; the single stages are in run.json."""
    table = _table("stage", "seconds", "settled", "detail")
    for kind, stages in stages_by_kind(summary).items():
        detail = stages[0]["detail"] if len(stages) == 1 else f"{len(stages)} times"
        spent = sum(float(stage["seconds"]) for stage in stages)
        table.add_row(kind, _seconds(spent), _int(sum(stage["settled"] for stage in stages)), detail)
    table.add_section()
    table.add_row("whole run", _seconds(summary["seconds"]), "", "")
    return table


def stages_by_kind(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Stages grouped by their name without the node that they are about, in order of appearance."""
    nodes, kinds = [layer["node"] for layer in summary["layers"]], {}
    for stage in summary["stages"]:
        node = next((node for node in nodes if _about(stage["name"], node)), "")
        kinds.setdefault(stage["name"].removesuffix(f" {node}"), []).append(stage)
    return kinds


def verify_words(summary: Mapping[str, Any], folder: str | None) -> list[str]:
    """The claim, what is open, and where the evidence is."""
    totals = summary["totals"]
    lines = ["Claim, for every input of the domain and the network as a real function of its stored weights:",
             f"  {_neurons(totals['inactive'])} stably inactive (pre-activation never above 0),",
             f"  {_neurons(totals['active'])} stably active (pre-activation never below 0),",
             f"  {_neurons(totals['unstable'])} unstable (inputs with both signs are recorded)."]
    if totals["unknown"]:
        lines.append(f"  {_neurons(totals['unknown'])} unknown (reasons in neurons.csv; never removed).")
    checked = summary["certificate"]["checked"]
    if checked:
        lines.append(f"Checked: the independent checker accepted {checked['accepted']:,} verdicts and rejected "
                     f"{checked['rejected']:,} in {checked['seconds']:.2f} s.")
    if folder:
        lines.append(f"Run folder: {folder} ({summary['certificate']['records']:,} certificate records, "
                     f"{size_words(summary['certificate']['bytes'])})")
        if summary["model"]["path"]:
            lines.append(f"Check it:   exactprune check {quote(summary['model']['path'])} {quote(folder)}")
    return lines


def check_table(summary: Mapping[str, Any]) -> Table:
    """One row a ReLU layer: claims accepted by kind, rejected, and neurons without a claim."""
    columns = ("neurons", "inactive", "active", "unstable", "rejected", "unknown")
    table = _table("layer", *columns)
    for layer in summary["layers"]:
        table.add_row(str(layer["layer"]), *(_int(layer[c]) for c in columns))
    table.add_section()
    table.add_row("all", *(_int(sum(layer[c] for layer in summary["layers"])) for c in columns))
    return table


def removal_table(summary: Mapping[str, Any]) -> Table:
    """One row a ReLU layer: neurons before, removed, new ones that stand for several, left, and which rules removed."""
    columns = ("neurons", "removed", "new", "left")
    table = _table("layer", "node", *columns, "removed by")
    for layer in summary["removed"]:
        rules = ", ".join(f"{name} {count:,}" for name, count in layer["rules"].items())
        table.add_row(str(layer["layer"]), layer["node"], *(_int(layer[c]) for c in columns), rules)
    return table


def before_after_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """Rows (quantity, before, after, change)."""
    table = _table("quantity", "before", "after", "change")
    for row in rows:
        table.add_row(*row)
    return table


def total_methods(summary: Mapping[str, Any]) -> dict[str, int]:
    """Method -> neurons it settled in all layers, in the order of ``Method``."""
    total = {m.word: sum(layer["methods"].get(m.word, 0) for layer in summary["layers"]) for m in Method}
    return {name: count for name, count in total.items() if count}


def size_words(count: float) -> str:
    """A number of bytes as people write it: 1.2 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _heading(summary: Mapping[str, Any]) -> list[str]:
    model, domain = summary["model"], summary["domain"]
    lines = [f"Model:  {model['path'] or model['name']} ({model['dtype']}, input {model['input_shape']}, "
             f"{summary['totals']['neurons']:,} ReLU neurons)"]
    lines += [f"        {note}" for note in model["notes"]]
    return [*lines, f"Domain: {domain['source']}"]


def _table(*columns: str) -> Table:
    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII_DOUBLE_HEAD
    table = Table(box=style, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    return table


def _about(stage: str, node: str) -> bool:
    """Whether a stage's name says that it is about one node: ``crown relu_1``."""
    return stage.endswith(f" {node}")


def _seconds(value: float | str) -> str:
    return f"{float(value):.2f}"


def _int(value: int) -> str:
    return f"{value:,}"


def _neurons(count: int) -> str:
    return f"{count:,} neuron is" if count == 1 else f"{count:,} neurons are"
