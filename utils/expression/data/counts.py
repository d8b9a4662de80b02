"""A matrix of counts in an .h5ad file, however it is stored: all its values checked, and its rows read, in bounded
memory."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix, vstack

from utils.errors import UserError
from utils.expression.data.h5ad import opened

logger = logging.getLogger(__name__)
MAX_VALUES = 2**22  # held at a time where values are read in a row: 16 MiB of fp32
MAX_EXACT = 2**24  # fp32 holds every whole number up to here
KINDS = {"csr_matrix": "csr", "csc_matrix": "csc"}  # anndata's names


@dataclass
class ValueScan:
    """A summary of the values of a matrix, without zeros."""

    values: int = 0
    not_finite: int = 0
    fractions: int = 0
    minimum: float = 0
    maximum: float = 0

    def add(self, values: np.ndarray) -> None:
        """Adds values to the summary."""
        values = values[values != 0]
        self.values += len(values)
        if values.dtype.kind == "f":
            finite = values[np.isfinite(values)]
            self.not_finite += len(values) - len(finite)
            self.fractions += int(np.count_nonzero(finite != np.rint(finite)))
            values = finite
        if len(values):
            self.minimum = min(self.minimum, values.min().item())
            self.maximum = max(self.maximum, values.max().item())

    def fault(self) -> str | None:
        """Why the values are not counts; None if they are."""
        if not self.values:
            return "every value is zero"
        if self.not_finite:
            return f"{self.not_finite:,} of {self.values:,} values are NaN or infinite"
        if self.fractions or self.minimum < 0:
            share = self.fractions / self.values
            return (
                f"its values go from {self.minimum:g} to {self.maximum:g}, and {self.fractions:,} of {self.values:,} "
                f"({share:.1%}) are no whole numbers"
            )
        if self.maximum > MAX_EXACT:
            return f"its maximum is {self.maximum:,.0f}, and fp32 holds whole numbers up to {MAX_EXACT:,} only"
        return None


class RowReader(Protocol):
    """Reads rows of an (R, G) matrix."""

    max_values: int  # at most that many values are not zero

    def read(self, first: int, last: int) -> csr_matrix:
        """Rows `first` to `last` - 1, (last - first, G) in fp32, without zeros that are stored."""
        ...


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a file, (R, G): dense, by rows (csr) or by columns (csc)."""

    path: Path
    key: str
    flag: str
    kind: str
    shape: tuple[int, int]
    num_values: int  # stored ones
    dtype: np.dtype

    def scan(self, stop_at_fault: bool = False) -> ValueScan:
        """A summary of all values, or of those up to the first fault."""
        found = ValueScan()
        for values in self.values():
            found.add(values)
            if stop_at_fault and found.values and found.fault():
                break
        return found

    def values(self) -> Iterator[np.ndarray]:
        """All stored values, flat, some at a time."""
        with opened(self.path, self.flag) as file:
            item = file[self.key]
            stored = item if self.kind == "dense" else item["data"]
            step = rows_at_once(self.shape[1]) if self.kind == "dense" else MAX_VALUES
            for first in range(0, stored.shape[0], step):
                yield stored[first : first + step].ravel()

    def by_rows(self) -> RowReader:
        """A reader of its rows. A matrix that is stored by columns is copied to a temporary file first, with a note in
        the log."""
        if self.kind == "dense":
            return DenseRows(self)
        with opened(self.path, self.flag) as file:
            starts = file[self.key]["indptr"][:].astype(np.int64)  # (R + 1,), of columns (G + 1,)
        lines = self.shape[0] if self.kind == "csr" else self.shape[1]
        if len(starts) != lines + 1 or starts[0] != 0 or starts[-1] != self.num_values or (np.diff(starts) < 0).any():
            raise damaged(self, "its indptr does not fit its values")
        return SparseRows(self, starts) if self.kind == "csr" else rows_of_columns(self, starts)


def stored_matrix(file: Any, key: str, flag: str) -> StoredMatrix:
    """The matrix at `key` of an open file. Raises UserError if it is no matrix, or no matrix of numbers."""
    item = file[key]
    is_dense = hasattr(item, "dtype")
    kind = "dense" if is_dense else KINDS.get(str(item.attrs.get("encoding-type")))
    shape = tuple(int(size) for size in (item.shape if is_dense else item.attrs.get("shape", ())))
    if kind is None or len(shape) != 2:
        what = f"an array of shape {shape}" if is_dense else f"a {item.attrs.get('encoding-type') or 'group'}"
        raise UserError(
            f"{flag}: {key} of {file.filename} is {what}; expected a matrix, dense, CSR or CSC, as anndata writes it "
            "since 0.7"
        )
    values = item if is_dense else item["data"]
    if values.dtype.kind not in "biuf":
        raise UserError(f"{flag}: {key} of {file.filename} holds values of type {values.dtype}; expected counts")
    path = Path(file.filename)
    return StoredMatrix(
        path, key, flag, kind, (shape[0], shape[1]), num_values=int(np.prod(values.shape)), dtype=values.dtype
    )


def rows_at_once(num_columns: int) -> int:
    """Number of rows of a dense matrix to read at a time."""
    return max(1, MAX_VALUES // max(num_columns, 1))


class DenseRows:
    """Rows of a dense matrix, a few at a time."""

    def __init__(self, stored: StoredMatrix):
        self.stored, self.max_values = stored, stored.num_values

    def read(self, first: int, last: int) -> csr_matrix:
        """Rows `first` to `last` - 1."""
        step = rows_at_once(self.stored.shape[1])
        with opened(self.stored.path, self.stored.flag) as file:
            matrix = file[self.stored.key]
            starts = range(first, last, step)
            blocks = [csr_matrix(matrix[i : min(i + step, last)].astype(np.float32)) for i in starts]
        return vstack(blocks, format="csr")


class SparseRows:
    """Rows of a matrix that is stored by rows: those of the file, or `copies` of them."""

    def __init__(self, stored: StoredMatrix, starts: np.ndarray, copies: Mapping[str, np.ndarray] | None = None):
        self.stored, self.max_values, self.starts, self.copies = stored, stored.num_values, starts, copies

    def read(self, first: int, last: int) -> csr_matrix:
        """Rows `first` to `last` - 1. Raises UserError for a matrix that is damaged."""
        begin, end = self.starts[first], self.starts[last]
        with self.arrays() as arrays:
            values = np.asarray(arrays["data"][begin:end]).astype(np.float32)
            columns = np.asarray(arrays["indices"][begin:end])
        try:
            rows = csr_matrix(
                (values, columns, self.starts[first : last + 1] - begin), (last - first, self.stored.shape[1])
            )
            rows.check_format(full_check=True)
        except ValueError as error:
            raise damaged(self.stored, str(error)) from error
        rows.sum_duplicates()
        rows.eliminate_zeros()
        return rows

    @contextlib.contextmanager
    def arrays(self) -> Iterator[Mapping[str, Any]]:
        """The values and columns of all rows, to be sliced."""
        if self.copies:
            yield self.copies
            return
        with opened(self.stored.path, self.stored.flag) as file:
            yield file[self.stored.key]


def damaged(stored: StoredMatrix, reason: str) -> UserError:
    """The error for a sparse matrix that contradicts itself."""
    return UserError(f"{stored.flag}: {stored.key} of {stored.path} is damaged ({reason}); write the file again")


def rows_of_columns(stored: StoredMatrix, starts: np.ndarray) -> SparseRows:
    """The rows of a matrix that is stored by columns, through a temporary file. The first pass counts the values of
    each row, the second one writes each value to its place."""
    values, columns = temporary_arrays(stored)
    num_rows, num_columns = stored.shape
    per_row = np.zeros(num_rows, dtype=np.int64)
    with opened(stored.path, stored.flag) as file:
        indices = file[stored.key]["indices"]
        for first in range(0, stored.num_values, MAX_VALUES):
            some = indices[first : first + MAX_VALUES]
            if some.min() < 0 or some.max() >= num_rows:
                raise damaged(stored, "a value in a row that does not exist")
            per_row += np.bincount(some, minlength=num_rows)
    row_starts = np.concatenate([[0], np.cumsum(per_row)])
    places = row_starts[:-1].copy()  # (R,) where the next value of each row goes
    low = 0
    while low < num_columns:
        high = max(low + 1, int(np.searchsorted(starts, starts[low] + MAX_VALUES, side="right")) - 1)
        block = read_columns(stored, starts, low, high)  # (R, high - low) by rows
        found = np.diff(block.indptr)
        target = np.repeat(places - block.indptr[:-1], found) + np.arange(block.nnz)
        values[target] = block.data
        columns[target] = block.indices + low
        places += found
        low = high
    return SparseRows(stored, row_starts, {"data": values, "indices": columns})


def read_columns(stored: StoredMatrix, starts: np.ndarray, low: int, high: int) -> csr_matrix:
    """Columns `low` to `high` - 1 of one stored by columns, (R, high - low), as rows."""
    begin, end = starts[low], starts[high]
    with opened(stored.path, stored.flag) as file:
        values = file[stored.key]["data"][begin:end].astype(np.float32)
        rows = file[stored.key]["indices"][begin:end]
    return csc_matrix((values, rows, starts[low : high + 1] - begin), (stored.shape[0], high - low)).tocsr()


def temporary_arrays(stored: StoredMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Temporary files for values (fp32) and columns (int32), which are deleted with the arrays. Raises UserError if
    the disk is too full."""
    needed, folder = 8 * stored.num_values, tempfile.gettempdir()
    if shutil.disk_usage(folder).free < needed:
        raise UserError(
            f"{stored.flag}: {stored.key} of {stored.path} is stored by columns (CSC), and its copy by rows needs "
            f"{needed / 2**20:,.0f} MiB, which {folder} does not have; set TMPDIR to another folder, or store it by "
            "rows: adata.X = adata.X.tocsr()"
        )
    logger.warning(
        "%s of %s is stored by columns (CSC) and copied by rows to a temporary file of %.0f MiB; store it by rows "
        "(adata.X = adata.X.tocsr()) to spare this",
        *(stored.key, stored.path, needed / 2**20),
    )
    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:  # mapped, they outlive their names
        values = np.memmap(first, np.float32, "w+", shape=(stored.num_values,))
        return values, np.memmap(second, np.int32, "w+", shape=(stored.num_values,))
