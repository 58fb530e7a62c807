"""Arrays from .npy and .npz files, without pickle and without unpacking more than was announced and allowed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from exactprune.errors import DomainError, LoadError

LIMIT = 4 * 2**30


def read_npy(path: Path, what: str) -> np.ndarray:
    """The array of a .npy file as float64.

    Args:
        path: the file.
        what: what the file is for, used in messages (``--center``).

    Raises:
        LoadError: no such file, no .npy file, or not an array of real numbers.
    """
    with _opened(path, what) as file:
        return _read(file, f"{what} {path}")


def read_npz(path: Path, names: tuple[str, ...], what: str) -> tuple[np.ndarray, ...]:
    """The named arrays of a .npz file as float64.

    Raises:
        LoadError: no such file, no .npz file, an array is missing, or not one of real numbers.
    """
    with _opened(path, what) as file, _archive(file, path, what) as archive:
        return tuple(_member(archive, name, path, what) for name in names)


def read_samples(path: Path, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Samples of shape (samples, *shape), float64, from .npy, or from .npz (array ``x``, ``data``, or the only one).

    Raises:
        LoadError: as in ``read_npz``.
        DomainError: the samples do not have the network's input shape (flat samples are laid out in it).
    """
    x = read_npy(path, what) if path.suffix == ".npy" else read_npz(path, (_samples_name(path, what),), what)[0]
    if x.ndim < 1 or x.shape[1:] not in (shape, (int(np.prod(shape)),)):
        raise DomainError(f"{what} {path}: array of shape {x.shape}; give (samples, {', '.join(map(str, shape))})")
    return x.reshape(len(x), *shape)


def _samples_name(path: Path, what: str) -> str:
    with _opened(path, what) as file, _archive(file, path, what) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    found = [name for name in ("x", "data") if name in names] or names
    if not found or (len(found) > 1 and "x" not in found and "data" not in found):
        raise LoadError(f"{what} {path}: has arrays {', '.join(names) or '(none)'}; name the samples x")
    return found[0]


@contextmanager
def _opened(path: Path, what: str) -> Iterator[IO[bytes]]:
    if not path.is_file():
        raise LoadError(f"{what} {path}: no such file")
    with path.open("rb") as file:
        yield file


@contextmanager
def _archive(file: IO[bytes], path: Path, what: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except zipfile.BadZipFile:
        raise LoadError(f"{what} {path}: is not a .npz file; write it with numpy.savez") from None


def _member(archive: zipfile.ZipFile, name: str, path: Path, what: str) -> np.ndarray:
    where = f"{what} {path}"
    if f"{name}.npy" not in archive.namelist():
        names = ", ".join(n.removesuffix(".npy") for n in archive.namelist()) or "(none)"
        raise LoadError(f"{where}: has no array {name!r}, only {names}")
    if archive.getinfo(f"{name}.npy").file_size > LIMIT:
        raise LoadError(f"{where}: array {name!r} would take more than {LIMIT} bytes")
    with archive.open(f"{name}.npy") as member:
        return _read(member, f"{where}, array {name!r}")


def _read(file: IO[bytes], where: str) -> np.ndarray:
    try:
        array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=10_000)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, MemoryError) as error:
        raise LoadError(f"{where}: is not a readable .npy array ({error}); write it with numpy.save") from None
    if array.dtype.kind not in "fiub":
        raise LoadError(f"{where}: has dtype {array.dtype}; give real numbers")
    return array.astype(np.float64)
