"""Options on the command line, in files and in Python are the same, and wrong ones are refused in one line."""

from __future__ import annotations

from dataclasses import fields

import pytest

from exactprune.cli.app import app
from exactprune.cli.arguments import CompressFlags, VerifyFlags
from exactprune.errors import OptionError
from exactprune.options import CompressOptions, VerifyOptions, bytes_of


def parsed(*tokens):
    return app.parse_args([*tokens], exit_on_error=False, print_error=False)[1].arguments


def test_command_line_and_python_have_the_same_options_and_defaults():
    assert VerifyFlags().options == VerifyOptions()
    assert [f.name for f in fields(VerifyFlags)] == [f.name for f in fields(VerifyOptions)]
    assert CompressFlags().options(0) == CompressOptions()


def test_every_option_reaches_verify_options():
    given = parsed("verify", "m.pt", "--no-exact", "--decider", "milp", "--time-limit", "5", "--jobs", "2", "--device",
                   "cuda:1", "--memory", "512M", "--seed", "7", "--solver", "scip", "--certificate-cap", "1G")
    expected = VerifyOptions(False, "milp", 5.0, 2, "process", "cuda:1", 2**29, 7, "scip", 2**30)
    assert given["options"].options == expected


def test_compress_options_reach_their_type():
    given = parsed("compress", "m.pt", "-o", "s.pt", "--max-deviation", "1e-3", "--samples", "5")
    assert given["change"].options(3) == CompressOptions(1e-3, 5, 3)


@pytest.mark.parametrize(("text", "size"), [
    ("2G", 2**31), ("1.5k", 1536), ("512MiB", 2**29), ("1000", 1000), (7, 7), ("1TB", 2**40)])
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "2 GX", "nan", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OptionError, match="size"):
        bytes_of(text)


@pytest.mark.parametrize("wrong", [
    {"time_limit": 0.0}, {"time_limit": float("nan")}, {"jobs": 0}, {"executor": "threads"}, {"executor": "dask://host"},
    {"device": "gpu"}, {"device": "cuda:"}, {"memory": 1}, {"seed": -1}, {"solver": ""}, {"decider": "simplex"},
    {"certificate_cap": 0}])
def test_verify_options_refuse_values_outside_their_range(wrong):
    with pytest.raises(OptionError, match=f"--{next(iter(wrong)).replace('_', '-')} is .*; give "):
        VerifyOptions(**wrong)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), "inf", "some"])
def test_max_deviation_is_a_word_or_a_finite_number(wrong):
    with pytest.raises(OptionError, match=r"--max-deviation is .*; give exact, rounding or a finite number >= 0"):
        CompressOptions(wrong)


@pytest.mark.parametrize(("arguments", "words"), [
    (["verify"], "MODEL requires an argument"),
    (["verif", "m.pt"], 'Did you mean "verify"'),
    (["verify", "m.pt", "--memry", "2G"], "Did you mean --memory"),
    (["verify", "m.pt", "--memory", "2Q"], "size '2Q'"),
    (["verify", "m.pt", "--jobs", "0"], "--jobs is 0; give a whole number >= 1"),
    (["verify", "m.pt", "--jobs", "two"], "--jobs"),
    (["verify", "m.pt", "--decider", "simplex"], "branch-and-bound"),
    (["verify", "m.pt", "--time-limit", "-1"], "--time-limit"),
    (["verify", "m.pt", "--domain", "0"], "--domain is '0'; give LO,HI"),
    (["verify", "m.pt", "--domain", "0,1,2"], "give LO,HI"),
    (["verify", "m.pt", "--input-shape", "1,x"], "--input-shape is '1,x'"),
    (["verify", "m.pt", "--input-shape", "0,3"], "positive sizes"),
    (["verify", "m.pt", "--domain", "0,1", "--vnnlib", "p.vnnlib"], "given 2 times: --domain, --vnnlib; keep one"),
    (["verify", "m.pt", "--domain-box", "b.npz", "--center", "c.npy", "--domain-data", "d.npz"], "given 3 times"),
    (["verify", "m.pt", "--epsilon", "0.1"], "--epsilon belongs to --center"),
    (["verify", "m.pt", "--domain", "0,1", "--clip", "0,1"], "--clip belongs to --center"),
    (["verify", "m.pt", "--margin", "0.1"], "--margin belongs to --domain-data"),
    (["verify", "m.pt", "--center", "c.npy"], "add --epsilon"),
    (["verify", "m.pt", "--output", "no/such/folder"], "parent folder does not exist"),
    (["compress", "m.pt"], "--out requires an argument"),
    (["compress", "m.pt", "-o", "small.tflite"], "use .pt or .onnx"),
    (["compress", "m.pt", "-o", "no/small.pt"], "existing folder"),
    (["compress", "m.pt", "-o", "s.pt", "--max-deviation", "much"], "--max-deviation is 'much'"),
    (["check", "m.pt"], "requires an argument"),
])
def test_misuse_is_one_line_with_a_remedy(refused, arguments, words):
    assert words in refused(*arguments)


def test_out_must_not_be_the_model_itself(here, refused):
    (here / "m.pt").write_bytes(b"x")
    assert "is the model itself" in refused("compress", "m.pt", "-o", "../" + here.name + "/m.pt")


def test_output_must_not_be_a_file(here, refused):
    (here / "run").write_bytes(b"x")
    assert "is a file; name a folder" in refused("verify", "m.pt", "--output", "run")
