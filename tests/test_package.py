"""The package's outside: lazy public names, an import that costs nothing, the checker's independence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import exactprune

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "highspy", "onnx", "scipy", "pyomo", "networkx")
BUDGET = 0.7


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("code", [
    "import exactprune",
    "import exactprune.checker",
    "from exactprune.cli.app import run; assert run(['--help']) == 0",
    "from exactprune.cli.app import run; assert run(['verify', '--help']) == 0",
    "from exactprune.cli.app import run; assert run(['--version']) == 0",
    "from exactprune.cli.app import run; assert run(['verify', 'missing.pt']) == 2",
    "from exactprune.cli.app import run; assert run(['check', 'missing.pt', 'missing.exactprune']) == 2",
])
def test_starting_imports_nothing_heavy(code):
    done = python(f"{code}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules], sep=',')")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] in ([], [""]), done.stdout


@pytest.mark.parametrize("arguments", [["-c", "import exactprune"], ["-m", "exactprune", "--help"]])
def test_starting_takes_under_the_budget(arguments):
    times = []  # processor seconds, which a busy machine does not stretch
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < BUDGET, times


def test_every_public_name_is_there_and_is_documented():
    for name in exactprune.__all__:
        assert name == "__version__" or getattr(exactprune, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'gurobi'"):
        _ = exactprune.gurobi
    assert "verify" in dir(exactprune)


def test_compress_stays_the_function_after_its_subpackage_is_imported():
    done = python("import exactprune.compress.plan, exactprune\n"
                  "from exactprune.compress import plan\n"
                  "from exactprune import compress\n"
                  "from exactprune.pipeline import compress as original\n"
                  "assert exactprune.compress is compress is original and plan.__name__ == 'exactprune.compress.plan'")
    assert done.returncode == 0, done.stderr


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert version("exactprune") == exactprune.__version__
