"""Distances of type distributions, and means over seeds."""

import numpy as np
import pytest

from utils.evaluation.figures import Figure, Group, mean_of, over_seeds
from utils.expression.evaluation.figures import type_distribution


def test_distance_of_type_distributions():
    """Half the sum of the differences: 60, 40, 0 per cent against 20, 60, 20 is 40 per cent."""
    told = np.array(["A"] * 60 + ["B"] * 40, dtype=object)
    real = np.array(["A"] * 10 + ["B"] * 30 + ["C"] * 10, dtype=object)
    figure = type_distribution(told, real)
    assert figure.value == pytest.approx(0.4)
    assert figure.low < 0.4 < figure.high
    assert type_distribution(real, real).value == 0
    assert type_distribution(np.full(9, "D", dtype=object), real).value == pytest.approx(1)


def test_mean_over_seeds():
    figures = [Figure(value, value - 0.1, value + 0.3, 50, "DeLong", "against 50") for value in (0.5, 0.7, 0.9)]
    mean = mean_of(figures)
    assert (mean.value, mean.low, mean.high, mean.num_samples) == (pytest.approx(0.7), 0.5, 0.9, 50)
    assert mean.interval == "lowest and highest of 3 seeds"
    assert mean.note == "std 0.2; of one seed 0.6 to 1 by DeLong; against 50"
    trials = [[Group("A", {"x": figures[0], "y": figures[0]}, {})], [Group("A", {"x": figures[2]}, {"y": "too few"})]]
    (group,) = over_seeds(trials)
    assert group.figures["x"].value == pytest.approx(0.7)
    assert set(group.figures) == {"x"}
    assert group.not_measured == {"y": "too few"}
    assert over_seeds(trials[:1]) == trials[0]
