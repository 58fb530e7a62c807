"""Tables and sentences for a terminal, through rich; plain text when piped."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from exactprune.claim import Method

PIPE_WIDTH = 140
_COUNTS = ("neurons", "inactive", "active", "unstable", "unknown")


def console(quiet: bool = False) -> Console:
    """A console on stdout: colours and the terminal's width on a terminal, plain and wide when piped."""
    tty = sys.stdout.isatty()
    width = None if tty or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(width=width, quiet=quiet, highlight=False, markup=False, emoji=False)


def verify_report(summary: Mapping[str, Any], folder: str | None) -> RenderableType:
    """What ``verify`` prints: model, domain, a table of layers, one of stages, the claim in words, the run folder."""
    return Group(*map(Text, _heading(summary)), layer_table(summary), stage_table(summary),
                 *(Text(line) for line in verify_words(summary, folder)))


def layer_table(summary: Mapping[str, Any]) -> Table:
    """One row a ReLU layer, and the totals."""
    table = _table(("layer", "left"), ("node", "left"), *((name, "right") for name in _COUNTS), ("settled by", "left"))
    for layer in summary["layers"]:
        table.add_row(str(layer["layer"]), layer["node"], *(_int(layer[c]) for c in _COUNTS), _pairs(layer["methods"]))
    table.add_section()
    table.add_row("all", "", *(_int(summary["totals"][c]) for c in _COUNTS), _pairs(_total_methods(summary)))
    return table


def stage_table(summary: Mapping[str, Any]) -> Table:
    """One row a stage: seconds, neurons settled, details."""
    table = _table(("stage", "left"), ("seconds", "right"), ("settled", "right"), ("detail", "left"))
    for stage in summary["stages"]:
        table.add_row(stage["name"], f"{stage['seconds']:.2f}", _int(stage["settled"]), stage["detail"])
    table.add_section()
    table.add_row("whole run", f"{summary['seconds']:.2f}", "", "")
    return table


def verify_words(summary: Mapping[str, Any], folder: str | None) -> list[str]:
    """The claim, what is open, and where the evidence is."""
    totals, where = summary["totals"], summary["domain"]["source"]
    lines = [f"Claim: for every input of the domain ({where}), as a real function of the stored weights, "
             f"{_neurons(totals['inactive'])} stably inactive (pre-activation never > 0), {totals['active']:,} stably "
             f"active (never < 0); {totals['unstable']:,} are unstable: inputs with both signs are recorded."]
    if totals["unknown"]:
        lines.append(f"Unknown: {totals['unknown']:,}; each has its reason in neurons.csv, and none is ever removed.")
    checked = summary["certificate"]["checked"]
    if checked:
        lines.append(f"Checked: the independent checker accepted {checked['accepted']:,} verdicts and rejected "
                     f"{checked['rejected']:,} in {checked['seconds']:.2f} s.")
    if folder:
        lines.append(f"Run folder: {folder} ({summary['certificate']['records']:,} certificate records, "
                     f"{size_words(summary['certificate']['bytes'])})")
        if summary["model"]["path"]:
            lines.append(f"Check it:   exactprune check {summary['model']['path']} {folder}")
    return lines


def before_after_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """Rows (quantity, before, after, change)."""
    table = _table(("", "left"), ("before", "right"), ("after", "right"), ("change", "right"))
    for row in rows:
        table.add_row(*row)
    return table


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


def _table(*columns: tuple[str, str]) -> Table:
    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII_DOUBLE_HEAD
    table = Table(box=style, pad_edge=False, show_edge=False)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _total_methods(summary: Mapping[str, Any]) -> dict[str, int]:
    names = [m.word for m in Method]
    total = {name: sum(layer["methods"].get(name, 0) for layer in summary["layers"]) for name in names}
    return {name: count for name, count in total.items() if count}


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _int(value: int) -> str:
    return f"{value:,}"


def _neurons(count: int) -> str:
    return f"{count:,} neuron is" if count == 1 else f"{count:,} neurons are"
