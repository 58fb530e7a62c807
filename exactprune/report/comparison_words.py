"""A comparison in words and as Markdown: the sentences that the page, comparison.md and comparison.json share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import ASCII_DOUBLE_HEAD, SIMPLE_HEAD
from rich.table import Table

from exactprune.compress.levels import upward
from exactprune.report.comparison_tables import tables_of
from exactprune.report.page_markdown import markdown_table, plain
from exactprune.report.tables import Report


def words_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Headline, sentences, and what is not claimed."""
    sentences = [_lossless(facts), *_extremes(facts), *_combined(facts), *_collapsed(facts), *_failed(facts)]
    return {"headline": _headline(facts), "sentences": sentences, "limits": _limits(facts)}


def _headline(facts: Mapping[str, Any]) -> str:
    lossless, (low, high) = facts["lossless"], facts["study"]["domain"]
    bound = up(lossless["deviation_upper"])
    words = "computes the same outputs as the original" if bound == "0" else \
        f"has no output that differs from the original's by more than {bound}"
    return (f"For every input of the domain (each value from {low:g} to {high:g}), the lossless network {words}. It is "
            f"{lossless['ratio_stored']:.2f} times smaller: {lossless['parameters_stored']:,} of "
            f"{facts['dense']['parameters_stored']:,} parameters.")


def _lossless(facts: Mapping[str, Any]) -> str:
    lossless, dense, count = facts["lossless"], facts["dense"], facts["samples"]
    return (f"Its accuracy is {percent(lossless['accuracy'])} (original: {percent(dense['accuracy'])}). Of {count:,} test "
            f"samples, {round(lossless['changed'] * count):,} changed class; for {percent(lossless['unchangeable'])} of them the "
            "bound proves that the class cannot change.")


def _extremes(facts: Mapping[str, Any]) -> list[str]:
    """The most accurate approximate method at the smallest and at the largest ratio."""
    approximate = [s for s in facts["summary"] if not s["method"].startswith("lossless")]
    ratios = sorted({s["ratio"] for s in approximate})
    return [_best([s for s in approximate if s["ratio"] == ratio], facts) for ratio in dict.fromkeys(ratios[:1] + ratios[-1:])]


def _best(found: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    best = max(found, key=lambda s: s["accuracy"]["mean"])
    trained = f"; {up(best['deviation_upper_pruned'])} before training" if facts["study"]["finetune"] else ""
    return (f"At {best['ratio']:g}x the most accurate of {len(found)} approximate methods is {best['method']}: accuracy "
            f"{both(best['accuracy'])}, {both(best['changed'])} of the test samples changed class. On the domain its outputs "
            f"differ by up to {digits(best['deviation_lower'])} (found) and by no more than {up(best['deviation_upper'])} "
            f"(certified{trained}); the bound keeps the class of {percent(best['unchangeable'])}.")


def _combined(facts: Mapping[str, Any]) -> list[str]:
    combined = [s for s in facts["summary"] if s["method"].startswith("lossless, then ")]
    alone = {(s["method"], s["ratio"]): s for s in facts["summary"]}
    pairs = [(s, alone.get((s["method"].removeprefix("lossless, then "), s["ratio"]))) for s in combined]
    better = [f"{s['ratio']:g}x ({100 * (s['accuracy']['mean'] - a['accuracy']['mean']):+.2f})" for s, a in pairs
              if a is not None]
    if not better:
        return []
    names = ", ".join(dict.fromkeys(s["method"].removeprefix("lossless, then ") for s in combined))
    return [f"Lossless first and {names} afterwards, at the same number of weights, against {names} alone: accuracy in "
            f"percentage points at {', '.join(better)}."]


def _collapsed(facts: Mapping[str, Any]) -> list[str]:
    found = [f"{s['method']} at {s['ratio']:g}x ({', '.join(s['collapsed_layers'])}; {s['collapsed']} of {s['seeds']} runs)"
             for s in facts["summary"] if s["collapsed"]]
    found += [f"{s['method']} at {s['ratio']:g}x (one class, {s['constant']} of {s['seeds']} runs)"
              for s in facts["summary"] if s["constant"]]
    if not found:
        return []
    return [f"Collapsed (nothing is left of a layer, or every test sample gets one class): {'; '.join(found)}."]


def _failed(facts: Mapping[str, Any]) -> list[str]:
    reasons = dict.fromkeys((row["method"], row["failed"]) for row in facts["failed"])
    return [f"Not shown, {method} could not do it: {reason}." for method, reason in reasons]


def _limits(facts: Mapping[str, Any]) -> list[str]:
    return ["Nothing is said about inputs outside the domain.",
            "Certified is proved for the networks as real functions of their stored weights, and may be larger than what can "
            "happen; found was attained, and more may be possible.",
            "Accuracy, changed classes and times are measured, on these samples and this machine.",
            "A mask makes nothing smaller by itself: a masked network stores and multiplies its zeros, unless it is stored and "
            "run as a sparse one."]


def comparison_markdown(facts: Mapping[str, Any]) -> str:
    """The comparison as a page of Markdown."""
    words, study = facts["words"], facts["study"]
    head = [f"# Lossless against approximate: {plain(facts['title'])}", "", f"**{plain(words['headline'])}**", "",
            *[f"- {plain(s)}" for s in words["sentences"]], "", "Not claimed:", "", *[f"- {plain(s)}" for s in words["limits"]]]
    parts = ["\n".join(head)]
    for table in tables_of(facts):
        rows = [[cell.text for cell in row.cells] for row in table.rows]
        notes = "\n".join(f"- {plain(note)}" for note in table.notes)
        parts.append(f"## {table.title}\n\n{notes}\n\n{markdown_table([c.label for c in table.columns], rows)}")
    settings = [["command", facts["command"]], ["model sha256", facts["model"]["network_sha256"]],
                ["data", f"{facts['data']['name']}, sha256 {facts['data']['sha256']}"],
                *[[name, str(value)] for name, value in study.items() if value not in (None, "", {}, [])],
                *[[f"version {name}", value] for name, value in facts["versions"].items()],
                *[[f"hardware {name}", str(value)] for name, value in facts["hardware"].items()]]
    parts.append("## Repeat\n\n" + markdown_table(["what", "value"], settings, 2))
    return "\n\n".join(parts) + "\n"


def comparison_summary(facts: Mapping[str, Any]) -> Report:
    """What the command line prints: the sentences, and what changes at every ratio."""
    words, table = facts["words"], tables_of(facts)[0]
    shown = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else ASCII_DOUBLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(table.columns):
        side, width = "right" if column.numeric else "left", max(len(row.cells[i].text) for row in table.rows)
        shown.add_column(column.label.lower(), justify=side, min_width=width, overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.text for cell in row.cells))
    return [words["headline"], *words["sentences"], "", shown, ""]


# -- numbers -------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.2f} %"


def both(spread: Mapping[str, float]) -> str:
    """Mean and standard deviation of a share."""
    return f"{100 * spread['mean']:.2f} ± {100 * spread['std']:.2f} %"


def up(value: float | str) -> str:
    """A certified bound, rounded up."""
    return upward(float(value)) if float(value) else "0"


def digits(value: float | str) -> str:
    """Something attained."""
    return f"{float(value):.3g}"
