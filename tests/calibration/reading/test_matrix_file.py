"""Matrix files whose parts do not fit together are refused before compiled code sees them."""

import logging
import zipfile

import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.calibration.reading.matrix_file import read_matrix
from sparsereg.errors import InputError

DENSE = np.array([[1.0, 0, 2, 0], [0, 3, 0, 4]])
FORMATS = {
    "csr": sp.csr_array(DENSE),
    "csc": sp.csc_array(DENSE),
    "coo": sp.coo_array(DENSE),
    "dia": sp.dia_array(DENSE),
    "bsr": sp.bsr_array(DENSE, blocksize=(2, 2)),
}


@pytest.mark.parametrize("dtype", [np.int8, bool, np.float32, np.float64, np.uint64, np.float16])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read(tmp_path, format, compressed, dtype):
    for form in (FORMATS[format], FORMATS[format].tocsr().asformat(format)):
        save = np.savez_compressed if compressed else np.savez
        save(tmp_path / "M.npz", **(parts(form) | {"data": form.data.astype(dtype)}))
        if dtype != np.float16:  # which SciPy's own writer does not know
            sp.save_npz(tmp_path / "N.npz", form.astype(dtype), compressed=compressed)
            assert (read_matrix(tmp_path / "M.npz") != read_matrix(tmp_path / "N.npz")).nnz == 0
        np.testing.assert_array_equal(read_matrix(tmp_path / "M.npz").toarray(), DENSE.astype(dtype))


def parts(matrix):
    matrix = FORMATS[matrix] if isinstance(matrix, str) else matrix
    names = {"coo": ("row", "col"), "dia": ("offsets",)}.get(matrix.format, ("indices", "indptr"))
    return {
        "format": np.array(matrix.format.encode()),
        "shape": np.array(matrix.shape),
        "data": matrix.data,
        **{name: getattr(matrix, name) for name in names},
    }


WRONG = [
    ("csr", {"indices": [0, 4, 1, 3]}, r"indices outside \[0, 4\): 4"),
    ("csr", {"indices": [0, -1, 1, 3]}, r"indices outside \[0, 4\): -1"),
    ("csr", {"indices": np.array([0, 2**63, 1, 3], np.uint64)}, "indices reach 9223372036854775808"),
    ("csr", {"indices": np.array([0, 2**40, 1, 3])}, r"outside \[0, 4\): 1099511627776"),
    ("csr", {"indices": [0.0, 1, 1, 3]}, "indices must be whole numbers, got float64"),
    ("csr", {"indices": [[0, 1, 1, 3]]}, "cannot be read as a sparse matrix"),
    ("csr", {"indptr": [0, 3, 2]}, "cannot be read as a sparse matrix"),
    ("csr", {"indptr": [0, 5, 4]}, "indptr that go back, from 5 to 4"),
    ("csr", {"indptr": [0, -2, 4]}, "indptr that go back"),
    ("csr", {"indptr": [1, 2, 4]}, "cannot be read as a sparse matrix"),
    ("csr", {"indptr": [0, 2, 9]}, "cannot be read as a sparse matrix"),
    ("csr", {"indptr": [0, 4]}, "cannot be read as a sparse matrix"),
    ("csr", {"data": [1.0, 2, 3]}, "cannot be read as a sparse matrix"),
    ("csr", {"data": [1.0, 2, np.nan, 4]}, "nan in row 2, column 2"),
    ("csr", {"data": [1.0, np.inf, 3, 4]}, "inf in row 1, column 3"),
    ("csr", {"data": np.array([1j, 2, 3, 4])}, "its data are complex128"),
    ("csr", {"data": np.array(["a", "b", "c", "d"])}, "its data are <U1"),
    ("csr", {"data": np.array([1, 2, 3, 4], "M8[D]")}, "its data are datetime64"),
    ("csr", {"data": np.array([{}] * 4, dtype=object)}, "the array data holds Python objects"),
    ("csr", {"shape": [2, 2]}, r"indices outside \[0, 2\): 3"),
    ("csr", {"shape": [3, 4]}, "cannot be read as a sparse matrix"),
    ("csr", {"shape": [2, 0]}, "its shape is 2 x 0"),
    ("csr", {"shape": [2, -4]}, "its shape is 2 x -4"),
    ("csr", {"shape": [2, 2**40]}, "its shape is 2 x 1099511627776"),
    ("csr", {"shape": [2, 4, 1]}, "its shape must be two whole numbers"),
    ("csr", {"shape": [2.0, 4.0]}, "its shape must be two whole numbers"),
    ("csr", {"format": np.array(b"lil")}, "its format is 'lil', expected one of csr"),
    ("csr", {"format": np.array(["csr", "csc"])}, "its format is 'None'"),
    ("csr", {"indices": None}, "the array indices is missing"),
    ("csr", {"shape": None}, "the array shape is missing"),
    ("csc", {"indices": [0, 1, 2, 1]}, r"indices outside \[0, 2\): 2"),
    ("csc", {"indptr": [0, 9, 2, 3, 4]}, "indptr that go back"),
    ("coo", {"row": [0, 0, 1, 2]}, "cannot be read as a sparse matrix"),
    ("coo", {"col": [0, 2, -1, 3]}, "cannot be read as a sparse matrix"),
    ("coo", {"row": [0, 0, 1]}, "cannot be read as a sparse matrix"),
    ("dia", {"offsets": [0, 0, 0]}, "cannot be read as a sparse matrix"),
    ("dia", {"offsets": [0, 70]}, "a diagonal outside it: 70"),
    ("dia", {"data": np.ones(4)}, "its data are float64 of shape"),
    ("bsr", {"indices": [0, 2]}, r"indices outside \[0, 2\): 2"),
    ("bsr", {"data": np.ones((2, 2, 3))}, "cannot be read as a sparse matrix"),
    ("bsr", {"data": np.ones((2, 2, 0))}, "its data are float64 of shape"),
]


@pytest.mark.parametrize(("format", "change", "message"), WRONG)
def test_wrong_parts_are_refused(tmp_path, format, change, message):
    arrays = {k: v for k, v in (parts(format) | change).items() if v is not None}
    np.savez(tmp_path / "M.npz", **arrays)
    with pytest.raises(InputError, match=message) as refused:
        read_matrix(tmp_path / "M.npz")
    assert "M.npz" in str(refused.value)
    assert "\n" not in str(refused.value)


def _replace_member(file, name, content):
    with zipfile.ZipFile(file) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for n, old in (members | {name: content}).items():
            archive.writestr(n, old)


def test_sizes_that_are_announced_but_not_there_take_no_memory(tmp_path):
    file = tmp_path / "M.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header = header.ljust(117) + b"\n"
    np.savez(file, **parts("csr"))
    _replace_member(file, "data.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(InputError, match="data announces 8,000,000,000,000 bytes, but 0 follow"):
        read_matrix(file)
    for shape in ([2**31 - 1, 2**31 - 1],):
        np.savez(file, **(parts("coo") | {"shape": np.array(shape)}))
        seen = []
        with pytest.raises(InputError, match="does not fit"):
            read_matrix(file, lambda s: seen.append(s) or _refuse())
        assert seen == [tuple(shape)]


def _refuse():
    raise InputError("does not fit")


def test_a_flipped_bit_is_refused(tmp_path):
    file = tmp_path / "M.npz"
    sp.save_npz(file, sp.random_array((20, 50), density=0.3, rng=np.random.default_rng(0)), compressed=False)
    whole = file.read_bytes()
    at = whole.index(b"data.npy") + 300
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match="Bad CRC-32"):
        read_matrix(file)


@pytest.mark.parametrize("format", ["csr", "coo"])
def test_entries_given_twice_are_added_up_and_told(tmp_path, caplog, format):
    rows, columns, data = [0, 0, 0, 1], [2, 2, 2, 0], np.array([1e9, 1, -1e9, 5], np.float32)
    arrays = {"format": np.array(format.encode()), "shape": np.array([2, 3]), "data": data}
    if format == "coo":
        arrays |= {"row": np.array(rows), "col": np.array(columns)}
    else:
        arrays |= {"indices": np.array(columns), "indptr": np.array([0, 3, 4])}
    np.savez(tmp_path / "M.npz", **arrays)
    with caplog.at_level(logging.WARNING):
        matrix = read_matrix(tmp_path / "M.npz")
    assert "2 entries are there more than once: they are added up" in caplog.text
    from sparsereg.calibration.problem import CalibrationProblem

    assert CalibrationProblem(matrix, [1, 1]).matrix.toarray().tolist() == [[0, 0, 1], [5, 0, 0]]
