"""What was found, in sentences made of the figures."""

from __future__ import annotations

from collections.abc import Sequence

from _study_cells import Facts
from _study_tables import accepted, compare_rows, digits, many, network_row, summaries


def findings(sweep: Sequence[Facts], networks: Sequence[Facts], compared: Sequence[tuple[str, Facts]]) -> list[str]:
    """Sentences made of the figures."""
    return [*sweep_words(sweep), *network_words([network_row(c) for c in networks if "left out" not in c]),
            *(text for name, facts in compared for text in compare_words(name, facts))]


def sweep_words(rows: Sequence[Facts]) -> list[str]:
    found = summaries(rows)
    plain_rows = [s for s in found if s["l1"] == 0]
    if not rows or not plain_rows:
        return []
    good, checks = accepted(rows)
    most = max(s["parameters removed rounding mean"] for s in plain_rows)
    nothing = "no parameter goes" if most == 0 else f"at most {100 * most:.1f} % of the parameters go"
    words = [f"Without L1 hardly any neuron is stable on the whole unit box, and {nothing}. Exact compression needs training "
             "that prepares for it, as its authors say."]
    for s in plain_rows:
        near = [t for t in found if t["network"] == s["network"] and t["accuracy mean"] >= s["accuracy mean"] - 0.01]
        best = max(near, key=lambda t: t["parameters removed rounding mean"])
        lost = 100 * (s["accuracy mean"] - best["accuracy mean"])
        gone, exactly = (100 * best[f"parameters removed {b} mean"] for b in ("rounding", "exact"))
        words.append(f"{s['network']}, giving up at most one point of accuracy: {gone:.0f} % of the parameters go with L1 "
                     f"{best['l1']:g} ({exactly:.0f} % as exact identities), at {lost:.1f} points less than without L1.")
    words.append(f"{good} of {checks} certificates of the sweep were accepted from the files alone. {undecided(found)}")
    changed = sum(row["other answers rounding"] for row in rows)
    return [*words, f"Compression changed {changed} of {10000 * len(rows):,} answers on test images (measured)."]


def undecided(found: Sequence[Facts]) -> str:
    rows = [f"{s['network']} at L1 {s['l1']:g} ({s['unknown']} neurons in {s['seeds']} network{'s' * (s['seeds'] > 1)})"
            for s in found if s["unknown"]]
    return f"Undecided within the limit: {', '.join(rows)}." if rows else "No neuron stayed undecided."


def network_words(rows: Sequence[Facts]) -> list[str]:
    if not rows:
        return []
    good, checks = accepted(rows)
    none = [row["network"] for row in rows if row["parameters removed rounding"] == 0]
    return [f"Given networks: {good} of {checks} certificates accepted; nothing could be removed from {len(none)} of {len(rows)} "
            f"({', '.join(none) or 'none'}), where no neuron is stable on the domain."]


def compare_words(name: str, facts: Facts) -> list[str]:
    """Lossless, and the best approximate method at the smallest and the largest ratio."""
    rows = compare_rows(name, facts)
    dense, lossless = rows[0], rows[1]
    words = (f"{facts['title']}: lossless is {lossless['ratio']:.2f} times smaller in weights, with accuracy "
             f"{100 * lossless['accuracy']:.2f} % (original {100 * dense['accuracy']:.2f} %) and outputs certified within "
             f"{digits(lossless['certified'])}.")
    for ratio in (min(facts["study"]["ratios"]), max(facts["study"]["ratios"])):
        there = [r for r in rows[2:] if r["ratio"] == ratio]
        if there:
            best = max(there, key=lambda r: r["accuracy"])
            words += (f" At {ratio:g}x the most accurate is {best['method']} ({100 * best['accuracy']:.2f} %): its outputs "
                      f"differ by at least {digits(best['found'])} somewhere in the domain, "
                      f"{100 * best['changed']:.1f} % of the test samples change class.")
    return [words, *closest(facts["title"], rows)]


NEAR = 1e-3


def closest(title: str, rows: Sequence[Facts]) -> list[str]:
    """Which approximate methods are, before any training, certified to be nearly the same function."""
    masked = [r for r in rows[2:] if not r["method"].startswith("lossless")]
    least = min((r["ratio"] for r in masked), default=None)
    near = sorted((r for r in masked if r["ratio"] == least and bound(r) <= NEAR), key=bound)
    if near:
        moved = digits(max(float(r["found"]) for r in near))
        return [f"{title}: without training, the masks of {many(len(near), 'method')} are certified within {NEAR:g} of the "
                f"original at {least:g}x, closest {near[0]['method']} ({digits(bound(near[0]))}): with L1 about that share "
                f"of the weights is nearly 0. An epoch of training then moves an output by {moved} or more."]
    if not masked or min(map(bound, masked)) <= NEAR:
        return []
    return [f"{title}: no approximate method is certified within {NEAR:g} of the original, at any ratio tried."]


def bound(row: Facts) -> float:
    """Certified largest deviation of the masked network before training."""
    return float(row["certified before training"])
