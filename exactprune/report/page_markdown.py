"""report.md: the facts of a report as GitHub-flavoured Markdown, to read, or to paste into an issue or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from exactprune.report.tables import size_words

_STATUSES = ("inactive", "active", "unstable", "unknown")
_SPECIAL = re.compile(r"([\\`*_\[\]|~#!])")


def report_markdown(facts: Mapping[str, Any]) -> str:
    """The page as Markdown; bounds of single neurons are in neurons.csv and report.json.

    Args:
        facts: of ``page.facts_of``.
    """
    parts = (_title, _sizes, _overview, _layers, _curve, _effort, _commands, _setting)
    return "\n\n".join(text for part in parts if (text := part(facts))) + "\n"


def plain(text: object) -> str:
    """A text that Markdown shows as it is: no markup, no HTML, no links."""
    return _SPECIAL.sub(r"\\\1", str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _title(facts: Mapping[str, Any]) -> str:
    c = facts["claim"]
    lines = [f"- {plain(s)}" for s in c["sentences"]]
    limits = [f"- {plain(s)}" for s in c["limits"]]
    return "\n".join([f"# {plain(facts['title'])}", "", f"**{plain(c['headline'])}**", "", *lines, "",
                      "Not claimed:", "", *limits])


def _sizes(facts: Mapping[str, Any]) -> str:
    c = facts["compression"]
    if c is None:
        return ""
    rows = [[name, f"{s['before']:,}", f"{s['after']:,}"] for name, s in c["sizes"].items()]
    rows += [[f"latency, batch {t['batch']} (measured)", f"{1e6 * t['before']:,.0f} us", f"{1e6 * t['after']:,.0f} us"]
             for t in c["latency"]]
    steps = "\n".join(f"{i}. {plain(s['text'])} ({plain(s['level'])})" for i, s in enumerate(c["rewrites"], 1))
    text = f"## Before and after\n\n{markdown_table(['quantity', 'before', 'after'], rows)}"
    return f"{text}\n\nRewrites:\n\n{steps}" if steps else text


def _overview(facts: Mapping[str, Any]) -> str:
    removed = [] if facts["compression"] is None else ["removed", "new", "left"]
    rows = [[str(la["layer"]), la["node"], *(la[c] for c in ("neurons", *_STATUSES, *removed))] for la in facts["layers"]]
    return "## Layers\n\n" + markdown_table(["layer", "node", "neurons", *_STATUSES, *removed], rows, 2)


def _layers(facts: Mapping[str, Any]) -> str:
    return "\n\n".join(_layer(layer, facts["kinds"]) for layer in facts["layers"])


def _layer(layer: Mapping[str, Any], kinds: Any) -> str:
    rows = []
    for group in layer["groups"]:
        kind = kinds[group["kind"]]
        rows.append([kind["status"], kind["fate"], group["neurons"], group["where"], kind["proof"], kind["why"]])
    text = f"### Layer {layer['layer']}: {plain(layer['node'])}\n\n"
    text += markdown_table(["status", "fate", "neurons", "which", "how it is proved", "why"], rows, 6)
    if layer["reasons"]:
        text += "\n\nWhy unknown:\n\n" + "\n".join(f"- neuron {i}: {plain(r)}" for i, r in layer["reasons"].items())
    return text


def _curve(facts: Mapping[str, Any]) -> str:
    if not facts["curve"]:
        return ""
    rows = [[r["allowed"], r["certified"], r["neurons"], r["parameters"]] for r in facts["curve"]]
    columns = ["allowed", "certified deviation", "neurons left", "parameters left"]
    return "## What could go at which deviation\n\n" + markdown_table(columns, rows)


def _effort(facts: Mapping[str, Any]) -> str:
    rows = [[s["name"], "; ".join(s["details"][:3]), f"{float(s['seconds']):.2f}", s["settled"]] for s in facts["stages"]]
    rows.append(["whole run", "", f"{float(facts['seconds']):.2f}", facts["totals"]["neurons"] - facts["totals"]["unknown"]])
    c = facts["certificate"]
    text = f"`{c['file']}`: {c['records']:,} records, {size_words(c['bytes'])}."
    if c["checked"]:
        text += (f" The independent checker accepted {c['checked']['accepted']:,} verdicts and rejected "
                 f"{c['checked']['rejected']:,} in {float(c['checked']['seconds']):.2f} s.")
    return "## Effort\n\n" + markdown_table(["stage", "detail", "seconds", "settled"], rows, 2) + "\n\n" + text


def _commands(facts: Mapping[str, Any]) -> str:
    c = facts["commands"]
    lines = [f"    {c[name]}" for name in ("repeat", "check", "check_both", "report") if c[name]]
    return "\n".join(["## Repeat and check", "", *lines, *(f"\n{plain(note)}" for note in c["notes"])])


def _setting(facts: Mapping[str, Any]) -> str:
    rows = [["network sha256", facts["model"]["network_sha256"]], ["domain sha256", facts["domain"]["sha256"]]]
    for part, word in (("options", "option"), ("versions", "version"), ("hardware", "hardware")):
        rows += [[f"{word} {name}", str(value)] for name, value in facts[part].items()]
    return "## Setting\n\n" + markdown_table(["what", "value"], rows, 2)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """The first ``left`` columns are aligned left, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    lines = [columns, rule, *([f"{v:,}" if isinstance(v, int) else plain(v) for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
