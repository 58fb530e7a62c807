"""What the compressor writes, the checker accepts: planted networks of every kind, trained models, from files alone."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exactprune.claim import Status
from exactprune.compress import Kind, compress_network
from exactprune.compress.bundle import bundle, restricted
from exactprune.domain import Box, uniform
from exactprune.network import INPUT, Network, Node, build
from exactprune.ops import Add, Affine, AvgPool2d, Conv2d, MaxPool2d, ReLU, Reshape

MODELS = Path(__file__).parents[2] / "models"


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def active(rng, k, n, rank=None):
    """Affine with ``k`` outputs that are positive on [0, 1]^n."""
    weight = normal(rng, k, n) if rank is None else normal(rng, k, rank) @ normal(rng, rank, n)
    return Affine(weight, (np.minimum(weight, 0).astype(np.float64).sum(axis=1) * -1.01 + 0.1).astype(np.float32))


def joined(*ops):
    return Affine(np.concatenate([op.weight for op in ops]), np.concatenate([op.bias for op in ops]))


def unstable(rng, k, n):
    weight = normal(rng, k, n)
    return Affine(weight, (-weight.sum(axis=1) / 2).astype(np.float32))


def dead(rng, k, n):
    return Affine(normal(rng, k, n), np.full(k, -100, np.float32))


def records(f: Network, box: Box, verdicts) -> list[dict]:
    """A certificate for verdicts that interval bounds prove."""
    layers = [{"node": i, "name": f.nodes[i].name, "neurons": int(np.prod(f.shapes[i]))} for i in f.relus]
    head = {"record": "header", "format": "exactprune-certificate/1", "network": f.sha256, "domain": box.sha256,
            "dtype": f.dtype.name, "input_shape": list(f.input_shape), "layers": layers, "tool": {"test": "1"}}
    lists = [{word: np.flatnonzero(v.status == status).tolist() for word, status in
              (("inactive", Status.INACTIVE), ("active", Status.ACTIVE), ("unknown", Status.UNSTABLE))} for v in verdicts]
    return [head, *({"record": "verdicts", "layer": k, "unstable": [], **found} for k, found in enumerate(lists))]


def certified(tools, f, deviation, box=None):
    """The compression and its bundle, which must be accepted at the level that is claimed."""
    box = box or uniform(0, 1, f.input_shape)
    verdicts = tools.verdicts(f, box)
    rewrite = compress_network(f, box, verdicts, max_deviation=deviation)
    found = bundle(f, box, rewrite, records(f, box, verdicts), verdicts)
    assert found.report.accepted, found.report.error
    assert found.level == found.claimed == rewrite.level and found.report.deviation <= rewrite.eps
    points = np.concatenate([box.sample(4, np.random.default_rng(0)), box.corners(4, np.random.default_rng(1))])
    worst = max(float(np.max(np.abs(tools.exact(f, x) - tools.exact(rewrite.network, x)))) for x in points)
    assert worst <= found.report.deviation or worst == 0
    return rewrite, found


@pytest.mark.parametrize("deviation", ["exact", "rounding", 1e-2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dense_networks(tools, deviation, dtype):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        first = joined(active(rng, 12, 6, rank=3), unstable(rng, 5, 6), dead(rng, 4, 6))
        second = joined(active(rng, 3, 21), unstable(rng, 6, 21), dead(rng, 2, 21))
        f = tools.chain((6,), first, ReLU(), second, ReLU(), Affine(normal(rng, 3, 11), normal(rng, 3)), dtype=dtype)
        rewrite, found = certified(tools, f, deviation)
        assert rewrite.network.neurons < f.neurons and (deviation != "exact" or found.report.deviation == 0)


def test_duplicates_exact_and_not(tools):
    rng = np.random.default_rng(1)
    op = unstable(rng, 6, 5)
    for factor in (np.float32(2), np.float32(0.7)):
        first = joined(op, Affine(op.weight[:3] * factor, op.bias[:3] * factor))
        f = tools.chain((5,), first, ReLU(), Affine(normal(rng, 2, 9), normal(rng, 2)))
        rewrite, _ = certified(tools, f, 1e-3)
        assert "duplicate" in {r.rule for r in rewrite.removals}


def test_opposite_and_relaxed_neurons(tools):
    rng = np.random.default_rng(2)
    op = unstable(rng, 12, 4)
    near = active(rng, 10, 4, rank=2)
    near = Affine(near.weight, near.bias - np.float32(0.11))
    first = joined(op, Affine(-op.weight[:10], -op.bias[:10]), near, active(rng, 4, 4))
    f = tools.chain((4,), first, ReLU(), Affine(normal(rng, 2, 36) * np.float32(0.1), normal(rng, 2)))
    rewrite, _ = certified(tools, f, 0.5)
    assert {"opposite", "relax"} & {r.rule for r in rewrite.removals}


def test_layers_that_disappear(tools):
    rng = np.random.default_rng(3)
    folded = tools.chain((4,), active(rng, 30, 4), ReLU(), Affine(normal(rng, 5, 30), normal(rng, 5)), ReLU(),
                         Affine(normal(rng, 2, 5), normal(rng, 2)))
    assert "fold" in {r.rule for r in certified(tools, folded, 1e-3)[0].removals}
    gone = tools.chain((4,), dead(rng, 5, 4), ReLU(), Affine(normal(rng, 3, 5), normal(rng, 3)))
    rewrite, found = certified(tools, gone, "exact")
    assert rewrite.network.neurons == 0 and found.report.deviation == 0
    low = Affine(normal(rng, 20, 1) @ normal(rng, 1, 30), normal(rng, 20))
    thin = tools.chain((40,), active(rng, 30, 40), ReLU(), low, ReLU(), Affine(normal(rng, 2, 20), normal(rng, 2)))
    certified(tools, thin, 1e-2)


def active_conv(rng, m, n, k, padding=0):
    weight = normal(rng, m, n, k, k)
    bias = -1.01 * np.minimum(weight, 0).astype(np.float64).sum(axis=(1, 2, 3)) + 0.1
    return Conv2d(weight, bias.astype(np.float32), padding=(padding,) * 4)


@pytest.mark.parametrize("padding", [0, 1])
def test_merged_channels(tools, padding):
    rng = np.random.default_rng(4)
    size = 3 + 2 * padding
    inner = Conv2d(normal(rng, 2, 30, 2, 2), normal(rng, 2), padding=(padding,) * 4)
    size += 2 * padding
    f = tools.chain((1, 5, 5), active_conv(rng, 30, 1, 2, padding), ReLU(), inner, ReLU(), Reshape((2 * size**2,)),
                    Affine(normal(rng, 2, 2 * size**2), normal(rng, 2)))
    rewrite, _ = certified(tools, f, 1e-2)
    assert "merge" in {r.rule for r in rewrite.removals}


@pytest.mark.parametrize("deviation", ["exact", 1e-3])
def test_convolutions_with_pools_and_a_residual_sum(tools, deviation):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ops = [tools.killed(tools.conv(rng, 6, 1), 1, 4), tools.killed(tools.conv(rng, 6, 6), 1, 2, 4),
               tools.killed(tools.conv(rng, 5, 6), 0)]
        nodes = [Node("a", ops[0], (INPUT,)), Node("b", ReLU(), (0,)), Node("c", ops[1], (1,)), Node("d", ReLU(), (2,)),
                 Node("e", Add(), (1, 3)), Node("f", MaxPool2d((2, 2), (2, 2)), (4,)), Node("g", ops[2], (5,)),
                 Node("h", ReLU(), (6,)), Node("i", AvgPool2d((2, 2), (2, 2)), (7,)), Node("j", Reshape((5,)), (8,)),
                 Node("k", tools.affine(rng, 3, 5), (9,))]
        f = build(nodes, (1, 4, 4), np.float32)
        rewrite, found = certified(tools, f, deviation)
        assert rewrite.network.parameters < f.parameters and (deviation != "exact" or found.report.deviation == 0)


def test_a_claim_that_is_too_good_is_lowered(tools):
    rng = np.random.default_rng(5)
    f = tools.chain((6,), joined(active(rng, 12, 6), unstable(rng, 2, 6)), ReLU(),
                    Affine(normal(rng, 2, 14), normal(rng, 2)))
    box = uniform(0, 1, (6,))
    verdicts = tools.verdicts(f, box)
    rewrite = compress_network(f, box, verdicts, max_deviation=1e-3)
    boast = replace(rewrite, level=type(rewrite.level)(Kind.CERTIFIED, rewrite.eps / 1e6))
    found = bundle(f, box, boast, records(f, box, verdicts), verdicts)
    assert found.claimed == boast.level and found.level is not None and found.report.accepted
    assert found.claimed.eps < found.report.deviation <= found.level.eps <= 1.01 * rewrite.eps
    assert "lowered" in found.words


def test_no_proof_no_level(tools):
    """A rewrite whose network is another one altogether, and a certificate that claims too much."""
    rng = np.random.default_rng(6)
    f = tools.chain((4,), unstable(rng, 5, 4), ReLU(), Affine(normal(rng, 2, 5), normal(rng, 2)))
    box = uniform(0, 1, (4,))
    verdicts = tools.verdicts(f, box)
    rewrite = compress_network(f, box, verdicts, max_deviation="exact")
    other = tools.chain((4,), Affine(normal(rng, 5, 4), normal(rng, 5)), ReLU(), Affine(normal(rng, 2, 5), normal(rng, 2)))
    found = bundle(f, box, replace(rewrite, network=other), records(f, box, verdicts), verdicts)
    assert found.level is not None and found.level.eps > 0.01        # an honest, useless bound
    lying = records(f, box, verdicts)
    lying[1] |= {"inactive": [0, 1, 2, 3, 4], "unknown": []}
    found = bundle(f, box, rewrite, lying, verdicts)
    assert found.level is None and "does not accept" in found.words


def test_witnesses_are_left_out():
    lines = [{"record": "header"}, {"record": "points"}, {"record": "unstable"},
             {"record": "verdicts", "layer": 0, "inactive": [0], "active": [], "unstable": [1, 3], "unknown": [2]}]
    found = list(restricted(lines))
    assert [r["record"] for r in found] == ["header", "verdicts"] and found[1]["unstable"] == []
    assert found[1]["unknown"]["shape"] == [3]


# -- the command line ---------------------------------------------------------------------------------------------------

TORCHLESS = """
import sys
from exactprune.cli.app import run
code = run(sys.argv[1:])
assert not {"torch", "highspy", "scipy", "pyomo"} & set(sys.modules), "checked with help"
sys.exit(code)
"""


def check(folder, *arguments):
    return subprocess.run([sys.executable, "-c", TORCHLESS, "check", *map(str, arguments)], cwd=folder,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    command = [sys.executable, "-m", "exactprune", "compress", str(MODELS / "digits_2x32.pt"), "-o", "g.pt"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert "Certificate:   g.pt.certificate" in found.stdout and "Claim (certified)" in found.stdout
    return folder


def test_files_alone_are_enough(done):
    found = check(done, MODELS / "digits_2x32.pt", "g.pt", "g.pt.certificate")
    assert (found.returncode, found.stderr) == (0, "") and "ACCEPTED: abs(f(x) - g(x)) <= " in found.stdout
    summary = json.loads((done / "digits_2x32.exactprune" / "compression.json").read_text())
    assert summary["certificate"]["checked"]["accepted"] and summary["certificate"]["path"] == "g.pt.certificate"
    report = json.loads(check(done, MODELS / "digits_2x32.pt", "g.pt", "g.pt.certificate", "--json").stdout)
    assert report["accepted"] and 0 < report["deviation"] <= report["claimed"] == summary["level"]["eps"]


def test_swapped_or_changed_files_are_rejected(done):
    model = MODELS / "digits_2x32.pt"
    lines = gzip.decompress((done / "g.pt.certificate").read_bytes()).decode().splitlines()
    head = json.loads(lines[0])
    smaller = json.dumps(head | {"eps": head["eps"] / 2})
    (done / "less.certificate").write_bytes(gzip.compress("\n".join([smaller, *lines[1:], ""]).encode()))
    for arguments in (("g.pt", model, "g.pt.certificate"), (model, "g.pt", "less.certificate"), (model, "g.pt", "g.pt")):
        found = check(done, *arguments)
        assert (found.returncode, found.stderr) == (1, "") and "REJECTED" in found.stdout, arguments


def test_misuse(done):
    for arguments in (("nope.pt", "g.pt", "g.pt.certificate"), (MODELS / "digits_2x32.pt", "nope.pt", "g.pt.certificate"),
                      (MODELS / "digits_2x32.pt", "g.pt", "nope")):
        found = check(done, *arguments)
        assert found.returncode == 2 and found.stderr.count("\n") == 1, (arguments, found)


@pytest.mark.parametrize(("accepts", "words"), [(0.6, "rewrites within"), (0.0, "only exact rewrites are kept")])
def test_falling_back_is_said(monkeypatch, accepts, words):
    """A checker that proves little: a smaller budget first, then exact rewrites; the first budget and R stay."""
    import exactprune
    from exactprune.cli.commands import _certified
    from exactprune.cli.progress import progress
    from exactprune.compress import bundle as module

    result = exactprune.verify(exactprune.load(MODELS / "digits_2x32.pt"), options=exactprune.VerifyOptions(exact=False))
    first, tried, honest = exactprune.compress(result), [], module.bundle

    def strict(network, domain, rewrite, certificate, verdicts):
        found = honest(network, domain, rewrite, certificate, verdicts)
        tried.append(rewrite.eps)
        if rewrite.eps <= accepts * first.rewrite.eps:
            return found
        return replace(found, level=None, report=replace(found.report, error="not today"))

    monkeypatch.setattr(module, "bundle", strict)
    with progress(True) as shown:
        smaller, found = _certified(result, exactprune.CompressOptions(), None, shown)
    assert (smaller.rewrite.budget, smaller.rewrite.reach) == (first.rewrite.budget, first.rewrite.reach) and first.rewrite.reach
    assert "FELL BACK" in found.words and "not today" in found.words and words in found.words
    assert found.level is not None and smaller.level == found.level and len(tried) >= 2
    assert (found.level.kind is Kind.EXACT) == (accepts == 0)


@pytest.mark.parametrize(("name", "shape"), [("fashion_2x100.pt", None), ("fashion_conv_bn.pt", (1, 28, 28)),
                                             pytest.param("fashion_resnet.onnx", None, marks=pytest.mark.slow)])
def test_trained_models(name, shape):
    import exactprune

    network = exactprune.load(MODELS / name, input_shape=shape) if shape else exactprune.load(MODELS / name)
    result = exactprune.verify(network, options=exactprune.VerifyOptions(exact=False))
    for deviation in ("exact", "rounding") if shape is None else ("rounding",):
        rewrite = compress_network(network, result.domain, result.layers, max_deviation=deviation)
        found = bundle(network, result.domain, rewrite, result.records, result.layers)
        assert found.report.accepted and found.level == rewrite.level, found.report.error
        assert rewrite.network.parameters < network.parameters and len(found.data) < 100_000
