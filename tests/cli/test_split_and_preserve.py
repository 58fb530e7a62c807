"""``compress --split`` and ``--preserve argmax`` end to end: files, certificates that the checker accepts, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import exactprune


@pytest.fixture
def model(here):
    """Twelve neurons that are all stable where input 0 is not negative."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        net[0].weight /= 8
        net[0].weight[:, 0] = torch.tensor([1.0, -1.0]).repeat(6)
        net[0].bias[:] = torch.tensor([0.5, -0.5]).repeat(6)
    torch.save(net, here / "m.pt")
    np.savez(here / "d.npz", x=np.random.default_rng(0).random((30, 3)) * 2 - 1)
    return net


def test_split_writes_networks_certificates_and_a_dispatcher(model, here, cli):
    code, out, _ = cli("compress", "m.pt", "-o", "pieces", "--split", "2", "--domain=-1,1", "--samples", "20", "--json")
    assert code == 0
    summary = json.loads(out)
    assert len(summary["pieces"]) == 2 and summary["payoff"]["pays"] and "Splitting pays" in summary["payoff"]["words"]
    for piece in summary["pieces"]:
        assert cli("check", "m.pt", piece["path"], piece["certificate"])[0] == 0
    split = exactprune.load_split(here / "pieces")
    x = split.domain.sample(50, np.random.default_rng(0)).astype(np.float32)
    with torch.no_grad():
        assert np.allclose(split.evaluate(x), model(torch.tensor(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize(("arguments", "words"), [
    (("-o", "p", "--split", "0"), "give the number of pieces, at least 1"),
    (("-o", "p.onnx", "--split", "2"), "with --split it is a folder"),
    (("-o", "p", "--split", "2", "--certificate", "c"), "every piece has its own"),
    (("-o", "s.pt", "--preserve", "everything"), "preserve"),
])
def test_refusals(model, refused, arguments, words):
    assert words in refused("compress", "m.pt", *arguments)


def test_preserve_says_which_inputs_keep_their_class(model, cli):
    code, out, _ = cli("compress", "m.pt", "-o", "s.pt", "--domain=-1,1", "--preserve", "argmax", "--data", "d.npz",
                       "--samples", "20", "--json")
    found = json.loads(out)
    assert code == 0 and found["preserved"]["inputs"] == 30 and found["options"]["preserve"] == "argmax"
    assert found["preserved"]["certified"] + found["preserved"]["undecided"] == 30
    assert found["level"]["eps"] * 2 <= found["preserved"]["margin"] and found["float"]["eps"] > found["level"]["eps"]
    shown = cli("compress", "m.pt", "-o", "s.pt", "--domain=-1,1", "--preserve", "argmax", "--data", "d.npz")[1]
    assert "given inputs provably keep their class" in shown and "Claim (float, executed in float32)" in shown
