"""Reading what ``torch.save`` wrote, without torch and without running anything from the file.

The format (PyTorch >= 1.6) is a zip archive with *stored* members: ``<root>/data.pkl``, a pickle of the object in
which every storage is a persistent id ``("storage", type, key, device, count)``, and ``<root>/data/<key>``, the
storages' bytes.

Safety (what ``torch.load(weights_only=True)`` does, and then less): the pickle machine gets only inert stand-ins. A
class of ``torch.nn.modules`` becomes a ``Module`` record, which cannot be called and just keeps its state; the few
rebuild functions of ``torch._utils`` make ``numpy`` views after checking sizes and strides; every other global is
refused by name. Sizes are checked before memory is taken: members must be stored, not deflated, and lie inside the
file; a tensor must lie inside its storage and may not repeat it by a zero stride.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from exactprune.errors import LoadError

MAX_PICKLE = 64 << 20
REMEDY = "export the model to .onnx, or save an nn.Sequential of the layers that docs/operators.md lists"

_DTYPES = {"FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
           "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
           "BoolStorage": "?"}


class Module:
    """A pickled ``torch.nn`` module: its class's name and its attributes, nothing that can run."""

    path = ""

    def __new__(cls, *arguments: object) -> Module:
        """An empty record; arguments are refused."""
        if arguments:
            raise LoadError(f"the file makes a {cls.path} from arguments, which torch.save never writes; {REMEDY}")
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Keep the attributes, unread."""
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise LoadError(f"the file gives a {self.path} a state that is not a plain dictionary; {REMEDY}")
        self.state: dict[str, object] = state

    @property
    def kind(self) -> str:
        """The class's own name, for example ``Linear``."""
        return self.path.rsplit(".", 1)[-1]


class _Rebuild:
    """A function of this file in place of a global of the pickle; it cannot be changed by the pickle."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise LoadError(f"the file tries to change a function; {REMEDY}")


@dataclass(frozen=True)
class _Storage:
    data: bytes
    dtype: np.dtype


def open_zip(path: Path | BinaryIO) -> zipfile.ZipFile:
    """An archive whose members are stored (not deflated) and lie inside the file.

    Raises:
        LoadError: it is not such an archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise LoadError(
            f"is not a complete torch archive ({error}); download or save it again, with torch >= 1.6"
        ) from None
    if any(n.endswith("/constants.pkl") for n in archive.namelist()):
        archive.close()
        raise LoadError(f"is a TorchScript archive, which holds code; {REMEDY}")
    names = archive.namelist()
    if len(set(names)) != len(names):
        archive.close()
        raise LoadError("holds two members of one name, so readers may disagree about it; save the model again")
    packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1]
    total = sum(i.file_size for i in archive.infolist())
    if packed or total > _size(path):
        archive.close()
        why = f"its member {packed[0]} is compressed" if packed else f"claims {total:,} bytes in a smaller file"
        raise LoadError(f"{why}, which torch.save never does (a decompression bomb?); save the model again")
    return archive


def _size(source: Path | BinaryIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.seek(0, io.SEEK_END)


def member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a member.

    Raises:
        LoadError: it is missing or damaged.
    """
    try:
        return archive.read(name)
    except KeyError:
        raise LoadError(f"has no member {name}; save the model again") from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise LoadError(f"its member {name} is damaged ({error}); download or save it again") from None


def read(path: Path | BinaryIO) -> object:
    """What a ``.pt`` file holds: ``Module`` records, dictionaries, numpy arrays and plain values.

    Raises:
        LoadError: the file is damaged, unsafe or in another format.
    """
    with open_zip(path) as archive:
        names = archive.namelist()
        roots = [n.removesuffix("data.pkl") for n in names if n.count("/") <= 1 and n.endswith("data.pkl")]
        if len(roots) != 1:
            raise LoadError(f"is not what torch.save writes (no single data.pkl); {REMEDY}")
        program = member(archive, roots[0] + "data.pkl")
        _prescan(program)
        try:
            return _Unpickler(archive, roots[0], program).load()
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(f"its pickle is damaged ({type(error).__name__}: {error}); save the model again") from None


def _prescan(program: bytes) -> None:
    """Every opcode is complete, and none asks for more memory than the file has bytes."""
    if len(program) > MAX_PICKLE:
        raise LoadError(f"data.pkl has {len(program):,} bytes, too many for a network; {REMEDY}")
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(program):
                raise LoadError("its pickle reserves memory that it cannot need; do not trust this file")
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"its pickle is damaged ({error}); download or save it again") from None


class _Unpickler(pickle.Unpickler):
    """The pickle machine with nothing to run."""

    def __init__(self, archive: zipfile.ZipFile, root: str, program: bytes) -> None:
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._archive, self._root = archive, root
        self._storages: dict[str, _Storage] = {}
        self._swap = _big_endian(archive, root) != (sys.byteorder == "big")
        self._classes: dict[str, type[Module]] = {}
        self._globals = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "__builtin__.set": set,
            "torch.Size": _Rebuild(tuple),
            "torch._utils._rebuild_tensor_v2": _Rebuild(_tensor),
            "torch._utils._rebuild_parameter": _Rebuild(_parameter),
            "torch._utils._rebuild_parameter_with_state": _Rebuild(_parameter),
            "torch.nn.parameter.Parameter": _Rebuild(_parameter),
            "torch.serialization._get_layout": _Rebuild(str),
        }

    def find_class(self, module_name: str, global_name: str, /) -> object:
        path = f"{module_name}.{global_name}"
        if path in self._globals:
            return self._globals[path]
        if module_name == "torch" and global_name in _DTYPES:
            return _Rebuild(lambda: _DTYPES[global_name])
        if module_name.startswith("torch.nn.modules.") and global_name.isidentifier():
            return self._classes.setdefault(path, type(global_name, (Module,), {"path": path}))
        if "prune" in module_name:
            raise LoadError(
                f"has pruning hooks ({path}); call torch.nn.utils.prune.remove on every layer, then save again"
            )
        raise LoadError(f"its pickle refers to {path}, which is not a torch.nn layer; nothing was run; {REMEDY}")

    def persistent_load(self, pid: object, /) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Rebuild)):
            raise LoadError(f"its pickle refers to {pid!r:.80}, which is not a storage; {REMEDY}")
        key, count, dtype = str(pid[2]), pid[4], str(pid[1]())
        if key not in self._storages:
            self._storages[key] = _Storage(member(self._archive, f"{self._root}data/{key}"), _dtype(dtype))
        storage = self._storages[key]
        if (
            not isinstance(count, int)
            or count * storage.dtype.itemsize != len(storage.data)
            or storage.dtype != _dtype(dtype)
        ):
            raise LoadError(f"storage {key} should hold {count} values of {dtype} but has {len(storage.data)} bytes; "
                            "download or save it again")
        if self._swap:
            raise LoadError("was written on a machine of the other byte order; save it again on a common one")
        return storage


def _big_endian(archive: zipfile.ZipFile, root: str) -> bool:
    return f"{root}byteorder" in archive.namelist() and member(archive, f"{root}byteorder").strip() == b"big"


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype([("bfloat16", "<u2")])
    return np.dtype(name)


def _tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> np.ndarray:
    """``torch._utils._rebuild_tensor_v2``: a copy of a strided view, after checking that it lies in its storage."""
    if len(rest) > 1 and rest[1]:
        raise LoadError(f"a tensor carries hooks; {REMEDY}")
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise LoadError(f"a tensor has no storage; {REMEDY}")
    shape, steps = _integers(size), _integers(stride)
    count = len(storage.data) // storage.dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) if prod(shape) else offset
    if offset < 0 or last >= max(count, 1) or prod(shape) > count:
        raise LoadError(f"a tensor of shape {shape} and strides {steps} does not lie in its storage of {count} values; "
                        "save a contiguous copy of the model")
    flat = np.frombuffer(storage.data, storage.dtype)[offset:]
    view = np.lib.stride_tricks.as_strided(flat, shape, [s * storage.dtype.itemsize for s in steps], writeable=False)
    return _plain(np.ascontiguousarray(view).reshape(shape))


def as_tensor(data: bytes, dtype: str, offset: int, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """A tensor from the raw bytes of its storage, after checking that it lies in it.

    Raises:
        LoadError: it does not.
    """
    kind = _dtype(dtype)
    if len(data) % kind.itemsize or len(shape) != len(strides):
        raise LoadError(f"a storage of {len(data)} bytes does not hold values of {dtype}; download or save it again")
    return _tensor(_Storage(data, kind), offset, list(shape), list(strides))


def _plain(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32 (exact: the upper half of the bits)."""
    if array.dtype.names:
        return (array["bfloat16"].astype("<u4") << 16).view("<f4").reshape(array.shape)
    return array


def _integers(values: object) -> tuple[int, ...]:
    if isinstance(values, tuple | list) and all(isinstance(v, int) and v >= 0 for v in values) and len(values) <= 16:
        return tuple(values)
    raise LoadError(f"a tensor has shape or strides {values!r:.80}; save a contiguous copy of the model")


def _parameter(data: object, *_: object) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise LoadError(f"a parameter holds something that is not a tensor; {REMEDY}")
    return data


def tensors(value: object) -> Mapping[str, np.ndarray] | None:
    """``value`` as a state_dict (name -> array), or None where it is none."""
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(k, str) and isinstance(a, np.ndarray) for k, a in value.items())
    ):
        return value
    return None
