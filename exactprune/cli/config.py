"""Options from a TOML file: the command line's names in the tables [verify] and [compress].

``compress`` verifies first, so it reads [verify] too; [compress] wins over it, and the command line over both. An
unknown table or key is an error that names the nearest known one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from exactprune.errors import OptionError

TABLES = ("verify", "compress")
_DOMAIN = ("--domain", "--domain-box", "--vnnlib", "--center", "--epsilon", "--clip", "--domain-data", "--margin")
_COMMAND_LINE_ONLY = ("--config", "--help", "--version")


def apply_config(root: App, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill options that the command line leaves open from the file of ``--config`` (a cyclopts config source)."""
    path = _config_path(arguments)
    if path is None or not commands or commands[0] not in TABLES:
        return
    data = {}
    for table, keys in read_config(path).items():
        known = [name.removeprefix("--") for name in _options(root[table])]
        _check_keys(keys, known, f"--config {path}, table [{table}]", "key")
        if table in (commands[0], "verify"):
            data |= {key.replace("_", "-"): _text(value) for key, value in keys.items()}
    if _given(arguments, _DOMAIN):
        data = {key: value for key, value in data.items() if f"--{key}" not in _DOMAIN}
    Dict({commands[0]: data}, source=str(path))(app, commands, arguments)


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a config file, [verify] before [compress].

    Raises:
        OptionError: the file is missing, no TOML, or has something else than these tables.
    """
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    _check_keys(data, TABLES, f"--config {path}", "table")
    for table, value in data.items():
        if not isinstance(value, dict):
            raise OptionError(f"--config {path}: {table} is not a table; write [{table}]")
    return {table: data[table] for table in TABLES if table in data}


def _check_keys(keys: Mapping[str, Any], known: Sequence[str], where: str, what: str) -> None:
    for key in keys:
        if key.replace("_", "-") not in known:
            near = get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0)
            raise OptionError(f"{where}: unknown {what} {key!r}; the nearest is {near[0]!r}")


def _config_path(arguments: ArgumentCollection) -> Path | None:
    tokens = [t for a in arguments if "--config" in a.names for t in a.tokens]
    return Path(tokens[-1].value) if tokens else None


def _given(arguments: ArgumentCollection, names: Sequence[str]) -> bool:
    return any(a.tokens for a in arguments if set(a.names) & set(names))


def _options(app: App) -> list[str]:
    names = [name for a in app.assemble_argument_collection() if a.parse for name in a.names]
    return [n for n in names if n.startswith("--") and not n.startswith("--no-") and n not in _COMMAND_LINE_ONLY]


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value
