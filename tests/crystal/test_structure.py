"""Cells, distances and formulas, against pymatgen and brute force."""

import numpy as np
import pytest

from tests.support.crystals.data import brute_distances, random_crystal, random_lattice, same
from utils.crystal.structure import (
    Crystal,
    cell_matrix,
    cell_parameters,
    counts_of,
    formula_of,
    min_distance,
    niggli_reduced,
    pair_distances,
    parse_chemical_system,
    parse_formula,
    to_structure,
    volume,
    wrapped,
)
from utils.errors import UserError

pymatgen = pytest.importorskip("pymatgen.core")
Composition, Lattice, Structure = pymatgen.Composition, pymatgen.Lattice, pymatgen.Structure


# ---- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_cell_parameters_are_those_of_pymatgen(seed):
    lattice = random_lattice(seed, left_handed=bool(seed % 2))
    assert np.concatenate(cell_parameters(lattice)) == pytest.approx(Lattice(lattice).parameters, abs=1e-9)
    assert volume(lattice) == pytest.approx(Lattice(lattice).volume)


def test_cell_matrix_keeps_lengths_and_angles():
    lattices = np.stack([random_lattice(seed, left_handed=bool(seed % 2)) for seed in range(20)])
    matrices = cell_matrix(*cell_parameters(lattices))
    assert np.allclose(matrices @ matrices.swapaxes(1, 2), lattices @ lattices.swapaxes(1, 2), atol=1e-8)
    assert (np.linalg.det(matrices) > 0).all()
    assert np.abs(np.triu(matrices, 1)).max() == 0


def test_cell_matrix_of_what_is_no_cell_is_flat():
    flat = cell_matrix(np.array([3.0, 3, 3]), np.array([130.0, 130, 130]))
    assert np.isfinite(flat).all()
    assert volume(flat) < 1e-6


@pytest.mark.parametrize("left_handed", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_niggli_cell_is_that_of_pymatgen_and_the_crystal_the_same(seed, left_handed):
    crystal = random_crystal(seed, left_handed=left_handed)
    reduced = niggli_reduced(crystal)
    expected = Lattice(crystal.lattice).get_niggli_reduced_lattice()
    assert np.sort(cell_parameters(reduced.lattice)[0]) == pytest.approx(np.sort(expected.abc), abs=1e-4)
    assert same(crystal, reduced)
    assert volume(reduced.lattice) == pytest.approx(volume(crystal.lattice))
    assert np.linalg.det(reduced.lattice) > 0
    assert reduced.frac_coords.min() >= 0
    assert reduced.frac_coords.max() < 1
    again = niggli_reduced(reduced)
    assert np.allclose(again.lattice, reduced.lattice, atol=1e-6)
    assert same(again, reduced)


def test_reduction_does_not_mirror_a_chiral_crystal():
    """Distances are blind to a mirror image; the volume that three sites span, with its sign, is not."""
    crystal = Crystal(
        np.array([3, 8, 14, 26]), np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.12, 0], [0, 0, 0.14]]), 10 * np.eye(3)
    )
    for lattice in (crystal.lattice, crystal.lattice[[1, 0, 2]], -crystal.lattice):
        cell = lattice + lattice[[1, 2, 0]] * np.array([[1], [0], [0]])  # not reduced
        moved = Crystal(crystal.atomic_numbers, crystal.frac_coords @ crystal.lattice @ np.linalg.inv(cell), cell)
        reduced = niggli_reduced(moved)
        difference = reduced.frac_coords[1:] - reduced.frac_coords[0]
        arms = (difference - np.round(difference)) @ reduced.lattice
        assert np.linalg.det(arms) == pytest.approx(1.0 * 1.2 * 1.4)


@pytest.mark.parametrize("lattice", [np.diag([3.0, 3, 0]), np.ones((3, 3)), 1e200 * np.eye(3)])
def test_a_cell_that_cannot_be_reduced_is_refused(lattice):
    with pytest.raises(ValueError, match="cannot be reduced"), np.errstate(all="ignore"):
        niggli_reduced(Crystal(np.array([3]), np.zeros((1, 3)), lattice))


@pytest.mark.parametrize("seed", range(5))
def test_distances_are_those_of_pymatgen_and_of_brute_force(seed):
    crystal = niggli_reduced(random_crystal(seed, atoms=4))
    found = pair_distances(crystal)
    assert found == pytest.approx(brute_distances(crystal), abs=1e-9)
    off_diagonal = ~np.eye(len(found), dtype=bool)
    assert found[off_diagonal] == pytest.approx(to_structure(crystal).distance_matrix[off_diagonal], abs=1e-6)
    nearest = min(each.nn_distance for site in to_structure(crystal).get_all_neighbors(15.0) for each in site)
    assert min_distance(crystal) == pytest.approx(nearest, abs=1e-6)


def test_a_site_is_as_far_from_itself_as_its_image():
    assert min_distance(Crystal(np.array([3]), np.zeros((1, 3)), np.diag([2.5, 4, 5]))) == pytest.approx(2.5)


def test_wrapped_coordinates_are_in_the_cell():
    values = np.array([-1e-17, -1e-300, -0.25, 0, 0.5, 1, 1 - 1e-17, -3, 7.75])
    assert wrapped(values).tolist() == [0, 0, 0.75, 0, 0.5, 0, 0, 0, 0.75]
    assert np.isnan(wrapped(np.array([np.nan]))).all()


# ---- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["LiFePO4", "Si", "H2O", "CO", "Co", "C60H60", "Fe2O3", "CH3COOH", "UO2", "OgTs2"])
def test_formulas_are_read_as_pymatgen_reads_them(text):
    expected = {element.Z: int(count) for element, count in Composition(text).items()}
    assert parse_formula(text) == parse_formula(f" {text}\n") == expected


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Ca(OH)2", {20: 1, 8: 2, 1: 2}),
        ("Fe2(SO4)3", {26: 2, 16: 3, 8: 12}),
        ("K4[Fe(CN)6]", {19: 4, 26: 1, 6: 6, 7: 6}),
        ("{[Mg(H2O)6]Cl2}2", {12: 2, 1: 24, 8: 12, 17: 4}),
    ],
)
def test_brackets_in_formulas(text, counts):
    """The order counts too: that of the text, in which atoms are handed to sites."""
    assert list(parse_formula(text).items()) == list(counts.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Li+Fe", "cannot read '[+]Fe'"),
        ("Xx2", "no element Xx"),
        ("Fe0", "Fe0 asks for no atoms"),
        ("", "the formula is empty"),
        ("  ", "the formula is empty"),
        ("Ca(OH", "it is no formula"),
        ("Ca(OH)2)", "it is no formula"),
        ("Ca()2", "it is no formula"),
        ("(5H2O)2", "it is no formula"),
        ("2NaCl", "it is no formula"),
        ("Ca(OH)0", "[)]0 asks for no atoms"),
        ("Ca(OH)0.5", "cannot read '.5'.*without charges or dots"),
        ("CuSO4·5H2O", "cannot read '·5H2O'"),
        ("Li1e2", "cannot read 'e2'"),
        ("H" + "9" * 400, "it is no formula"),
        ("X", "no element X"),
        ("XO2", "no element X"),
        ("D2O", "no element D"),
        ("fe", "cannot read 'fe'"),
        ("Li0.5O", "cannot read '.5O'.*whole numbers"),
        ("LiO2.5", "cannot read '.5'"),
        ("Fe3+", "cannot read '[+]'"),
        ("Li-Fe", "cannot read '-Fe'"),
        ("H₂O", "cannot read '₂O'"),
    ],
)
def test_formulas_that_cannot_be_read_are_refused(text, said):
    with pytest.raises(UserError, match=f"--formula.*{said}"):
        parse_formula(text, "--formula")


def test_chemical_systems():
    assert parse_chemical_system("Li-Fe-O") == parse_chemical_system("O - Li-Fe") == [3, 8, 26]
    assert parse_chemical_system("Si") == [14]


@pytest.mark.parametrize(
    ("text", "said"),
    [("Li+Fe", "no element 'Li[+]Fe'"), ("Li-Xx", "'Xx'"), ("", "''"), ("Li-", "''"), ("O-Li-O", "twice")],
)
def test_chemical_systems_that_cannot_be_read_are_refused(text, said):
    with pytest.raises(UserError, match=f"--chemical_system.*{said}"):
        parse_chemical_system(text)


@pytest.mark.parametrize("text", ["LiFePO4", "Si8", "Na4Cl4", "Fe4O6"])
def test_formula_units(text):
    numbers = np.random.default_rng(0).permutation(
        [n for n, count in parse_formula(text).items() for _ in range(count)]
    )
    assert Composition(formula_of(numbers)) == Composition(text).reduced_composition
    assert parse_formula(formula_of(numbers)) == counts_of(numbers)
