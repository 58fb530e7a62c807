from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from exactprune.claim import Status
from exactprune.errors import CertificateError
from exactprune.io import load, save
from exactprune.report.neurons import COLUMNS, neurons_csv, place, read_neurons
from exactprune.report.record import certificate_bytes, read_run, write_run
from exactprune.report.strict import jsonable, pretty

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "run.schema.json").read_text())


def refuse(name):
    raise ValueError(f"{name} is not JSON")


def test_run_json_is_strict_and_follows_its_schema(verification, tmp_path):
    model = tmp_path / "tiny.onnx"
    model.write_bytes(b"bytes")
    summary = write_run(verification, tmp_path / "run", model=model)
    read = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=refuse)
    assert read == summary
    jsonschema.validate(read, SCHEMA)
    assert read["stages"][2]["seconds"] == "nan"
    assert read["totals"] == {"neurons": 11, "inactive": 3, "active": 3, "unstable": 4, "unknown": 1}
    assert read["layers"][0]["methods"] == {"interval": 2, "crown": 1, "alpha-crown": 1, "corner": 1, "sample": 2}
    for key in ("neurons", "inactive", "active", "unstable", "unknown"):
        assert sum(layer[key] for layer in read["layers"]) == read["totals"][key]
    assert read["model"]["file_sha256"] == "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"


def test_schema_refuses_a_missing_field(verification, tmp_path):
    summary = write_run(verification, tmp_path / "run")
    del summary["totals"]["unknown"]
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        jsonschema.validate(summary, SCHEMA)


def test_neurons_csv_has_exactly_the_columns_and_places(verification):
    rows = list(csv.reader(io.StringIO(neurons_csv(verification.layers))))
    assert ",".join(rows[0]) == "layer,node,index,channel,row,col,status,method,lower,upper,reason"
    assert rows[4] == ["0", "relu1", "3", "0", "1", "1", "active", "alpha-crown", "0.30000000000000004", "1.0", ""]
    assert rows[8][:8] == ["0", "relu1", "7", "1", "1", "1", "unknown", ""]
    assert rows[8][8:] == ["-5e-324", "1e+300", 'time limit, "best" bound 3']
    assert rows[9][:7] == ["1", "relu2", "0", "0", "", "", "inactive"]
    assert len(rows) == 12


def test_place_is_the_inverse_of_c_order():
    shape = (3, 4, 5)
    for index in range(60):
        assert np.ravel_multi_index(place(index, shape), shape) == index
    assert place(7, (2, 2, 2, 2)) == (0, 1, 3) and place(5, (2, 3)) == (1, 2, "") and place(5, (9,)) == (5, "", "")


def test_neurons_round_trip_keeps_every_bit(verification):
    layers = read_neurons(neurons_csv(verification.layers), [la.shape for la in verification.layers])
    for given, read in zip(verification.layers, layers, strict=True):
        for name in ("layer", "node", "shape", "reasons"):
            assert getattr(read, name) == getattr(given, name)
        for name in ("status", "method", "lower", "upper"):
            assert getattr(read, name).tobytes() == getattr(given, name).tobytes()


def test_read_run_gives_back_what_was_written(verification, tmp_path):
    summary = write_run(verification, tmp_path / "run")
    record = read_run(tmp_path / "run")
    assert record.summary == summary
    assert record.domain.sha256 == verification.domain.sha256
    assert [la.count(Status.UNSTABLE) for la in record.layers] == [3, 1]


def test_equal_runs_give_equal_bytes_and_no_temporary_files(verification, tmp_path):
    for name in ("a", "b"):
        write_run(verification, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["certificates.jsonl.gz", "domain.npz", "network.npz", "neurons.csv", "report.md", "run.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_certificate_has_no_time_and_one_record_a_line(verification):
    data = certificate_bytes(verification.records)
    assert data[4:8] == b"\0\0\0\0"
    lines = gzip.decompress(data).decode().splitlines()
    assert [json.loads(line) for line in lines] == list(verification.records)
    with pytest.raises(ValueError, match="JSON"):
        certificate_bytes([{"record": "header", "value": float("nan")}])


def test_network_npz_only_where_the_checker_cannot_read_the_model(verification, tmp_path):
    model = tmp_path / "m.onnx"
    save(verification.network, model)
    write_run(verification, tmp_path / "run", model=model)
    assert not (tmp_path / "run" / "network.npz").exists()
    write_run(verification, tmp_path / "run", model=model, keep_network=True)
    assert (tmp_path / "run" / "network.npz").exists()
    write_run(verification, tmp_path / "run", model=model)
    assert not (tmp_path / "run" / "network.npz").exists()


def test_network_npz_is_the_network(verification, tmp_path):
    write_run(verification, tmp_path / "run")
    assert load(tmp_path / "run" / "network.npz").sha256 == verification.network.sha256


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "run.json").unlink(), "no readable run.json"),
    (lambda f: (f / "run.json").write_text("{"), "no readable run.json"),
    (lambda f: (f / "run.json").write_text('{"schema": "other/1"}'), "schema is not exactprune-run/1"),
    (lambda f: (f / "neurons.csv").unlink(), "not a whole run folder"),
    (lambda f: (f / "neurons.csv").write_text("layer\n"), "columns are not"),
    (lambda f: (f / "neurons.csv").write_text(",".join(COLUMNS) + "\n"), "has 0 neurons, run.json says 11"),
    (lambda f: (f / "neurons.csv").write_text((f / "neurons.csv").read_text().replace("inactive", "dead")), "'dead'"),
    (lambda f: np.savez(f / "domain.npz", lower=np.zeros((1, 3, 3)), upper=np.full((1, 3, 3), 2.0)), "not the domain"),
])
def test_damaged_run_folders_are_refused(verification, tmp_path, damage, words):
    write_run(verification, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(CertificateError, match=words):
        read_run(tmp_path / "run")


def test_a_failed_write_leaves_no_finished_run(verification, tmp_path, monkeypatch):
    write_run(verification, tmp_path / "run")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("exactprune.report.record.write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run(verification, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_jsonable_makes_plain_strict_values():
    value = {"a": np.float32(0.5), "b": (np.arange(2), float("-inf")), "c": Path("x"), 3: None, "d": True}
    assert jsonable(value) == {"a": 0.5, "b": [[0, 1], "-inf"], "c": "x", "3": None, "d": True}
    assert json.loads(pretty({"x": float("nan")}), parse_constant=refuse) == {"x": "nan"}
