"""Crystals as users have them, against pymatgen and brute force: every bad-input case is a real file built here."""

import csv
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data import DATA
from tests.support.processes import ROOT
from utils.crystal.data import cif as crystal_cif
from utils.crystal.data.cif import crystal_of_cif, parse_row, parse_rows
from utils.crystal.data.table import column_array, load_crystals, make_table
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
CifWriter = pytest.importorskip("pymatgen.io.cif").CifWriter
StructureMatcher = pytest.importorskip("pymatgen.analysis.structure_matcher").StructureMatcher

CRYSTALS = DATA / "crystals"
needs_real_data = pytest.mark.skipif(not CRYSTALS.is_dir(), reason="real data is not here")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """No test talks to the hub or writes to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def random_lattice(seed: int, left_handed: bool = False) -> np.ndarray:
    """Any cell that is not too flat: long, short, sharp, blunt."""
    generator = np.random.default_rng(seed)
    while True:
        lattice = generator.normal(0, 1, (3, 3)) * generator.uniform(2, 9, (3, 1))
        if (np.linalg.det(lattice) < 0) != left_handed:
            lattice[0] *= -1
        if volume(lattice) > 0.15 * np.linalg.norm(lattice, axis=1).prod():
            return lattice


def random_crystal(seed: int, atoms: int = 5, left_handed: bool = False) -> Crystal:
    """Sites at least 1 Angstrom apart, by pymatgen's distances."""
    generator = np.random.default_rng(1000 + seed)
    lattice = random_lattice(seed, left_handed) * 1.5
    numbers = generator.choice([3, 8, 14, 26, 57], atoms)
    while True:
        frac_coords = generator.random((atoms, 3))
        distances = Lattice(lattice).get_all_distances(frac_coords, frac_coords)
        if (distances + 9 * np.eye(atoms)).min() > 1:
            return Crystal(numbers, frac_coords, lattice)


def brute_distances(crystal: Crystal, reach: int = 2) -> np.ndarray:
    """Shortest distances over 5 x 5 x 5 cells, one by one."""
    count = len(crystal.atomic_numbers)
    shortest = np.full((count, count), np.inf)
    for i, j in product(range(count), repeat=2):
        for cell in product(range(-reach, reach + 1), repeat=3):
            if i != j or any(cell):
                vector = (crystal.frac_coords[i] - crystal.frac_coords[j] + cell) @ crystal.lattice
                shortest[i, j] = min(shortest[i, j], np.linalg.norm(vector))
    return shortest


def same(a: Crystal, b: Crystal, tolerance: float = 1e-3) -> bool:
    """Whether pymatgen finds the same structure, sites within `tolerance` of the length per atom."""
    matcher = StructureMatcher(ltol=1e-3, stol=0.05, angle_tol=0.1, primitive_cell=False, scale=False)
    found = matcher.get_rms_dist(to_structure(a), to_structure(b))
    return found is not None and found[1] < tolerance


def crystal_of(structure) -> Crystal:
    return Crystal(np.array(structure.atomic_numbers), structure.frac_coords, structure.lattice.matrix)


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


def test_a_table_keeps_coordinates_in_the_cell():
    """1 - 1e-9 is below one, and one in float32."""
    table = make_table([Crystal(np.array([3]), np.array([[1 - 1e-9, 0.5, 0]]), 4 * np.eye(3))])
    assert table.frac_coords.max() < 1


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


# ---- sources --------------------------------------------------------------------------------------------------------

# fmt: off
STRUCTURES = {
    "NaCl": Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "CsCl": Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "wurtzite": Structure.from_spacegroup("P6_3mc", Lattice.hexagonal(3.25, 5.2), ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]),
    "quartz": Structure.from_spacegroup("P3_221", Lattice.hexagonal(4.913, 5.405), ["Si", "O"], [[0.4697, 0, 2 / 3], [0.4135, 0.2669, 0.7858]]),
    "rutile": Structure.from_spacegroup("P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]]),
    "triclinic": Structure(Lattice.from_parameters(4.1, 5.3, 6.2, 81, 97, 104), ["Li", "Fe", "O", "O"], [[0.1, 0.2, 0.3], [0.62, 0.71, 0.83], [0.45, 0.15, 0.55], [0.9, 0.55, 0.1]]),
}
# fmt: on
GAPS = [1.5, None, 0.0, float("nan"), -2.25, 3.0]


def cif(structure, symmetrised: bool = False) -> str:
    return str(CifWriter(structure, symprec=0.01 if symmetrised else None))


def tensor_row(structure) -> dict:
    return {
        "atomic_numbers": list(structure.atomic_numbers),
        "frac_coords": structure.frac_coords.reshape(-1).tolist(),
        "lattice": structure.lattice.matrix.reshape(-1).tolist(),
    }


def write_parquet(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def tensor_parquet(folder: Path) -> str:
    ids = {"material_id": list(STRUCTURES), "gap": GAPS}
    return write_parquet(
        folder / "t.parquet",
        [
            tensor_row(each) | {"material_id": ids["material_id"][i], "gap": GAPS[i]}
            for i, each in enumerate(STRUCTURES.values())
        ],
    )


def cif_parquet(folder: Path) -> str:
    return write_parquet(
        folder / "c.parquet",
        [
            {"material_id": name, "cif": cif(each, True), "gap": gap}
            for (name, each), gap in zip(STRUCTURES.items(), GAPS)
        ],
    )


def cif_csv(folder: Path) -> str:
    rows = [
        {"": i, "material_id": name, "cif": cif(each), "gap": gap}
        for i, ((name, each), gap) in enumerate(zip(STRUCTURES.items(), GAPS))
    ]
    return write_csv(folder / "c.csv", rows)


def cif_folder(folder: Path, symmetrised: bool = False) -> str:
    (folder / "cifs" / "below").mkdir(parents=True)
    for i, (name, structure) in enumerate(STRUCTURES.items()):
        (folder / "cifs" / ("below" if i % 2 else "") / f"{name}.cif").write_text(cif(structure, symmetrised))
    return str(folder / "cifs")


SOURCES = {
    "tensor parquet": tensor_parquet,
    "cif parquet": cif_parquet,
    "cif csv": cif_csv,
    "folder": cif_folder,
    "folder, symmetrised": lambda folder: cif_folder(folder, True),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_crystals(source, tmp_path):
    table = load_crystals(SOURCES[source](tmp_path))
    found = dict(zip(table.columns["material_id"], table.crystals(), strict=True))
    assert set(found) == set(STRUCTURES)
    assert table.skipped == []
    for name, structure in STRUCTURES.items():
        assert same(found[name], crystal_of(structure)), name
        assert volume(found[name].lattice) == pytest.approx(structure.volume, rel=1e-5)
        assert formula_of(
            found[name].atomic_numbers
        ) == structure.composition.reduced_composition.alphabetical_formula.replace(" ", "").replace("1", "")
    if "folder" not in source:
        assert table.columns["gap"].dtype == np.float64
        assert np.array_equal(table.columns["gap"], [1.5, np.nan, 0, np.nan, -2.25, 3], equal_nan=True)


def test_padding_and_parts_of_a_table(tmp_path):
    table = load_crystals(tensor_parquet(tmp_path), max_atoms=12)
    assert table.atomic_numbers.shape == (len(STRUCTURES), 12)
    assert ((table.atomic_numbers > 0).sum(axis=1) == table.num_atoms).all()
    assert table.frac_coords[table.atomic_numbers == 0].max() == 0
    mask = table.num_atoms > 4
    part = table.take(mask)
    assert len(part) == mask.sum()
    assert list(part.columns["material_id"]) == list(table.columns["material_id"][mask])
    assert same(part.crystal(1), table.crystal(int(np.flatnonzero(mask)[1])))
    assert table.identity() == table.take(np.arange(len(table))).identity() != part.identity()


def test_split_is_a_column(tmp_path):
    rows = [
        tensor_row(each) | {"material_id": name, "split": "train" if i % 3 else "val"}
        for i, (name, each) in enumerate(STRUCTURES.items())
    ]
    path = write_parquet(tmp_path / "s.parquet", rows)
    assert list(load_crystals(path, "val").columns["material_id"]) == ["NaCl", "quartz"]
    assert len(load_crystals(path, "train")) == 4
    assert len(load_crystals(path)) == 6
    with pytest.raises(UserError, match=r"--data: .*no rows of split test; its column split says train, val"):
        load_crystals(path, "test", flag="--data")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_split_can_be_a_number(tmp_path, kind):
    rows = [{"cif": cif(STRUCTURES["CsCl"]), "split": i % 2} for i in range(4)]
    path = (write_csv if kind == "csv" else write_parquet)(tmp_path / f"s.{kind}", rows)
    assert len(load_crystals(path, "1")) == 2


def test_large_crystals_are_left_out_and_counted(tmp_path, caplog):
    table = load_crystals(tensor_parquet(tmp_path), max_atoms=6, max_skipped_fraction=0.0)
    assert len(table) == 4
    assert {each["id"] for each in table.skipped} == {"NaCl", "quartz"}
    assert all("more than --max_atoms 6" in each["reason"] for each in table.skipped)
    assert "2 of 6 crystals are skipped" in caplog.text
    with pytest.raises(UserError, match=r"6 of 6 crystals .* cannot be used .*--max_atoms 1"):
        load_crystals(str(tmp_path / "t.parquet"), max_atoms=1)


def test_first_rows_only(tmp_path):
    assert list(load_crystals(tensor_parquet(tmp_path), max_samples=2).columns["material_id"]) == ["NaCl", "CsCl"]


def test_ids_and_formulas_of_a_csv_stay_text(tmp_path):
    """InF is indium fluoride and no infinity, 0042 an id."""
    rows = [
        {
            "material_id": f"004{i}",
            "cif": cif(STRUCTURES["CsCl"]),
            "pretty": ["InF", "NaN", "1e5"][i],
            "label": ["CsCl", "3", ""][i],
        }
        for i in range(3)
    ]
    table = load_crystals(write_csv(tmp_path / "ids.csv", rows))
    assert list(table.columns["material_id"]) == ["0040", "0041", "0042"]
    assert list(table.columns["label"]) == ["CsCl", "3", None]
    rows[2]["pretty"] = "LiF"
    table = load_crystals(write_csv(tmp_path / "ids.csv", rows))
    assert list(table.columns["pretty"]) == ["InF", "NaN", "LiF"]


def test_a_csv_as_excel_saves_it(tmp_path):
    path = Path(write_csv(tmp_path / "bom.csv", [{"cif": cif(STRUCTURES["CsCl"]), "gap": 1}]))
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_crystals(str(path)).columns["gap"].tolist() == [1.0]


def test_a_csv_with_a_very_long_cif(tmp_path):
    text = cif(STRUCTURES["CsCl"]) + "\n" + "# a comment\n" * 12000
    assert len(text) > 131072
    assert len(load_crystals(write_csv(tmp_path / "long.csv", [{"cif": text}]))) == 1


def test_columns_with_gaps():
    assert np.array_equal(column_array([1, None, 2.5, float("nan")]), [1, np.nan, 2.5, np.nan], equal_nan=True)
    assert np.isnan(column_array([None, None])).all()
    assert column_array(["a", None]).tolist() == ["a", None]


def test_a_crystal_may_have_a_cif_or_arrays(tmp_path):
    """Rows of one file, with and without processes, for these are handed less than the row."""
    rows = [
        {"cif": None} | tensor_row(STRUCTURES["NaCl"]),
        {"cif": cif(STRUCTURES["CsCl"])} | dict.fromkeys(tensor_row(STRUCTURES["NaCl"])),
    ]
    assert load_crystals(write_parquet(tmp_path / "both.parquet", rows)).num_atoms.tolist() == [8, 2]


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD, SYMMETRISED = cif(STRUCTURES["CsCl"]), cif(STRUCTURES["CsCl"], symmetrised=True)
NO_LOOP = re.sub(r"loop_\n _symmetry_equiv.*?(?=loop_)", "", SYMMETRISED, flags=re.DOTALL)
NO_SYMMETRY = re.sub(r"_symmetry_.*\n", "", NO_LOOP)
ROCK_SALT = re.sub(r"loop_\n _symmetry_equiv.*?(?=loop_)", "", cif(STRUCTURES["NaCl"], True), flags=re.DOTALL)
UNREADABLE = ROCK_SALT.replace("Fm-3m", "'Q q q'").replace("_symmetry_Int_Tables_number   225\n", "")
LAST_SITE = GOOD.strip().splitlines()[-1]

BAD_CIFS = {
    "partial occupancy": (re.sub(r"  1$", "  0.5", GOOD, flags=re.MULTILINE), "occupied in part"),
    "two elements on a site": (GOOD.replace(LAST_SITE, re.sub("1$", "0.5", LAST_SITE) + "\n" + re.sub("1$", "0.5", LAST_SITE).replace("Cl", "Br")), "occupied in part"),
    "no symmetry": (NO_SYMMETRY, "says nothing of symmetry"),
    "symmetry in a comment": ("# _symmetry_ is not said, nor _space_group\n" + NO_SYMMETRY, "says nothing of symmetry"),
    "unreadable space group": (UNREADABLE, "says nothing of symmetry"),
    "unknown space group": (UNREADABLE.replace("'Q q q'", "?"), "says nothing of symmetry"),
    "no lengths": (re.sub(r"_cell_length_.*\n", "", GOOD), "no _cell_length_a"),
    "no angle": (re.sub(r"_cell_angle_beta.*\n", "", GOOD), "no _cell_angle_beta"),
    "negative length": (re.sub(r"(_cell_length_a +)", r"\1-", GOOD), "_cell_length_a is -4.12"),
    "zero length": (re.sub(r"_cell_length_a.*", "_cell_length_a 0", GOOD), ""),
    "angles of no cell": (re.sub(r"(_cell_angle_\w+).*", r"\1 130", GOOD), ""),
    "NaN coordinate": (GOOD.replace("0.50000000", "nan"), ""),
    "unknown coordinate": (GOOD.replace("0.50000000", "?"), ""),
    "unknown element": (GOOD.replace("Cs", "Xx"), "no element Xx"),
    "no element, the first letter of which is one": (GOOD.replace("Cs", "Cz"), "no element Cz"),
    "vacancy": (GOOD.replace("Cs", "Vac"), "no element Vac"),
    "duplicated site": (GOOD.strip() + "\n" + LAST_SITE + "\n", "ccupancy"),
    "sites too near": (GOOD.replace("0.50000000", "0.01000000"), "one site twice"),
    "site missing": (GOOD.replace(LAST_SITE, ""), "its sites are Cs, and its _chemical_formula_sum is CsCl"),
    "two crystals": (GOOD + "\n" + GOOD.replace("data_CsCl", "data_again"), "2 blocks"),
    "empty": ("", "the CIF is empty"),
    "white": (" \n", "the CIF is empty"),
    "no CIF": ("hello", "0 blocks"),
    "binary": ("\0\1\2\x7fELF", "0 blocks"),
    "header only": (GOOD[: GOOD.index("loop_")], "0 blocks"),
    "cut within a row": (GOOD.rstrip()[:-20], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CIFS)
def test_bad_cifs_are_skipped_with_their_reason(name, tmp_path, caplog):
    text, reason = BAD_CIFS[name]
    path = write_parquet(
        tmp_path / "bad.parquet", [{"material_id": "good", "cif": GOOD}, {"material_id": "bad", "cif": text}]
    )
    table = load_crystals(path)
    assert len(table) == 1
    assert [(each["row"], each["id"]) for each in table.skipped] == [(1, "bad")]
    assert reason in table.skipped[0]["reason"]
    assert len(table.skipped[0]["reason"]) > 8
    assert table.skipped[0]["reason"] in caplog.text
    with pytest.raises(UserError, match=r"--data: 1 of 2 crystals .*bad.parquet cannot be used \(bad: "):
        load_crystals(path, max_skipped_fraction=0.4, flag="--data")
    path = write_parquet(tmp_path / "all_bad.parquet", [{"material_id": f"bad{i}", "cif": text} for i in range(4)])
    with pytest.raises(UserError, match=r"--data: 4 of 4 crystals .* \(bad0: .*; bad1: .*; bad2: "):
        load_crystals(path, flag="--data")


@pytest.mark.parametrize("cut", range(20, len(SYMMETRISED) - 12, 97))
def test_a_cif_that_ends_early_is_never_another_crystal(cut):
    """Up to the last row, wherever it is cut: at the end of a line too."""
    assert isinstance(parse_row({"cif": SYMMETRISED[:cut]}, 20), str)


@pytest.mark.parametrize("text", [NO_LOOP, NO_LOOP.replace("Pm-3m", "?"), NO_LOOP.replace("Pm-3m", "'P m -3 m'")])
def test_a_space_group_without_operations_is_enough(text):
    assert same(crystal_of_cif(text), crystal_of(STRUCTURES["CsCl"]))


def test_charges_and_isotopes_are_elements():
    charged = GOOD.replace("  Cs  Cs0", "  Cs1+  Cs0").replace("  Cl  Cl1", "  Cl-  Cl1")
    assert crystal_of_cif(charged).atomic_numbers.tolist() == [55, 17]
    assert crystal_of_cif(GOOD.replace("Cs", "D")).atomic_numbers.tolist() == [1, 17]
    assert crystal_of_cif(GOOD.replace("'Cs1 Cl1'", "?")).atomic_numbers.tolist() == [55, 17]


def changed(**values) -> dict:
    return tensor_row(STRUCTURES["CsCl"]) | values


BAD_ARRAYS = {
    "fewer positions": (changed(frac_coords=[0.0, 0, 0]), "2 atoms with 3 coordinates"),
    "broken positions": (changed(frac_coords=[0.0] * 7), "2 atoms with 7 coordinates"),
    "fewer atoms": (changed(atomic_numbers=[55]), "1 atoms with 6 coordinates"),
    "small lattice": (changed(lattice=[4.0] * 6), "6 numbers, which should be nine"),
    "number 0": (changed(atomic_numbers=[55, 0]), "between 1 and 118"),
    "number 200": (changed(atomic_numbers=[200, 17]), "between 1 and 118"),
    "negative number": (changed(atomic_numbers=[-3, 17]), "between 1 and 118"),
    "part of an atom": (changed(atomic_numbers=[55.5, 17.0]), "not a whole number"),
    "NaN number": (changed(atomic_numbers=[55, float("nan")]), "not a whole number"),
    "NaN position": (changed(frac_coords=[0.0, 0, 0, 0.5, 0.5, float("nan")]), "not finite"),
    "infinite position": (changed(frac_coords=[0.0, 0, 0, 0.5, 0.5, float("inf")]), "not finite"),
    "NaN lattice": (changed(lattice=[float("nan")] * 9), "not finite"),
    "flat cell": (changed(lattice=[4.0, 0, 0, 0, 4, 0, 4, 4, 0]), "flat"),
    "endless cell": (changed(lattice=[1e200, 0, 0, 0, 1e200, 0, 0, 0, 1e200]), "larger than numbers are"),
    "no atoms": (changed(atomic_numbers=[], frac_coords=[]), "no atoms"),
    "no lattice": (changed(lattice=None), "no lattice"),
    "no numbers": (changed(atomic_numbers=None), "no atomic_numbers"),
    "duplicated site": (changed(frac_coords=[0.3, 0, 0] * 2), "0.00 Angstrom apart: one site twice?"),
    "duplicated across a face": (changed(frac_coords=[0.0, 0, 0, 0.999, 0, 0]), "0.00 Angstrom apart"),
    "duplicated with a shift": (changed(frac_coords=[0.25, 0, 0, -1.75, 0, 0]), "0.00 Angstrom apart"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_skipped_with_their_reason(name, tmp_path):
    row, reason = BAD_ARRAYS[name]
    table = load_crystals(write_parquet(tmp_path / "bad.parquet", [row, tensor_row(STRUCTURES["CsCl"])]))
    assert len(table) == 1
    assert [(each["row"], each["id"]) for each in table.skipped] == [(0, "0")]
    assert reason in table.skipped[0]["reason"]


def make_nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_text(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BAD_SOURCES = {
    "no such file": (lambda folder: folder / "nothing.parquet", "does not exist; give a folder of CIF"),
    "empty folder": (lambda folder: make_nothing(folder / "nothing"), "holds no crystals; give a folder of CIF"),
    "another kind of file": (lambda folder: make_text(folder / "a.txt", "x"), "holds no crystals"),
    "other columns": (lambda folder: write_parquet(folder / "a.parquet", [{"text": "x", "lattice": [1.0]}]), "has the columns lattice, text; crystals need a column cif, or atomic_numbers, frac_coords, lattice"),
    "other columns, csv": (lambda folder: write_csv(folder / "a.csv", [{"text": "x", "y": 1}]), "has the columns text, y; crystals need"),
    "no rows": (lambda folder: pq.write_table(pa.table({"cif": pa.array([], pa.string())}), folder / "a.parquet") or folder / "a.parquet", "no rows"),
    "no columns": (lambda folder: pq.write_table(pa.table({}), folder / "a.parquet") or folder / "a.parquet", "no rows"),
    "csv of no rows": (lambda folder: make_text(folder / "a.csv", "material_id,cif\n"), "no rows"),
    "empty csv": (lambda folder: make_text(folder / "a.csv", ""), "no rows"),
    "no parquet": (lambda folder: make_text(folder / "a.parquet", "PAR1 or not"), "cannot be read"),
    "empty parquet": (lambda folder: make_text(folder / "a.parquet", ""), "cannot be read"),
    "csv in another encoding": (lambda folder: make_text(folder / "a.csv", "cif,name\nx,Gr\xfcn\n".encode("latin-1")), "cannot be read"),
    "binary csv": (lambda folder: make_text(folder / "a.csv", b"\x80\0\1\2"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_sources_without_crystals_are_refused(name, tmp_path):
    make, said = BAD_SOURCES[name]
    path = str(make(tmp_path))
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        load_crystals(path, flag="--data")
    assert str(refused.value).startswith(f"--data: {path}")


# ---- processes ------------------------------------------------------------------------------------------------------


def test_processes_read_the_same_and_know_nothing_of_torch(tmp_path):
    """In a program of its own that has torch and no guard: neither a fork of it nor the program again."""
    (tmp_path / "cifs.json").write_text(json.dumps([GOOD, SYMMETRISED, "", UNREADABLE] * 30))
    (tmp_path / "program.py").write_text("""
import json, sys
from pathlib import Path

import torch

from utils.crystal.data import cif
from utils.crystal.workers import process_pool

cif.MIN_CIFS_FOR_PROCESSES = 100
rows = [{"cif": text} for text in json.loads(Path(sys.argv[1]).read_text())]
found = cif.parse_rows(rows, 20)
with process_pool(1, "pymatgen.io.cif") as pool:
    pool.schedule(cif.parse_row, (rows[0], 20)).result()
    modules = "[name for name in ('torch', 'datasets', 'spglib') if name in __import__('sys').modules]"
    loaded = pool.schedule(eval, (modules,)).result()
print(json.dumps([loaded, [each if isinstance(each, str) else each.frac_coords.tolist() for each in found]]))
""")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "cifs.json")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    loaded, found = json.loads(result.stdout)
    assert loaded == ["spglib"]
    one_by_one = parse_rows([{"cif": text} for text in (GOOD, SYMMETRISED, "", UNREADABLE)], 20)
    assert found == [each if isinstance(each, str) else each.frac_coords.tolist() for each in one_by_one] * 30


def test_reading_goes_on_where_no_process_can_be_started(monkeypatch, caplog):
    def broken(*_args):
        raise crystal_cif.BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(crystal_cif, "process_pool", broken)
    monkeypatch.setattr(crystal_cif, "MIN_CIFS_FOR_PROCESSES", 2)
    monkeypatch.setattr(crystal_cif.os, "cpu_count", lambda: 2)
    assert all(isinstance(each, Crystal) for each in parse_rows([{"cif": GOOD}] * 3, 20))
    assert "one at a time" in caplog.text


# ---- real data ------------------------------------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize("name", ["perov_5", "mp_20_biternary"])
def test_real_crystals_stay_what_they_are(name):
    path = CRYSTALS / f"{name}.parquet"
    table = load_crystals(str(path), "val", max_samples=60)
    assert len(table) == 60
    rows = {row["material_id"]: row for row in pq.read_table(path, filters=[("split", "=", "val")]).to_pylist()}
    for i in range(0, 60, 6):
        row = rows[table.columns["material_id"][i]]
        crystal = Crystal(
            np.array(row["atomic_numbers"]),
            np.array(row["frac_coords"]).reshape(-1, 3),
            np.array(row["lattice"]).reshape(3, 3),
        )
        assert same(table.crystal(i), crystal)
        assert pair_distances(table.crystal(i)) == pytest.approx(brute_distances(table.crystal(i)), abs=1e-9)
