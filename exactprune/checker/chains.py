"""How far two runs of a chain of affine layers and ReLUs can drift apart on a box, neuron by neuron.

g is a chain z_0 = W_0 x + b_0, z_k = W_k relu(z_{k-1}) + b_k, the last z its output. f differs from g by errors that enter
at the pre-activations: with everything before layer k as it is in f, layer k is off by delta_k(x), abs(delta_k) <= e_k
(n_k,), on the whole domain. So with the same x, the distance d_k of the pre-activations of f from those of g is

    d_0 = delta_0,    d_k = W_k S_{k-1} d_{k-1} + delta_k,

where S is diagonal with slopes of the ReLU between two points. ReLU is monotone and 1-Lipschitz, so each slope is in [0, 1];
it is 1 where both points are >= 0 and 0 where both are <= 0. On the whole domain abs(d_k) <= E_k = e_k + abs(W_k) E_{k-1}.

On a sub-box, bounds on g's z_k widened by E_k settle most slopes. Where one stays open, abs(d) <= h is bounded first, by the
method itself, and then

    s d = d / 2 + (s - 1/2) d,    abs((s - 1/2) d) <= h / 2,

so d_k is a linear function of the delta_j up to a sum of known size, and what the delta_j have in common over the layers and
over the rows of W_k cancels before any absolute value is taken. Where delta_j is known as a linear form in the input, up to a
rest, the result is one form in the input. (Paulsen, Wang and Wang 2020, ReluDiff and NeuroDiff, bound differences of two networks
forward; here it is backward substitution as in CROWN, with one symmetric relaxation.) It wins factors of 1,000 against
abs(W) ... abs(W) e on deep narrow networks, and the split of inputs leaves few slopes open.

*Sound in floating point*: slopes of lines are floats that are chosen, and the lines are moved so that they hold; slopes of
differences are 0, 1/2 or 1, exact factors; every product of matrices is paid for with gamma_n times the product of absolute
values (Higham 2002, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exactprune.checker.network import CheckError, Network

Array = np.ndarray
U = 2.0**-53
TINY = 2.0**-900
HUGE = 2.0**100  # nothing is claimed about errors above
ACTIVE, OFF, OPEN = 1, 0, 2
NUMBERS = 2**21  # coefficients at a time, about


def _gamma(n: int) -> float:
    return 1.01 * n * U / (1 - n * U)


def _dot(a: Array, b: Array) -> Array:
    """Row by row."""
    return np.einsum("ij,ij->i", a, b)


@dataclass(frozen=True, eq=False)
class Chain:
    """Weights (n_k, n_{k-1}) and biases (n_k,), float64; the last layer is the output."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]

    @property
    def hidden(self) -> int:
        """Number of ReLU layers."""
        return len(self.weights) - 1

    @property
    def terms(self) -> int:
        """At least as many as any sum that is formed has terms, with a few to spare for what sums go through."""
        return max(max(w.shape) for w in self.weights) + 2 * len(self.weights) + 16


@dataclass(frozen=True, eq=False)
class Boxes:
    """Bounds on sub-boxes.

    Attributes:
        lower, upper: per ReLU layer, (boxes, n_k): z_k of g on the sub-box.
        worth: (boxes, inputs), what each input has to do with the neurons whose sign is open: a sum of shares of their ranges.
    """

    lower: list[Array]
    upper: list[Array]
    worth: Array


@dataclass(frozen=True, eq=False)
class Entering:
    """What g does differently at one layer, everything before it being equal: delta_k, for all inputs x of the domain.

    Attributes:
        size: (n_k,), abs(delta_k) <= size.
        form, low, high: (n_k, inputs), (n_k,), (n_k,): delta_k - form x is between low and high; or None.
    """

    size: Array
    form: Array | None = None
    low: Array | None = None
    high: Array | None = None

    def wider(self, by: float) -> Entering:
        """The same with ``by`` times its size added."""
        more = self.size * by
        low, high = (None, None) if self.low is None or self.high is None else (self.low - more, self.high + more)
        return Entering(self.size + more, self.form, low, high)


@dataclass(frozen=True, eq=False)
class _OnBoxes:
    """delta_k on each of some boxes: centre + form (x - middle of the box), up to ``rest``.

    Attributes:
        centre, rest: (boxes, n_k); form: (n_k, inputs).
        scale: (boxes, n_k), what rounding errors are measured in: at least abs(d_k) and the parts of delta_k.
    """

    centre: Array
    form: Array
    rest: Array
    scale: Array


def _on_boxes(entering: Entering, low: Array, high: Array, drifted: Array) -> _OnBoxes:
    """One layer's entering errors on boxes (boxes, inputs), where abs(d_k) <= ``drifted``."""
    if entering.form is None or entering.low is None or entering.high is None or not entering.size.any():
        nothing, count = np.zeros((len(low), len(entering.size))), low.shape[1]
        return _OnBoxes(nothing, np.zeros((len(entering.size), count)), nothing + entering.size, nothing + drifted)
    middle, radius = _centred(low, high)
    form, ends = entering.form, np.maximum(np.abs(entering.low), np.abs(entering.high))
    slack = 16 * _gamma(low.shape[1] + 8) * (np.maximum(np.abs(low), np.abs(high)) @ np.abs(form).T + ends)
    rest = (entering.high - entering.low) / 2 * (1 + 4 * U) + slack + TINY
    centre = middle @ form.T + (entering.low + entering.high) / 2
    return _OnBoxes(centre, form, rest, drifted + np.abs(centre) + radius @ np.abs(form).T + rest)


def drift(chain: Chain, errors: Sequence[Array]) -> list[Array]:
    """E_k for every layer, the output included: what abs(W) makes of the errors; each (n_k,)."""
    found = [np.asarray(errors[0], np.float64)]
    for weight, error in zip(chain.weights[1:], errors[1:], strict=True):
        n = weight.shape[1]
        found.append((np.abs(weight) @ found[-1]) * (1 + 2 * _gamma(n + 4)) * (1 + 4 * U) + error + n * TINY)
        found[-1] = found[-1] * (1 + 4 * U)
    return found


# -- bounds on sub-boxes -----------------------------------------------------------------------------------------------


def bounds(chain: Chain, low: Array, high: Array) -> Boxes:
    """For every ReLU layer on each of the boxes [low, high], (boxes, inputs): intervals, then backward substitution (CROWN)
    for the neurons whose sign intervals leave open."""
    found = Boxes([], [], np.zeros(low.shape))
    centre, radius = _centred(low, high)
    y_low, y_high = low, high
    sizes: list[Array] = []
    lines: list[tuple[Array, Array, Array]] = []
    for k in range(chain.hidden):
        weight, bias = chain.weights[k], chain.biases[k]
        reach = np.maximum(np.abs(y_low), np.abs(y_high))
        sizes.append((reach @ np.abs(weight).T + np.abs(bias)) * (1 + 4 * _gamma(weight.shape[1] + 4)) + TINY)
        below, above = _forward(weight, bias, y_low, y_high, sizes[k])
        box, row = np.nonzero((below < 0) & (above > 0))
        least, most, slopes = _backward(chain, k, box, row, centre, radius, lines, sizes)
        below[box, row], above[box, row] = np.fmax(below[box, row], least), np.fmin(above[box, row], most)
        np.add.at(found.worth, box, _shares(slopes * radius[box], below[box, row], above[box, row]))
        found.lower.append(below)
        found.upper.append(above)
        lines.append(_lines(below, above))
        y_low, y_high = np.maximum(below, 0.0), np.maximum(above, 0.0)
    return found


def _shares(parts: Array, least: Array, most: Array) -> Array:
    """Of the ranges of neurons (rows,), what each input makes, (rows, inputs); 0 where the sign is settled."""
    open_ = (least < 0) & (most > 0)
    return np.divide(parts, (most - least)[:, None], out=np.zeros_like(parts), where=open_[:, None])


def _centred(low: Array, high: Array) -> tuple[Array, Array]:
    centre = low / 2 + high / 2
    return centre, np.nextafter(np.maximum(high - centre, centre - low), np.inf)


def _forward(weight: Array, bias: Array, low: Array, high: Array, size: Array) -> tuple[Array, Array]:
    """Interval arithmetic for one layer; infinite where that makes NaN."""
    positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
    slack = 4 * _gamma(2 * weight.shape[1] + 8) * size
    below = low @ positive.T + high @ negative.T + bias - slack
    above = high @ positive.T + low @ negative.T + bias + slack
    return np.where(np.isnan(below), -np.inf, below), np.where(np.isnan(above), np.inf, above)


def _lines(low: Array, high: Array) -> tuple[Array, Array, Array]:
    """(slope below, slope above, shift above >= 0) of lines around relu on [low, high]."""
    on, open_ = low >= 0, (low < 0) & (high > 0)
    width = np.where(open_, high - low, 1.0)
    chord = np.where(open_, np.minimum(high / width * (1 + 8 * U), 1.0), np.where(on, 1.0, 0.0))
    shift = np.where(open_, -low * chord * (1 + 8 * U), 0.0)
    return np.where(open_, np.where(high > -low, 1.0, 0.0), chord), chord, shift


def _backward(chain: Chain, k: int, box: Array, row: Array, centre: Array, radius: Array,
              lines: Sequence[tuple[Array, Array, Array]], sizes: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Lower and upper bounds of z_k[row] on boxes ``box``, (rows,), and the sizes of their coefficients at the input."""
    weight, bias = chain.weights[k][row], chain.biases[k][row]
    both = np.concatenate([box, box])
    form, total = np.concatenate([weight, -weight]), np.concatenate([bias, -bias])
    size = np.abs(total)
    for j in range(k - 1, -1, -1):
        below, above, shift = lines[j]
        negative = np.minimum(form, 0.0)
        lost = _dot(negative, shift[both])
        form = np.maximum(form, 0.0) * below[both] + negative * above[both]
        size += np.abs(lost) + _dot(np.abs(form), sizes[j][both])
        total = total + lost + form @ chain.biases[j]
        form = form @ chain.weights[j]
    ends = np.abs(form)
    spread = _dot(ends, radius[both])
    size += _dot(ends, np.abs(centre)[both]) + spread
    least = total + _dot(form, centre[both]) - spread - 8 * _gamma(chain.terms + 8 * k) * size - TINY
    count = len(row)
    return least[:count], -least[count:], ends[:count] + ends[count:]


# -- differences -------------------------------------------------------------------------------------------------------


def phases(known: Boxes, widened: Sequence[Array]) -> list[Array]:
    """Per ReLU layer (boxes, n_k): which slopes are settled, for all points within the drift."""
    found = []
    for low, high, by in zip(known.lower, known.upper, widened, strict=False):
        low, high = np.nextafter(low - by, -np.inf), np.nextafter(high + by, np.inf)
        found.append(np.where(low >= 0, ACTIVE, np.where(high <= 0, OFF, OPEN)).astype(np.int8))
    return found


def distances(chain: Chain, errors: Sequence[_OnBoxes], settled: Sequence[Array], radius: Array) -> Array:
    """Bounds on abs(f - g) on each box, (boxes,).

    Args:
        chain: g.
        errors: delta_k on each box, the output's last.
        settled: slopes on each box.
        radius: (boxes, inputs) of the boxes.
    """
    count, outputs = len(radius), len(chain.biases[-1])
    slopes: list[Array] = []
    half: list[Array] = []
    first = next((k for k, e in enumerate(errors) if e.rest.any()), chain.hidden)
    for k, phase in enumerate(settled):
        half.append(np.zeros(phase.shape))
        if k >= first:
            box, row = np.nonzero(phase == OPEN)
            half[k][box, row] = _rows(chain, errors, k, first, box, row, slopes, half, radius) / 2
        slopes.append(np.where(phase == OPEN, 0.5, phase.astype(np.float64)))
    box, row = np.divmod(np.arange(count * outputs), outputs)
    return _rows(chain, errors, chain.hidden, first, box, row, slopes, half, radius).reshape(count, outputs).max(axis=1)


def _rows(chain: Chain, errors: Sequence[_OnBoxes], k: int, first: int, box: Array, row: Array, slopes: Sequence[Array],
          half: Sequence[Array], radius: Array) -> Array:
    """Bounds on abs(d_k[row]) on boxes ``box``, (rows,); d is 0 before layer ``first``.

    Coefficients c of d_j are floats. The real number c . d_j is c . delta_j + (c W_j) . (S d_{j-1}), of which the float product
    with W_j is off by at most gamma abs(c) abs(W_j) abs(d_{j-1}) <= gamma abs(c) E_j; sums of products with the parts of
    delta_j are off by gamma times those of absolute values. Both are at most gamma abs(c) . scale. Sums of numbers >= 0
    are paid for by a factor at the end.
    """
    value, form, lost = errors[k].centre[box, row], errors[k].form[row], errors[k].rest[box, row]
    slack = errors[k].scale[box, row]
    coefficients = chain.weights[k][row]
    for j in range(k - 1, first - 1, -1):
        lost = lost + _dot(np.abs(coefficients), half[j][box])
        coefficients = coefficients * slopes[j][box]
        size, entering = np.abs(coefficients), errors[j]
        value = value + _dot(coefficients, entering.centre[box])
        form = form + coefficients @ entering.form
        lost = lost + _dot(size, entering.rest[box])
        slack = slack + _dot(size, entering.scale[box])
        if j > first:
            coefficients = coefficients @ chain.weights[j]
    total = np.abs(value) + _dot(np.abs(form), radius[box]) + lost + 8 * _gamma(chain.terms) * slack
    return total * (1 + 8 * _gamma(chain.terms)) + TINY


# -- a network and a tree of boxes -------------------------------------------------------------------------------------


def chain_of(network: Network) -> tuple[Chain, tuple[int, ...]] | None:
    """A network that is affine layers and ReLUs in turn behind scalings of its input, with the positions of the ReLUs and
    of the output; None for any other."""
    weights: list[Array] = []
    biases: list[Array] = []
    stops: list[int] = []
    for position, node in enumerate(network.nodes):
        kind, last = node.op.kind, position == len(network.nodes) - 1
        if node.inputs != (position - 1,):
            return None
        if kind == "Affine" and len(weights) == len(stops):
            weights.append(node.op.arrays["weight"].astype(np.float64))
            biases.append(node.op.arrays["bias"].astype(np.float64))
            stops += [position] if last else []
        elif kind == "ReLU" and len(weights) == len(stops) + 1 and not last:
            stops.append(position)
        elif kind != "Reshape" and not (kind == "Scale" and not weights):
            return None
    return (Chain(tuple(weights), tuple(biases)), tuple(stops)) if weights and len(stops) == len(weights) else None


def scaled(network: Network, low: Array, high: Array) -> tuple[Array, Array]:
    """Boxes (boxes, inputs) behind the scalings in front of the first affine layer, rounded outward."""
    for position, node in enumerate(network.nodes):
        if node.op.kind == "Affine":
            break
        if node.op.kind == "Scale":
            scale, shift = (np.broadcast_to(node.op.arrays[name].astype(np.float64), network.shape_of(position)).reshape(-1)
                            for name in ("scale", "shift"))
            ends = np.stack([low * scale, high * scale])
            slack = 4 * U * (np.abs(ends).max(axis=0) + np.abs(shift)) + TINY
            low, high = ends.min(axis=0) + shift - slack, ends.max(axis=0) + shift + slack
    return low, high


def deviation(network: Network, errors: Sequence[Entering], low: Array, high: Array) -> tuple[Array, Array]:
    """Bounds on abs(f - g) on boxes of inputs.

    Args:
        network: g, for which ``chain_of`` finds a chain.
        errors: per ReLU layer and for the output, what enters there (see the module's docstring).
        low, high: (boxes, inputs), flat.

    Returns:
        (boxes,) bounds, inf where numbers overflow, and (boxes, inputs): how much splitting an input may help.
    """
    found = chain_of(network)
    if found is None:
        raise CheckError("no chain of affine layers and ReLUs")
    chain, by = found[0], drift(found[0], [e.size for e in errors])
    values, worth = np.full(len(low), np.inf), np.ones(low.shape)
    if not all((e <= HUGE).all() for e in by):
        return values, worth
    batch = max(1, NUMBERS // max(w.size for w in chain.weights))
    for start in range(0, len(low), batch):
        part = slice(start, start + batch)
        known = bounds(chain, *scaled(network, low[part], high[part]))
        local = [_on_boxes(e, low[part], high[part], d) for e, d in zip(errors, by, strict=True)]
        values[part] = distances(chain, local, phases(known, by), _centred(low[part], high[part])[1])
        worth[part] = known.worth
    return np.where(np.isfinite(values), values, np.inf), worth
