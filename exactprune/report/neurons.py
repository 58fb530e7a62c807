"""neurons.csv: one line a ReLU neuron, written and read back without loss."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from exactprune.claim import LayerVerdict, Method, Status
from exactprune.errors import CertificateError
from exactprune.ops import Shape

COLUMNS = ("layer", "node", "index", "channel", "row", "col", "status", "method", "lower", "upper", "reason")
_STATUS = {status.word: status for status in Status}
_METHOD = {method.word: method for method in Method}


def neurons_csv(layers: Sequence[LayerVerdict]) -> str:
    """The file's text, lines ended by a line feed.

    ``index`` is flat in C order. Layers of shape (channels, height, width) fill channel, row and col; in a flat layer
    the channel is the index, row and col are empty. Bounds are Python's ``repr`` of the float64: reading them gives the
    same bits.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for layer in layers:
        writer.writerows(_rows(layer))
    return text.getvalue()


def read_neurons(text: str, shapes: Sequence[Shape]) -> tuple[LayerVerdict, ...]:
    """The verdicts back from the file's text.

    Args:
        text: of neurons.csv.
        shapes: of the ReLU layers, in order (run.json has them).

    Raises:
        CertificateError: other columns, a word that is no status or method, or rows missing.
    """
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise CertificateError(f"neurons.csv: columns are not {','.join(COLUMNS)}")
    sizes = [prod(shape) for shape in shapes]
    if len(rows) - 1 != sum(sizes):
        raise CertificateError(f"neurons.csv: has {len(rows) - 1} neurons, run.json says {sum(sizes)}")
    starts = np.cumsum([1, *sizes])
    return tuple(_layer(k, rows[starts[k]:starts[k + 1]], shape) for k, shape in enumerate(shapes))


def place(index: int, shape: Shape) -> tuple[int | str, int | str, int | str]:
    """(channel, row, col) of a flat index; axes after the third are folded into col."""
    if len(shape) <= 1:
        return index, "", ""
    channel, rest = divmod(index, prod(shape[1:]))
    if len(shape) == 2:
        return channel, rest, ""
    return channel, *divmod(rest, prod(shape[2:]))


def _rows(layer: LayerVerdict) -> Iterator[tuple[object, ...]]:
    settled = zip(layer.status.tolist(), layer.method.tolist(), layer.lower.tolist(), layer.upper.tolist(), strict=True)
    for index, (status, method, lower, upper) in enumerate(settled):
        yield (layer.layer, layer.node, index, *place(index, layer.shape), Status(status).word, Method(method).word,
               repr(lower), repr(upper), layer.reasons.get(index, ""))


def _layer(number: int, rows: list[list[str]], shape: Shape) -> LayerVerdict:
    try:
        status, method = [_STATUS[row[6]] for row in rows], [_METHOD[row[7]] for row in rows]
        lower, upper = [float(row[8]) for row in rows], [float(row[9]) for row in rows]
    except (KeyError, ValueError, IndexError) as error:
        raise CertificateError(f"neurons.csv, layer {number}: {error} is not a status, method or bound") from None
    reasons = {int(row[2]): row[10] for row in rows if row[10]}
    node = rows[0][1] if rows else ""
    return LayerVerdict(number, node, shape,
                        np.array(status), np.array(method), np.array(lower), np.array(upper), reasons)
