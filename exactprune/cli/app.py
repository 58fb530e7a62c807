"""Commands of ``exactprune``. Everything heavy is imported inside a command, so ``--help`` answers at once.

Exit codes: 0 done, 1 ``check`` rejected a verdict, 2 misuse (one line on stderr, nothing written), 3 interrupted (a
later ``--resume`` goes on), 4 a fault in exactprune itself.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

import exactprune
from exactprune.cli.arguments import (
    OUTPUT,
    CompressFlags,
    DomainFlags,
    InputShape,
    ModelFlags,
    OutputFlags,
    VerifyFlags,
)
from exactprune.cli.config import apply_config
from exactprune.cli.equiv import EquivFlags
from exactprune.cli.prune import PruneFlags
from exactprune.errors import ExactPruneError, OptionError

DONE, REJECTED, MISUSE, INTERRUPTED, FAULT = 0, 1, 2, 3, 4

app = App(name="exactprune", version=exactprune.__version__, version_flags=["--version"],
          help="Make trained ReLU networks smaller and prove that nothing changed.",
          help_format="plaintext", result_action="return_value", suppress_keyboard_interrupt=False)
app.config = (partial(apply_config, app),)


@app.command
def verify(model: Path, /, *, domain: DomainFlags = DomainFlags(), options: VerifyFlags = VerifyFlags(),
           source: ModelFlags = ModelFlags(), output: OutputFlags = OutputFlags()) -> int:
    """Say for every ReLU neuron whether it is stably inactive, stably active or unstable, with certificates.

    Args:
        model: Model file: .pt, .pt2, .safetensors or .onnx.
    """
    from exactprune.cli.commands import run_verify

    return run_verify(model, domain, options.options, source, output)


@app.command
def compress(model: Path, /, *,
             out: Annotated[Path, Parameter(name=["--out", "-o"], group=OUTPUT)],
             change: CompressFlags = CompressFlags(), domain: DomainFlags = DomainFlags(),
             options: VerifyFlags = VerifyFlags(), source: ModelFlags = ModelFlags(),
             output: OutputFlags = OutputFlags()) -> int:
    """Verify a model, remove what is proved removable, and write the smaller model.

    Args:
        model: Model file: .pt, .pt2, .safetensors or .onnx.
        out: Where the smaller model goes: .pt or .onnx.
    """
    from exactprune.cli.commands import run_compress

    return run_compress(model, out, change, domain, options.options, source, output)


@app.command
def check(model: Path, run: Path, bundle: Path | None = None, /, *,
          exact: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
          input_shape: Annotated[InputShape, Parameter(group=OUTPUT)] = None,
          json: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
          quiet: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False) -> int:
    """Check every verdict of a run, or a smaller model, from certificates, without solver and without torch.

    Args:
        model: The model file the run is about; the original model.
        run: Run folder written by verify; with a third argument, the smaller model.
        bundle: Certificate that compress wrote beside the smaller model.
        exact: Integer arithmetic throughout, no float64 filter; exit code 2 where a claim needs float64 bounds.
        input_shape: Input shape without batch axis, for example 1,28,28; needed where the file does not say it.
        json: Print the result as one JSON object on stdout, and nothing else there.
        quiet: Print nothing but errors.
    """
    from exactprune.cli.checking import run_check, run_check_bundle

    if bundle is not None:
        return run_check_bundle(model, run, bundle, exact, input_shape, json, quiet)
    return run_check(model, run, exact, input_shape, json, quiet)


@app.command
def report(run: Path, /, *, output: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
           curve: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
           model: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
           json: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
           quiet: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False) -> int:
    """Write a run as a page to read: report.html (one file, opens anywhere), report.md and report.json.

    Args:
        run: Run folder written by verify or compress.
        output: Folder for the three files; by default the run folder itself.
        curve: Also compress at several allowed deviations, and show what is left; needs the model.
        model: Model file for --curve, where it is no longer at the path the run names.
        json: Print what report.json holds as one JSON object on stdout, and nothing else there.
        quiet: Print nothing but errors.
    """
    from exactprune.cli.report import run_report

    return run_report(run, output, curve, model, json, quiet)


@app.command
def compare(study: Path, /, *, output: Annotated[Path, Parameter(name=["--output", "-o"], group=OUTPUT)],
            fresh: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
            json: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False,
            quiet: Annotated[bool, Parameter(group=OUTPUT, negative="")] = False) -> int:
    """Compare lossless compression with pruning methods: accuracy, certified deviation, classes that can change.

    Args:
        study: TOML file with a table [compare], see docs/report.md.
        output: Folder for comparison.html, .md, .json and .csv; what an earlier run left there is not computed again.
        fresh: Compute everything again, times included.
        json: Print what comparison.json holds as one JSON object on stdout, and nothing else there.
        quiet: Print nothing but errors.
    """
    from exactprune.cli.compare import run_compare

    return run_compare(study, output, json, quiet, fresh)


@app.command
def equiv(a: Path, b: Path, /, *, domain: DomainFlags = DomainFlags(), change: EquivFlags = EquivFlags()) -> int:
    """Bound the largest difference of any two networks over a domain, with the input where it is reached.

    Exit code 0: done; 1: --tolerance is given and equality up to it is not proved.

    Args:
        a: Model file: .pt, .pt2, .safetensors or .onnx.
        b: Model file with as many inputs and outputs.
    """
    from exactprune.cli.equiv import run_equiv

    return run_equiv(a, b, domain, change)


@app.command
def prune(model: Path | None = None, /, *, out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
          masks: Path | None = None, change: PruneFlags = PruneFlags(),
          list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
          json: Annotated[bool, Parameter(negative="")] = False,
          quiet: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Prune a model approximately (a baseline: its outputs change; see compress for what keeps them).

    Args:
        model: Model file: .pt, .pt2, .safetensors or .onnx.
        out: Where the pruned model goes: .pt, .onnx, .pt2 or .npz.
        masks: Where the masks go: .npz, one boolean array per weight.
        list_: Name every method with what it prunes, when, its reference, and its options with their defaults.
        json: Print the report as one JSON object on stdout, and nothing else there.
        quiet: Print nothing but errors.
    """
    from exactprune.cli.prune import run_list, run_prune

    if list_:
        return run_list(json)
    if model is None:
        raise OptionError("prune: which model? name a model file, or give --list")
    return run_prune(model, out, masks, change, json, quiet)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run a command and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command line; every error is one line on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _code(app(list(arguments) or ["--help"], exit_on_error=False, print_error=False))
        sys.stdout.flush()
        return code
    except (ExactPruneError, CycloptsError) as error:
        return _fail(str(error), MISUSE)
    except OSError as error:
        return _os_error(error)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        return _fail(f"{type(error).__name__} inside exactprune, nothing claimed; please report the lines above", FAULT)


def _code(value: Any) -> int:
    return value if isinstance(value, int) else DONE


def _os_error(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):  # the reader of our output left; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    return _fail(f"{error.filename or 'file'}: {error.strerror or error}", MISUSE)


def _fail(message: str, code: int) -> int:
    print("exactprune: error:", " ".join(message.split()), file=sys.stderr)
    return code


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
