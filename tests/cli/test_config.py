from __future__ import annotations

import pytest

from exactprune.cli.app import app
from exactprune.options import VerifyOptions


@pytest.fixture
def parsed(here):
    def parse(text, *tokens):
        (here / "c.toml").write_text(text)
        return app.parse_args([*tokens, "--config", "c.toml"], exit_on_error=False, print_error=False)[1].arguments

    return parse


EVERYTHING = """
[verify]
exact = false
decider = "leo"
time_limit = 3
jobs = 2
memory = "1G"
domain = [-1, 1]
input-shape = [1, 28, 28]

[compress]
max-deviation = 1e-3
out = "s.pt"
jobs = 3
"""


def test_verify_reads_its_table_with_hyphens_or_underscores(parsed):
    given = parsed(EVERYTHING, "verify", "m.pt")
    assert given["options"].options == VerifyOptions(False, "leo", 3.0, 2, memory=2**30)
    assert given["domain"].domain == (-1.0, 1.0)
    assert given["source"].input_shape == (1, 28, 28)


def test_compress_reads_both_tables_its_own_first(parsed):
    given = parsed(EVERYTHING, "compress", "m.pt")
    assert (str(given["out"]), given["change"].max_deviation, given["options"].jobs) == ("s.pt", "0.001", 3)
    assert given["options"].decider == "leo"


def test_the_command_line_wins(parsed):
    given = parsed(EVERYTHING, "verify", "m.pt", "--decider", "milp", "--exact")
    assert (given["options"].decider, given["options"].exact, given["options"].time_limit) == ("milp", True, 3.0)


def test_a_domain_on_the_command_line_replaces_the_files_domain(parsed):
    given = parsed(EVERYTHING, "verify", "m.pt", "--vnnlib", "p.vnnlib")
    assert given["domain"].domain is None and str(given["domain"].vnnlib) == "p.vnnlib"


@pytest.mark.parametrize(("text", "words"), [
    ("[verify]\njob = 2\n", "table [verify]: unknown key 'job'; the nearest is 'jobs'"),
    ("[compress]\nmax_deviatoin = 2\n", "unknown key 'max_deviatoin'; the nearest is 'max-deviation'"),
    ("[verify]\nmax-deviation = 2\n", "unknown key 'max-deviation'"),
    ("[verify]\nconfig = 'other.toml'\n", "unknown key 'config'"),
    ("[verfiy]\njobs = 2\n", "unknown table 'verfiy'; the nearest is 'verify'"),
    ("verify = 3\n", "verify is not a table; write [verify]"),
    ("[verify\n", "c.toml: "),
    ("[verify]\njobs = 0\n", "--jobs is 0"),
    ("[verify]\njobs = 'two'\n", "jobs"),
    ("[verify]\ndomain = '0,1'\nvnnlib = 'p'\n", "given 2 times"),
])
def test_wrong_files_are_refused_with_the_place(here, refused, text, words):
    (here / "c.toml").write_text(text)
    assert words in refused("verify", "m.pt", "--config", "c.toml")


def test_a_missing_file_is_refused(refused):
    assert "none.toml: No such file" in refused("verify", "m.pt", "--config", "none.toml")
