"""Modules through torch.export and .pt2 files: each operator against PyTorch, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from exactprune import io
from exactprune.errors import ExactPruneError, LoadError, ShapeError, UnsupportedOpError
from exactprune.io.pt2 import load_pt2

torch.set_num_threads(1)
WEIGHT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
KERNEL = torch.randn(2, 2, 3, 2, generator=torch.Generator().manual_seed(1))


class Wrapped(nn.Module):
    """A function as a module, with a weight, a buffer and a plain tensor of its own."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(WEIGHT.clone())
        self.register_buffer("kernel", KERNEL.clone())
        self.shift = torch.tensor([0.5, -1.0, 2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


VECTOR, SIGNAL, IMAGE = (4,), (2, 7), (2, 6, 6)
CASES = [
    ("linear", VECTOR, lambda s, x: functional.linear(x, s.weight, s.shift)),
    ("matmul", VECTOR, lambda s, x: x @ s.weight.T),
    ("matmul add", VECTOR, lambda s, x: x @ s.weight.T + s.shift),
    ("addmm", VECTOR, lambda s, x: torch.addmm(s.shift, x, s.weight.T)),
    ("from the left", VECTOR, lambda s, x: (s.weight @ x.T).T),
    ("vector", VECTOR, lambda s, x: (x @ s.weight[0]).unsqueeze(1)),
    ("rows", (5, 4), lambda s, x: functional.linear(x, s.weight, s.shift)),
    ("numbers", VECTOR, lambda s, x: (2 * (x - 0.5) / 3 + 1).neg() * 0.1),
    ("from a number", VECTOR, lambda s, x: 1 - x),
    ("from a constant", VECTOR, lambda s, x: s.weight[0] - x),
    ("difference", VECTOR, lambda s, x: torch.relu(x) - x),
    ("sum of three", VECTOR, lambda s, x: x + torch.relu(x) + x),
    ("clamp", VECTOR, lambda s, x: x.clamp(min=0)),
    ("clamp_min", VECTOR, lambda s, x: torch.clamp_min(x, 0)),
    ("threshold", VECTOR, lambda s, x: functional.threshold(x, 0, 0)),
    ("in place", VECTOR, lambda s, x: (x * 2).relu_().add_(1)),
    ("conv", IMAGE, lambda s, x: functional.conv2d(x, s.kernel, s.shift[:2], (2, 1), (1, 0), (1, 2))),
    ("conv same", IMAGE, lambda s, x: functional.conv2d(x, s.kernel, padding="same")),
    ("conv groups", IMAGE, lambda s, x: functional.conv2d(x, s.kernel[:, :1], groups=2)),
    ("conv 1-D", SIGNAL, lambda s, x: functional.conv1d(x, s.kernel[:, :, 0], stride=2, padding=1)),
    ("norm", IMAGE, lambda s, x: functional.batch_norm(x, s.shift[:2], s.shift[1:].abs(), s.shift[:2], s.shift[1:])),
    ("max pool", IMAGE, lambda s, x: functional.max_pool2d(x, 3, 2, 1)),
    ("max pool ceil", IMAGE, lambda s, x: functional.max_pool2d(x, 3, 2, ceil_mode=True)),
    ("max pool 1-D", SIGNAL, lambda s, x: functional.max_pool1d(x, 2)),
    ("avg pool", IMAGE, lambda s, x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("avg pool 1-D", SIGNAL, lambda s, x: functional.avg_pool1d(x, 3)),
    ("adaptive", IMAGE, lambda s, x: functional.adaptive_avg_pool2d(x, (3, 1))),
    ("adaptive 1-D", (2, 8), lambda s, x: functional.adaptive_avg_pool1d(x, 4)),
    ("mean", IMAGE, lambda s, x: x.mean((2, 3))),
    ("mean of channels", IMAGE, lambda s, x: x.mean(1, keepdim=True)),
    ("sum", IMAGE, lambda s, x: x.sum((-1, 1))),
    ("flatten", IMAGE, lambda s, x: x.flatten(1)),
    ("view", IMAGE, lambda s, x: x.view(x.size(0), -1, 4)),
    ("unflatten", VECTOR, lambda s, x: x.unflatten(1, (2, -1))),
    ("permute", IMAGE, lambda s, x: x.permute(0, 2, 3, 1).contiguous()),
    ("transpose", SIGNAL, lambda s, x: x.transpose(1, 2)),
    ("squeeze", VECTOR, lambda s, x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(2)),
    ("pad", IMAGE, lambda s, x: functional.pad(x, (1, 0, 2, 1), value=0.5)),
    ("cat", IMAGE, lambda s, x: torch.cat([x, torch.relu(x), x], 1)),
    ("cat of columns", IMAGE, lambda s, x: torch.cat([x, torch.relu(x)], -1)),
    ("dropout", VECTOR, lambda s, x: functional.dropout(x, 0.5, s.training)),
    ("cast", VECTOR, lambda s, x: x.double().float()),
    ("folded constants", VECTOR, lambda s, x: x * torch.arange(4).float() + s.weight.sum(0) / s.shift.sum()),
    ("normalised weight", VECTOR, lambda s, x: functional.linear(x, s.weight / s.weight.norm())),
]


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_operators_agree_with_torch(case: tuple) -> None:
    _, shape, function = case
    model = Wrapped(function).eval()
    network = io.load(model, input_shape=shape)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        truth, again = model(x.clone()).numpy(), io.to_torch(network)(x).numpy()
    ours = network.evaluate(x.numpy())
    assert ours.shape == truth.shape == again.shape
    assert np.allclose(ours, truth, rtol=1e-5, atol=1e-5)
    assert np.allclose(again, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda s, x: torch.sigmoid(x), "sigmoid"),
        (lambda s, x: x * x, "two computed tensors"),
        (lambda s, x: x @ x.T, "two computed tensors"),
        (lambda s, x: torch.softmax(x, 1), "without its final softmax"),
        (lambda s, x: x.clamp(0, 6), "clamps to"),
        (lambda s, x: functional.leaky_relu(x), "leaky_relu"),
        (lambda s, x: x[:, :2], "slice"),
        (lambda s, x: x.sum(0), "batch"),
        (lambda s, x: functional.relu6(x), "relu6"),
        (lambda s, x: s.weight, "does not depend"),
        (lambda s, x: (x, x + 1), "2 outputs"),
        (lambda s, x: x / x, "division by a constant"),
        (lambda s, x: x / 0, "divides by zero"),
        (lambda s, x: x.half(), "casts"),
        (lambda s, x: x + torch.relu(x)[:, :, None], "equal sizes"),
    ],
)
def test_what_is_not_supported_is_named(function: Callable, words: str) -> None:
    with pytest.raises(ExactPruneError) as caught:
        io.load(Wrapped(function).eval(), input_shape=VECTOR)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def exported(model: nn.Module, example: torch.Tensor, path: Path, dynamic: bool) -> Path:
    dims = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=dims), path)
    return path


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_pt2_files_with_any_batch_axis_give_the_same_network(tmp_path: Path, dynamic: bool, decomposed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)
    ).eval()
    example = torch.randn(2 if dynamic else 1, 1, 6, 6)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("b")},) if dynamic else None)
    if decomposed:
        program = program.run_decompositions()
    torch.export.save(program, tmp_path / "m.pt2")
    network = io.load(tmp_path / "m.pt2")
    assert network.sha256 == io.load(model, input_shape=(1, 6, 6)).sha256
    with torch.no_grad():
        assert np.allclose(network.evaluate(example.numpy()), model(example).numpy(), atol=1e-6)


def test_weights_that_share_a_storage(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[2].weight = nn.Parameter(model[0].weight[1:3])
    network = io.load(exported(model, torch.zeros(1, 4), tmp_path / "m.pt2", False))
    assert np.array_equal(network.nodes[2].op.weight, model[0].weight[1:3].detach().numpy())


def test_a_fixed_batch_is_part_of_the_input_and_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    network = io.load(exported(model, torch.zeros(5, 4), tmp_path / "m.pt2", False))
    assert network.input_shape == (5, 4)
    assert "first axis" in network.notes[0]
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert np.allclose(network.evaluate(x.numpy()), model(x).numpy(), atol=1e-6)


def test_a_convolution_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    path = exported(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), torch.zeros(5, 1, 2, 2), tmp_path / "m.pt2", False)
    with pytest.raises(ShapeError, match="batch of 1"):
        io.load(path)


def test_modules_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.ReLU())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    io.load(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_dropout_in_training_mode_is_the_identity_and_said() -> None:
    network = io.load(nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.ReLU()))
    assert [n.op.kind for n in network.nodes] == ["Affine", "ReLU"]
    assert "dropout" in network.notes[0]


def test_shapes_are_asked_for_where_they_are_needed() -> None:
    with pytest.raises(ShapeError, match="input_shape="):
        io.load(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(UnsupportedOpError, match="cannot trace"):
        io.load(nn.Sequential(nn.Linear(4, 3)), input_shape=(5,))


def test_parametrized_and_pruned_modules_load_with_their_effective_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    prune.l1_unstructured(model[0], "weight", 5)
    nn.utils.parametrizations.weight_norm(model[2])
    network = io.load(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        model(x)
        assert np.array_equal(network.nodes[0].op.weight, model[0].weight.numpy())
        assert np.allclose(network.evaluate(x.numpy()), model(x).numpy(), atol=1e-6)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    import json
    import zipfile

    path = exported(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4), tmp_path / "m.pt2", False)
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    key = next(n for n in members if n.endswith("model.json"))
    program = json.loads(members[key])
    program["schema_version"]["major"] = 99
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, json.dumps(program) if name == key else data)
    with pytest.raises(LoadError, match="schema version 99"):
        io.load(path)


def test_load_pt2_takes_an_open_file(tmp_path: Path) -> None:
    path = exported(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4), tmp_path / "m.pt2", False)
    with path.open("rb") as file:
        assert load_pt2(file).sha256 == io.load(path).sha256
