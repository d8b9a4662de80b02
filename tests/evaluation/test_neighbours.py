"""Nearest neighbours and copies, against brute force."""

import math

import numpy as np
import pytest
import torch

from tests.support.features import gaussian
from utils.evaluation import figures as metrics_intervals
from utils.evaluation import neighbours as metrics_neighbours


def test_nearest_is_brute_force_in_blocks() -> None:
    queries, base = gaussian(20, 5, 0), gaussian(33, 5, 1)
    distances, rows = metrics_neighbours.nearest(queries, base, block=7)
    expected = torch.stack([(base - query).norm(dim=1) for query in queries])
    torch.testing.assert_close(distances, expected.min(dim=1).values)
    assert rows.tolist() == expected.argmin(dim=1).tolist()


def test_copies_are_found_and_nothing_else() -> None:
    honest = []
    for seed in range(0, 60, 3):
        training, held_out, fresh = (gaussian(count, 8, seed + i) for i, count in enumerate((1000, 400, 400)))
        of_held_out = metrics_neighbours.nearest(held_out, training)[0]
        honest.append(metrics_neighbours.copy_figures(metrics_neighbours.nearest(fresh, training)[0], of_held_out))
    assert np.mean([each["copies"].value for each in honest]) == pytest.approx(0.01, abs=0.005)
    assert np.mean([each["nearest_ratio"].low <= 1 <= each["nearest_ratio"].high for each in honest]) > 0.8
    fresh[:100] = training[:100] + 0.01
    copied = metrics_neighbours.copy_figures(metrics_neighbours.nearest(fresh, training)[0], of_held_out)
    assert copied["copies"].value == pytest.approx(0.25, abs=0.02)
    assert copied["nearest_ratio"].value < 1


def test_rows_are_drawn_from_everywhere() -> None:
    rows = metrics_intervals.rows_at_most(1000, 100)
    assert len(set(rows.tolist())) == 100
    assert rows.max() > 900  # samples may stand in the order of their classes
    assert metrics_intervals.rows_at_most(10, 100).tolist() == list(range(10))
    assert math.isclose(float(metrics_intervals.at_most(torch.arange(1000.0), 100).mean()), 500, abs_tol=100)
