"""Rows that are exact sums of others: found, verified, and the same products without them."""

import numpy as np
import pytest
import scipy.sparse as sp

from sparsereg.linalg.nesting import find_nesting


def survey(seed=0, households=600, states=3, districts=12, families=4, odd=0):
    """Nation, states and districts of some families of totals; ``odd`` rows that are sums of nothing."""
    rng = np.random.default_rng(seed)
    district = rng.integers(0, districts, households)
    state = district * states // districts
    values = rng.lognormal(size=(families, households)) * (rng.random((families, households)) < 0.6)
    rows, parent = list(values), [-1] * families
    for area, above in ((state, None), (district, state)):
        for a in np.unique(area):
            for f in range(families):
                rows.append(values[f] * (area == a))
                if above is None:
                    parent.append(f)
                else:
                    parent.append(families * (1 + int(above[area == a][0])) + f)
    rows += [rng.lognormal(size=households) * (rng.random(households) < 0.3) for _ in range(odd)]
    matrix = sp.csr_array(np.array(rows, dtype=np.float32))
    return matrix, np.array(parent + [-1] * odd)


def found(matrix, parent=None):
    return find_nesting(matrix, sp.csr_array(matrix.T.tocsr()), parent)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("odd", [0, 3])
def test_the_nation_is_the_sum_of_districts(known, odd):
    matrix, parent = survey(odd=odd)
    nesting = found(matrix, parent if known else None)
    assert nesting.sums.size == 4 + 3 * 4
    assert set(nesting.parts.sum(axis=1)) == {4, 12}  # districts of a state, and of the nation
    stored = matrix[nesting.stored].toarray()
    np.testing.assert_array_equal(nesting.parts @ stored.astype(np.float64), matrix[nesting.sums].toarray())


@pytest.mark.parametrize("seed", range(4))
def test_products_are_those_of_the_whole_matrix(seed):
    matrix, _ = survey(seed, odd=2)
    rows = np.random.default_rng(seed).permutation(matrix.shape[0])
    matrix = sp.csr_array(matrix[rows])
    nesting, rng = found(matrix), np.random.default_rng(1)
    weights, residual = rng.random(matrix.shape[1]), rng.standard_normal(matrix.shape[0])
    stored = matrix[nesting.stored].astype(np.float64)
    np.testing.assert_allclose(nesting.expand(stored @ weights), matrix @ weights, rtol=1e-13)
    np.testing.assert_allclose(stored.T @ nesting.collapse(residual), matrix.T @ residual, atol=1e-12)
    squares = stored.power(2).T @ nesting.collapse(residual)
    np.testing.assert_allclose(squares, matrix.astype(np.float64).power(2).T @ residual, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_no_page_has_two_parts_of_a_sum(seed):
    matrix, parent = survey(seed, odd=2)
    for nesting in (found(matrix), found(matrix, parent)):
        stored = matrix[nesting.stored]
        for page in np.unique(nesting.page):
            there = np.diff(sp.csr_array(stored[:, np.flatnonzero(nesting.page == page)]).indptr) > 0
            assert (nesting.parts @ there.astype(float)).max() <= 1


def test_one_entry_that_differs_is_no_sum():
    matrix, parent = survey(families=1)
    matrix.data[5] = np.nextafter(matrix.data[5], np.float32(np.inf))
    nesting = found(matrix, parent)
    assert set(nesting.sums) == {1, 2, 3}


def test_a_district_that_is_missing_leaves_its_state_stored():
    matrix, parent = survey(families=2)
    without = np.delete(np.arange(matrix.shape[0]), 10)
    index = np.full(matrix.shape[0] + 1, -1)
    index[without] = np.arange(len(without))
    nesting = found(sp.csr_array(matrix[without]), index[parent[without]])
    lost = parent[10]
    assert lost not in nesting.sums
    assert parent[lost] in nesting.sums, "the nation is the sum of that state and the others' districts"


def test_equal_rows_are_stored_once():
    matrix = survey(families=1)[0][[4, 5, 6, 7]]
    doubled = sp.csr_array(sp.vstack([matrix, matrix]))
    nesting = found(doubled)
    assert len(nesting.stored) == 4
    assert (nesting.parts.sum(axis=1) == 1).all()


def test_random_matrices_and_families_do_not_nest():
    rng = np.random.default_rng(0)
    assert found(sp.random_array((50, 400), density=0.2, format="csr", rng=rng)) is None
    assert found(sp.csr_array((3, 5))) is None
    own = rng.random(300) < 0.5
    overlapping = sp.csr_array(np.array([np.ones(300), own, ~own, rng.random(300) < 0.5], dtype=np.float32))
    nesting = found(overlapping)
    assert nesting is None or list(nesting.sums) == [0]
