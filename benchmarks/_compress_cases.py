"""The networks of the compression table, their domains, data and verdicts (kept in the temporary folder)."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import exactprune
from exactprune.claim import LayerVerdict
from exactprune.domain import Box, uniform
from exactprune.network import Network
from exactprune.options import VerifyOptions

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EXACTPRUNE_SHARED", ROOT.parent / "shared"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path(tempfile.gettempdir()) / "exactprune-compress-table"
ACAS = (("1_1", 1), ("1_1", 2), ("1_1", 3), ("1_1", 5), ("1_7", 3), ("2_1", 2), ("3_3", 2), ("1_7", 7))


@dataclass(frozen=True)
class Case:
    """A network over a domain.

    Attributes:
        name: unique.
        model: file; vnnlib: property file with its box, or None for [0, 1].
        l1: trained with an L1 penalty.
        data: ``mnist``, ``cifar``, ``fashion``, ``digits`` or empty.
        input_shape: where the file does not say it.
    """

    name: str
    model: Path
    vnnlib: Path | None = None
    l1: bool = False
    data: str = ""
    input_shape: tuple[int, ...] | None = None

    def load(self) -> tuple[Network, Box]:
        """The network and its box."""
        network = exactprune.load(self.model, input_shape=self.input_shape)
        if self.vnnlib is None:
            return network, uniform(0.0, 1.0, network.input_shape)
        return network, exactprune.load_vnnlib(self.vnnlib).reshaped(network.input_shape)


def cases() -> list[Case]:
    """Everything in models/ and in the shared folder that is there."""
    nets, known = SHARED / "nets", json.loads((ROOT / "models" / "models.json").read_text())
    files = sorted(p for p in (ROOT / "models").iterdir() if p.suffix in (".pt", ".onnx"))
    own = [Case(p.stem, p, None, known.get(p.stem, {}).get("l1", 0) > 0, p.stem.partition("_")[0],
                tuple(known[p.stem]["input_shape"]) if "conv" in p.stem and p.stem in known else None) for p in files]
    given = [
        Case("cifar10_isa_116-248", nets / "cifar10_isa_116-248.pt", None, True, "cifar"),
        Case("mnist_100-100", nets / "mnist_100-100.pt", None, False, "mnist"),
        Case("mnist256x2_0.03", nets / "mnist-net_256x2.onnx", nets / "mnistfc-prop_0_0.03.vnnlib", False, "mnist"),
        Case("mnist256x2_0.05", nets / "mnist-net_256x2.onnx", nets / "mnistfc-prop_0_0.05.vnnlib", False, "mnist"),
        Case("mnist256x6_0.03", nets / "mnist-net_256x6.onnx", nets / "mnistfc-prop_0_0.03.vnnlib", False, "mnist"),
        Case("mnist256x6_0.05", nets / "mnist-net_256x6.onnx", nets / "mnistfc-prop_0_0.05.vnnlib", False, "mnist"),
        Case("cartpole", nets / "cartpole.onnx", nets / "cartpole_case_safe_14.vnnlib"),
        Case("lunarlander", nets / "lunarlander.onnx", nets / "lunarlander_case_safe_0.vnnlib"),
        Case("robot", nets / "robot.onnx", nets / "robot_0.vnnlib"),
        *(Case(f"acasxu_{net}_prop_{prop}", nets / f"ACASXU_run2a_{net}_batch_2000.onnx",
               nets / f"acasxu-prop_{prop}.vnnlib") for net, prop in ACAS),
        Case("cifar_base_kw", nets / "cifar_base_kw.onnx",
             nets / "cifar_base_kw-img1598-eps0.0026143790849673205.vnnlib"),
        Case("resnet_2b", nets / "resnet_2b.onnx", nets / "resnet_2b-prop_0_eps_0.008.vnnlib"),
        Case("convnet_maxpool", nets / "Convnet_maxpool.onnx", nets / "Convnet_maxpool-prop_0_0.004.vnnlib"),
    ]
    return own + [c for c in given if c.model.exists()]


@dataclass(frozen=True)
class Verdicts:
    """Verdicts with what they cost (cpu: processor seconds of this process)."""

    layers: tuple[LayerVerdict, ...]
    totals: dict[str, int]
    seconds: float
    cpu: float


def verdicts(case: Case, network: Network, box: Box, limit: float) -> Verdicts:
    """Of ``exactprune.verify``; kept, so that the table can be made in parts."""
    kept = CACHE / f"{network.sha256[:16]}-{box.sha256[:16]}-{limit:g}.pickle"
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    wall, cpu = time.perf_counter(), time.process_time()
    result = exactprune.verify(network, box, VerifyOptions(time_limit=limit))
    found = Verdicts(result.layers, dict(result.totals), time.perf_counter() - wall, time.process_time() - cpu)
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(pickle.dumps(found))
    return found


def samples(case: Case, network: Network, box: Box) -> tuple[np.ndarray, np.ndarray] | None:
    """Labelled test inputs in the box, (samples, *input shape), that the network was made for, where there are any."""
    found = _all_samples(case, network)
    if found is None:
        return None
    inside = box.contains(found[0].astype(np.float64))
    return (found[0][inside], found[1][inside]) if inside.any() else None


def _all_samples(case: Case, network: Network) -> tuple[np.ndarray, np.ndarray] | None:
    if case.data in ("mnist", "cifar"):
        file = SHARED / "data" / ("mnist_test_100.csv" if case.data == "mnist" else "cifar10_test_100.csv")
        rows = np.loadtxt(file, delimiter=",")
        pixels = rows[:, 1:] if case.data == "mnist" else rows[:, 1:].reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
        return _pixels(pixels, network), rows[:, 0].astype(int)
    if case.data == "fashion" and FASHION.exists():
        x, y = (_idx(FASHION / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        return _pixels(x.reshape(len(x), -1), network), y.astype(int)
    return _digits(network) if case.data == "digits" else None


def _pixels(x: np.ndarray, network: Network) -> np.ndarray:
    return (x / 255).astype(network.dtype).reshape(len(x), *network.input_shape)


def _idx(file: Path) -> np.ndarray:
    with gzip.open(file) as stream:
        content = stream.read()
    dims = [int.from_bytes(content[4 + 4 * i:8 + 4 * i], "big") for i in range(content[3])]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def _digits(network: Network) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.data / 16).astype(network.dtype).reshape(-1, *network.input_shape), digits.target


def accuracy(network: Network, data: tuple[np.ndarray, np.ndarray]) -> tuple[float, np.ndarray]:
    """Share of right answers, and the answers."""
    x, y = data
    answers = np.concatenate([network.evaluate(x[i:i + 500]).reshape(-1, np.prod(network.output_shape)).argmax(axis=1)
                              for i in range(0, len(x), 500)])
    return float((answers == y).mean()), answers


def chosen(only: str | None, found: Sequence[Case]) -> list[Case]:
    """The cases whose names are listed, all by default."""
    names = only.split(",") if only else [c.name for c in found]
    return [c for c in found if c.name in names]
