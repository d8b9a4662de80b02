"""Crystals from parquet, CSV or CIF files -> padded arrays of reduced cells. What cannot be used is skipped, with the
reason.
"""

import csv
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from utils.crystals import (
    MAX_ATOMIC_NUMBER,
    Crystal,
    cell_matrix,
    cell_parameters,
    crystal_package,
    formula_of,
    min_distance,
    niggli_reduced,
    volume,
)
from utils.errors import UserError
from utils.files import sha256_json

logger = logging.getLogger(__name__)
MIN_SITE_DISTANCE = 0.5  # Angstrom; nearer ones are one site twice (H2 has 0.74)
TENSOR_COLUMNS = ("atomic_numbers", "frac_coords", "lattice")
CIF_COLUMN, ID_COLUMN = "cif", "material_id"
# A CIF without any of these says nothing of its symmetry: its sites may be all there are, or one of each kind.
SYMMETRY_KEYS = ("_symmetry_", "_space_group")


@dataclass(frozen=True)
class CrystalTable:
    """R crystals, padded to N sites, in reduced cells. Atomic number 0 is padding."""

    atomic_numbers: np.ndarray  # (R, N) uint8
    frac_coords: np.ndarray  # (R, N, 3) float32 in [0, 1)
    lengths: np.ndarray  # (R, 3) float32, Angstrom
    angles: np.ndarray  # (R, 3) float32, degrees
    num_atoms: np.ndarray  # (R,) int64
    columns: dict[str, np.ndarray]  # the rest of the source, (R,) each: float64 (NaN = none) or object (None = none)
    skipped: list[dict[str, Any]] = field(default_factory=list)  # row, id, reason

    def __len__(self) -> int:
        return len(self.num_atoms)

    def crystal(self, row: int) -> Crystal:
        """One of them, without padding."""
        count = self.num_atoms[row]
        lattice = cell_matrix(self.lengths[row].astype(np.float64), self.angles[row].astype(np.float64))
        return Crystal(self.atomic_numbers[row, :count].astype(np.int64), self.frac_coords[row, :count], lattice)

    def crystals(self) -> list[Crystal]:
        """All of them, without padding."""
        return [self.crystal(row) for row in range(len(self))]

    def take(self, rows: np.ndarray) -> "CrystalTable":
        """Some of them (a mask or numbers of rows)."""
        arrays = {name: getattr(self, name)[rows] for name in ("atomic_numbers", "frac_coords", "lengths", "angles")}
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, **arrays, num_atoms=self.num_atoms[rows], columns=columns)

    def identity(self) -> str:
        """A hash of all that is in it."""
        arrays = (self.atomic_numbers, self.frac_coords, self.lengths, self.angles)
        columns = {name: [str(value) for value in values] for name, values in sorted(self.columns.items())}
        return sha256_json([[array.tobytes().hex() for array in arrays], columns])


def open_crystals(path: str, split: str | None, flag: str = "--train_data") -> tuple[list[dict[str, Any]], str]:
    """The rows of a source and what it is: a folder of CIF files, .parquet or .csv files (or a folder of them), or a
    hub dataset. `split` is that of a hub dataset; of files with a column "split" the rows that say so. Raises
    UserError, which names the flag, where there is nothing.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.rglob("*.cif")):
        files = sorted(folder.rglob("*.cif"))
        rows = [
            {ID_COLUMN: file.stem, CIF_COLUMN: file.read_text(encoding="utf-8", errors="replace")} for file in files
        ]
        return rows, f"{len(rows)} CIF files of {path}"
    if folder.is_file() or folder.is_dir():
        rows = [row for file in table_files(folder, flag) for row in read_table(file, flag)]
    else:
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
            raise UserError(f"{flag}: {path} does not exist; give a folder of CIF files, a .parquet or .csv file")
        try:
            return list(datasets.load_dataset(path, split=split or "train")), f"{path}, split {split or 'train'}"
        except Exception as error:  # the library raises many kinds for a name that is not there
            raise UserError(f"{flag}: {path} is no file, and no hub dataset that can be read: {error}") from error
    if split is not None and rows and "split" in rows[0]:
        known = sorted({str(row["split"]) for row in rows})
        rows = [row for row in rows if row["split"] == split]
        if not rows:
            raise UserError(f"{flag}: {path} has no rows of split {split}; its column split says {', '.join(known)}")
        return rows, f"{path}, split {split}"
    return rows, path


def table_files(path: Path, flag: str) -> list[Path]:
    """The .parquet and .csv files that a path names."""
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("*.csv")])
    if not files or any(file.suffix not in (".parquet", ".csv") for file in files):
        raise UserError(f"{flag}: {path} holds no crystals; give a folder of CIF files, a .parquet or .csv file")
    return files


def read_table(path: Path, flag: str) -> list[dict[str, Any]]:
    """The rows of one file; numbers of a CSV as numbers, empty cells as None."""
    if path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # a CIF is longer than the 128 KiB that the module allows
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{key: number_of(value) for key, value in row.items() if key} for row in csv.DictReader(file)]
    else:
        rows = list(datasets.Dataset.from_parquet(str(path), keep_in_memory=True))
    names = set(rows[0]) if rows else set()
    if CIF_COLUMN not in names and not names.issuperset(TENSOR_COLUMNS):
        raise UserError(
            f"{flag}: {path} has the columns {', '.join(sorted(names)) or 'of nothing'}; crystals need a column "
            f"{CIF_COLUMN}, or {', '.join(TENSOR_COLUMNS)}"
        )
    return rows


def number_of(text: str) -> str | float | None:
    """A cell of a CSV file."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def parse_row(row: dict[str, Any], max_atoms: int) -> Crystal | str:
    """The crystal of a row in its reduced cell, or why it cannot be used."""
    try:
        crystal = crystal_of_cif(row[CIF_COLUMN]) if row.get(CIF_COLUMN) else crystal_of_arrays(row)
        check_sites(crystal, max_atoms)
        reduced = niggli_reduced(crystal)
    except UserError:
        raise
    except Exception as error:  # pymatgen raises many kinds for what it cannot read
        return " ".join(str(error).split())[:200] or type(error).__name__
    if (distance := min_distance(reduced)) < MIN_SITE_DISTANCE:
        return f"two sites are {distance:.2f} Angstrom apart: one site twice?"
    return reduced


def crystal_of_arrays(row: dict[str, Any]) -> Crystal:
    """From atomic_numbers (n,), frac_coords (3 n,) and lattice (9,), the rows of its vectors. Raises ValueError."""
    missing = [name for name in TENSOR_COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(f"no {missing[0]}")
    atomic_numbers = np.asarray(row["atomic_numbers"], dtype=np.int64).reshape(-1)
    frac_coords = np.asarray(row["frac_coords"], dtype=np.float64).reshape(-1, 3)
    lattice = np.asarray(row["lattice"], dtype=np.float64).reshape(3, 3)
    if len(frac_coords) != len(atomic_numbers):
        raise ValueError(f"{len(atomic_numbers)} atoms with {len(frac_coords)} positions")
    return Crystal(atomic_numbers, frac_coords, lattice)


def crystal_of_cif(text: str) -> Crystal:
    """From the text of a CIF file. Raises ValueError for partial occupancy and where the symmetry is not said."""
    if not any(key in text for key in SYMMETRY_KEYS):
        raise ValueError("it says nothing of symmetry: no space group and no loop of operations")
    parser = crystal_package("pymatgen.io.cif").CifParser
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure = parser.from_str(text).parse_structures(primitive=False)[0]
    if not structure.is_ordered:
        raise ValueError("a site is occupied in part, or by more than one element")
    numbers = np.array([site.specie.Z for site in structure])
    return Crystal(numbers, np.asarray(structure.frac_coords), np.asarray(structure.lattice.matrix))


def check_sites(crystal: Crystal, max_atoms: int) -> None:
    """Raises ValueError for what no reduction mends."""
    if not len(crystal.atomic_numbers):
        raise ValueError("no atoms")
    if len(crystal.atomic_numbers) > max_atoms:
        raise ValueError(f"{len(crystal.atomic_numbers)} atoms, more than --max_atoms {max_atoms}")
    if not (np.isfinite(crystal.frac_coords).all() and np.isfinite(crystal.lattice).all()):
        raise ValueError("a coordinate is not finite")
    if crystal.atomic_numbers.min() < 1 or crystal.atomic_numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"an atomic number is not between 1 and {MAX_ATOMIC_NUMBER}")
    if volume(crystal.lattice) < 1e-3:
        raise ValueError("the cell is flat")


def parse_rows(rows: list[dict[str, Any]], max_atoms: int) -> Iterator[Crystal | str]:
    """`parse_row` of each; CIF files in processes, for reading one takes milliseconds."""
    if not rows or CIF_COLUMN not in rows[0] or len(rows) < 200:
        yield from (parse_row(row, max_atoms) for row in rows)
        return
    cifs = [{CIF_COLUMN: row.get(CIF_COLUMN)} for row in rows]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(parse_row, cifs, [max_atoms] * len(cifs), chunksize=50)


def load_crystals(
    path: str,
    split: str | None = None,
    max_atoms: int = 20,
    max_samples: int | None = None,
    max_skipped_fraction: float = 1.0,
    flag: str = "--train_data",
) -> CrystalTable:
    """The crystals of a source (`open_crystals`). Raises UserError, with examples, if none can be used or more than
    `max_skipped_fraction` cannot, where those with more than `max_atoms` atoms do not count.
    """
    rows, what = open_crystals(path, split, flag)
    rows = rows[:max_samples]
    kept: list[Crystal] = []
    kept_rows, skipped = [], []
    for index, (row, found) in enumerate(zip(rows, parse_rows(rows, max_atoms), strict=True)):
        if isinstance(found, str):
            skipped.append({"row": index, "id": str(row.get(ID_COLUMN, index)), "reason": found})
        else:
            kept.append(found)
            kept_rows.append(row)
    faulty = [each for each in skipped if "--max_atoms" not in each["reason"]]
    if not kept or len(faulty) > max_skipped_fraction * len(rows):
        reasons = "; ".join(f"{each['id']}: {each['reason']}" for each in (faulty or skipped)[:3])
        raise UserError(f"{flag}: {len(skipped)} of {len(rows)} crystals of {what} cannot be used ({reasons})")
    if skipped:
        example = f"{skipped[0]['id']}: {skipped[0]['reason']}"
        logger.warning("%s: %d of %d crystals are skipped (%s, ...)", what, len(skipped), len(rows), example)
    return make_table(kept, kept_rows, max_atoms, skipped)


def make_table(
    crystals: list[Crystal],
    rows: list[dict[str, Any]] | None = None,
    max_atoms: int | None = None,
    skipped: list[dict[str, Any]] | None = None,
) -> CrystalTable:
    """Crystals as padded arrays, with the columns of their rows that are text or numbers."""
    num_atoms = np.array([len(each.atomic_numbers) for each in crystals], dtype=np.int64)
    size = max_atoms or int(num_atoms.max())
    atomic_numbers = np.zeros((len(crystals), size), dtype=np.uint8)
    frac_coords = np.zeros((len(crystals), size, 3), dtype=np.float32)
    for row, crystal in enumerate(crystals):
        atomic_numbers[row, : num_atoms[row]] = crystal.atomic_numbers
        frac_coords[row, : num_atoms[row]] = crystal.frac_coords
    lengths, angles = cell_parameters(np.stack([crystal.lattice for crystal in crystals]))
    columns = {"formula": np.array([formula_of(each.atomic_numbers) for each in crystals], dtype=object)}
    for name in rows[0] if rows else ():
        values = [row.get(name) for row in rows or ()]
        if name not in (*TENSOR_COLUMNS, CIF_COLUMN, "formula", "num_atoms"):
            columns[name] = column_array(values)
    return CrystalTable(
        atomic_numbers,
        frac_coords,
        lengths.astype(np.float32),
        angles.astype(np.float32),
        num_atoms,
        columns,
        skipped or [],
    )


def column_array(values: list[Any]) -> np.ndarray:
    """Numbers as float64 with NaN where there is none, anything else as text with None."""
    if all(value is None or isinstance(value, int | float) for value in values):
        return np.array([np.nan if value is None else float(value) for value in values])
    return np.array([None if value is None else str(value) for value in values], dtype=object)
