"""Crystals from parquet, CSV or CIF files -> padded arrays of reduced cells. Crystals that cannot be used are skipped,
with the reason."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from utils.crystal.data.cif import CIF_COLUMN, TENSOR_COLUMNS, parse_rows
from utils.crystal.structure import Crystal, cell_matrix, cell_parameters, formula_of, wrapped
from utils.draws import SampleDraws, StreamOrder
from utils.errors import UserError
from utils.files import sha256_json

logger = logging.getLogger(__name__)
ID_COLUMN = "material_id"
TEXT_COLUMNS = (ID_COLUMN, CIF_COLUMN, "split")  # of a CSV file, even where they look like numbers


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
        """The crystal of a row, without padding."""
        count = self.num_atoms[row]
        lattice = cell_matrix(self.lengths[row].astype(np.float64), self.angles[row].astype(np.float64))
        return Crystal(self.atomic_numbers[row, :count].astype(np.int64), self.frac_coords[row, :count], lattice)

    def crystals(self) -> list[Crystal]:
        """All crystals, without padding."""
        return [self.crystal(row) for row in range(len(self))]

    def take(self, rows: np.ndarray) -> "CrystalTable":
        """The crystals of some rows, which are a mask or row numbers."""
        arrays = {name: getattr(self, name)[rows] for name in ("atomic_numbers", "frac_coords", "lengths", "angles")}
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, **arrays, num_atoms=self.num_atoms[rows], columns=columns)

    def identity(self) -> str:
        """A hash of the content."""
        arrays = (self.atomic_numbers, self.frac_coords, self.lengths, self.angles)
        columns = {name: [str(value) for value in values] for name, values in sorted(self.columns.items())}
        return sha256_json([[array.tobytes().hex() for array in arrays], columns])


def open_crystals(path: str, split: str | None, flag: str = "--dataset_name") -> tuple[list[dict[str, Any]], str]:
    """The rows of a source and a description of it. A source is a folder of CIF files, .parquet or .csv files (or a
    folder of them), or a hub dataset. `split` is a split of a hub dataset, or selects the rows of files with a column
    named split. Raises UserError, which names the flag, if there are no rows."""
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
            rows = list(datasets.load_dataset(path, split=split or "train"))
        except Exception as error:  # the library raises many kinds for a name that is not there
            raise UserError(f"{flag}: {path} is no file, and no hub dataset that can be read: {error}") from error
        check_columns(rows, path, flag)
        return rows, f"{path}, split {split or 'train'}"
    if split is not None and rows and "split" in rows[0]:
        known = sorted({str(row.get("split")) for row in rows})
        rows = [row for row in rows if str(row.get("split")) == split]
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
    """The rows of one file; columns of numbers of a CSV as numbers, empty cells as None. Raises UserError for a file
    that cannot be read or has no crystals.
    """
    try:
        rows = read_csv(path) if path.suffix == ".csv" else pq.read_table(path).to_pylist()
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{flag}: {path} cannot be read: {reason}; write the file again") from error
    check_columns(rows, path, flag)
    return rows


def check_columns(rows: list[dict[str, Any]], path: str | Path, flag: str) -> None:
    """Raises UserError, which names the flag, for rows without the columns of a crystal."""
    if not rows:
        raise UserError(f"{flag}: {path} has no rows; give one with crystals")
    if CIF_COLUMN not in rows[0] and not set(rows[0]).issuperset(TENSOR_COLUMNS):
        raise UserError(
            f"{flag}: {path} has the columns {', '.join(sorted(rows[0]))}; crystals need a column {CIF_COLUMN}, or "
            f"{', '.join(TENSOR_COLUMNS)}"
        )


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file. A column holds numbers if each of its cells is a number or empty: the formula InF among
    other formulas is not infinity."""
    csv.field_size_limit(2**31 - 1)  # a CIF can be longer than the 128 KiB that the module allows
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [{key: value or None for key, value in row.items() if key} for row in csv.DictReader(file)]
    for name in list(rows[0]) if rows else []:
        values = [row[name] for row in rows]
        if name not in TEXT_COLUMNS and all(value is None or is_number(value) for value in values):
            for row, value in zip(rows, values, strict=True):
                row[name] = None if value is None else float(value)
    return rows


def is_number(text: str) -> bool:
    """Whether a cell of a CSV file can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def load_crystals(
    path: str,
    split: str | None = None,
    max_atoms: int = 20,
    max_samples: int | None = None,
    max_skipped_fraction: float = 1.0,
    flag: str = "--dataset_name",
) -> CrystalTable:
    """The crystals of a source (`open_crystals`). Raises UserError, with examples, if none can be used or if more than
    `max_skipped_fraction` cannot; those with more than `max_atoms` atoms do not count."""
    rows, what = open_crystals(path, split, flag)
    rows = rows[:max_samples]
    kept: list[Crystal] = []
    kept_rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
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
    frac_coords = wrapped(frac_coords)  # 1 - 1e-9 is one in float32
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
        columns=columns,
        skipped=skipped or [],
    )


def column_array(values: list[Any]) -> np.ndarray:
    """Numbers as float64 with NaN for missing ones, anything else as text with None."""
    if all(value is None or isinstance(value, int | float) for value in values):
        return np.array([np.nan if value is None else float(value) for value in values])
    return np.array([None if value is None else str(value) for value in values], dtype=object)


BATCH_COLUMNS = ("atomic_numbers", "frac_coords", "lengths", "angles")


def crystal_batch(table: CrystalTable, rows: np.ndarray) -> dict[str, Tensor]:
    """The input of `CrystalVAE.encode` for the rows (B,)."""
    batch = {name: torch.from_numpy(getattr(table, name)[rows]) for name in BATCH_COLUMNS}
    return batch | {"attention_mask": batch["atomic_numbers"] > 0}


def crystal_batches(table: CrystalTable, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All crystals, in order."""
    for first in range(0, len(table), batch_size):
        yield crystal_batch(table, np.arange(first, min(first + batch_size, len(table))))


def translated(frac_coords: Tensor, draws: SampleDraws) -> Tensor:
    """Crystals (B, N, 3), each translated by a vector that is uniform in the cell. They stay the same crystals, since
    a cell has no origin."""
    shift = torch.stack([draws.uniform(f"translation_{axis}") for axis in "abc"], dim=1)  # (B, 3)
    return (frac_coords + shift[:, None]) % 1.0


class CrystalStream(torch.utils.data.Dataset):
    """The endless stream of training crystals: position -> crystal, a pure function of (seed, position)."""

    def __init__(self, table: CrystalTable, seed: int):
        self.table, self.order = table, StreamOrder(seed, len(table))

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """The batch at `positions`, with the positions in it."""
        where = np.asarray(positions, dtype=np.int64)
        return crystal_batch(self.table, self.order.rows(where)) | {"positions": torch.from_numpy(where)}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}
