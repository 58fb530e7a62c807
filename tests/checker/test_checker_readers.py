"""The checker's own readers give the canonical network of ``exactprune.io``, bit for bit, and refuse bad files."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import exactprune
from exactprune.checker import CheckError, check_run, read_network
from exactprune.io.npz import save_npz

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", ROOT.parent / "shared")) / "nets"
MODELS = sorted(p for p in (ROOT / "models").iterdir() if p.suffix in (".pt", ".onnx"))
SHAPES = {"fashion_conv_bn": (1, 28, 28)}


def agree(path, shape=None):
    ours, theirs = read_network(path, shape), exactprune.load(path, input_shape=shape)
    assert [n.op.kind for n in ours.nodes] == [n.op.kind for n in theirs.nodes]
    assert ours.sha256 == theirs.sha256
    assert ours.relus == theirs.relus


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_models(path):
    agree(path, SHAPES.get(path.stem))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared networks are not here (EXACTPRUNE_SHARED)")
def test_shared_networks():
    paths = [p for p in sorted(SHARED.iterdir()) if p.suffix in (".pt", ".onnx")]
    assert len(paths) >= 10
    for path in paths:
        agree(path)


SEQUENTIALS = {
    "plain": ((5,), lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 3, bias=False))),
    "double": ((3,), lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()),
    "half": ((3,), lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).half()),
    "nested": ((6,), lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()),
                                           nn.Linear(4, 2))),
    "norm first": ((3,), lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.ReLU(), nn.BatchNorm1d(2),
                                               nn.Linear(2, 2))),
    "conv": ((2, 9, 8), lambda: nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
                                              nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 3, 3, padding="same"), nn.ReLU(), nn.AvgPool2d(2, 1,
                                                                                                        padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))),
    "pad": ((1, 4, 4), lambda: nn.Sequential(nn.ConstantPad2d((1, 2, 0, 1), 0.5), nn.Conv2d(1, 2, 2), nn.ReLU(),
                                             nn.ZeroPad2d(1),
                                             nn.AvgPool2d(3, 2, count_include_pad=False), nn.Flatten(), nn.Linear(12,
                                                                                                                  2))),
    "unflatten": ((8,), lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(),
                                              nn.Linear(12, 2))),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_sequentials_as_pt_and_onnx(tmp_path, name):
    """Read from .pt, and from the .onnx and .npz that exactprune writes of the same network."""
    shape, make = SEQUENTIALS[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias)
    torch.save(model.eval(), tmp_path / "model.pt")
    agree(tmp_path / "model.pt", shape)
    network = exactprune.load(tmp_path / "model.pt", input_shape=shape)
    exactprune.save(network, tmp_path / "model.onnx")
    agree(tmp_path / "model.onnx")
    save_npz(network, tmp_path / "network.npz")
    assert read_network(tmp_path / "network.npz").sha256 == network.sha256


def onnx_file(path, nodes, weights, shape, output=("batch", "n"), opset=13, kind=TensorProto.FLOAT):
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, shape)],
                              [helper.make_tensor_value_info("y", kind, output)],
                              [numpy_helper.from_array(a, n) for n, a in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)


def random_weights(*shapes):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def test_onnx_graphs(tmp_path):
    """Operators as exporters write them: constants on either side, batch norms, transposes, shape arithmetic."""
    node = helper.make_node
    w, b, m, k, g, c = random_weights((6, 4), (4,), (4, 4), (3, 2, 3, 3), (3,), (1, 4))
    var = np.abs(g) + 0.5
    onnx_file(tmp_path / "dense.onnx", [
        node("Constant", [], ["mean"], value=numpy_helper.from_array(np.float32(0.3))), node("Sub", ["x", "mean"],
                                                                                             ["a"]),
        node("Div", ["a", "two"], ["a2"]), node("MatMul", ["a2", "w"], ["b1"]), node("Add", ["bias", "b1"], ["b2"]),
        node("Relu", ["b2"], ["r"]), node("Gemm", ["r", "m"], ["z"], alpha=0.5, transB=1), node("Sub", ["one", "z"],
                                                                                                ["n"]),
        node("Add", ["n", "r"], ["s"]), node("Relu", ["s"], ["t"]), node("Mul", ["t", "c"], ["u"]), node("Neg", ["u"],
                                                                                                         ["v"]),
        node("Sub", ["t", "v"], ["q"]), node("Dropout", ["q"], ["o"]), node("Identity", ["o"], ["y"])],
        {"w": w, "bias": b, "m": m, "two": np.float32(2), "one": np.float32(1), "c": c}, ["batch", 6])
    agree(tmp_path / "dense.onnx")
    onnx_file(tmp_path / "image.onnx", [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Pad", ["t", "pads"], ["p"]),
        node("Conv", ["p", "k"], ["c"], strides=[2, 1], auto_pad="SAME_UPPER"),
        node("BatchNormalization", ["c", "g", "be", "mu", "var"], ["n"]), node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["mp"], kernel_shape=[2, 2], pads=[1, 0, 0, 1]), node("AveragePool", ["mp"], ["ap"],
                                                                                     kernel_shape=[2, 1]),
        node("GlobalAveragePool", ["ap"], ["ga"]), node("Shape", ["ga"], ["sh"]), node("Gather", ["sh", "zero"],
                                                                                       ["batch"]),
        node("Unsqueeze", ["batch", "zeros"], ["ub"]), node("Concat", ["ub", "minus"], ["to"], axis=0),
        node("Reshape", ["ga", "to"], ["y"])],
        {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]), "k": k, "g": g, "be": g, "mu": g, "var": var, "zero": np.array(0),
         "zeros": np.array([0]), "minus": np.array([-1])}, [1, 5, 6, 2])
    agree(tmp_path / "image.onnx")
    onnx_file(tmp_path / "flat.onnx", [node("MatMul", ["m", "x"], ["a"]), node("Relu", ["a"], ["r"]), node("Flatten",
                                                                                                           ["r"], ["y"],
                                                                                                           axis=0)],
              {"m": m}, [4, 1])
    agree(tmp_path / "flat.onnx")


# -- bad files -------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def rewritten(path, target, change):
    """A copy of a torch archive with its pickle changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)


def test_bad_pt_files(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(nn.Sequential(nn.Linear(3, 2)), good)
    read_network(good)
    data = good.read_bytes()
    cases = {"empty.pt": b"", "text.pt": b"hello", "cut.pt": data[: len(data) // 2],
             "pickle.pt": pickle.dumps(Evil(tmp_path / "ran"))}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.GELU()), tmp_path / "gelu.pt")
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), tmp_path / "train.pt")
    torch.save(nn.Sequential(nn.Conv2d(1, 1, 1)), tmp_path / "open.pt")
    poisoned = nn.Sequential(nn.Linear(3, 2))
    poisoned[0].weight.data[0, 0] = float("nan")
    torch.save(poisoned, tmp_path / "nan.pt")
    giant = nn.Sequential(nn.Linear(3, 2))
    giant[0].weight = nn.Parameter(torch.zeros(1).as_strided((10**5, 10**5), (0, 0)))
    torch.save(giant, tmp_path / "giant.pt")
    hooked = nn.Sequential(nn.Linear(3, 2))
    hooked[0].forward = os.getcwd
    torch.save(hooked, tmp_path / "forward.pt")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    rewritten(good, tmp_path / "memo.pt", lambda p: p[:2] + b"]r\xff\xff\xff\x7f" + p[2:])
    rewritten(good, tmp_path / "global.pt", lambda p: p.replace(b"Linear", b"Lineax"))
    for path in sorted(tmp_path.glob("*.pt")):
        if path != good:
            with pytest.raises(CheckError):
                read_network(path)
    assert not (tmp_path / "ran").exists()


def test_bad_onnx_files(tmp_path):
    node = helper.make_node
    w = np.ones((3, 3), np.float32)
    good = tmp_path / "good.onnx"
    onnx_file(good, [node("MatMul", ["x", "w"], ["y"])], {"w": w}, [1, 3])
    read_network(good)
    data = good.read_bytes()
    for name, content in {"empty": b"", "text": b"hello world", "cut": data[:-20], "twice": data + data}.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    onnx_file(tmp_path / "soft.onnx", [node("Softmax", ["x"], ["y"])], {}, [1, 3])
    onnx_file(tmp_path / "dynamic.onnx", [node("Relu", ["x"], ["y"])], {}, ["batch", "n"])
    onnx_file(tmp_path / "nan.onnx", [node("MatMul", ["x", "w"], ["y"])], {"w": w * np.nan}, [1, 3])
    onnx_file(tmp_path / "old.onnx", [node("Relu", ["x"], ["y"])], {}, [1, 3], opset=6)
    onnx_file(tmp_path / "ints.onnx", [node("Relu", ["x"], ["y"])], {}, [1, 3], kind=TensorProto.INT64)
    for path in sorted(tmp_path.glob("*.onnx")):
        if path != good:
            with pytest.raises(CheckError):
                read_network(path)
    assert read_network(tmp_path / "dynamic.onnx", (4,)).shapes == ((4,),)


def test_a_model_that_cannot_be_read_is_taken_from_the_run_and_said(tmp_path):
    model = tmp_path / "model.pt2"
    model.write_bytes(b"something")
    np.savez(tmp_path / "domain.npz", lower=np.zeros(3), upper=np.ones(3))
    assert "reads .pt" in check_run(model, tmp_path).error
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tmp_path / "small.pt")
    save_npz(exactprune.load(tmp_path / "small.pt"), tmp_path / "network.npz")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.GELU()), tmp_path / "gelu.pt")
    for name in ("model.pt2", "state.pt", "gelu.pt"):
        report = check_run(tmp_path / name, tmp_path)
        assert "certificates.jsonl.gz" in report.error
        assert "network.npz" in report.source and name in report.source
    torch.save(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), tmp_path / "open.pt")
    np.savez(tmp_path / "domain.npz", lower=np.zeros((1, 2, 2)), upper=np.ones((1, 2, 2)))
    assert "certificates.jsonl.gz" in check_run(tmp_path / "open.pt",
                                                tmp_path).error, "the domain tells the input's shape"
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "small.pt").read_bytes()[:-40])
    report = check_run(tmp_path / "damaged.pt", tmp_path)
    assert "damaged.pt" in report.error, "a damaged or hostile model file is no reason to believe the run's copy"


def test_damaged_npz(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, graph=np.array("{}"))
    for name, content in {"graph": buffer.getvalue(), "cut": buffer.getvalue()[:50], "none": b""}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(CheckError):
            read_network(tmp_path / f"{name}.npz")


def test_the_checker_imports_numpy_and_nothing_of_the_rest():
    code = ("import sys, exactprune.checker; bad = [m for m in sys.modules if m.split('.')[0] in "
            "('torch', 'onnx', 'scipy', 'highspy', 'networkx', 'pyomo') or (m.startswith('exactprune.') and "
            "not m.startswith('exactprune.checker'))]; print(bad)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"
