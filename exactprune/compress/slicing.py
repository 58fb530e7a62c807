"""Slicing: the box in pieces, each with its own smaller network, and a dispatcher that picks the piece (``--split K``).

On a part of the box more neurons are stable (Lahav and Katz 2021, "Pruning and Slicing Neural Networks using Formal
Verification", FMCAD). Pieces are halved greedily: the piece and the input dimension are those that make the most neurons
stable, by CROWN bounds on both halves and weighted by the piece's share of the box. Closed halves share their border, so the
pieces cover the box exactly, and any piece that holds x is right for x. Whether it pays is a matter of averages:
every input runs one piece, but all pieces have to be stored.

A split folder holds ``dispatch.json`` and one model file a piece. ``load_split(folder).evaluate(x)`` runs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exactprune.compress.levels import Level
from exactprune.domain import Box
from exactprune.errors import DomainError, ExactPruneError, LoadError, OptionError, ShapeError
from exactprune.network import Network

FORMAT = "exactprune-split/1"
FILE = "dispatch.json"
_CANDIDATES = 16  # input dimensions whose halves are bounded


# -- cutting the box --------------------------------------------------------------------------------------------------


def pieces_of(network: Network, domain: Box, count: int, *, seed: int = 0) -> list[Box]:
    """The box in at most ``count`` pieces that cover it; fewer where no input can be halved any more.

    Args:
        network: decides where to cut.
        domain: box of the network's input shape.
        count: number of pieces, at least 1.
        seed: of the points at which slopes are taken.

    Raises:
        OptionError: ``count`` is less than 1.
    """
    if count < 1:
        raise OptionError(f"--split is {count}; give the number of pieces, at least 1")
    pieces, shares = [domain], [1.0]
    cuts = [_best_cut(network, domain, seed)] if count > 1 else []
    while len(pieces) < count:
        at = max(range(len(pieces)), key=lambda i: shares[i] * cuts[i][0])
        dimension = cuts[at][1]
        if dimension is None:
            break
        halves, share = _halves(pieces[at], dimension), shares[at] / 2
        pieces[at:at + 1], shares[at:at + 1] = halves, [share, share]
        cuts[at:at + 1] = [_best_cut(network, half, seed) for half in halves]
    return pieces


def _halves(box: Box, dimension: int) -> tuple[Box, Box]:
    lower, upper = box.lower.ravel().copy(), box.upper.ravel().copy()
    lower[dimension] = upper[dimension] = _middle(box, dimension)
    source = f"piece of: {box.source.removeprefix('piece of: ')}"
    return (Box(box.lower, upper.reshape(box.shape), source), Box(lower.reshape(box.shape), box.upper, source))


def _middle(box: Box, dimension: int) -> float:
    return float(box.lower.flat[dimension] / 2 + box.upper.flat[dimension] / 2)


def _best_cut(network: Network, box: Box, seed: int) -> tuple[float, int | None]:
    """(stable neurons won on average, dimension); dimension None where no input can be halved."""
    order = np.argsort(-_influence(network, box, seed), kind="stable")
    dims = [int(d) for d in order if box.lower.flat[d] < _middle(box, int(d)) < box.upper.flat[d]][:_CANDIDATES]
    if not dims:
        return -math.inf, None
    boxes = [box, *(half for d in dims for half in _halves(box, d))]
    stable = _stable(network, boxes)
    gains = (stable[1::2] + stable[2::2]) / 2 - stable[0]
    return float(gains.max()), dims[int(gains.argmax())]


def _influence(network: Network, box: Box, seed: int, points: int = 32) -> np.ndarray:
    """How much the outputs move along each input's range, from slopes at random points; a heuristic."""
    import torch

    from exactprune.compress.differentiable import compile_network, output_of

    rng = np.random.default_rng(seed)
    x = torch.tensor(box.sample(points, rng).reshape(points, -1), requires_grad=True)
    out = output_of(compile_network(network), x)
    weights = torch.tensor(rng.standard_normal(out.shape))
    (slope,) = torch.autograd.grad((out * weights).sum(), x)
    return slope.abs().mean(dim=0).nan_to_num(0.0).numpy() * (box.upper - box.lower).ravel()


def _stable(network: Network, boxes: Sequence[Box]) -> np.ndarray:
    """Number of neurons that CROWN bounds show to be stable on each box."""
    import torch

    from exactprune.bounds.layerwise import crown_bounds
    from exactprune.bounds.program import compile_network

    program = compile_network(network)
    lower, upper = (torch.tensor(np.stack([getattr(b, name).ravel() for b in boxes])) for name in ("lower", "upper"))
    found = crown_bounds(program, lower, upper)
    counts = [((b.lower >= 0) | (b.upper <= 0)).sum(dim=1) for b in found]
    return np.asarray(sum(counts) if counts else np.zeros(len(boxes)), float)


# -- the dispatcher -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of the box with its network, which differs from the original by at most what ``level`` says there."""

    box: Box
    network: Network
    level: Level


@dataclass(frozen=True, eq=False)
class Dispatcher:
    """Networks for the pieces of a box.

    Attributes:
        domain: the box; pieces: cover it.
    """

    domain: Box
    pieces: tuple[Piece, ...]

    def which(self, x: np.ndarray) -> np.ndarray:
        """Index of the first piece that holds each point of a batch (batch, *input shape).

        Raises:
            ShapeError: ``x`` has another shape.
            DomainError: a point lies outside the domain.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != len(self.domain.shape) + 1 or x.shape[1:] != self.domain.shape:
            raise ShapeError(f"split network: takes (batch, {', '.join(map(str, self.domain.shape))}), was given {x.shape}")
        inside = np.stack([piece.box.contains(x) for piece in self.pieces])
        outside = np.flatnonzero(~inside.any(axis=0))
        if outside.size:
            raise DomainError(f"input {outside[0]} ({outside.size} such) lies outside the box that the pieces cover; "
                              "use the original network there")
        return inside.argmax(axis=0)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """Outputs of the pieces' networks, (batch, *output shape); a single input without batch axis is taken too."""
        if np.shape(x) == self.domain.shape:
            return self.evaluate(np.asarray(x)[None])[0]
        which = self.which(x)
        out = np.zeros((len(which), *self.pieces[0].network.output_shape), self.pieces[0].network.dtype)
        for index in np.unique(which):
            out[which == index] = self.pieces[index].network.evaluate(np.asarray(x)[which == index])
        return out


@dataclass(frozen=True)
class Payoff:
    """What splitting saves for inputs spread uniformly over the box: averages over pieces, weighted by their shares.

    Attributes:
        parameters, macs: used per input on average.
        single_parameters, single_macs: of one compressed network for the whole box.
        stored: parameters of all pieces.
    """

    parameters: float
    macs: float
    single_parameters: int
    single_macs: int
    stored: int

    @property
    def pays(self) -> bool:
        """Whether an input costs fewer multiply-accumulates on average."""
        return self.macs < self.single_macs

    @property
    def words(self) -> str:
        """For people, in one sentence."""
        less = 100 * (1 - self.macs / self.single_macs) if self.single_macs else 0.0
        head = f"Splitting pays: {less:.1f} % fewer" if self.pays else "Splitting does not pay: no fewer"
        return (f"{head} multiply-accumulates per input on average ({self.macs:,.0f} against {self.single_macs:,} of one "
                f"network), {self.parameters:,.0f} parameters used per input against {self.single_parameters:,}, "
                f"{self.stored:,} stored.")


def payoff(single: Network, pieces: Sequence[Piece], domain: Box) -> Payoff:
    """Averages over the pieces, against one compressed network for the whole box."""
    shares = [_share(piece.box, domain) for piece in pieces]
    sizes = [(p.network.parameters, p.network.macs) for p in pieces]
    parameters, macs = (sum(s * size[k] for s, size in zip(shares, sizes, strict=True)) for k in (0, 1))
    return Payoff(parameters, macs, single.parameters, single.macs, sum(size[0] for size in sizes))


def _share(box: Box, domain: Box) -> float:
    """Volume of a piece as a share of the domain's; inputs that are fixed do not count."""
    wide = domain.upper > domain.lower
    return float(np.prod((box.upper - box.lower)[wide] / (domain.upper - domain.lower)[wide]))


# -- files ---------------------------------------------------------------------------------------------------------------


def write_split(folder: str | os.PathLike[str], domain: Box, pieces: Sequence[Piece], *, suffix: str = ".onnx") -> Path:
    """Write the piece networks and ``dispatch.json`` (last).

    Args:
        folder: made where it does not exist.
        domain: what the pieces cover.
        pieces: in the order in which they are tried.
        suffix: format of the networks, see ``exactprune.save``.

    Returns:
        the path of ``dispatch.json``.
    """
    from exactprune.io import save
    from exactprune.io.atomic import write_bytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, piece in enumerate(pieces):
        save(piece.network, folder / f"piece{index}{suffix}")
    summary = {"format": FORMAT, "domain": {"shape": list(domain.shape), "lower": domain.lower.ravel().tolist(),
                                            "upper": domain.upper.ravel().tolist(), "source": domain.source},
               "pieces": [_described(folder / f"piece{i}{suffix}", piece, domain) for i, piece in enumerate(pieces)]}
    write_bytes(folder / FILE, json.dumps(summary, indent=1).encode())
    return folder / FILE


def _described(path: Path, piece: Piece, domain: Box) -> dict[str, Any]:
    """A piece: its file, its level, and its box as the inputs whose interval differs from the domain's."""
    low, high = piece.box.lower.ravel(), piece.box.upper.ravel()
    changed = np.flatnonzero((low != domain.lower.ravel()) | (high != domain.upper.ravel()))
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "box": [[int(i), float(low[i]), float(high[i])] for i in changed],
            "level": {"kind": piece.level.kind.name.lower(), "eps": piece.level.eps, "inputs": piece.level.inputs}}


def load_split(folder: str | os.PathLike[str]) -> Dispatcher:
    """The dispatcher of a split folder.

    Raises:
        LoadError: there is no ``dispatch.json``, it is malformed, or a piece is missing or was changed.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise LoadError(f"{folder}: has no {FILE}; give a folder that compress --split wrote")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["format"] != FORMAT:
            raise LoadError(f"{path}: has format {summary['format']!r}, this version reads {FORMAT}")
        given, shape = summary["domain"], tuple(int(n) for n in summary["domain"]["shape"])
        domain = Box(np.reshape(given["lower"], shape), np.reshape(given["upper"], shape), str(given["source"]))
        pieces = tuple(_piece(Path(folder), item, domain) for item in summary["pieces"])
    except ExactPruneError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{path}: is malformed ({type(error).__name__}: {error}); write it again") from None
    if not pieces or len({(p.network.input_shape, p.network.output_shape) for p in pieces}) > 1:
        raise LoadError(f"{path}: its pieces are no networks with one interface; write it again")
    return Dispatcher(domain, pieces)


def _piece(folder: Path, item: dict[str, Any], domain: Box) -> Piece:
    from exactprune.compress.levels import Kind
    from exactprune.io import load

    path = folder / Path(str(item["file"])).name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != item["sha256"]:
        raise LoadError(f"{path}: is missing, or is not the file that {FILE} names; write the split again")
    lower, upper = domain.lower.ravel().copy(), domain.upper.ravel().copy()
    for index, low, high in item["box"]:
        lower[index], upper[index] = low, high
    box = Box(lower.reshape(domain.shape), upper.reshape(domain.shape), f"piece of: {domain.source}")
    level = item["level"]
    network = load(path, input_shape=domain.shape if path.suffix in (".pt", ".pth") else None)
    return Piece(box, network, Level(Kind[str(level["kind"]).upper()], float(level["eps"]), int(level["inputs"])))
