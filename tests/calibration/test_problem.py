import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.calibration.problem import CalibrationProblem


def dense(rows=4, columns=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.5)


@pytest.mark.parametrize(
    "form", [np.asarray, sp.csr_array, sp.csc_matrix, sp.coo_array, sp.lil_array, sp.csr_matrix]
)
def test_every_form_of_matrix_becomes_the_same_canonical_csr(form):
    a = dense()
    problem = CalibrationProblem(form(a), np.ones(4))
    m = problem.matrix
    assert isinstance(m, sp.csr_array)
    assert m.dtype == np.float32
    assert m.indices.dtype == np.int32
    np.testing.assert_array_equal(m.toarray(), a.astype(np.float32))
    assert m.has_canonical_format
    assert (m.data != 0).all()
    np.testing.assert_array_equal(problem.matrix_t.toarray(), a.T.astype(np.float32))
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


def test_defaults_are_filled_and_estimates_are_float64():
    a = dense()
    problem = CalibrationProblem(a, np.ones(4))
    assert problem.num_targets == 4
    assert problem.num_households == 7
    np.testing.assert_array_equal(problem.initial_weights, np.ones(7))
    assert problem.target_names == ("target_0", "target_1", "target_2", "target_3")
    np.testing.assert_array_equal(problem.ids, np.arange(7))
    w = np.random.default_rng(1).random(7)
    np.testing.assert_allclose(problem.estimates(w), a.astype(np.float32).astype(np.float64) @ w, rtol=1e-15)
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
