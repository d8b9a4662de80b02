"""Names and numbers of categories."""

import math

import numpy as np
import pytest

from utils.latents.columns import category_name, category_numbers


@pytest.mark.parametrize(
    ("value", "name"),
    [(225.0, "225"), (225, "225"), ("225", "225"), (1.5, "1.5"), (True, "True"), (None, None), (float("nan"), None),
     (float("inf"), None), ("", None), (np.float64(2), "2"), ("P 1", "P 1")],
)  # fmt: skip
def test_names_of_categories(value, name):
    assert category_name(value) == name
    column = np.array([value, "other"], dtype=object)
    assert category_numbers(column, ["other", "225", "2"])[0] == {"225": 1, "2": 2}.get(name, -1)


def test_names_of_numbers():
    """Lanes 1 and 2 of a file are the categories 1 and 2 of a run."""
    assert [category_name(each) for each in (1.0, 2, "2", math.nan)] == ["1", "2", "2", None]
