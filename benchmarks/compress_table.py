"""What compression removes, at which certified deviation, next to the published rules on the same verdicts.

    python benchmarks/compress_table.py                                   # every network that is there
    python benchmarks/compress_table.py --only fashion_2x800,cartpole
    python benchmarks/compress_table.py --latency                         # latencies again, nothing else (under a minute)

For every network in models/ and in the shared folder over its own domain: neurons, parameters, multiply-accumulates and
latency before and after at ``exact``, ``rounding``, 1e-4 and 1e-2; the certified eps next to the largest abs(f - g)
that a gradient search finds; what the rules of the 2021 paper leave on the same verdicts; test accuracy before and
after. One process, one thread. Written to ``reports/compress/`` after every network; a network that is there already
and was not asked for stays, so that the table can be made in parts. Verdicts are kept in the temporary folder.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import json
import time
from typing import Any

import _compress_cases as inputs
import numpy as np
from _compress_cases import ROOT, Case
from _paper_rules import by_the_paper

from exactprune.claim import Status
from exactprune.compress import compress_network
from exactprune.compress.budget import largest_output
from exactprune.compress.measure import compare, latency, search_deviation
from exactprune.domain import Box
from exactprune.io.npz import load_npz, save_npz
from exactprune.network import Network

OUT = ROOT / "reports" / "compress"
BUDGETS: tuple[str | float, ...] = ("exact", "rounding", 1e-4, 1e-2)
Row = dict[str, Any]
WHY_LOOSE = (
    "Above 100, or nothing found: {}. Few inputs allow splitting the domain (rule `joint`); with many, a deviation behind the "
    "first layer is carried to the output as absolute values through all layers behind it.")
WHY_FEWER = (
    "Where ours removes fewer ({}), the paper's result is not within `rounding`: at an input that was found it differs from the "
    "original by more than that (**bold**, evaluated in rationals), and the paper does not say by how much. The last "
    "column says from which budget on ours removes as much.")
WHY_SLOW = (
    "Where the gain stays behind the multiply-accumulates: a call of a small network is its fixed cost, 5 to 10 "
    "microseconds an operator at any size, which removing neurons does not change; what can be saved is the part above "
    "that. A 3x3 convolution with 1 to 8 channels was measured to take time in proportion to the channels, not to their "
    "square, so convolutional networks gain less than their multiply-accumulates say. Made "
    "on a shared, busy machine: calls of milliseconds vary severalfold between runs, either way.")


def sizes(network: Network) -> Row:
    return {"neurons": network.neurons, "parameters": network.parameters, "macs": network.macs}


def one_budget(case: Case, f: Network, box: Box, layers: Any, budget: str | float, data: Any, answers: Any) -> Row:
    wall, cpu = time.perf_counter(), time.process_time()
    rewrite = compress_network(f, box, layers, max_deviation=budget)
    g, spent = rewrite.network, (time.perf_counter() - wall, time.process_time() - cpu)
    changed = g.sha256 != f.sha256
    found = search_deviation(f, g, box) if changed else None
    seen = compare(f, g, box, points=200, corners=200)
    row = {"budget": str(budget), "allowed": rewrite.budget, "level": str(rewrite.level), "eps": rewrite.eps,
           **sizes(g), "found": found.deviation if found else 0.0, "measured float32": seen.largest,
           "f against itself": seen.itself, "seconds": spent[0], "cpu": spent[1],
           "rules": rules_of(rewrite), "times": times(f, g) if changed else {}}
    if budget == "rounding":
        inputs.CACHE.mkdir(parents=True, exist_ok=True)
        save_npz(g, inputs.CACHE / f"{case.name}.npz")
    row["ratio"] = rewrite.eps / row["found"] if row["found"] > 0 else None
    if data is not None:
        share, after = inputs.accuracy(g, data)
        row |= {"accuracy": share, "other answers": int((after != answers).sum())}
    return row


def rules_of(rewrite: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for removal in rewrite.removals:
        counts[removal.rule] = counts.get(removal.rule, 0) + removal.neurons
    return counts


def times(f: Network, g: Network) -> dict[str, list[float]]:
    return {str(t.batch): [t.before, t.after] for t in latency(f, g)}


def paper(f: Network, box: Box, layers: Any, rank: type) -> Row:
    g, real = by_the_paper(f, layers, rank)
    return {**sizes(g), "real": real, "found": search_deviation(f, g, box).deviation if real else None,
            "measured float32": compare(f, g, box, points=200, corners=200).largest if real else None}


def one_network(case: Case, limit: float) -> Row:
    f, box = case.load()
    known, data = inputs.verdicts(case, f, box, limit), inputs.samples(case, f, box)
    share, answers = inputs.accuracy(f, data) if data is not None else (None, None)
    return {"name": case.name, "domain": box.source if case.vnnlib is None else case.vnnlib.name, "l1": case.l1,
            "network_sha256": f.sha256, "verdicts": known.totals, "verify seconds": known.seconds, "verify cpu": known.cpu,
            "layers": layers_of(known.layers), "largest output": largest_output(f, box)[0], "before": sizes(f),
            "accuracy": share, "samples": 0 if data is None else len(data[1]), "paper": paper(f, box, known.layers, np.float64),
            "paper, generous": paper(f, box, known.layers, np.float32),
            "budgets": [one_budget(case, f, box, known.layers, b, data, answers) for b in BUDGETS]}


def layers_of(layers: Any) -> list[Row]:
    return [{s.word: v.count(s) for s in Status} for v in layers]


# -- files -----------------------------------------------------------------------------------------------------------


def write(rows: dict[str, Row]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    table = [rows[name] for name in sorted(rows)]
    (OUT / "table.json").write_text(json.dumps(table, indent=1, default=float) + "\n")
    flat = [flattened(row, b) for row in table for b in row["budgets"]]
    with (OUT / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    (OUT / "table.md").write_text(markdown(table))


def flattened(row: Row, b: Row) -> Row:
    before, ratio = row["before"], b["ratio"]
    pairs = {f"{key} {when}": side[key] for key in ("neurons", "parameters", "macs")
             for when, side in (("before", before), ("after", b), ("by the paper", row["paper"]))}
    speed = {f"us batch {n} {when}": 1e6 * b["times"][n][i] if n in b["times"] else None
             for n in ("1", "64") for i, when in enumerate(("before", "after"))}
    return {"network": row["name"], "domain": row["domain"], "l1": row["l1"], "budget": b["budget"], "level": b["level"],
            "allowed": b["allowed"], "eps": b["eps"], "found": b["found"], "ratio": ratio, **pairs, **speed,
            "accuracy before": row["accuracy"], "accuracy after": b.get("accuracy"),
            "other answers": b.get("other answers"), "cpu seconds": b["cpu"]}


def markdown(table: list[Row]) -> str:
    lines = ["# Compression: what goes, at which certified deviation", "",
             "Made by `python benchmarks/compress_table.py`; numbers in full in `table.json` and `table.csv`.", "",
             *size_lines(table), "", *gap_lines(table), "", *paper_lines(table), "", *speed_lines(table), "",
             *accuracy_lines(table)]
    return "\n".join(lines) + "\n"


def size_lines(table: list[Row]) -> list[str]:
    head = ["## Sizes", "",
            "Neurons / parameters left. Every claim is about the whole domain; `exact` is identity in rationals.", "",
            "| network | domain | before | exact | rounding | 1e-4 | 1e-2 | paper's rules |", "|---|---|---|---|---|---|---|---|"]
    return head + [f"| {r['name']} | {r['domain']} | {size(r['before'])} | " + " | ".join(size(b) for b in r["budgets"])
                   + f" | {size(r['paper'])}{'' if r['paper']['real'] else ' *'} |" for r in table] + [
        "", "\\* not a chain of affine layers: sizes by the paper's rules read for channels."]


def size(row: Row) -> str:
    return f"{row['neurons']:,} / {row['parameters']:,}"


def gap_lines(table: list[Row]) -> list[str]:
    head = ["## Certified and found", "",
            "eps certified, the largest abs(f - g) that a gradient search found (small networks: in rationals at that input; "
            "else float64 less its error), and their ratio.", "",
            "| network | rounding | 1e-4 | 1e-2 |", "|---|---|---|---|"]
    rows = [f"| {r['name']} | " + " | ".join(gap(b) for b in r["budgets"][1:]) + " |" for r in table]
    loose = [r["name"] for r in table if any(b["eps"] and (not b["found"] or b["ratio"] > 100) for b in r["budgets"])]
    return head + rows + (["", WHY_LOOSE.format(", ".join(loose))] if loose else [])


def gap(b: Row) -> str:
    if not b["eps"]:
        return "exact"
    ratio = f"{b['ratio']:.1f}" if b["ratio"] else "-"
    return f"{b['eps']:.3g} / {b['found']:.3g} = {ratio}"


def paper_lines(table: list[Row]) -> list[str]:
    head = ["## Against the rules of the 2021 paper, on the same verdicts", "",
            "Neurons / parameters removed; ours at `rounding`. The paper decides rank in floating point and certifies nothing: "
            "`paper` with the tolerance of the authors' code (float64), `generous` with that of float32, where rows that are "
            "dependent up to about 1e-4 count. Then the largest abs(f - g) found for each result (paper, generous, ours) by the "
            "same search, and the budget `rounding`, which ours keeps: **bold** where a result exceeds it. - where there are no "
            "weights to run (no chain), or where the row was made before this search.", "",
            "| network | L1 | paper | generous | ours | against paper | against generous | found: paper / generous / ours | "
            "rounding is | never fewer from |", "|---|---|---|---|---|---|---|---|---|---|"]
    fewer = [r["name"] for r in table if verdict(removed(r, r["paper"]), removed(r, r["budgets"][1])) == "FEWER"]
    return head + [paper_line(r) for r in table] + (["", WHY_FEWER.format(", ".join(fewer))] if fewer else [])


def removed(r: Row, side: Row) -> list[int]:
    return [r["before"][k] - side[k] for k in ("neurons", "parameters")]


def paper_line(r: Row) -> str:
    sides, allowed = (r["paper"], r["paper, generous"], r["budgets"][1]), r["budgets"][1]["allowed"]
    gone = [removed(r, side) for side in sides]
    seen = " / ".join(_found(s.get("found"), allowed) for s in sides)
    return (f"| {r['name']} | {'yes' if r['l1'] else ''} | " + " | ".join(f"{a:,} / {b:,}" for a, b in gone)
            + f" | {verdict(gone[0], gone[2])} | {verdict(gone[1], gone[2])} | {seen} | {allowed:.1e} | {reached(r)} |")


def _found(value: float | None, allowed: float) -> str:
    if value is None:
        return "-"
    return f"**{value:.1e}**" if value > allowed else f"{value:.1e}"


def reached(r: Row) -> str:
    """The smallest budget at which ours removes at least as much as the generous reading."""
    theirs = r["paper, generous"]
    enough = (b for b in r["budgets"] if b["neurons"] <= theirs["neurons"] and b["parameters"] <= theirs["parameters"])
    return next((b["budget"] for b in enough), "-")


def verdict(theirs: list[int], ours: list[int]) -> str:
    if any(b < a for a, b in zip(theirs, ours, strict=True)):
        return "FEWER"
    return "strictly more" if all(b > a for a, b in zip(theirs, ours, strict=True)) else "as many"


def speed_lines(table: list[Row]) -> list[str]:
    head = ["## Latency", "", "Median of 30 calls in torch, one thread, f and g alternating, at `rounding`: times faster "
            "(microseconds before -> after), next to what the multiply-accumulates say.", "",
            WHY_SLOW, "", "| network | MACs: fewer by | batch 1 | batch 64 |", "|---|---|---|---|"]
    rows = [(r, r["budgets"][1]) for r in table if r["budgets"][1]["times"]]
    return head + [f"| {r['name']} | {r['before']['macs'] / max(b['macs'], 1):.2f}x | {speed(b, '1')} | {speed(b, '64')} |"
                   for r, b in rows]


def speed(b: Row, batch: str) -> str:
    before, after = (1e6 * t for t in b["times"][batch])
    return f"{before / after:.2f}x ({before:,.0f} -> {after:,.0f})"


def accuracy_lines(table: list[Row]) -> list[str]:
    head = ["## Accuracy", "",
            "On test inputs that lie in the domain, before and after; in brackets how many answers differ.", "",
            "| network | inputs | before | exact | rounding | 1e-4 | 1e-2 |", "|---|---|---|---|---|---|---|"]
    return head + [f"| {r['name']} | {r['samples']:,} | {r['accuracy']:.2%} | "
                   + " | ".join(f"{b['accuracy']:.2%} ({b['other answers']})" for b in r["budgets"]) + " |"
                   for r in table if r["samples"]]


def again(rows: dict[str, Row], cases: list[Case]) -> None:
    """The latencies at ``rounding`` once more, of the networks that were kept when the table was made."""
    for case in cases:
        kept = inputs.CACHE / f"{case.name}.npz"
        row = rows.get(case.name)
        if row is None or not kept.exists():
            print(f"{case.name}: no network kept, make its row first", flush=True)
            continue
        f, g = case.load()[0], load_npz(kept)
        row["budgets"][1]["times"] = times(f, g) if g.sha256 != f.sha256 else {}
        print(f"{case.name}: " + ", ".join(f"batch {n}: {speed(row['budgets'][1], n)}" for n in row["budgets"][1]["times"]),
              flush=True)
        write(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, comma separated")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for the exact stage of verify")
    parser.add_argument("--latency", action="store_true", help="measure only the latencies of the networks in the table again")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    file = OUT / "table.json"
    rows: dict[str, Row] = {r["name"]: r for r in json.loads(file.read_text())} if file.exists() else {}
    if given.latency:
        again(rows, inputs.chosen(given.only, inputs.cases()))
        return
    for case in inputs.chosen(given.only, inputs.cases()):
        rows[case.name] = row = one_network(case, given.limit)
        write(rows)
        ours = row["budgets"][1]
        print(f"{case.name}: {size(row['before'])} -> {size(ours)} at rounding, paper {size(row['paper'])}; "
              f"{gap(ours)}; {ours['cpu']:.1f} s cpu", flush=True)


if __name__ == "__main__":
    main()
