"""Nulls whose law is known: rows, latents and counts drawn of each class."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from utils.expression.evaluation.nulls import (
    as_matrix,
    binomial_counts,
    gaussian_latents,
    groups_alike,
    prior_latents,
    rows_of_groups,
    rows_of_types,
    standardised,
)
from utils.expression.evaluation.samples import draw_rows


def test_rows_have_the_types_that_are_wanted():
    """None twice where there are enough, all of them as often where there are not, none of a type that is not there."""
    types = np.array(["A"] * 50 + ["B"] * 3, dtype=object)
    wanted = np.array(["B"] * 7 + ["A"] * 40 + ["C"] * 2, dtype=object)
    rows = rows_of_types(wanted, types, seed=3)
    assert list(types[rows]) == ["B"] * 7 + ["A"] * 40
    assert len(set(rows[7:])) == 40
    assert sorted(np.unique(rows[:7], return_counts=True)[1]) == [2, 2, 3]
    assert (rows_of_types(wanted, types, seed=3) == rows).all()
    assert (rows_of_types(wanted, types, seed=4) != rows).any()


def test_test_cells_are_drawn_evenly():
    assert (draw_rows(30, 30, seed=5) == np.arange(30)).all()
    assert len(set(draw_rows(30, 12, seed=5))) == 12
    times = np.bincount(draw_rows(30, 75, seed=5), minlength=30)
    assert set(times) == {2, 3}


def test_groups_are_of_all_classes_together_and_fall_back_on_all_cells():
    known = [{"kind": "A", "donor": "1", "age": 3.0}] * 6 + [{"kind": "B", "donor": "1"}] * 4 + [{"donor": "1"}] * 5
    asked = [
        {"donor": "1", "kind": "A", "age": 7.0},
        {"kind": "B", "donor": "1"},
        {"donor": "1"},
        {"kind": "A", "donor": "1"},
    ]
    groups = {tuple(places): rows for places, rows in groups_alike(asked, known)}
    assert set(groups) == {(0, 3), (1,), (2,)}
    assert list(groups[(0, 3)]) == list(range(6))
    assert len(groups[(1,)]) == 15  # four are too few
    assert list(groups[(2,)]) == list(range(10, 15))
    everyone = groups_alike([{}] * 3, [{}] * 9)
    assert [(len(places), len(rows)) for places, rows in everyone] == [(3, 9)]
    drawn = rows_of_groups(groups_alike(asked, known), seed=0)
    assert max(drawn[0], drawn[3]) < 6
    assert drawn[2] >= 10


def two_normals(count: int) -> tuple[np.ndarray, list[dict]]:
    """Latents (2 * count, 3) of two classes, with means and covariances of their own."""
    generator = np.random.default_rng(0)
    first = generator.multivariate_normal([0, 1, 2], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.2]], count)
    second = generator.multivariate_normal([5, 0, -2], [[0.3, 0, -0.4], [0, 2, 0], [-0.4, 0, 1]], count)
    return np.concatenate([first, second]), [{"kind": "A"}] * count + [{"kind": "B"}] * count


def test_gaussian_latents_have_the_mean_and_covariance_of_each_class():
    latents, known = two_normals(4000)
    asked = [{"kind": "B"}] * 20_000 + [{"kind": "A"}] * 20_000
    none = np.zeros((len(known), 0)), np.zeros((len(asked), 0))
    drawn = gaussian_latents(latents, *none, groups_alike(asked, known), seed=0)
    for mine, real in ((drawn[:20_000], latents[4000:]), (drawn[20_000:], latents[:4000])):
        np.testing.assert_allclose(mine.mean(axis=0), real.mean(axis=0), atol=0.04)
        np.testing.assert_allclose(np.cov(mine.T), np.cov(real.T), atol=0.06)


def test_small_classes_lean_on_the_covariance_of_all():
    """Five cells in three dimensions: their own covariance counts five parts, the mean of all (nearly that of the
    large class) three."""
    latents, known = two_normals(4000)
    rows = [*range(4000), *range(4000, 4005)]
    latents, known = latents[rows], [known[row] for row in rows]
    asked = [{"kind": "B"}] * 50_000 + [{"kind": "A"}]
    none = np.zeros((len(known), 0)), np.zeros((len(asked), 0))
    drawn = gaussian_latents(latents, *none, groups_alike(asked, known), seed=0)[:-1]
    own, large = np.cov(latents[4000:].T, bias=True), np.cov(latents[:4000].T, bias=True)
    expected = (5 * own + 3 * (4000 * large + 5 * own) / 4005) / 8
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.06)
    np.testing.assert_allclose(drawn.mean(axis=0), latents[4000:].mean(axis=0), atol=0.03)


def test_gaussian_latents_follow_a_number():
    """The mean is linear in it; a cell without it has the mean of all, and a spread that is not smaller."""
    generator = np.random.default_rng(1)
    ages = generator.uniform(20, 80, 6000)
    latents = np.column_stack([0.1 * ages, -ages, 0 * ages]) + generator.normal(size=(6000, 3))
    wanted = np.repeat([30.0, 70.0, np.nan], 4000)
    inputs = standardised(as_matrix({"age": ages}, 6000), as_matrix({"age": wanted}, 12_000))
    drawn = gaussian_latents(latents, *inputs, groups_alike([{}] * 12_000, [{}] * 6000), seed=0)
    for i, age in enumerate((30, 70, ages.mean())):
        mine = drawn[4000 * i : 4000 * (i + 1)]
        np.testing.assert_allclose(mine.mean(axis=0), [0.1 * age, -age, 0], atol=0.1)
        np.testing.assert_allclose(np.cov(mine.T), np.eye(3), atol=0.1)


def test_prior_latents_are_standard_normal():
    drawn = prior_latents(np.linspace(5, 8, 5000), seed=0, dim=3)
    np.testing.assert_allclose(drawn[:, :3].mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(drawn[:, :3].T), np.eye(3), atol=0.08)
    assert (drawn[:, 3] == np.linspace(5, 8, 5000)).all()


def test_binomial_counts_have_the_moments_of_each_type():
    """Mean and variance of each gene of each type are those of the training cells, and so is the correlation with the
    library; genes are independent but for the library, which those were not."""
    generator = np.random.default_rng(2)
    types = np.repeat(np.array(["A", "B"], dtype=object), 20_000)
    shares = np.where((types == "A")[:, None], [0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4])
    depths = generator.lognormal(4, 0.4, 40_000)
    state = generator.gamma(5.0, 1 / 5, (40_000, 1)) * [[1, 1, 0, 0]] + [[0, 0, 1, 1]]  # shared by the first two genes
    counts = generator.poisson(depths[:, None] * shares * state).astype(np.float32)
    known = [{"kind": kind} for kind in types]
    drawn = binomial_counts(csr_matrix(counts), depths, groups_alike(known * 3, known), seed=0)
    wanted = np.tile(types, 3)
    for kind in "AB":
        mine, real = drawn[wanted == kind], counts[types == kind]
        np.testing.assert_allclose(mine.mean(axis=0), real.mean(axis=0), rtol=0.03)
        np.testing.assert_allclose(mine.var(axis=0), real.var(axis=0), rtol=0.08)
    assert (drawn[wanted == "A"][:, 3] == 0).all()
    assert (drawn == np.rint(drawn)).all()
    together = [np.cov(each[:, :2].T)[0, 1] for each in (counts[:20_000], drawn[wanted == "A"])]
    by_library = 0.5 * 0.3 * depths[:20_000].var()
    assert together[1] == pytest.approx(by_library, rel=0.1)
    assert together[0] > 1.5 * by_library
