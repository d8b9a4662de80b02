"""Counts of chosen genes, collected in memory or, for more cells than memory holds, in a folder of memory-mapped .npy
files."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.expression.data.source import CellSource
from utils.files import read_json, replace_durably, sha256_json, temporary_path, write_json

logger = logging.getLogger(__name__)
RECORD = "table.json"  # written last: what the arrays beside it are of
FORMAT = 1


class StoredCounts(NamedTuple):
    """Counts of the rows that have any."""

    counts: csr_matrix  # (R, G) fp32
    library_sizes: np.ndarray  # (R,) float64
    rows: np.ndarray  # (R,) int64, in the source


class GrowingList:
    """A growing array in memory."""

    def __init__(self, dtype: np.dtype):
        self.parts = [np.zeros(0, dtype)]

    def append(self, values: np.ndarray) -> None:
        """Adds values at the end."""
        self.parts.append(values.astype(self.parts[0].dtype, copy=False))

    def finish(self) -> np.ndarray:
        """The whole array."""
        return np.concatenate(self.parts)


class GrowingFile:
    """A growing array in a .npy file. The file is complete or absent: it gets its name when it is finished."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.size = path, dtype, 0
        self.temporary = temporary_path(path)
        self.file = self.temporary.open("wb")
        self.write_header()

    def write_header(self) -> None:
        """Writes the header for the present size; numpy leaves room in it for any other size."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: np.ndarray) -> None:
        """Adds values at the end."""
        self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.size += len(values)

    def finish(self) -> np.ndarray:
        """The whole array, memory-mapped."""
        self.file.seek(0)
        self.write_header()
        self.file.close()
        replace_durably(self.temporary, self.path)
        return np.load(self.path, mmap_mode="r")

    def discard(self) -> None:
        """Removes the file if it was not finished."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def dtypes(source: CellSource) -> dict[str, np.dtype]:
    """The arrays that are collected. scipy wants the same type for columns and for their starts."""
    index = np.int32 if source.counts.max_values < 2**31 else np.int64
    types = {"data": np.float32, "indices": index, "found": np.int64, "library_sizes": np.float64, "rows": np.int64}
    return {name: np.dtype(dtype) for name, dtype in types.items()}


def collect(source: CellSource, rows: np.ndarray, columns: np.ndarray, of_all: bool, arrays: dict[str, Any]) -> None:
    """Appends the counts at `columns` of those `rows` that have any to the `arrays`."""
    for places, counts in source.chunks(rows):
        chosen = counts[:, columns]  # (B, G)
        chosen.sort_indices()
        sizes = sums(chosen)
        kept = sizes > 0
        chosen = chosen[kept]
        arrays["data"].append(chosen.data)
        arrays["indices"].append(chosen.indices)
        arrays["found"].append(np.diff(chosen.indptr))
        arrays["library_sizes"].append((sums(counts) if of_all else sizes)[kept])
        arrays["rows"].append(rows[places[kept]])


def sums(counts: csr_matrix) -> np.ndarray:
    """(B,) counts of each cell, summed in float64."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def assembled(arrays: dict[str, np.ndarray], num_genes: int) -> StoredCounts:
    """A matrix over the arrays, without copying them."""
    indptr = np.zeros(len(arrays["found"]) + 1, dtype=arrays["indices"].dtype)
    np.cumsum(arrays["found"], out=indptr[1:])
    counts = csr_matrix((len(arrays["found"]), num_genes), dtype=np.float32)
    counts.data, counts.indices, counts.indptr = np.asarray(arrays["data"]), np.asarray(arrays["indices"]), indptr
    return StoredCounts(counts, np.array(arrays["library_sizes"]), np.array(arrays["rows"]))


def counts_in_memory(source: CellSource, rows: np.ndarray, columns: np.ndarray, of_all: bool) -> StoredCounts:
    """Counts at `columns` of those `rows` that have any. Library sizes are sums over these columns, or over all genes
    (`of_all`)."""
    growing = {name: GrowingList(dtype) for name, dtype in dtypes(source).items()}
    collect(source, rows, columns, of_all, growing)
    return assembled({name: array.finish() for name, array in growing.items()}, len(columns))


def counts_in_folder(
    source: CellSource, rows: np.ndarray, columns: np.ndarray, of_all: bool, folder: Path
) -> StoredCounts:
    """As `counts_in_memory`, but memory-mapped from files in `folder`. Files that are there are used if they have the
    same source, rows, genes and library; otherwise they are written anew."""
    record = record_of(source, rows, columns, of_all)
    try:
        arrays = stored_arrays(folder, record) or write_arrays(
            folder, record, source, lambda growing: collect(source, rows, columns, of_all, growing)
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; give another folder, or make room") from error
    return assembled(arrays, len(columns))


def record_of(source: CellSource, rows: np.ndarray, columns: np.ndarray, of_all: bool) -> dict[str, Any]:
    """All that the arrays in a folder depend on."""
    status = source.path.stat()
    return {
        "format": FORMAT,
        "source": [str(source.path.resolve()), source.key, status.st_size, status.st_mtime_ns],
        "rows": hashlib.sha256(np.ascontiguousarray(rows, "<i8").data).hexdigest(),
        "genes": sha256_json([source.genes[column] for column in columns]),
        "library": "all" if of_all else "chosen",
    }


def stored_arrays(folder: Path, record: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of a folder; None if they are missing or have another record."""
    try:
        if read_json(folder / RECORD) != record:
            return None
        names = ("data", "indices", "found", "library_sizes", "rows")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, EOFError, ValueError):  # the last two for files that are not whole
        return None
    logger.info("counts are taken from %s", folder)
    return arrays


def write_arrays(
    folder: Path, record: dict[str, Any], source: CellSource, fill: Callable[[dict[str, GrowingFile]], None]
) -> dict[str, np.ndarray]:
    """Writes the arrays anew. A process that is killed leaves no record, so the next one starts again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    growing: dict[str, GrowingFile] = {}
    try:
        for name, dtype in dtypes(source).items():
            growing[name] = GrowingFile(folder / f"{name}.npy", dtype)
        fill(growing)
        arrays = {name: array.finish() for name, array in growing.items()}
    finally:
        for array in growing.values():
            array.discard()
    write_json(folder / RECORD, record)
    return arrays
