"""The distance of latents."""

import itertools
import math

import pytest

from tests.support.cells.models import normals
from utils.expression.validation import latent_distance


def test_distance_of_latents_by_brute_force():
    first, second = normals(6, 4).numpy(), normals(6, 4, seed=1).numpy()
    costs = [((first - second[list(order)]) ** 2).sum(axis=1).mean() for order in itertools.permutations(range(6))]
    assert latent_distance(first, second) == pytest.approx(math.sqrt(min(costs)), rel=1e-6)
    assert latent_distance(first, first[::-1]) == pytest.approx(0, abs=1e-6)
    assert latent_distance(first, first + 3) == pytest.approx(6)  # of a shift its length
