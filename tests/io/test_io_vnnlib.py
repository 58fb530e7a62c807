"""VNN-LIB boxes: forms of bounds, what is refused, and every sample file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exactprune import io
from exactprune.errors import DomainError

SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", Path(__file__).parents[3] / "shared"))
HEAD = "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n"


def box_of(text: str, folder: Path):
    (folder / "p.vnnlib").write_text(text)
    return io.load_vnnlib(folder / "p.vnnlib")


@pytest.mark.parametrize(
    "body",
    [
        "(assert (<= X_0 2)) (assert (>= X_0 -1)) (assert (<= X_1 0.5)) (assert (>= X_1 -5e-1))",
        "(assert (>= 2 X_0)) (assert (<= -1.0 X_0)) (assert (>= 0.5 X_1)) (assert (<= -0.5 X_1))",
        "(assert (and (<= X_0 2.) (>= X_0 -1) (<= X_1 .5) (>= X_1 (- 0.5))))",
        "(assert (or (and (<= X_0 2) (>= X_0 -1) (<= X_1 5e-1) (>= X_1 -5.0E-1))))",
        "(assert (<= X_0 7)) (assert (<= X_0 +2)) ; (assert (<= X_0 0))\n (assert (>= X_0 -1))"
        "(assert (<= X_1 0.5)) (assert (>= X_1 -0.5))",
        "(assert (< X_0 2)) (assert (> X_0 -1)) (assert (and (and (<= X_1 0.5)) (>= X_1 -0.5)))",
    ],
)
def test_every_way_to_write_a_box(tmp_path: Path, body: str) -> None:
    box = box_of(HEAD + body + "(assert (or (and (<= Y_0 1)) (and (>= Y_0 2))))", tmp_path)
    assert box.lower.tolist() == [-1, -0.5]
    assert box.upper.tolist() == [2, 0.5]
    assert "p.vnnlib" in box.source


def test_an_equality_is_a_point(tmp_path: Path) -> None:
    box = box_of(HEAD + "(assert (= X_0 0.1)) (assert (= 2 X_1))", tmp_path)
    assert box.lower.tolist() == box.upper.tolist() == [0.1, 2]


@given(
    st.lists(
        st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False)),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_come_back_to_the_bit(tmp_path: Path, pairs: list[tuple[float, float]]) -> None:
    pairs = [(min(p), max(p)) for p in pairs]
    text = "".join(
        f"(declare-const X_{i} Real)(assert (>= X_{i} {low!r}))(assert (<= X_{i} {high!r}))"
        for i, (low, high) in enumerate(pairs)
    )
    box = box_of(text, tmp_path)
    assert [tuple(p) for p in zip(box.lower.tolist(), box.upper.tolist(), strict=True)] == pairs


@pytest.mark.parametrize(("body", "words"), [
    ("(assert (<= X_0 2))(assert (>= X_0 1))(assert (<= X_1 1))", "X_1 has no lower bound"),
    ("(assert (<= X_0 2))(assert (>= X_0 1))(assert (>= X_1 1))", "X_1 has no upper bound"),
    ("(assert (<= X_0 1))(assert (>= X_0 2))(assert (<= X_1 1))(assert (>= X_1 0))", "contradict"),
    ("(assert (or (<= X_0 1) (>= X_0 2)))", "disjunction over inputs"),
    ("(assert (or (and (<= X_0 1) (<= Y_0 1)) (and (>= X_0 2))))", "disjunction over inputs"),
    ("(assert (<= X_0 X_1))", "not a bound on one input"),
    ("(assert (<= (+ X_0 1) 2))", "not a bound on one input"),
    ("(assert (not (<= X_0 2)))", "not a bound on one input"),
    ("(assert (<= X_0 nan))", "not a bound on one input"),
    ("(assert (<= X_0 Y_0))", "not a bound on one input"),
    ("(assert (<= X_0 1e999))(assert (>= X_0 0))(assert (<= X_1 1))(assert (>= X_1 0))", "X_0 has no upper bound"),
    ("(assert (<= X_5 2))", "declares"), ("(assert (<= X_0 2)", "truncated"), ("(assert (<= X_0 2)))", "')' too many"),
    ("hello", "outside a command"), ("(" * 200, "nested")])
def test_what_is_not_a_box_is_refused(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(DomainError, match=r"p\.vnnlib") as caught:
        box_of(HEAD + body, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_vnnlib(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="No such file"):
        io.load_vnnlib(tmp_path / "no.vnnlib")
    with pytest.raises(DomainError, match="declares no inputs"):
        box_of("", tmp_path)
    (tmp_path / "b.vnnlib").write_bytes(b"\xff\xfe\x00" * 10)
    with pytest.raises(DomainError, match="not text"):
        io.load_vnnlib(tmp_path / "b.vnnlib")
    with pytest.raises(DomainError, match="cannot be read"):
        io.load_vnnlib(tmp_path)


PAIRS = [("ACASXU_run2a_1_1_batch_2000", f"acasxu-prop_{i}") for i in (1, 2, 3, 5, 7)] + [
    ("Convnet_maxpool", "Convnet_maxpool-prop_0_0.004"), ("cartpole", "cartpole_case_safe_14"),
    ("cifar_base_kw", "cifar_base_kw-img1598-eps0.0026143790849673205"), ("lunarlander", "lunarlander_case_safe_0"),
    ("mnist-net_256x2", "mnistfc-prop_0_0.03"), ("mnist-net_256x6", "mnistfc-prop_0_0.05"),
    ("resnet_2b", "resnet_2b-prop_0_eps_0.008"), ("robot", "robot_0")]


@pytest.mark.skipif(not SHARED.is_dir(), reason="sample networks are not here (EXACTPRUNE_SHARED)")
@pytest.mark.parametrize(("net", "prop"), PAIRS)
def test_sample_boxes_fit_their_networks(net: str, prop: str) -> None:
    box = io.load_vnnlib(SHARED / "nets" / f"{prop}.vnnlib").reshaped(
        io.load(SHARED / "nets" / f"{net}.onnx").input_shape
    )
    assert np.all(box.lower <= box.upper)
    text = (SHARED / "nets" / f"{prop}.vnnlib").read_text()
    assert repr(float(box.upper.flat[0])) in text or f"{box.upper.flat[0]:g}" in text
