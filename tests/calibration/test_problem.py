import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from sparsereg.calibration.problem import CalibrationProblem


def dense(rows=4, columns=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.5)


FORMS = [
    np.asarray,
    pd.DataFrame,
    torch.tensor,
    lambda a: torch.tensor(a).to_sparse(),
    lambda a: torch.tensor(a).to_sparse_csr(),
    lambda a: torch.tensor(a).to_sparse_csc(),
    sp.csr_array,
    sp.csc_matrix,
    sp.coo_array,
    sp.lil_array,
    sp.dok_array,
    sp.dia_array,
    sp.csr_matrix,
    lambda a: sp.bsr_array(a, blocksize=(2, 7)),
]


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|invariant):UserWarning")
@pytest.mark.parametrize("exponent", [0, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_matrix_becomes_the_same_canonical_csr(form, exponent):
    a = dense().round(exponent)  # whole numbers fit float32, others do not
    problem = CalibrationProblem(form(a), np.ones(4))
    m = problem.matrix
    assert isinstance(m, sp.csr_array)
    assert m.dtype == (np.float64 if exponent else np.float32)
    assert m.indices.dtype == np.int32
    np.testing.assert_array_equal(m.toarray(), a)
    assert m.has_canonical_format
    assert (m.data != 0).all()
    np.testing.assert_array_equal(problem.matrix_t.toarray(), a.T)
    assert problem.matrix_t.indices.dtype == np.int32
    assert problem.matrix_t is problem.matrix_t


def test_duplicates_and_explicit_zeros_are_cleaned_without_touching_the_input():
    data, _rows, columns = np.array([1.0, 2.0, 0.0, -3.0, 3.0]), [0, 0, 1, 1, 1], [2, 2, 0, 1, 1]
    messy = sp.csr_array((data, columns, [0, 2, 5]), shape=(2, 3))
    before = messy.data.copy()
    problem = CalibrationProblem(messy, [1.0, 2.0])
    assert problem.matrix.nnz == 1
    assert problem.matrix[0, 2] == 3.0
    np.testing.assert_array_equal(messy.data, before)
    assert messy.nnz == 5


def test_totals_of_values_as_read_lose_no_digits():
    entries = (np.array([1e9, 1, -1e9], np.float32), ([0, 0, 0], [0, 0, 0]))
    assert CalibrationProblem(sp.coo_array(entries, shape=(1, 2)), [1]).matrix.toarray().tolist() == [[1, 0]]
    cents = np.round(np.random.default_rng(0).lognormal(10, 2, 500), 2)
    problem = CalibrationProblem(np.vstack([cents, -cents * 1e6, np.full(500, 2.0)]), np.ones(3))
    weights = np.random.default_rng(1).random(500)
    exact = [math.fsum(cents * weights), math.fsum(-cents * 1e6 * weights), math.fsum(2 * weights)]
    np.testing.assert_allclose(problem.estimates(weights), exact, rtol=1e-15)
    assert problem.matrix.dtype == problem.subset([1]).matrix.dtype == np.float64
    assert problem.subset([2]).matrix.dtype == np.float32


def _csr(data=(1.0, 2.0, 3.0), indices=(0, 2, 1), indptr=(0, 2, 3), shape=(2, 3)):
    """A matrix whose parts nobody has checked, as a program may make it."""
    matrix = sp.csr_array(([1.0, 2.0, 3.0], [0, 2, 1], [0, 2, 3]), shape=(2, 3))
    matrix.data, matrix.indices, matrix.indptr = (np.array(part) for part in (data, indices, indptr))
    matrix._shape = shape
    return matrix


def _coo(rows, columns):
    matrix = sp.coo_array(([1.0, 2.0], ([0, 1], [0, 1])), shape=(2, 3))
    matrix.coords = (np.array(rows), np.array(columns))
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (_csr(indices=(0, 3, 1)), r"indices outside \[0, 3\): 3"),
        (_csr(indices=(0, -1, 1)), r"indices outside \[0, 3\): -1"),
        (_csr(indices=np.array([0, 2**63 + 5, 1], np.uint64)), r"outside \[0, 3\): 9223372036854775813"),
        (_csr(indices=(0.0, 2.0, 1.0)), "whole indices, got float64"),
        (_csr(indptr=(0, 4, 3)), "indptr that go back, from 4 to 3"),
        (_csr(indptr=(0, 2, 9)), "indptr up to 9, but 3 entries"),
        (_csr(indptr=(1, 2, 3)), "begin at 1"),
        (_csr(indptr=(0, 3)), "needs 3 whole indptr"),
        (_csr(indices=(0, 2)), "indptr up to 3, but 2 entries"),
        (_coo([0, 2], [0, 1]), r"row indices outside \[0, 2\): 2"),
        (_coo([0, 1], [0, -1]), r"column indices outside \[0, 3\): -1"),
        (sp.dia_array(([[1.0, 1, 1]], [5]), shape=(2, 3)), "a diagonal outside it: 5"),
        (np.ma.masked_invalid([[1.0, np.nan]]), "no masked entries"),
        (np.array([[1, "a"]], dtype=object), "real numbers, got object"),
        (np.array([["2020-01-01"]], dtype="datetime64[D]"), "real numbers, got datetime64"),
        (torch.ones(3), r"got shape \(3,\)"),
        (torch.ones(2, 2, dtype=torch.complex64), "real numbers, got complex64"),
    ],
)
def test_matrices_with_wrong_parts_are_refused_before_use(matrix, message):
    with pytest.raises(ValueError, match=message):
        CalibrationProblem(matrix, np.ones(matrix.shape[0]))


def test_room_behind_the_last_entry_is_not_read():
    matrix = _csr(data=(1.0, 2.0, 3.0, np.nan), indices=(0, 2, 1, 99))
    assert CalibrationProblem(matrix, [1, 1]).matrix.toarray().tolist() == [[1, 0, 2], [0, 3, 0]]


def test_defaults_are_filled_and_estimates_are_float64():
    a = dense()
    problem = CalibrationProblem(a, np.ones(4))
    assert problem.num_targets == 4
    assert problem.num_households == 7
    np.testing.assert_array_equal(problem.initial_weights, np.ones(7))
    assert problem.target_names == ("target_0", "target_1", "target_2", "target_3")
    np.testing.assert_array_equal(problem.ids, np.arange(7))
    w = np.random.default_rng(1).random(7)
    np.testing.assert_allclose(problem.estimates(w), a @ w, rtol=1e-15)
    with pytest.raises(ValueError, match=r"weights must have shape \(7,\)"):
        problem.estimates(np.ones(3))


def test_subset_keeps_rows_and_cuts_nesting():
    a = dense()
    problem = CalibrationProblem(
        a, np.arange(4.0), parent=np.array([-1, 0, 1, 0]), target_groups=list("abca")
    )
    part = problem.subset(np.array([0, 2, 3]))
    np.testing.assert_array_equal(part.targets, [0, 2, 3])
    np.testing.assert_array_equal(part.parent, [-1, -1, 0])
    assert part.target_names == ("target_0", "target_2", "target_3")
    masked = problem.subset(np.array([True, False, True, True]))
    np.testing.assert_array_equal(masked.matrix.toarray(), part.matrix.toarray())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.ones(5)}, r"targets must have shape \(4,\)"),
        ({"targets": [1, 2, np.nan, 4]}, "targets must be finite, got nan at position 2"),
        ({"targets": [1, 2, -1e308, 4]}, "targets must be at most 1e.100 in size, got -1e.308 at position 2"),
        ({"targets": ["a", 1, 2, 3]}, "targets must be numbers"),
        ({"matrix": np.ones(4)}, "matrix must be targets x households"),
        ({"matrix": np.ones((0, 4))}, "matrix must be targets x households"),
        ({"matrix": np.array([["a"]])}, "matrix must hold real numbers"),
        (
            {"matrix": np.where(np.eye(4, 7) > 0, np.inf, 0)},
            "matrix must be finite in float32: inf in row 0, column 0",
        ),
        ({"matrix": np.where(np.eye(4, 7) > 0, 1e39, 0)}, "matrix must be finite in float32"),
        ({"initial_weights": np.ones(4)}, r"initial_weights must have shape \(7,\)"),
        (
            {"initial_weights": [1, 1, np.inf, 1, 1, 1, 1]},
            "initial_weights must be finite, got inf at position 2",
        ),
        ({"initial_weights": [1, 1, 1, -2, 1, 1, 1]}, "initial_weights must be >= 0, got -2 at position 3"),
        ({"initial_weights": np.zeros(7)}, "initial_weights must not all be zero"),
        ({"target_names": ["a", "b", "a", "c"]}, "target_names must be unique: a is at positions 0 and 2"),
        ({"target_names": ["a"]}, "target_names must have shape"),
        ({"ids": [1, 2, 3, 4, 5, 6, 6]}, "ids must be unique: 6 is at positions 5 and 6"),
        ({"target_groups": ["a", None, "b", "c"]}, "target_groups must not be missing"),
        ({"target_weights": [1, 1, 1, -1]}, "target_weights must be >= 0"),
        ({"target_weights": np.zeros(4)}, "target_weights must not all be zero"),
        ({"parent": [0.5, 0, 0, 0]}, "parent must be 4 whole numbers"),
        ({"parent": [4, -1, -1, -1]}, r"parent must lie in \[-1, 4\)"),
        ({"parent": [1, 2, 0, -1]}, "parent must have no cycle"),
        ({"parent": [0, -1, -1, -1]}, "parent must have no cycle"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        CalibrationProblem(**({"matrix": np.eye(4, 7), "targets": np.ones(4)} | change))


@pytest.mark.parametrize("entries_at_once", [1, 7, 50, 10**6])
def test_totals_in_parts_are_the_totals(entries_at_once):
    from sparsereg.calibration.problem import exact_totals

    matrix = sp.random_array((40, 60), density=0.3, format="csr", dtype=np.float32, rng=0)
    matrix = sp.csr_array(matrix.tolil())
    weights = np.random.default_rng(1).random(60)
    expected = matrix.toarray().astype(np.float64) @ weights
    assert np.allclose(exact_totals(matrix, weights, entries_at_once), expected, rtol=1e-14, atol=0)
    empty = sp.csr_array((3, 60), dtype=np.float32)
    assert exact_totals(empty, weights).tolist() == [0, 0, 0]


def test_totals_are_summed_from_the_values_as_given():
    problem = CalibrationProblem(np.array([[1e9 + 1, -1e9, 0.1]]), [1.0])
    assert problem.estimates(np.array([1.0, 1.0, 0.0])) == [1.0]
    assert problem.estimates(np.array([0.0, 0.0, 1.0])) == [0.1]


def test_the_scale_is_the_largest_of_target_own_and_a_thousandth_of_the_gross():
    rows = np.array([[1.0, -1.0], [1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    problem = CalibrationProblem(rows, [0.0, -50.0, 0.0, 0.0], [300.0, 700.0], target_scales=[0.0, 0, 20, 0])
    np.testing.assert_allclose(problem.scale, [1.0, 50.0, 20.0, 1.0])
    np.testing.assert_allclose(problem.scaled_errors(np.array([3.0, -40.0, -10.0, 0.0])), [3, 0.2, -0.5, 0])
    part = problem.subset([2, 1])
    np.testing.assert_allclose(part.scale, [20.0, 50.0])


def test_a_ratio_is_judged_by_its_own_size():
    problem = CalibrationProblem(
        np.array([[1.0, 0.0, 3.0]]), [0.5], [10.0, 20.0, 30.0], denominators=np.array([[1.0, 1.0, 2.0]])
    )
    np.testing.assert_allclose(problem.estimates([1.0, 1.0, 1.0]), [1.0])
    assert problem.scale == pytest.approx([0.5])
    linear = problem.linear
    np.testing.assert_allclose(linear.matrix.toarray(), [[0.5, -0.5, 2.0]])
    assert linear.targets == [0]
    assert linear.scale == pytest.approx([0.5 * 90])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_scales": [-1.0, 1]}, "target_scales must be >= 0"),
        ({"target_tolerances": [np.nan, 1]}, "target_tolerances must be finite"),
        ({"target_hard": [1, 0]}, "target_hard must be a mask"),
        ({"denominators": np.ones((1, 3))}, r"denominators must have the matrix's shape \(2, 3\)"),
    ],
)
def test_wrong_kinds_of_targets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CalibrationProblem(np.ones((2, 3)), [1.0, 2.0], **arguments)
