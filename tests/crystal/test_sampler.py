"""Numbers of atoms, and what the model is told of a request."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.support.crystals.random_runs import NUM_ITEMS
from utils.args.columns import parse_conditions
from utils.crystal.cache import CONDITION_KINDS, OF_ATOMS
from utils.crystal.pipeline import load_run
from utils.crystal.sampler import clamped_counts, condition_values, numbers_of_atoms
from utils.errors import UserError

for package in ("pymatgen", "spglib"):
    pytest.importorskip(package)


def test_what_the_model_is_told(runs):
    """Shares of the elements, ones for those that are there, the number as it is, the place of the class."""
    pipeline = load_run(runs / "asked")
    requests = [
        {"composition": text, "band_gap": 1.5, "spacegroup": "P 1"} for text in ("SrTiO3", "Sr2Ti2O6", "O3TiSr")
    ]
    values = condition_values(pipeline, requests)
    assert values["band_gap"].tolist() == [1.5] * 3
    assert values["spacegroup"].tolist() == [2] * 3
    expected = torch.zeros(118)
    expected[[38 - 1, 22 - 1, 8 - 1]] = torch.tensor([0.2, 0.2, 0.6])
    torch.testing.assert_close(values["composition"], expected.expand(3, -1))
    system = condition_values(load_run(runs / "system"), [{"chemical_system": "Sr-Ti-O"}])["chemical_system"]
    assert system.equal((expected > 0).float()[None])


def test_numbers_of_atoms_follow_the_training_set(runs):
    pipeline = load_run(runs / "asked")
    assert pipeline.num_items == NUM_ITEMS
    found = Counter(numbers_of_atoms(pipeline, [{}] * 3000, None, 0).tolist())
    assert set(found) == set(NUM_ITEMS)
    expected = [30 * times for times in NUM_ITEMS.values()]
    assert chisquare([found[number] for number in NUM_ITEMS], expected).pvalue > 1e-3
    found = Counter(numbers_of_atoms(pipeline, [{"composition": "NaCl"}] * 3000, None, 1).tolist())
    assert set(found) == {2, 4, 8}
    assert chisquare([found[number] for number in (2, 4, 8)], [500, 1250, 1250]).pvalue > 1e-3


def test_columns_that_have_a_name_of_the_atoms():
    """--composition could not tell which of the two is meant."""
    with pytest.raises(UserError, match=r"--condition class:composition: .*rename the column"):
        parse_conditions(["class:composition"], CONDITION_KINDS, OF_ATOMS)


def test_counts_of_a_clamped_cell():
    found = clamped_counts([{"composition": "SrTiO3"}, {"composition": "OHH"}], np.array([10, 3]))
    assert found == [{38: 2, 22: 2, 8: 6}, {8: 1, 1: 2}]
    with pytest.raises(UserError, match="--clamp_composition without --composition"):
        clamped_counts([{}], np.array([3]))
