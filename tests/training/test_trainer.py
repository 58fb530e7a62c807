"""The trainer repeats itself, keeps masks, resumes, and rewinds."""

from __future__ import annotations

import copy
import gzip
import struct

import numpy as np
import pytest
import torch
from torch import nn

from exactprune.errors import DataError, OptionError
from exactprune.training import TrainOptions, accuracy, load_data, mean_loss, train
from exactprune.training.data import FASHION, fashion_mnist


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > x[:, 1]).long()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())


def test_one_step_of_sgd_is_the_formula(data):
    """Plain SGD, one batch, with weight decay and L1 on weights but not on biases."""
    net = nn.Linear(4, 2).double()
    x, y = data[0].double(), data[1]
    nn.functional.cross_entropy(net(x), y).backward()
    options = TrainOptions(epochs=1, batch=60, lr=0.1, momentum=0.0, weight_decay=0.01, l1=0.03, schedule="constant")
    after = train(net, x, y, options).module
    assert net.weight.grad is not None and net.bias.grad is not None
    weight = net.weight - 0.1 * (net.weight.grad + 0.01 * net.weight + 0.03 * net.weight.sign())
    torch.testing.assert_close(after.weight, weight)
    torch.testing.assert_close(after.bias, net.bias - 0.1 * (net.bias.grad + 0.01 * net.bias))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_learns_repeats_and_leaves_the_given_module(net, data, optimizer):
    before = copy.deepcopy(net)
    options = TrainOptions(epochs=25, batch=20, lr=0.3 if optimizer == "sgd" else 0.05, optimizer=optimizer)
    state = torch.get_rng_state()
    first = train(net, *data, options)
    assert torch.equal(state, torch.get_rng_state())
    again = train(net, *data, options)
    assert same(first.module, again.module) and first.losses == again.losses and same(net, before)
    assert accuracy(first.module, *data) > 0.9 and mean_loss(first.module, *data) < mean_loss(net, *data)
    other = train(net, *data, TrainOptions(epochs=2, batch=20, seed=1))
    assert not same(other.module, train(net, *data, TrainOptions(epochs=2, batch=20)).module)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_never_revives_a_mask(net, data, optimizer):
    """A mask that appears in the middle of training holds, and so do the optimizer's averages."""
    mask = {"0.weight": torch.ones(8, 4, dtype=torch.bool)}
    seen = []

    def after_step(step, module, optimiser):
        if step == 3:
            mask["0.weight"][:4] = False
        if step > 3:
            seen.append(module[0].weight[:4].abs().max().item())
            for memory in optimiser.state[module[0].weight].values():
                if torch.is_tensor(memory) and memory.dim() == 2:
                    assert (memory[:4] == 0).all()

    options = TrainOptions(epochs=4, batch=20, optimizer=optimizer, weight_decay=0.1, l1=0.1)
    trained = train(net, *data, options, masks=mask, after_step=after_step)
    assert seen and set(seen) == {0.0}
    assert (trained.module[0].weight[4:] != 0).all()


def test_resume_is_the_uninterrupted_run(net, data, tmp_path):
    options = TrainOptions(epochs=4, batch=20)
    whole = train(net, *data, options)
    path = tmp_path / "run.pt"

    def stop(step, total):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(net, *data, options, checkpoint=path, progress=stop)
    resumed = train(net, *data, options, checkpoint=path, resume=True)
    assert same(whole.module, resumed.module) and whole.losses == resumed.losses
    with pytest.raises(OptionError, match="another run"):
        train(net, *data, TrainOptions(epochs=5, batch=20), checkpoint=path, resume=True)


def test_snapshots_are_what_a_shorter_run_gives(net, data):
    options = TrainOptions(epochs=2, batch=20, schedule="constant")
    trained = train(net, *data, options, snapshots=(0, 3))
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in trained.snapshots[0].items())
    short = train(net, *data, TrainOptions(epochs=1, batch=20, schedule="constant"))
    assert all(torch.equal(v, short.module.state_dict()[n]) for n, v in trained.snapshots[3].items())


def test_starting_at_a_step_is_the_rest_of_the_run(data):
    """Without momentum a run is its state: batches and learning rates go on from there."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    options = TrainOptions(epochs=3, batch=20, momentum=0.0)
    whole = train(net, *data, options, snapshots=(4,))
    module = copy.deepcopy(net)
    module.load_state_dict(whole.snapshots[4])
    rest = train(module, *data, options, start=4)
    assert same(whole.module, rest.module) and rest.losses[-1] == whole.losses[-1] and len(rest.losses) == 2
    with pytest.raises(OptionError, match="from step 10"):
        train(net, *data, options, start=10)


def test_bad_input(net, data):
    with pytest.raises(DataError, match="at least one"):
        train(net, data[0][:0], data[1][:0])
    with pytest.raises(DataError, match="loss is"):
        train(net, data[0] * float("nan"), data[1])
    with pytest.raises(OptionError, match="no such parameter"):
        train(net, *data, masks={"nothing": torch.ones(1)})
    for wrong in ({"lr": 0.0}, {"epochs": -1}, {"optimizer": "lbfgs"}, {"momentum": 1.0}, {"schedule": "linear"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            TrainOptions(**wrong)


# -- data --------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 5), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    data = load_data("fashion-mnist", tmp_path)
    np.testing.assert_allclose(data.x_test.numpy() * 255, images.reshape(3, 784), atol=1e-4)
    assert data.y_test.tolist() == labels.tolist() and data.x.shape == (5, 784)
    assert data.shaped((1, 28, 28)).x.shape == (5, 1, 28, 28) and len(data.first(2).x) == 2
    with pytest.raises(DataError, match="model takes"):
        data.shaped((10,))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels)[:-1])
    with pytest.raises(DataError, match="holds 2 values"):
        fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="not found"):
        fashion_mnist(tmp_path)


def test_npz_and_digits(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3)), y=np.array([0, 1, 2, 1]))
    data = load_data(tmp_path / "a.npz")
    assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64 and len(data.x_test) == 0
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 3)))
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 3)), y=np.zeros(3))
    for name, words in (("b.npz", "no array 'y'"), ("c.npz", "one target"), ("d.npz", "cannot be read"), ("e.csv", "give")):
        with pytest.raises(DataError, match=words):
            load_data(tmp_path / name)
    digits = load_data("digits")
    assert digits.x.shape == (1437, 64) and len(digits.x_test) == 360 and float(digits.x.max()) == 1.0


@pytest.mark.skipif(not FASHION.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_there():
    data = load_data("fashion-mnist")
    assert data.x.shape == (60000, 784) and data.x_test.shape == (10000, 784) and data.y.unique().tolist() == list(range(10))
