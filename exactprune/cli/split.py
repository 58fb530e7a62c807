"""``compress --split K``: a folder with a network for every piece of the domain, their certificates, and a dispatcher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from exactprune.cli.arguments import CompressFlags, DomainFlags, ModelFlags, OutputFlags
from exactprune.cli.progress import progress
from exactprune.errors import OptionError
from exactprune.options import VerifyOptions

SCHEMA = "exactprune-split-summary/1"
SUFFIX = ".onnx"


def run_split(model: Path, out: Path, change: CompressFlags, flags: DomainFlags, options: VerifyOptions,
              source: ModelFlags, output: OutputFlags) -> int:
    """``exactprune compress --split``."""
    from exactprune.cli.commands import _certified, _prepare, _write_run

    wanted = change.options(options.seed)
    _check(out, change)
    network, domain, data, folder = _prepare(model, flags, source, output)
    bundles: list[Any] = []
    with progress(output.quiet or output.json) as shown:
        from exactprune.pipeline import compress_split

        def judged(found: Any, inside: Any) -> Any:
            smaller, bundle = _certified(found, wanted, inside, shown)
            bundles.append(bundle)
            return smaller

        split = compress_split(network, domain, change.split, wanted, options, data=data, progress=shown, judge=judged)
    split.save(out, suffix=SUFFIX)
    certificates = [_write_certificate(out / f"piece{i}{SUFFIX}", bundle) for i, bundle in enumerate(bundles)]
    summary = _summary(split, model, out, certificates)
    _write_run(split.single.verification, folder, model, source.arch)
    _show(summary, output)
    return 0


def _check(out: Path, change: CompressFlags) -> None:
    if change.split < 1:
        raise OptionError(f"--split {change.split}: give the number of pieces, at least 1")
    if out.suffix in (".pt", ".pth", ".onnx", ".pt2", ".npz") or out.is_file() or not out.absolute().parent.is_dir():
        raise OptionError(f"--out {out}: with --split it is a folder for the pieces; name one in an existing folder")
    if change.certificate is not None:
        raise OptionError("--certificate: with --split every piece has its own, beside its network; leave it out")


def _write_certificate(piece: Path, bundle: Any) -> str | None:
    """The piece's certificate beside it; None where there is no proof."""
    from exactprune.io.atomic import write_bytes

    if bundle.level is None:
        return None
    path = piece.with_name(f"{piece.name}.certificate")
    write_bytes(path, bundle.data)
    return str(path)


def _summary(split: Any, model: Path, out: Path, certificates: list[str | None]) -> dict[str, Any]:
    from exactprune.report.strict import jsonable

    pieces = [{"path": str(out / f"piece{i}{SUFFIX}"), "certificate": certificate, "level": part.level.kind.name.lower(),
               "eps": part.level.eps, "words": part.level.words, "neurons": part.after.neurons,
               "parameters": part.after.parameters, "macs": part.after.macs}
              for i, (part, certificate) in enumerate(zip(split.parts, certificates, strict=True))]
    return jsonable({"schema": SCHEMA, "model": str(model), "out": str(out), "pieces": pieces,
                     "payoff": {**vars(split.payoff), "pays": split.payoff.pays, "words": split.payoff.words}})


def _show(summary: dict[str, Any], output: OutputFlags) -> None:
    from exactprune.report.strict import pretty

    if output.json:
        sys.stdout.write(pretty(summary))
    elif not output.quiet:
        sys.stdout.write("\n".join(_lines(summary)) + "\n")


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"Model:  {summary['model']}", f"Pieces: {summary['out']}, read by exactprune.load_split"]
    lines += [f"  {Path(p['path']).name}: {p['neurons']:,} neurons, {p['parameters']:,} parameters; {p['words']}"
              + ("" if p["certificate"] else " (no certificate)") for p in summary["pieces"]]
    return [*lines, summary["payoff"]["words"]]
