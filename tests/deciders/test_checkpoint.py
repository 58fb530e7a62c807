"""Interrupted runs go on to the same verdicts; a changed file can cost verdicts and never make a wrong one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from exact_regions import exact_ranges
from verified import deep_case, same_layers, small_case, wrong_verdicts

import exactprune
from exactprune import VerifyOptions, checker, verify
from exactprune.claim import Status
from exactprune.deciders.checkpoint import Checkpoint
from exactprune.deciders.proofs import pack
from exactprune.errors import OptionError


class _StopError(Exception):
    """Ends a run in its middle."""


class _StopAt:
    """Progress that stops the run when a stage of that name begins."""

    def __init__(self, word: str, after: int = 0) -> None:
        self.word, self.left = word, after

    def stage(self, name: str, total: int | None = None) -> None:
        if self.word in name:
            if not self.left:
                raise _StopError
            self.left -= 1

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.fixture(autouse=True)
def _every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exactprune.deciders.checkpoint.INTERVAL", -1.0)


def interrupted(path: Path, network, box, word: str, after: int = 0, **options) -> dict:
    """The content of the checkpoint of a run that was stopped when a stage began."""
    with pytest.raises(_StopError):
        verify(network, box, VerifyOptions(**options), progress=_StopAt(word, after), checkpoint=path)
    return json.loads(gzip.decompress(path.read_bytes()))


def rewrite(path: Path, content: dict) -> None:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("word", "after"), [
    pytest.param("alpha-crown", 0, marks=SLOW), pytest.param("branch and bound", 0, marks=SLOW), ("branch and bound", 2),
    pytest.param("certificate", 0, marks=SLOW)])
def test_a_resumed_run_gives_the_same_verdicts(tmp_path: Path, word: str, after: int) -> None:
    network, box = deep_case()
    path = tmp_path / "checkpoint"
    interrupted(path, network, box, word, after)
    resumed, fresh = verify(network, box, checkpoint=path), verify(network, box)
    for a, b in zip(resumed.layers, fresh.layers, strict=True):
        np.testing.assert_array_equal(a.status, b.status)
    assert resumed.check is not None and resumed.check["rejected"] == 0
    assert checker.check(network, box.lower, box.upper, [*resumed.records]).accepted


def test_no_file_is_a_fresh_start(tmp_path: Path) -> None:
    network, box = deep_case(7)
    same_layers(verify(network, box), verify(network, box, checkpoint=tmp_path / "new" / "checkpoint"))
    assert (tmp_path / "new" / "checkpoint").exists()


def test_it_belongs_to_one_network_and_box(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    network, box = small_case(1)
    verify(network, box, checkpoint=path)
    for other in (small_case(4), (network, exactprune.Box(box.lower, box.upper + 1))):
        with pytest.raises(OptionError, match="another network, domain or version"):
            verify(*other, checkpoint=path)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "not json", "a list", "no points",
                                    "records of numbers"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint"
    network, box = small_case(1)
    verify(network, box, checkpoint=path)
    whole = path.read_bytes()
    content = json.loads(gzip.decompress(whole))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    content.pop("points") if damage == "no points" else None
    if damage == "records of numbers":
        content["records"] = 7
    plain = {"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2], "flipped": bytes(flipped),
             "not json": gzip.compress(b"{"), "a list": gzip.compress(b"[1, 2]")}
    path.write_bytes(plain.get(damage, gzip.compress(json.dumps(content).encode())))
    with pytest.raises(OptionError, match="damaged checkpoint"):
        verify(network, box, checkpoint=path)


def tampered(content: dict, how: str, rng: np.random.Generator) -> dict:
    """Lies that a file can tell: bounds that settle everything, no bounds, NaN, wrong proofs."""
    for side in ("lower", "upper"):
        for k, packed in enumerate(content[side]):
            count = packed["shape"][0]
            value = {"all inactive": -1.0, "all active": 1.0, "nan": np.nan, "crossed": 2.0 if side == "lower" else -2.0}.get(how)
            if value is not None:
                content[side][k] = pack(np.full(count, value))
            elif how == "random":
                content[side][k] = pack(rng.normal(size=count))
    if how == "proofs swapped":
        for record in content["records"]:
            if "side" in record and record["side"] != "both":
                record["side"] = "upper" if record["side"] == "lower" else "lower"
    if how == "proofs malformed":
        content["records"] = [{"record": "tree", "layer": 1, "neuron": 0, "side": "upper", "splits": [None, None], "leaves": []},
                              {"record": "nonsense"}]
    if how == "points outside":
        content["points"] = pack(np.full((3, content["points"]["shape"][1]), 1e9))
    return content


LIES = ("all inactive", "all active", "nan", "crossed", "random", "proofs swapped", "proofs malformed", "points outside")


@pytest.mark.parametrize("how", LIES)
@pytest.mark.parametrize("seed", [1, pytest.param(4, marks=SLOW), pytest.param(5, marks=SLOW)])
def test_tampering_never_makes_a_wrong_verdict_or_bound(tmp_path: Path, how: str, seed: int) -> None:
    network, box = small_case(seed)
    path = tmp_path / "checkpoint"
    verify(network, box, checkpoint=path)
    content = json.loads(gzip.decompress(path.read_bytes()))
    rewrite(path, tampered(content, how, np.random.default_rng(seed)))
    try:
        result = verify(network, box, checkpoint=path)
    except OptionError:
        return
    assert not wrong_verdicts(result, exact_ranges(network, box))
    for verdict in result.layers:
        assert set(verdict.reasons) == set(verdict.indices(Status.UNKNOWN).tolist())


@pytest.mark.parametrize("how", [lie if lie == "all inactive" else pytest.param(lie, marks=SLOW) for lie in LIES])
def test_tampering_with_trees_never_makes_a_wrong_verdict(tmp_path: Path, how: str) -> None:
    network, box = deep_case()
    path = tmp_path / "checkpoint"
    content = interrupted(path, network, box, "certificate")
    assert any(record["record"] == "tree" for record in content["records"])
    rewrite(path, tampered(content, how, np.random.default_rng(0)))
    truth = verify(network, box)
    try:
        result = verify(network, box, VerifyOptions(time_limit=5), checkpoint=path)
    except OptionError:
        return
    for a, b in zip(truth.layers, result.layers, strict=True):
        decided = b.status != Status.UNKNOWN
        np.testing.assert_array_equal(a.status[decided], b.status[decided])
        points = network.evaluate_nodes(box.sample(2000, np.random.default_rng(1)))
        z = points[network.nodes[network.relus[a.layer]].inputs[0]]
        assert (b.lower <= z.min(axis=0) + 1e-9).all() and (b.upper >= z.max(axis=0) - 1e-9).all()


def test_it_is_written_at_most_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exactprune.deciders.checkpoint.INTERVAL", 1e9)
    keeper = Checkpoint(tmp_path / "checkpoint")
    keeper.maybe(None)  # type: ignore[arg-type]
    assert not (tmp_path / "checkpoint").exists()
