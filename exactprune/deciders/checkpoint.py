"""A run that was interrupted goes on where it stopped: everything known so far, in one file, replaced atomically.

The file holds no more trust than any other input: points are evaluated again, and bounds count only because the records beside
them pass the checker at the end of the resumed run.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from exactprune.deciders.cascade import BITS, Cascade
from exactprune.deciders.proofs import pack
from exactprune.errors import OptionError
from exactprune.io.atomic import write_bytes

FORMAT = "exactprune-checkpoint/1"
INTERVAL = 5.0


class Checkpoint:
    """Writes what a cascade knows, at most every few seconds; reads it back.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._last = path, monotonic()

    def maybe(self, cascade: Cascade) -> None:
        """Write if the last time is long enough ago."""
        if monotonic() - self._last > INTERVAL:
            self.write(cascade)
            self._last = monotonic()

    def write(self, cascade: Cascade) -> None:
        """Write now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, gzip.compress(json.dumps(_content(cascade)).encode(), compresslevel=3))

    def read(self, cascade: Cascade) -> bool:
        """Hand what the file knows to a fresh cascade; False when there is no file.

        Raises:
            OptionError: the file is damaged, or of another network or domain.
        """
        if not self.path.exists():
            return False
        try:
            content = json.loads(gzip.decompress(self.path.read_bytes()))
            same = content["network"] == cascade.network.sha256 and content["domain"] == cascade.box.sha256
            if content["format"] != FORMAT or not same:
                raise OptionError(f"{self.path}: belongs to another network, domain or version; run without --resume")
            given = _known(content, [len(layer.status) for layer in cascade.layers])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error) as error:
            raise OptionError(f"{self.path}: damaged checkpoint ({type(error).__name__}); run without --resume") from None
        cascade.adopt(*given)
        return True


def _content(cascade: Cascade) -> dict[str, object]:
    lower, upper = [], []
    for layer in range(cascade.program.layers):
        known = cascade.program.preactivation(layer) in cascade.state.known
        bounds = cascade.state.at(layer) if known else None
        lower.append(pack(np.empty(0) if bounds is None else bounds.lower[0].cpu().numpy()))
        upper.append(pack(np.empty(0) if bounds is None else bounds.upper[0].cpu().numpy()))
    return {"format": FORMAT, "network": cascade.network.sha256, "domain": cascade.box.sha256, "lower": lower, "upper": upper,
            "points": pack(cascade.search.snapshot().points), "records": [p.record(BITS[-1]) for p in cascade.proofs],
            "reasons": [{str(i): text for i, text in layer.reasons.items()} for layer in cascade.layers]}


def _known(content: dict[str, Any], sizes: list[int]) -> tuple[list[Any], np.ndarray, list[np.ndarray], list[np.ndarray],
                                                              list[dict[int, str]]]:
    """What ``Cascade.adopt`` takes; a ValueError where the file does not have the form that is written."""
    lower, upper = ([_unpack(a) for a in content[name]] for name in ("lower", "upper"))
    reasons = [{int(i): str(text) for i, text in layer.items()} for layer in content["reasons"]]
    records, points = list(content["records"]), _unpack(content["points"])
    fits = all(a.shape in ((0,), (n,)) and a.shape == b.shape for n, a, b in zip(sizes, lower, upper, strict=True))
    if not fits or np.isnan(np.concatenate([*lower, *upper, np.zeros(1)])).any() or len(reasons) != len(sizes):
        raise ValueError("bounds that do not fit the layers")
    if points.ndim != 2 or not all(isinstance(record, dict) for record in records):
        raise ValueError("points or records of another form")
    return records, points, lower, upper, reasons


def _unpack(value: dict[str, object]) -> np.ndarray:
    import base64

    data = base64.b64decode(str(value["data"]))
    return np.frombuffer(data, dtype=np.dtype(str(value["dtype"]))).reshape(value["shape"]).copy()  # type: ignore[arg-type]
