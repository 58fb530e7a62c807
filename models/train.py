"""Train the example networks in this folder.

    python models/train.py fashion_2x100 digits_2x32     # some of them
    python models/train.py --all                         # all that are committed
    python models/train.py --bench                       # those that only benchmarks need, too large to commit
    python models/train.py --card                        # rewrite README.md from models.json
    python models/train.py --stability fashion_2x100 run.json

Every network is trained on pixels in [0, 1] (pixel / 255 for Fashion-MNIST, pixel / 16 for digits) with no
other normalisation, so the natural input domain is the unit box. The loss is the cross entropy plus
``l1 * sum(abs(w))`` over all weight tensors (linear, convolution and batch-norm scale; no biases):

    Serra, Kumar, Ramalingam: Lossless Compression of Deep Neural Networks (CPAIOR 2020)

An L1 term turns many neurons stably inactive or stably active on the whole box. SGD does not produce exact
zeros: weights hover around 1e-5 .. 1e-8, and they are stored that way.

The raw results go to models.json, and README.md is generated from it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "models.json"
CARD = HERE / "README.md"
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")


# ---------------------------------------------------------------------------------------------- networks


def mlp(*widths: int) -> nn.Sequential:
    """Return Linear-ReLU-...-Linear for flat inputs of size ``widths[0]``."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_bn() -> nn.Sequential:
    """Return two stride-2 convolutions with batch norm and two linear layers; input (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Block(nn.Module):
    """Residual block ``relu(conv(relu(conv(x))) + shortcut(x))``; a 1x1 shortcut unless the stride is 1."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H / stride, W / stride)."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Return a stem, a stride-2 and a stride-1 residual block, two linear layers; input (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        Block(8, stride=2),
        Block(8, stride=1),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


# ----------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """How one network is made.

    Attributes:
        name: File stem.
        build: Returns the untrained network.
        architecture: One line for the model card.
        data: ``fashion`` or ``digits``.
        l1: Weight of the L1 term, 0 for none.
        epochs: Passes over the training set.
        input_shape: Shape of one input.
        batch: Batch size.
        lr: Initial learning rate of SGD, annealed to 0 by a cosine.
        momentum: Momentum of SGD.
        seed: Seeds the initial weights and the order of the samples.
        suffix: ``.pt`` (whole ``nn.Sequential``) or ``.onnx``.
        half: Round the trained weights to float16 and store them so; accuracies are measured after rounding.
        bench: For benchmarks only: not committed, not in the model card.
    """

    name: str
    build: Callable[[], nn.Sequential]
    architecture: str
    data: str = "fashion"
    l1: float = 0.0
    epochs: int = 30
    input_shape: tuple[int, ...] = (784,)
    batch: int = 64
    lr: float = 0.03
    momentum: float = 0.9
    seed: int = 0
    suffix: str = ".pt"
    half: bool = False
    bench: bool = False

    @property
    def file(self) -> str:
        """Name of the model file."""
        return self.name + self.suffix


IMAGE = (1, 28, 28)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("digits_2x32", lambda: mlp(64, 32, 32, 10), "64-32-32-10", "digits", 5e-4, 200, (64,), 32),
        Recipe("fashion_2x100", lambda: mlp(784, 100, 100, 10), "784-100-100-10", l1=1e-4),
        Recipe("fashion_2x100_plain", lambda: mlp(784, 100, 100, 10), "784-100-100-10", l1=0.0),
        Recipe("fashion_2x200", lambda: mlp(784, 200, 200, 10), "784-200-200-10", l1=7e-5),
        Recipe("fashion_2x200_plain", lambda: mlp(784, 200, 200, 10), "784-200-200-10", epochs=15),
        Recipe("fashion_2x800", lambda: mlp(784, 800, 800, 10), "784-800-800-10", l1=3e-5, half=True),
        Recipe(
            "fashion_2x800_plain", lambda: mlp(784, 800, 800, 10), "784-800-800-10", epochs=8, half=True, bench=True
        ),
        Recipe("fashion_5x100", lambda: mlp(784, *[100] * 5, 10), "784-5x100-10", l1=7e-5),
        Recipe("fashion_5x100_plain", lambda: mlp(784, *[100] * 5, 10), "784-5x100-10", epochs=15),
        Recipe(
            "fashion_conv_bn",
            conv_bn,
            "conv 8, conv 16 (3x3, stride 2, batch norm), 784-32-10",
            l1=1e-3,
            epochs=20,
            input_shape=IMAGE,
        ),
        Recipe(
            "fashion_resnet",
            resnet,
            "conv 8, residual 8 (stride 2), residual 8, 392-32-10",
            l1=2e-4,
            epochs=20,
            input_shape=IMAGE,
            suffix=".onnx",
        ),
    )
}


# -------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Inputs in [0, 1] as (N, features) float32, labels as (N,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes, the format of the MNIST family."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def fashion(folder: Path) -> Data:
    """Return Fashion-MNIST, 60,000 + 10,000 images, from its four IDX files."""

    def images(split: str) -> Tensor:
        pixels = read_idx(folder / f"{split}-images-idx3-ubyte.gz").reshape(-1, 784)
        return torch.from_numpy(pixels.astype(np.float32) / np.float32(255))

    def labels(split: str) -> Tensor:
        return torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64))

    return Data(images("train"), labels("train"), images("t10k"), labels("t10k"))


def digits() -> Data:
    """Return the 8x8 digits of scikit-learn; every fifth of a fixed permutation is for testing."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(pixels[order].astype(np.float32) / np.float32(16))
    y = torch.from_numpy(labels[order].astype(np.int64))
    test = torch.arange(len(y)) % 5 == 0
    return Data(x[~test], y[~test], x[test], y[test])


def load_data(recipe: Recipe, folder: Path, device: str) -> Data:
    """Return the recipe's data set on the device, in the recipe's input shape."""
    data = digits() if recipe.data == "digits" else fashion(folder)
    shape = (-1, *recipe.input_shape)
    return Data(
        data.train_x.reshape(shape).to(device),
        data.train_y.to(device),
        data.test_x.reshape(shape).to(device),
        data.test_y.to(device),
    )


# ---------------------------------------------------------------------------------------------- training


def weight_tensors(network: nn.Module) -> list[Tensor]:
    """Return the tensors under the L1 term: all weights, no biases."""
    return [tensor for name, tensor in network.named_parameters() if name.endswith("weight")]


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of one shuffled pass, the incomplete last batch included."""
    yield from torch.randperm(count, generator=generator).split(size)


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of samples classified correctly, in evaluation mode."""
    network.eval()
    with torch.no_grad():
        hits = sum(
            int((network(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True)
        )
    return hits / len(y)


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    data: Data,
    generator: torch.Generator,
) -> float:
    """Run one pass over the training set and return the mean cross entropy."""
    network.train()
    weights, total = weight_tensors(network), 0.0
    for index in batches(len(data.train_y), recipe.batch, generator):
        index = index.to(data.train_y.device)
        entropy = nn.functional.cross_entropy(network(data.train_x[index]), data.train_y[index])
        loss = entropy + recipe.l1 * sum(weight.abs().sum() for weight in weights) if recipe.l1 else entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += entropy.item() * len(index)
    return total / len(data.train_y)


def train(recipe: Recipe, data: Data, device: str) -> nn.Sequential:
    """Train one network from its seed, printing a line per epoch."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    network = recipe.build().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(network, optimizer, recipe, data, generator)
        schedule.step()
        score = accuracy(network, data.test_x, data.test_y)
        seconds = time.perf_counter() - start
        print(
            f"{recipe.name} {epoch}/{recipe.epochs} loss {loss:.4f} test {score:.4f} {seconds:.1f} s",
            flush=True,
        )
    return network


# -------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def freeze(network: nn.Sequential, recipe: Recipe) -> nn.Sequential:
    """Return the network as stored: on the CPU, in evaluation mode, rounded where the recipe says so."""
    network = network.cpu().eval()
    for parameter in network.parameters():
        parameter.grad = None
    return network.half() if recipe.half else network


def to_pt(network: nn.Sequential) -> bytes:
    """Return the whole module in PyTorch's format; the bytes depend on the network only."""
    buffer = io.BytesIO()
    torch.save(network, buffer)
    return buffer.getvalue()


def to_onnx(network: nn.Sequential, input_shape: tuple[int, ...]) -> bytes:
    """Return a self-contained ONNX model, batch size 1, checked and compared with onnxruntime."""
    import onnx
    import onnxruntime

    buffer = io.BytesIO()
    example = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(
        network,
        (example,),
        buffer,
        opset_version=13,
        input_names=["input"],
        output_names=["logits"],
        dynamo=False,
    )
    content = buffer.getvalue()
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": example.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(output, network(example).numpy(), rtol=1e-4, atol=1e-5)
    return content


def read_results() -> dict[str, dict]:
    """Return the content of models.json, empty where there is none."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_results(name: str, entry: dict) -> None:
    """Replace one entry of models.json and regenerate the model card."""
    results = read_results() | {name: entry}
    ordered = {key: results[key] for key in RECIPES if key in results}
    write_atomically(RESULTS, (json.dumps(ordered, indent=2) + "\n").encode())
    write_atomically(CARD, card(ordered).encode())


def make(recipe: Recipe, folder: Path, device: str) -> None:
    """Train, store and record one network."""
    start = time.perf_counter()
    data = load_data(recipe, folder, device)
    stored = freeze(train(recipe, data, device), recipe)
    content = to_pt(stored) if recipe.suffix == ".pt" else to_onnx(stored, recipe.input_shape)
    write_atomically(HERE / recipe.file, content)
    if recipe.bench:
        return
    write_results(recipe.name, result(recipe, stored, data, content, device, time.perf_counter() - start))


def result(
    recipe: Recipe, stored: nn.Sequential, data: Data, content: bytes, device: str, seconds: float
) -> dict:
    """Return the raw numbers of one finished network, measured on the stored (rounded) weights."""
    network = stored.float()
    fields = {key: value for key, value in asdict(recipe).items() if key not in ("name", "build", "bench")}
    return fields | {
        "file": recipe.file,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "train_accuracy": accuracy(network, data.train_x.cpu(), data.train_y.cpu()),
        "test_accuracy": accuracy(network, data.test_x.cpu(), data.test_y.cpu()),
        "command": f"python models/train.py {recipe.name}",
        "seconds": round(seconds, 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "stability": None,
    }


def hardware(device: str) -> str:
    """Return the name of the processor that trained."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record_stability(name: str, run: Path) -> None:
    """Copy the counts per layer of a ``run.json`` written by ``exactprune verify`` into models.json.

    Raises:
        ValueError: The run belongs to another version of the model file.
    """
    report, entry = json.loads(run.read_text()), read_results()[name]
    if report["model"]["file_sha256"] != entry["sha256"]:
        raise ValueError(f"{run}: made for another version of {entry['file']}")
    keys = ("neurons", "inactive", "active", "unstable", "unknown")
    layers = [{key: layer[key] for key in keys} for layer in report["layers"]]
    write_results(
        name, entry | {"stability": {"method": report.get("method", "exactprune verify"), "layers": layers}}
    )


# -------------------------------------------------------------------------------------------- model card

INTRO = """# Model card

Small ReLU networks to try exactprune on. This page is generated from `models.json` by `models/train.py`;
do not edit it. Inputs are pixels scaled to [0, 1], so the natural domain is the unit box; outputs are 10
logits. `.pt` files hold a whole `nn.Sequential` in evaluation mode; the `.onnx` file has batch size 1. All
weights are float32 unless the recipe says float16.

Optimiser: SGD with momentum, the learning rate annealed to 0 by a cosine, cross entropy plus L1 weight x sum
of the absolute weights (biases excluded). Digits: every fifth sample of a fixed permutation is the test set.
L1 weights and epochs were chosen by looking at the test accuracy and the stable share, so the test accuracies
are slightly optimistic.
"""

STABILITY_NOTE = """
## Stable neurons on the unit box

Per ReLU layer: stably inactive + stably active / neurons. "Unstable" means that inputs with both signs were
found; "open" means neither proved nor refuted by the method named. Counts by `exactprune verify` are certified;
those of other methods are estimates.
"""


def card(results: dict[str, dict]) -> str:
    """Return the model card as Markdown."""
    parts = [INTRO, "## Networks\n", *networks_table(results), STABILITY_NOTE, *stability_table(results)]
    parts += ["\n## Recipes\n", *recipes_table(results), "\n## Files\n", *files_table(results)]
    return "\n".join(parts) + "\n"


def table(header: str, rows: list[tuple]) -> list[str]:
    """Return a Markdown table; the header names the columns, separated by ``|``."""
    lines = [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def networks_table(results: dict[str, dict]) -> list[str]:
    """Return architecture, size and accuracies."""
    rows = [
        (
            f"`{entry['file']}`",
            entry["architecture"],
            f"{entry['parameters']:,}",
            f"{entry['train_accuracy']:.2%}",
            f"{entry['test_accuracy']:.2%}",
            stable_share(entry),
        )
        for entry in results.values()
    ]
    return table("file | architecture | parameters | train accuracy | test accuracy | stable neurons", rows)


def stable_share(entry: dict) -> str:
    """Return the share of neurons known to be stable over all layers."""
    if not entry["stability"]:
        return "not measured"
    layers = entry["stability"]["layers"]
    stable = sum(layer["inactive"] + layer["active"] for layer in layers)
    return f"{stable / sum(layer['neurons'] for layer in layers):.0%}"


def stability_table(results: dict[str, dict]) -> list[str]:
    """Return the stable counts by layer."""
    rows = []
    for name, entry in results.items():
        if stability := entry["stability"]:
            layers = stability["layers"]
            counts = ", ".join(
                f"{layer['inactive']} + {layer['active']} / {layer['neurons']}" for layer in layers
            )
            unstable, unknown = (sum(layer[key] for layer in layers) for key in ("unstable", "unknown"))
            rows.append((name, counts, unstable, unknown, stability["method"]))
    return table("network | inactive + active / neurons, by layer | unstable | open | method", rows)


def recipes_table(results: dict[str, dict]) -> list[str]:
    """Return what it takes to train each network again."""
    rows = [
        (
            f"`{entry['command']}`",
            entry["data"],
            f"{entry['l1']:g}",
            entry["epochs"],
            entry["batch"],
            f"{entry['lr']:g}, {entry['momentum']:g}",
            entry["seed"],
            "float16" if entry["half"] else "float32",
            f"{entry['seconds']:.0f} s, {entry['threads']} thread(s)",
            f"torch {entry['torch']}, {entry['hardware']}",
        )
        for entry in results.values()
    ]
    header = (
        "command | data | L1 weight | epochs | batch | lr, momentum | seed | stored as | time | made with"
    )
    return table(header, rows)


def files_table(results: dict[str, dict]) -> list[str]:
    """Return sizes and checksums."""
    rows = [
        (f"`{entry['file']}`", f"{entry['bytes']:,}", f"`{entry['sha256']}`") for entry in results.values()
    ]
    return table("file | bytes | sha256", rows)


# ------------------------------------------------------------------------------------------ command line


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the example networks in this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--all", action="store_true", help="train every committed network")
    parser.add_argument("--bench", action="store_true", help="train the networks that only benchmarks need")
    parser.add_argument(
        "--data", type=Path, default=FASHION_DIR, metavar="DIR", help="the IDX files (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; results depend on it (%(default)s)"
    )
    parser.add_argument("--card", action="store_true", help="only rewrite README.md from models.json")
    parser.add_argument(
        "--stability", nargs=2, metavar=("NAME", "RUN"), help="copy counts by layer from a run.json"
    )
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in RECIPES]:
        parser.error(f"unknown network {unknown[0]!r}; known: {', '.join(RECIPES)}")
    if not (options.names or options.all or options.bench or options.card or options.stability):
        parser.error("name at least one network, --all or --bench")
    return options


def main(argv: list[str]) -> None:
    """Run the command line."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    wanted = {*options.names, *(r.name for r in RECIPES.values() if (options.bench if r.bench else options.all))}
    for name in [name for name in RECIPES if name in wanted]:
        make(RECIPES[name], options.data, options.device)
    if options.stability:
        record_stability(options.stability[0], Path(options.stability[1]))
    if options.card:
        write_atomically(CARD, card(read_results()).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
