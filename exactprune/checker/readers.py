"""From a model file and a run folder to a check: which reader reads what."""

from __future__ import annotations

from pathlib import Path

from exactprune.checker import read_npz, read_onnx, read_pt, records
from exactprune.checker.engine import Report, check
from exactprune.checker.network import CheckError, Network, OpenShapeError, Shape, UnknownError


def read_network(path: str | Path, input_shape: Shape | None = None) -> Network:
    """The canonical network of a ``.pt``, ``.pth``, ``.onnx`` or ``.npz`` file.

    Raises:
        CheckError: missing, damaged or unsafe; UnknownError: not known to the checker's readers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth"):
        return read_pt.read(path, input_shape)
    if suffix == ".onnx":
        return read_onnx.read(path, input_shape)
    if suffix == ".npz":
        return read_npz.read(path)
    raise UnknownError(f"{path.name}: the checker reads .pt, .onnx and .npz files")


def check_run(model: str | Path, run: str | Path, exact: bool = True, input_shape: Shape | None = None) -> Report:
    """Check a run folder against a model file.

    A sound model file whose kind or operators the checker's readers do not know is taken from the run's
    ``network.npz``, which the report says: then the
    verdicts are about that network, and that it is the model's is the word of the tool that wrote it.

    Args:
        model: the model file.
        run: the folder with ``domain.npz`` and ``certificates.jsonl.gz``.
        exact: see ``engine.check``.
        input_shape: without batch axis, where the file leaves it open.
    """
    run = Path(run)
    try:
        lower, upper = read_npz.domain(run / "domain.npz")
        network, source = _network(Path(model), run, input_shape, lower.shape)
    except CheckError as error:
        return Report(error=str(error))
    report = check(network, lower, upper, records.read_lines(run / "certificates.jsonl.gz"), exact)
    report.source = source
    return report


def _network(model: Path, run: Path, input_shape: Shape | None, domain: Shape) -> tuple[Network, str]:
    """The network and its source; where the file leaves the input's shape open, the domain's shape tells it."""
    try:
        return read_network(model, input_shape), str(model)
    except OpenShapeError:
        return read_network(model, domain), str(model)
    except UnknownError as error:
        stored = run / "network.npz"
        if not stored.is_file():
            raise
        return read_npz.read(stored), f"{stored} (the checker cannot read {model.name} itself: {error})"
