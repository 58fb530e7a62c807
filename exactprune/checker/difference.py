"""How far two networks can differ on a box: a proof that walks the smaller one, exactly, from hints alone.

f is the original, g the smaller network, D the box; ``Bounds`` of f hold what its certificate proved. At each ReLU of g
a hint names the ReLU of f that it came from and, for every unit, the unit of f that it still is (times a positive
number), or that it is *linear*: a new unit whose ReLU never cuts on D. From this the checker computes the errors:

- a unit that is unit s of f:  abs(y_g - t y_f[s]) <= e.  Pre-activations are compared, and relu is 1-Lipschitz and
  commutes with t > 0, so e bounds abs(z_g - t z_f[s]) on D;
- a linear unit:  0 <= relu(z_g) - z_g <= e  with e = max(0, -lower bound of z_g). No unit of f is needed: wherever such
  a unit is read later, it is replaced by what it reads.

A comparison is one linear form in tensors of f plus an error: the form of z_g is carried back through g (affine maps,
convolutions, sums, pools, changes of layout, linear units) until every tensor of g in it has a relation to f, and is
replaced by t y_f[s], at the price |coefficient| e. Then t z_f[s] is subtracted, and the rest is carried back through f:
stably active neurons equal their pre-activation, neurons proved to be multiples of others are replaced by them
(``duplicate``), some are replaced by a line s z_hat at the price of its distance from the ReLU (``line``), anything else
stops there and is bounded by its proved range. All coefficients are integers over powers
of two, so equal functions cancel to exactly zero. Where both networks do the same to tensors that correspond, the
weights are compared as they are, which decides the same with less work (``_match``).

Wrong hints cost the proof, never soundness: they only choose which true inequality is written down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from exactprune.checker import dyadic
from exactprune.checker.bounds import Bounds
from exactprune.checker.chains import Entering
from exactprune.checker.dyadic import Array, Dyadic
from exactprune.checker.layers import KINDS, Interval, Layer, Linear, MaxPool, ReLU, interval, layers, support
from exactprune.checker.network import INPUT, CheckError, Network, Node, Op, Shape

ELEMENTS = 1_500_000  # coefficients of one batch of forms
WIDE = 62  # bits of a row that are kept where a claim is not exact; what is cut off is added to the error
CARRIED = ("AvgPool2d", "Pad", "Reshape", "Transpose")


@dataclass(frozen=True, eq=False)
class Relation:
    """What is proved about a tensor of g; arrays over its elements, flat.

    Attributes:
        of: position of the corresponding tensor of f.
        select: element of that tensor, or -1 for an element of a ReLU that passes its input on.
        ratio: float64 > 0.
        error: float64 >= 0: abs(y_g - ratio * y_f[select]) <= error, or 0 <= y_g - z_g <= error where select is -1.
    """

    of: int
    select: Array
    ratio: Array
    error: Array


@dataclass(frozen=True, eq=False)
class Duplicates:
    """abs(z[gone] - ratio * z[kept]) <= gap at a ReLU of f; arrays over pairs of elements.

    With ratio > 0, y[gone] is ratio * y[kept] up to gap. With ratio < 0, relu(z) = z + relu(-z) makes y[gone]
    z[gone] - ratio * y[kept] up to gap.
    """

    gone: Array
    kept: Array
    ratio: Array
    gap: Array


def elements(shape: Shape, axis: int, units: Array) -> Array:
    """Flat elements of the units ``units`` along an axis of a tensor, -1 where the unit is -1; flat."""
    flat = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    place = tuple(-1 if i == axis else 1 for i in range(len(shape)))
    return np.where(units.reshape(place) < 0, -1, np.take(flat, np.maximum(units, 0), axis=axis)).reshape(-1)


def per_element(shape: Shape, axis: int, values: Array) -> Array:
    """A value per unit as a value per element of a tensor of this shape; flat."""
    place = tuple(-1 if i == axis else 1 for i in range(len(shape)))
    return np.broadcast_to(values.reshape(place), shape).reshape(-1)


def units_of(select: Array, shape: Shape, original: Shape) -> Array | None:
    """Channels that a selection of elements amounts to, or None: (channels, ...) from (channels of f, ...)."""
    if len(shape) != 3 or len(original) != 3 or shape[1:] != original[1:] or not select.size:
        return None
    first = select.reshape(shape[0], -1)[:, 0]
    units = np.where(first < 0, -1, first // max(int(np.prod(original[1:])), 1))
    return units if (elements(original, 0, units) == select).all() else None


class Difference:
    """The relations proved so far between f and g.

    Attributes:
        local: None; or, for ``chains``, the errors of every relation with everything before it equal: relations then pass
            on none, and linear units may not cut at all.
    """

    def __init__(self, bounds: Bounds, smaller: Network, exact: bool, *, local: bool = False) -> None:
        self.f, self.g, self.exact = bounds.network, smaller, exact
        self.local: dict[int, Entering] | None = {} if local else None
        if self.f.input_shape != smaller.input_shape or self.f.shapes[-1] != smaller.shapes[-1]:
            raise CheckError("the networks do not have the same input and output shapes")
        self.f_layers, self.g_layers = bounds.layers, layers(smaller)
        self.layer_of = bounds.layer_of
        self.lower, self.upper = _settled(bounds)
        self.ranges = _ranges(bounds, self.lower, self.upper)
        count = int(np.prod(self.f.input_shape))
        self.relations = {INPUT: Relation(INPUT, np.arange(count), np.ones(count), np.zeros(count))}
        self.duplicates: dict[int, Duplicates] = {}
        self.linear: dict[int, Array] = {}

    # -- what the hints ask for --------------------------------------------------------------------------------

    def add_duplicates(self, of: int, axis: int, gone: Array, kept: Array, ratios: Array) -> None:
        """Prove that units of a ReLU of f are multiples of others, up to a gap that later forms pay for."""
        self._require_kind(self.f, of, "ReLU")
        self._require_positive(np.abs(ratios), f"duplicates of node {of}")
        if of in self.duplicates or set(gone.tolist()) & set(kept.tolist()):
            raise CheckError(f"duplicates of node {of}: stand twice, or a unit is a multiple of one that goes")
        shape = self.f.shape_of(of)
        places, sources = elements(shape, axis, gone), elements(shape, axis, kept)
        part = tuple(len(gone) if i == axis else n for i, n in enumerate(shape))
        ratio = per_element(part, axis, ratios)
        gap = per_element(part, axis, np.where(self._proportional(of, gone, kept, ratios), 0.0, np.inf)).copy()
        open_ = np.flatnonzero(np.isinf(gap))
        for rows in self._batches(open_):
            pending = {self.f.nodes[of].inputs[0]: _pairs(shape, places[rows], sources[rows], ratio[rows])}
            gap[rows] = _largest(*self._range_in_f(pending, len(rows)))
        self.duplicates[of] = Duplicates(places, sources, ratio, self._finite(gap, f"duplicates of node {of}"))

    def add_linear(self, of: int, axis: int, units: Array, slopes: Array) -> None:
        """Let units of a ReLU of f pass as a multiple of their pre-activation; how far that is off is paid for."""
        self._require_kind(self.f, of, "ReLU")
        if of in self.linear or not np.isfinite(slopes).all():
            raise CheckError(f"lines of node {of} stand twice, or are not finite")
        shape = self.f.shape_of(of)
        part = tuple(len(units) if i == axis else n for i, n in enumerate(shape))
        found = np.zeros(int(np.prod(shape)))
        found[elements(shape, axis, units)] = per_element(part, axis, slopes)
        self.linear[of] = found

    def relate(self, position: int, of: int, axis: int, units: Array, ratios: Array) -> None:
        """Prove the relation of a ReLU or max pool of g to a node of f."""
        kind = self.g.nodes[position].op.kind
        self._require_kind(self.f, of, kind)
        if position in self.relations:
            raise CheckError(f"node {position} of the smaller network is related twice")
        source, original = self.g.nodes[position].inputs[0], self.f.nodes[of].inputs[0]
        self._shapes_fit(position, of, axis, units)
        self._require_positive(ratios, f"node {position}")
        if kind == "MaxPool2d":
            self._relate_pool(position, of, units, ratios)
            return
        select = elements(self.f.shape_of(of), axis, units)
        ratio = per_element(self.g.shape_of(position), axis, ratios)
        error = self._finite(self._compare(source, original, select, ratio), f"node {position}")
        if self.local is not None:
            self.local[position] = self._entering(source, original, select, ratio, error)
            if error[select < 0].any():
                raise CheckError(f"node {position}: a linear unit may be cut")
            error = np.zeros_like(error)
        self.relations[position] = Relation(of, select, ratio, error)

    def _entering(self, position: int, original: int, select: Array, ratio: Array, error: Array) -> Entering:
        """What an error is as a form in the input, up to a rest, where every relation passes on none."""
        count = int(np.prod(self.f.input_shape))
        form, low, high = np.zeros((len(select), count)), np.zeros(len(select)), np.zeros(len(select))
        for rows in self._batches(np.flatnonzero((error > 0) & (select >= 0))):
            totals = _Totals(len(rows), apart=True)
            low[rows], high[rows] = self._form(position, original, rows, select[rows], ratio[rows], totals)
            if totals.input is not None:
                form[rows] = dyadic.to_float_up(totals.input).reshape(len(rows), -1)
        reach = np.maximum(np.abs(self.ranges[INPUT][0]), np.abs(self.ranges[INPUT][1])).reshape(-1)
        slack = np.where((error > 0) & (select >= 0), 2.0**-48 * (np.abs(form) @ reach) + 2.0**-900, 0.0)
        return Entering(np.where(select >= 0, error, 0.0), form, low - slack, high + slack)

    def _relate_pool(self, position: int, of: int, units: Array, ratios: Array) -> None:
        source, original = self.g.nodes[position].inputs[0], self.f.nodes[of].inputs[0]
        same = _same_settings(self.g.nodes[position].op, self.f.nodes[of].op)
        if (units < 0).any() or not same or self.g.shape_of(source)[1:] != self.f.shape_of(original)[1:]:
            raise CheckError(f"node {position}: a max pool needs the same windows and a unit of f for each of its own")
        inner = elements(self.f.shape_of(original), 0, units)
        error = self._compare(source, original, inner, per_element(self.g.shape_of(source), 0, ratios))
        error = self._through(self.g_layers[position], self._finite(error, f"node {position}"))
        self.relations[position] = Relation(of, elements(self.f.shape_of(of), 0, units),
                                            per_element(self.g.shape_of(position), 0, ratios), error)

    def deviation(self) -> float:
        """A bound on abs(f - g) over D and all outputs."""
        return float(self.output_error().max(initial=0.0))

    def output_error(self) -> Array:
        """A bound on abs(f - g) over D for every output."""
        last, original = len(self.g.nodes) - 1, len(self.f.nodes) - 1
        count = int(np.prod(self.f.shapes[-1]))
        return self._finite(self._compare(last, original, np.arange(count), np.ones(count)), "the output")

    def _shapes_fit(self, position: int, of: int, axis: int, units: Array) -> None:
        shape, original = self.g.shape_of(position), self.f.shape_of(of)
        rest = [(a, b) for i, (a, b) in enumerate(zip(shape, original, strict=False)) if i != axis]
        pool = self.g.nodes[position].op.kind == "MaxPool2d"
        if (len(shape) != len(original) or not 0 <= axis < len(shape) or any(a != b for a, b in rest)
                or len(units) != shape[axis] or units.max(initial=-1) >= original[axis] or (pool and axis)):
            raise CheckError(f"node {position}: {len(units)} units of shape {list(shape)} along axis {axis} do not fit "
                             f"{list(original)}")

    @staticmethod
    def _require_kind(network: Network, position: int, kind: str) -> None:
        if kind not in ("ReLU", "MaxPool2d") or network.nodes[position].op.kind != kind:
            raise CheckError(f"node {position} of the original is no {kind}, or {kind} has no relations")

    @staticmethod
    def _require_positive(ratios: Array, where: str) -> None:
        if not (np.isfinite(ratios).all() and (ratios > 0).all()):
            raise CheckError(f"{where}: a ratio is not positive; only positive numbers pass through a ReLU")

    @staticmethod
    def _finite(values: Array, where: str) -> Array:
        if not np.isfinite(values).all():
            raise CheckError(f"{where}: the error leaves the range of float64")
        return values

    # -- comparing tensors -------------------------------------------------------------------------------------

    def _compare(self, position: int, original: int, select: Array, ratio: Array) -> Array:
        """Errors of every element of a tensor of g that feeds a ReLU (or is the output): see ``Relation``."""
        error = np.where(select < 0, np.inf, self._match(position, original, select, ratio))
        for rows in self._batches(np.flatnonzero(np.isinf(error))):
            low, high = self._form(position, original, rows, select[rows], ratio[rows])
            error[rows] = np.where(select[rows] < 0, np.maximum(-low, 0.0), _largest(low, high))
        return error

    def _batches(self, rows: Array) -> list[Array]:
        widest = max(int(np.prod(n.shape_of(i))) for n in (self.f, self.g) for i in range(INPUT, len(n.nodes)))
        size = max(1, ELEMENTS // max(widest, 1))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _form(self, position: int, original: int, rows: Array, select: Array, ratio: Array,
              totals: _Totals | None = None) -> tuple[Array, Array]:
        """Range of z_g[row] - ratio * z_f[select] (of z_g[row] where select is -1) on D."""
        totals = totals or _Totals(len(rows))
        start = _unit_rows(self.g.shape_of(position), np.arange(len(rows)), rows, np.ones(len(rows)), len(rows))
        pending = self._back_through_g({position: start}, totals)
        paired = np.flatnonzero(select >= 0)
        if len(paired):
            other = _unit_rows(self.f.shape_of(original), paired, select[paired], -ratio[paired], len(rows))
            pending[original] = dyadic.add(pending.get(original), other)
        self._back_through_f(pending, totals)
        return totals.range()

    def _range_in_f(self, pending: dict[int, Dyadic], count: int) -> tuple[Array, Array]:
        totals = _Totals(count)
        self._back_through_f(pending, totals)
        return totals.range()

    def _back_through_g(self, pending: dict[int, Dyadic], totals: _Totals) -> dict[int, Dyadic]:
        """Forms in tensors of g -> forms in tensors of f."""
        found: dict[int, Dyadic] = {}
        for position in range(max(pending), INPUT - 1, -1):
            rows, v = _live(pending.pop(position, None))
            if not len(rows):
                continue
            relation = self.relations.get(position)
            if relation is None:
                self._push(self.g, self.g_layers[position], position, rows, v, totals, pending)
                continue
            flat = replace(v, values=v.values.reshape(len(rows), -1))
            totals.add_error(rows, flat, relation.error)
            linear = relation.select < 0
            if linear.any():
                source = self.g.nodes[position].inputs[0]
                passed = replace(v, values=np.where(linear, flat.values, 0).reshape(v.values.shape))
                pending[source] = dyadic.add(pending.get(source), totals.spread(rows, passed))
            part = _selected(flat, relation, self.f.shape_of(relation.of))
            found[relation.of] = dyadic.add(found.get(relation.of), totals.spread(rows, part))
        return found

    def _back_through_f(self, pending: dict[int, Dyadic], totals: _Totals) -> None:
        """Bound forms in tensors of f, by what is proved about f."""
        for position in range(max(pending, default=INPUT), INPUT - 1, -1):
            rows, v = _live(pending.pop(position, None))
            if not len(rows):
                continue
            v = v if self.exact else self._rounded(position, rows, v, totals)
            layer = None if position == INPUT else self.f_layers[position]
            if isinstance(layer, ReLU):
                v = self._active_part(position, rows, v, totals)
                source = self.f.nodes[position].inputs[0]
                pending[source] = dyadic.add(pending.get(source), totals.spread(rows, v))
            elif layer is None and totals.apart:
                totals.input = totals.spread(rows, v)
            elif layer is None or isinstance(layer, MaxPool):
                totals.add_box(rows, v, *self.ranges[position])
            else:
                self._push(self.f, layer, position, rows, v, totals, pending)

    @staticmethod
    def _push(network: Network, layer: Layer, position: int, rows: Array, v: Dyadic, totals: _Totals,
              pending: dict[int, Dyadic]) -> None:
        if isinstance(layer, ReLU | MaxPool):
            raise CheckError(f"node {position} ({layer.op.kind}) of the smaller network is read but not related")
        w, constant = layer.backward(v, True)
        w = replace(w, values=dyadic.narrow(w.values))
        if constant is not None:
            totals.add(rows, constant, replace(constant, values=-constant.values))
        for source in network.nodes[position].inputs:
            pending[source] = dyadic.add(pending.get(source), totals.spread(rows, w))

    def _active_part(self, position: int, rows: Array, v: Dyadic, totals: _Totals) -> Dyadic:
        """What passes a ReLU of f: first multiples are replaced, then every neuron by a line (slope 0: it stops here)."""
        shape, k = v.values.shape, self.layer_of[position]
        flat = replace(v, values=v.values.reshape(len(rows), -1))
        known = self.duplicates.get(position)
        part = None
        if known is not None:
            flat, part = _merged(flat, rows, known, totals)
        slope, least, most = self._line(position, k)
        totals.add_box(rows, flat, least, most)
        passed = dyadic.add(part, _times(flat, slope))
        return replace(passed, values=passed.values.reshape(shape))

    def _line(self, position: int, k: int) -> tuple[Array, Array, Array]:
        """Slopes s of a ReLU of f with sound bounds of relu(z) - s z: 1 for active neurons, as hinted, else 0."""
        lower, upper = self.lower[k], self.upper[k]
        slope = np.where(lower >= 0, 1.0, self.linear.get(position, np.zeros(lower.size)))
        ends = [_beyond(t, slope) for t in (lower, upper)]
        kink = (lower <= 0) & (upper >= 0)
        least, most = np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])
        return slope, np.where(kink, np.minimum(least, 0.0), least), np.where(kink, np.maximum(most, 0.0), most)

    def _rounded(self, position: int, rows: Array, v: Dyadic, totals: _Totals) -> Dyadic:
        """Rows cut to ``WIDE`` bits, and what that can change."""
        excess = np.maximum(dyadic.row_width(v.values) - WIDE + 2, 0)
        if not excess.any():
            return v
        lower, upper = self.ranges[position]
        size = float(np.nextafter(np.maximum(np.abs(lower), np.abs(upper)).sum() * (1 + 1e-6), np.inf))
        values = dyadic.narrow(v.values >> dyadic.column(excess.astype(object), v.values))
        cost = dyadic.from_float(np.full(len(rows), size))
        cost = Dyadic(cost.values.astype(object) * (excess > 0), cost.exponent + v.exponent + excess, v.divisor)
        totals.add(rows, cost, cost)
        return Dyadic(values, v.exponent + excess, v.divisor)

    # -- comparing weights -------------------------------------------------------------------------------------

    def _match(self, position: int, original: int, select: Array, ratio: Array) -> Array:
        """Errors of y_g = ratio * y_f[select] where both networks do the same; infinite where that does not show."""
        known = self.relations.get(position)
        if known is not None:
            same = (known.select == select) & (known.ratio == ratio) & (select >= 0) & (known.of == original)
            return np.where(same, known.error, np.inf)
        nothing = np.full(len(select), np.inf)
        node, other = self.g.nodes[position], None if original == INPUT else self.f.nodes[original]
        if other is not None and other.op.kind == "Add":
            return self._match_sum(position, original, select, ratio)
        if other is None or node.op.kind != other.op.kind or not _same_settings(node.op, other.op):
            return nothing
        if node.op.kind in ("Affine", "Conv2d"):
            return self._match_linear(position, original, select, ratio)
        if node.op.kind == "Scale":
            return self._match_scale(position, original, select, ratio)
        return self._match_carried(position, original, select, ratio) if node.op.kind in CARRIED else nothing

    def _match_sum(self, position: int, original: int, select: Array, ratio: Array) -> Array:
        best = np.full(len(select), np.inf)
        a, b = self.f.nodes[original].inputs
        for first, zero in ((a, b), (b, a)):
            low, high = (x.reshape(-1) for x in self.ranges[zero])
            still = ((low == 0) & (high == 0))[select]
            if still.any():
                best = np.minimum(best, np.where(still, self._match(position, first, select, ratio), np.inf))
        if position == INPUT or self.g.nodes[position].op.kind != "Add":
            return best
        for x, y in {(a, b), (b, a)}:
            p, q = self.g.nodes[position].inputs
            errors = [self._match(*pair, select, ratio) for pair in ((p, x), (q, y))]
            with np.errstate(invalid="ignore"):
                best = np.fmin(best, dyadic.add_up(*errors))
        return best

    def _match_scale(self, position: int, original: int, select: Array, ratio: Array) -> Array:
        s, c = _scale(self.g, position)
        t, d = _scale(self.f, original)
        same = (s == t[select]) & (c == d[select]) & (ratio == 1)
        inner = self._match(self.g.nodes[position].inputs[0], self.f.nodes[original].inputs[0], select, ratio)
        good = same & np.isfinite(inner)
        return np.where(good, dyadic.multiply_up(np.where(good, inner, 0.0), np.abs(s)), np.inf)

    def _match_carried(self, position: int, original: int, select: Array, ratio: Array) -> Array:
        """Changes of layout, zero padding and average pools, from what they read."""
        nothing = np.full(len(select), np.inf)
        source, other = self.g.nodes[position].inputs[0], self.f.nodes[original].inputs[0]
        kind = self.g.nodes[position].op.kind
        if kind == "Reshape":
            return self._match(source, other, select, ratio)
        if kind == "Transpose":
            mine, its = _moved(self.g, position), _moved(self.f, original)
            inner, weight = np.empty_like(select), np.empty_like(ratio)
            inner[mine], weight[mine] = np.where(select < 0, -1, its[select]), ratio
            return self._match(source, other, inner, weight)[mine]
        units = units_of(select, self.g.shape_of(position), self.f.shape_of(original))
        factor = ratio.reshape(max(self.g.shape_of(position)[0], 1), -1)
        grows = self.g.shape_of(source)[:1] != self.g.shape_of(position)[:1]
        if units is None or grows or (factor != factor[:, :1]).any():
            return nothing
        inner = elements(self.f.shape_of(other), 0, units)
        error = self._match(source, other, inner, per_element(self.g.shape_of(source), 0, factor[:, 0]))
        good = np.isfinite(error).all() and self.g.nodes[position].op.settings.get("value", 0) == 0
        return self._through(self.g_layers[position], error) if good else nothing

    def _source(self, position: int, original: int) -> Relation | None:
        """The relation of what a layer reads, if it has one to what its counterpart reads."""
        known = self.relations.get(position)
        if known is not None or position == INPUT or original == INPUT:
            return known if known is not None and known.of == original else None
        node, other = self.g.nodes[position], self.f.nodes[original]
        carried = node.op.kind in CARRIED and other.op.kind == node.op.kind
        inner = self._source(node.inputs[0], other.inputs[0]) if carried else None
        if inner is not None:
            return self._carried(position, original, inner)
        shape = self.g.shape_of(position)
        count = int(np.prod(shape))
        if shape != self.f.shape_of(original):
            return None
        error = self._match(position, original, np.arange(count), np.ones(count))
        return Relation(original, np.arange(count), np.ones(count), error) if np.isfinite(error).all() else None

    def _carried(self, position: int, original: int, inner: Relation) -> Relation | None:
        kind, source = self.g.nodes[position].op.kind, self.g.nodes[position].inputs[0]
        if (inner.select < 0).any() or not _same_settings(self.g.nodes[position].op, self.f.nodes[original].op):
            return None
        if kind == "Reshape":
            return replace(inner, of=original)
        if kind == "Transpose":
            mine, its = _moved(self.g, position), np.argsort(_moved(self.f, original))
            return Relation(original, its[inner.select[mine]], inner.ratio[mine], inner.error[mine])
        shape, before = self.g.shape_of(position), self.g.shape_of(source)
        units = units_of(inner.select, before, self.f.shape_of(self.f.nodes[original].inputs[0]))
        factor = inner.ratio.reshape(before[0], -1) if len(before) == 3 else np.zeros((1, 0))
        zero = self.g.nodes[position].op.settings.get("value", 0) == 0
        if units is None or shape[0] != before[0] or (factor != factor[:, :1]).any() or not zero:
            return None
        error = self._through(self.g_layers[position], inner.error)
        return Relation(original, elements(self.f.shape_of(original), 0, units), per_element(shape, 0, factor[:, 0]),
                        error)

    def _match_linear(self, position: int, original: int, select: Array, ratio: Array) -> Array:
        """Affine maps and convolutions: rows whose weights are those of f, but for units of f that are constant."""
        nothing = np.full(len(select), np.inf)
        node, other = self.g.nodes[position], self.f.nodes[original]
        relation = self._source(node.inputs[0], other.inputs[0])
        rows = _by_unit(select, self.g.shape_of(position), self.f.shape_of(original))
        columns = relation and _by_unit(relation.select, self.g.shape_of(node.inputs[0]),
                                        self.f.shape_of(other.inputs[0]))
        if relation is None or rows is None or columns is None or (relation.ratio != 1).any():
            return nothing
        used = columns[columns >= 0]
        factor = ratio.reshape(len(rows), -1)
        if len(np.unique(used)) != len(used) or (factor != factor[:, :1]).any():
            return nothing
        mine, its = _dense(node.op), _dense(other.op)
        same = self._same_rows(mine, its, rows, columns, factor[:, 0], node.op, other)
        error = self._through(_absolute(self.g_layers[position]), relation.error)
        return np.where(np.repeat(same, factor.shape[1]), error, np.inf)

    def _same_rows(self, mine: Array, its: Array, rows: Array, columns: Array, factor: Array, op: Op,
                   other: Node) -> Array:
        """Booleans per output unit of g; weights are (outputs, inputs, taps)."""
        given = np.zeros((len(mine), its.shape[1], its.shape[2]))
        given[:, columns[columns >= 0]] = mine[:, columns >= 0]
        wanted = its[np.maximum(rows, 0)]
        good = (rows >= 0) & (factor == 1) & ~(mine[:, columns < 0] != 0).any(axis=(1, 2))
        shift = tuple(b.astype(np.float64) for b in (op.arrays["bias"], other.op.arrays["bias"][np.maximum(rows, 0)]))
        value = self._constant_units(other.inputs[0], its.shape[1])
        differs = (given != wanted).any(axis=2)
        good &= ~(differs & np.isnan(value)).any(axis=1)
        moved = differs & (np.nan_to_num(value) != 0)
        padded = any(op.settings.get("padding", ()))
        for row in np.flatnonzero(good):
            if not moved[row].any():
                good[row] = shift[0][row] == shift[1][row]
            else:
                rest = Fraction(shift[0][row]) - Fraction(shift[1][row])
                for unit in np.flatnonzero(moved[row]):
                    rest += Fraction(value[unit]) * sum(map(Fraction, given[row, unit]), Fraction(0))
                    rest -= Fraction(value[unit]) * sum(map(Fraction, wanted[row, unit]), Fraction(0))
                good[row] = rest == 0 and not padded
        return good

    def _constant_units(self, position: int, count: int) -> Array:
        """The value of every unit of a tensor of f that is one number on D, else NaN."""
        low, high = (x.reshape(count, -1) for x in self.ranges[position])
        one = (low == high).all(axis=1) & (low == low[:, :1]).all(axis=1)
        return np.where(one, low[:, 0], np.nan)

    def _proportional(self, of: int, gone: Array, kept: Array, ratios: Array) -> Array:
        """Which units of a ReLU of f are multiples of others by their weights and biases alone."""
        feeder = self.f.nodes[of].inputs[0]
        op = self.f.nodes[feeder].op if feeder != INPUT else None
        if op is None or op.kind != "Conv2d" or op.settings["groups"] != 1:
            return np.zeros(len(gone), bool)
        weight, bias = (op.arrays[k].astype(np.float64).reshape(len(op.arrays["bias"]), -1) for k in ("weight", "bias"))
        values = dyadic.exact_int(np.concatenate([weight, bias], axis=1))[0].astype(object)
        found = [all(Fraction(int(y)) == Fraction(float(t)) * int(x) for x, y in zip(values[i], values[j], strict=True))
                 for i, j, t in zip(kept, gone, ratios, strict=True)]
        return np.array(found, bool)

    @staticmethod
    def _through(layer: Layer, error: Array) -> Array:
        """Errors of what an operator with non-negative weights and no constants makes of elements with errors."""
        if not error.any():
            return np.zeros(int(np.prod(layer.out)))
        error = error.reshape(1, *layer.shape)
        return layer.interval([(np.zeros_like(error), error)], True)[1].reshape(-1)


# -- bounds of f -------------------------------------------------------------------------------------------------------


def _settled(bounds: Bounds) -> tuple[list[Array], list[Array]]:
    """Bounds of every ReLU layer, by intervals where the certificate says nothing."""
    if bounds.network.relus:
        bounds.reach(len(bounds.network.relus) - 1)
    return [b.copy() for b in bounds.lower], [b.copy() for b in bounds.upper]


def _ranges(bounds: Bounds, lower: list[Array], upper: list[Array]) -> dict[int, tuple[Array, Array]]:
    """Interval bounds of every tensor of f from the final bounds of its ReLU layers, which are narrowed in place."""
    ranges = {INPUT: (bounds.box[0][None], bounds.box[1][None])}
    for position, layer in enumerate(bounds.layers):
        given = [ranges[i] for i in bounds.network.nodes[position].inputs]
        if isinstance(layer, ReLU):
            k = bounds.layer_of[position]
            lower[k] = np.maximum(lower[k], given[0][0].reshape(-1))
            upper[k] = np.minimum(upper[k], given[0][1].reshape(-1))
            given = [(lower[k].reshape(1, *layer.shape), upper[k].reshape(1, *layer.shape))]
        ranges[position] = layer.interval(given, True)
        if not all(np.isfinite(b).all() for b in ranges[position]):
            raise CheckError(f"node {position}: its interval bounds leave the range of float64")
    return ranges


# -- forms -------------------------------------------------------------------------------------------------------------


class _Totals:
    """For every row, upper bounds of the form and of its negative so far; the form in the input ``apart`` if asked for."""

    def __init__(self, count: int, apart: bool = False) -> None:
        self.count, self.apart = count, apart
        self.input: Dyadic | None = None
        zero = np.zeros(count, np.int64)
        self.high = self.low = Dyadic(zero.astype(object), zero)

    def spread(self, rows: Array, part: Dyadic) -> Dyadic:
        """What belongs to some rows as an array over all rows."""
        if len(rows) == self.count:
            return part
        values = np.zeros((self.count, *part.values.shape[1:]), part.values.dtype)
        exponent = np.full(self.count, int(part.exponent.max(initial=0)), np.int64)
        values[rows], exponent[rows] = part.values, part.exponent
        return Dyadic(values, exponent, part.divisor)

    def add(self, rows: Array, high: Dyadic, low: Dyadic) -> None:
        """Add upper bounds of a part of the forms of some rows, and of the part's negative."""
        self.high = dyadic.add(self.high, self.spread(rows, high))
        self.low = dyadic.add(self.low, self.spread(rows, low))

    def add_box(self, rows: Array, v: Dyadic, lower: Array, upper: Array) -> None:
        """Add v . y for y between bounds."""
        box = interval(lower.reshape(1, -1), upper.reshape(1, -1), True)
        self.add(rows, support(v, box), support(replace(v, values=-v.values), box))

    def add_error(self, rows: Array, v: Dyadic, error: Array) -> None:
        """Add v . err for abs(err) <= error."""
        used = np.flatnonzero(error)
        if len(used):
            size = Dyadic(np.abs(v.values[:, used]), v.exponent, v.divisor)
            cost = support(size, _point(error[used]))
            self.add(rows, cost, cost)

    def range(self) -> tuple[Array, Array]:
        """Lower and upper bounds, float64 rounded outward."""
        return -_floats(self.low), _floats(self.high)


def _floats(number: Dyadic) -> Array:
    each = zip(number.values, number.exponent, strict=True)
    return np.array([dyadic.float_up(int(v), int(e), number.divisor) for v, e in each], np.float64)


def _point(values: Array) -> Interval:
    return interval(values.reshape(1, -1), values.reshape(1, -1), True)


def _live(v: Dyadic | None) -> tuple[Array, Dyadic]:
    """The rows that are not zero, and their numbers."""
    if v is None:
        return np.zeros(0, np.int64), Dyadic(np.zeros((0, 1), np.int64), np.zeros(0, np.int64))
    rows = np.flatnonzero((v.values != 0).reshape(len(v.values), -1).any(axis=1))
    return rows, v if len(rows) == len(v.values) else Dyadic(v.values[rows], v.exponent[rows], v.divisor)


def _unit_rows(shape: Shape, rows: Array, places: Array, values: Array, count: int) -> Dyadic:
    """(count, *shape) with one number in some rows."""
    numbers, exponent = dyadic.exact_int(values)
    table = np.zeros((count, int(np.prod(shape))), numbers.dtype)
    table[rows, places] = numbers
    return Dyadic(table.reshape(count, *shape), np.full(count, exponent, np.int64))


def _pairs(shape: Shape, gone: Array, kept: Array, ratio: Array) -> Dyadic:
    """Rows y[gone] - ratio * y[kept]."""
    rows = np.arange(len(gone))
    return dyadic.add(_unit_rows(shape, rows, gone, np.ones(len(rows)), len(rows)),
                      _unit_rows(shape, rows, kept, -ratio, len(rows)))


def _selected(v: Dyadic, relation: Relation, shape: Shape) -> Dyadic:
    """Coefficients of elements of g as coefficients of the elements of f that they are multiples of."""
    used = np.flatnonzero(relation.select >= 0)
    numbers, exponent = dyadic.exact_int(relation.ratio[used])
    parts = dyadic.multiply(v.values[:, used], numbers)
    table = np.zeros((len(parts), int(np.prod(shape))), object if parts.dtype == object else np.int64)
    if len(np.unique(relation.select[used])) == len(used):
        table[:, relation.select[used]] = parts
    else:
        table = table.astype(object)
        np.add.at(table.T, relation.select[used], parts.astype(object).T)
    return Dyadic(table.reshape(len(parts), *shape), v.exponent + exponent, v.divisor)


def _merged(v: Dyadic, rows: Array, known: Duplicates, totals: _Totals) -> tuple[Dyadic, Dyadic | None]:
    """Rows with coefficients of multiples moved to what they are multiples of, and what goes on to pre-activations."""
    parts = v.values[:, known.gone]
    if not parts.any():
        return v, None
    totals.add_error(rows, replace(v, values=parts), known.gap)
    numbers, exponent = dyadic.exact_int(np.abs(known.ratio))
    moved = np.zeros(v.values.shape, object)
    np.add.at(moved.T, known.kept, (parts.astype(object) * numbers).T)
    kept, passed = v.values.copy(), np.zeros_like(v.values)
    kept[:, known.gone] = 0
    passed[:, known.gone] = np.where(known.ratio < 0, parts, 0)
    rest = dyadic.add(replace(v, values=kept), Dyadic(dyadic.narrow(moved), v.exponent + exponent, v.divisor))
    return rest, replace(v, values=passed)


def _times(v: Dyadic, factor: Array) -> Dyadic:
    """Coefficients (rows, n) times factors (n,)."""
    numbers, exponent = dyadic.exact_int(factor)
    return Dyadic(dyadic.narrow(dyadic.multiply(v.values, numbers)), v.exponent + exponent, v.divisor)


def _beyond(t: Array, slope: Array) -> tuple[Array, Array]:
    """Sound bounds of relu(t) - slope * t; exact where the slope is 0 or 1."""
    plain = np.where(slope == 0, np.maximum(t, 0.0), np.maximum(-t, 0.0))
    with np.errstate(over="ignore"):
        low, high = np.nextafter(slope * t, -np.inf), np.nextafter(slope * t, np.inf)
        found = np.nextafter(np.maximum(t, 0.0) - high, -np.inf), np.nextafter(np.maximum(t, 0.0) - low, np.inf)
    exact = (slope == 0) | (slope == 1)
    return np.where(exact, plain, found[0]), np.where(exact, plain, found[1])


def _largest(low: Array, high: Array) -> Array:
    return np.maximum(np.maximum(-low, high), 0.0)


# -- weights -----------------------------------------------------------------------------------------------------------


def _same_settings(first: Op, second: Op) -> bool:
    ignored = {"Conv2d": ("groups",), "Reshape": ("shape",)}.get(first.kind, ())
    mine, its = ({k: v for k, v in op.settings.items() if k not in ignored} for op in (first, second))
    kernel = first.kind != "Conv2d" or first.arrays["weight"].shape[2:] == second.arrays["weight"].shape[2:]
    return kernel and repr(mine) == repr(its)


def _by_unit(select: Array, shape: Shape, original: Shape) -> Array | None:
    return select if len(shape) == len(original) == 1 else units_of(select, shape, original)


def _dense(op: Op) -> Array:
    """Weights as (outputs, inputs, taps), groups written out."""
    weight = op.arrays["weight"].astype(np.float64).reshape(*op.arrays["weight"].shape[:2], -1)
    groups = int(op.settings.get("groups", 1))
    if groups == 1:
        return weight
    out, inner = len(weight) // groups, weight.shape[1]
    full = np.zeros((len(weight), inner * groups, weight.shape[2]))
    for g in range(groups):
        full[g * out : (g + 1) * out, g * inner : (g + 1) * inner] = weight[g * out : (g + 1) * out]
    return full


def _absolute(layer: Layer) -> Layer:
    """The same operator with absolute weights and no constants."""
    assert isinstance(layer, Linear)
    arrays = {"weight": np.abs(layer.op.arrays["weight"]), "bias": np.zeros_like(layer.op.arrays["bias"])}
    return KINDS[layer.op.kind](Op(layer.op.kind, arrays, layer.op.settings), layer.shape, layer.out)


def _scale(network: Network, position: int) -> tuple[Array, Array]:
    """Scale and shift of every element of a scaled tensor, flat."""
    arrays, shape = network.nodes[position].op.arrays, network.shape_of(position)
    scale, shift = (np.broadcast_to(arrays[k].astype(np.float64), shape).reshape(-1) for k in ("scale", "shift"))
    return scale, shift


def _moved(network: Network, position: int) -> Array:
    """For each element of a transposed tensor, the element of the source that it is."""
    shape = network.shape_of(network.nodes[position].inputs[0])
    flat = np.arange(int(np.prod(shape))).reshape(shape)
    return flat.transpose(network.nodes[position].op.settings["permutation"]).reshape(-1)
