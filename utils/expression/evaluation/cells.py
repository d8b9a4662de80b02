"""Cells that are judged together: their counts, the space in which they are compared, and figures of each type."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.evaluation.figures import Figure, rows_at_most

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
        """Those of `rows`: indices, or a mask (n,) bool."""
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
