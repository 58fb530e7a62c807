"""Bounds on the difference of two networks: what they have in common cancels before anything is relaxed.

Relaxing the neurons of A and of B on their own loses the fact that a neuron of B does what some neuron of A does, and
the bound on A - B is as loose as one on A plus one on B. So a neuron of B is written relative to its partner in A
(Paulsen, Wang, Wang, "ReluDiff", ICSE 2020; Paulsen et al., "NeuroDiff", ASE 2020). For any ratio r > 0 let

    dz = z_B - r z_A,        y_B = r y_A + delta,        delta = relu(r z_A + dz) - relu(r z_A).

relu is monotone and 1-Lipschitz, so min(dz, 0) <= delta <= max(dz, 0) whatever z_A is. A phase that is known makes one side
linear: delta <= dz where B's neuron is active, delta <= 0 where it is inactive, delta >= dz where A's is active, delta >= 0
where it is inactive (z <= relu(z) and 0 <= relu(z) put into the definition).
The network of the nodes of A, dz and delta is an ordinary one in which
delta stands in the place of a ReLU of dz with a relaxation of its own,

    delta <= s dz + t,   s, t the chord of max(dz, 0),       -delta <= s' (-dz) + t',   s', t' the chord of max(-dz, 0),

so ``crown`` bounds it as it is: backward substitution adds the coefficients that A and B put on y_A, they cancel, and
what is left to be relaxed is as small as the difference of the weights. The partners only choose which true statement
is bounded: a bad choice costs tightness, never soundness. Rounding is paid for as everywhere in ``crown``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from exactprune.bounds.interval import NodeBounds
from exactprune.bounds.layerwise import Layerwise, first_is_exact, start
from exactprune.bounds.program import TINY, UNIT_ROUNDOFF, Program
from exactprune.bounds.relaxation import Relaxation, adaptive_slope, relax, upper_line
from exactprune.errors import ShapeError
from exactprune.network import INPUT, Network, Node
from exactprune.ops import Add, Affine, Conv2d, Op, ReLU, Reshape, Scale, Shape

# -- the joint network -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Partners:
    """For every unit of a ReLU layer of B a unit of a ReLU layer of A; units are neurons, or channels of an image.

    Attributes:
        layer: the ReLU layer of A.
        source: unit of that layer, -1 for no partner; shape (units of B's layer,).
        ratio: > 0, same shape: y_B is compared with ratio * y_A[source].
        apart: same shape: how far apart z_B and ratio * z_A are, relative to z_B; a guess that only ``within`` reads.
    """

    layer: int
    source: np.ndarray
    ratio: np.ndarray
    apart: np.ndarray | None = None

    def within(self, apart: float) -> Partners:
        """Only the partners that are at most this far apart."""
        if self.apart is None:
            return self
        return replace(self, source=np.where(self.apart <= apart, self.source, -1))


@dataclass(frozen=True, eq=False)
class Delta:
    """Where a ReLU node of the joint network stands for delta.

    Attributes:
        partner: position of -r z_A.
        matched: booleans (neurons,): elsewhere the node is the plain ReLU of z_B.
        layer: the ReLU layer of B.
    """

    partner: int
    matched: np.ndarray
    layer: int


@dataclass(frozen=True, eq=False)
class Joint:
    """x -> A(x) - B(x), flat, as one network; its last node is a ReLU, so that the difference is a pre-activation.

    Attributes:
        network: float64, which holds every stored float32 and float64 exactly.
        deltas: ReLU layer of ``network`` -> what it stands for; empty for the plain joint network.
        equal: A and B are the same function, node by node.
        of_a, of_b: ReLU layer of A (of B) -> the ReLU layer of ``network`` that is it; layers of deltas are left out.
    """

    network: Network
    deltas: Mapping[int, Delta]
    equal: bool
    of_a: Mapping[int, int] = field(default_factory=dict)
    of_b: Mapping[int, int] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The ReLU layer whose pre-activation is A - B."""
        return len(self.network.relus) - 1


@dataclass(eq=False)
class _Builder:
    """Nodes so far, equal ones (operator, arrays and inputs) once, and no reshape of a reshape."""

    input_shape: Shape
    nodes: list[Node] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    places: dict[bytes, int] = field(default_factory=dict)
    deltas: dict[int, Delta] = field(default_factory=dict)

    @staticmethod
    def key(op: Op, inputs: tuple[int, ...]) -> bytes:
        """Equal for equal operators on the same inputs; 0.0 and -0.0 are the same number."""
        digest = hashlib.sha256(repr((op.kind, op.settings(), inputs)).encode())
        for _, array in op.arrays():
            digest.update(repr(array.shape).encode() + (array + 0.0).tobytes())
        return digest.digest()

    def add(self, name: str, op: Op, *inputs: int) -> int:
        op = op.astype(np.float64)
        if isinstance(op, Reshape):
            while inputs[0] != INPUT and isinstance(self.nodes[inputs[0]].op, Reshape):
                inputs = self.nodes[inputs[0]].inputs
            if self.shape(inputs[0]) == op.shape:
                return inputs[0]
        place = self.places.setdefault(self.key(op, inputs), len(self.nodes))
        if place == len(self.nodes):
            self.nodes.append(Node(name, op, inputs))
            self.shapes.append(op.output_shape(*map(self.shape, inputs)))
        return place

    def shape(self, position: int) -> Shape:
        return self.input_shape if position == INPUT else self.shapes[position]


def joint_network(a: Network, b: Network, partners: Mapping[int, Partners] | None = None) -> Joint:
    """A - B as one network.

    Args:
        a, b: as many input and output values; shapes may differ.
        partners: ReLU layer of B -> partners in A; none of them: A and B side by side.
    """
    build = _Builder(a.input_shape)
    in_a = _copied(build, a, INPUT, "a", a, {}, {})
    entry = build.add("b/input", Reshape(b.input_shape), INPUT)
    in_b = _copied(build, b, entry, "b", a, in_a, partners or {})
    flat = Reshape((prod(a.output_shape),))
    out_a, out_b = build.add("a/flat", flat, in_a[a.output]), build.add("b/flat", flat, in_b[b.output])
    negative = build.add("-b", Scale(np.array(-1.0), np.array(0.0)), out_b)
    difference = build.add("a-b", Add(), out_a, negative)
    build.nodes.append(Node("difference", ReLU(), (difference,)))
    needed = _reaching(build.nodes)
    place = {INPUT: INPUT} | {old: new for new, old in enumerate(needed)}
    nodes = tuple(Node(n.name, n.op, tuple(place[i] for i in n.inputs)) for n in (build.nodes[p] for p in needed))
    network = Network(nodes, a.input_shape, np.dtype(np.float64), f"{a.name} - {b.name}")
    layer_of = {position: k for k, position in enumerate(network.relus)}
    deltas = {layer_of[place[p]]: replace(d, partner=place[d.partner]) for p, d in build.deltas.items() if p in place}
    of_a, of_b = ({k: layer_of[place[at[p]]] for k, p in enumerate(n.relus) if place.get(at[p], -1) in layer_of}
                  for n, at in ((a, in_a), (b, in_b)))
    return Joint(network, deltas, out_a == out_b, of_a, of_b)


def _reaching(nodes: list[Node]) -> list[int]:
    found, stack = set(), [len(nodes) - 1]
    while stack:
        position = stack.pop()
        if position != INPUT and position not in found:
            found.add(position)
            stack.extend(nodes[position].inputs)
    return sorted(found)


def _copied(build: _Builder, network: Network, entry: int, name: str, a: Network, in_a: Mapping[int, int],
            partners: Mapping[int, Partners]) -> dict[int, int]:
    """Position in ``network`` -> position in the joint network."""
    place, layers = {INPUT: entry}, {position: k for k, position in enumerate(network.relus)}
    for position, node in enumerate(network.nodes):
        inputs, label = tuple(place[i] for i in node.inputs), f"{name}/{node.name}"
        partner = partners.get(layers.get(position, -1))
        if partner is None:
            place[position] = build.add(label, node.op, *inputs)
        else:
            place[position] = _relative(build, label, network.shapes[position], inputs[0], a, in_a, partner, layers[position])
    return place


def _relative(build: _Builder, name: str, shape: Shape, own: int, a: Network, in_a: Mapping[int, int],
              partner: Partners, layer: int) -> int:
    """y_B = r y_A + delta; the very same node where B's layer is A's."""
    relu = a.relus[partner.layer]
    z, y = in_a[a.nodes[relu].inputs[0]], in_a[relu]
    if z == own:
        return y
    select = _selection(partner, a.shapes[relu], shape)
    less = build.add(f"{name}/-partner z", select(-1.0), z)
    dz = build.add(f"{name}/dz", Add(), own, less)
    delta = build.add(f"{name}/delta", ReLU(), dz)
    build.deltas[delta] = Delta(less, np.repeat(np.asarray(partner.source) >= 0, prod(shape[1:])), layer)
    return build.add(f"{name}/y", Add(), build.add(f"{name}/partner y", select(1.0), y), delta)


def _selection(partner: Partners, of: Shape, shape: Shape) -> Callable[[float], Op]:
    """sign -> the operator that gives every unit sign * ratio times its partner, and 0 where there is none."""
    if len(of) != len(shape) or of[1:] != shape[1:] or len(of) not in (1, 3):
        raise ShapeError(f"partners: units of {list(shape)} do not fit those of {list(of)}")
    matrix = np.zeros((shape[0], of[0]))
    found = np.flatnonzero(np.asarray(partner.source) >= 0)
    matrix[found, np.asarray(partner.source)[found]] = np.asarray(partner.ratio, np.float64)[found]
    if not (matrix >= 0).all():
        raise ShapeError("partners: a ratio is not > 0")
    bias = np.zeros(shape[0])
    if len(shape) == 1:
        return lambda sign: Affine(sign * matrix, bias)
    return lambda sign: Conv2d(sign * matrix[:, :, None, None], bias)


# -- bounds ------------------------------------------------------------------------------------------------------------


Alone = tuple[Sequence[NodeBounds], Sequence[NodeBounds]]  # bounds of the ReLU layers of A, and of B, by themselves


def difference_bounds(program: Program, joint: Joint, lower: Tensor, upper: Tensor, memory: int = 1 << 31,
                      alone: Alone | None = None) -> Layerwise:
    """Bounds of every pre-activation of a joint network over boxes (groups, inputs); the last layer's are those of A - B.

    Args:
        program: of ``joint.network``.
        joint: see ``joint_network``.
        lower, upper: the boxes.
        memory: bytes a pass may use.
        alone: what is known of A's and B's neurons over a box that holds these.
    """
    state, known = start(program, lower, upper, memory), _placed(joint, alone)
    for layer in range(program.layers):
        state.propagate(layer)
        for bounds in known.get(layer, ()):
            state.narrow(layer, torch.arange(bounds.lower.shape[1], device=program.device), bounds.lower, bounds.upper)
        if layer == joint.last or layer in joint.deltas:
            state.crown(layer, torch.arange(program.size(program.preactivation(layer)), device=program.device))
        elif not first_is_exact(program, layer):
            state.crown(layer, state.open_rows(layer))
        if layer in joint.deltas:
            _settle(state, layer, joint.deltas[layer], alone[1][joint.deltas[layer].layer] if alone else None)
        else:
            state.relaxations[layer] = relax(program, layer, state.at(layer), compact=True)
    return state


def _placed(joint: Joint, alone: Alone | None) -> dict[int, list[NodeBounds]]:
    """Bounds of A's and B's neurons by layer of the joint network; those of pairs are not among them."""
    found: dict[int, list[NodeBounds]] = {}
    for places, bounds in zip((joint.of_a, joint.of_b), alone or (), strict=False):
        for k, layer in places.items():
            if layer not in joint.deltas:
                found.setdefault(layer, []).append(bounds[k])
    return found


def _settle(state: Layerwise, layer: int, delta: Delta, alone: NodeBounds | None) -> None:
    """Bounds and relaxation of a delta, from those of dz, of its partner, and of B's neurons by themselves."""
    dz, negative = state.at(layer), state.known[delta.partner]
    partner = NodeBounds(-negative.upper, -negative.lower)
    matched = torch.as_tensor(delta.matched, device=state.program.device)
    own_lower, own_upper = _sum_below(partner.lower, dz.lower), -_sum_below(-partner.upper, -dz.upper)
    if alone is not None:
        own_lower, own_upper = torch.maximum(own_lower, alone.lower), torch.minimum(own_upper, alone.upper)
    fixed = Fixed(matched & (own_lower >= 0), matched & (own_upper <= 0), matched & (partner.lower >= 0),
                  matched & (partner.upper <= 0))
    state.relaxations[layer] = relax_delta(state.program, dz, matched, fixed)
    low = torch.maximum(dz.lower.clamp(max=0), -partner.upper.clamp(min=0)) * ~fixed.a_off
    high = torch.minimum(dz.upper.clamp(min=0), own_upper.clamp(min=0)) * ~fixed.b_off
    low = torch.where(fixed.a_on, torch.maximum(low, dz.lower), low)
    high = torch.where(fixed.b_on, torch.minimum(high, dz.upper), high)
    low, high = torch.where(matched, low, dz.lower.clamp(min=0)), torch.where(matched, high, dz.upper.clamp(min=0))
    state.known[state.program.network.relus[layer]] = NodeBounds(low, high)


def _sum_below(a: Tensor, b: Tensor) -> Tensor:
    """A lower bound of a + b; minus infinity where that is all there is."""
    return torch.nan_to_num(a + b - 4 * UNIT_ROUNDOFF * (a.abs() + b.abs()), nan=-torch.inf)


@dataclass(frozen=True, eq=False)
class Fixed:
    """Which neurons of a pair are in a phase for sure, (groups, neurons) booleans, False where there is no partner."""

    b_on: Tensor
    b_off: Tensor
    a_on: Tensor
    a_off: Tensor


def relax_delta(program: Program, dz: NodeBounds, matched: Tensor, fixed: Fixed, share: Tensor | None = None) -> Relaxation:
    """The relaxation of delta over bounds of dz, see the top of the file; of a plain ReLU where not matched.

    Args:
        program: the joint network.
        dz: bounds, (groups, neurons).
        matched: (neurons,): where there is a partner.
        fixed: phases that are known.
        share: (groups, neurons) in [0, 1]: the relaxation of share * delta instead.
    """
    slope, intercept = upper_line(dz.lower, dz.upper)
    below, under = upper_line(-dz.upper, -dz.lower)
    plain = torch.where(dz.lower >= 0, torch.ones_like(below), adaptive_slope(dz.lower, dz.upper)) * (dz.upper > 0)
    below = torch.where(matched, below, plain)
    slope = torch.where(fixed.b_on, torch.ones_like(slope), slope * ~fixed.b_off)
    below = torch.where(fixed.a_on, torch.ones_like(below), below * ~fixed.a_off)
    intercept, under = intercept * ~(fixed.b_on | fixed.b_off), under * matched * ~(fixed.a_on | fixed.a_off)
    if share is not None:  # what rounding does to the products is a few units of what ``gamma`` pays for
        slope, below, intercept, under = (t * share for t in (slope, below, intercept, under))
    error = (program.gamma * (dz.magnitude + intercept + under) * (1 + 1e-6) + TINY) * ~(fixed.a_off & fixed.b_off)
    error = torch.where(matched | (dz.upper > 0), error, torch.zeros_like(error))
    return Relaxation(torch.stack([below, slope - below, intercept + under + 2 * error, under + error, intercept]))
