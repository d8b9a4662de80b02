"""Crystals whose validity and matches are known, and garbage."""

import numpy as np
import pytest

from tests.support.data import DATA
from utils.crystal.data.table import load_crystals
from utils.crystal.structure import Crystal

FACE_CENTRES = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
NACL = Crystal(  # a = 5.64 Angstrom; nearest neighbours at a / 2; 2.16 g/cm^3
    np.array([11] * 4 + [17] * 4),
    np.concatenate([FACE_CENTRES, (FACE_CENTRES + np.array([0.5, 0, 0])) % 1]),
    5.64 * np.eye(3),
)
NACL_IN_CSCL = Crystal(np.array([11, 17]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), 3.5 * np.eye(3))
SRTIO3 = Crystal(
    np.array([38, 22, 8, 8, 8]),
    np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
    3.905 * np.eye(3),
)
NAN, ONE = np.nan, np.array([[0.0, 0, 0]])
GARBAGE = {
    "coordinate not a number": NACL._replace(frac_coords=NACL.frac_coords * NAN),
    "lattice not a number": NACL._replace(lattice=NACL.lattice * NAN),
    "infinite lattice": NACL._replace(lattice=np.full((3, 3), np.inf)),
    "lattice of 1e200": NACL._replace(lattice=1e200 * np.eye(3)),
    "no volume": NACL._replace(lattice=np.zeros((3, 3))),
    "flat": NACL._replace(lattice=np.diag([5.0, 5.0, 0.0])),
    "nearly flat": NACL._replace(lattice=np.diag([1e3, 1e3, 1e-9])),
    "all in one place": NACL._replace(frac_coords=NACL.frac_coords * 0),
    "tiny": NACL._replace(lattice=0.4 * np.eye(3)),
    "no atoms": Crystal(np.zeros(0, int), np.zeros((0, 3)), 4 * np.eye(3)),
    "element 0": Crystal(np.array([0]), ONE, 4 * np.eye(3)),
    "element 119": Crystal(np.array([119]), ONE, 4 * np.eye(3)),
    "too few positions": Crystal(np.array([11, 17]), ONE, 4 * np.eye(3)),
}
NEEDLE = Crystal(np.array([29]), ONE, np.diag([1e-5, 1e3, 1e3]))  # valid to the field, which asks for no own images


def rotated(crystal: Crystal) -> Crystal:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    return crystal._replace(lattice=crystal.lattice @ (rotation * np.sign(np.linalg.det(rotation))))


def supercell(crystal: Crystal) -> Crystal:
    numbers, frac_coords, lattice = crystal
    coords = np.concatenate([frac_coords, frac_coords + np.eye(3)[0]]) / [2, 1, 1]
    return Crystal(np.tile(numbers, 2), coords, np.diag([2, 1, 1]) @ lattice)


def other_cell(crystal: Crystal) -> Crystal:
    change = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]])  # determinant one: the same lattice
    return crystal._replace(lattice=change @ crystal.lattice, frac_coords=crystal.frac_coords @ np.linalg.inv(change))


SAME = {
    "itself": lambda crystal: crystal,
    "translated": lambda crystal: crystal._replace(
        frac_coords=(crystal.frac_coords + np.array([0.13, 0.71, 0.4])) % 1
    ),
    "rotated": rotated,
    "permuted": lambda crystal: Crystal(crystal.atomic_numbers[::-1], crystal.frac_coords[::-1], crystal.lattice),
    "supercell": supercell,
    "another cell": other_cell,
}


def cubes(count: int) -> list[Crystal]:
    """SrTiO3 of growing cells, sites a little off their places."""
    generator = np.random.default_rng(0)
    shifts = generator.normal(0, 0.01, (count, 5, 3))
    return [
        SRTIO3._replace(frac_coords=(SRTIO3.frac_coords + shift) % 1, lattice=(3.8 + 0.3 * row / count) * np.eye(3))
        for row, shift in enumerate(shifts)
    ]


def real_crystals(name: str, count: int) -> list[Crystal]:
    path = DATA / "crystals" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"no {path}")
    return load_crystals(str(path), "test", max_samples=count).crystals()


class Constant:
    """Stands for a calculator that finds an energy for anything."""

    def get_potential_energy(self, *_, **__) -> float:
        return 1.0
