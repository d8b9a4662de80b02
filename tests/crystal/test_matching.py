"""Validity of structures, and which crystals are the same."""

import numpy as np
import pytest

from tests.support.crystals.known import (
    GARBAGE,
    NACL,
    NACL_IN_CSCL,
    NEEDLE,
    ONE,
    SAME,
    SRTIO3,
    Constant,
    other_cell,
    real_crystals,
    rotated,
    supercell,
)
from utils.crystal.evaluation import metrics as metrics_crystals
from utils.crystal.matching import is_match, is_structurally_valid, match_rmsd, novel, unique
from utils.crystal.structure import Crystal

# ---- validity


def test_valid_structures_and_the_bounds() -> None:
    assert all(is_structurally_valid(each) for each in (NACL, NACL_IN_CSCL, SRTIO3, other_cell(SRTIO3), NEEDLE))
    pair = Crystal(np.array([1, 1]), np.array([[0, 0, 0], [0, 0, 0.5]]), np.diag([4.0, 4, 1.02]))
    assert is_structurally_valid(pair)  # 0.51 Angstrom
    assert not is_structurally_valid(pair._replace(lattice=np.diag([4.0, 4, 0.98])))
    near_across = pair._replace(frac_coords=np.array([[0, 0, 0.02], [0, 0, 0.98]]), lattice=np.diag([4.0, 4, 10]))
    assert not is_structurally_valid(near_across)  # 0.4 Angstrom through the face
    one = Crystal(np.array([1]), ONE, 0.1 ** (1 / 3) * np.eye(3))
    assert is_structurally_valid(one._replace(lattice=one.lattice * 1.01))
    assert not is_structurally_valid(one._replace(lattice=one.lattice * 0.99))


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_invalid_and_raises_nothing(what: str) -> None:
    crystal = GARBAGE[what]
    assert not is_structurally_valid(crystal)
    assert metrics_crystals.structure_fingerprint(crystal) is None
    assert match_rmsd(crystal, crystal) is None
    assert not is_match(crystal, NACL)
    metrics_crystals.is_compositionally_valid(crystal.atomic_numbers)
    metrics_crystals.is_cubic(crystal)
    assert metrics_crystals.energies([crystal], Constant()) == [None]
    assert metrics_crystals.formula_match([crystal], [{14: 1}]).value == 0
    assert unique([crystal, crystal]).tolist() == [True, True]
    assert novel([crystal], [crystal]).tolist() == [True]


@pytest.mark.parametrize("name", ["perov_5", "mp_20_biternary"])
def test_real_crystals_are_valid_and_near_each_other(name: str) -> None:
    crystals = real_crystals(name, 50)
    assert np.mean([is_structurally_valid(each) for each in crystals]) >= 0.98
    assert np.mean([metrics_crystals.is_compositionally_valid(each.atomic_numbers) for each in crystals]) > 0.8
    figures = metrics_crystals.coverage_figures(crystals, crystals)
    assert figures["coverage_recall"].value == figures["coverage_precision"].value == 1
    assert figures["amsd_recall"].value == pytest.approx(0, abs=1e-6)
    held_out = metrics_crystals.coverage_figures(crystals[:25], crystals[25:], crystals[:25])
    assert held_out["coverage_precision"].value == pytest.approx(0.95, abs=0.04)  # 24 of 25: what 0.95 means


# ---- matching


@pytest.mark.parametrize("crystal", [NACL, SRTIO3], ids=["NaCl", "SrTiO3"])
@pytest.mark.parametrize("change", SAME)
def test_the_same_crystal_matches_and_has_the_same_fingerprints(crystal: Crystal, change: str) -> None:
    copy = SAME[change](crystal)
    assert match_rmsd(copy, crystal) == pytest.approx(0, abs=1e-5)
    assert is_match(crystal, copy)
    np.testing.assert_allclose(*metrics_crystals.fingerprints([copy, crystal]), atol=1e-8)


def test_different_crystals_do_not_match() -> None:
    assert match_rmsd(NACL, NACL_IN_CSCL) is None  # one composition, two structures
    assert not is_match(NACL, NACL_IN_CSCL)
    assert match_rmsd(NACL, NACL._replace(atomic_numbers=np.array([19] * 4 + [17] * 4))) is None
    exchanged = SRTIO3._replace(atomic_numbers=np.array([22, 38, 8, 8, 8]))
    fingerprints = metrics_crystals.fingerprints([SRTIO3, exchanged, NACL, NACL_IN_CSCL])
    for a, b in ((0, 1), (2, 3)):  # the first pair has the same sites
        assert np.abs(fingerprints[a] - fingerprints[b]).max() > 0.01


def test_rmsd_of_a_known_displacement() -> None:
    # One of five sites moves by d: without their common shift, the mean square is d^2 (1 / 5 - 1 / 25).
    moved = SRTIO3.frac_coords.copy()
    moved[1, 2] += 0.05
    distance = 0.05 * 3.905
    expected = distance * (1 / 5 - 1 / 25) ** 0.5 / (3.905**3 / 5) ** (1 / 3)
    assert match_rmsd(SRTIO3._replace(frac_coords=moved), SRTIO3) == pytest.approx(expected, rel=1e-3)


def test_unique_and_novel() -> None:
    broken = GARBAGE["all in one place"]
    crystals = [NACL, NACL_IN_CSCL, supercell(NACL), SRTIO3, broken, rotated(NACL_IN_CSCL), broken, other_cell(SRTIO3)]
    assert unique(crystals).tolist() == [True, True, False, True, True, False, True, False]
    training = [broken, rotated(NACL_IN_CSCL), *GARBAGE.values()]
    assert novel(crystals, training).tolist() == [True, False, True, True, True, False, True, True]
    assert novel(crystals, []).all()
    assert unique([]).shape == (0,)
