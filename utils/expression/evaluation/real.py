"""Real cells that an evaluation of cells stands on: those that the run never saw, and those that it was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.evaluation.figures import Figure, rows_at_most
from utils.expression.codec import rows_of_split
from utils.expression.data.source import CellSource, open_cells, shortened
from utils.expression.data.table import CellTable, complete_labels, read_table, text_labels

MAX_REAL = 50_000  # real cells of either side that are looked at, drawn at random

COUNTS_PER_CELL = 1e4  # after normalising, as scanpy and Seurat do
NUM_COMPONENTS = 50  # principal components, scanpy's default
MIN_CELLS = 10  # of each set, for figures of two sets


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells that are judged together. Raises UserError where there are none, where shapes do not fit together, and for
    counts or library sizes that are negative or not finite.
    """

    counts: np.ndarray  # (n, G) raw counts over the chosen genes
    library_sizes: np.ndarray  # (n,) what they are normalised by
    labels: np.ndarray | None = None  # (n,) str, or None where there are none

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or not self.counts.size:
            raise UserError(f"counts have the shape {self.counts.shape}; at least one cell and one gene are needed")
        for name, values in (("library sizes", self.library_sizes), ("labels", self.labels)):
            if values is not None and values.shape != (len(self.counts),):
                raise UserError(f"{name} have the shape {values.shape}; {len(self.counts)} cells need one each")
        for name, values in (("counts", self.counts), ("library sizes", self.library_sizes)):
            if not np.isfinite(values).all() or values.min() < 0:
                raise UserError(f"{name} of cells are negative or not finite; raw counts are needed, not scaled ones")
        if self.labels is not None and not all(isinstance(label, str) for label in self.labels):
            raise UserError("some labels of cells are no text; leave cells without a type out, or give no labels")

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def _log_normalised(self) -> np.ndarray:
        scale = np.zeros(len(self), dtype=np.float32)
        np.divide(COUNTS_PER_CELL, self.library_sizes, out=scale, where=self.library_sizes > 0, casting="unsafe")
        values = np.log1p(self.counts.astype(np.float32) * scale[:, None])
        values.setflags(write=False)  # it is handed out again and again
        return values

    def log_normalised(self) -> np.ndarray:
        """(n, G) float32, not to be written to: log(1 + counts / library size * 10,000); zeros for an empty cell."""
        return self._log_normalised

    def take(self, rows: np.ndarray) -> "Cells":
        """The cells of `rows`: indices, or a mask (n,) bool."""
        return Cells(self.counts[rows], self.library_sizes[rows], None if self.labels is None else self.labels[rows])

    def types(self) -> np.ndarray:
        """(n,) str. Raises UserError where there are no labels."""
        if self.labels is None:
            raise UserError("these cells have no labels, and this figure needs the type of each")
        return self.labels


# ---- two sets


def check_alike(*sets: Cells) -> None:
    """Raises UserError unless all have the same number of genes and at least 10 cells."""
    genes = [cells.counts.shape[1] for cells in sets]
    if len(set(genes)) > 1:
        raise UserError(f"sets of cells have {' and '.join(map(str, genes))} genes; judge all on the same genes")
    if min(map(len, sets)) < MIN_CELLS:
        raise UserError(f"{min(map(len, sets))} cells; figures need at least {MIN_CELLS} of each set")


def equal_numbers(real: Cells, generated: Cells, count: int, seed: int) -> tuple[Cells, Cells]:
    """As many of both, at most `count` each, drawn at random. Raises UserError as `check_alike` does."""
    check_alike(real, generated)
    count = min(len(real), len(generated), count)
    first, second = (cells.take(rows_at_most(len(cells), count, seed).numpy()) for cells in (real, generated))
    return first, second


def principal_components(values: np.ndarray) -> Any:
    """scikit-learn's PCA of values (n, G), fitted: 50 components, or as many as there are. Raises UserError where all
    rows are the same.
    """
    from sklearn.decomposition import PCA

    if (values == values[0]).all():
        raise UserError("all cells have the same counts; there is nothing to compare")
    count = min(NUM_COMPONENTS, len(values) - 1, values.shape[1])
    solver = "arpack" if count < min(values.shape) else "full"
    return PCA(count, svd_solver=solver, random_state=0).fit(values)


def pooled_space(real: Cells, generated: Cells) -> tuple[np.ndarray, np.ndarray]:
    """(n, 50) and (m, 50) float64: log-normalised cells in principal components that are fitted on both together.
    Those of either set alone would hold that set's noise, and tell it from the other one: with components of the
    training set, held-out real cells are told from training cells with an AUC of 0.6 to 0.8.
    """
    values = np.concatenate([real.log_normalised(), generated.log_normalised()])
    points = principal_components(values).transform(values).astype(np.float64)
    return points[: len(real)], points[len(real) :]


def per_type(
    function: Callable[[Cells, Cells], dict[str, Figure]], real: Cells, generated: Cells, min_cells: int = 20
) -> dict[str, dict[str, Figure]]:
    """type -> figures of its real and its generated cells, for the types that have `min_cells` of both. Raises
    UserError where there are no labels.
    """
    of_real, of_generated = real.types(), generated.types()
    found = {}
    for kind in sorted(set(of_real) & set(of_generated)):
        mine, other = of_real == kind, of_generated == kind
        if min(mine.sum(), other.sum()) >= min_cells:
            found[str(kind)] = function(real.take(mine), generated.take(other))
    return found


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
        """All test cells."""
        return cells_of(self.test.dense(slice(None)), self.labels_of(self.test))

    @cached_property
    def training_cells(self) -> Cells | None:
        """All training cells; None where it is not known which those are."""
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
    *,
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
    test = read_real(source, test_rows, genes, library, flag="--reference", notes=notes)
    if len(test) < MIN_CELLS:
        what = reference if split_of is None else f"{reference}, split {split},"
        raise UserError(f"--reference: {what} has {len(test)} cells; figures need at least {MIN_CELLS}: give more")
    training = None
    if training_data is not None or split_of is not None:
        known = source if training_data is None else open_cells(training_data, counts_layer, "--training_data")
        rows = rows_of(known, split_of, training_split, "--training_data_split")
        check_apart(source, test_rows, known, rows)
        training = read_real(known, rows, genes, library, flag="--training_data", notes=notes)
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
    source: CellSource, rows: np.ndarray, genes: list[str], library: str, *, flag: str, notes: list[str]
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
