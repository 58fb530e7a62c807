"""The study's pages: tables and sentences are made from the cells, so that words and figures cannot part.

index.md and index.html carry the same; sweep.csv, sweep_summary.csv and networks.csv have the numbers in full.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from _study_cells import OUT, Facts, setting
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from exactprune.io.atomic import write_bytes
from exactprune.report.page_markdown import markdown_table, plain

WIDTH, HEIGHT = 640.0, 300.0


@dataclass(frozen=True)
class Table:
    """Columns, the first ``left`` of them text, and rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 2


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: heading.
        words: sentences, one paragraph each.
        table: below them.
        picture: SVG for the HTML page; caption: what it shows.
        notes: below the table.
        links: (file, words).
    """

    title: str
    words: Sequence[str]
    table: Table | None = None
    picture: Markup | None = None
    caption: str = ""
    notes: Sequence[str] = field(default_factory=tuple)
    links: Sequence[tuple[str, str]] = field(default_factory=tuple)


def write_page(sections: Sequence[Section], found: Sequence[str]) -> None:
    """Write index.md and index.html."""
    head = ("What exactprune removes from trained networks and what it can prove about that, next to approximate methods. "
            "Made by `make study` (`python benchmarks/study.py`).")
    made = setting()
    foot = ", ".join(f"{name} {value}" for name, value in made.items())
    parts = ["# Study", head, "## What was found", "\n".join(f"- {plain(text)}" for text in found)]
    parts += [text for section in sections for text in markdown(section)]
    parts += ["## Setting", plain(foot) + ". Each cell's JSON file has its own versions and hardware."]
    write(OUT / "index.md", "\n\n".join(parts) + "\n")
    style = files("exactprune.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)
    page = env.get_template("_study_page.html").render(head=head.replace("`", ""), found=found, sections=sections, foot=foot,
                                                       style=Markup(style))
    write(OUT / "index.html", page)


def markdown(section: Section) -> Iterable[str]:
    """Paragraphs of a section."""
    yield f"## {section.title}"
    yield from map(plain, section.words)
    if section.table is not None:
        yield markdown_table(section.table.columns, section.table.rows, section.table.left)
    yield from map(plain, section.notes)
    if section.links:
        yield "\n".join(f"- [{file}]({file}): {plain(words)}" for file, words in section.links)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, text.encode())


def write_csv(file: Path, rows: Sequence[Facts]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(file, text.getvalue())
