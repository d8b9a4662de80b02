"""Pictures of crystals: colours, sizes, what hides what, and garbage, which is crossed out."""

import numpy as np
import pytest
from PIL import Image

from tests.support.crystals.models import GARBAGE, random_crystal, save
from tests.support.data import DATA
from utils.crystal.data.table import load_crystals
from utils.crystal.files import read_samples
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
from utils.crystal.structure import MAX_ATOMIC_NUMBER, Crystal

REAL_DATA = DATA / "crystals" / "perov_5.parquet"
DRAWABLE = ("outside the cell", "left-handed", "sites on each other", "a needle")


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
