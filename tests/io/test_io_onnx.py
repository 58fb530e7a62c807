"""ONNX: every sample against onnxruntime, each operator in the forms that exporters write, interfaces kept."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exactprune import io
from exactprune.network import INPUT, Interface, Node, build
from exactprune.ops import Add, Affine, Conv2d, Reshape, Scale

SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", Path(__file__).parents[3] / "shared"))
BOXES = {"ACASXU_run2a_1_1_batch_2000": "acasxu-prop_1", "ACASXU_run2a_1_7_batch_2000": "acasxu-prop_2",
         "ACASXU_run2a_2_1_batch_2000": "acasxu-prop_3", "ACASXU_run2a_3_3_batch_2000": "acasxu-prop_1",
         "Convnet_maxpool": "Convnet_maxpool-prop_0_0.004", "cartpole": "cartpole_case_safe_14",
         "cifar_base_kw": "cifar_base_kw-img1598-eps0.0026143790849673205", "lunarlander": "lunarlander_case_safe_0",
         "mnist-net_256x2": "mnistfc-prop_0_0.03", "mnist-net_256x6": "mnistfc-prop_0_0.05",
         "resnet_2b": "resnet_2b-prop_0_eps_0.008", "robot": "robot_0"}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    """onnxruntime on each input of a batch (batch, *shape), one after the other, flat."""
    runner = session(path)
    given = runner.get_inputs()[0]
    shape = [n if isinstance(n, int) else 1 for n in given.shape] if np.prod([1]) else []
    return np.stack([runner.run(None, {given.name: v.reshape(shape)})[0].reshape(-1) for v in x])


def agrees(path: Path, x: np.ndarray, tolerance: float = 1e-5, **options: object) -> None:
    network = io.load(path, **options)
    ours, theirs = network.evaluate(x).reshape(len(x), -1), run(path, x)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-30)


@pytest.mark.skipif(not SHARED.is_dir(), reason="sample networks are not here (EXACTPRUNE_SHARED)")
@pytest.mark.parametrize("name", sorted(BOXES))
def test_samples_agree_with_onnxruntime_and_come_back(name: str, tmp_path: Path) -> None:
    path = SHARED / "nets" / f"{name}.onnx"
    network = io.load(path)
    box = io.load_vnnlib(SHARED / "nets" / f"{BOXES[name]}.vnnlib").reshaped(network.input_shape)
    x = box.sample(20, np.random.default_rng(0)).astype(np.float32)
    agrees(path, x)
    io.save(network, tmp_path / "out.onnx")
    again = io.load(tmp_path / "out.onnx")
    assert again.sha256 == network.sha256
    assert again.interface == network.interface
    assert [(i.name, i.shape) for i in session(path).get_inputs()] == [
        (i.name, i.shape) for i in session(tmp_path / "out.onnx").get_inputs()
    ]
    assert [(i.name, i.shape) for i in session(path).get_outputs()] == [
        (i.name, i.shape) for i in session(tmp_path / "out.onnx").get_outputs()
    ]
    agrees(tmp_path / "out.onnx", x)


@pytest.mark.skipif(not SHARED.is_dir(), reason="sample networks are not here (EXACTPRUNE_SHARED)")
def test_every_sample_is_tested() -> None:
    assert sorted(p.stem for p in (SHARED / "nets").glob("*.onnx")) == sorted(BOXES)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def written(folder: Path, nodes: list, source: list, target: list, weights: dict[str, np.ndarray], opset: int = 17,
            kind: int = TensorProto.FLOAT) -> Path:
    """A model from x to y; ``None`` as target leaves the output's shape open."""
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, source)],
                              [helper.make_tensor_value_info("y", kind, target)],
                              [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def node(kind: str, inputs: str, **attributes: object):
    return helper.make_node(kind, inputs.split(), ["y"], **attributes)


INTS = {"ints": np.int64}
CASES = [
    # name, nodes, input, output, weights, opset
    ("gemm", [node("Gemm", "x w b", transB=1)], [1, 4], [1, 3], {"w": numbers(3, 4), "b": numbers(3)}, 17),
    (
        "gemm scaled",
        [node("Gemm", "x w b", alpha=0.5, beta=3.0)],
        [1, 4],
        [1, 3],
        {"w": numbers(4, 3), "b": numbers(1, 3)},
        17,
    ),
    ("gemm without bias", [node("Gemm", "x w")], ["n", 4], ["n", 3], {"w": numbers(4, 3)}, 17),
    ("gemm from the left", [node("Gemm", "w x b")], [4, 1], [3, 1], {"w": numbers(3, 4), "b": numbers(3, 1)}, 17),
    ("gemm turned", [node("Gemm", "x w b", transA=1)], [4, 1], [1, 3], {"w": numbers(4, 3), "b": numbers(3)}, 17),
    ("gemm of rows", [node("Gemm", "x w b")], [5, 4], [5, 3], {"w": numbers(4, 3), "b": numbers(5, 3)}, 17),
    ("matmul right", [node("MatMul", "x w")], [1, 4], [1, 3], {"w": numbers(4, 3)}, 17),
    ("matmul left", [node("MatMul", "w x")], [1, 4, 1], [1, 3, 1], {"w": numbers(3, 4)}, 17),
    ("matmul left, columns", [node("MatMul", "w x")], [1, 4, 5], [1, 3, 5], {"w": numbers(3, 4)}, 17),
    ("matmul left, stack of one", [node("MatMul", "w x")], [4, 1], [1, 3, 1], {"w": numbers(1, 3, 4)}, 17),
    ("matmul of rows", [node("MatMul", "x w")], [1, 5, 4], [1, 5, 3], {"w": numbers(4, 3)}, 17),
    ("matmul vector", [node("MatMul", "x w")], [4], [3], {"w": numbers(4, 3)}, 17),
    ("matmul with a vector", [node("MatMul", "x w")], [1, 4], [1], {"w": numbers(4)}, 17),
    ("matmul deep", [node("MatMul", "x w")], [1, 1, 1, 4], [1, 1, 1, 3], {"w": numbers(4, 3)}, 17),
    (
        "matmul add",
        [helper.make_node("MatMul", ["x", "w"], ["h"]), node("Add", "b h")],
        [1, 1, 4],
        [1, 1, 3],
        {"w": numbers(4, 3), "b": numbers(1, 3)},
        17,
    ),
    ("no batch axis", [node("Relu", "x")], [4], [4], {}, 17),
    ("sub", [node("Sub", "x c")], [1, 2, 3], [1, 2, 3], {"c": numbers(3)}, 17),
    ("sub from", [node("Sub", "c x")], [1, 2, 3], [1, 2, 3], {"c": numbers(1, 2, 1)}, 17),
    (
        "mul add",
        [helper.make_node("Mul", ["x", "m"], ["h"]), node("Add", "h c")],
        [1, 2, 3],
        [1, 2, 3],
        {"m": numbers(2, 1), "c": numbers(2, 1)},
        17,
    ),
    ("div", [node("Div", "x c")], [1, 4], [1, 4], {"c": np.array([1, 3, -7, 0.3], np.float32)}, 17),
    ("neg", [node("Neg", "x")], [1, 4], [1, 4], {}, 17),
    ("twice", [node("Add", "x x")], [1, 4], [1, 4], {}, 17),
    ("difference", [helper.make_node("Relu", ["x"], ["h"]), node("Sub", "x h")], [1, 4], [1, 4], {}, 17),
    ("rank grows", [node("Add", "x c")], [1, 4], [1, 1, 4], {"c": numbers(1, 1, 4)}, 17),
    ("clip", [node("Clip", "x z")], [1, 4], [1, 4], {"z": np.zeros((), np.float32)}, 17),
    ("clip old", [node("Clip", "x", min=0.0)], [1, 4], [1, 4], {}, 9),
    ("max", [node("Max", "x z")], [1, 4], [1, 4], {"z": np.zeros((), np.float32)}, 17),
    (
        "conv",
        [node("Conv", "x w b", pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2])],
        [1, 2, 7, 7],
        None,
        {"w": numbers(3, 2, 3, 2), "b": numbers(3)},
        17,
    ),
    ("conv groups", [node("Conv", "x w", group=2)], [1, 4, 5, 5], None, {"w": numbers(6, 2, 3, 3)}, 17),
    (
        "conv same upper",
        [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])],
        [1, 1, 6, 7],
        None,
        {"w": numbers(1, 1, 3, 2)},
        17,
    ),
    (
        "conv same lower",
        [node("Conv", "x w", auto_pad="SAME_LOWER")],
        [1, 1, 6, 7],
        None,
        {"w": numbers(1, 1, 2, 4)},
        17,
    ),
    ("conv valid", [node("Conv", "x w", auto_pad="VALID")], [1, 1, 6, 7], None, {"w": numbers(1, 1, 2, 4)}, 17),
    ("conv 1-D", [node("Conv", "x w b", pads=[1, 2])], [1, 2, 7], None, {"w": numbers(3, 2, 3), "b": numbers(3)}, 17),
    (
        "conv add",
        [helper.make_node("Conv", ["x", "w"], ["h"]), node("Add", "h b")],
        [1, 2, 5, 5],
        None,
        {"w": numbers(3, 2, 3, 3), "b": numbers(1, 3, 1, 1)},
        17,
    ),
    (
        "norm",
        [node("BatchNormalization", "x g b m v", epsilon=0.01)],
        [1, 3, 4, 4],
        [1, 3, 4, 4],
        {"g": numbers(3), "b": numbers(3, seed=1), "m": numbers(3, seed=2), "v": numbers(3, seed=3) ** 2},
        17,
    ),
    (
        "conv norm",
        [helper.make_node("Conv", ["x", "w"], ["h"]), node("BatchNormalization", "h g b m v")],
        [1, 2, 5, 5],
        None,
        {
            "w": numbers(3, 2, 3, 3),
            "g": numbers(3),
            "b": numbers(3, seed=1),
            "m": numbers(3, seed=2),
            "v": numbers(3, seed=3) ** 2,
        },
        17,
    ),
    (
        "conv 1-D norm",
        [helper.make_node("Conv", ["x", "w"], ["h"]), node("BatchNormalization", "h g b m v")],
        [1, 2, 5],
        None,
        {
            "w": numbers(3, 2, 3),
            "g": numbers(3),
            "b": numbers(3, seed=1),
            "m": numbers(3, seed=2),
            "v": numbers(3, seed=3) ** 2,
        },
        17,
    ),
    (
        "max pool",
        [node("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])],
        [1, 2, 6, 6],
        None,
        {},
        17,
    ),
    (
        "max pool ceil",
        [node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
        [1, 2, 6, 6],
        None,
        {},
        17,
    ),
    ("max pool dilated", [node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2])], [1, 2, 6, 6], None, {}, 17),
    ("max pool 1-D", [node("MaxPool", "x", kernel_shape=[3], strides=[2])], [1, 2, 7], None, {}, 17),
    (
        "avg pool",
        [node("AveragePool", "x", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])],
        [1, 2, 6, 6],
        None,
        {},
        17,
    ),
    (
        "avg pool counting",
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        [1, 2, 6, 6],
        None,
        {},
        17,
    ),
    ("global avg", [node("GlobalAveragePool", "x")], [1, 2, 5, 6], None, {}, 17),
    ("global max", [node("GlobalMaxPool", "x")], [1, 2, 5, 6], None, {}, 17),
    ("mean", [node("ReduceMean", "x", axes=[2, 3], keepdims=0)], [1, 2, 5, 6], None, {}, 17),
    ("mean of channels", [node("ReduceMean", "x", axes=[1])], [1, 2, 5, 6], None, {}, 17),
    ("mean 18", [node("ReduceMean", "x a")], [1, 2, 5, 6], None, {"a": np.array([-1])}, 18),
    ("sum", [node("ReduceSum", "x a", keepdims=0)], [1, 2, 5], None, {"a": np.array([2])}, 17),
    ("flatten", [node("Flatten", "x")], [1, 2, 5], None, {}, 17),
    ("flatten 2", [node("Flatten", "x", axis=2)], [1, 2, 5], None, {}, 17),
    ("reshape", [node("Reshape", "x s")], [1, 2, 6], None, {"s": np.array([0, 3, -1])}, 17),
    ("transpose", [node("Transpose", "x", perm=[0, 2, 3, 1])], [1, 2, 3, 4], None, {}, 17),
    (
        "transpose batch",
        [helper.make_node("Transpose", ["x"], ["t"]), node("MatMul", "w t")],
        [1, 4],
        [3, 1],
        {"w": numbers(3, 4)},
        17,
    ),
    ("squeeze", [node("Squeeze", "x a")], [1, 2, 1, 3], None, {"a": np.array([2])}, 17),
    ("squeeze all", [node("Squeeze", "x")], [1, 2, 1, 3], [2, 3], {}, 17),
    ("squeeze old", [node("Squeeze", "x", axes=[1])], [1, 1, 3], None, {}, 9),
    ("unsqueeze", [node("Unsqueeze", "x a")], [1, 3], None, {"a": np.array([1, -1])}, 17),
    (
        "pad",
        [node("Pad", "x p v")],
        [1, 2, 3],
        None,
        {"p": np.array([0, 1, 2, 0, 0, 1]), "v": np.array(0.5, np.float32)},
        17,
    ),
    ("pad old", [node("Pad", "x", pads=[0, 1, 2, 0, 0, 1])], [1, 2, 3], None, {}, 9),
    ("concat", [helper.make_node("Relu", ["x"], ["h"]), node("Concat", "x h x", axis=1)], [1, 2, 3], [1, 6, 3], {}, 17),
    ("dropout", [node("Dropout", "x")], [1, 3], None, {}, 17),
    ("identity", [node("Identity", "x")], [1, 3], None, {}, 17),
    (
        "cast",
        [helper.make_node("Cast", ["x"], ["h"], to=TensorProto.DOUBLE), node("Cast", "h", to=TensorProto.FLOAT)],
        [1, 3],
        None,
        {},
        17,
    ),
    (
        "constant",
        [helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0]), node("Add", "x c")],
        [1, 3],
        None,
        {},
        17,
    ),
    (
        "weight turned",
        [helper.make_node("Transpose", ["w"], ["t"]), node("MatMul", "x t")],
        [1, 4],
        None,
        {"w": numbers(3, 4)},
        17,
    ),
    (
        "shape chain",
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["n"]),
            helper.make_node("Unsqueeze", ["n", "axis"], ["u"]),
            helper.make_node("Concat", ["u", "minus"], ["r"], axis=0),
            node("Reshape", "x r"),
        ],
        ["n", 2, 3],
        None,
        {"zero": np.array(0), "axis": np.array([0]), "minus": np.array([-1])},
        17,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_operators_agree_with_onnxruntime_and_come_back(tmp_path: Path, case: tuple) -> None:
    _, nodes, source, target, weights, opset = case
    path = written(tmp_path, nodes, source, target, weights, opset)
    network = io.load(path)
    x = np.random.default_rng(1).normal(size=(4, *network.input_shape)).astype(np.float32)
    agrees(path, x)
    io.save(network, tmp_path / "out.onnx")
    again = io.load(tmp_path / "out.onnx")
    assert again.sha256 == network.sha256
    agrees(tmp_path / "out.onnx", x)
    assert session(tmp_path / "out.onnx").get_inputs()[0].shape == session(path).get_inputs()[0].shape
    theirs, ours = run(path, x[:1]).shape, run(tmp_path / "out.onnx", x[:1]).shape
    assert theirs == ours
    with torch.no_grad():
        y = io.to_torch(network)(torch.from_numpy(x)).numpy()
    assert np.allclose(y, network.evaluate(x), rtol=1e-5, atol=1e-6)


def test_a_constant_after_a_product_is_its_bias(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), node("Add", "h b")]
    network = io.load(written(tmp_path, nodes, [1, 4], [1, 3], {"w": numbers(4, 3), "b": numbers(3)}))
    (only,) = network.nodes
    assert isinstance(only.op, Affine)
    assert np.array_equal(only.op.bias, numbers(3))


def test_but_not_where_the_product_has_other_readers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["k"]),
        node("Add", "h k"),
    ]
    path = written(tmp_path, nodes, [1, 4], [1, 3], {"w": numbers(4, 3), "b": numbers(3)})
    assert [n.op.kind for n in io.load(path).nodes] == ["Affine", "Scale", "Add"]
    agrees(path, numbers(3, 4, seed=4))


def test_a_norm_is_not_folded_where_the_layer_has_other_readers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "g", "b", "m", "v"], ["k"]),
        node("Add", "h k"),
    ]
    weights = {"w": numbers(2, 1, 2, 2)} | {n: np.abs(numbers(2, seed=i)) for i, n in enumerate("gbmv")}
    path = written(tmp_path, nodes, [1, 1, 3, 3], None, weights)
    assert [n.op.kind for n in io.load(path).nodes] == ["Conv2d", "Scale", "Add"]
    agrees(path, numbers(3, 1, 3, 3, seed=4))


def test_float64_models_stay_float64(tmp_path: Path) -> None:
    weights = {"w": numbers(4, 3).astype(np.float64) / 3}
    path = written(tmp_path, [node("MatMul", "x w")], [1, 4], [1, 3], weights, kind=TensorProto.DOUBLE)
    network = io.load(path)
    assert network.dtype == np.float64
    agrees(path, numbers(3, 4).astype(np.float64), 1e-14)
    io.save(network, tmp_path / "out.onnx")
    assert io.load(tmp_path / "out.onnx").sha256 == network.sha256


def test_float16_models_are_widened_and_noted(tmp_path: Path) -> None:
    weights = {"w": numbers(4, 3).astype(np.float16)}
    network = io.load(written(tmp_path, [node("MatMul", "x w")], [1, 4], [1, 3], weights, kind=TensorProto.FLOAT16))
    assert network.dtype == np.float32
    assert np.array_equal(network.nodes[0].op.weight, weights["w"].T.astype(np.float32))
    assert any("float16" in n for n in network.notes)


def test_an_inexact_reciprocal_is_noted(tmp_path: Path) -> None:
    inexact = io.load(written(tmp_path, [node("Div", "x c")], [1, 4], [1, 4], {"c": np.float32(3)}))
    exact = io.load(written(tmp_path, [node("Div", "x c")], [1, 4], [1, 4], {"c": np.float32(0.25)}))
    assert "reciprocal" in inexact.notes[0]
    assert exact.notes == ()


def test_old_opsets_are_converted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], broadcast=1),
        helper.make_node("Relu", ["h"], ["k"]),
        helper.make_node("Dropout", ["k"], ["d"], is_test=1),
        helper.make_node("Add", ["d", "b"], ["y"], broadcast=1),
    ]
    network = io.load(written(tmp_path, nodes, [1, 4], [1, 3], {"w": numbers(4, 3), "b": numbers(3)}, 6))
    x = numbers(5, 4, seed=2)
    assert np.allclose(network.evaluate(x), np.maximum(x @ numbers(4, 3) + numbers(3), 0) + numbers(3), atol=1e-6)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Relu", ["a"], ["h"]), helper.make_node("Add", ["h", "h"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    graph = helper.make_graph([helper.make_node("Twice", ["x"], ["y"], domain="own")], "g",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])])
    model = helper.make_model(
        graph,
        functions=[body],
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )
    onnx.save(model, tmp_path / "m.onnx")
    agrees(tmp_path / "m.onnx", numbers(3, 3))


def test_names_and_axes_are_kept_or_made_up() -> None:
    network = io.load(nn.Sequential(nn.Linear(2, 2)))
    assert network.interface == Interface()


def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.norm(self.first((x - 0.5) / 0.25)))
            h = torch.relu(self.second(h) + h)
            return self.last(torch.flatten(nn.functional.adaptive_avg_pool2d(h, 1), 1))

    torch.manual_seed(1)
    model = Residual().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_pytorch_exports_is_read(tmp_path: Path, dynamo: bool) -> None:
    model, x = residual(), torch.randn(3, 2, 6, 6)
    options: dict = (
        {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if dynamo else {"dynamic_axes": {"image": {0: "n"}}}
    )
    torch.onnx.export(
        model, (x,), tmp_path / "m.onnx", dynamo=dynamo, input_names=["image"], output_names=["scores"], **options
    )
    network = io.load(tmp_path / "m.onnx")
    with torch.no_grad():
        truth = model(x).numpy()
    assert np.abs(network.evaluate(x.numpy()) - truth).max() < 1e-5
    io.save(network, tmp_path / "out.onnx")
    runner = session(tmp_path / "out.onnx")
    assert [i.name for i in runner.get_inputs()] == ["image"]
    assert np.abs(runner.run(["scores"], {"image": x.numpy()})[0] - truth).max() < 1e-5


def test_a_dag_comes_back_in_every_format(tmp_path: Path) -> None:
    network = io.load(residual(), input_shape=(2, 6, 6))
    x = np.random.default_rng(0).normal(size=(2, 2, 6, 6)).astype(np.float32)
    with torch.no_grad():
        assert np.abs(network.evaluate(x) - residual()(torch.from_numpy(x)).numpy()).max() < 1e-5
    for name in ("out.onnx", "out.pt2", "out.npz"):
        io.save(network, tmp_path / name)
        assert io.load(tmp_path / name).sha256 == network.sha256, name


def layers(*widths: int) -> list[Node]:
    """Affine layers of these widths, zeros allowed."""
    pairs = pairwise(widths)
    return [
        Node(f"l{i}", Affine(numbers(b, a, seed=i), numbers(b, seed=9 + i)), (i - 1,)) for i, (a, b) in enumerate(pairs)
    ]


@pytest.mark.parametrize("name", ["out.onnx", "out.pt", "out.pt2"])
@pytest.mark.parametrize("widths", [(3, 0, 2), (3, 2, 0, 0, 2)])
def test_layers_without_neurons_can_be_saved(tmp_path: Path, name: str, widths: tuple[int, ...]) -> None:
    network = build(layers(*widths), (3,), np.float32)
    io.save(network, tmp_path / name)
    x = numbers(4, 3, seed=5)
    again = io.load(tmp_path / name)
    assert np.array_equal(again.evaluate(x), network.evaluate(x))
    assert again.input_shape == (3,)


@pytest.mark.parametrize("name", ["out.onnx", "out.pt2"])
def test_empty_images_can_be_saved(tmp_path: Path, name: str) -> None:
    empty = Conv2d(np.zeros((0, 2, 3, 3), np.float32), np.zeros(0, np.float32), padding=(1, 1, 1, 1))
    full = Conv2d(np.zeros((3, 0, 1, 1), np.float32), numbers(3))
    scale = Scale(np.zeros((0, 1, 1), np.float32), np.zeros((0, 1, 1), np.float32))
    nodes = [
        Node("a", empty, (INPUT,)),
        Node("s", scale, (0,)),
        Node("b", full, (1,)),
        Node("c", Conv2d(numbers(3, 2, 1, 1), numbers(3)), (INPUT,)),
        Node("d", Add(), (2, 3)),
        Node("r", Reshape((0,)), (1,)),
        Node("e", Affine(np.zeros((48, 0), np.float32), numbers(48)), (5,)),
        Node("q", Reshape((3, 4, 4)), (6,)),
        Node("f", Add(), (4, 7)),
    ]
    network = build(nodes, (2, 4, 4), np.float32)
    io.save(network, tmp_path / name)
    x = numbers(2, 2, 4, 4, seed=3)
    assert np.allclose(io.load(tmp_path / name).evaluate(x), network.evaluate(x), rtol=1e-6)


@pytest.mark.parametrize("name", ["out.onnx", "out.pt", "out.pt2"])
def test_constant_and_empty_networks_keep_their_interface(tmp_path: Path, name: str) -> None:
    constant = build([Node("c", Affine(np.zeros((2, 3), np.float32), numbers(2)), (INPUT,))], (3,), np.float32)
    nothing = build([], (3,), np.float32)
    for network in (constant, nothing):
        io.save(network, tmp_path / name)
        x = numbers(4, 3)
        again = io.load(tmp_path / name, input_shape=(3,))
        assert np.array_equal(again.evaluate(x), network.evaluate(x))
        assert again.sha256 == network.sha256


def test_scales_have_a_sequential_form(tmp_path: Path) -> None:
    shapes = [((2, 3, 3), (2, 1, 1)), ((2, 3, 3), ()), ((2, 3, 3), (3,)), ((4,), (4,)), ((2, 3), (2, 1))]
    for shape, part in shapes:
        network = build([Node("s", Scale(numbers(*part), numbers(*part, seed=1)), (INPUT,))], shape, np.float32)
        io.save(network, tmp_path / "out.pt")
        x = numbers(3, *shape, seed=2)
        assert np.allclose(io.load(tmp_path / "out.pt", input_shape=shape).evaluate(x), network.evaluate(x), rtol=1e-6)
        assert np.allclose(
            torch.load(tmp_path / "out.pt", weights_only=False)(torch.from_numpy(x)).detach(),
            network.evaluate(x),
            rtol=1e-6,
        )


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exactprune.io import atomic

    path = tmp_path / "out.txt"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]
    path.chmod(0o640)
    atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    plain = tmp_path / "plain"
    plain.touch()
    atomic.write_text(tmp_path / "fresh", "x")
    assert (tmp_path / "fresh").stat().st_mode == plain.stat().st_mode


def test_importing_loads_neither_torch_nor_onnx() -> None:
    import subprocess
    import sys

    code = "import sys, exactprune.io; sys.exit(any(m in sys.modules for m in ('torch', 'onnx')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pt_files_are_read_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.save(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tmp_path / "m.pt")
    code = "import sys; from exactprune import io; print(io.load(sys.argv[1]).neurons, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
