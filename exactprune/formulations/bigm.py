"""Big-M model of a network on a box, with the tightest bounds that are known, as arrays.

A ReLU neuron with -infinity < l < z_hat < u < infinity is split as z_hat = z - s into z = max(z_hat, 0) and s =
max(-z_hat, 0) (Fischetti and Jo, *Deep neural networks and mixed integer linear optimization*, 2018; Serra,
Tjandraatmadja, Ramalingam,
*Bounding and counting linear regions of deep neural networks*, 2018). With the normalised columns z = u z', s = -l s':

    sum_m w_m y_m + b = u z' - (-l) s',      z' <= phase,      s' <= 1 - phase,      phase in {0, 1}

so the "big M" is the neuron's own range and every constant is 1. Dropping integrality gives z' + s' <= 1, which is the
triangle of Ehlers (*Formal verification of piece-wise linear feed-forward neural networks*, 2017), so the relaxation is
written with that one row and without the phase columns (``binaries=False``).

What is stable under the given bounds has no binary: inactive neurons are dropped; active ones pass their linear form
on, or become one continuous column where that needs fewer nonzeros. Neurons that nothing asked for depends on are
dropped, as are fixed inputs. A max pool is o = max_t y_t with one binary for each candidate that the bounds leave in
(Tjeng, Xiao, Tedrake, *Evaluating robustness of neural networks with MIP*, 2019).

The arrays are float64 and their rows are products of floats, so a solver's answer to them only suggests a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from scipy import sparse

from exactprune.domain import Box
from exactprune.errors import OptionError, ShapeError
from exactprune.formulations.arrays import Columns, Kind, MilpArrays, RowKind, Rows, scaled
from exactprune.formulations.lowering import OUTSIDE, Lowered, is_linear, lower, windows
from exactprune.network import INPUT, Network
from exactprune.ops import MaxPool2d, ReLU


@dataclass(frozen=True, eq=False)
class Form:
    """Affine forms in the columns: ``matrix`` (values x columns, CSR) times y plus ``constant``."""

    matrix: Any
    constant: np.ndarray

    def rows(self, index: np.ndarray) -> Form:
        """Some of the forms."""
        return Form(self.matrix[index], self.constant[index])

    def widened(self, columns: int) -> Form:
        """The same forms over more columns."""
        m = self.matrix
        return Form(sparse.csr_array((m.data, m.indices, m.indptr), shape=(m.shape[0], columns)), self.constant)

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value over columns in [0, 1] (float64, not outward rounded)."""
        low = self.constant + np.asarray(self.matrix.minimum(0).sum(axis=1)).ravel()
        high = self.constant + np.asarray(self.matrix.maximum(0).sum(axis=1)).ravel()
        return low, high


@dataclass(frozen=True, eq=False)
class BigM:
    """A big-M model with zero objective, and the pre-activations that can be asked for.

    Attributes:
        arrays: the constraints.
        network, box: what is modelled.
        target: ReLU layer whose pre-activations are ``forms``; None if the model is of the whole network.
        neurons: flat indices of the neurons in ``forms``.
        forms: their pre-activations as affine forms in the columns.
    """

    arrays: MilpArrays
    network: Network
    box: Box
    target: int | None
    neurons: np.ndarray
    forms: Form

    def objective(self, neuron: int) -> tuple[np.ndarray, float]:
        """(c, offset) with c . y + offset = z_hat of a neuron of the target layer.

        Raises:
            OptionError: the model was not built for this neuron.
        """
        row = np.flatnonzero(self.neurons == neuron)
        if not row.size:
            raise OptionError(f"neuron {neuron} of ReLU layer {self.target} is not in this model; "
                              "name it when the model is built")
        dense = self.forms.matrix[[int(row[0])]].toarray().ravel()
        return dense, float(self.forms.constant[row[0]])

    def point(self, y: np.ndarray) -> np.ndarray:
        """The network input that a solution stands for, in the input's shape, clipped into the box exactly."""
        columns = self.arrays.columns
        found, index = columns.where(Kind.INPUT, INPUT)
        low, high = self.box.lower.ravel(), self.box.upper.ravel()
        x = low.copy()
        x[index] = columns.shift[found] + columns.scale[found] * y[found]
        return np.clip(x, low, high).reshape(self.box.shape)

    def phases(self, fixed: Mapping[tuple[int, int], bool]) -> tuple[np.ndarray, np.ndarray]:
        """Column bounds under phase decisions {(layer, neuron): active?}; neurons without columns are ignored."""
        arrays = self.arrays
        low, high = arrays.col_lower.copy(), arrays.col_upper.copy()
        for (layer, neuron), active in fixed.items():
            here = (arrays.columns.layer == layer) & (arrays.columns.index == neuron)
            high[here & (arrays.columns.kind == (Kind.SLACK if active else Kind.Z))] = 0.0
            phase = here & (arrays.columns.kind == Kind.PHASE)
            low[phase] = high[phase] = float(active)
        return low, high


def build(
    network: Network,
    box: Box,
    lower: Sequence[np.ndarray],
    upper: Sequence[np.ndarray],
    *,
    target: int | None = None,
    neurons: np.ndarray | None = None,
    asked: Mapping[int, np.ndarray] | None = None,
    binaries: bool = True,
) -> BigM:
    """The model of everything that the asked pre-activations depend on.

    Args:
        network: any network of the operators in ``exactprune.ops``.
        box: input domain.
        lower, upper: for every ReLU layer that is encoded (all before ``target``), flat bounds on the pre-activation.
        target: ReLU layer whose pre-activations become objectives.
        neurons: which of them; all by default.
        asked: layer -> neurons that must be encoded themselves, with phase columns where unstable (ISA).
        binaries: False for the LP relaxation without phase columns.

    Raises:
        OptionError: nothing is asked, or a layer does not exist.
        ShapeError: bounds are missing, of the wrong size, NaN, infinite or crossed.
    """
    if target is None and not asked:
        raise OptionError("a big-M model needs a target layer or asked neurons")
    layers = set(asked or ()) | ({target} if target is not None else set())
    if not all(0 <= k < len(network.relus) for k in layers):
        raise OptionError(f"ReLU layers {sorted(layers)} asked, the network has {len(network.relus)}")
    box = box.reshaped(network.input_shape)
    top = max(layers)
    encoded = top if target == top and top not in (asked or {}) else top + 1
    low, high = _checked(network, lower, upper, encoded)
    size = prod(network.shapes[network.relus[target]]) if target is not None else 0
    chosen = np.arange(size) if neurons is None else np.asarray(neurons, np.int64).ravel()
    work = _Builder(network, box, low, high, encoded, binaries)
    work.demand(target, chosen, asked or {})
    work.run()
    arrays, forms = work.finish(target, chosen)
    return BigM(arrays, network, box, target, chosen, forms)


def _checked(network: Network, lower: Sequence[np.ndarray], upper: Sequence[np.ndarray],
             count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if len(lower) < count or len(upper) < count:
        raise ShapeError(f"bounds of {min(len(lower), len(upper))} ReLU layers given, {count} needed")
    result: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for k in range(count):
        size = prod(network.shapes[network.relus[k]])
        low, high = (np.asarray(a[k], np.float64).ravel() for a in (lower, upper))
        if low.size != size or high.size != size:
            raise ShapeError(f"ReLU layer {k}: bounds of {low.size} and {high.size} neurons, the layer has {size}")
        bad = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high) & (low <= high)))
        if bad.size:
            raise ShapeError(
                f"ReLU layer {k}, neuron {bad[0]}: bounds {low[bad[0]]} and {high[bad[0]]} are not finite and "
                f"in order ({bad.size} such); give finite bounds (interval bounds always are)"
            )
        result[0].append(low)
        result[1].append(high)
    return result


class _Builder:
    """Walks the nodes once in topological order and collects columns and rows; used by ``build`` only."""

    def __init__(self, network: Network, box: Box, low: list[np.ndarray], high: list[np.ndarray], encoded: int,
                 binaries: bool) -> None:
        self.network, self.box, self.low, self.high = network, box, low, high
        self.encoded, self.binaries = encoded, binaries
        self.layer_of = {node: k for k, node in enumerate(network.relus)}
        self.lowered: dict[int, Lowered] = {}
        self.needed: dict[int, np.ndarray] = {}
        self.readers: dict[int, float] = {}
        self.forms: dict[int, Form] = {}
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.rows: list[tuple[Any, ...]] = []
        self.width = 0

    # -- what is needed, backwards -----------------------------------------------------------------------------

    def demand(self, target: int | None, chosen: np.ndarray, asked: Mapping[int, np.ndarray]) -> None:
        network = self.network
        for position in range(INPUT, len(network.nodes)):
            self.needed[position] = np.zeros(prod(network.shape_of(position)), bool)
            self.readers[position] = 0.0
        if target is not None:
            before = network.nodes[network.relus[target]].inputs[0]
            self.needed[before][chosen] = True
            self.readers[before] += 1.0
        for layer, neurons in asked.items():
            self.needed[network.relus[layer]][np.asarray(neurons, np.int64)] = True
        for position in reversed(range(len(network.nodes))):
            if self.needed[position].any():
                self._demand_inputs(position)

    def _demand_inputs(self, position: int) -> None:
        node, needed = self.network.nodes[position], self.needed[position]
        shapes = [self.network.shape_of(i) for i in node.inputs]
        if isinstance(node.op, ReLU):
            layer = self.layer_of[position]
            needed = needed & (self.high[layer] > 0)
            own = int((needed & (self.low[layer] < 0)).sum())
            self._mark(node.inputs[0], needed, own)
        elif isinstance(node.op, MaxPool2d):
            places = self._places(position)[needed]
            mask = np.zeros(prod(shapes[0]), bool)
            mask[places[places != OUTSIDE]] = True
            self._mark(node.inputs[0], mask, 2 * int(mask.sum()))
        else:
            lowered = self.lowered[position] = lower(node.op, *shapes)
            for source, matrix in zip(node.inputs, lowered.matrices, strict=True):
                used = np.zeros(matrix.shape[1], bool)
                used[matrix[np.flatnonzero(needed)].indices] = True
                self._mark(source, used, self.readers[position])

    def _mark(self, source: int, mask: np.ndarray, rows: float) -> None:
        self.needed[source] |= mask
        self.readers[source] += rows

    def _places(self, position: int) -> np.ndarray:
        """Flat input indices of each window of a max pool, shape (outputs, window)."""
        op = self.network.nodes[position].op
        assert isinstance(op, MaxPool2d)
        shape = self.network.shape_of(self.network.nodes[position].inputs[0])
        places = windows(shape, op.kernel, op.stride, op.padding, op.dilation)
        return places.reshape(prod(places.shape[:3]), -1)

    # -- forward -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.forms[INPUT] = self._inputs()
        for position, node in enumerate(self.network.nodes):
            wanted = self.needed[position].any()
            if wanted and isinstance(node.op, ReLU):
                self.forms[position] = self._relu(position)
            elif wanted and isinstance(node.op, MaxPool2d):
                self.forms[position] = self._pool(position)
            elif wanted and is_linear(node.op):
                self.forms[position] = self._linear(position)

    def _inputs(self) -> Form:
        low, high = self.box.lower.ravel(), self.box.upper.ravel()
        free = np.flatnonzero(self.needed[INPUT] & (low < high))
        columns = self._new(Kind.INPUT, INPUT, free, low[free], (high - low)[free])
        matrix = sparse.csr_array(((high - low)[free], (free, columns)), shape=(low.size, self.width))
        return Form(matrix, low.copy())

    def _linear(self, position: int) -> Form:
        node, lowered = self.network.nodes[position], self.lowered[position]
        keep = sparse.diags_array(self.needed[position].astype(np.float64), format="csr")
        matrix = sparse.csr_array((self.needed[position].size, self.width))
        constant = lowered.constant.copy()
        for source, weight in zip(node.inputs, lowered.matrices, strict=True):
            form = self.forms[source].widened(self.width) if source in self.forms else None
            if form is None:
                continue
            part = keep @ weight
            matrix = matrix + part @ form.matrix
            constant = constant + part @ form.constant
        return Form(sparse.csr_array(matrix), np.where(self.needed[position], constant, 0.0))

    def _relu(self, position: int) -> Form:
        layer, form = self.layer_of[position], self.forms.get(self.network.nodes[position].inputs[0])
        low, high, needed = self.low[layer], self.high[layer], self.needed[position]
        if form is None:
            return Form(sparse.csr_array((needed.size, self.width)), np.zeros(needed.size))
        unstable = np.flatnonzero(needed & (low < 0) & (high > 0))
        active = np.flatnonzero(needed & (low >= 0) & (high > 0))
        parts = [self._pass_on(layer, form.rows(active), active, self.readers[position])]
        parts.append(self._split(layer, form.rows(unstable), unstable))
        return self._assemble(needed.size, (active, unstable), parts)

    def _assemble(self, size: int, index: Sequence[np.ndarray], parts: Sequence[Form]) -> Form:
        """Forms of some neurons put in their places, zero elsewhere."""
        stacked = sparse.csr_array(sparse.vstack([p.widened(self.width).matrix for p in parts]))
        order = np.concatenate(index)
        place = sparse.csr_array((np.ones(order.size), (order, np.arange(order.size))), shape=(size, order.size))
        constant = np.zeros(size)
        constant[order] = np.concatenate([p.constant for p in parts])
        return Form(sparse.csr_array(place @ stacked), constant)

    def _pass_on(self, layer: int, form: Form, index: np.ndarray, readers: float) -> Form:
        """Stably active neurons: their own forms, or one new column each where that needs fewer nonzeros."""
        spread = np.unique(form.matrix.indices).size
        if readers * spread <= form.matrix.nnz + readers * index.size + index.size:
            return form
        low, high = self.low[layer][index], self.high[layer][index]
        width = np.where(high > low, high - low, 1.0)
        columns = self._new(Kind.ACTIVE, layer, index, low, width, top=np.where(high > low, 1.0, 0.0))
        own = sparse.csr_array((width, (np.arange(index.size), columns)), shape=(index.size, self.width))
        right = low - form.constant
        self._add(RowKind.DEFINITION, layer, index, form.widened(self.width).matrix - own, right, right)
        return Form(own, low)

    def _split(self, layer: int, form: Form, index: np.ndarray) -> Form:
        """Unstable neurons: z' and s', the defining rows, and the phases or the triangle."""
        low, high, n = self.low[layer][index], self.high[layer][index], np.arange(index.size)
        z = self._new(Kind.Z, layer, index, np.zeros(index.size), high)
        s = self._new(Kind.SLACK, layer, index, np.zeros(index.size), -low)
        phase = self._new(Kind.PHASE, layer, index, np.zeros(index.size), np.ones(index.size), integer=True) \
            if self.binaries else None

        def unit(values: np.ndarray, columns: np.ndarray) -> Any:
            return sparse.csr_array((values, (n, columns)), shape=(n.size, self.width))

        one = np.ones(n.size)
        own = unit(high, z)
        definition = form.widened(self.width).matrix - own - unit(low, s)
        self._add(RowKind.DEFINITION, layer, index, definition, -form.constant, -form.constant)
        free = np.full(n.size, -np.inf)
        if phase is None:
            self._add(RowKind.TRIANGLE, layer, index, unit(one, z) + unit(one, s), free, one)
        else:
            self._add(RowKind.PHASE, layer, index, unit(one, z) - unit(one, phase), free, 0 * one)
            self._add(RowKind.PHASE, layer, index, unit(one, s) + unit(one, phase), free, one)
        return Form(own, np.zeros(n.size))

    def _pool(self, position: int) -> Form:
        source = self.forms.get(self.network.nodes[position].inputs[0])
        needed = np.flatnonzero(self.needed[position])
        places = self._places(position)
        if source is None:
            return Form(sparse.csr_array((places.shape[0], self.width)), np.zeros(places.shape[0]))
        low, high = source.range()
        winners: list[tuple[int, int]] = []
        contested: list[tuple[int, np.ndarray]] = []
        for output in needed:
            seen = places[output][places[output] != OUTSIDE]
            best = seen[np.argmax(low[seen])]
            rivals = seen[(high[seen] > low[best]) | (seen == best)]
            if rivals.size == 1:
                winners.append((int(output), int(best)))
            else:
                contested.append((int(output), rivals))
        index = np.array([o for o, _ in winners], np.int64)
        parts = [source.rows(np.array([t for _, t in winners], np.int64))]
        lost = np.array([o for o, _ in contested], np.int64)
        parts.append(self._compare(position, source, lost, [r for _, r in contested], low, high))
        return self._assemble(places.shape[0], (index, lost), parts)

    def _compare(self, position: int, source: Form, index: np.ndarray, rivals: Sequence[np.ndarray], low: np.ndarray,
                 high: np.ndarray) -> Form:
        """o >= y_t, o <= y_t + (top - l_t)(1 - choice_t), sum of choices = 1."""
        if not index.size:
            return Form(sparse.csr_array((0, self.width)), np.zeros(0))
        bottom, top = (np.array([f(a[r]) for r in rivals]) for f, a in ((np.max, low), (np.max, high)))
        o = self._new(Kind.POOL, position, index, bottom, top - bottom)
        sizes = np.array([r.size for r in rivals])
        which, t = np.repeat(np.arange(index.size), sizes), np.concatenate(rivals)
        choice = self._new(Kind.CHOICE, position, t, np.zeros(t.size), np.ones(t.size), integer=True)
        n = np.arange(t.size)
        own = sparse.csr_array(((top - bottom)[which], (n, o[which])), shape=(t.size, self.width))
        rival = source.rows(t).widened(self.width)
        gap = top[which] - low[t]
        right, free = rival.constant - bottom[which], np.full(t.size, np.inf)
        self._add(RowKind.POOL, position, t, own - rival.matrix, right, free)
        chosen = sparse.csr_array((gap, (n, choice)), shape=(t.size, self.width))
        self._add(RowKind.POOL, position, t, own - rival.matrix + chosen, -free, right + gap)
        once = sparse.csr_array((np.ones(t.size), (which, choice)), shape=(index.size, self.width))
        self._add(RowKind.POOL, position, index, once, np.ones(index.size), np.ones(index.size))
        back = sparse.csr_array(((top - bottom), (np.arange(index.size), o)), shape=(index.size, self.width))
        return Form(back, bottom)

    # -- collecting --------------------------------------------------------------------------------------------

    def _new(
        self,
        kind: Kind,
        layer: int,
        index: np.ndarray,
        shift: np.ndarray,
        scale: np.ndarray,
        *,
        integer: bool = False,
        top: np.ndarray | None = None,
    ) -> np.ndarray:
        count = index.size
        high = np.ones(count) if top is None else top
        self.columns.append(
            (np.full(count, kind), np.full(count, layer), index, shift, scale, high, np.full(count, integer))
        )
        self.width += count
        return np.arange(self.width - count, self.width)

    def _add(
        self, kind: RowKind, layer: int, index: np.ndarray, matrix: Any, low: np.ndarray, high: np.ndarray
    ) -> None:
        self.rows.append((np.full(index.size, kind), np.full(index.size, layer), index, matrix, low, high))

    def finish(self, target: int | None, chosen: np.ndarray) -> tuple[MilpArrays, Form]:
        kind, layer, index, shift, scale, high, integer = (
            np.concatenate([part[i] for part in self.columns]) for i in range(7))
        meaning = Columns(kind, layer, index, shift, scale)
        matrix, low, top, rows = self._rows()
        arrays = MilpArrays(
            np.zeros(self.width), 0.0, matrix, low, top, np.zeros(self.width), high, integer, meaning, rows
        )
        if target is None:
            return arrays, Form(sparse.csr_array((0, self.width)), np.zeros(0))
        before = self.network.nodes[self.network.relus[target]].inputs[0]
        return arrays, self.forms[before].rows(chosen).widened(self.width)

    def _rows(self) -> tuple[Any, np.ndarray, np.ndarray, Rows]:
        if not self.rows:
            none, empty = np.zeros(0), np.zeros(0, np.int64)
            return sparse.csr_array((0, self.width)), none, none, Rows(empty, empty, empty, none)
        blocks = [Form(r[3], r[4]).widened(self.width).matrix for r in self.rows]
        kind, layer, index, low, high = (np.concatenate([r[i] for r in self.rows]) for i in (0, 1, 2, 4, 5))
        matrix, low, high, factor = scaled(sparse.vstack(blocks, format="csr"), low, high)
        return matrix, low, high, Rows(kind, layer, index, factor)
