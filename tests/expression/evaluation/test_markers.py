"""Markers: Welch's t, and types that are too much alike."""

import numpy as np
import pytest

from tests.support.cells.typed import KINDS, NUM_GENES, draw, real
from utils.expression.evaluation import markers as metrics_markers
from utils.expression.evaluation.markers import marker_figures


def test_welch_is_scipys() -> None:
    from scipy.stats import ttest_ind

    values = real().log_normalised().astype(np.float64)
    values[:, 3] = 1.0  # a gene that never changes
    members = np.array(KINDS, dtype=object)[:, None] == real().labels
    part = np.random.default_rng(0).random(len(values)) < 0.5
    difference, t = metrics_markers.welch(values, members, part)
    for row, of_type in enumerate(members):
        first, second = values[of_type & part], values[~of_type & part]
        np.testing.assert_allclose(difference[row], first.mean(axis=0) - second.mean(axis=0), atol=1e-12)
        changing = np.arange(NUM_GENES) != 3
        expected = ttest_ind(first[:, changing], second[:, changing], equal_var=False).statistic
        np.testing.assert_allclose(t[row, changing], np.nan_to_num(expected), rtol=1e-6, atol=1e-6)
    assert t[:, 3] == pytest.approx(0, abs=1e-3)


def test_types_that_are_too_much_alike_have_a_small_slope() -> None:
    slopes = [marker_figures(real(), draw(1, strength=strength))["lfc_slope"].value for strength in (0.5, 1, 1.5)]
    assert slopes[0] < 0.75 < 0.93 < slopes[1] < 1.07 < 1.3 < slopes[2]


def test_markers_take_as_many_cells_of_both() -> None:
    many = draw(5, of_each=200)
    figures = marker_figures(real(), many)
    assert figures["marker_overlap"].num_samples == 240
    first, second, left_out = metrics_markers.matched_by_type(real(), many)
    assert left_out == []
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.counts, real().counts)
    assert figures["lfc_slope"].value == pytest.approx(1, abs=0.1)
