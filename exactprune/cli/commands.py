"""``verify`` and ``compress``: load, build the box, run the pipeline, write, print."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.cli.arguments import CompressFlags, DomainFlags, ModelFlags, OutputFlags
from exactprune.cli.arrays import read_samples
from exactprune.cli.domains import build_domain, check_flags
from exactprune.cli.progress import progress
from exactprune.domain import Box
from exactprune.errors import OptionError
from exactprune.network import Network
from exactprune.options import CompressOptions, VerifyOptions

OUT = (".pt", ".pth", ".onnx", ".pt2", ".npz")
CHECKPOINT = "checkpoint"
UNIT_BOX = "no domain given, so the unit box is taken: every input from 0 to 1 (see --domain)"


def run_verify(model: Path, flags: DomainFlags, options: VerifyOptions, source: ModelFlags, output: OutputFlags) -> int:
    """``exactprune verify``."""
    network, domain, data, folder = _prepare(model, flags, source, output)
    result = _verify(network, domain, data, options, folder, output)
    summary = _write_run(result, folder, model, source.arch)
    from exactprune.report.tables import verify_report

    _show(summary, verify_report(summary, str(folder)), output)
    return 0


def run_compress(model: Path, out: Path, change: CompressFlags, flags: DomainFlags, options: VerifyOptions,
                 source: ModelFlags, output: OutputFlags) -> int:
    """``exactprune compress``."""
    wanted = change.options(options.seed)
    if change.split != 1:
        from exactprune.cli.split import run_split

        return run_split(model, out, change, flags, options, source, output)
    _check_out(out, model)
    _check_certificate(change.certificate, model, out)
    network, domain, data, folder = _prepare(model, flags, source, output)
    _check_writable(network, out)
    result = _verify(network, domain, data, options, folder, output)
    with progress(output.quiet or output.json) as shown:
        smaller, bundle = _certified(result, wanted, data, shown)
    from exactprune.report.compression import compress_report, write_compression

    certificate = change.certificate or out.with_name(f"{out.name}.certificate")
    summary = write_compression(smaller, folder, _write_run(result, folder, model, source.arch), model, out,
                                (bundle, certificate))
    _show(summary, compress_report(summary, str(folder)), output)
    return 0


def _certified(result: Any, wanted: CompressOptions, data: np.ndarray | None, shown: Any) -> tuple[Any, Any]:
    """A compression with the level that the independent checker accepts.

    Where that is not within what was allowed, smaller budgets are tried, then exact rewrites only, and the bundle says so
    with the reason; where there is no proof at all, nothing is claimed beyond what was measured.
    """
    from exactprune.compress.bundle import bundle
    from exactprune.compress.levels import measured
    from exactprune.pipeline import compress

    budget, reach, refused = 0.0, 0.0, ""
    waiting: list[str | float] = [wanted.max_deviation]
    while True:
        allowed = waiting.pop(0)
        smaller = compress(result, options=replace(wanted, max_deviation=allowed), data=data, progress=shown)
        shown.stage("certificate")
        found = bundle(smaller.original, smaller.domain, smaller.rewrite, result.records, result.layers)
        if not refused:
            budget, reach = smaller.rewrite.budget, smaller.rewrite.reach
        if found.level is not None and found.level.eps <= max(budget, smaller.rewrite.eps if not refused else 0.0):
            break
        if allowed == "exact":
            break
        refused = refused or _refused(found, budget)
        waiting = waiting or [*_smaller_budgets(smaller.rewrite.eps, budget, found.report.deviation), "exact"]
    if refused:
        kept = "only exact rewrites are kept" if smaller.rewrite.eps == 0 else f"rewrites within {allowed:.3g} are kept"
        found = replace(found, note=f"{refused}, so {kept}")
    level = found.level or measured(smaller.agreement.largest, smaller.agreement.inputs)
    return replace(smaller, level=level, options=wanted, rewrite=replace(smaller.rewrite, budget=budget, reach=reach)), found


def _refused(found: Any, budget: float) -> str:
    """Why a bundle was not good enough."""
    why = found.report.error or f"it proves {found.report.deviation:.3g}, allowed are {budget:.3g}"
    return f"FELL BACK: the independent checker does not accept what was tried first ({found.claimed}): {why}"


def _smaller_budgets(claimed: float, budget: float, deviation: float) -> list[float]:
    """Two budgets in between: half of what was claimed, or what the checker's own bound leaves of it, and far less."""
    share = budget / deviation if deviation > budget > 0 and np.isfinite(deviation) else 1.0
    return [b for b in (0.5 * claimed * share, 0.01 * claimed * share) if b > 0]


# -- before ------------------------------------------------------------------------------------------------------


def _prepare(model: Path, flags: DomainFlags, source: ModelFlags,
             output: OutputFlags) -> tuple[Network, Box, np.ndarray | None, Path]:
    """Everything that can be refused, before anything is written."""
    from exactprune.report.record import default_folder

    way = check_flags(flags)
    folder = output.output or default_folder(model)
    _check_folder(folder)
    network = load_model(model, source)
    domain = build_domain(flags, network)
    data = None if source.data is None else read_samples(source.data, network.input_shape, "--data")
    if way is None:
        _say(UNIT_BOX, output)
    return network, domain, data, folder


def load_model(model: Path, source: ModelFlags) -> Network:
    """The network of a model file.

    Raises:
        LoadError: and its siblings, see ``exactprune.io.load``.
    """
    from exactprune.io import load

    return load(model, input_shape=source.input_shape, arch=source.arch)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output {folder}: is a file; name a folder")
    if not folder.absolute().parent.is_dir():
        raise OptionError(f"--output {folder}: its parent folder does not exist; make it first")


def _check_out(out: Path, model: Path) -> None:
    if out.suffix not in OUT:
        raise OptionError(f"--out {out}: the ending says the format; use .pt or .onnx (or .pt2, .npz)")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise OptionError(f"--out {out}: cannot be written there; name a file in an existing folder")
    if out.exists() and model.exists() and out.samefile(model):
        raise OptionError(f"--out {out}: is the model itself; name another file")


def _check_certificate(path: Path | None, model: Path, out: Path) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir() or path.absolute() in
                             (model.absolute(), out.absolute())):
        raise OptionError(f"--certificate {path}: cannot be written there; name a file of its own in an existing folder")


def _check_writable(network: Network, out: Path) -> None:
    """A format that cannot hold the model (a residual network in a plain .pt) is refused before hours of work."""
    from exactprune.io import save

    with tempfile.TemporaryDirectory() as scratch:
        save(network, Path(scratch) / f"trial{out.suffix}")


# -- the run -----------------------------------------------------------------------------------------------------


def _verify(network: Network, domain: Box, data: np.ndarray | None, options: VerifyOptions, folder: Path,
            output: OutputFlags) -> Any:
    from exactprune.pipeline import verify

    checkpoint = _checkpoint(folder, output)
    try:
        with progress(output.quiet or output.json) as shown:
            return verify(network, domain, options, data=data, progress=shown, checkpoint=checkpoint)
    except KeyboardInterrupt:
        kept = f"what is finished is kept in {checkpoint}; the same command with --resume goes on from there"
        raise KeyboardInterrupt(f"interrupted; {kept if checkpoint.exists() else 'nothing written'}") from None


def _checkpoint(folder: Path, output: OutputFlags) -> Path:
    """Where the pipeline keeps what is finished; without --resume an old one is dropped."""
    path = folder / CHECKPOINT
    if output.resume and not path.exists():
        _say(f"nothing to resume in {folder}; starting from the beginning", output)
    if not output.resume:
        path.unlink(missing_ok=True)
    return path


def _write_run(result: Any, folder: Path, model: Path, arch: str | None = None) -> dict[str, Any]:
    from exactprune.report.record import write_run

    summary = write_run(result, folder, model=model, arch=arch)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return summary


# -- after -------------------------------------------------------------------------------------------------------


def _show(summary: dict[str, Any], report: Any, output: OutputFlags) -> None:
    from exactprune.report.strict import pretty
    from exactprune.report.tables import rendered

    if output.json:
        sys.stdout.write(pretty(summary))
    elif not output.quiet:
        sys.stdout.write(rendered(report))


def _say(text: str, output: OutputFlags) -> None:
    """A line for people: on stdout, or on stderr where stdout is for JSON."""
    if not output.quiet:
        print(text, file=sys.stderr if output.json else sys.stdout)
