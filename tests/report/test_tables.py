from __future__ import annotations

import pytest

from exactprune.report.markdown import run_markdown, table
from exactprune.report.record import summarise
from exactprune.report.tables import rendered, size_words, verify_report


@pytest.fixture
def summary(verification):
    return summarise(verification, None, 12345)


def rows(text, start):
    """Lines of the table whose header begins with ``start``, each split into cells."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip("| ").startswith(start))
    found = []
    for line in lines[first:]:
        if not line.strip():
            break
        found.append([cell.strip() for cell in line.strip("| ").split("|")])
    return found


def test_piped_output_is_plain_and_complete(summary):
    text = rendered(verify_report(summary, "tiny.exactprune"))
    assert text.isprintable() or text.replace("\n", "").isprintable()
    assert all(line == line.rstrip() for line in text.splitlines())
    layers = rows(text, "layer")
    assert layers[0] == ["layer", "node", "neurons", "inactive", "active", "unstable", "unknown", "seconds"]
    assert layers[2] == ["0", "relu1", "8", "2", "2", "3", "1", "0.75"]
    assert layers[-1] == ["all", "", "11", "3", "3", "4", "1", "1.25"]
    assert ["interval", "1.25", "5", "2 times"] in rows(text, "stage")
    assert ["input-split", "1", "0", "1"] in rows(text, "settled by")
    assert "3 neurons are stably inactive (pre-activation never above 0)," in text
    assert "1 neuron is unknown" in text and "accepted 10 verdicts and rejected 0" in text
    assert "tiny.exactprune (2 certificate records, 12.3 kB)" in text


def test_markdown_holds_the_same_numbers(summary):
    text = run_markdown(summary)
    assert rows(text, "layer")[-1] == ["all", "", "11", "3", "3", "4", "1"]
    assert ["input-split", "1", "0", "1"] in rows(text, "settled by")
    assert "11 ReLU neurons, 3 are stably inactive, 3 stably active, 4 unstable, 1 unknown" in text


def test_markdown_cells_cannot_break_the_table():
    assert table(["a", "b"], [["x|y", "<b>\n"]], left=2).splitlines()[-1] == r"| x\|y | &lt;b>  |"


@pytest.mark.parametrize(("count", "words"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3.2e6, "3.2 MB"), (5e10, "50.0 GB")])
def test_sizes_in_words(count, words):
    assert size_words(count) == words
