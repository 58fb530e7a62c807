"""The joint deviation on sub-boxes: never below a deviation that exists, whatever the phases, the errors and the hints."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from exactprune.checker import chains
from exactprune.checker.bundle import FLOATS, FloatingError, check_bundle, check_records
from exactprune.checker.chains import Entering
from exactprune.checker.network import CheckError
from exactprune.checker.network import of as checked
from exactprune.cli.app import run
from exactprune.compress import compress_network
from exactprune.compress.bundle import bundle
from exactprune.compress.joint import applies, joint
from exactprune.compress.rewrite import compress_network as whole
from exactprune.domain import Box, uniform
from exactprune.io import save
from exactprune.ops import Affine, Conv2d, MaxPool2d, ReLU, Reshape, Scale

SIZES = (3, 8, 7, 6, 2)


def network(tools, rng, sizes=SIZES, scale=True):
    """A random chain, behind a scaling of its input."""
    ops = [Scale(np.float32(rng.uniform(-2, 2)), np.float32(rng.normal()))] if scale else []
    for n, m in pairwise(sizes):
        ops += [Affine(rng.standard_normal((m, n)).astype(np.float32), rng.standard_normal(m).astype(np.float32)), ReLU()]
    return tools.chain((sizes[0],), *ops[:-1])


def run_chain(chain, x, forms=None, noise=None):
    """z_k of a chain in float64, with errors put in at every layer: form x + noise."""
    found, y = [], x
    for k, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
        z = y @ weight.T + bias
        if forms is not None:
            z = z + found_error(forms[k], noise[k], x)
        found.append(z)
        y = np.maximum(z, 0)
    return found


def found_error(form, noise, x):
    return x @ form.T + noise


def boxes_of(rng, low, high, count):
    """Random sub-boxes."""
    a, b = (low + (high - low) * rng.random((count, len(low))) for _ in range(2))
    return np.minimum(a, b), np.maximum(a, b)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_on_every_box(tools, seed):
    rng = np.random.default_rng(seed)
    net = checked(network(tools, rng, scale=False))
    chain, _ = chains.chain_of(net)
    low, high = boxes_of(rng, -np.ones(3), np.ones(3), 6)
    known = chains.bounds(chain, low, high)
    for i in range(6):
        z = run_chain(chain, low[i] + (high[i] - low[i]) * rng.random((500, 3)))
        for k in range(chain.hidden):
            assert (z[k] >= known.lower[k][i] - 1e-12).all() and (z[k] <= known.upper[k][i] + 1e-12).all()
            assert (known.upper[k][i] - known.lower[k][i]).max() < 100


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("signed", [False, True])
def test_no_run_with_errors_drifts_further(tools, size, signed):
    """Errors at every layer at once, as large as allowed: the difference stays below the bound, with any effort."""
    rng = np.random.default_rng(int(-np.log10(size)) + 10 * signed)
    for _ in range(6):
        net = checked(network(tools, rng, scale=False))
        chain, _ = chains.chain_of(net)
        forms = [size * rng.standard_normal((len(b), 3)) * signed for b in chain.biases]
        widths = [size * 0.1 * rng.random(len(b)) for b in chain.biases]
        reach = [np.abs(f).sum(axis=1) + w for f, w in zip(forms, widths, strict=True)]
        errors = [Entering(r * (1 + 1e-9), f, -w, w) if signed else Entering(r * (1 + 1e-9))
                  for r, f, w in zip(reach, forms, widths, strict=True)]
        low, high = boxes_of(rng, -np.ones(3), np.ones(3), 5)
        found = chains.deviation(net, errors, low, high)[0]
        for i in range(5):
            x = low[i] + (high[i] - low[i]) * rng.random((400, 3))
            noise = [w * rng.choice([-1.0, 1.0], (400, len(w))) for w in (widths if signed else reach)]
            with_errors = run_chain(chain, x, forms if signed else [f * 0 for f in forms], noise)
            gap = np.abs(with_errors[-1] - run_chain(chain, x)[-1]).max()
            assert gap <= found[i] * (1 + 1e-9)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_largest_drift_is_found_where_every_sign_is_settled(tools, first):
    """No ReLU open: what is left is linear, and the bound is its maximum, an absolute value taken once, at the output."""
    rng = np.random.default_rng(first)
    net = checked(network(tools, rng, scale=False))
    chain, _ = chains.chain_of(net)
    x = rng.uniform(-1, 1, 3)
    forms = [1e-7 * rng.standard_normal((len(b), 3)) * (k >= first) for k, b in enumerate(chain.biases)]
    forms[-1] = np.zeros_like(forms[-1])
    nothing = [np.zeros(len(f)) for f in forms]
    errors = [Entering(np.abs(f).sum(axis=1) * (1 + 1e-9), f, z, z) for f, z in zip(forms, nothing, strict=True)]
    found = chains.deviation(net, errors, x[None] - 1e-6, x[None] + 1e-6)[0][0]
    near = x + 1e-6 * rng.choice([-1.0, 1.0], (64, 3))
    true = np.abs(run_chain(chain, near, forms, nothing)[-1] - run_chain(chain, near)[-1]).max()
    assert true * (1 - 1e-6) <= found <= true * (1 + 1e-4)


def test_open_slopes_pay_for_half_their_distance(tools):
    """Two opposite readers of one error: signs are kept over rows, so where no sign is open they cancel to nothing."""
    chain = [Affine(np.array([[1.0]], np.float32), np.zeros(1, np.float32)), ReLU(),
             Affine(np.array([[1.0], [1.0]], np.float32), np.zeros(2, np.float32)), ReLU(),
             Affine(np.array([[1.0, -1.0]], np.float32), np.zeros(1, np.float32))]
    net, errors = checked(tools.chain((1,), *chain)), [Entering(np.full(1, 1e-3)), Entering(np.zeros(2)), Entering(np.zeros(1))]
    low, high = np.array([[0.5], [-1.0], [-1.0]]), np.array([[1.0], [1.0], [-0.5]])
    settled, open_, off = chains.deviation(net, errors, low, high)[0]
    assert settled < 1e-12 and off < 1e-12
    assert 1e-3 <= open_ <= 1.1e-3  # slopes of the second layer may differ: s d in [0, d] for each of the two


def test_forms_are_much_tighter_than_absolute_values(tools):
    rng = np.random.default_rng(0)
    net = checked(network(tools, rng, (2, 16, 16, 16, 16, 1), scale=False))
    chain, _ = chains.chain_of(net)
    errors = [Entering(np.full(len(b), 1e-9 * (k == 1))) for k, b in enumerate(chain.biases)]
    low, high = -0.01 * np.ones((1, 2)), 0.01 * np.ones((1, 2))
    plain = chains.drift(chain, [e.size for e in errors])[-1].max()
    assert chains.deviation(net, errors, low, high)[0][0] < plain / 20


def test_only_chains(tools):
    assert chains.chain_of(checked(tools.chain((1, 3, 3), Conv2d(np.ones((1, 1, 2, 2), np.float32), np.zeros(1, np.float32)),
                                               ReLU(), MaxPool2d((1, 1), (1, 1)), Reshape((4,)),
                                               Affine(np.ones((1, 4), np.float32), np.zeros(1, np.float32))))) is None
    assert not applies(network(tools, np.random.default_rng(0), (40, 5, 5, 2)), uniform(0, 1, (40,)))


def planted(tools, rng, active=14, inputs=4):
    """First layer: more stably active neurons than inputs; then unstable layers through which a deviation is blown up."""
    first = rng.standard_normal((active + 6, inputs)).astype(np.float32)
    shift = np.concatenate([np.abs(first[:active]).sum(axis=1) + 0.1, rng.normal(size=6)]).astype(np.float32)
    ops = [Affine(first, shift), ReLU()]
    for n, m in ((active + 6, 20), (20, 20), (20, 20), (20, 20)):
        ops += [Affine((rng.standard_normal((m, n)) / 2).astype(np.float32), rng.standard_normal(m).astype(np.float32)), ReLU()]
    return tools.chain((inputs,), *ops, Affine(rng.standard_normal((2, 20)).astype(np.float32), np.zeros(2, np.float32)))


def records(f, box, verdicts):
    layers = [{"node": i, "name": f.nodes[i].name, "neurons": int(np.prod(f.shapes[i]))} for i in f.relus]
    head = {"record": "header", "format": "exactprune-certificate/1", "network": f.sha256, "domain": box.sha256,
            "dtype": f.dtype.name, "input_shape": list(f.input_shape), "layers": layers, "tool": {"test": "1"}}
    words = (("inactive", 1), ("active", 2))
    lists = []
    for v in verdicts:
        found = {word: np.flatnonzero(v.status == code).tolist() for word, code in words}
        rest = np.setdiff1d(np.arange(v.status.size), [i for part in found.values() for i in part])
        lists.append({**found, "unknown": rest.tolist()})
    return [head, *({"record": "verdicts", "layer": k, "unstable": [], **found} for k, found in enumerate(lists))]


@pytest.fixture
def compressed(tools):
    rng = np.random.default_rng(5)
    f = planted(tools, rng)
    box = Box(np.full(4, -0.5), np.array([0.5, 0.5, -0.4, -0.45]))
    verdicts = tools.verdicts(f, box)
    return f, box, verdicts, compress_network(f, box, verdicts)


def test_dependent_rows_go_at_rounding_and_the_bundle_is_accepted(tools, compressed):
    f, box, verdicts, rewrite = compressed
    assert rewrite.boxes is not None and rewrite.eps <= rewrite.budget
    assert rewrite.network.shapes[rewrite.network.relus[0]][0] <= 4 + 6
    rng = np.random.default_rng(0)
    for x in np.concatenate([box.sample(6, rng), box.corners(6, rng)]):
        assert np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)).max() <= Fraction(rewrite.eps)
    found = bundle(f, box, rewrite, records(f, box, verdicts), verdicts)
    assert found.report.accepted and found.level == rewrite.level, found.report.error
    assert [r["record"] for r in found.records].count("split") == 1


def test_under_exact_float64_is_not_enough(tools, compressed, tmp_path, capsys):
    f, box, verdicts, rewrite = compressed
    found = bundle(f, box, rewrite, records(f, box, verdicts), verdicts)
    assert found.report.arithmetic == FLOATS
    save(f, tmp_path / "f.pt")
    save(rewrite.network, tmp_path / "g.pt")
    (tmp_path / "c").write_bytes(found.data)
    files = [tmp_path / name for name in ("f.pt", "g.pt", "c")]
    assert check_bundle(*files).accepted
    with pytest.raises(FloatingError, match="split"):
        check_bundle(*files, exact=True)
    assert run(["check", *map(str, files)]) == 0 and FLOATS in capsys.readouterr().out
    assert run(["check", *map(str, files), "--exact"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "float64" in captured.err and captured.err.count("\n") == 1


def test_overflow_is_no_bound():
    """Forms that overflow where values do not: NaN bounds must not pass for settled phases."""
    big = np.full((2, 2), 1e200)
    chain = chains.Chain((big, big, np.ones((2, 2)), np.ones((1, 2))), (np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(1)))
    low, high = np.zeros((1, 2)), np.full((1, 2), 1e-300)
    with np.errstate(all="ignore"):
        known = chains.bounds(chain, low, high)
        assert not any(np.isnan(b).any() for b in (*known.lower, *known.upper))
        z = run_chain(chain, high)
    assert all((known.lower[k] <= z[k]).all() and (z[k] <= known.upper[k]).all() for k in range(3))


def test_a_network_that_differs_more_is_not_accepted(tools, compressed):
    f, box, verdicts, rewrite = compressed
    nodes = list(rewrite.network.nodes)
    place = next(i for i, n in enumerate(nodes) if isinstance(n.op, Affine) and i > 0)
    weight = nodes[place].op.weight.copy()
    weight[:, -1] *= np.float32(1 + 1e-4)
    nodes[place] = replace(nodes[place], op=replace(nodes[place].op, weight=weight))
    other = replace(rewrite, network=replace(rewrite.network, nodes=tuple(nodes)))
    found = bundle(f, box, other, records(f, box, verdicts), verdicts)
    assert found.level is None or found.level.eps > rewrite.eps
    x = box.sample(20, np.random.default_rng(1))
    true = max(np.abs(tools.exact(f, p) - tools.exact(other.network, p)).max() for p in x)
    assert true <= Fraction(found.report.deviation) and true > Fraction(rewrite.eps)


@pytest.mark.parametrize("change", [
    lambda r: {**r, "dims": [0]}, lambda r: {**r, "dims": []}, lambda r: {k: v for k, v in r.items() if k != "at"},
    lambda r: {**r, "dims": [99] + [-1] * 2}, lambda r: {**r, "at": "x"}, lambda r: {**r, "more": 1}])
def test_malformed_splits_are_rejected(tools, compressed, change):
    f, box, verdicts, rewrite = compressed
    lines = list(bundle(f, box, rewrite, records(f, box, verdicts), verdicts).records)
    changed = [change(r) if r["record"] == "split" else r for r in lines]
    report = check_records(f, rewrite.network, iter(changed))
    assert not report.accepted and report.error
    twice = [r for line in lines for r in ([line, line] if line["record"] == "split" else [line])]
    assert not check_records(f, rewrite.network, iter(twice)).accepted


def test_without_boxes_the_claim_is_not_accepted(tools, compressed):
    f, box, verdicts, rewrite = compressed
    lines = [r for r in bundle(f, box, rewrite, records(f, box, verdicts), verdicts).records if r["record"] != "split"]
    report = check_records(f, rewrite.network, iter(lines))
    assert not report.accepted and report.deviation > rewrite.eps


def test_more_boxes_never_hurt_and_targets_are_kept(compressed):
    f, box, verdicts, rewrite = compressed
    few, many = (joint(f, box, verdicts, rewrite, 0.0, boxes) for boxes in (1, 200))
    assert many.eps <= few.eps * (1 + 1e-9) and few.leaves <= many.leaves
    assert joint(f, box, verdicts, rewrite, np.inf).leaves == 1
    assert whole is compress_network


def test_hints_that_do_not_hold_are_no_bound(compressed):
    f, box, verdicts, rewrite = compressed
    wrong = replace(rewrite, origin=((0, np.roll(rewrite.origin[0][1], 1)), *rewrite.origin[1:]))
    found = joint(f, box, verdicts, wrong, rewrite.eps, 50)
    assert found is None or found.eps > rewrite.eps
    with pytest.raises(CheckError, match="no chain"):
        chains.deviation(checked_pool(), [Entering(np.zeros(4))], np.zeros((1, 4)), np.ones((1, 4)))


def checked_pool():
    from types import SimpleNamespace

    op = SimpleNamespace(kind="MaxPool2d", arrays=dict, settings=lambda: {"kernel": (1, 1), "stride": (1, 1),
                                                                          "padding": (0, 0, 0, 0), "dilation": (1, 1)})
    return checked(SimpleNamespace(nodes=[SimpleNamespace(op=op, inputs=(-1,))], input_shape=(1, 2, 2), dtype=np.float32))
