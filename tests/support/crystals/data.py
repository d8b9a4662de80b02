"""Random crystals, crystals that are known by name, and files of them in every format."""

import csv
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data import DATA
from utils.crystal.structure import Crystal, to_structure, volume

pymatgen = pytest.importorskip("pymatgen.core")
Composition, Lattice, Structure = pymatgen.Composition, pymatgen.Lattice, pymatgen.Structure
StructureMatcher = pytest.importorskip("pymatgen.analysis.structure_matcher").StructureMatcher
CifWriter = pytest.importorskip("pymatgen.io.cif").CifWriter

CRYSTALS = DATA / "crystals"
needs_real_data = pytest.mark.skipif(not CRYSTALS.is_dir(), reason="real data is not here")


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
