"""``equiv``: how far two model files can differ over a domain."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from exactprune.cli.arguments import OUTPUT, DomainFlags, InputShape, Size
from exactprune.errors import ExactPruneError, OptionError
from exactprune.options import GIB

if TYPE_CHECKING:
    from exactprune.equivalence import Equivalence
    from exactprune.network import Network

EQUIV = Group("Equivalence", sort_key=0)
Flag = Annotated[bool, Parameter(negative="")]
NOT_PROVED = 1


@Parameter(name="*", group=EQUIV)
@dataclass(frozen=True)
class EquivFlags:
    """How the difference is bounded.

    Attributes:
        exact: Close the gap between the bound and the largest difference found.
        gap: Relative gap at which --exact is content.
        tolerance: Exit with 1 unless abs(A - B) <= this is proved for the whole domain.
        time_limit: Seconds for the exact stage.
        starts: Starts of the gradient search, per output and sign.
        seed: Seed of every random choice.
        device: Where bounds are computed: cpu, cuda, or cuda:N.
        memory: Memory the bound computations may use, for example 2G.
        input_shape: Input shape without batch axis, for example 1,28,28; needed where a file does not say it.
        arch_a: Architecture of A, where it is a state_dict file, for example 784-100-10.
        arch_b: Architecture of B, likewise.
        output: .npz that keeps the input of the largest difference found, and the bounds of every output.
        json: Print the result as one JSON object on stdout, and nothing else there.
        quiet: Print nothing but errors.
    """

    exact: Flag = False
    gap: float = 1e-3
    tolerance: Annotated[float | None, Parameter(allow_leading_hyphen=True)] = None
    time_limit: float = 600.0
    starts: int = 24
    seed: int = 0
    device: Annotated[str, Parameter(group=OUTPUT)] = "cpu"
    memory: Annotated[Size, Parameter(group=OUTPUT)] = 2 * GIB
    input_shape: Annotated[InputShape, Parameter(group=OUTPUT)] = None
    arch_a: Annotated[str | None, Parameter(group=OUTPUT)] = None
    arch_b: Annotated[str | None, Parameter(group=OUTPUT)] = None
    output: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    json: Annotated[Flag, Parameter(group=OUTPUT)] = False
    quiet: Annotated[Flag, Parameter(group=OUTPUT)] = False


def run_equiv(a: Path, b: Path, domain: DomainFlags, flags: EquivFlags) -> int:
    """0: done (and within the tolerance, if one is given); 1: not proved to be within the tolerance."""
    from exactprune.cli.commands import UNIT_BOX
    from exactprune.cli.domains import build_domain, check_flags
    from exactprune.cli.progress import progress
    from exactprune.equivalence import equiv
    from exactprune.report.strict import pretty

    way = check_flags(domain)
    _check_output(flags.output)
    first = _load(a, flags.arch_a, flags)
    second = _load(b, flags.arch_b, flags)
    if way is None and not flags.quiet:
        print(UNIT_BOX, file=sys.stderr if flags.json else sys.stdout)
    with progress(flags.quiet or flags.json) as shown:
        result = equiv(first, second, build_domain(domain, first), exact=flags.exact, gap=flags.gap, tolerance=flags.tolerance,
                       time_limit=flags.time_limit, starts=flags.starts, seed=flags.seed, device=flags.device,
                       memory=flags.memory, progress=shown)
    if flags.output is not None:
        _write_point(result, flags.output)
    if flags.json:
        sys.stdout.write(pretty(summary(result, a, b, flags.tolerance)))
    elif not flags.quiet:
        print("\n".join(report(result, flags)))
    return 0 if flags.tolerance is None or result.within(flags.tolerance) else NOT_PROVED


def _check_output(output: Path | None) -> None:
    if output is not None and (output.suffix != ".npz" or output.is_dir() or not output.absolute().parent.is_dir()):
        raise OptionError(f"--output {output}: name an .npz file in an existing folder")


def _load(path: Path, arch: str | None, flags: EquivFlags) -> Network:
    from exactprune.io import load

    try:
        return load(path, input_shape=flags.input_shape, arch=arch)
    except ExactPruneError:
        if flags.input_shape is None:
            raise
    return load(path, arch=arch)


def _write_point(result: Equivalence, path: Path) -> None:
    """``x``, ``output``, ``difference``, and per output ``upper``, ``lower`` and ``points``; written whole or not at all."""
    import numpy as np

    partial = path.with_name(f".{path.name}.{time.time_ns()}.npz")
    try:
        np.savez(partial, x=result.point, output=result.output, difference=result.lower, upper=result.uppers,
                 lower=result.lowers, points=result.points)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def summary(result: Equivalence, a: Path, b: Path, tolerance: float | None) -> dict[str, Any]:
    """The result as JSON-able data."""
    import exactprune

    networks = [{"model": str(path), "sha256": n.sha256, "neurons": n.neurons, "parameters": n.parameters}
                for path, n in ((a, result.a), (b, result.b))]
    return {
        "schema": "exactprune-equiv/1", "version": exactprune.__version__, "a": networks[0], "b": networks[1],
        "domain": {"source": result.domain.source, "sha256": result.domain.sha256, "shape": list(result.domain.shape)},
        "upper": _number(result.upper), "lower": result.lower, "output": result.output,
        "difference": {"numerator": str(result.value.numerator), "denominator": str(result.value.denominator)},
        "point": result.point.reshape(-1).tolist(), "gap": result.gap, "closed": result.closed, "reason": result.reason,
        "tolerance": tolerance, "within": None if tolerance is None else result.within(tolerance),
        "suggested": None if result.suggested is None else _number(result.suggested),
        "outputs": [{"upper": _number(u), "lower": float(v)} for u, v in zip(result.uppers, result.lowers, strict=True)],
        "partners": {"paired": result.partners[0], "neurons": result.partners[1]},
        "stages": [{"name": n, "seconds": s, "upper": _number(u)} for n, s, u in result.stages], "seconds": result.seconds,
    }


def _number(value: float) -> float | None:
    """Infinite (the arithmetic overflowed) is null in JSON."""
    return float(value) if abs(value) != float("inf") else None


def report(result: Equivalence, flags: EquivFlags) -> list[str]:
    """What is printed."""
    from exactprune.compress.levels import upward

    ratio = "the bound is attained" if result.ratio == 1 else f"upper / lower = {result.ratio:.4g}"
    lines = [
        f"A: {result.a.name}, {result.a.neurons:,} neurons, {result.a.parameters:,} parameters",
        f"B: {result.b.name}, {result.b.neurons:,} neurons, {result.b.parameters:,} parameters; "
        f"{result.partners[0]:,} neurons bounded relative to one of A",
        f"domain: {result.domain.source}", "",
        "max over the domain and outputs of abs(A - B), as real functions:",
        f"  at most   {_upward(result.upper)}  certified",
        f"  at least  {result.lower:.6g}  at output {result.output}, in rationals ({ratio})", "",
        f"{'output':>8}  {'at most':>12}  {'at least':>12}",
    ]
    order = sorted(range(len(result.uppers)), key=lambda i: (-result.uppers[i], i))[:10]
    lines += [f"{i:>8}  {_upward(result.uppers[i]):>12}  {result.lowers[i]:>12.6g}" for i in order]
    if len(result.uppers) > len(order):
        lines.append(f"  and {len(result.uppers) - len(order):,} outputs with smaller bounds (--json lists them all)")
    lines.append("")
    lines += [f"  {name}: {seconds:.2f} s, bound {upward(bound) if bound < float('inf') else 'none yet'}"
              for name, seconds, bound in result.stages]
    if result.suggested is not None:
        lines.append(f"  the MILP solver suggests at most {_upward(result.suggested)}; suggested, not certified")
    if result.reason:
        lines.append(f"gap not closed: {result.reason}")
    if flags.tolerance is not None:
        lines.append(_verdict(result, flags.tolerance))
    if flags.output is not None:
        lines.append(f"input of the largest difference found: {flags.output} (array x)")
    return lines


def _upward(value: float) -> str:
    from exactprune.compress.levels import upward

    return upward(value) if value < float("inf") else "unknown (overflow)"


def _verdict(result: Equivalence, tolerance: float) -> str:
    if result.within(tolerance):
        return f"EQUAL up to {tolerance:g}: proved for every input of the domain"
    if result.lower > tolerance:
        return f"NOT EQUAL up to {tolerance:g}: the input found differs by {result.lower:.6g}"
    return f"NOT PROVED equal up to {tolerance:g}: neither proved nor refuted (see --exact)"
