"""The study's tables: each makes a section of the page and writes its CSV file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from _study_cells import BUDGETS, OUT, Facts
from _study_page import HEIGHT, WIDTH, Section, Table, write_csv
from markupsafe import Markup, escape

LEFT, BELOW = 56.0, 44.0


# -- sweep -----------------------------------------------------------------------------------------------------------


def sweep_row(cell: Facts) -> Facts:
    """One network of the sweep as one line."""
    training = cell["settings"]["training"]
    return {"network": cell["settings"]["architecture"], "l1": training["l1"], "seed": training["seed"],
            "accuracy": cell["accuracy"], "train accuracy": cell["training"]["accuracy"], **common(cell),
            "training seconds": cell["training"]["cpu seconds"]}


def common(cell: Facts) -> Facts:
    """What sweep and networks share: verdicts, checks, and what goes at each budget."""
    totals, sizes, budgets = cell["verify"]["totals"], cell["sizes"], {b["budget"]: b for b in cell["budgets"]}
    shares = {word: totals[word] / totals["neurons"] for word in ("inactive", "active")}
    row = {**totals, "parameters": sizes["parameters"], **{f"share {k}": v for k, v in shares.items()},
           "share stable": sum(shares.values()), "verify seconds": cell["verify"]["cpu seconds"],
           "verdicts accepted": cell["check"]["accepted"], "check seconds": cell["check"]["seconds"],
           "certificate bytes": cell["check"]["bytes"]}
    for name, b in budgets.items():
        row |= {f"neurons {name}": b["neurons"], f"parameters {name}": b["parameters"], f"eps {name}": b["eps"],
                f"neurons removed {name}": 1 - b["neurons"] / sizes["neurons"],
                f"parameters removed {name}": 1 - b["parameters"] / sizes["parameters"],
                f"accuracy {name}": b.get("accuracy"), f"other answers {name}": b.get("other answers"),
                f"accepted {name}": b["certificate"]["accepted"]}
    return row


def accepted(rows: Sequence[Facts]) -> tuple[int, int]:
    """Checks that accept (verdicts, and the smaller network at each budget), and checks in all."""
    each = [row[name] for row in rows for name in ("verdicts accepted", *(f"accepted {b}" for b in BUDGETS))]
    return sum(each), len(each)


def summaries(rows: Sequence[Facts]) -> list[Facts]:
    """Mean and standard deviation over seeds for each architecture and L1 weight."""
    groups: dict[tuple[str, float], list[Facts]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["l1"]), []).append(row)
    return [summary(network, l1, found) for (network, l1), found in groups.items()]


MEANS = ("accuracy", "share inactive", "share active", "share stable", "verify seconds",
         *(f"{what} removed {b}" for what in ("neurons", "parameters") for b in BUDGETS))


def summary(network: str, l1: float, rows: Sequence[Facts]) -> Facts:
    good, checks = accepted(rows)
    spread = {f"{name} {kind}": f(values) for name in MEANS for values in [[row[name] for row in rows]]
              for kind, f in (("mean", statistics.fmean), ("std", std))}
    return {"network": network, "l1": l1, "seeds": len(rows), **spread, "unknown": sum(row["unknown"] for row in rows),
            "eps largest": max(row["eps rounding"] for row in rows), "checks accepted": good, "checks": checks,
            "other answers": sum(row["other answers rounding"] for row in rows)}


def std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def sweep_section(rows: Sequence[Facts]) -> Section:
    """The table of the sweep."""
    found = summaries(rows)
    write_csv(OUT / "sweep.csv", rows)
    write_csv(OUT / "sweep_summary.csv", found)
    columns = ["network", "L1", "seeds", "accuracy", "inactive", "active", "unknown", "neurons removed, exact", "rounding",
               "parameters removed, exact", "rounding", "verify [s]", "certificates accepted"]
    table = Table(columns, [[s["network"], f"{s['l1']:g}", str(s["seeds"]), both(s, "accuracy", 2), both(s, "share inactive"),
                             both(s, "share active"), str(s["unknown"]), both(s, "neurons removed exact"),
                             both(s, "neurons removed rounding"), both(s, "parameters removed exact"),
                             both(s, "parameters removed rounding"), f"{s['verify seconds mean']:.2f}",
                             f"{s['checks accepted']} of {s['checks']}"] for s in found], left=1)
    return Section(
        "L1 sweep on Fashion-MNIST",
        ["Each architecture trained with several weights of an L1 term, then verified and compressed on the unit box, the "
         "question of Serra, Yu, Kumar and Ramalingam (NeurIPS 2021). Percent, mean ± standard deviation over seeds. Exact: "
         "f(x) = g(x) for every x of the box. Rounding: a certified difference of at most 2^-20 of the largest output found."],
        table, scatter(found), "Parameters removed (rounding) against test accuracy; one line an architecture, from no L1 (left) "
        "to the largest weight.",
        ["Verify: processor seconds of one thread, certificates included. Certificates: for each network the verdicts, and the "
         "claims about the two smaller networks, each checked from the files alone by the independent checker; verdicts in exact "
         "arithmetic. Unknown: neurons that were not decided within the time limit, over all seeds; they stay in the network."],
        [("sweep.csv", "every run"), ("sweep_summary.csv", "this table in full"), ("sweep/", "one JSON file a run")])


def both(row: Facts, name: str, digits: int = 1) -> str:
    """Mean ± standard deviation in percent; without the latter where there is one seed."""
    mean, deviation = (100 * row[f"{name} {kind}"] for kind in ("mean", "std"))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if row["seeds"] > 1 else f"{mean:.{digits}f}"


def scatter(found: Sequence[Facts]) -> Markup:
    """Lines of (parameters removed, accuracy), one an architecture, with labelled axes."""
    xs = [100 * s["parameters removed rounding mean"] for s in found]
    ys = [100 * s["accuracy mean"] for s in found]
    low, high = int(min(ys)), int(max(ys)) + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 12) * x / 100, 10 + (HEIGHT - BELOW - 10) * (high - y) / (high - low)
    grid = "".join(f'<path class="grid" d="M{n(place(0, y)[0])} {n(place(0, y)[1])}H{n(WIDTH - 12)}"/>'
                   f'<text x="{n(LEFT - 6)}" y="{n(place(0, y)[1] + 4)}" text-anchor="end">{y:g}</text>'
                   for y in range(low, high + 1))
    grid += "".join(f'<text x="{n(place(x, low)[0])}" y="{n(HEIGHT - BELOW + 18)}" text-anchor="middle">{x}</text>'
                    for x in range(0, 101, 20))
    grid += (f'<text x="{n(WIDTH - 12)}" y="{n(HEIGHT - 6)}" text-anchor="end">parameters removed [%]</text>'
             f'<text x="{n(LEFT + 6)}" y="20">test accuracy [%]</text>')
    lines = ""
    for k, name in enumerate(dict.fromkeys(s["network"] for s in found)):
        points = [place(x, y) for s, x, y in zip(found, xs, ys) if s["network"] == name]
        path = "L".join(f"{n(x)} {n(y)}" for x, y in points)
        dots = "".join(f'<circle class="c{k + 1} dot" cx="{n(x)}" cy="{n(y)}" r="4"/>' for x, y in points)
        x, y = points[-1]
        lines += (f'<path class="line c{k + 1}" d="M{path}"/>{dots}<text x="{n(min(x + 8, WIDTH - 50))}" y="{n(y - 8)}">'
                  f"{escape(name)}</text>")
    return Markup(f'<svg viewBox="0 0 {n(WIDTH)} {n(HEIGHT)}" role="img" aria-label="Accuracy against parameters removed">'
                  f"{grid}{lines}</svg>")


def n(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


# -- networks --------------------------------------------------------------------------------------------------------


def networks_section(cells: Sequence[Facts]) -> Section:
    """The table of the networks, and which were left out."""
    present = [cell for cell in cells if "left out" not in cell]
    rows = [network_row(cell) for cell in present]
    gone = [cell for cell in cells if "left out" in cell]
    write_csv(OUT / "networks.csv", [*rows, *({"network": c["name"], "left out": c["left out"]} for c in gone)])
    columns = ["network", "domain", "neurons", "inactive", "active", "unknown", "neurons removed, exact", "rounding",
               "parameters removed, exact", "rounding", "eps certified", "accuracy before", "after", "answers changed",
               "certificates accepted"]
    notes = ["Accuracy is measured on the test samples that lie in the domain (digits: all samples); where none does, there is "
             "none. eps: certified largest difference of any output over the domain, at rounding."]
    if gone:
        notes.append("Left out: " + "; ".join(f"{c['name']} ({c['left out']})" for c in gone) + ".")
    return Section("Given networks, convolutional and residual ones among them",
                   ["The networks of models/ and those that others trained, each on its own domain: the unit box, or the box "
                    "of a VNN-LIB property."],
                   Table(columns, [network_cells_of(row) for row in rows]), notes=notes,
                   links=[("networks.csv", "this table in full"), ("networks/", "one JSON file a network")])


def network_row(cell: Facts) -> Facts:
    return {"network": cell["name"], "domain": cell["domain"], "l1": cell["l1"], "samples": cell["samples"],
            "accuracy": cell["accuracy"], **common(cell)}


def network_cells_of(row: Facts) -> list[str]:
    good, checks = accepted([row])
    return [row["network"], row["domain"], *(f"{row[k]:,}" for k in ("neurons", "inactive", "active", "unknown")),
            *(f"{100 * row[f'{what} removed {b}']:.1f} %" for what in ("neurons", "parameters") for b in BUDGETS),
            f"{row['eps rounding']:.3g}" if row["eps rounding"] else "0", share(row["accuracy"]), share(row["accuracy rounding"]),
            "" if row["accuracy"] is None else f"{row['other answers rounding']} of {row['samples']:,}", f"{good} of {checks}"]


def share(value: float | None) -> str:
    """A share in percent, nothing where there is none."""
    return "" if value is None else f"{100 * value:.2f} %"




# -- comparisons -----------------------------------------------------------------------------------------------------


def compare_sections(found: Sequence[tuple[str, Facts]]) -> list[Section]:
    """One section an experiment; compare.csv has the summaries of all."""
    write_csv(OUT / "compare.csv", [row for name, facts in found for row in compare_rows(name, facts)])
    return [compare_section(name, facts) for name, facts in found]


def compare_rows(name: str, facts: Facts) -> list[Facts]:
    """Dense and lossless, then every method at every ratio, over seeds."""
    flat = [{"experiment": name, "method": r["method"], "ratio": r["weights"] / max(r["weights_kept"], 1), "seeds": 1,
             "accuracy": r["accuracy"], "accuracy std": 0.0, "accuracy pruned": r["accuracy_pruned"], "changed": r["changed"],
             **bounds_of(r)} for r in (facts["dense"], facts["lossless"])]
    return flat + [{"experiment": name, "method": s["method"], "ratio": s["ratio"], "seeds": s["seeds"],
                    "accuracy": s["accuracy"]["mean"], "accuracy std": s["accuracy"]["std"],
                    "accuracy pruned": s["accuracy_pruned"]["mean"], "changed": s["changed"]["mean"], **bounds_of(s),
                    "collapsed": s["collapsed"]} for s in facts["summary"]]


def bounds_of(row: Facts) -> Facts:
    """What is certified and found of the largest deviation, and of classes."""
    names = {"deviation_upper": "certified", "deviation_lower": "found", "deviation_upper_pruned": "certified before training",
             "deviation_lower_pruned": "found before training", "unchangeable": "class cannot change",
             "unchangeable_near": "nor nearby", "parameters_stored": "parameters stored",
             "parameters_nonzero": "parameters non-zero"}
    return {words: row[key] for key, words in names.items()}


def compare_section(name: str, facts: Facts) -> Section:
    """Accuracies at every ratio, and what is certified at the smallest."""
    study, rows = facts["study"], compare_rows(name, facts)
    ratios = [float(r) for r in study["ratios"]]
    least = ratios[0]
    table = [compare_line([r for r in rows if r["method"] == method], ratios, least)
             for method in dict.fromkeys(r["method"] for r in rows)]
    columns = ["method", *(f"accuracy at {r:g}x" for r in ratios), f"certified at {least:g}x, before training", "found",
               "after training", "found", "class cannot change"]
    failed = sorted({f"{row['method']} ({row['failed']})" for row in facts["failed"]})
    notes = ["Accuracy in percent after training with the masks kept, mean ± standard deviation over seeds. Certified: no output "
             "differs from the original's by more, anywhere in the domain; found: attained. Class cannot change: certified share "
             "of the test samples, after training."]
    notes += [f"Refused: {'; '.join(failed)}."] if failed else []
    return Section(f"Lossless against approximate: {facts['title']}",
                   [facts["words"]["headline"], f"{many(len(study['seeds']), 'seed')}, {many(study['finetune'], 'epoch')} of "
                    f"training after pruning, {facts['samples']:,} test samples."],
                   Table(columns, table, left=1), notes=notes,
                   links=[(f"compare/{name}/comparison.html", "everything, with pictures of inputs whose class changes"),
                          (f"compare/{name}/comparison.csv", "every run"), (f"compare/{name}/experiment.toml", "the experiment")])


def many(count: int, word: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def compare_line(rows: Sequence[Facts], ratios: Sequence[float], least: float) -> list[str]:
    """One method; the dense and the lossless network stand for every ratio."""
    one = rows[0]["method"] in ("dense", "lossless")
    at = {r["ratio"]: r for r in rows}
    shown = [accuracy_at(rows[0] if one else at.get(r)) if i == 0 or not one else "" for i, r in enumerate(ratios)]
    first = rows[0] if one else at.get(least)
    if first is None:
        return [rows[0]["method"], *shown, *[""] * 5]
    name = f"lossless ({first['ratio']:.2f}x)" if first["method"] == "lossless" else first["method"]
    return [name, *shown, *(digits(first[k]) for k in ("certified before training", "found before training", "certified",
                                                          "found")), f"{100 * first['class cannot change']:.1f} %"]


def accuracy_at(row: Facts | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['accuracy']:.2f}" + (f" ± {100 * row['accuracy std']:.2f}" if row["seeds"] > 1 else "")


def digits(value: float | str) -> str:
    """Three digits; 0 is exactly 0."""
    return f"{float(value):.3g}"
