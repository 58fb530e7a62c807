from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from exactprune.cli.arrays import read_npy, read_npz, read_samples
from exactprune.errors import DomainError, LoadError


class Boom:
    """Pickles to a call; unpickling it fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_arrays_come_back_as_float64(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    np.savez_compressed(tmp_path / "x.npz", lower=x, upper=x + 1)
    assert read_npy(tmp_path / "x.npy", "--center").dtype == np.float64
    lower, upper = read_npz(tmp_path / "x.npz", ("lower", "upper"), "--domain-box")
    assert np.array_equal(lower, x) and np.array_equal(upper, x + 1)


@pytest.mark.parametrize("names", [("x", "y"), ("data", "labels"), ("anything",)])
def test_samples_are_found_and_laid_out(tmp_path, names):
    np.savez(tmp_path / "d.npz", **{n: np.zeros((5, 6)) for n in names})
    assert read_samples(tmp_path / "d.npz", (2, 3), "--data").shape == (5, 2, 3)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "not a .npz file"), (b"PK\x03\x04junk", "not a .npz file"), (b"text", "not a .npz file")])
def test_what_is_no_npz_is_refused(tmp_path, content, words):
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(LoadError, match=words):
        read_npz(tmp_path / "b.npz", ("lower",), "--domain-box")


def test_missing_file_and_missing_array(tmp_path):
    with pytest.raises(LoadError, match="no such file"):
        read_npz(tmp_path / "b.npz", ("lower",), "--domain-box")
    np.savez(tmp_path / "b.npz", low=np.zeros(3))
    with pytest.raises(LoadError, match="has no array 'lower', only low"):
        read_npz(tmp_path / "b.npz", ("lower",), "--domain-box")


def test_pickled_objects_are_refused_unopened(tmp_path):
    np.save(tmp_path / "c.npy", np.array([Boom()], dtype=object), allow_pickle=True)
    with pytest.raises(LoadError, match="Object arrays"):
        read_npy(tmp_path / "c.npy", "--center")


def test_complex_numbers_and_text_are_refused(tmp_path):
    for array in (np.zeros(3, complex), np.array(["a"])):
        np.save(tmp_path / "c.npy", array)
        with pytest.raises(LoadError, match="give real numbers"):
            read_npy(tmp_path / "c.npy", "--center")


def test_a_deflated_bomb_is_refused_without_unpacking(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lower.npy", header.getvalue() + bytes(2**20))
    with pytest.raises(LoadError, match="not a readable"):
        read_npz(tmp_path / "b.npz", ("lower",), "--domain-box")


def test_truncated_array_is_refused(tmp_path):
    np.save(tmp_path / "c.npy", np.zeros(100))
    (tmp_path / "c.npy").write_bytes((tmp_path / "c.npy").read_bytes()[:-8])
    with pytest.raises(LoadError, match="not a readable"):
        read_npy(tmp_path / "c.npy", "--center")


def test_samples_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((5, 7)))
    with pytest.raises(DomainError, match=r"shape \(5, 7\); give \(samples, 2, 3\)"):
        read_samples(tmp_path / "d.npy", (2, 3), "--data")
    np.savez(tmp_path / "d.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(LoadError, match="name the samples x"):
        read_samples(tmp_path / "d.npz", (2, 3), "--data")
