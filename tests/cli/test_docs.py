"""The documentation names every option, exit code, field and public name; its links and examples hold."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import exactprune
from exactprune.cli.app import app
from exactprune.cli.config import TABLES
from exactprune.report.neurons import COLUMNS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def text(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize("command", ["verify", "compress", "check", "report", "compare"])
def test_every_option_is_documented_and_has_help(command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, shown, _ = cli(command, "--help")
    assert code == 0
    names = {n for a in app[command].assemble_argument_collection() for n in a.names if n.startswith("--")}
    for name in sorted(n for n in names if not n.startswith("--no-")):
        assert re.search(rf"[` \[]{name}[` \]]", text("docs/cli.md")), name
        (line,) = (line for line in shown.splitlines() if re.search(rf"│\s+\*?\s*{name}\s", line))
        assert len(re.sub(r"\[.*?\]|--\S+|[A-Z,]+ {2,}", "", line).strip("│* ")) > 15, line


def test_every_field_of_run_json_is_documented():
    schema = json.loads(text("docs/run.schema.json"))
    page = text("docs/run-json.md")
    for name, part in schema["properties"].items():
        assert f"`{name}" in page
        fields = part.get("properties") or part.get("items", {}).get("properties") or {}
        for field in fields:
            assert field in page, (name, field)


def test_every_column_is_documented():
    assert all(f"`{column}`" in text("docs/run-json.md") for column in COLUMNS)


def test_every_public_name_is_documented():
    page = text("docs/python.md")
    assert [n for n in exactprune.__all__ if n not in page and n != "__version__"] == []


def test_the_example_configuration_is_read(tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", text("docs/config.md"), re.DOTALL)
    assert sorted(tomllib.loads(block)) == sorted(TABLES)
    (tmp_path / "c.toml").write_text(block)
    for tokens in (["verify", "m.pt"], ["compress", "m.pt", "-o", "s.pt"]):
        app.parse_args([*tokens, "--config", str(tmp_path / "c.toml")], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_links_between_pages_hold(page):
    for target in re.findall(r"\]\(([^)#]+)", text(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
