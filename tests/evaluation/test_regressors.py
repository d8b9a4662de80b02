"""Regressors of numbers that samples were asked for."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression

from utils.errors import UserError
from utils.evaluation.regressors import Regressor, Regressors, number_names, spearman_figure, spearman_titles

WEIGHTS = np.array([2.0, -1.0, 0.5])


def training(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 3) and a number that is linear in them (n,)."""
    features = np.random.default_rng(0).standard_normal((count, 3))
    return features, features @ WEIGHTS + 1


def fit(features: np.ndarray, values: np.ndarray, max_rows: int = 1000) -> Regressor:
    return Regressor.fit(LinearRegression(), values, features_of=lambda rows: features[rows], max_rows=max_rows)


def test_a_linear_law_is_found_and_what_is_not_finite_is_left_out():
    features, values = training(60)
    values[:20] = np.nan
    features[20:25] = np.inf
    regressor = fit(features, values)
    queries = np.random.default_rng(1).standard_normal((7, 3))
    queries[3, 1] = np.nan
    predicted = regressor.predict(queries)
    assert np.isnan(predicted[3])
    known = np.arange(7) != 3
    np.testing.assert_allclose(predicted[known], queries[known] @ WEIGHTS + 1)
    assert np.isnan(regressor.predict(np.full((2, 3), np.nan))).all()


def test_at_most_so_many_rows_are_looked_at():
    features, values = training(100)
    looked_at = []

    def features_of(rows: np.ndarray) -> np.ndarray:
        looked_at.append(rows)
        return features[rows]

    Regressor.fit(LinearRegression(), values, features_of=features_of, max_rows=30)
    (rows,) = looked_at
    assert len(set(rows)) == 30


@pytest.mark.parametrize("lacking", ["values", "features"])
def test_fewer_than_twenty_are_too_few(lacking):
    features, values = training(40)
    (values if lacking == "values" else features)[19:] = np.nan
    with pytest.raises(UserError, match="19 have a value; a regressor needs at least 20"):
        fit(features, values)


def test_what_cannot_be_learned_has_a_reason():
    features, values = training(40)

    def learn(name: str) -> Regressor:
        if name == "gap":
            raise UserError("there is no gap")
        return fit(features, values)

    found = Regressors.learn(["energy", "gap"], learn)
    assert list(found.by_name) == ["energy"]
    assert found.not_measured() == {"gap_spearman": "there is no gap"}


def test_names_of_numbers():
    requests = [{"kind": "A", "age": 3}, {"size": np.float64(2), "age": 4.0, "flag": True, "none": None}]
    assert number_names(requests) == ["age", "size"]
    assert number_names([]) == []


def test_rank_correlation_is_that_of_scipy():
    asked, noise = np.random.default_rng(2).standard_normal((2, 50))
    figures = spearman_figure("age", asked, asked + noise, "a note")
    assert figures.keys() == spearman_titles(["age"]).keys() == {"age_spearman"}
    figure = figures["age_spearman"]
    assert figure.value == pytest.approx(spearmanr(asked, asked + noise).statistic)
    assert -1 <= figure.low < figure.value < figure.high <= 1
    assert figure.note == "a note"
