"""What sampling crystals leaves: files that pymatgen and our own reader read back, garbage too, and pictures."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.crystals.models import GARBAGE, random_crystal, save
from utils.crystal.data.table import load_crystals
from utils.crystal.files import any_formula, read_samples, write_cif
from utils.crystal.structure import Crystal, cell_parameters, formula_of, niggli_reduced, to_structure
from utils.errors import UserError

CifParser = pytest.importorskip("pymatgen.io.cif").CifParser


@pytest.mark.parametrize("seed", range(5))
def test_pymatgen_reads_the_cif_that_is_written(seed, tmp_path):
    crystal = random_crystal(seed)
    crystal = crystal._replace(atomic_numbers=np.minimum(crystal.atomic_numbers, 94))  # pymatgen checks radii of CIFs
    write_cif(crystal, tmp_path / "a.cif")
    (structure,) = CifParser(tmp_path / "a.cif", frac_tolerance=0).parse_structures(primitive=False)
    order = np.argsort(crystal.frac_coords[:, 0])  # pymatgen sorts the sites by element
    crystal = crystal._replace(atomic_numbers=crystal.atomic_numbers[order], frac_coords=crystal.frac_coords[order])
    structure.sort(key=lambda site: site.frac_coords[0])
    assert list(structure.atomic_numbers) == crystal.atomic_numbers.tolist()
    assert np.abs(structure.frac_coords - crystal.frac_coords).max() < 1e-7
    expected = np.concatenate(cell_parameters(crystal.lattice))
    assert np.array(structure.lattice.parameters) == pytest.approx(expected, abs=1e-6)
    assert structure.distance_matrix == pytest.approx(to_structure(crystal).distance_matrix, abs=1e-5)
    assert structure.composition.reduced_composition == to_structure(crystal).composition.reduced_composition


def test_every_element_can_be_written(tmp_path):
    numbers = np.arange(1, 119)
    frac_coords = np.stack(np.meshgrid(*[np.arange(5) / 5] * 3), axis=-1).reshape(-1, 3)[:118]
    write_cif(Crystal(numbers, frac_coords, 30 * np.eye(3)), tmp_path / "all.cif")
    symbols = [line.split()[0] for line in (tmp_path / "all.cif").read_text().splitlines()[-118:]]
    assert symbols == [
        to_structure(Crystal(np.array([n]), np.zeros((1, 3)), np.eye(3))).symbol_set[0] for n in numbers
    ]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_can_be_written(name, tmp_path):
    write_cif(GARBAGE[name], tmp_path / "a.cif")
    lines = (tmp_path / "a.cif").read_text().splitlines()
    assert "nan" not in "".join(lines[4:]).lower()
    assert lines[0].startswith("data_")
    assert " " not in lines[0]
    assert lines[len(lines) - len(GARBAGE[name].atomic_numbers) - 1] == "_atom_site_occupancy"


def test_formulas_of_garbage():
    assert any_formula(np.array([14, 8, 8])) == formula_of(np.array([14, 8, 8])) == "O2Si"
    assert any_formula(np.array([0, 200, 8])) == "OX2"
    assert any_formula(np.array([], dtype=np.int64)) == "no atoms"


def test_samples_load_as_a_dataset(tmp_path):
    crystals = [niggli_reduced(random_crystal(seed, atoms=3 + seed)) for seed in range(4)]
    requests = [{"composition": "LiFe", "band_gap": 1.5}, {"chemical_system": "Li-O"}, {"band_gap": 2}, {}]
    folder = save(tmp_path / "samples", crystals, requests)
    table = load_crystals(str(folder / "samples.parquet"))
    assert table.skipped == []
    for found, crystal in zip(table.crystals(), crystals, strict=True):
        assert found.atomic_numbers.tolist() == crystal.atomic_numbers.tolist()
        assert found.frac_coords == pytest.approx(crystal.frac_coords, abs=1e-6)
        assert found.lattice == pytest.approx(crystal.lattice, abs=1e-5)
    assert table.columns["material_id"].tolist() == ["00000", "00001", "00002", "00003"]
    assert table.columns["seed"].tolist() == [7, 8, 9, 10]
    assert np.array_equal(table.columns["band_gap"], [1.5, np.nan, 2, np.nan], equal_nan=True)
    assert table.columns["composition"].tolist() == ["LiFe", None, None, None]
    assert table.columns["chemical_system"].tolist() == [None, "Li-O", None, None]
    columns = pq.read_table(folder / "samples.parquet").to_pydict()
    assert columns["num_atoms"] == [3, 4, 5, 6]
    assert columns["formula"] == [formula_of(each.atomic_numbers) for each in crystals]
    as_files = load_crystals(str(folder))  # the CIF files of the folder
    assert as_files.columns["material_id"].tolist() == ["00000", "00001", "00002", "00003"]
    assert as_files.num_atoms.tolist() == [3, 4, 5, 6]


def test_requests_that_are_named_as_columns_or_are_lists(tmp_path):
    requests = [
        {"num_atoms": 4, "elements": [3, 8], "stable": True},
        {"num_atoms": 5, "elements": "any", "stable": None},
    ]
    folder = save(tmp_path, [random_crystal(0), random_crystal(1)], requests)
    columns = pq.read_table(folder / "samples.parquet").to_pydict()
    assert columns["num_atoms"] == [6, 6]
    assert columns["requested_num_atoms"] == [4.0, 5.0]
    assert columns["elements"] == ["[3, 8]", "any"]
    assert columns["stable"] == [1.0, None]
    assert read_samples(folder)[1] == requests


def test_lines_say_how_each_was_made(tmp_path):
    folder = save(tmp_path, [random_crystal(0), random_crystal(1)], [{"spacegroup": "Fm-3m"}, {"name": "Grün"}])
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = {"num_inference_steps": 5}
    assert lines == [
        {"file_name": "00000.cif", "request": {"spacegroup": "Fm-3m"}, "settings": settings, "seed": 7},
        {"file_name": "00001.cif", "request": {"name": "Grün"}, "settings": settings, "seed": 8},
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000.cif",
        "00001.cif",
        "samples.jsonl",
        "samples.parquet",
    ]


@pytest.mark.filterwarnings("ignore:overflow")
def test_every_digit_survives_and_all_garbage(tmp_path):
    crystals = [random_crystal(0), *GARBAGE.values(), random_crystal(1)]
    requests = [{"number": i} for i in range(len(crystals))]
    found, asked = read_samples(save(tmp_path, crystals, requests))
    assert asked == requests
    for a, b in zip(found, crystals, strict=True):
        assert a.atomic_numbers.dtype == np.int64
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape
            assert np.array_equal(x, y, equal_nan=True)


def test_no_samples_are_samples(tmp_path):
    assert read_samples(save(tmp_path, [])) == ([], [])


def remove_table(folder):
    (folder / "samples.parquet").unlink()


def break_lines(folder):
    (folder / "samples.jsonl").write_text((folder / "samples.jsonl").read_text()[:-30])


def break_count(folder):
    (folder / "samples.jsonl").write_text((folder / "samples.jsonl").read_text().splitlines()[0] + "\n")


def break_table(folder):
    (folder / "samples.parquet").write_bytes((folder / "samples.parquet").read_bytes()[:200])


def break_columns(folder):
    pq.write_table(pa.table({"x": [1, 2]}), folder / "samples.parquet")


def break_images(folder):
    (folder / "samples.jsonl").write_text('{"file_name": "00000.png", "seed": 1}\n')


BREAK = [remove_table, break_lines, break_count, break_table, break_columns, break_images]


@pytest.mark.parametrize("break_it", BREAK)
def test_broken_samples_are_refused(break_it, tmp_path):
    save(tmp_path, [random_crystal(0), random_crystal(1)])
    break_it(tmp_path)
    with pytest.raises(UserError, match=f"^--samples {tmp_path}: .*(give a folder it wrote|sample again)"):
        read_samples(tmp_path)
