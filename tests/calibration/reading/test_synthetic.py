import numpy as np
import pandas as pd
import pytest

from sparsereg.calibration.reading.synthetic import synthetic_problem, synthetic_tables


def test_it_has_the_size_asked_for_and_the_difficulties_promised():
    problem = synthetic_problem(households=3000, targets=400, seed=1)
    assert (problem.num_targets, problem.num_households) == (400, 3000)
    assert np.diff(problem.matrix.indptr).min() >= 5
    errors = np.abs(problem.estimates(problem.starting_weights) / problem.targets - 1)
    assert 0.05 < errors.mean() < 0.25
    assert problem.starting_weights.std() / problem.starting_weights.mean() > 0.3
    assert len(set(problem.target_groups)) > 10
    levels = {name.split("/")[0][0] for name in problem.names}
    assert levels == {"n", "S", "D"}


def test_parents_are_the_same_total_of_the_area_above():
    problem = synthetic_problem(households=3000, targets=400)
    nested = np.flatnonzero(problem.parent >= 0)
    assert len(nested) > 300
    for i in nested[::7]:
        above, below = problem.names[problem.parent[i]], problem.names[i]
        assert above.split("/", 1)[1] == below.split("/", 1)[1]
        part, whole = problem.matrix[[i]], problem.matrix[[problem.parent[i]]]
        assert set(part.indices) <= set(whole.indices)


def test_without_disagreement_the_levels_add_up():
    problem = synthetic_problem(households=2000, targets=300, disagreement=0.0)
    name = {n: i for i, n in enumerate(problem.names)}
    states = [i for n, i in name.items() if n[0] == "S" and n.endswith("/wages/amount")]
    nation = problem.targets[name["nation/wages/amount"]]
    assert problem.targets[states].sum() == pytest.approx(nation, rel=1e-6)
    noisy = synthetic_problem(households=2000, targets=300, disagreement=0.02)
    ratio = noisy.targets / problem.targets
    assert 0.01 < np.log(ratio).std() < 0.03


def test_same_seed_same_survey():
    one, same, other = (synthetic_tables(500, 60, seed=s) for s in (3, 3, 4))
    pd.testing.assert_frame_equal(one[0], same[0])
    pd.testing.assert_frame_equal(one[1], same[1])
    assert not one[0].wages.equals(other[0].wages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50, 10), "households must be >= 100"),
        ((100, 0), "targets must be >= 1"),
        ((100, 10_000), "targets must be at most"),
        ((100, 10, 0, 0.9), "disagreement must lie in"),
    ],
)
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_tables(*arguments)
