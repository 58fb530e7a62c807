"""``.pt2``, what ``torch.export.save`` writes (PyTorch >= 2.9), read without unpickling anything.

The file is a zip archive with stored members: ``models/model.json`` is the program (schema:
``torch/_export/serde/schema.py``), ``data/weights`` and ``data/constants`` hold raw storages and JSON tables of sizes
and strides. Only these are read; the pickled sample inputs are not. Weights that were written as a pickle go through
the inert reader of ``archive``.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from exactprune.errors import ExactPruneError, LoadError, ShapeError, UnsupportedOpError
from exactprune.io.archive import as_tensor, member, open_zip, read
from exactprune.io.aten import Call, evaluate
from exactprune.io.graph import Graph, Tensor
from exactprune.network import Interface, Network

SCHEMA = 8
Json = dict[str, Any]
# torch/_export/serde/schema.py, ScalarType
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f2", 7: "<f4", 8: "<f8", 12: "?", 13: "bfloat16"}
_NAMES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}


def load_pt2(
    source: Path | BinaryIO, *, input_shape: tuple[int, ...] | None = None, name: str | None = None
) -> Network:
    """The network in a ``.pt2`` file.

    Args:
        source: path, or the file itself.
        input_shape: without batch axis, for programs whose input has dynamic axes other than the batch.
        name: of the network; the file's stem by default.

    Raises:
        LoadError: the file is damaged, or in another format or version.
        UnsupportedOpError, WeightError, ShapeError: see the classes.
    """
    name = name or (source.stem if isinstance(source, Path) else "network")
    with open_zip(source) as archive:
        root = _root(archive)
        program = _json(archive, f"{root}models/model.json")
        try:
            constants = _constants(archive, root)
            return _Program(program, constants, name).network(input_shape)
        except ExactPruneError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration, AssertionError) as error:
            raise LoadError(f"its program is malformed ({type(error).__name__}: {error}); export it again") from None


def _root(archive: zipfile.ZipFile) -> str:
    found = [n.removesuffix("models/model.json") for n in archive.namelist() if n.endswith("models/model.json")]
    if len(found) != 1 or found[0].count("/") > 1:
        raise LoadError(
            "is not a torch.export program as PyTorch >= 2.9 saves it (one models/model.json); export it again "
            "with a newer PyTorch, or to .onnx"
        )
    return found[0]


def _json(archive: zipfile.ZipFile, name: str) -> Json:
    try:
        value = json.loads(member(archive, name))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"member {name} is not JSON ({error}); export it again") from None
    if not isinstance(value, dict):
        raise LoadError(f"member {name} is not a JSON object; export it again")
    return value


def _constants(archive: zipfile.ZipFile, root: str) -> dict[str, np.ndarray]:
    """Every weight and constant by its name in the module."""
    found: dict[str, np.ndarray] = {}
    for folder in ("weights", "constants"):
        config = f"{root}data/{folder}/model_{folder}_config.json"
        if config in archive.namelist():
            for name, entry in _json(archive, config)["config"].items():
                found[name] = _tensor(name, entry, member(archive, f"{root}data/{folder}/{entry['path_name']}"))
    return found


def _tensor(name: str, entry: Json, data: bytes) -> np.ndarray:
    if entry.get("use_pickle"):
        value = read(io.BytesIO(data))
        if isinstance(value, np.ndarray):
            return value
        raise LoadError(f"weight '{name}' is pickled and is not a tensor; export to .onnx instead")
    meta = entry["tensor_meta"]
    if meta["dtype"] not in _DTYPES:
        raise LoadError(
            f"weight '{name}' has a dtype (code {meta['dtype']}) that is not supported; convert it to float32"
        )
    shape, strides = ([n["as_int"] for n in meta[key]] for key in ("sizes", "strides"))
    return as_tensor(data, _DTYPES[meta["dtype"]], meta["storage_offset"]["as_int"], shape, strides)


class _Program:
    """One exported program: its signature first, then its calls in order."""

    def __init__(self, program: Json, constants: Mapping[str, np.ndarray], name: str) -> None:
        version = program["schema_version"]["major"]
        if version != SCHEMA:
            raise LoadError(
                f"has schema version {version}, this reader knows {SCHEMA}; use PyTorch 2.9 to 2.13, or to .onnx"
            )
        module = program["graph_module"]
        self.graph_json: Json = module["graph"]
        self.signature: Json = module["signature"]
        self.constants, self.name = constants, name
        self.values: dict[str, object] = {}

    def network(self, input_shape: tuple[int, ...] | None) -> Network:
        """Run the program on a graph under construction."""
        result = self._result()
        source = self._bind()
        meta = self.graph_json["tensor_values"][source]
        dynamic = "as_int" not in meta["sizes"][0]
        graph = Graph(self.name, self._shape(meta, input_shape), _NAMES.get(meta["dtype"]) == "float64", dynamic)
        if meta["dtype"] not in (6, 7, 8, 13):
            raise UnsupportedOpError("its input is not a float tensor; only float inputs are supported")
        self.values[source] = graph.input
        for node in self.graph_json["nodes"]:
            self._run(graph, node)
        value = self.values.get(result)
        if not isinstance(value, Tensor):
            raise UnsupportedOpError("its output does not depend on its input")
        return graph.network(value, Interface(_plain(source), "output"))

    def _bind(self) -> str:
        """Give the weights their names in the graph, and return the name of the one real input."""
        inputs = []
        for spec in self.signature["input_specs"]:
            (kind, body), = spec.items()
            if kind == "user_input":
                inputs.append(body["arg"].get("as_tensor", {}).get("name"))
                continue
            key = next((body[k] for k in ("parameter_name", "buffer_name", "tensor_constant_name") if k in body), None)
            if key is None or key not in self.constants:
                raise UnsupportedOpError(f"has an input of kind {kind}, which is not supported")
            self.values[body["arg"]["name"]] = self.constants[key]
        if len(inputs) != 1 or inputs[0] is None:
            raise UnsupportedOpError(f"has {len(inputs)} inputs; one tensor is supported")
        return inputs[0]

    def _result(self) -> str:
        specs = self.signature["output_specs"]
        if any("user_output" not in spec for spec in specs):
            raise UnsupportedOpError(
                "changes its own state while it runs (a batch norm in training mode?); call model.eval() "
                "and export again"
            )
        if len(specs) != 1 or "as_tensor" not in specs[0]["user_output"]["arg"]:
            raise UnsupportedOpError(f"has {len(specs)} outputs; one tensor is supported")
        return specs[0]["user_output"]["arg"]["as_tensor"]["name"]

    def _shape(self, meta: Json, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        """The input's full shape at batch one: only the first axis may be dynamic, unless ``wanted`` is given."""
        sizes = [n.get("as_int") for n in meta["sizes"]]
        inner = sizes[1:]
        if wanted is not None:
            if len(wanted) != len(inner) or any(n not in (None, w) for n, w in zip(inner, wanted, strict=True)):
                raise ShapeError(f"its input is {sizes}, which does not fit input shape {list(wanted)}")
            inner = list(wanted)
        if None in inner or not sizes:
            raise ShapeError(
                f"its input has the dynamic shape {['?' if n is None else n for n in sizes]}; give --input-shape "
                "(input_shape= in Python)"
            )
        return (1 if sizes[0] is None else sizes[0], *inner)

    def _run(self, graph: Graph, node: Json) -> None:
        outputs = list(_outputs(node["outputs"]))
        arguments = {i["name"]: self._argument(i["arg"]) for i in node["inputs"]}
        value = evaluate(graph, Call(outputs[0] if outputs else node["target"], node["target"], arguments))
        if outputs:
            self.values[outputs[0]] = value

    def _argument(self, argument: Json) -> object:
        """A call's argument: a value made before, or a plain one."""
        (kind, body), = argument.items()
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self._value(body["name"])
            case "as_tensors":
                return [self._value(t["name"]) for t in body]
            case "as_optional_tensor" | "as_sym_int":
                return self._argument(body) if "as_name" not in body else self._value(body["as_name"])
            case "as_sym_ints":
                return [self._value(n["as_name"]) if "as_name" in n else n["as_int"] for n in body]
            case "as_int" | "as_ints" | "as_float" | "as_floats" | "as_bool" | "as_string":
                return body
            case "as_scalar_type":
                return _NAMES.get(body, f"code {body}")
            case "as_memory_format" | "as_layout" | "as_device":
                return None
        raise UnsupportedOpError(f"an argument of kind {kind} is not supported")

    def _value(self, name: str) -> object:
        if name not in self.values:
            raise UnsupportedOpError(f"reads '{name}', a second output of an operator, which is not supported")
        return self.values[name]


def _outputs(outputs: Sequence[Json]) -> Iterator[str]:
    for output in outputs:
        if "as_tensor" in output:
            yield output["as_tensor"]["name"]
        elif "as_sym_int" in output:
            yield output["as_sym_int"]["as_name"]
        elif "as_tensors" in output:
            yield from (t["name"] for t in output["as_tensors"])


def _plain(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else "input"
