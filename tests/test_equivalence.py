"""equiv against exact enumeration, LPs over phases, compressed networks; and the command line."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from changed_networks import changed
from exact_truth import exact_ranges_1d, extremum_by_phases, mlp, random_mlp
from scipy.linalg import block_diag
from torch import nn

import exactprune
from exactprune.bounds.forward import exact_preactivations
from exactprune.cli.app import run
from exactprune.deciders.difference_boxes import Closed
from exactprune.deciders.difference_search import rounded_down
from exactprune.domain import Box, uniform
from exactprune.errors import DomainError, OptionError, ShapeError
from exactprune.network import Network
from exactprune.ops import Affine
from exactprune.progress import Silent

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def beside(a: Network, b: Network) -> Network:
    """[A - B, B - A] as one chain with a last ReLU: block-diagonal layers, written independently of the code under test."""
    pairs = [(n.op, m.op) for n, m in zip(a.nodes, b.nodes, strict=True) if isinstance(n.op, Affine)]
    layers = []
    for i, (p, q) in enumerate(pairs):
        first, last = i == 0, i == len(pairs) - 1
        weight = np.vstack([p.weight, q.weight]) if first else block_diag(p.weight, q.weight)
        bias = np.concatenate([p.bias, q.bias])
        if last:
            n = len(p.weight)
            weight, bias = weight[:n] - weight[n:], None
            layers.append((np.vstack([weight, -weight]), np.concatenate([p.bias - q.bias, q.bias - p.bias])))
        else:
            layers.append((weight, bias))
    return mlp([*layers, (np.ones((1, len(layers[-1][0]))), np.zeros(1))])


def difference_at(a, b, x):
    """A - B at a point as rationals, by evaluating Fractions through the affine layers."""
    def value(network):
        z = [Fraction(float(v)) for v in np.asarray(x).reshape(-1)]
        for node in network.nodes:
            if isinstance(node.op, Affine):
                rows = zip(node.op.weight, node.op.bias, strict=True)
                z = [sum((Fraction(float(w)) * v for w, v in zip(row, z)), Fraction(float(b))) for row, b in rows]
            else:
                z = [max(v, Fraction(0)) for v in z]
        return z

    return [p - q for p, q in zip(value(a), value(b), strict=True)]


@pytest.mark.parametrize("seed", range(12))
def test_exact_closes_on_the_true_maximum_in_one_dimension(seed):
    rng = np.random.default_rng(seed)
    sizes = [1, *rng.integers(2, 5, rng.integers(1, 3)).tolist(), int(rng.integers(1, 3))]
    a, b = random_mlp(rng, sizes), random_mlp(rng, sizes)
    box = Box(np.array([-rng.random()]), np.array([rng.random()]))
    result = exactprune.equiv(a, b, box, exact=True, gap=1e-6, time_limit=60)
    truth = max(high for _, high in exact_ranges_1d(beside(a, b), box)[-1])
    assert result.lower <= truth <= result.upper
    assert result.closed and result.upper <= (1 + 1.1e-6) * result.lower
    exact = difference_at(a, b, result.point)
    assert abs(exact[result.output]) == result.value >= result.lower


@pytest.mark.parametrize("seed", range(1))
def test_exact_by_phases_with_many_inputs(seed):
    rng = np.random.default_rng(seed)
    a, b = random_mlp(rng, [14, 3, 1]), random_mlp(rng, [14, 3, 1])
    box = uniform(-1, 1, (14,))
    result = exactprune.equiv(a, b, box, exact=True, gap=0.05, time_limit=40)
    truth = max(extremum_by_phases(beside(a, b), box, 1, 0, sign) for sign in (1, -1))
    assert result.lower <= truth * (1 + 1e-9) and truth <= result.upper * (1 + 1e-9)
    assert result.ratio <= 1.06 or result.reason
    assert result.suggested is None or result.suggested >= truth * (1 - 1e-5)


@pytest.mark.parametrize("seed", range(16))
def test_branch_and_bound_over_pairs_of_phases_against_enumeration(seed, monkeypatch):
    """One input, so that the truth is known exactly; no splitting of boxes, no neurons decided before: phases alone decide."""
    monkeypatch.setattr("exactprune.equivalence.FEW_INPUTS", -1)
    monkeypatch.setattr("exactprune.equivalence._Run.sharpen", lambda run, seconds: None)
    monkeypatch.setattr("exactprune.deciders.difference_boxes.BoxSplit.run",
                        lambda way: Closed(np.full(len(way.closed), np.inf), way.found, 0, "limit: not today"))
    rng = np.random.default_rng(seed)
    sizes = [1, *rng.integers(2, 7, rng.integers(1, 4)).tolist(), int(rng.integers(1, 3))]
    a = random_mlp(rng, sizes)
    b = changed(rng, a, float(rng.choice([1e-6, 1e-3, 0.1, 1.0])))
    box = Box(np.array([-rng.random()]), np.array([rng.random()]))
    result = exactprune.equiv(a, b, box, exact=True, gap=0.01, time_limit=4)
    truth = max(high for _, high in exact_ranges_1d(beside(a, b), box)[-1])
    assert result.lower <= truth <= result.upper
    assert result.suggested is None or result.suggested >= float(truth) * (1 - 1e-5)
    assert result.closed or (result.lower == 0 and "no difference" in result.reason), result.reason
    assert abs(difference_at(a, b, result.point)[result.output]) == result.value


@pytest.mark.parametrize("inner", [1, pytest.param(2, marks=pytest.mark.slow)])  # 4 s each
@pytest.mark.parametrize("seed", range(3))
def test_pairs_with_many_inputs_against_phases(seed, inner):
    rng = np.random.default_rng(20 + seed)
    a = random_mlp(rng, [14, 3, inner, 1])
    b = changed(rng, a, 0.05)
    box = uniform(-1, 1, (14,))
    result = exactprune.equiv(a, b, box, exact=True, gap=0.01, time_limit=10)
    truth = max(extremum_by_phases(beside(a, b), box, 2, 0, sign) for sign in (1, -1))
    assert result.lower <= truth * (1 + 1e-9) and truth <= result.upper * (1 + 1e-9)
    assert result.closed, result.reason


def test_an_open_gap_says_so():
    network = exactprune.load(MODELS / "digits_2x32.pt")
    other = changed(np.random.default_rng(0), network.astype(np.float64), 0.3)
    result = exactprune.equiv(network, other, exact=True, time_limit=1)
    assert not result.closed and "limit after" in result.reason and result.seconds < 15
    rng = np.random.default_rng(1)
    x = np.concatenate([result.domain.sample(500, rng), result.domain.corners(500, rng)])
    seen = np.abs(network.evaluate(x, np.float64) - other.evaluate(x)).max(axis=0)
    assert (seen <= result.uppers).all()


def test_the_bound_holds_without_exact_and_the_point_is_in_the_box():
    rng = np.random.default_rng(5)
    a, b = random_mlp(rng, [3, 8, 8, 4]), random_mlp(rng, [3, 6, 4])
    box = Box(np.array([-1.0, 0.2, 0.0]), np.array([0.5, 0.2, 2.0]))
    result = exactprune.equiv(a, b, box)
    x = np.concatenate([box.sample(2000, rng), box.corners(100, rng)])
    seen = np.abs(a.evaluate(x) - b.evaluate(x)).max(axis=0)
    assert (seen <= result.uppers).all() and result.uppers.max() == result.upper
    assert box.contains(result.point[None])[0] and box.contains(result.points).all()
    assert (result.lowers >= 0.9 * seen).all()
    for output, lower in enumerate(result.lowers):
        assert abs(difference_at(a, b, result.points[output])[output]) >= Fraction(float(lower))


def test_equal_networks_are_equal():
    a = random_mlp(np.random.default_rng(1), [4, 6, 3]).astype(np.float32)
    result = exactprune.equiv(a, a.astype(np.float64), exact=True)
    assert (result.upper, result.lower, result.closed, result.value) == (0.0, 0.0, True, 0)
    assert result.within(0.0) and result.ratio == 1.0


def test_compressed_networks_are_bounded_within_a_hundred_of_what_is_found():
    network = exactprune.load(MODELS / "digits_2x32.pt")
    verified = exactprune.verify(network, options=exactprune.VerifyOptions(exact=False))
    smaller = exactprune.compress(verified, options=exactprune.CompressOptions("rounding"))
    result = exactprune.equiv(network, smaller.network)
    assert smaller.network.neurons < network.neurons and smaller.level.eps
    assert 0 < result.lower <= smaller.level.eps * (1 + 1e-9)
    assert result.upper <= 100 * result.lower
    exact = exactprune.compress(verified, options=exactprune.CompressOptions("exact"))
    assert exactprune.equiv(network, exact.network).upper <= 1e-8


def test_deciding_the_neurons_of_deep_networks_tightens_the_bound(monkeypatch):
    """Neurons of 5x100 that CROWN leaves open are active; without knowing it the bound is 40 times larger."""
    a = exactprune.load(MODELS / "fashion_5x100.pt")
    b = exactprune.compress(exactprune.verify(a)).network
    told = []

    class Told(Silent):
        def stage(self, name, total=None):
            told.append(name)

    decided = exactprune.equiv(a, b, progress=Told())
    monkeypatch.setattr("exactprune.equivalence._Run.sharpen", lambda run, seconds: None)
    plain = exactprune.equiv(a, b)
    assert 0 < decided.lower <= decided.upper <= 5 * decided.lower and 20 * decided.upper < plain.upper
    assert {"partners", "bounds", "search", "bounds again"} <= set(told)


def test_other_layouts_of_the_same_values_are_compared(here):
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    torch.save(flat, here / "flat.pt")
    torch.save(nn.Sequential(nn.Flatten(), *flat).eval(), here / "image.pt")
    a, b = exactprune.load(here / "flat.pt"), exactprune.load(here / "image.pt", input_shape=(1, 2, 2))
    assert exactprune.equiv(a, b).upper == 0.0
    assert exactprune.equiv(b, a, uniform(0, 1, (1, 2, 2))).point.shape == (1, 2, 2)


def test_a_tolerance_ends_the_exact_stage_early():
    rng = np.random.default_rng(3)
    a, b = random_mlp(rng, [3, 8, 8, 1]), random_mlp(rng, [3, 8, 8, 1])
    free = exactprune.equiv(a, b, exact=True, gap=1e-9, time_limit=3)
    loose = exactprune.equiv(a, b, exact=True, gap=1e-9, tolerance=1.2 * free.upper, time_limit=60)
    assert loose.within(1.2 * free.upper) and loose.seconds < 30
    tight = exactprune.equiv(a, b, exact=True, gap=1e-9, tolerance=0.5 * free.lower, time_limit=60)
    assert tight.lower > 0.5 * free.lower and not tight.within(0.5 * free.lower)


def test_values_beyond_float64_claim_nothing():
    a = mlp([(np.full((2, 2), 1e300), np.zeros(2)), (np.full((1, 2), 1e300), np.zeros(1))])
    b = random_mlp(np.random.default_rng(0), [2, 2, 1])
    result = exactprune.equiv(a, b)
    assert result.upper == np.inf and 0 <= result.lower <= result.value
    assert rounded_down(Fraction(10) ** 400) == np.finfo(float).max and rounded_down(Fraction(1, 3)) <= Fraction(1, 3)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"gap": 0.0}, OptionError, "gap"), ({"gap": float("nan")}, OptionError, "gap"),
    ({"tolerance": -1.0}, OptionError, "tolerance"), ({"time_limit": 0.0}, OptionError, "time-limit"),
    ({"starts": 0}, OptionError, "starts"), ({"domain": uniform(0, 1, (5,))}, DomainError, "5"),
])
def test_misuse(options, error, words):
    a = random_mlp(np.random.default_rng(0), [2, 3, 1])
    with pytest.raises(error, match=words):
        exactprune.equiv(a, a, **options)


def test_networks_of_other_interfaces_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ShapeError, match="inputs"):
        exactprune.equiv(random_mlp(rng, [2, 3, 1]), random_mlp(rng, [3, 3, 1]))
    with pytest.raises(ShapeError, match="outputs"):
        exactprune.equiv(random_mlp(rng, [2, 3, 1]), random_mlp(rng, [2, 3, 2]))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pair(here):
    torch.manual_seed(1)
    a = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    torch.save(a, here / "a.pt")
    with torch.no_grad():
        a[2].bias[1] += 0.25
    torch.save(a, here / "b.pt")
    return here


def test_command_prints_writes_and_returns(pair, capsys):
    assert run(["equiv", "a.pt", "b.pt", "--domain=-1,1", "--json", "--output", "x.npz", "--tolerance", "0.3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["upper"] == pytest.approx(0.25, abs=1e-6) and said["within"] is True
    assert said["outputs"][0]["upper"] < 1e-9 and said["output"] == 1 and len(said["point"]) == 3
    difference = Fraction(int(said["difference"]["numerator"]), int(said["difference"]["denominator"]))
    assert Fraction(said["lower"]) <= difference
    with np.load(pair / "x.npz") as kept:
        assert kept["x"].shape == (3,) and kept["difference"] == said["lower"] and kept["points"].shape == (2, 3)
    a, b = exactprune.load("a.pt"), exactprune.load("b.pt")
    assert abs(difference_at(a, b, said["point"])[1]) == difference
    assert run(["equiv", "a.pt", "b.pt", "--domain=-1,1", "--tolerance", "0.2", "--exact"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    ["a.pt"], ["a.pt", "missing.pt"], ["a.pt", "b.pt", "--gap", "0"], ["a.pt", "b.pt", "--tolerance", "nan"],
    ["a.pt", "b.pt", "--output", "x.txt"], ["a.pt", "b.pt", "--output", "no/x.npz"], ["a.pt", "b.pt", "--domain=1,0"],
    ["a.pt", "b.pt", "--bogus"],
])
def test_command_misuse_is_one_line_and_exit_2(pair, capsys, arguments):
    before = sorted(p.name for p in pair.iterdir())
    assert run(["equiv", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("exactprune: error:")
    assert sorted(p.name for p in pair.iterdir()) == before


def test_the_lower_bound_is_the_joint_networks_own(pair):
    from exactprune.bounds.difference import joint_network

    a, b = exactprune.load("a.pt"), exactprune.load("b.pt")
    result, joint = exactprune.equiv(a, b), joint_network(a, b)
    assert abs(exact_preactivations(joint.network, result.point, joint.last, [result.output])[0]) == result.value
