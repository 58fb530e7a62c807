"""``exactprune prune``: load, prune, fine-tune if asked, write, report.

One TOML file can state an experiment: ``[prune]`` with the command line's names, ``[prune.options]`` for the method,
``[finetune]`` for training afterwards. The command line wins over the file.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from exactprune.cli.arguments import InputShape
from exactprune.cli.progress import progress
from exactprune.errors import DataError, LoadError, OptionError
from exactprune.progress import Progress

if TYPE_CHECKING:
    from exactprune.network import Network
    from exactprune.pruning import PruneResult

PRUNE = Group("Pruning", sort_key=0)
KNOWN: dict[str, tuple[Any, str]] = {
    "method": (str, "a name"), "sparsity": ((int, float), "a number"), "keep": ((int, float), "a number"),
    "data": (str, "a name or file"), "data_path": (str, "a folder"), "samples": (int, "a whole number"),
    "structured": (bool, "true or false"), "input_shape": (list, "a list of whole numbers"),
    "options": (dict, "a table [prune.options]"),
}


@Parameter(name="*", group=PRUNE)
@dataclass(frozen=True)
class PruneFlags:
    """What to prune, how, and on which data.

    Attributes:
        method: Pruning method; --list names them.
        sparsity: Fraction of the weights (neurons, blocks) that goes, kept exactly.
        keep: The same said the other way round: the fraction that stays.
        data: fashion-mnist, digits, or a .npz file with x and y.
        data_path: Folder of the IDX files of fashion-mnist.
        samples: Use the first N training samples for the pruning decision.
        option: Option of the method as name=value; may be given several times.
        finetune: Epochs of training afterwards with the masks kept.
        structured: Make the model physically smaller where whole neurons or channels died.
        config: TOML file with [prune], [prune.options] and [finetune].
        input_shape: Input shape without batch axis, for example 1,28,28; needed where the model file does not say it.
    """

    method: str | None = None
    sparsity: float | None = None
    keep: float | None = None
    data: str | None = None
    data_path: Path | None = None
    samples: int | None = None
    option: Annotated[tuple[str, ...], Parameter(name=["--option", "-p"], negative="")] = ()
    finetune: int | None = None
    structured: Annotated[bool, Parameter(negative="")] = False
    config: Path | None = None
    input_shape: InputShape = None


def run_list(as_json: bool) -> int:
    """``exactprune prune --list``."""
    from exactprune.pruners import methods

    rows = [{"method": name, "prunes": cls.prunes, "when": cls.when, "data": cls.data, "reference": cls.reference,
             "options": _defaults(cls.Options)} for name, cls in methods().items()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{row['method']}\n  prunes {row['prunes']}, {row['when']}; data: {row['data']}; {row['reference']}")
        if row["options"]:
            print("  options: " + ", ".join(f"{name}={value}" for name, value in row["options"].items()))
    return 0


def _defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def run_prune(model: Path, out: Path | None, masks: Path | None, flags: PruneFlags, as_json: bool, quiet: bool) -> int:
    """``exactprune prune MODEL``."""
    settings = _settings(flags)
    for path, what in ((out, "--out"), (masks, "--masks")):
        _check_place(path, what)
    from exactprune.io import load, save

    network = load(model, input_shape=settings.input_shape)
    with progress(as_json or quiet) as bars:
        result = _prune(network, settings, _bar(bars, settings.method))
    if out is not None:
        assert result.network is not None
        save(result.network, out)
    if masks is not None:
        _save_masks(result, masks)
    summary = _summary(result, settings, network)
    if as_json:
        print(json.dumps(summary, indent=2, sort_keys=True, allow_nan=False))
    elif not quiet:
        print(_text(result, summary, settings, network))
    return 0


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Command line and config file together."""

    method: str
    sparsity: float
    data: str | None
    data_path: Path | None
    samples: int | None
    structured: bool
    input_shape: tuple[int, ...] | None
    options: dict[str, Any]
    finetune: dict[str, Any] | None


def _settings(flags: PruneFlags) -> Settings:
    prune, finetune = ({}, None) if flags.config is None else _read(flags.config)
    given = {name: getattr(flags, name) for name in KNOWN if hasattr(flags, name) and name != "structured"}
    prune = prune | {name: value for name, value in given.items() if value is not None}
    options = dict(prune.get("options", {})) | dict(_pair(text) for text in flags.option)
    if flags.finetune is not None:
        finetune = (finetune or {}) | {"epochs": flags.finetune}
    sparsity = _sparsity(flags.sparsity, flags.keep, prune)
    path, shape = prune.get("data_path"), prune.get("input_shape")
    return Settings(prune.get("method", "magnitude"), sparsity, prune.get("data"), None if path is None else Path(path),
                    prune.get("samples"), bool(flags.structured or prune.get("structured", False)),
                    None if shape is None else tuple(shape), options, finetune)


def _sparsity(sparsity: float | None, keep: float | None, prune: dict[str, Any]) -> float:
    """From the command line, else the file, else 0.9."""
    if sparsity is None and keep is None:
        sparsity, keep = prune.get("sparsity"), prune.get("keep")
    if sparsity is not None and keep is not None:
        raise OptionError(f"--sparsity {sparsity} and --keep {keep} say the same in two ways; give one of them")
    return 1 - keep if keep is not None else 0.9 if sparsity is None else sparsity


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    for table in data:
        if table not in ("prune", "finetune") or not isinstance(data[table], dict):
            raise OptionError(f"--config {path}: {table!r} is not one of the tables [prune] and [finetune]")
    prune = {name.replace("-", "_"): value for name, value in data.get("prune", {}).items()}
    for name, value in prune.items():
        if name not in KNOWN:
            raise OptionError(f"--config {path}, table [prune]: no key {name!r}; there are {', '.join(sorted(KNOWN))}")
        kinds, words = KNOWN[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise OptionError(f"--config {path}, table [prune]: {name} is {value!r}; give {words}")
    return prune, data.get("finetune")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OptionError(f"--option {text!r}: write name=value, for example damping=1e-4")
    return name.strip().replace("-", "_"), value.strip()


def _typed(cls: type, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Texts turned into what the fields of ``cls`` are."""
    from exactprune.pruners.protocol import check_types

    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    typed = {}
    for name, value in options.items():
        if name not in known:
            raise OptionError(f"{where} has no option {name!r}; it has {', '.join(known) or 'none'}")
        typed[name] = _convert(name, value, hints[name]) if isinstance(value, str) else value
    check_types(cls, typed)
    return typed


def _convert(name: str, text: str, hint: Any) -> Any:
    kinds = [hint] if get_origin(hint) is None else list(get_args(hint)) if get_origin(hint) in (Union,) or \
        "UnionType" in type(hint).__name__ else [str]
    for kind in (bool, int, float):
        if kind in kinds:
            try:
                return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            except (KeyError, ValueError):
                if str not in kinds:
                    words = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind.__name__]
                    raise OptionError(f"option {name} is {text!r}; give {words}") from None
    return text


# -- the run -----------------------------------------------------------------------------------------------------------


def _bar(bars: Progress, name: str) -> Callable[[int, int], None]:
    """Shows (done, of how many); a stage of another length is a bar of its own."""
    now = {"done": 0, "total": -1}

    def tell(done: int, total: int) -> None:
        if total != now["total"] or done < now["done"]:
            bars.stage(name, total)
            now.update(done=0, total=total)
        bars.advance(done - now["done"])
        now["done"] = done

    return tell


def _prune(network: Network, settings: Settings, tell: Callable[[int, int], None]) -> PruneResult:
    from exactprune.pruners import method
    from exactprune.pruning import prune
    from exactprune.training import TrainOptions, load_data

    cls = method(settings.method)
    options = _typed(cls.Options, settings.options, f"method {cls.name!r}")
    finetune = None if settings.finetune is None else TrainOptions(**_typed(TrainOptions, settings.finetune, "[finetune]"))
    if settings.samples is not None and settings.samples < 1:
        raise OptionError(f"--samples is {settings.samples}; give a whole number >= 1")
    if settings.data is None and (cls.data != "none" or finetune is not None):
        raise DataError(f"method {cls.name!r}{' with fine-tuning' if finetune else ''} needs data: give --data "
                        "fashion-mnist, digits or a .npz file with x and y")
    data = None
    if settings.data is not None:
        data = load_data(settings.data, settings.data_path).shaped(network.input_shape)
        data = data if settings.samples is None else data.first(settings.samples)
    return prune(network, cls.name, settings.sparsity, data, finetune=finetune, structured=settings.structured,
                 progress=tell, **options)


def _check_place(path: Path | None, what: str) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise OptionError(f"{what} {path}: cannot be written there; name a file in an existing folder")


def _save_masks(result: PruneResult, path: Path) -> None:
    import numpy as np

    try:
        np.savez_compressed(path, allow_pickle=False, **{n: m.cpu().numpy() for n, m in result.masks.items()})
    except OSError as error:
        raise LoadError(f"--masks {path}: cannot be written ({error.strerror})") from None


def _summary(result: PruneResult, settings: Settings, network: Network) -> dict[str, Any]:
    summary = result.report.as_dict() | {"model": network.name, "claim": "approximate: outputs change"}
    if result.network is not None:
        summary["macs_stored"] = result.network.macs
    if settings.data is not None:
        from exactprune.training import accuracy, load_data, mean_loss

        data = load_data(settings.data, settings.data_path).shaped(network.input_shape)
        if len(data.x_test) and not data.y_test.is_floating_point():
            from exactprune.pruning.api import as_module

            own = next(result.module.parameters()).dtype
            x, y, before = data.x_test.to(own), data.y_test, as_module(network)
            summary["test"] = {"accuracy_before": accuracy(before, x, y), "accuracy": accuracy(result.module, x, y),
                               "loss_before": mean_loss(before, x, y), "loss": mean_loss(result.module, x, y)}
    return summary


def _text(result: PruneResult, summary: dict[str, Any], settings: Settings, network: Network) -> str:
    report, lines = result.report, [str(result.report)]
    lines.append(f"parameters: {report.parameters:,} not masked, {report.parameters_stored:,} stored"
                 + ("" if report.macs is None else f"; MACs with kept weights: {report.macs:,} of {report.macs_dense:,}"))
    if settings.structured:
        lines.append(f"physically smaller: {network.parameters:,} -> {report.parameters_stored:,} parameters, "
                     f"{network.macs:,} -> {summary['macs_stored']:,} MACs; weights masked one by one are still stored")
    elif report.parameters_stored > report.parameters:
        lines.append("a masked model is no smaller on disk; --structured removes whole dead neurons")
    if "test" in summary:
        t = summary["test"]
        lines.append(f"test accuracy {t['accuracy_before']:.4f} -> {t['accuracy']:.4f}, "
                     f"loss {t['loss_before']:.4f} -> {t['loss']:.4f}")
    return "\n".join(lines)

