"""The selector as a scikit-learn estimator."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sparsereg.sklearn import L0FeatureSelector

CHECKS = parametrize_with_checks(
    [L0FeatureSelector(epochs=20), L0FeatureSelector(epochs=20, max_features=1)]
).mark
"""A list in the end: scikit-learn before 1.8 gives a generator, which pytest 9 does not want."""


@pytest.mark.parametrize(CHECKS.args[0], list(CHECKS.args[1]), **CHECKS.kwargs)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def regression():
    return make_regression(400, 30, n_informative=5, noise=1.0, coef=True, random_state=0)


def test_finds_the_columns_of_a_linear_model_on_any_scale():
    x, y, coef = regression()
    scale = np.logspace(-4, 4, 30)
    selector = L0FeatureSelector(random_state=0).fit(x * scale + 5 * scale, y * 1e6)
    assert selector.get_support(indices=True).tolist() == np.flatnonzero(coef).tolist()
    assert np.array_equal(selector.transform(x), x[:, coef != 0])


def test_finds_the_columns_of_a_logistic_model():
    x = np.random.default_rng(0).standard_normal((600, 20))
    labels = np.array(["no", "yes"])[(x[:, 3] - 2 * x[:, 11] > 0).astype(int)]
    selector = L0FeatureSelector(random_state=0).fit(x, labels)
    assert selector.get_support(indices=True).tolist() == [3, 11]
    assert selector.classes_.tolist() == ["no", "yes"]
    assert selector.coef_.shape == (2, 20)


def test_several_classes_need_the_columns_of_each():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((900, 12))
    y = np.argmax(x[:, [1, 5, 8]], axis=1)
    assert L0FeatureSelector(random_state=0).fit(x, y).get_support(indices=True).tolist() == [1, 5, 8]


def test_a_price_and_a_largest_number():
    x, y, _ = regression()
    assert L0FeatureSelector(2, random_state=0).fit(x, y).get_support().sum() == 2
    few, many = (L0FeatureSelector(lambda_l0=p, random_state=0).fit(x, y) for p in (0.1, 1e-3))
    assert 1 <= few.get_support().sum() < many.get_support().sum()
    assert L0FeatureSelector(lambda_l0=100, random_state=0).fit(x, y).get_support().sum() == 1


def test_columns_that_are_sure_are_ranked_too():
    """After many steps P(z > 0) of both columns rounds to 1; the better one comes second."""
    x = np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32)
    y = 1.0 * x[:, 0] + 3.0 * x[:, 1]
    selector = L0FeatureSelector(1, lambda_l0=1e-4, epochs=50, random_state=0).fit(x, y)
    selector.log_alpha_ = np.array([30.0, 40.0], dtype=np.float32)
    selector.scores_ = np.ones(2, dtype=np.float32)
    assert selector.get_support().tolist() == [False, True]


def test_one_seed_one_result_and_constant_columns_never():
    x, y, _ = regression()
    x[:, 7] = 3.3
    a, b = (L0FeatureSelector(random_state=4).fit(x, y).scores_ for _ in range(2))
    assert np.array_equal(a, b)
    assert not L0FeatureSelector(random_state=4).fit(x, y).get_support()[7]


def test_names_of_frames():
    x, y, coef = regression()
    frame = pd.DataFrame(x, columns=[f"c{i}" for i in range(30)])
    selector = L0FeatureSelector(random_state=0).set_output(transform="pandas").fit(frame, y)
    assert selector.transform(frame).columns.tolist() == [f"c{i}" for i in np.flatnonzero(coef)]
    with pytest.raises(ValueError, match="feature names"):
        selector.transform(frame.rename(columns={"c3": "x"}))


@pytest.mark.parametrize("loss", ["auto", "linear"])
def test_pipeline(loss):
    x, y, _ = regression()
    selector = L0FeatureSelector(loss=loss, random_state=0)
    pipeline = make_pipeline(StandardScaler(), selector, LinearRegression())
    assert clone(pipeline).fit(x, y).score(x, y) > 0.99


def test_grid_search():
    x, y = make_classification(300, 15, n_informative=3, n_redundant=0, class_sep=2, random_state=0)
    pipeline = make_pipeline(L0FeatureSelector(epochs=100, random_state=0), LogisticRegression())
    grid = {"l0featureselector__lambda_l0": [0.005, 0.5], "l0featureselector__max_features": [2, 8]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(x, y)
    assert search.best_params_["l0featureselector__lambda_l0"] == 0.005
    assert search.best_score_ > 0.7


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"max_features": 0}, "max_features"),
        ({"max_features": 31}, "max_features"),
        ({"loss": "mse"}, "loss"),
        ({"lambda_l0": -1.0}, "lambda_l0"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"temperature": 0.0}, "temperature"),
        ({"init_mean": 1.0}, "init_mean"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    x, y, _ = regression()
    with pytest.raises(ValueError, match=name):
        L0FeatureSelector(**arguments).fit(x, y)


def test_labels_for_a_logistic_loss_only():
    x, y, _ = regression()
    with pytest.raises(ValueError, match="label type"):
        L0FeatureSelector(loss="logistic").fit(x, y)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        L0FeatureSelector().fit(x, y)
