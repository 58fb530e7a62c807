"""Every kind of bad model, box or property: one line naming place and remedy, exit code 2, nothing written."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from itertools import pairwise

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
from torch import nn

ARRAYS = {"nan": float("nan"), "infinity": float("inf")}


def mlp(*sizes, dtype=torch.float32):
    torch.manual_seed(0)
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype).eval()


def saved(path, model):
    torch.save(model, path)
    return path


@pytest.fixture
def good(here):
    return saved(here / "good.pt", mlp(4, 3, 2))


@pytest.fixture
def onnx_file(here):
    """Writes an ONNX model of one node of the given type on a (1, 4) input."""

    def write(op="Relu", shape=(1, 4), **attributes):
        given = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
        out = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
        node = oh.make_node(op, ["x"], ["y"], name="the_node", **attributes)
        model = oh.make_model(oh.make_graph([node], "g", [given], [out]), opset_imports=[oh.make_opsetid("", 13)])
        model.ir_version = 8
        path = here / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


class Code:
    """Unpickling this would run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


# -- model files -------------------------------------------------------------------------------------------------


def test_missing(refused):
    assert "none.pt: cannot be read (No such file or directory)" in refused("verify", "none.pt")


@pytest.mark.parametrize("name", ["m.pt", "m.onnx", "m.pt2"])
def test_empty(here, refused, name):
    (here / name).touch()
    assert f"{name}: is empty" in refused("verify", name)


@pytest.mark.parametrize("name", ["m.pt", "m.onnx", "m.pt2"])
def test_text_renamed(here, refused, name):
    (here / name).write_text("This is no model.\n" * 50)
    assert name in refused("verify", name)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_truncated_pt(here, good, refused, keep):
    data = good.read_bytes()
    (here / "cut.pt").write_bytes(data[:int(keep * len(data))])
    assert "cut.pt" in refused("verify", "cut.pt")


def test_truncated_onnx(here, onnx_file, refused):
    data = onnx_file().read_bytes()
    (here / "cut.onnx").write_bytes(data[:len(data) // 2])
    assert "cut.onnx" in refused("verify", "cut.onnx")


def test_pickle_with_code_is_refused_and_not_run(here, refused):
    torch.save(Code(here / "ran"), here / "evil.pt")
    (here / "bare.pt").write_bytes(pickle.dumps(Code(here / "ran")))
    for name in ("evil.pt", "bare.pt"):
        assert name in refused("verify", name)
    assert not (here / "ran").exists()


def test_zero_stride_giant_tensor(here, refused):
    model = mlp(4, 3, 2)
    model[0].weight = nn.Parameter(torch.zeros(1).expand(2**20, 2**20), requires_grad=False)
    saved(here / "giant.pt", model)
    assert (here / "giant.pt").stat().st_size < 2**16
    assert "giant.pt" in refused("verify", "giant.pt")


def test_deflated_bomb(here, good, refused):
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(here / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
        bomb.writestr("good/data/99", bytes(2**26))
    assert "bomb.pt" in refused("verify", "bomb.pt")


@pytest.mark.parametrize("word", ARRAYS)
def test_weights_that_are_not_finite(here, refused, word):
    model = mlp(4, 3, 2)
    with torch.no_grad():
        model[2].weight[0, :2] = ARRAYS[word]
    message = refused("verify", saved(here / "bad.pt", model))
    assert "'2" in message and "2 of 6" in message, message


def test_unknown_onnx_operator(onnx_file, refused):
    message = refused("verify", onnx_file("Erf"))
    assert "the_node" in message and "Erf" in message


def test_unknown_torch_module(here, refused):
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).eval()
    message = refused("verify", saved(here / "gelu.pt", model))
    assert "GELU" in message


def test_train_mode_batch_norm(here, refused):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).train()
    assert "eval" in refused("verify", saved(here / "train.pt", model))


def test_dynamic_shapes(onnx_file, refused):
    message = refused("verify", onnx_file(shape=("batch", "width")))
    assert "model.onnx" in message and "width" in message


def test_float16_weights_are_widened_exactly_and_said_so(here):
    from exactprune import load

    network = load(saved(here / "half.pt", mlp(4, 3, 2, dtype=torch.float16)))
    assert network.dtype == np.float32
    assert any("float16" in note for note in network.notes), network.notes
    wanted = mlp(4, 3, 2, dtype=torch.float16)[0].weight.detach().numpy().astype(np.float32)
    assert np.array_equal(dict(network.nodes[0].op.arrays())["weight"], wanted)


# -- boxes -------------------------------------------------------------------------------------------------------


def box(path, lower, upper):
    np.savez(path, lower=lower, upper=upper)
    return path


@pytest.mark.parametrize(("lower", "upper", "words"), [
    (np.zeros(3), np.ones(3), "has 3 values, the network's input [4] has 4"),
    (np.zeros(4), np.ones(3), "lower has shape (4,), upper (3,)"),
    ([0, 2, 0, 0], np.ones(4), "lower 2.0 > upper 1.0 at flat index 1"),
    ([0, np.nan, 0, 0], np.ones(4), "lower is nan at flat index 1"),
    (np.zeros(4), [1, 1, 1, np.inf], "upper is inf at flat index 3"),
])
def test_boxes(here, good, refused, lower, upper, words):
    assert words in refused("verify", good, "--domain-box", box(here / "b.npz", lower, upper))


@pytest.mark.parametrize(("text", "words"), [
    ("1,0", "lower 1.0 > upper 0.0"), ("0,inf", "upper is inf"), ("nan,1", "lower is nan"),
    ("-inf,inf", "lower is -inf")])
def test_intervals(good, refused, text, words):
    assert words in refused("verify", good, "--domain", text)


def test_balls(here, good, refused):
    np.save(here / "c.npy", np.zeros(5))
    assert "has shape (5,), the network's input [4]" in refused("verify", good, "--center", "c.npy", "--epsilon", "0.1")
    np.save(here / "c.npy", np.zeros(4))
    assert "epsilon is -0.1" in refused("verify", good, "--center", "c.npy", "--epsilon", "-0.1")
    assert "epsilon is inf" in refused("verify", good, "--center", "c.npy", "--epsilon", "inf")
    message = refused("verify", good, "--center", "c.npy", "--epsilon", "0.1", "--clip", "1,2")
    assert "lower 1.0 > upper 0.1" in message
    assert "no such file" in refused("verify", good, "--center", "d.npy", "--epsilon", "0.1")


def test_boxes_of_data(here, good, refused):
    np.savez(here / "d.npz", x=np.zeros((0, 4)))
    assert "has no samples" in refused("verify", good, "--domain-data", "d.npz")
    np.savez(here / "d.npz", x=np.full((2, 4), np.nan))
    assert "lower is nan" in refused("verify", good, "--domain-data", "d.npz")
    np.savez(here / "d.npz", x=np.zeros((2, 3)))
    assert "give (samples, 4)" in refused("verify", good, "--domain-data", "d.npz")
    np.savez(here / "d.npz", x=np.zeros((2, 4)))
    assert "margin is -1.0" in refused("verify", good, "--domain-data", "d.npz", "--margin", "-1")


def vnnlib(inputs, body):
    declared = "".join(f"(declare-const X_{i} Real)\n" for i in range(inputs)) + "(declare-const Y_0 Real)\n"
    return declared + body


@pytest.mark.parametrize(("text", "words"), [
    ("", "p.vnnlib"),
    ("(assert (<= X_0", "p.vnnlib"),
    (vnnlib(4, "(assert (or (and (<= X_0 1) (>= X_0 0)) (and (<= X_0 3) (>= X_0 2))))"), "disjunction"),
    (vnnlib(2, "(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= X_1 1))(assert (>= X_1 0))"), "4"),
    (vnnlib(4, "(assert (<= X_0 1))(assert (>= X_0 0))"), "X_1"),
])
def test_properties(here, good, refused, text, words):
    (here / "p.vnnlib").write_text(text)
    message = refused("verify", good, "--vnnlib", "p.vnnlib")
    assert "p.vnnlib" in message and words in message, message


def test_compress_refuses_bad_input_as_well(here, refused):
    (here / "m.pt").write_text("no model")
    assert "m.pt" in refused("compress", "m.pt", "-o", "small.pt")


def test_the_installed_command_behaves_the_same(here):
    """In a process of its own, so that nothing of the test's process helps."""
    torch.save(io.BytesIO(), here / "m.pt")
    command = [sys.executable, "-m", "exactprune", "verify", "m.pt", "--json"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("exactprune: error: ") and done.stderr.count("\n") == 1
    assert [p.name for p in here.iterdir()] == ["m.pt"]
