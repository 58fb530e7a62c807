"""Files that must be refused: one line that names the place and the remedy, nothing run, no memory taken."""

from __future__ import annotations

import io as streams
import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils import prune

from exactprune import io
from exactprune.errors import (
    ExactPruneError,
    LoadError,
    OptionError,
    ShapeError,
    UnsupportedOpError,
    WeightError,
)


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()


def refused(
    path: Path, kind: type[ExactPruneError] | tuple[type[ExactPruneError], ...], *words: str, **options: object
) -> None:
    """Loading raises exactly ``kind``, in one line with the file's name and ``words``."""
    with pytest.raises(kind) as caught:
        io.load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path)), text
    assert text.count(str(path)) == 1, text
    for word in words:
        assert word in text, text


def saved(model: object, folder: Path) -> Path:
    torch.save(model, folder / "m.pt")
    return folder / "m.pt"


def rewritten(path: Path, change) -> Path:
    """The archive with ``change(name, data)`` applied to every member (None drops it)."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            new = change(name, data)
            if new is not None:
                archive.writestr(name, new)
    return path


@pytest.mark.parametrize("suffix", ["pt", "pth", "pt2", "onnx", "npz", "safetensors"])
class TestAnyFormat:
    def test_missing(self, tmp_path: Path, suffix: str) -> None:
        refused(tmp_path / f"no.{suffix}", LoadError, "No such file", "check the name")

    def test_folder(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"d.{suffix}").mkdir()
        refused(tmp_path / f"d.{suffix}", LoadError, "is a folder")

    def test_empty(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"e.{suffix}").touch()
        refused(tmp_path / f"e.{suffix}", LoadError, "is empty")

    def test_text(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"t.{suffix}"
        path.write_text("this is no model, but it is longer than eight bytes\n" * 20)
        refused(path, LoadError)

    def test_every_truncation(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"cut.{suffix}"
        whole = example(suffix, tmp_path)
        sizes = sorted({1, 7, 100, len(whole) // 3, len(whole) // 2, len(whole) - 200, len(whole) - 1})
        for size in sizes:
            path.write_bytes(whole[:size])
            refused(path, LoadError)

    def test_flipped_bytes_give_a_network_or_one_error(self, tmp_path: Path, suffix: str) -> None:
        whole = example(suffix, tmp_path)
        rng = np.random.default_rng(0)
        path = tmp_path / f"flip.{suffix}"
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 3):
                data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            try:
                io.load(path, arch="4-3-2" if suffix == "safetensors" else None)
            except ExactPruneError as error:
                assert "\n" not in str(error)


def example(suffix: str, folder: Path) -> bytes:
    path = folder / f"example.{suffix}"
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file(sequential().state_dict(), path)
    else:
        io.save(io.load(sequential()), path)
    return path.read_bytes()


def test_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_text("x")
    refused(tmp_path / "m.h5", LoadError, ".onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = saved(sequential(), tmp_path)
    path.chmod(0)
    refused(path, LoadError, "permissions")


class Runs:
    """Pickles as a call of ``touch``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class TestPickles:
    def test_code_is_not_run(self, tmp_path: Path) -> None:
        path = saved(Runs(tmp_path / "ran"), tmp_path)
        refused(path, LoadError, "system", "nothing was run")
        assert not (tmp_path / "ran").exists()

    def test_code_inside_a_layer_is_not_run(self, tmp_path: Path) -> None:
        model = sequential()
        model[1].note = Runs(tmp_path / "ran")
        refused(saved(model, tmp_path), LoadError, "system")
        assert not (tmp_path / "ran").exists()

    def test_plain_pickle(self, tmp_path: Path) -> None:
        path = tmp_path / "m.pt"
        path.write_bytes(pickle.dumps({"a": 1}))
        refused(path, LoadError, "torch archive")

    def test_legacy_format(self, tmp_path: Path) -> None:
        path = tmp_path / "m.pt"
        torch.save(sequential(), path, _use_new_zipfile_serialization=False)
        refused(path, LoadError, "torch >= 1.6")

    def test_calling_a_layer_class_is_refused(self, tmp_path: Path) -> None:
        program = b"\x80\x02ctorch.nn.modules.linear\nLinear\nJ\x00\x00\x00\x70J\x00\x00\x00\x70\x86R."
        path = rewritten(saved(sequential(), tmp_path), lambda n, d: program if n.endswith("data.pkl") else d)
        refused(path, LoadError, "from arguments")

    def test_changing_a_rebuild_function_is_refused(self, tmp_path: Path) -> None:
        program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00_callK\x01sb."
        path = rewritten(saved(sequential(), tmp_path), lambda n, d: program if n.endswith("data.pkl") else d)
        refused(path, LoadError, "change a function")

    @pytest.mark.parametrize(
        "program",
        [
            b"\x80\x02K\x01r\xff\xff\xff\x7f.",
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00.",
            b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
            b"\x80\x02" + b"(" * 50 + b".",
            b"\x80\x02h\x05.",
            b"",
            b".",
        ],
    )
    def test_pickles_that_grab_memory_or_break(self, tmp_path: Path, program: bytes) -> None:
        path = rewritten(saved(sequential(), tmp_path), lambda n, d: program if n.endswith("data.pkl") else d)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(path, LoadError)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000

    def test_shared_layers_that_double_at_every_level_end(self, tmp_path: Path) -> None:
        layer: nn.Module = nn.ReLU()
        for _ in range(40):
            layer = nn.Sequential(layer, layer)
        refused(saved(layer, tmp_path), LoadError, "more than")

    def test_zero_stride_giant(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2, bias=False))
        model[0].weight = nn.Parameter(torch.zeros(1).expand(200_000, 200_000))
        refused(saved(model, tmp_path), LoadError, "does not lie in its storage")

    def test_deflated_bomb(self, tmp_path: Path) -> None:
        path = tmp_path / "m.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m/data.pkl", b"\x00" * (150 << 20))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(path, LoadError, "compressed")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000

    def test_storage_shorter_than_promised(self, tmp_path: Path) -> None:
        path = rewritten(saved(sequential(), tmp_path), lambda n, d: d[:-4] if n.endswith("data/0") else d)
        refused(path, LoadError, "storage 0")

    def test_storage_missing(self, tmp_path: Path) -> None:
        path = rewritten(saved(sequential(), tmp_path), lambda n, d: None if n.endswith("data/0") else d)
        refused(path, LoadError, "data/0")

    def test_two_members_of_one_name(self, tmp_path: Path) -> None:
        path = saved(sequential(), tmp_path)
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
            archive.writestr("m/data/0", b"\x00" * 48)
        refused(path, LoadError, "two members")

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_every_pickle_protocol_is_read(self, tmp_path: Path, protocol: int) -> None:
        model = sequential()
        torch.save(model, tmp_path / "m.pt", pickle_protocol=protocol)
        assert io.load(tmp_path / "m.pt").sha256 == io.load(model).sha256

    def test_torchscript(self, tmp_path: Path) -> None:
        path = tmp_path / "m.pt"
        torch.jit.trace(sequential(), torch.zeros(1, 4)).save(str(path))
        refused(path, LoadError, "TorchScript")


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def changed(layer: nn.Module, **settings: object) -> nn.Module:
    """A layer with settings that its constructor would refuse."""
    layer.__dict__.update(settings)
    return layer


class TestModels:
    def test_a_class_of_its_own(self, tmp_path: Path) -> None:
        refused(saved(nn.Sequential(Doubling(2, 2)), tmp_path), LoadError, "Doubling")

    def test_hooks(self, tmp_path: Path) -> None:
        model = sequential()
        model[0].register_forward_hook(print)
        refused(saved(model, tmp_path), LoadError)

    def test_pruning_hooks(self, tmp_path: Path) -> None:
        model = sequential()
        prune.l1_unstructured(model[0], "weight", 2)
        refused(saved(model, tmp_path), LoadError, "prune.remove")

    def test_a_forward_of_its_own(self, tmp_path: Path) -> None:
        model = sequential()
        model[0].__dict__["forward"] = nn.ReLU()
        refused(saved(model, tmp_path), LoadError, "forward")

    def test_a_weight_that_hides_the_parameter(self, tmp_path: Path) -> None:
        model = sequential()
        model[0].__dict__["weight"] = torch.zeros(3, 4)
        refused(saved(model, tmp_path), LoadError, "layer '0'")

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Softmax(1),
            nn.LogSoftmax(1),
            nn.Sigmoid(),
            nn.LeakyReLU(),
            nn.LSTM(2, 2),
            nn.GELU(),
            nn.ConvTranspose2d(1, 1, 1),
            nn.Softmax2d(),
            nn.LayerNorm(2),
        ],
    )
    def test_unknown_layers_are_named(self, tmp_path: Path, layer: nn.Module) -> None:
        model = nn.Sequential(nn.Linear(4, 2), layer)
        refused(saved(model, tmp_path), UnsupportedOpError, "'1'", type(layer).__name__)

    def test_softmax_says_what_to_do(self, tmp_path: Path) -> None:
        refused(
            saved(nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)), tmp_path),
            UnsupportedOpError,
            "without its final Softmax",
        )

    @pytest.mark.parametrize("layer", [
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d(2, divisor_override=3), nn.AdaptiveAvgPool2d(4), nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.ZeroPad2d(-1), nn.Flatten(0), changed(nn.MaxPool2d(2), padding=2), changed(nn.AvgPool2d(2), padding=3),
        changed(nn.MaxPool2d(2), stride=0)])
    def test_unknown_settings_are_named(self, tmp_path: Path, layer: nn.Module) -> None:
        refused(saved(nn.Sequential(layer), tmp_path), UnsupportedOpError, "'0'", input_shape=(1, 6, 6))

    @pytest.mark.parametrize(
        "layer",
        [
            changed(nn.Conv2d(1, 1, 2), stride="wide"),
            changed(nn.Conv2d(1, 1, 2), stride=(1, 2, 3)),
            changed(nn.Flatten(), start_dim=None),
            changed(nn.Conv2d(1, 1, 2), padding=(-1, 0)),
            changed(nn.Conv2d(1, 1, 2), groups=0),
            changed(nn.Conv2d(1, 1, 2), groups=7),
            changed(nn.BatchNorm2d(1).eval(), eps="small"),
            changed(nn.ZeroPad2d(1), padding=(1, "a", 0, 0)),
            changed(nn.Conv2d(1, 1, 2), dilation={1}),
            changed(nn.MaxPool2d(2), kernel_size=None),
            changed(nn.Conv2d(1, 1, 2), dilation=1 << 70),
        ],
    )
    def test_settings_that_make_no_sense(self, tmp_path: Path, layer: nn.Module) -> None:
        refused(
            saved(nn.Sequential(layer), tmp_path), (LoadError, UnsupportedOpError, ShapeError), input_shape=(1, 6, 6)
        )

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("name", ["m.pt", "m.onnx", "m.pt2"])
    def test_weights_that_are_not_finite(self, tmp_path: Path, value: float, name: str) -> None:
        network = io.load(sequential())
        io.save(network, tmp_path / name)
        if name == "m.pt":
            model = sequential()
            with torch.no_grad():
                model[2].weight[0, :2] = value
            saved(model, tmp_path)
        elif name == "m.onnx":
            proto = onnx.load(tmp_path / name)
            weight = numpy_helper.to_array(proto.graph.initializer[2]).copy()
            weight[0, :2] = value
            proto.graph.initializer[2].CopyFrom(numpy_helper.from_array(weight, proto.graph.initializer[2].name))
            onnx.save(proto, tmp_path / name)
        else:
            model = sequential()
            with torch.no_grad():
                model[2].weight[0, :2] = value
            torch.export.save(torch.export.export(model, (torch.zeros(1, 4),)), tmp_path / name)
        refused(tmp_path / name, WeightError, "2 of 6 values of weight", "NaN or infinite")

    def test_batch_norm_in_training_mode(self, tmp_path: Path) -> None:
        refused(
            saved(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), tmp_path),
            UnsupportedOpError,
            "'1'",
            "model.eval()",
        )

    def test_batch_norm_without_statistics(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
        refused(saved(model, tmp_path), UnsupportedOpError, "model.eval()")

    def test_batch_norm_with_bad_statistics(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
        model[1].running_var[0] = -1
        refused(saved(model, tmp_path), WeightError, "'1'", "var + eps")
        model[1].running_var[0] = np.nan
        refused(saved(model, tmp_path), WeightError, "'1'", "1 of 2 values of var")

    def test_modules_in_training_mode_are_refused_too(self) -> None:
        with pytest.raises(UnsupportedOpError, match=r"eval\(\)"):
            io.load(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))

    def test_convolution_without_input_shape(self, tmp_path: Path) -> None:
        refused(saved(nn.Sequential(nn.Conv2d(1, 1, 2)), tmp_path), ShapeError, "--input-shape C,H,W")

    def test_wrong_input_shape(self, tmp_path: Path) -> None:
        path = saved(nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten(), nn.Linear(9, 2)), tmp_path)
        assert io.load(path, input_shape=(1, 4, 4)).output_shape == (2,)
        refused(path, ShapeError, "'2'", input_shape=(1, 5, 5))
        refused(path, ShapeError, "'0'", input_shape=(2, 4, 4))
        with pytest.raises(OptionError, match="positive"):
            io.load(path, input_shape=(0, 4, 4))

    def test_state_dict_without_architecture(self, tmp_path: Path) -> None:
        refused(saved(sequential().state_dict(), tmp_path), LoadError, "--arch")

    @pytest.mark.parametrize("arch", ["4-2", "4-3-3", "4-3-2-2"])
    def test_state_dict_with_another_architecture(self, tmp_path: Path, arch: str) -> None:
        refused(saved(sequential().state_dict(), tmp_path), LoadError, arch, arch=arch)

    @pytest.mark.parametrize("arch", ["4", "4-x-2", "", "4--2", "0-2"])
    def test_architectures_that_make_no_sense(self, tmp_path: Path, arch: str) -> None:
        refused(saved(sequential().state_dict(), tmp_path), OptionError, "784-100-100-10", arch=arch)

    def test_state_dict_that_does_not_fit_the_example(self, tmp_path: Path) -> None:
        refused(
            saved(sequential().state_dict(), tmp_path), LoadError, "does not fit", arch=nn.Sequential(nn.Linear(4, 2))
        )

    def test_safetensors_keep_no_order_so_names_must(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        model = nn.Sequential(*[m for i in range(12) for m in (nn.Linear(3, 3), nn.ReLU())][:-1]).eval()
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        assert io.load(tmp_path / "m.safetensors", arch="-".join("3" * 13)).sha256 == io.load(model).sha256
        named = {
            f"{k}.{f}": v for k, m in zip(("in", "out"), model[::2], strict=False) for f, v in m.state_dict().items()
        }
        save_file(named, tmp_path / "n.safetensors")
        refused(tmp_path / "n.safetensors", LoadError, "order", arch="3-3-3")

    def test_files_that_hold_something_else(self, tmp_path: Path) -> None:
        refused(saved([1, 2], tmp_path), LoadError, "not a model")
        refused(saved(OrderedDict(), tmp_path), LoadError, "not a model")
        refused(saved(torch.zeros(3), tmp_path), LoadError, "not a model")

    def test_integer_and_complex_weights(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        refused(saved(model, tmp_path), WeightError, "'0'", "int64")

    def test_objects_that_are_no_models(self) -> None:
        with pytest.raises(OptionError, match="int was given"):
            io.load(3)  # type: ignore[arg-type]


def model_of(
    nodes: list,
    source: list,
    target: list,
    weights: dict[str, np.ndarray],
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
):
    """An ONNX model from x to y."""
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, source)],
                              [helper.make_tensor_value_info("y", kind, target)],
                              [numpy_helper.from_array(a, n) for n, a in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class TestOnnx:
    @pytest.mark.parametrize("kind", ["Sigmoid", "Softmax", "LeakyRelu", "Tanh", "Exp"])
    def test_unknown_operators_are_named(self, tmp_path: Path, kind: str) -> None:
        proto = model_of([helper.make_node(kind, ["x"], ["y"], name="odd")], [1, 2], [1, 2], {})
        onnx.save(proto, tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", UnsupportedOpError, "'odd'", kind)

    def test_products_of_two_tensors(self, tmp_path: Path) -> None:
        onnx.save(
            model_of([helper.make_node("Mul", ["x", "x"], ["y"], name="sq")], [1, 2], [1, 2], {}), tmp_path / "m.onnx"
        )
        refused(tmp_path / "m.onnx", UnsupportedOpError, "'sq'", "two computed tensors")

    def test_dynamic_shapes(self, tmp_path: Path) -> None:
        onnx.save(
            model_of([helper.make_node("Relu", ["x"], ["y"])], ["n", "c", 3], ["n", "c", 3], {}), tmp_path / "m.onnx"
        )
        refused(tmp_path / "m.onnx", ShapeError, "dynamic", "--input-shape")
        assert io.load(tmp_path / "m.onnx", input_shape=(2, 3)).neurons == 6
        refused(tmp_path / "m.onnx", ShapeError, "does not fit", input_shape=(2, 4))

    def test_batch_norm_in_training_mode(self, tmp_path: Path) -> None:
        ones = {n: np.ones(2, np.float32) for n in "gbmv"}
        node = helper.make_node(
            "BatchNormalization", ["x", "g", "b", "m", "v"], ["y", "mm", "vv"], name="bn", training_mode=1
        )
        onnx.save(model_of([node], [1, 2], [1, 2], ones), tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", UnsupportedOpError, "'bn'", "eval()")

    def test_giant_constants(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]
        onnx.save(model_of(nodes, [1, 2], [1, 2], {"s": np.array([1 << 40], np.int64)}), tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", ShapeError, "too large")

    def test_weights_that_do_not_fill_their_shape(self, tmp_path: Path) -> None:
        proto = model_of([helper.make_node("Add", ["x", "c"], ["y"])], [1, 2], [1, 2], {"c": np.ones(2, np.float32)})
        proto.graph.initializer[0].dims[:] = [1 << 30, 1 << 10]
        onnx.save(proto, tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", (LoadError, WeightError))

    def test_constants_that_enlarge(self, tmp_path: Path) -> None:
        proto = model_of(
            [helper.make_node("Add", ["x", "c"], ["y"], name="a")], [1, 2], [3, 2], {"c": np.ones((3, 1), np.float32)}
        )
        onnx.save(proto, tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", UnsupportedOpError, "'a'", "enlarges")

    def test_reducing_the_batch(self, tmp_path: Path) -> None:
        onnx.save(
            model_of([helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], name="r")], ["n", 2], [1, 2], {}),
            tmp_path / "m.onnx",
        )
        refused(tmp_path / "m.onnx", UnsupportedOpError, "'r'", "batch")

    def test_several_inputs(self, tmp_path: Path) -> None:
        proto = model_of([helper.make_node("Add", ["x", "z"], ["y"])], [1, 2], [1, 2], {})
        proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2]))
        onnx.save(proto, tmp_path / "m.onnx")
        refused(tmp_path / "m.onnx", UnsupportedOpError, "'z'")

    def test_external_data_that_is_missing(self, tmp_path: Path) -> None:
        proto = model_of([helper.make_node("Add", ["x", "c"], ["y"])], [1, 2], [1, 2], {"c": np.ones(2, np.float32)})
        onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        (tmp_path / "w.bin").unlink()
        refused(tmp_path / "m.onnx", LoadError)


def test_dynamic_shapes_in_pt2(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()).eval()
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h")}
    torch.export.save(
        torch.export.export(model, (torch.zeros(2, 1, 4, 4),), dynamic_shapes=(dims,)), tmp_path / "m.pt2"
    )
    refused(tmp_path / "m.pt2", ShapeError, "dynamic")
    assert io.load(tmp_path / "m.pt2", input_shape=(1, 5, 4)).neurons == 20
    refused(tmp_path / "m.pt2", ShapeError, "does not fit", input_shape=(1, 5, 5))


def test_a_pt2_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(sequential(), (torch.zeros(1, 4),)), path)
    stream = streams.BytesIO()
    torch.save(Runs(tmp_path / "ran"), stream)
    rewritten(path, lambda n, d: stream.getvalue() if n.endswith("sample_inputs/model.pt") else d)
    assert io.load(path).neurons == 3
    assert not (tmp_path / "ran").exists()


def test_untraceable_modules_are_named() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedOpError, match="Branching"):
        io.load(Branching(), input_shape=(3,))


class TestSaving:
    def test_residual_networks_have_no_sequential_form(self, tmp_path: Path) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.relu(self.layer(x)) + x

        network = io.load(Residual(), input_shape=(3,))
        with pytest.raises(UnsupportedOpError, match=r"\.onnx or \.pt2"):
            io.save(network, tmp_path / "out.pt")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["out", "out.h5", "out.pickle"])
    def test_unknown_endings(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OptionError, match=r"\.onnx"):
            io.save(io.load(sequential()), tmp_path / name)

    @pytest.mark.parametrize("suffix", ["pt", "onnx", "pt2", "npz"])
    def test_no_such_folder(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(OptionError, match="existing, writable folder"):
            io.save(io.load(sequential()), tmp_path / "no" / f"out.{suffix}")

    def test_over_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "d.onnx").mkdir()
        with pytest.raises(OptionError, match="is a folder"):
            io.save(io.load(sequential()), tmp_path / "d.onnx")
