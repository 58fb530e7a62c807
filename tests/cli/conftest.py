from __future__ import annotations

import pytest

from exactprune.cli.app import run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(here, capsys):
    """Runs one command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(here, cli):
    """Runs a command line that must be refused: exit code 2, one line, nothing written, nothing on stdout."""

    def call(*arguments):
        before = sorted(here.rglob("*"))
        code, out, err = cli(*arguments)
        assert code == 2, (out, err)
        assert err.startswith("exactprune: error: ") and err.count("\n") == 1, err
        assert out == ""
        assert sorted(here.rglob("*")) == before
        return err

    return call
