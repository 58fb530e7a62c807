"""Receptive fields: a program cut down to what some neurons of a layer can see, laid out for speed.

A neuron of a convolutional layer reads a window of the image before it, which reads a slightly larger one before that, and so on;
backward propagation of its row has zeros everywhere else. Neurons of one tile of an image share their windows, so a pass for them
runs on a smaller program: every image is cropped to the window the tile can see (the smallest box around it where several nodes
read one image), and laid out channels last, the order in which gathered windows are copied fastest. Zeros left out and values
permuted change no sum but its order, which no error bound here depends on.

Images that a max pool, a grouped or dilated convolution, or a transposition touches stay whole and in C order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod, sqrt

import torch
from torch import Tensor

from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.linear_maps import ConvMap, DenseMap, LinearMap, MoveMap, ScaleMap, Window
from exactprune.bounds.program import Program
from exactprune.bounds.relaxation import Relaxation
from exactprune.network import INPUT
from exactprune.ops import Add, ReLU, Shape

_ROWS_OF_A_TILE = 110  # both sides together: few enough that windows stay small, enough to hide the cost of a call
_Windows = dict[int, Window | None]


@dataclass(frozen=True, eq=False)
class Field:
    """What one tile of a layer sees.

    Attributes:
        program: the cut program; nodes the tile cannot see are left as they were.
        kept: node -> flat places of the node's output that the cut program holds, in its order; nodes held whole and in
            C order are left out.
        origin: position of the layer's pre-activation.
    """

    program: Program
    kept: Mapping[int, Tensor]
    origin: int

    def local(self, neurons: Tensor) -> Tensor:
        """Where the neurons are in the cut pre-activation."""
        if self.origin not in self.kept:
            return neurons
        return _find(self.kept[self.origin], neurons)

    def bounds(self, known: Mapping[int, NodeBounds]) -> dict[int, NodeBounds]:
        """Bounds of the cut nodes."""
        return {i: _take(b, self.kept[i]) if i in self.kept else b for i, b in known.items() if i <= self.origin}

    def relaxations(self, given: Mapping[int, Relaxation]) -> dict[int, Relaxation]:
        """Relaxations of the cut layers."""
        return {k: self._relaxation(k, r) for k, r in given.items() if self.program.network.relus[k] <= self.origin}

    def _relaxation(self, layer: int, given: Relaxation) -> Relaxation:
        position = self.program.preactivation(layer)
        if given.weight is not None:  # a dense map below, whose input may be cut
            below = self.program.network.nodes[position].inputs[0]
            return replace(given, weight=given.weight[:, self.kept[below]]) if below in self.kept else given
        return given.take(self.kept[position]) if position in self.kept else given


def _find(places: Tensor, wanted: Tensor) -> Tensor:
    """Where the wanted places are in a list that holds them all."""
    order = torch.argsort(places)
    return order[torch.searchsorted(places[order], wanted.contiguous())]


def _take(bounds: NodeBounds, kept: Tensor) -> NodeBounds:
    error = bounds.error if bounds.error is None else bounds.error.index_select(-1, kept)
    return NodeBounds(bounds.lower.index_select(-1, kept), bounds.upper.index_select(-1, kept), error)


def tiles(program: Program, layer: int, neurons: Tensor) -> list[tuple[Tensor, Window | None]]:
    """Neurons of a layer split into tiles of its image: (places in ``neurons``, window); one tile where it is no image."""
    position = program.preactivation(layer)
    everything = torch.arange(neurons.numel(), device=neurons.device)
    if position not in _images(program):
        return [(everything, None)]
    _, height, width = _shape(program, position)
    count = max(1, 2 * len(neurons) // _ROWS_OF_A_TILE)
    high = min(height, ceil(sqrt(height * width / count)))
    wide = min(width, ceil(height * width / (count * high)))
    place = neurons % (height * width)
    tile = place // width // high * ceil(width / wide) + place % width // wide
    found = []
    for number in torch.unique(tile).tolist():
        row, column = divmod(number, ceil(width / wide))
        window = Window(row * high, min(height, (row + 1) * high), column * wide, min(width, (column + 1) * wide))
        found.append((everything[tile == number], window))
    return found


def field(program: Program, layer: int, window: Window | None) -> Field | None:
    """What a window of a layer's pre-activation (None: all of it) sees, made once; None where nothing is an image."""
    key = (layer, window)
    if key not in program.fields:
        program.fields[key] = _field(program, layer, window)
    return program.fields[key]


def _field(program: Program, layer: int, window: Window | None) -> Field | None:
    origin = program.preactivation(layer)
    windows = _windows(program, origin, window)
    kept = {i: _places(_shape(program, i), w, program.device) for i, w in windows.items() if w is not None}
    for i in range(origin + 1):  # flattened images keep the order of the image
        source = program.network.nodes[i].inputs[0]
        if i in windows and _is_reshape(program, i) and source in kept:
            kept[i] = kept[source]
    if not kept:
        return None
    maps = tuple(_cut(program, i, windows, kept) if i in windows else m for i, m in enumerate(program.maps))
    places = (*range(len(program.maps)), INPUT)
    sizes = tuple(len(kept[i]) if i in kept else size for i, size in zip(places, program.sizes, strict=True))
    inside = {(i, j): _find(kept[j], kept[i]) for i in windows if i != INPUT and not isinstance(maps[i], ConvMap)
              for j in program.network.nodes[i].inputs if i in kept and j in kept and len(kept[i]) < len(kept[j])}
    return Field(replace(program, maps=maps, sizes=sizes, fields={}, inside=inside), kept, origin)


def _shape(program: Program, position: int) -> Shape:
    return program.network.shape_of(position)


def _is_reshape(program: Program, position: int) -> bool:
    mapping = program.maps[position]
    return isinstance(mapping, MoveMap) and not mapping.moves and mapping.bias is None


def _images(program: Program) -> frozenset[int]:
    """Nodes whose output can be cropped: images that only gathering convolutions, ReLU, Add and flattening touch."""
    key = ("images", None)
    if key not in program.fields:
        program.fields[key] = _find_images(program)
    return program.fields[key]


def _find_images(program: Program) -> frozenset[int]:
    network = program.network
    found = {i for i in range(INPUT, len(network.nodes)) if len(_shape(program, i)) == 3}
    before = None
    while before != found:
        before = set(found)
        for i, node in enumerate(network.nodes):
            mapping = program.maps[i]
            if isinstance(mapping, ConvMap) and mapping.gathers:
                continue
            if isinstance(mapping, ScaleMap) or isinstance(node.op, ReLU | Add):
                touched = {i, *node.inputs}
                found -= set() if touched <= found else touched
            elif not (_is_reshape(program, i) and len(_shape(program, i)) == 1):
                found -= {i, *node.inputs}
    return frozenset(found)


def _windows(program: Program, origin: int, window: Window | None) -> _Windows:
    """Node -> window seen (None: not an image, held whole), for every node that the origin depends on."""
    images, found = _images(program), {origin: window}
    if origin in images and window is None:
        found[origin] = _whole(_shape(program, origin))
    for i in range(origin, INPUT, -1):
        if i in found:
            for source in program.network.nodes[i].inputs:
                seen = _seen(program, i, found[i], source) if source in images else None
                found[source] = seen if source not in found else _union(found[source], seen)
    return found


def _seen(program: Program, position: int, window: Window | None, source: int) -> Window:
    """What a node with this window reads of one of its inputs."""
    mapping = program.maps[position]
    if window is None:
        return _whole(_shape(program, source))
    return mapping.field(window) if isinstance(mapping, ConvMap) else window


def _whole(shape: Shape) -> Window:
    return Window(0, shape[1], 0, shape[2])


def _union(a: Window | None, b: Window | None) -> Window | None:
    if a is None or b is None:
        return None
    return Window(min(a.top, b.top), max(a.bottom, b.bottom), min(a.left, b.left), max(a.right, b.right))


def _places(shape: Shape, window: Window, device: torch.device) -> Tensor:
    """Flat places of a window, channels last."""
    image = torch.arange(prod(shape), device=device).view(shape)
    return image[:, window.top : window.bottom, window.left : window.right].permute(1, 2, 0).reshape(-1)


def _cut(program: Program, position: int, windows: _Windows, kept: Mapping[int, Tensor]) -> LinearMap | None:
    """The map of one node between what is kept of its input and of its output."""
    mapping = program.maps[position]
    if position == INPUT or mapping is None:
        return mapping
    source = program.network.nodes[position].inputs[0]
    match mapping:
        case ConvMap() if mapping.gathers:
            return mapping.crop(windows[position], windows[source])
        case ScaleMap() if position in kept:
            return mapping.take(kept[position])
        case DenseMap() if source in kept:
            return mapping.columns(kept[source])
    return mapping


