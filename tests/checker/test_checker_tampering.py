"""A valid certificate is accepted; changing it, the model or the domain is rejected, without a traceback."""

from __future__ import annotations

import base64
import copy
import gzip
import json

import numpy as np
import prover
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactprune import ops
from exactprune.checker import check, check_run
from exactprune.io.npz import save_npz
from exactprune.network import Node, build


def make_network(nudge=0.0, seed=15):
    rng = np.random.default_rng(seed)
    nodes = []
    for n_in, n_out in ((3, 6), (6, 6)):
        bias = rng.standard_normal(n_out)
        bias[:2] = (-1.5, 1.5)
        nodes.append(Node("a", ops.Affine(rng.standard_normal((n_out, n_in)) * 0.7 + nudge, bias), (len(nodes) - 1,)))
        nodes.append(Node("r", ops.ReLU(), (len(nodes) - 1,)))
    return build(nodes, (3,), np.float32)


def prove(network, lower, upper):
    """A certificate with every kind of record, and what it proves: lines, [(inactive, active, unstable)] a layer."""
    rng = np.random.default_rng(0)
    points = np.clip(rng.random((200, 3)), lower, upper)
    values = network.evaluate_nodes(points, np.float64)
    bounds = prover.fresh_bounds(network, lower, upper)
    lines = [prover.header(network, lower, upper), {"record": "points", "values": prover.pack(points, "<f8")}]
    for k, i in enumerate(network.relus):
        z = values[network.nodes[i].inputs[0]]
        bounds.reach(k)
        every = np.arange(z.shape[1])
        seen = np.flatnonzero((z.max(axis=0) > 1e-9) & (z.min(axis=0) < -1e-9))
        if k:
            lines.append(prover.crown(k, every))
            zeros = [prover.given(0, [0, 2], [8] * len(every), np.zeros((len(every), 2)))]
            lines.append({"record": "linear", "layer": k, "neurons": every.tolist(), "side": "upper",
                          "multipliers": zeros})
            for sign, side in ((1, "upper"), (-1, "lower")):
                bounds.narrow(k, every, side, bounds.decide(k, every, np.full(len(every), sign), bounds.domain(k)))
        proved = {"upper": set(np.flatnonzero(bounds.upper[k] <= 0)),
                  "lower": set(np.flatnonzero(bounds.lower[k] >= 0))}
        for n in sorted(set(every) - set(seen) - proved["upper"] - proved["lower"]):
            side = "upper" if z[:, n].max() <= 0 else "lower"
            lines += [prover.optimal_tree(network, bounds, n, side), prover.grow_boxes(bounds, k, [(int(n), side)],
                                                                                       depth=12)]
            assert len(lines[-2]["leaves"]) > 1
            proved[side].add(n)
        lines.append({"record": "unstable", "layer": k, "neurons": seen.tolist(),
                      "positive": z.argmax(axis=0)[seen].tolist(),
                      "negative": z.argmin(axis=0)[seen].tolist()})
        lines.append(prover.verdicts(k, len(every), proved["upper"], proved["lower"] - proved["upper"], seen))
    return lines


NETWORK = make_network()
LOWER, UPPER = np.zeros(3), np.ones(3)
LINES = prove(NETWORK, LOWER, UPPER)


def find(lines, kind, number=0):
    return [r for r in lines if r["record"] == kind][number]


def rejected(lines, network=NETWORK, lower=LOWER, upper=UPPER):
    report = check(network, lower, upper, json.loads(json.dumps(lines)))
    return not report.accepted


def test_the_certificate_is_accepted_and_complete():
    report = check(NETWORK, LOWER, UPPER, json.loads(json.dumps(LINES)))
    assert report.accepted, (report.error, report.rejected)
    kinds = {r["record"] for r in LINES}
    assert kinds == {"header", "crown", "linear", "tree", "boxes", "points", "unstable", "verdicts"}
    counts = report.counts
    assert counts["neurons"] == 12 == counts["inactive"] + counts["active"] + counts["unstable"]
    assert min(counts["inactive"], counts["active"], counts["unstable"]) > 0
    assert sum(len(r.accepted) for r in report.layers) == 12
    assert report.seconds > 0
    json.dumps(report.as_dict())


def test_trees_and_boxes_are_needed():
    """Without its tree and boxes a neuron that only they prove is rejected; with one of the two it is accepted."""
    only = [r for r in LINES if r["record"] not in ("tree", "boxes")]
    assert rejected(only)
    assert not rejected([r for r in LINES if r["record"] != "tree"])
    assert not rejected([r for r in LINES if r["record"] != "boxes"])


def without_boxes():
    return copy.deepcopy([r for r in LINES if r["record"] != "boxes"])


def flip(lines):
    """Other phases: the two subtrees of the root's multipliers change places."""
    tree = find(lines, "tree")
    tree["leaves"] = tree["leaves"][::-1]


def drop_leaf(lines):
    find(lines, "tree")["leaves"].pop()


def drop_split(lines):
    find(lines, "tree")["splits"].pop()


def cut_subtree(lines):
    """A split with only one of its halves: the tree is not full."""
    tree = find(lines, "tree")
    at = tree["splits"].index(None)
    del tree["splits"][at], tree["leaves"][0]


def other_neuron(lines):
    tree = find(lines, "tree")
    tree["neuron"] = (tree["neuron"] + 1) % 6


def other_side(lines):
    tree = find(lines, "tree")
    tree["side"] = "lower" if tree["side"] == "upper" else "upper"


def no_multipliers(lines):
    tree = find(lines, "tree")
    tree["splits"], tree["leaves"] = [None], [[]]


def split_on_itself(lines):
    tree = find(lines, "tree")
    tree["splits"] = [[1, tree["neuron"]], None, None]
    tree["leaves"] = [[], []]


def nan_point(lines):
    find(lines, "points")["values"] = prover.pack([[np.nan, 0.5, 0.5]] * 200, "<f8")


def point_outside(lines):
    values = np.full((200, 3), 0.5)
    values[7, 1] = np.nextafter(1.0, 2.0)
    find(lines, "points")["values"] = prover.pack(values, "<f8")


def same_points(lines):
    record = find(lines, "unstable")
    record["negative"] = record["positive"]


def point_number(lines):
    find(lines, "unstable")["positive"][0] = 200


def verdict_twice(lines):
    lines.append(find(lines, "verdicts"))


def verdict_missing(lines):
    lines.remove(find(lines, "verdicts", 1))


def neuron_twice(lines):
    record = find(lines, "verdicts")
    record["unknown"] = [record["unstable"][0]]


def neuron_missing(lines):
    find(lines, "verdicts")["unstable"].pop()


def unstable_as_inactive(lines):
    record = find(lines, "verdicts", 1)
    record["inactive"].append(record["unstable"].pop())


def stable_as_unstable(lines):
    record = find(lines, "verdicts")
    record["unstable"].append(record["inactive"].pop())


def verdict_before_proof(lines):
    verdict = find(lines, "verdicts", 1)
    lines.remove(verdict)
    lines.insert(2, verdict)


def header_twice(lines):
    lines.insert(1, lines[0])


def header_last(lines):
    lines.append(lines.pop(0))


def no_header(lines):
    lines.pop(0)


def unknown_record(lines):
    lines.insert(1, {"record": "lemma"})


def unknown_field(lines):
    find(lines, "crown")["slack"] = 1e-6


def other_format(lines):
    lines[0]["format"] = "exactprune-certificate/2"


def later_layer(lines):
    find(lines, "linear")["multipliers"][0]["layer"] = 1


def wrong_size(lines):
    find(lines, "linear")["multipliers"][0]["values"]["shape"] = [12, 1]


def short_data(lines):
    find(lines, "linear")["multipliers"][0]["values"]["data"] = "AAAA"


def no_base64(lines):
    find(lines, "linear")["multipliers"][0]["values"]["data"] = "%%%"


def wrong_dtype(lines):
    find(lines, "linear")["multipliers"][0]["values"]["dtype"] = "|O"


def huge_shift(lines):
    find(lines, "linear")["multipliers"][0]["shift"][0] = -(10**9)


def boolean_index(lines):
    find(lines, "crown")["neurons"][1] = True


def negative_index(lines):
    find(lines, "crown")["neurons"][1] = -1


def a_list(lines):
    lines.insert(1, [1, 2])


def a_float_layer(lines):
    find(lines, "crown")["layer"] = 1.0


CHANGES = [flip, drop_leaf, drop_split, cut_subtree, other_neuron, other_side, no_multipliers, split_on_itself,
           nan_point,
           point_outside, same_points, point_number, verdict_twice, verdict_missing, neuron_twice, neuron_missing,
           unstable_as_inactive, stable_as_unstable, verdict_before_proof, header_twice, header_last, no_header,
           unknown_record,
           unknown_field, other_format, later_layer, wrong_size, short_data, no_base64, wrong_dtype, huge_shift,
           boolean_index,
           negative_index, a_list, a_float_layer]


UNPROVED = [flip, other_neuron, other_side, no_multipliers, same_points, unstable_as_inactive, stable_as_unstable,
            verdict_before_proof]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_are_rejected(change):
    lines = without_boxes()
    assert not rejected(lines)
    change(lines)
    report = check(NETWORK, LOWER, UPPER, json.loads(json.dumps(lines)))
    assert not report.accepted
    assert bool(report.rejected) == (change in UNPROVED), "a wrong proof rejects a verdict, a malformed one everything"
    assert bool(report.error) == (change not in UNPROVED)


def test_changed_boxes_are_rejected():
    valid = copy.deepcopy([r for r in LINES if r["record"] != "tree"])
    assert not rejected(valid)
    record = find(valid, "boxes")
    dims = np.frombuffer(base64.b64decode(record["dims"]["data"]), "<i4").copy()
    at = np.frombuffer(base64.b64decode(record["at"]["data"]), "<f8").copy()
    assert len(dims) > 1

    def with_record(**fields):
        return [r if r is not record else {**record, **fields} for r in valid]

    claims = record["claims"]
    outside, edge, nothing = at.copy(), at.copy(), dims.copy()
    outside[0], edge[0], nothing[0] = 2.0, 0.0, -1
    root = [{**claims[0], "node": 0}]
    for lines in (with_record(claims=claims[1:]), with_record(claims=root), with_record(at=prover.pack(outside, "<f8")),
                  with_record(at=prover.pack(edge, "<f8")), with_record(dims=prover.pack(nothing, "<i4")),
                  with_record(dims=prover.pack(dims[:-1], "<i4"), at=prover.pack(at[:-1], "<f8")),
                  with_record(dims=prover.pack(np.append(dims, -1), "<i4"), at=prover.pack(np.append(at, 0.0), "<f8")),
                  with_record(claims=[{**c, "upper": c["lower"], "lower": c["upper"]} for c in claims]),
                  with_record(at=prover.pack(np.full_like(at, np.nan), "<f8"))):
        assert rejected(lines)


def test_another_network_or_domain_is_rejected():
    assert rejected(LINES, network=make_network(1e-7))
    assert rejected(LINES, upper=np.array([1.0, 1.0, np.nextafter(1.0, 2.0)]))
    assert rejected(LINES, lower=np.array([0.0, -0.0, -1e-9]))
    forged = copy.deepcopy(LINES)
    wider = UPPER * 3
    forged[0] = prover.header(NETWORK, LOWER, wider)
    assert rejected(forged, upper=wider), "a certificate does not hold on a larger box, whatever its header says"
    forged[0] = prover.header(make_network(0.2), LOWER, UPPER)
    assert rejected(forged, network=make_network(0.2)), "nor for other weights"
    assert rejected(LINES, upper=np.array([1.0, np.nan, 1.0]))
    assert rejected(LINES, lower=UPPER, upper=LOWER)
    assert rejected(LINES, lower=np.zeros((3, 1)), upper=np.ones((3, 1)))


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_never_raises(tmp_path_factory, place, byte):
    run = tmp_path_factory.mktemp("run")
    write_run(run)
    data = bytearray((run / "certificates.jsonl.gz").read_bytes())
    data[place % len(data)] = byte
    (run / "certificates.jsonl.gz").write_bytes(bytes(data))
    report = check_run(run / "network.npz", run, exact=True)
    assert isinstance(report.accepted, bool)
    text = b"\n".join(json.dumps(r).encode() for r in LINES) + b"\n"
    changed = bytearray(text)
    changed[place % len(changed)] = byte
    (run / "certificates.jsonl.gz").write_bytes(gzip.compress(bytes(changed), 1))
    assert isinstance(check_run(run / "network.npz", run).accepted, bool)


def write_run(run, lines=LINES):
    save_npz(NETWORK, run / "network.npz")
    np.savez(run / "domain.npz", lower=LOWER, upper=UPPER)
    with gzip.open(run / "certificates.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in lines)


def test_truncated_files_are_rejected(tmp_path):
    write_run(tmp_path)
    model = tmp_path / "network.npz"
    assert check_run(model, tmp_path).accepted
    certificate = tmp_path / "certificates.jsonl.gz"
    whole = certificate.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        certificate.write_bytes(whole[:size])
        assert check_run(model, tmp_path).error
    for count in range(len(LINES)):
        write_run(tmp_path, LINES[:count])
        assert check_run(model, tmp_path).error, "cut between lines, but not complete"
    certificate.unlink()
    assert "certificates.jsonl.gz" in check_run(model, tmp_path).error
    write_run(tmp_path)
    (tmp_path / "domain.npz").write_bytes(b"PK")
    assert "domain.npz" in check_run(model, tmp_path).error
    assert check_run(tmp_path / "absent.onnx", tmp_path).error


def test_command_line(tmp_path, capsys):
    from exactprune.checker.__main__ import main

    write_run(tmp_path)
    model = str(tmp_path / "network.npz")
    assert main([model, str(tmp_path), "--exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accepted"] is True
    lines = without_boxes()
    unstable_as_inactive(lines)
    write_run(tmp_path, lines)
    assert main([model, str(tmp_path)]) == 1
    assert "layer 1, neuron" in capsys.readouterr().out
    for wrong in ([str(tmp_path / "none.pt"), str(tmp_path)], [model, str(tmp_path / "none")], [model], []):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
