"""Distances of type distributions."""

import numpy as np
import pytest

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
