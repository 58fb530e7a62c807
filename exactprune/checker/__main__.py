"""``python -m exactprune.checker MODEL RUN``: exit 0 when everything is accepted, 1 when not, 2 on misuse."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from exactprune.checker.engine import Report
from exactprune.checker.readers import check_run

SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m exactprune.checker", description="Check the certificates of a run.")
    parser.add_argument("model", type=Path, help="the model file (.pt, .onnx or .npz)")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--exact", action="store_true", help="no floating-point filters (integers decide either way)")
    parser.add_argument("--input-shape", type=_shape, help="C,H,W where the model file does not tell it")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    given = parser.parse_args(arguments)
    for path, wanted in ((given.model, given.model.is_file()), (given.run, given.run.is_dir())):
        if not wanted:
            parser.error(f"{path}: no such {'file' if path is given.model else 'folder'}")
    report = check_run(given.model, given.run, exact=given.exact, input_shape=given.input_shape)
    print(json.dumps(report.as_dict(), indent=1) if given.json else _words(report))
    return 0 if report.accepted else 1


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in text.split(","))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def _words(report: Report) -> str:
    if report.error:
        return f"rejected: {report.error}"
    lines = [f"layer {r.layer}: {len(r.accepted)} of {r.neurons} neurons accepted, {len(r.rejected)} rejected"
             for r in report.layers]
    lines += [f"rejected: layer {k}, neuron {i}, {claim}: {why}" for k, i, claim, why in report.rejected[:SHOWN]]
    verdict = "ACCEPTED" if report.accepted else "REJECTED"
    lines.append(f"{verdict} in {report.seconds:.2f} s (network: {report.source})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
