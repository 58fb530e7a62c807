"""Data sets: Fashion-MNIST as Debian packages it, scikit-learn's digits, and .npz files.

Pixels are scaled to [0, 1] and kept flat; ``DataSet.shaped`` gives them the shape that a module takes. The IDX format is
Y. LeCun's: two zero bytes, a type byte (8 = unsigned byte), the number of axes, their sizes as big-endian 32-bit
numbers, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exactprune.errors import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("fashion-mnist", "digits")


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training and test samples.

    Attributes:
        name: for people.
        x: training inputs, float32, (N, ...).
        y: training classes, int64, (N,).
        x_test, y_test: the same for testing; may have no samples.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def shaped(self, shape: tuple[int, ...]) -> DataSet:
        """The same samples with inputs of ``shape`` (without batch axis).

        Raises:
            DataError: the number of values does not fit.
        """
        given = self.x.shape[1:]
        if math.prod(given) != math.prod(shape):
            raise DataError(f"{self.name}: samples have shape {tuple(given)}, the model takes {shape}; give other data")
        return replace(self, x=self.x.reshape(-1, *shape), x_test=self.x_test.reshape(-1, *shape))

    def first(self, samples: int) -> DataSet:
        """With the first ``samples`` training samples only."""
        return replace(self, x=self.x[:samples], y=self.y[:samples])


def load_data(source: str | Path, path: Path | None = None) -> DataSet:
    """A data set by name (``fashion-mnist``, ``digits``) or a .npz file.

    Args:
        source: a name, or a file with arrays x and y and, if there are any, x_test and y_test.
        path: folder of the IDX files of fashion-mnist.

    Raises:
        DataError: it is missing, damaged, or not installed.
    """
    if str(source) == "fashion-mnist":
        return fashion_mnist(path or FASHION)
    if str(source) == "digits":
        return digits()
    if Path(source).suffix == ".npz":
        return from_npz(Path(source))
    raise DataError(f"data {str(source)!r}: give {', '.join(NAMES)} or a .npz file with arrays x and y")


def fashion_mnist(folder: Path = FASHION) -> DataSet:
    """60,000 training and 10,000 test images of 784 pixels in [0, 1].

    Raises:
        DataError: the files are missing or damaged.
    """
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    x, y, x_test, y_test = (torch.from_numpy(read_idx(folder / f"{name}-ubyte.gz")) for name in names)
    return DataSet("fashion-mnist", x.flatten(1).float() / 255, y.long(), x_test.flatten(1).float() / 255, y_test.long())


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not.

    Raises:
        DataError: it is missing or damaged.
    """
    plain = path.with_suffix("")
    chosen = path if path.exists() or not plain.exists() else plain
    try:
        raw = gzip.decompress(chosen.read_bytes()) if chosen.suffix == ".gz" else chosen.read_bytes()
        zeros, kind, axes = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{axes}I", raw[4:4 + 4 * axes])
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    except FileNotFoundError:
        raise DataError(f"{chosen}: not found; install the package dataset-fashion-mnist or give its folder") from None
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise DataError(f"{chosen}: is no IDX file ({error})") from None
    if zeros or kind != 8 or values.size != math.prod(shape):
        raise DataError(f"{chosen}: holds {values.size} values of type {kind} for shape {shape}; fetch it again")
    return values.reshape(shape).copy()


def digits() -> DataSet:
    """scikit-learn's 1,797 digits of 64 pixels in [0, 1]; every fifth of a fixed permutation is for testing.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data digits: needs scikit-learn; pip install scikit-learn") from None
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.from_numpy(images[order] / 16).float(), torch.from_numpy(classes[order]).long()
    test = torch.arange(len(x)) % 5 == 0
    return DataSet("digits", x[~test], y[~test], x[test], y[test])


def from_npz(path: Path) -> DataSet:
    """Arrays x and y, and x_test and y_test where present; numbers are taken as they are.

    Raises:
        DataError: an array is missing or does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("x", "y", "x_test", "y_test") if name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from None
    for name in ("x", "y"):
        if name not in found:
            raise DataError(f"{path}: has no array {name!r}; give x (N, ...) and y (N,)")
    x, y = torch.from_numpy(found["x"]).float(), torch.from_numpy(found["y"])
    x_test = torch.from_numpy(found["x_test"]).float() if "x_test" in found else x[:0]
    y_test = torch.from_numpy(found["y_test"]) if "y_test" in found else y[:0]
    if not len(x) or len(x) != len(y) or len(x_test) != len(y_test):
        raise DataError(f"{path}: x has {len(x)} samples, y {len(y)}, x_test {len(x_test)}, y_test {len(y_test)}; "
                        "give one target per sample and at least one sample")
    return DataSet(path.name, x, _targets(y), x_test, _targets(y_test))


def _targets(y: Tensor) -> Tensor:
    return y.float() if y.is_floating_point() else y.long()
