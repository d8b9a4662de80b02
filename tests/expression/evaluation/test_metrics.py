"""Figures of cells whose law is known: against scipy, numpy and brute force, and with planted faults."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from tests.support.cells.typed import KINDS, all_figures, control, control_figures, draw, pbmc, real, relabelled
from utils.errors import UserError
from utils.expression.evaluation import metrics as metrics_expression
from utils.expression.evaluation.judge import Classifier, train_on_synthetic_test_on_real
from utils.expression.evaluation.markers import marker_figures
from utils.expression.evaluation.metrics import (
    distance_figures,
    gene_figures,
    lisi_figure,
    memorising_figures,
    random_forest_figures,
    total_least_squares_slope,
)
from utils.expression.evaluation.real import Cells, equal_numbers, per_type, principal_components

# ---- the mathematics


def test_placements_are_the_area_under_the_curve() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    generated, of_real = generator.integers(2, 12, 80) / 10, generator.integers(0, 10, 50) / 10  # with ties
    expected = roc_auc_score(np.repeat([1, 0], [80, 50]), np.concatenate([generated, of_real]))
    for part in metrics_expression.placements(generated, of_real):
        assert part.mean() == pytest.approx(expected)


def test_the_interval_of_the_area_covers_it() -> None:
    from scipy.stats import norm

    generator, true, hits = np.random.default_rng(0), norm.cdf(1 / 2**0.5), []
    for _ in range(400):
        scores = generator.normal(1, 1, 60), generator.normal(0, 1, 80)
        figure = metrics_expression.auc_figure(*metrics_expression.placements(*scores))
        hits.append(figure.low <= true <= figure.high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_no_cell_is_judged_by_a_forest_that_saw_it() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 5))  # a forest knows by heart what it saw
    assert 0.4 < metrics_expression.forest_figure(noise[:100], noise[100:], 0).value < 0.6
    assert metrics_expression.forest_figure(noise[:100], noise[100:] + 9, 0).value == 1


def test_wasserstein_is_the_shift_and_the_best_of_all_assignments() -> None:
    from scipy.spatial.distance import cdist

    generator = np.random.default_rng(0)
    points, shift = generator.normal(size=(150, 8)), generator.normal(size=8)
    found = metrics_expression.wasserstein_2(cdist(points, points + shift, "sqeuclidean"))
    assert found == pytest.approx(np.linalg.norm(shift))
    squared = cdist(points[:6], generator.normal(size=(6, 8)), "sqeuclidean")
    costs = [np.mean([squared[i, j] for i, j in enumerate(order)]) for order in itertools.permutations(range(6))]
    assert metrics_expression.wasserstein_2(squared) == pytest.approx(min(costs) ** 0.5)


def test_the_scale_of_wasserstein(monkeypatch) -> None:
    points = np.random.default_rng(0).normal(size=(len(real()), 6)) * 3
    middle = np.tile(points.mean(axis=0), (len(points), 1))
    monkeypatch.setattr(metrics_expression, "pooled_space", lambda real, generated: (points, middle))
    assert distance_figures(real(), control(), 0)["w2"].value == pytest.approx(1)
    monkeypatch.setattr(metrics_expression, "pooled_space", lambda real, generated: (points, points[::-1]))
    assert distance_figures(real(), control(), 0)["w2"].value == pytest.approx(0, abs=1e-6)


def test_mmd_is_the_sum_over_pairs(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(12, 3)), generator.normal(0.5, 1, size=(12, 3))
    pooled = np.concatenate(points)
    median = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(pooled, 2)])

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        distance = np.linalg.norm(a - b)
        return sum(np.exp(-(distance**2) / (2 * (width * median) ** 2)) for width in (0.5, 1, 2)) / 3

    expected = 0.0
    for i, j in itertools.product(range(12), repeat=2):
        expected -= 2 * kernel(points[0][i], points[1][j]) / 144
        if i != j:
            expected += (kernel(points[0][i], points[0][j]) + kernel(points[1][i], points[1][j])) / (12 * 11)
    monkeypatch.setattr(metrics_expression, "pooled_space", lambda real, generated: points)
    # the median of the squares is the square of the median but for an even number of pairs
    assert distance_figures(real(), control(), 0)["mmd"].value == pytest.approx(expected, rel=1e-3)


def test_mmd_is_0_on_average_for_the_same_law() -> None:
    from scipy.spatial.distance import cdist

    generator, found = np.random.default_rng(0), []
    for _ in range(300):
        points = generator.normal(size=(20, 2))
        kernel = np.exp(-cdist(points, points, "sqeuclidean"))
        found.append(metrics_expression.mmd_squared(kernel[:10, :10], kernel[10:, 10:], kernel[:10, 10:]))
    assert abs(np.mean(found)) < 3 * np.std(found) / 300**0.5


def brute_force_lisi(points: np.ndarray, is_generated: np.ndarray) -> list[float]:
    """With scikit-learn's neighbours, and SciPy's root of the entropy."""
    from scipy.optimize import brentq
    from sklearn.neighbors import NearestNeighbors

    distances, neighbours = NearestNeighbors(n_neighbors=90).fit(points).kneighbors()
    scores = []
    for row, near in zip(distances**2, neighbours, strict=True):

        def weights(precision: float, row: np.ndarray = row) -> np.ndarray:
            found = np.exp(-precision * (row - row[0]))
            return found / found.sum()

        def excess(precision: float) -> float:
            return -sum(p * np.log(p) for p in weights(precision) if p > 0) - np.log(30)

        chosen = weights(brentq(excess, 1e-6, 1e4))
        share = chosen[is_generated[near]].sum()
        scores.append(1 / (share**2 + (1 - share) ** 2))
    return scores


def test_lisi_is_brute_force_and_has_its_ends() -> None:
    from scipy.spatial.distance import cdist

    points = np.random.default_rng(0).normal(size=(400, 3))
    is_generated = np.arange(400) % 2 == 0
    squared = cdist(points, points, "sqeuclidean")
    mixed = metrics_expression.lisi_scores(squared, is_generated)
    np.testing.assert_allclose(mixed, brute_force_lisi(points, is_generated), rtol=1e-5)
    assert 1.9 < mixed.mean() < 1.96
    apart = points + 100 * is_generated[:, None]
    scores = metrics_expression.lisi_scores(cdist(apart, apart, "sqeuclidean"), is_generated)
    np.testing.assert_allclose(scores, 1)
    pairs = np.repeat(np.linspace(0, 1, 200)[:, None], 2, axis=0)  # each generated cell lies on a real one
    scores = metrics_expression.lisi_scores(cdist(pairs, pairs, "sqeuclidean"), is_generated)
    assert scores.mean() > 1.99


def test_weights_have_the_perplexity() -> None:
    squared = np.random.default_rng(0).gamma(5, 1, (50, 90)) * np.logspace(-6, 6, 50)[:, None]
    weights = metrics_expression.perplexity_weights(squared, 30)
    np.testing.assert_allclose(np.exp(-(weights * np.log(weights)).sum(axis=1)), 30, rtol=1e-6)
    same = metrics_expression.perplexity_weights(np.zeros((2, 90)), 30)
    np.testing.assert_allclose(same, 1 / 90)


def test_slope_of_planted_changes() -> None:
    generator = np.random.default_rng(0)
    changes = generator.normal(0, 1, 4000)
    for slope in (0.5, 1.0, 2.0, -1.5):
        assert total_least_squares_slope(changes, slope * changes) == pytest.approx(slope)
    noisy = [changes + generator.normal(0, 0.7, 4000) for _ in range(2)]
    slope = total_least_squares_slope(*noisy)
    assert slope == pytest.approx(1, abs=0.05)
    assert noisy[0] @ noisy[1] / (noisy[0] @ noisy[0]) < 0.75  # which ordinary least squares would say
    assert total_least_squares_slope(*noisy[::-1]) == pytest.approx(1 / slope)
    direction = np.linalg.svd(np.stack(noisy, axis=1))[2][0]
    assert slope == pytest.approx(direction[1] / direction[0])
    assert total_least_squares_slope(changes, 0 * changes) == 0


def test_gene_figures_are_numpys() -> None:
    figures, sets = control_figures(), (real(), control())
    means, variances = ([of(cells.log_normalised(), axis=0) for cells in sets] for of in (np.mean, np.var))
    zeros = [(cells.counts == 0).mean(axis=0) for cells in sets]
    expected = {
        "gene_mean_correlation": np.corrcoef(means)[0, 1],
        "gene_variance_correlation": np.corrcoef(variances)[0, 1],
        "zero_fraction": zeros[1].mean(),
        "zero_fraction_error": zeros[1].mean() - zeros[0].mean(),
        "zero_fraction_per_gene_error": np.abs(zeros[1] - zeros[0]).mean(),
    }
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-5), name
    direction = np.linalg.svd(np.stack(variances, axis=1), full_matrices=False)[2][0]
    assert figures["gene_variance_slope"].value == pytest.approx(direction[1] / direction[0], rel=1e-4)


# ---- intervals


def test_intervals_hold_their_values_and_cover_those_of_other_draws() -> None:
    draws = [draw(100 + seed, of_each=25) for seed in range(40)]
    reference = draw(99, of_each=25)
    found = [gene_figures(reference, each) | marker_figures(reference, each, 20) for each in draws]
    for name in found[0]:
        figures = [figures[name] for figures in found]
        true = np.mean([figure.value for figure in figures])
        assert all(figure.low <= figure.value <= figure.high for figure in figures)
        assert np.mean([figure.low <= true <= figure.high for figure in figures]) >= 0.85, name
    for figure in control_figures().values():
        assert figure.low < figure.value < figure.high
        assert figure.num_samples == 240


# ---- faults


def test_other_real_cells_show_no_fault() -> None:
    figures = control_figures()
    assert 0.4 < figures["rf_auc"].value < 0.6
    assert 0.4 < figures["rf_auc_pca50"].value < 0.6
    assert figures["mmd"].low < 0 < figures["mmd"].high
    assert figures["lisi"].value > 1.8
    assert abs(figures["zero_fraction_error"].value) < 0.01
    for name in ("gene_variance_slope", "lfc_slope"):
        assert figures[name].value == pytest.approx(1, abs=0.1), name
    assert figures["marker_overlap"].value > 0.5
    assert Classifier.fit(real(), 0).accuracy(control()).value > 0.95
    assert train_on_synthetic_test_on_real(control(), real(), 0).value > 0.95


def test_shuffled_labels_collapse_what_needs_labels() -> None:
    shuffled = relabelled(control(), np.random.default_rng(0).permutation(control().labels))
    assert Classifier.fit(real(), 0).accuracy(shuffled).value < 0.4
    assert train_on_synthetic_test_on_real(shuffled, real(), 0).value < 0.5
    figures = marker_figures(real(), shuffled)
    assert figures["marker_overlap"].value < 0.3
    assert abs(figures["lfc_slope"].value) < 0.2


def test_means_instead_of_draws_are_told_apart() -> None:
    figures = all_figures(real(), draw(1, noise=False))
    assert figures["rf_auc"].value > 0.95
    assert figures["rf_auc_pca50"].value > 0.95
    assert abs(figures["zero_fraction_error"].value) > 0.03
    assert figures["zero_fraction_error"].low * figures["zero_fraction_error"].high > 0
    assert figures["gene_variance_slope"].high < 0.8
    assert figures["gene_mean_correlation"].value > 0.9  # no headline
    assert figures["lisi"].value < 1.5
    assert figures["mmd"].low > 0


def test_collapse_to_a_few_cells_shows() -> None:
    few = control().take(np.arange(240) // 60 * 60)  # one cell of each type
    figures = all_figures(real(), few)
    assert figures["rf_auc"].value > 0.95
    assert figures["w2"].low > control_figures()["w2"].high
    assert figures["mmd"].low > 0
    assert figures["lisi"].value < 1.2
    assert figures["marker_overlap"].value < 0.5
    assert figures["zero_fraction_per_gene_error"].value > 3 * control_figures()["zero_fraction_per_gene_error"].value


def test_a_type_that_is_missing_shows() -> None:
    three = control().take(control().labels != "NK")
    assert distance_figures(real(), three, 0)["mmd"].low > 0
    assert marker_figures(real(), three)["marker_overlap"].note == "fewer than 5 cells, left out: NK"
    assert train_on_synthetic_test_on_real(three, real(), 0).value <= 0.75


def test_swapped_types_show() -> None:
    names = {"B": "T", "T": "B", "NK": "NK", "CD14+": "CD14+"}
    swapped = relabelled(control(), np.array([names[label] for label in control().labels], dtype=object))
    assert Classifier.fit(real(), 0).accuracy(swapped).value == pytest.approx(0.5, abs=0.05)
    figures, good = marker_figures(real(), swapped), control_figures()
    assert figures["marker_overlap"].value < good["marker_overlap"].value - 0.15
    assert figures["lfc_correlation"].value < 0.6
    assert random_forest_figures(real(), swapped, 0)["rf_auc"].value < 0.6  # it does not look at labels
    assert per_type(lisi_figure, real(), swapped)["B"]["lisi"].value < 1.3


def test_copies_are_found() -> None:
    training, test = draw(2, of_each=100), draw(3)
    fresh = memorising_figures(draw(4, of_each=100), test, training)
    assert fresh["copies"].value < 0.04
    assert fresh["nearest_ratio"].value == pytest.approx(1, abs=0.05)
    assert fresh["copies"].note == "1% of 240 held-out cells"
    copied = memorising_figures(training.take(np.arange(50)), test, training)
    assert copied["copies"].value == 1
    assert copied["nearest_ratio"].value == pytest.approx(0, abs=1e-3)
    third = Cells(np.concatenate([training.counts[:50], draw(4).counts[:100]]), np.full(150, 400.0))
    assert memorising_figures(third, test, training)["copies"].value > 0.3
    with pytest.raises(UserError, match="99 held-out cells; give at least 100"):
        memorising_figures(training, test.take(np.arange(99)), training)


# ---- types apart, repetition, and odd cells


def test_each_type_has_the_figures_of_its_own_cells() -> None:
    few = np.concatenate([np.arange(60), np.arange(60, 79), np.arange(120, 240)])  # 19 of CD14+
    found = per_type(gene_figures, real(), control().take(few))
    assert list(found) == ["B", "NK", "T"]
    alone = gene_figures(real().take(np.arange(60)), control().take(np.arange(60)))
    assert found["B"] == alone
    distances = per_type(partial(distance_figures, seed=0), real().take(few), control().take(few), min_cells=15)
    assert list(distances) == sorted(KINDS)
    assert distances["CD14+"]["w2"].num_samples == 19


def test_a_seed_repeats_and_nothing_is_changed() -> None:
    sets = [draw(0), draw(1)]
    before = [(cells.counts.copy(), cells.library_sizes.copy(), cells.labels.copy()) for cells in sets]
    expected = control_figures()
    torch.manual_seed(5)
    np.random.seed(5)
    assert all_figures(*sets) == expected
    assert memorising_figures(sets[1], *sets) == memorising_figures(sets[1], *sets)
    assert Classifier.fit(sets[0], 0).accuracy(sets[1]) == Classifier.fit(sets[0], 0).accuracy(sets[1])
    for cells, kept in zip(sets, before, strict=True):
        for now, then in zip((cells.counts, cells.library_sizes, cells.labels), kept, strict=True):
            np.testing.assert_array_equal(now, then)
    few = [cells.take(np.arange(0, 240, 6)) for cells in sets]
    assert random_forest_figures(*few, seed=1) != random_forest_figures(*few, seed=0)


def test_as_many_of_both_are_drawn_from_all_of_them() -> None:
    large, small = equal_numbers(draw(5, of_each=100), control(), 100, seed=0)
    assert len(large) == len(small) == 100
    assert set(large.labels) == set(small.labels) == set(KINDS)
    other, _ = equal_numbers(draw(5, of_each=100), control(), 100, seed=1)
    assert (other.counts != large.counts).any()
    assert random_forest_figures(draw(5, of_each=20), control(), 0)["rf_auc"].note == "against 80"


def nothing() -> Cells:
    return Cells(np.zeros_like(control().counts), np.zeros(240), control().labels)


def one_cell() -> Cells:
    return control().take(np.zeros(240, dtype=int))


@pytest.mark.parametrize("make", [nothing, one_cell, real], ids=["no counts", "one cell", "the real cells themselves"])
def test_odd_cells_have_figures_too(make) -> None:
    odd = relabelled(make(), control().labels)
    found = all_figures(real(), odd) | memorising_figures(odd, control(), real())
    for name, figure in found.items():
        assert np.isfinite([figure.value, figure.low, figure.high]).all(), name
        assert figure.low <= figure.value <= figure.high, name
    assert 0 <= train_on_synthetic_test_on_real(odd, real(), 0).value <= 1
    two_genes = [Cells(cells.counts[:, :2], cells.library_sizes, cells.labels) for cells in (real(), odd)]
    assert all(np.isfinite(figure.value) for figure in all_figures(*two_genes).values())
    with pytest.raises(UserError, match="nothing to compare"):
        lisi_figure(one_cell(), one_cell())


# ---- real cells


def test_real_cells_are_no_fault() -> None:
    _, test, control = pbmc()
    forests = random_forest_figures(test, control, 0)
    assert all(0.42 <= figure.value <= 0.56 for figure in forests.values())
    assert abs(gene_figures(test, control)["zero_fraction_error"].value) < 0.005
    assert distance_figures(test, control, 0)["mmd"].low <= 0
    assert lisi_figure(test, control)["lisi"].value > 1.8
    figures = marker_figures(test, control)
    assert figures["marker_overlap"].value > 0.7
    assert figures["lfc_slope"].value == pytest.approx(1, abs=0.08)


def test_real_types_are_told() -> None:
    train, test, control = pbmc()
    assert Classifier.fit(train, 0).accuracy(test).value > 0.8
    assert train_on_synthetic_test_on_real(control, test, 0).value > 0.75


def test_components_of_the_training_cells_alone_would_tell_real_from_real() -> None:
    train, test, control = pbmc()
    components = principal_components(train.log_normalised())
    rows = np.random.default_rng(0).permutation(len(test))[:500]
    points = [components.transform(cells.log_normalised()[rows]) for cells in (test, control)]
    assert metrics_expression.forest_figure(*points, seed=0).value > 0.65
