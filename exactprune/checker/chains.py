"""How far two runs of a chain of affine layers and ReLUs can drift apart on a box, by input splits and phase splits.

g is a chain z_0 = W_0 x + b_0, z_k = W_k relu(z_{k-1}) + b_k, the last z its output. f differs from g by errors that enter
at the pre-activations: with everything before layer k as it is in f, layer k is off by delta_k with abs(delta_k) <= e_k
(n_k,), on the whole domain. For one x and tau in [0, 1] let

    z_k(tau) = W_k relu(z_{k-1}(tau)) + b_k + tau delta_k(x),

which is g for tau = 0 and f for tau = 1. It is piecewise affine in tau, so f - g is the integral over tau of
sum_k J_k(tau) delta_k, J_k being the Jacobian of the output in z_k *with the same slopes for every k* (a ReLU that stays at
its kink does not move, so its slope does not matter). All these points are within

    E_k = e_k + abs(W_k) E_{k-1}

of g's own pre-activations. Where delta_k is known as a linear form in the input, up to a rest, its signs are kept: J_k times
the form is one form.

On a sub-box, bounds on z_k widened by E_k settle most ReLUs, with slope 0 or 1. The others have a slope s in
[0, 1], and sum_k J_k delta_k is multi-affine in the slopes: its maximum is attained where each slope is 0 or 1. So a
tree of phase splits (no constraint on x, only slopes) with an interval Jacobian at each node bounds it, and the split of
inputs makes few ReLUs unsettled. This wins factors of 1,000 against abs(W) ... abs(W) e on deep narrow networks.

*Sound in floating point*: slopes are floats that are chosen, and lines are moved so that they hold; every product of
matrices is paid for with gamma_n times the product of absolute values (Higham 2002, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from exactprune.checker.network import CheckError, Network

Array = np.ndarray
U = 2.0**-53
TINY = 2.0**-900
ACTIVE, OFF, OPEN = 1, 0, 2
HOPELESS = 16  # times the target: no phase is split there


def _gamma(n: int) -> float:
    return 1.01 * n * U / (1 - n * U)


@dataclass(frozen=True, eq=False)
class Chain:
    """Weights (n_k, n_{k-1}) and biases (n_k,), float64; the last layer is the output."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]

    @property
    def hidden(self) -> int:
        """Number of ReLU layers."""
        return len(self.weights) - 1


@dataclass(frozen=True, eq=False)
class Boxes:
    """Bounds on sub-boxes.

    Attributes:
        lower, upper: per ReLU layer, (boxes, n_k): z_k of g on the sub-box.
        slopes: per ReLU layer, (boxes, n_k, inputs): sizes of the coefficients of linear bounds (to choose splits).
    """

    lower: list[Array]
    upper: list[Array]
    slopes: list[Array]


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
    """delta_k on each of some boxes: centre + form (x - middle of the box), up to ``rest``; abs(delta_k) <= size."""

    centre: Array
    form: Array
    radius: Array
    rest: Array
    size: Array


def _on_boxes(entering: Entering, low: Array, high: Array) -> _OnBoxes | None:
    """One layer's entering errors on boxes (boxes, inputs); None where there are none."""
    if not entering.size.any():
        return None
    middle, radius = _centred(low, high)
    whole = np.broadcast_to(entering.size, (len(low), len(entering.size)))
    if entering.form is None or entering.low is None or entering.high is None:
        return _OnBoxes(np.zeros_like(whole), np.zeros((len(entering.size), low.shape[1])), radius, whole, whole)
    form, ends = entering.form, np.maximum(np.abs(entering.low), np.abs(entering.high))
    slack = 16 * _gamma(low.shape[1] + len(ends) + 8) * (np.maximum(np.abs(low), np.abs(high)) @ np.abs(form).T + ends)
    rest = (entering.high - entering.low) / 2 * (1 + 4 * U) + slack + TINY
    centre = middle @ form.T + (entering.low + entering.high) / 2
    size = (np.abs(centre) + radius @ np.abs(form).T + rest) * (1 + 16 * U)
    return _OnBoxes(centre, form, radius, rest, np.minimum(size, whole))


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
    """Backward substitution (CROWN) for every ReLU layer on each of the boxes [low, high], (boxes, inputs)."""
    found = Boxes([], [], [])
    centre, radius = _centred(low, high)
    reach = [np.maximum(np.abs(low), np.abs(high))]
    sizes: list[Array] = []
    for k in range(chain.hidden):
        weight, bias = chain.weights[k], chain.biases[k]
        sizes.append(((reach[-1] @ np.abs(weight).T) + np.abs(bias)) * (1 + 4 * _gamma(weight.shape[1] + 4)) + TINY)
        below, above, slopes = _backward(chain, k, centre, radius, found, sizes)
        if k:
            inner = _forward(chain, k, found, sizes[k])
            below, above = np.maximum(below, inner[0]), np.minimum(above, inner[1])
        below, above = (np.where(np.isnan(b), end, b) for b, end in ((below, -np.inf), (above, np.inf)))
        found.lower.append(below)
        found.upper.append(above)
        found.slopes.append(slopes)
        reach.append(np.maximum(above, 0.0))
    return found


def _centred(low: Array, high: Array) -> tuple[Array, Array]:
    centre = low / 2 + high / 2
    return centre, np.nextafter(np.maximum(high - centre, centre - low), np.inf)


def _forward(chain: Chain, k: int, known: Boxes, size: Array) -> tuple[Array, Array]:
    """Interval arithmetic for one layer."""
    weight, bias = chain.weights[k], chain.biases[k]
    positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
    y_low, y_high = np.maximum(known.lower[-1], 0), np.maximum(known.upper[-1], 0)
    slack = 4 * _gamma(2 * weight.shape[1] + 8) * size
    return (y_low @ positive.T + y_high @ negative.T + bias - slack,
            y_high @ positive.T + y_low @ negative.T + bias + slack)


def _lines(low: Array, high: Array) -> tuple[Array, Array, Array]:
    """(slope below, slope above, shift above >= 0) of lines around relu on [low, high]."""
    on, open_ = low >= 0, (low < 0) & (high > 0)
    width = np.where(open_, high - low, 1.0)
    chord = np.where(open_, np.minimum(high / width * (1 + 8 * U), 1.0), np.where(on, 1.0, 0.0))
    shift = np.where(open_, -low * chord * (1 + 8 * U), 0.0)
    return np.where(open_, np.where(high > -low, 1.0, 0.0), chord), chord, shift


def _backward(chain: Chain, k: int, centre: Array, radius: Array, known: Boxes,
              sizes: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Lower and upper bounds of z_k on each box, and the sizes of their coefficients at the input."""
    count, rows = len(centre), len(chain.biases[k])
    both = np.concatenate([chain.weights[k], -chain.weights[k]])
    form = np.broadcast_to(both, (count, *both.shape))
    total = np.broadcast_to(np.concatenate([chain.biases[k], -chain.biases[k]]), (count, 2 * rows)).copy()
    size = np.abs(total)
    for j in range(k - 1, -1, -1):
        below, above, shift = (a[:, None, :] for a in _lines(known.lower[j], known.upper[j]))
        negative = np.minimum(form, 0.0)
        lost = negative @ shift.swapaxes(1, 2)
        form = np.maximum(form, 0.0) * below + negative * above
        size += np.abs(lost[..., 0]) + (np.abs(form) @ sizes[j][..., None])[..., 0]
        total = total + lost[..., 0] + form @ chain.biases[j]
        form = (form.reshape(-1, form.shape[2]) @ chain.weights[j]).reshape(count, 2 * rows, -1)
    spread = (np.abs(form) @ radius[..., None])[..., 0]
    middle = (form @ centre[..., None])[..., 0]
    size += (np.abs(form) @ np.abs(centre)[..., None])[..., 0] + spread
    widest = max(max(w.shape) for w in chain.weights)
    least = total + middle - spread - 8 * _gamma(widest + 8 * (k + 2)) * size - TINY
    slopes = np.abs(form[:, :rows]) + np.abs(form[:, rows:])
    return least[:, :rows], -least[:, rows:], slopes


# -- phases ------------------------------------------------------------------------------------------------------------


def phases(known: Boxes, widened: Sequence[Array]) -> list[Array]:
    """Per ReLU layer (boxes, n_k): which slopes are settled, for all points within the drift."""
    found = []
    for low, high, by in zip(known.lower, known.upper, widened, strict=False):
        low, high = np.nextafter(low - by, -np.inf), np.nextafter(high + by, np.inf)
        found.append(np.where(low >= 0, ACTIVE, np.where(high <= 0, OFF, OPEN)).astype(np.int8))
    return found


def largest(chain: Chain, errors: Sequence[_OnBoxes | None], start: Sequence[Array], target: float,
            nodes: int) -> tuple[Array, Array]:
    """Bound on abs(f - g) on each box, by splitting phases until it is at most ``target`` or nodes run out.

    Args:
        chain: g.
        errors: delta_k on each box, the output's last.
        start: phases on each box.
        target: no split of what is within.
        nodes: of the phase tree, a box, about.

    Returns:
        (boxes,) bounds, and what every open neuron weighs at the root, (boxes, sum n_k).
    """
    count = len(start[0])
    done, spent = np.zeros(count), np.zeros(count, np.int64)
    box, current = np.arange(count), list(start)
    worth = None
    while len(box):
        value, score = _node(chain, errors, current, box)
        worth = score if worth is None else worth
        np.add.at(spent, box, 1)
        settled = (value <= target) | ~(score > 0).any(axis=1)
        np.maximum.at(done, box[settled], value[settled])
        hopeless = (value > HOPELESS * target) | (spent > nodes)[box] | (done > target)[box]
        np.maximum.at(done, box[hopeless], value[hopeless])  # a bound of the whole tree below
        left = np.flatnonzero(~settled & ~hopeless)
        current = _split([p[left] for p in current], score[left].argmax(axis=1))
        box = np.concatenate([box[left], box[left]])
    return done, np.zeros((count, 0)) if worth is None else worth


def _split(current: list[Array], at: Array) -> list[Array]:
    """Both phases of one neuron a node."""
    widths = np.cumsum([0, *(p.shape[1] for p in current)])
    flat = np.concatenate(current, axis=1)
    on, off = flat.copy(), flat.copy()
    rows = np.arange(len(flat))
    on[rows, at], off[rows, at] = ACTIVE, OFF
    both = np.concatenate([on, off])
    return [both[:, a:b] for a, b in pairwise(widths)]


def _node(chain: Chain, errors: Sequence[_OnBoxes | None], current: Sequence[Array], box: Array) -> tuple[Array, Array]:
    """Bound of every node of the phase trees (nodes,), and what an open neuron weighs there (nodes, sum n_k)."""
    count, last = len(box), chain.weights[-1]
    reach = _reach(chain, errors, current, box)
    mid = np.broadcast_to(last, (count, *last.shape))
    rad = np.zeros_like(mid)
    total = np.zeros((count, len(last)))
    if errors[-1] is not None:
        total += errors[-1].size[box]
    first = next((k for k, e in enumerate(errors) if e is not None), chain.hidden)
    scores: list[Array] = []
    for k in range(chain.hidden - 1, -1, -1):
        if k < first:
            scores.append(np.zeros(current[k].shape))
            continue
        scores.append(np.where(current[k] == OPEN, (np.abs(mid) + rad).max(axis=1) * reach[k], 0.0))
        mid, rad = _through(mid, rad, current[k][:, None, :])
        entering = errors[k]
        if entering is not None:
            total += _weighed(entering, mid, rad, box)
        if k > first:
            mid, rad = _before(mid, rad, chain.weights[k])
    widest = max(max(w.shape) for w in chain.weights)
    return (total * (1 + 4 * _gamma(widest + len(chain.weights) + 8)) + TINY).max(axis=1), np.concatenate(scores[::-1], axis=1)


def _weighed(error: _OnBoxes, mid: Array, rad: Array, box: Array) -> Array:
    """The largest abs(J delta) for J in mid +- rad, (nodes, outputs)."""
    straight = np.abs(mid @ error.centre[box][..., None])[..., 0]
    straight += (np.abs(mid @ error.form) @ error.radius[box][..., None])[..., 0]
    straight += (np.abs(mid) @ error.rest[box][..., None])[..., 0]
    plain = (np.abs(mid) @ error.size[box][..., None])[..., 0]
    return np.minimum(straight, plain) + (rad @ error.size[box][..., None])[..., 0]


def _before(mid: Array, rad: Array, weight: Array) -> tuple[Array, Array]:
    """Coefficients of relu(z_{k-1}) from those of z_k."""
    count, outputs, n = mid.shape
    size = (np.abs(mid) + rad).reshape(-1, n)
    rad = (rad.reshape(-1, n) + 4 * _gamma(n + 4) * size) @ np.abs(weight) * (1 + 2 * _gamma(n + 4)) + TINY
    return (mid.reshape(-1, n) @ weight).reshape(count, outputs, -1), rad.reshape(count, outputs, -1)


def _through(mid: Array, rad: Array, phase: Array) -> tuple[Array, Array]:
    """An interval of coefficients times a slope: 1, 0, or anything in [0, 1]."""
    on, open_ = (phase == ACTIVE).astype(np.float64), (phase == OPEN) * 0.5
    low, high = mid - rad, mid + rad
    np.minimum(low, 0.0, out=low)
    np.maximum(high, 0.0, out=high)
    half = high - low
    half += 8 * U * (np.abs(mid) + rad)
    low += high
    low *= open_
    half *= open_
    low += on * mid
    half += on * rad
    return low, half


def _reach(chain: Chain, errors: Sequence[_OnBoxes | None], current: Sequence[Array], box: Array) -> list[Array]:
    """What abs(W) makes of the errors with the phases known so far, (nodes, n_k); to choose splits only."""
    sizes = [np.zeros(p.shape) if e is None else e.size[box] for e, p in zip(errors, current, strict=False)]
    found = [sizes[0]]
    for k in range(1, chain.hidden):
        found.append(np.where(current[k - 1] == OFF, 0.0, found[-1]) @ np.abs(chain.weights[k]).T + sizes[k])
    return found


# -- a network and a tree of boxes -------------------------------------------------------------------------------------

BATCH = 256  # boxes at a time
PER_BOX = 100  # nodes of the phase trees, a box


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


def deviation(network: Network, errors: Sequence[Entering], low: Array, high: Array, target: float) -> tuple[Array, Array]:
    """Bounds on abs(f - g) on boxes of inputs.

    Args:
        network: g, for which ``chain_of`` finds a chain.
        errors: per ReLU layer and for the output, what enters there (see the module's docstring).
        low, high: (boxes, inputs), flat.
        target: what is aimed for; no effort is spent below.

    Returns:
        (boxes,) bounds, inf where numbers overflow, and (boxes, inputs): how much splitting an input may help.
    """
    found = chain_of(network)
    if found is None:
        raise CheckError("no chain of affine layers and ReLUs")
    chain, by = found[0], drift(found[0], [e.size for e in errors])
    values, worth = np.empty(len(low)), np.empty(low.shape)
    for start in range(0, len(low), BATCH):
        part = slice(start, start + BATCH)
        known = bounds(chain, *scaled(network, low[part], high[part]))
        local = [_on_boxes(e, low[part], high[part]) for e in errors]
        values[part], score = largest(chain, local, phases(known, by), target, PER_BOX)
        slopes = np.concatenate(known.slopes, axis=1) if known.slopes else np.zeros((len(values[part]), 0, low.shape[1]))
        worth[part] = np.einsum("bi,bij->bj", score, slopes) * (high[part] - low[part])
    return np.where(np.isfinite(values), values, np.inf), worth
