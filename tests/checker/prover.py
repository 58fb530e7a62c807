"""A small prover for tests: it writes valid certificates for small networks, slowly, in the documented format.

It may ask the checker's own bound routines which splits suffice; nothing of what the tests call true comes from here.
"""

from __future__ import annotations

import base64
from fractions import Fraction

import numpy as np
from scipy.optimize import linprog

from exactprune.checker import trees
from exactprune.checker.bounds import Bounds
from exactprune.checker.boxes import local_bounds
from exactprune.checker.network import domain_sha256, of


def pack(array, dtype):
    array = np.ascontiguousarray(array, dtype=dtype)
    return {"dtype": dtype, "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def header(network, lower, upper):
    layers = [{"node": i, "name": f"relu{i}", "neurons": int(np.prod(network.shapes[i]))} for i in network.relus]
    return {"record": "header", "format": "exactprune-certificate/1", "network": network.sha256,
            "domain": domain_sha256(np.asarray(lower, np.float64), np.asarray(upper, np.float64)),
            "dtype": network.dtype if isinstance(network.dtype, str) else network.dtype.name,
            "input_shape": list(network.input_shape), "layers": layers, "tool": {"test": "1"}}


def crown(layer, neurons, side="both"):
    return {"record": "crown", "layer": layer, "neurons": [int(i) for i in neurons], "side": side}


def given(layer, neurons, shift, values):
    return {"layer": layer, "neurons": [int(i) for i in neurons], "shift": [int(s) for s in shift],
            "values": pack(np.atleast_2d(values), "<i8")}


def verdicts(layer, size, inactive=(), active=(), unstable=()):
    inactive, active, unstable = (sorted(int(i) for i in x) for x in (inactive, active, unstable))
    rest = sorted(set(range(size)) - {*inactive, *active, *unstable})
    return {"record": "verdicts", "layer": layer, "inactive": inactive, "active": active, "unstable": unstable,
            "unknown": rest}


def fresh_bounds(network, lower, upper):
    return Bounds(of(network), (np.asarray(lower, np.float64), np.asarray(upper, np.float64)))


def grow_tree(bounds, layer, neuron, side, limit=64, leaf_hints=None):
    """A tree record that proves the sign by splitting unstable neurons in order, with fixed slopes; or None."""
    sign = 1 if side == "upper" else -1
    sizes = [len(b) for b in bounds.lower]
    splits, leaves = [], []

    def visit(path):
        region, empty = trees.cut(bounds.domain(layer), [path])
        value = -1.0 if empty[0] else bounds.maximise(layer, np.array([neuron]), np.array([sign]), region)[0]
        if value <= 0:
            splits.append(None)
            leaves.append(leaf_hints() if leaf_hints else [])
            return True
        used = {(j, c) for j, c, _ in path}
        free = [(j, c) for j in range(layer) for c in range(sizes[j])
                if bounds.lower[j][c] < 0 < bounds.upper[j][c] and (j, c) not in used]
        if not free or len(leaves) >= limit:
            return False
        j, c = free[0]
        splits.append([j, c])
        return visit((*path, (j, c, 0))) and visit((*path, (j, c, 1)))

    if not visit(()):
        return None
    return {"record": "tree", "layer": layer, "neuron": int(neuron), "side": side, "splits": splits, "leaves": leaves}


def optimal_tree(network, bounds, neuron, side, shift=20, penalty=1e3):
    """A tree record for layer 1 of an affine-relu-affine-relu chain that splits every unstable neuron of layer 0.

    Every leaf carries the duals of its linear program max +-z_hat over the box and the leaf's phases (phases may be
    violated
    at a price, so an infeasible leaf has bounded duals too). With all phases fixed such a tree proves every claim
    with room.
    """
    sign = 1.0 if side == "upper" else -1.0
    first, second = (network.nodes[i].op for i in (0, 2))
    weight, bias = first.weight.astype(float), first.bias.astype(float)
    row = sign * second.weight[neuron].astype(float)
    open_neurons = [c for c in range(len(bias)) if bounds.lower[0][c] < 0 < bounds.upper[0][c]]
    splits, leaves = [], []

    def leaf(phases):
        active = bounds.lower[0] >= 0
        for c, phase in phases.items():
            active[c] = bool(phase)
        push = np.where(active[open_neurons], 1.0, -1.0)
        count = len(open_neurons)
        cost = np.concatenate([-(row * active) @ weight, np.full(count, penalty)])
        found = linprog(cost, A_ub=np.hstack([-push[:, None] * weight[open_neurons], -np.eye(count)]),
                        b_ub=push * bias[open_neurons], method="highs",
                        bounds=[*zip(*(b.reshape(-1) for b in bounds.box), strict=True), *[(0, None)] * count])
        multiplier = row * active
        multiplier[open_neurons] += push * -found.ineqlin.marginals
        return [given(0, range(len(bias)), [shift], np.rint(multiplier * 2.0**shift).astype(np.int64))]

    def visit(phases):
        if len(phases) == len(open_neurons):
            splits.append(None)
            leaves.append(leaf(phases))
            return
        c = open_neurons[len(phases)]
        splits.append([0, c])
        visit(phases | {c: 0})
        visit(phases | {c: 1})

    visit({})
    return {"record": "tree", "layer": 1, "neuron": int(neuron), "side": side, "splits": splits, "leaves": leaves}


def grow_boxes(bounds, layer, claims, depth=6):
    """A boxes record by midpoint splits that proves (neuron, side) claims of one layer; None if it does not."""
    lower, upper = (b.reshape(-1) for b in bounds.box)
    dims, at, out = [], [], []

    def visit(low, high, left, level):
        node = len(dims)
        dims.append(-1)
        at.append(0.0)
        region = local_bounds(bounds, layer, low[None], high[None])
        found_low, found_high = region.relu[layer]
        for n, s in left:
            value = bounds.decide(layer, np.array([n]), np.array([1 if s == "upper" else -1]), region)
            if s == "upper":
                found_high[0, n] = min(found_high[0, n], value[0])
            else:
                found_low[0, n] = max(found_low[0, n], -value[0])
        held = [(i, s) for i, s in left if (found_high[0, i] <= 0 if s == "upper" else found_low[0, i] >= 0)]
        if held:
            out.append({"node": node, "layer": layer, "upper": [int(i) for i, s in held if s == "upper"],
                        "lower": [int(i) for i, s in held if s == "lower"]})
        left = [c for c in left if c not in held]
        if not left:
            return True
        dim = int((high - low).argmax())
        middle = (low[dim] + high[dim]) / 2
        if level == 0 or not low[dim] < middle < high[dim]:
            return False
        dims[node], at[node] = dim, middle
        below, above = high.copy(), low.copy()
        below[dim] = above[dim] = middle
        return visit(low, below, left, level - 1) and visit(above, high, left, level - 1)

    if not visit(lower.copy(), upper.copy(), list(claims), depth):
        return None
    return {"record": "boxes", "dims": pack(dims, "<i4"), "at": pack(at, "<f8"), "claims": out}


# -- exact truth, by Fractions and nothing of the checker's ----------------------------------------------------


def exact_nodes(network, point):
    """Exact value (flat list of Fractions) of every node of an exactprune Network at a flat point."""
    values = {-1: [Fraction(float(x)) for x in point]}
    for position, node in enumerate(network.nodes):
        inputs = [values[i] for i in node.inputs]
        shapes = [network.shape_of(i) for i in node.inputs]
        values[position] = EXACT[node.op.kind](node.op, inputs, shapes, network.shapes[position])
    return values


def _objects(values, shape):
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _exact_affine(op, inputs, shapes, out):
    return [sum((Fraction(float(w)) * x for w, x in zip(row, inputs[0], strict=True) if w), Fraction(float(b)))
            for row, b in zip(op.weight, op.bias, strict=True)]


def _window_values(x, shape, kernel, stride, padding, dilation, i, j):
    found = []
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            r, c = i * stride[0] + a * dilation[0] - padding[0], j * stride[1] + b * dilation[1] - padding[1]
            inside = 0 <= r < shape[1] and 0 <= c < shape[2]
            framed = r < shape[1] + padding[2] and c < shape[2] + padding[3]
            found.append((r, c) if inside else (None if framed else "outside"))
    return found


def _exact_conv(op, inputs, shapes, out):
    x, shape = _objects(inputs[0], shapes[0]), shapes[0]
    per = op.weight.shape[0] // op.groups
    values = []
    for o in range(out[0]):
        for i in range(out[1]):
            for j in range(out[2]):
                places = _window_values(x, shape, op.kernel, op.stride, op.padding, op.dilation, i, j)
                total = Fraction(float(op.bias[o]))
                for n in range(op.weight.shape[1]):
                    channel = (o // per) * op.weight.shape[1] + n
                    for w, place in zip(op.weight[o, n].reshape(-1), places, strict=True):
                        if isinstance(place, tuple):
                            total += Fraction(float(w)) * x[(channel, *place)]
                values.append(total)
    return values


def _exact_pool(op, inputs, shapes, out):
    x, shape = _objects(inputs[0], shapes[0]), shapes[0]
    values = []
    for c in range(out[0]):
        for i in range(out[1]):
            for j in range(out[2]):
                dilation = getattr(op, "dilation", (1, 1))
                places = _window_values(x, shape, op.kernel, op.stride, op.padding, dilation, i, j)
                inside = [x[(c, *p)] for p in places if isinstance(p, tuple)]
                if op.kind == "MaxPool2d":
                    values.append(max(inside))
                else:
                    count = sum(p != "outside" for p in places) if op.count_include_pad else len(inside)
                    values.append(sum(inside, Fraction(0)) / count)
    return values


def _exact_scale(op, inputs, shapes, out):
    scale, shift = (np.broadcast_to(a, shapes[0]).reshape(-1) for a in (op.scale, op.shift))
    return [Fraction(float(s)) * x + Fraction(float(t)) for s, x, t in zip(scale, inputs[0], shift, strict=True)]


EXACT = {
    "Affine": _exact_affine,
    "Conv2d": _exact_conv,
    "Scale": _exact_scale,
    "ReLU": lambda op, x, s, o: [max(v, Fraction(0)) for v in x[0]],
    "Add": lambda op, x, s, o: [a + b for a, b in zip(*x, strict=True)],
    "MaxPool2d": _exact_pool,
    "AvgPool2d": _exact_pool,
    "Reshape": lambda op, x, s, o: x[0],
    "Transpose": lambda op, x, s, o: _objects(x[0], s[0]).transpose(op.permutation).reshape(-1).tolist(),
    "Pad": lambda op, x, s, o: np.pad(_objects(x[0], s[0]), op.pads,
                                      constant_values=Fraction(float(op.value))).reshape(-1).tolist(),
}
