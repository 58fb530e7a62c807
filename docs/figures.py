"""Every figure in README.md and docs/ comes from a file under reports/.

    python docs/figures.py --check     # exit 1 where a page and its reports differ, or a measurement has no marker
    python docs/figures.py --write     # put the figures of today's reports into the pages

A page names the file and the place of every measured figure in an HTML comment, which Markdown does not show. FILE is relative to
reports/. A block is replaced as a whole:

    <!-- figures: FILE :: STEP :: STEP ... -->
    (made by this script)
    <!-- /figures -->

    a.md    as it is; table N (the N-th table, from 1), section TITLE (what stands below that heading), between NAME (keeps the
            comments NAME and "end of NAME" around it, for a benchmark that writes there too)
    a.txt   shown as code; lines A-B takes a part of it
    a.csv   a table; columns A, B as Name .1f, C *1000:.0f, ...; where KEY=VALUE; at most N; bullets (the columns of a row
            joined, one bullet a row)
    a.json  the same, of the list of objects at the key given by: at KEY.KEY

A single number stands between <!--= FILE :: PLACE :: STEP ... --> and <!--/-->, where PLACE is

    key.key.0.key                   in a .json file
    [column=value; column<9] name   of the one row of a .csv file, or of a .json file's list of objects at KEY.KEY
                                    (KEY.KEY [...] name); also one/other, !=, ^= (begins with), <=, >, >=, and a
                                    column on the right
    max(name), min, median, mean, sum, count    over the rows that are selected by [...]

and a STEP is a factor (*100), or a Python format (.1f, ",", .3g). Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import csv
import json
import operator
import re
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"
EXEMPT = Path(__file__).with_name("figures.toml")
BLOCK = re.compile(r"(<!-- figures: (?P<what>(?:(?!-->).)*?) -->\n)(?P<now>.*?)(<!-- /figures -->)", re.DOTALL)
INLINE = re.compile(r"(<!--= (?P<what>(?:(?!-->).)*?) -->)(?P<now>.*?)(<!--/-->)", re.DOTALL)
PLACE = re.compile(r"(?P<path>[^\[]*?)\s*(?:\[(?P<where>[^\]]*)\])?\s*(?P<name>[^\[\]]*)")
OVER = re.compile(r"(max|min|median|mean|sum|count)\((.*)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`|<!--.*?-->", re.DOTALL | re.MULTILINE)
UNIT = r"(?:ms|us|ns|s|seconds?|minutes?|[kMG]i?B|GFLOP/s|%|times)"
MEASURED = re.compile(rf"(?<![\w.^-])\d[\d,.]*(?:e[+-]?\d+)?(?:\s?{UNIT}|x)(?![\w^])"
                      r"|(?<=\| )[~<>]?\d[\d,]*(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)(?= \|)")
Row = dict[str, Any]


class FigureError(Exception):
    """A marker that names nothing that is there."""


def pages() -> list[Path]:
    """README.md and the pages of docs/, decisions included."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str, page: str = "") -> str:
    """A page with the figures of today's reports.

    Raises:
        FigureError: a marker names no file, no place in it, or an unknown step.
    """
    def block(found: re.Match[str]) -> str:
        return f"{found[1]}{told(block_of, found['what'], page)}\n{found[4]}"

    def inline(found: re.Match[str]) -> str:
        return f"{found[1]}{told(number_of, found['what'], page)}{found[4]}"

    return INLINE.sub(inline, BLOCK.sub(block, text))


def told(make: Callable[[str], str], what: str, page: str) -> str:
    """``make(what)``, with the page and the marker in front of what goes wrong."""
    try:
        return make(what)
    except (OSError, KeyError, IndexError, ValueError, TypeError, FigureError) as error:
        raise FigureError(f"{page}: {what}: {type(error).__name__} {error}") from None


# -- blocks ----------------------------------------------------------------------------------------------------------


def block_of(what: str) -> str:
    """What stands in a block."""
    name, *steps = split(what)
    file = REPORTS / name
    if file.suffix == ".txt":
        return code(file.read_text(), steps)
    if file.suffix == ".md":
        return part_of(file.read_text(), steps)
    return table(rows_of(file, take(steps, "at ")), steps)


def code(text: str, steps: list[str]) -> str:
    """A text as a fenced block."""
    lines = text.rstrip("\n").split("\n")
    if span := take(steps, "lines "):
        first, last = span.split("-")
        lines = lines[int(first) - 1:int(last)]
    refuse(steps)
    return "\n".join(["```", *lines, "```"])


def part_of(text: str, steps: list[str]) -> str:
    """A Markdown report, or one table or section of it."""
    number, title, comment = take(steps, "table "), take(steps, "section "), take(steps, "between ")
    refuse(steps)
    if number:
        return tables_of(text)[int(number) - 1]
    found = re.search(rf"^#+ {re.escape(title)}\n+(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE) if title else None
    if title and not found:
        raise FigureError(f"no section {title!r}")
    part = found[1].strip() if found else text.rstrip("\n")
    return f"<!-- {comment} -->\n{part}\n<!-- end of {comment} -->" if comment else part


def tables_of(text: str) -> list[str]:
    """Every table of a Markdown text."""
    return [found.strip("\n") for found in re.findall(r"(?:^\|.*(?:\n|\Z))+", text, re.MULTILINE)]


def table(rows: list[Row], steps: list[str]) -> str:
    """Rows as a Markdown table, or as bullets."""
    where = take(steps, "where ")
    rows = [row for row in rows if fits(row, where)]
    most = take(steps, "at most ")
    rows = rows[:int(most)] if most else rows
    named = [column(text) for text in take(steps, "columns ").split(",")] if has(steps, "columns ") else []
    columns = named or [Column(name, name) for name in (rows[0] if rows else {})]
    bullets = "bullets" in steps
    refuse([step for step in steps if step != "bullets"])
    if not rows:
        raise FigureError("no row is left")
    cells = [[column.show(row) for column in columns] for row in rows]
    if bullets:
        return "\n".join("- " + " ".join(filter(None, line)) for line in cells)
    lines = [[column.title for column in columns], ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Column:
    """A column of a table: where its values are, its title, and ``.1f`` or ``*1000:.1f``, a factor with a format."""

    name: str
    title: str
    format: str = ""

    def show(self, row: Row) -> str:
        """The row's value."""
        value = at(row, self.name)
        if value in ("", None) or not self.format:
            return "" if value is None else str(value)
        factor, spec = re.fullmatch(r"(?:\*([\d.e-]+):)?(.*)", self.format).groups()  # type: ignore[union-attr]
        return shown(number(value) * float(factor or 1), spec)


def column(text: str) -> Column:
    """``NAME [as TITLE] [FORMAT]``."""
    found = re.fullmatch(r"\s*(.*?)(?: as (.*?))?(?:\s+((?:\*[\d.e-]+:)?[,.]\S*))?\s*", text)
    assert found is not None
    return Column(found[1], found[2] or found[1], found[3] or "")


# -- numbers ---------------------------------------------------------------------------------------------------------


def number_of(what: str) -> str:
    """What stands between the markers of a single number."""
    name, place, *steps = split(what)
    value = picked(REPORTS / name, place)
    for step in steps:
        value = number(value) * float(step[1:]) if step.startswith("*") else shown(value, step)
    return str(value)


def picked(file: Path, place: str) -> Any:
    """The value at a place of a file."""
    found = PLACE.fullmatch(place)
    assert found is not None
    if found["where"] is None and not OVER.search(place):
        return at(content(file), place)
    path, name = (found["path"], found["name"]) if found["where"] is not None else ("", place)
    rows = [row for row in rows_of(file, path) if fits(row, found["where"] or "")]
    if over := OVER.fullmatch(name):
        values = [number(at(row, over[2])) for row in rows if over[1] != "count" and at(row, over[2]) not in ("", None)]
        return len(rows) if over[1] == "count" else OVERS[over[1]](values)
    if len(rows) != 1:
        raise FigureError(f"{len(rows)} rows are [{found['where']}], not one")
    return at(rows[0], name)


OVERS: dict[str, Callable[[Sequence[float]], float]] = {"max": max, "min": min, "sum": sum, "median": statistics.median,
                                                        "mean": statistics.fmean}


ORDERS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}


def fits(row: Row, where: str) -> bool:
    """Whether a row has the values asked for; ``!=`` asks for others."""
    return all(fit(row, text) for text in filter(None, map(str.strip, where.split(";"))))


def fit(row: Row, text: str) -> bool:
    """Whether a row fits ``key=value``, ``key=one/other``, ``key!=value``, ``key^=prefix``, ``key<number`` or ``key<=key``."""
    name, sign, wanted = (part.strip() for part in re.fullmatch(r"(.*?)(!=|\^=|[<>]=?|=)(.*)", text).groups())  # type: ignore[union-attr]
    value = at(row, name)
    if sign in ORDERS:
        other = row.get(wanted, wanted)
        return value not in ("", None) and ORDERS[sign](number(value), number(other))
    if sign == "^=":
        return str(value).startswith(wanted)
    return (str(value) in wanted.split("/")) == (sign == "=")


def at(value: Any, path: str) -> Any:
    """The value below a path of keys and numbers; a key that holds dots goes before its parts."""
    if not path:
        return value
    if isinstance(value, dict):
        key = next((k for k in sorted(value, key=len, reverse=True) if path == k or path.startswith(k + ".")), None)
        if key is None:
            raise KeyError(f"{path} (there are {', '.join(value)})")
        return at(value[key], path[len(key) + 1:])
    key, _, rest = path.partition(".")
    return at(value[int(key)], rest)


def content(file: Path) -> Any:
    """A file's rows or JSON value."""
    if file.suffix == ".csv":
        with file.open(newline="") as stream:
            return list(csv.DictReader(stream))
    if file.suffix == ".json":
        return json.loads(file.read_text())
    raise FigureError("a .csv or .json file is needed")


def rows_of(file: Path, path: str) -> list[Row]:
    """The list of objects at a path; the values of an object, each with its key as ``key``."""
    found = at(content(file), path)
    return [{"key": key, **value} for key, value in found.items()] if isinstance(found, dict) else found


def number(value: Any) -> float:
    """A value as a number; CSV files hold text."""
    return float(value)


def shown(value: Any, spec: str) -> str:
    """A number in a Python format; ``,`` and ``d`` are for whole ones."""
    return format(int(number(value)) if spec.endswith("d") or spec == "," else number(value), spec)


# -- what has no marker ----------------------------------------------------------------------------------------------


def unmarked(text: str, exempt: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Lines with a number and a unit outside markers and code, and the number."""
    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    for snippet in exempt:
        text = re.sub(r"\s+".join(map(re.escape, snippet.split())), blank, text)
    for pattern in (BLOCK, INLINE, CODE):
        text = pattern.sub(blank, text)
    for i, line in enumerate(text.split("\n"), 1):
        for found in MEASURED.finditer(line):
            yield i, found[0]


def exemptions() -> dict[str, list[str]]:
    """Per page: texts with numbers that were not measured (limits, formulas, what others published)."""
    return tomllib.loads(EXEMPT.read_text()) if EXEMPT.exists() else {}


def split(what: str) -> list[str]:
    """The parts of a marker."""
    return [part.strip() for part in what.split("::")]


def has(steps: list[str], name: str) -> bool:
    """Whether a step of that name is there."""
    return any(step.startswith(name) for step in steps)


def take(steps: list[str], name: str) -> str:
    """What stands behind ``name`` in the steps; that step is taken away."""
    found = next((step for step in steps if step.startswith(name) and not (name == "at " and step.startswith("at most "))), None)
    if found is None:
        return ""
    steps.remove(found)
    return found.removeprefix(name).strip()


def refuse(steps: list[str]) -> None:
    """No step may be left that nothing understood."""
    if steps:
        raise FigureError(f"unknown step {steps[0]!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say where pages and reports differ; the default")
    parser.add_argument("--write", action="store_true", help="put today's figures into the pages")
    given, wrong, exempt = parser.parse_args(arguments), 0, exemptions()
    for page in pages():
        name, text = page.relative_to(ROOT).as_posix(), page.read_text()
        try:
            new = rendered(text, name)
        except FigureError as error:
            print(error)
            wrong += 1
            continue
        if new != text and given.write:
            page.write_text(new)
            print(f"{name}: written")
        elif new != text:
            line = next(i for i, (a, b) in enumerate(zip(text.split("\n"), [*new.split("\n"), ""]), 1) if a != b)
            print(f"{name}:{line}: differs from its reports; run: python docs/figures.py --write")
            wrong += 1
        for line, found in unmarked(new, exempt.get(name, [])):
            print(f"{name}:{line}: {found!r} has no marker; name its file under reports/, or list it in docs/figures.toml")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
