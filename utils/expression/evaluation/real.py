"""Real cells that an evaluation of cells stands on: those that the run never saw, and those that it was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.evaluation.figures import rows_at_most
from utils.expression.codec import rows_of_split
from utils.expression.data.source import CellSource, open_cells, shortened
from utils.expression.data.table import CellTable, complete_labels, read_table, text_labels
from utils.expression.evaluation.cells import MIN_CELLS, Cells

MAX_REAL = 50_000  # real cells of either side that are looked at, drawn at random


def cells_of(counts: np.ndarray, labels: np.ndarray | None = None) -> Cells:
    """Counts (n, G) as figures take them. The library of every cell, real or not, is the sum of these counts."""
    return Cells(counts, counts.sum(axis=1, dtype=np.float64), labels)


@dataclass(frozen=True, eq=False)
class Real:
    """Cells that the run never saw, and those that it was trained on, with counts of the same genes."""

    test: CellTable
    training: CellTable | None
    label_column: str | None  # of obs; every cell has a type there
    notes: list[str]

    @cached_property
    def test_cells(self) -> Cells:
        """All of them."""
        return cells_of(self.test.dense(slice(None)), self.labels_of(self.test))

    @cached_property
    def training_cells(self) -> Cells | None:
        """All of them; None where it is not known which those are."""
        if self.training is None:
            return None
        return cells_of(self.training.dense(slice(None)), self.labels_of(self.training))

    def labels_of(self, table: CellTable) -> np.ndarray | None:
        """The types (R,) of either table."""
        if self.label_column is None:
            return None
        return text_labels(table.obs[self.label_column], self.label_column, "--label_column")


def open_real(
    reference: str,
    split: str,
    training_data: str | None,
    training_split: str,
    counts_layer: str | None,
    genes: list[str],
    library: str,
    split_of: Path | None,
    label_column: str | None,
    text_columns: Sequence[str] = (),
) -> Real:
    """The real cells of the flags; all of each file where no run or autoencoder (`split_of`) tells them apart. Types
    are those of `label_column`, or of the one of `text_columns`, those of samples, that the reference has too. Raises
    UserError for cells that are on both sides, for too few, and where cells have no type.
    """
    source = open_cells(reference, counts_layer, "--reference")
    notes: list[str] = []
    test_rows = rows_of(source, split_of, split, "--reference_split")
    test = read_real(source, test_rows, genes, library, "--reference", notes)
    if len(test) < MIN_CELLS:
        what = reference if split_of is None else f"{reference}, split {split},"
        raise UserError(f"--reference: {what} has {len(test)} cells; figures need at least {MIN_CELLS}: give more")
    training = None
    if training_data is not None or split_of is not None:
        known = source if training_data is None else open_cells(training_data, counts_layer, "--training_data")
        rows = rows_of(known, split_of, training_split, "--training_data_split")
        check_apart(source, test_rows, known, rows)
        training = read_real(known, rows, genes, library, "--training_data", notes)
        if len(training) < MIN_CELLS:
            raise UserError(f"--training_data: {len(training)} cells; at least {MIN_CELLS} are needed: give more")
    shared = [name for name in text_columns if name in test.obs and test.obs[name].dtype == object]
    if label_column is None and len(shared) == 1:
        label_column = shared[0]
    for table, flag in ((test, "--reference"), (training, "--training_data")):
        if table is not None and label_column is not None:
            check_types(table, label_column, flag)
    real = Real(test, training, label_column, notes)
    if label_column is not None and training is not None:
        sides = [set(real.labels_of(table)) for table in (test, training)]  # type: ignore[arg-type]
        if not sides[0] & sides[1]:
            raise UserError(
                f"--training_data: it has no {label_column} of --reference ({shortened(sorted(sides[0]))}), but "
                f"{shortened(sorted(sides[1]))}; rename one of the two"
            )
    return real


def rows_of(source: CellSource, split_of: Path | None, split: str, flag: str) -> np.ndarray:
    """The rows of a source that an autoencoder knows as a split; all of them, where there is none."""
    return rows_of_split(source, str(split_of), "all" if split_of is None else split, flag)


def check_apart(test: CellSource, test_rows: np.ndarray, training: CellSource, training_rows: np.ndarray) -> None:
    """Raises UserError for cells of one file that are on both sides. (Other files may share barcodes by chance.)"""
    both = len(np.intersect1d(test_rows, training_rows))
    if both and test.path.resolve() == training.path.resolve():
        raise UserError(
            f"--reference: {both} of {len(test_rows)} cells of {test.path} are training cells, of which copies would "
            "be perfect; give cells that the run never saw: --reference_split test, or another file"
        )


def read_real(
    source: CellSource, rows: np.ndarray, genes: list[str], library: str, flag: str, notes: list[str]
) -> CellTable:
    """Some cells of a source, of very many a random part; what is left out is noted."""
    kept = rows[rows_at_most(len(rows), MAX_REAL).numpy()]
    if len(kept) < len(rows):
        notes.append(f"{flag}: {MAX_REAL} of {len(rows)} cells, drawn at random, are looked at")
    table = read_table(source, kept, genes, library)
    if table.skipped:
        notes.append(f"{flag}: {len(table.skipped)} cells are left out ({table.skipped[0]['reason']})")
    return table


def check_types(table: CellTable, column: str, flag: str) -> None:
    """Raises UserError unless each cell has a type, and there are two or more."""
    if column not in table.obs:
        there = ", ".join(table.obs) or "none"
        raise UserError(f"{flag}: there is no column {column} in adata.obs (--label_column); there are {there}")
    labels = complete_labels(table.obs[column], column, flag)
    if len(kinds := set(labels)) < 2:
        raise UserError(
            f"{flag}: all {len(labels)} cells have the {column} {', '.join(kinds)}; judging by types needs two of "
            "them: name another --label_column"
        )
