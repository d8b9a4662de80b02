"""From predictions to crystals: they come back, have their composition, and broken ones are crystals all the same."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.support.crystals.models import SIZES, batch_of, crystals, perfect
from tests.support.crystals.sets import MAX_ATOMS, normals
from utils.crystal.codec import assigned, crystals_of
from utils.crystal.structure import MAX_ATOMIC_NUMBER, cell_parameters
from utils.crystal.vae.network import CrystalPrediction, frac_vectors


@pytest.mark.parametrize("radius", [1e-3, 1.0, 50.0])
def test_crystals_come_back_from_their_prediction(radius):
    batch = batch_of(crystals(), MAX_ATOMS)
    found = crystals_of(perfect(batch, radius), batch["attention_mask"])
    for mine, its in zip(found, crystals(), strict=True):
        assert mine.atomic_numbers.tolist() == its.atomic_numbers.tolist()
        difference = mine.frac_coords - its.frac_coords
        assert np.abs(difference - np.round(difference)).max() < 1e-5
        assert 0 <= mine.frac_coords.min() <= mine.frac_coords.max() < 1
        for ours, theirs in zip(cell_parameters(mine.lattice), cell_parameters(its.lattice), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_all_around_the_circle():
    """Every quadrant, both sides of the edge, and what rounds to it."""
    coords = torch.tensor([0.0, 1e-9, 0.01, 0.25, 0.4999, 0.5, 0.5001, 0.75, 0.99, 1 - 1e-7])
    vectors = frac_vectors(coords.double()).float()
    extra = torch.tensor([[1.0, -1e-12], [1.0, -0.0], [1.0, 0.0]])  # a hair before the edge, and on it
    vectors = torch.cat([vectors, extra])[:, None].expand(-1, 3, -1)[None]
    prediction = CrystalPrediction(torch.zeros(1, 13, 119), vectors, torch.ones(1, 3), torch.ones(1, 3))
    decoded = prediction.frac_coords()
    assert 0 <= decoded.min() <= decoded.max() < 1
    difference = decoded[0, :, 0].double() - torch.cat([coords.double(), torch.zeros(3)])
    assert (difference - difference.round()).abs().max() < 1e-6
    (crystal,) = crystals_of(prediction, torch.ones(1, 13, dtype=torch.bool))
    assert 0 <= crystal.frac_coords.min() <= crystal.frac_coords.max() < 1


def best_by_brute_force(log_probs: np.ndarray, counts: dict[int, int]) -> float:
    wanted = [number for number, count in counts.items() for _ in range(count)]
    sites = np.arange(len(wanted))
    return max(log_probs[sites, np.array(order) - 1].sum() for order in set(itertools.permutations(wanted)))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_assignment(seed):
    """Of all ways to hand the elements out; the most probable element of each site alone gives other counts."""
    generator = np.random.default_rng(seed)
    counts = [{8: 3, 26: 1, 3: 2}, {1: 1, 118: 1}, {22: 5}, {5: 2, 7: 2, 9: 2}, {38: 1, 22: 1, 8: 3}, {2: 1}][seed]
    log_probs = generator.normal(0, 2, (sum(counts.values()), MAX_ATOMIC_NUMBER))
    found = assigned(log_probs, counts)
    assert Counter(found.tolist()) == counts
    total = log_probs[np.arange(len(found)), found - 1].sum()
    assert total == pytest.approx(best_by_brute_force(log_probs, counts))


def test_impossible_elements_are_handed_out_last():
    """-inf where another way is left, and where none is; NaN everywhere."""
    log_probs = np.log(np.full((3, MAX_ATOMIC_NUMBER), 0.1))
    log_probs[0, 8 - 1] = -np.inf
    assert assigned(log_probs, {8: 2, 3: 1}).tolist() == [3, 8, 8]
    log_probs[:, 8 - 1] = -np.inf
    assert Counter(assigned(log_probs, {8: 2, 3: 1}).tolist()) == {8: 2, 3: 1}
    assert Counter(assigned(np.full((3, MAX_ATOMIC_NUMBER), np.nan), {8: 2, 3: 1}).tolist()) == {8: 2, 3: 1}


def test_clamped_crystals_have_their_composition():
    batch = batch_of(crystals(), MAX_ATOMS)
    counts = [{8: 3, 26: 2}, {1: 20}, {92: 1}, {3: 4, 9: 4}]
    prediction = perfect(batch)._replace(element_logits=normals(4, MAX_ATOMS, MAX_ATOMIC_NUMBER + 1))
    prediction.element_logits[..., 0] = 1e3  # that of padding, which never counts
    found = crystals_of(prediction, batch["attention_mask"], counts)
    assert [Counter(crystal.atomic_numbers.tolist()) for crystal in found] == counts
    assert all(crystal.atomic_numbers.min() > 0 for crystal in crystals_of(prediction, batch["attention_mask"]))


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("counts", [None, [{8: 3, 26: 2}, {1: 20}, {92: 1}, {3: 4, 9: 4}]])
def test_broken_predictions_are_crystals_all_the_same(value, counts):
    """What a diverged model gives decodes to something; whether it is valid is for others to say."""
    batch = batch_of(crystals(), MAX_ATOMS)
    prediction = perfect(batch)
    for tensor in prediction:
        tensor[:2] = value
    with np.errstate(all="ignore"):
        found = crystals_of(prediction, batch["attention_mask"], counts)
    assert [len(crystal.atomic_numbers) for crystal in found] == list(SIZES)
    for crystal in found:
        assert 1 <= crystal.atomic_numbers.min() <= crystal.atomic_numbers.max() <= MAX_ATOMIC_NUMBER
    if counts:
        assert [Counter(crystal.atomic_numbers.tolist()) for crystal in found] == counts
