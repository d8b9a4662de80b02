"""Figures of crystals whose values are known: coverage, distributions, what was asked for, and energies."""

import math
import time

import numpy as np
import pytest

from tests.support.crystals.known import GARBAGE, NACL, NACL_IN_CSCL, NEEDLE, SRTIO3, cubes, rotated, supercell
from utils.crystal.evaluation import metrics as metrics_crystals
from utils.crystal.structure import Crystal, parse_formula
from utils.errors import UserError


@pytest.mark.parametrize(
    ("formula", "valid"),
    [
        *[("NaCl", True), ("NaCl2", False), ("Na2Cl", False), ("SrTiO3", True), ("Na4Cl4", True), ("LiFePO4", True)],
        *[("Fe", True), ("CuZn", True), ("C60", True)],  # one element; metals
        *[("Og", True), ("OgO2", False), ("HeO", False)],  # without data
        ("FeMnReOsRuNiCoCrVWO2", False),  # billions of oxidation states
    ],
)
def test_compositional_validity(formula: str, valid: bool) -> None:
    counts = parse_formula(formula)
    numbers = np.repeat(list(counts), list(counts.values()))
    started = time.process_time()
    assert metrics_crystals.is_compositionally_valid(numbers) is valid
    assert time.process_time() - started < 5


# ---- coverage and distributions


def test_structure_fingerprint_counts_neighbours() -> None:
    # Na has 6 Cl at a / 2 = 2.82, and nothing nearer or up to 3.99: the density over spheres integrates to 6.
    both = metrics_crystals.structure_fingerprint(NACL).reshape(2, -1)
    radii = metrics_crystals.RADII
    shell = (radii > 2) & (radii < 3.4)
    counts = (both * 4 * np.pi * radii**2)[:, shell].sum(axis=1) * 0.1
    assert counts == pytest.approx([6, 6 * (3.16 - 0.93)], rel=0.02)  # electronegativities of Cl and Na
    assert both[:, radii < 1.9].max() < 1e-3


def test_coverage_sees_modes_that_are_missing_and_samples_that_are_off() -> None:
    salts = [NACL._replace(lattice=(5.5 + 0.01 * row) * np.eye(3)) for row in range(30)]
    reference = [*cubes(30), *salts]
    half = metrics_crystals.coverage_figures(cubes(30), reference)
    assert half["coverage_recall"].value == pytest.approx(0.5)
    assert half["coverage_precision"].value == 1
    off = [each._replace(lattice=each.lattice * 2) for each in salts]
    broken = metrics_crystals.coverage_figures([*reference, *off, *GARBAGE.values(), NEEDLE], reference)
    assert broken["coverage_precision"].value == pytest.approx(60 / (60 + 30 + len(GARBAGE) + 1))
    assert broken["coverage_recall"].value == 1
    assert broken["amsd_precision"].value > half["amsd_precision"].value
    none = metrics_crystals.coverage_figures(list(GARBAGE.values()), reference)
    assert {name: figure.value for name, figure in none.items()} == {"coverage_recall": 0, "coverage_precision": 0}


def test_density_and_distances_of_distributions() -> None:
    assert metrics_crystals.density(NACL) == pytest.approx(2.16, abs=0.01)  # the mineral's
    assert metrics_crystals.density(SRTIO3) == pytest.approx(5.12, abs=0.01)
    figures = metrics_crystals.wasserstein_figures([NACL] * 4 + [GARBAGE["flat"]], [NACL, SRTIO3])
    assert figures["wasserstein_density"].value == pytest.approx((5.117 - 2.164) / 2, abs=0.01)
    assert figures["wasserstein_num_elements"].value == pytest.approx(0.5)
    assert figures["wasserstein_num_atoms"].value == pytest.approx(1.5)
    assert figures["wasserstein_num_atoms"].num_samples == 4
    assert metrics_crystals.wasserstein_figures([GARBAGE["flat"]], [NACL]) == {}


# ---- what was asked for


def test_asked_for_formulas_and_elements() -> None:
    crystals = [NACL, SRTIO3, NACL_IN_CSCL]
    asked = [{17: 2, 11: 2}, parse_formula("SrTiO2"), parse_formula("NaCl")]
    assert metrics_crystals.formula_match(crystals, asked).value == pytest.approx(2 / 3)
    assert metrics_crystals.chemical_system_match(crystals, [[11, 17], [8, 22], [11, 17, 8]]).value == pytest.approx(
        1 / 3
    )


def test_cubes() -> None:
    assert metrics_crystals.is_cubic(NACL)
    assert metrics_crystals.is_cubic(rotated(SRTIO3))
    assert metrics_crystals.is_cubic(NACL._replace(lattice=np.diag([5.0, 5.0, 5.1])))
    assert not metrics_crystals.is_cubic(NACL._replace(lattice=np.diag([5.0, 5.0, 5.2])))
    primitive = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 2.0  # three angles of 60 degrees
    assert not metrics_crystals.is_cubic(NACL._replace(lattice=primitive))


def test_energies_by_ases_calculators() -> None:
    from ase.build import bulk
    from ase.calculators.emt import EMT

    copper = bulk("Cu", cubic=True)
    crystal = Crystal(copper.numbers, copper.get_scaled_positions(), np.asarray(copper.cell))
    copper.calc = EMT()
    found = metrics_crystals.energies([crystal, NACL, supercell(crystal), *GARBAGE.values()], EMT())
    expected = copper.get_potential_energy() / 4
    # EMT knows no Na, and says so with an exception.
    assert found == [pytest.approx(expected), None, pytest.approx(expected), *[None] * len(GARBAGE)]


def test_a_calculator_of_the_users(tmp_path, monkeypatch) -> None:
    assert type(metrics_crystals.load_calculator("ase.calculators.lj:LennardJones")).__name__ == "LennardJones"
    (tmp_path / "broken_calculator.py").write_text("def make():\n    raise OSError('no weights')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for text, message in {
        "ase.calculators.lj": "write package.module:factory",
        "no_such_module:make": "No module named 'no_such_module'",
        "ase.calculators.lj:nothing": "nothing",
        "broken_calculator:make": "OSError: no weights",
        "builtins:dict": "returns dict",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            metrics_crystals.load_calculator(text)
        assert str(error.value).startswith(f"--calculator {text}")


def test_energy_above_a_hull_drawn_by_hand() -> None:
    entries = [({11: 2}, -1.0), ({17: 1}, -2.0), ({11: 1, 17: 1}, -3.5), ({11: 1, 17: 3}, -2.0), ({8: 2}, -5.0)]
    above = metrics_crystals.energy_above_hull
    assert above({11: 1, 17: 1}, -3.4, entries) == pytest.approx(0.1)
    assert above({11: 4, 17: 4}, -3.7, entries) == pytest.approx(-0.2)  # below the hull
    # Half way from NaCl to Cl: a quarter of Na and three of Cl, on the line from -3.5 to -2.
    assert above({11: 1, 17: 3}, -2.0, entries) == pytest.approx(0.75)
    assert above({11: 1}, -0.5, entries) == pytest.approx(0.5)
    assert above({11: 1, 19: 1}, -3.0, entries) is None
    assert above({19: 1}, -3.0, []) is None
    assert not math.isnan(above({8: 1}, -5.0, entries))
