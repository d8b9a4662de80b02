"""What sampling crystals leaves: files that pymatgen and our own reader read back, garbage too, and pictures."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.data import DATA
from utils.crystal.data.table import load_crystals
from utils.crystal.files import any_formula, read_samples, save_crystals, write_cif
from utils.crystal.pictures import (
    ball,
    cell_edges,
    covalent_radii,
    crystal_grid,
    draw_crystal,
    draw_label,
    view_axes,
    with_repeats,
)
from utils.crystal.structure import (
    MAX_ATOMIC_NUMBER,
    Crystal,
    cell_parameters,
    formula_of,
    niggli_reduced,
    to_structure,
)
from utils.errors import UserError

pytest.importorskip("pymatgen.core")
CifParser = pytest.importorskip("pymatgen.io.cif").CifParser
REAL_DATA = DATA / "crystals" / "perov_5.parquet"


def random_crystal(seed: int, atoms: int = 6) -> Crystal:
    """A slanted cell with sites at least 1 Angstrom apart."""
    generator = np.random.default_rng(seed)
    lattice = 5 * np.eye(3) + generator.uniform(-1, 1, (3, 3))
    while True:
        crystal = Crystal(generator.choice([3, 8, 26, 118], atoms), generator.random((atoms, 3)), lattice)
        if (to_structure(crystal).distance_matrix + 9 * np.eye(atoms)).min() > 1:
            return crystal


NAN = float("nan")
GARBAGE = {
    "not a number": Crystal(np.array([11, 17]), np.full((2, 3), NAN), np.full((3, 3), NAN)),
    "infinite": Crystal(np.array([11]), np.array([[0, np.inf, -np.inf]]), 4 * np.eye(3)),
    "no element": Crystal(np.array([0, 200, -5, 8]), np.zeros((4, 3)), 4 * np.eye(3)),
    "flat": Crystal(np.array([3]), np.zeros((1, 3)), np.diag([4.0, 4, 0])),
    "all zero": Crystal(np.array([3]), np.zeros((1, 3)), np.zeros((3, 3))),
    "endless": Crystal(np.array([3]), np.zeros((1, 3)), np.diag([1e200, 4, 4])),
    "outside the cell": Crystal(np.array([3, 7]), np.array([[-7.25, 3.5, 1], [0.2, 0.2, 1e30]]), 4 * np.eye(3)),
    "left-handed": Crystal(np.array([3, 7]), np.array([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]), np.diag([4.0, 4, -5])),
    "sites on each other": Crystal(np.array([7] * 30), np.zeros((30, 3)), 3 * np.eye(3)),
    "no atoms": Crystal(np.array([], dtype=np.int64), np.zeros((0, 3)), 4 * np.eye(3)),
    "a needle": Crystal(np.array([3]), np.zeros((1, 3)), np.diag([0.1, 0.1, 5000])),
}
DRAWABLE = ("outside the cell", "left-handed", "sites on each other", "a needle")


# ---- files ----------------------------------------------------------------------------------------------------------


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


def save(folder, crystals, requests=None, seed=7):
    folder.mkdir(exist_ok=True)
    save_crystals(folder, crystals, requests or [{} for _ in crystals], {"num_inference_steps": 5}, seed)
    return folder


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


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_every_element_has_a_size_and_a_colour():
    """Radii in Angstrom by Cordero et al.; of those heavier than curium none is known, nor a colour beyond meitnerium."""
    radii = covalent_radii(np.arange(1, MAX_ATOMIC_NUMBER + 1))
    assert radii[[0, 5, 7, 10, 25, 95]] == pytest.approx([0.31, 0.76, 0.66, 1.66, 1.32, 1.69])
    assert (radii[96:] == radii[95]).all()
    middle = {number: ball(number, 50, 0.0).getpixel((50, 50)) for number in (1, 8, 11, 109, MAX_ATOMIC_NUMBER)}
    assert middle[109] == middle[MAX_ATOMIC_NUMBER]
    assert len(set(middle.values())) == 4


@pytest.mark.parametrize(
    ("position", "copies"),
    [
        ((0, 0, 0), 8),
        ((0.5, 0.5, 0.5), 1),
        ((0.5, 0, 0.5), 2),
        ((0.5, 0, 1), 4),
        ((0.999, 0.001, -0.001), 8),
        ((0.1, 0.5, 0.9), 1),
    ],
)
def test_atoms_on_faces_edges_and_corners_are_repeated(position, copies):
    numbers, positions = with_repeats(Crystal(np.array([26]), np.array([position]), 4 * np.eye(3)))
    assert numbers.tolist() == [26] * copies
    moved = positions - np.array(position)
    assert np.allclose(moved, np.round(moved))
    assert len(np.unique(np.round(positions, 6), axis=0)) == copies
    assert positions.min() > -0.01
    assert positions.max() < 1.01


def test_a_face_is_as_near_in_a_long_cell():
    """0.02 of 4 Angstrom is at the face, 0.02 of 40 is not."""
    crystal = Crystal(np.array([26]), np.array([[0.5, 0.5, 0.02]]), np.diag([4.0, 4, 4]))
    assert len(with_repeats(crystal)[0]) == 2
    assert len(with_repeats(crystal._replace(lattice=np.diag([4.0, 4, 40])))[0]) == 1


def test_edges_are_those_of_a_cube():
    edges = cell_edges(pieces=7)
    assert edges.shape == (12 * 7, 2, 3)
    assert np.linalg.norm(edges[:, 1] - edges[:, 0], axis=1) == pytest.approx(1 / 7)
    assert len(np.unique(np.round(edges.mean(axis=1), 6), axis=0)) == 12 * 7
    on_faces = (np.abs(edges - np.round(edges)) < 1e-9).sum(axis=2)
    assert on_faces.min() == 2


@pytest.mark.parametrize("seed", range(4))
def test_the_view_is_a_rotation_with_c_upwards(seed):
    lattice = random_crystal(seed).lattice
    axes = view_axes(lattice)
    assert axes.T @ axes == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)
    right, up, _ = lattice[2] @ axes
    assert right == pytest.approx(0, abs=1e-9)
    assert up > 0
    assert (lattice[0] @ axes)[2] > 0  # a comes towards the viewer


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def count_like(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 40) -> int:
    """Pixels of about a colour."""
    return int((np.abs(pixels(image) - colour).max(axis=-1) < tolerance).sum())


def test_the_nearer_atom_hides_the_farther():
    """Fluorine (green) and oxygen (red) in the line of sight, then the other way round."""
    lattice = 6 * np.eye(3)
    toward = view_axes(lattice)[:, 2] / 6 * 1.2
    centre = np.array([0.5, 0.5, 0.5])
    for numbers, channel in (([9, 8], 0), ([8, 9], 1)):
        picture = draw_crystal(Crystal(np.array(numbers), np.stack([centre - toward, centre + toward]), lattice), 200)
        assert pixels(picture)[100, 100].argmax() == channel


def test_atoms_have_their_colour_and_their_size():
    crystal = Crystal(np.array([8]), np.array([[0.5, 0.5, 0.5]]), 4 * np.eye(3))
    small, large = draw_crystal(crystal, 200), draw_crystal(crystal._replace(atomic_numbers=np.array([37])), 200)
    coloured = [int((np.ptp(pixels(each), axis=-1) > 30).sum()) for each in (small, large)]
    assert coloured[1] / coloured[0] == pytest.approx((2.20 / 0.66) ** 2, rel=0.2)
    assert ball(8, 50, 0.0).getpixel((50, 50))[0] > 180 > ball(8, 50, 0.0).getpixel((50, 50))[2]
    assert ball(8, 50, 0.0).getpixel((0, 0))[3] == 0
    assert ball(8, 50, 0.0).getpixel((25, 22)) > ball(8, 50, 0.0).getpixel((75, 78))  # lit from the upper left
    assert min(ball(8, 50, 1.0).getpixel((50, 50))) == 255


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.filterwarnings("error")
def test_garbage_is_crossed_out_or_drawn(name):
    red = count_like(draw_crystal(GARBAGE[name], 120), (200, 60, 60), 10)
    assert (red == 0) if name in DRAWABLE else (red > 100)
    assert crystal_grid([GARBAGE[name]]).size == (200, 225)


def test_a_grid_has_a_place_for_each():
    crystals = [random_crystal(seed) for seed in range(5)]
    assert crystal_grid(crystals, columns=3, cell=96).size == (3 * 96, 2 * (96 + 18))
    assert crystal_grid(crystals[:2], columns=3, cell=96).size == (2 * 96, 96 + 18)
    assert crystal_grid([]).size == (200, 225)
    grid = pixels(crystal_grid(crystals, columns=3, cell=96))
    assert grid[114:, 192:].min() == 255
    for i in range(5):
        y, x = i // 3 * 114, i % 3 * 96
        assert grid[y : y + 96, x : x + 96].min() < 150
        assert grid[y + 96 : y + 114, x : x + 96].min() < 150
        assert grid[y : y + 96, [x, x + 95]].min() > 200  # nothing is cut
    given = pixels(crystal_grid(crystals, ["", "a", "b", "c", "d"], columns=3, cell=96))
    assert given[96:114, :96].min() == 255


def test_labels_have_low_digits_and_fit():
    plain, lowered = (pixels(draw_label("Fe2O3", 200, 25, subscripts)) for subscripts in (False, True))
    rows = [np.flatnonzero(each.min(axis=(1, 2)) < 128) for each in (plain, lowered)]
    assert rows[1].max() > rows[0].max()
    long = pixels(draw_label("a property of 1.5 eV and more" * 3, 100, 20, subscripts=False))
    assert long.shape == (20, 100, 3)
    assert long.min() < 128


@pytest.mark.skipif(not REAL_DATA.is_file(), reason="real data is not here")
def test_real_crystals_survive_files_and_are_drawn(tmp_path):
    crystals = load_crystals(str(REAL_DATA), "val", max_samples=6).crystals()
    found, _ = read_samples(save(tmp_path, crystals))
    again = load_crystals(str(tmp_path / "samples.parquet")).crystals()
    for a, b, c in zip(crystals, found, again, strict=True):
        assert np.array_equal(a.frac_coords, b.frac_coords)
        assert np.array_equal(a.lattice, b.lattice)
        assert c.lattice == pytest.approx(a.lattice, abs=1e-4)
    assert count_like(crystal_grid(found), (200, 60, 60), 3) < 50
