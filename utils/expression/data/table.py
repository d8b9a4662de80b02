"""Cells as models see them: counts of the chosen genes, split into training, validation and test. Cells that cannot be
used are skipped, with the reason."""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.expression.data.genes import find_genes
from utils.expression.data.source import CellSource, shortened
from utils.expression.data.store import counts_in_folder, counts_in_memory
from utils.expression.vae.likelihoods import LIBRARIES

logger = logging.getLogger(__name__)
MIN_CELLS_OF_A_TYPE = 5
SPLITS = ("train", "val", "test")
HASHED_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False, repr=False)
class CellTable:
    """R cells with counts of G genes."""

    counts: csr_matrix  # (R, G) fp32; of a table read with a folder, its arrays are mapped from there
    library_sizes: np.ndarray  # (R,) float64, above 0
    genes: list[str]
    cell_ids: np.ndarray  # (R,) of str
    obs: dict[str, np.ndarray]  # (R,) each: text (object, None = none) or float64 (NaN = none)
    skipped: list[dict[str, Any]] = field(default_factory=list)  # cell, reason

    def __len__(self) -> int:
        return len(self.cell_ids)

    def dense(self, rows: np.ndarray | list[int] | slice) -> np.ndarray:
        """(B, G) fp32 counts of some cells (a mask, a slice or numbers of rows)."""
        return np.ascontiguousarray(self.counts[rows].toarray(), dtype=np.float32)

    def take(self, rows: np.ndarray) -> "CellTable":
        """Some of the cells (a mask or numbers of rows), in memory."""
        obs = {name: values[rows] for name, values in self.obs.items()}
        return replace(
            self,
            counts=self.counts[rows],
            library_sizes=self.library_sizes[rows],
            cell_ids=self.cell_ids[rows],
            obs=obs,
        )

    def identity(self) -> str:
        """A hash of the content, the same in memory and in a folder."""
        digest = hashlib.sha256()
        arrays = ((self.counts.data, "<f4"), (self.counts.indices, "<i8"), (self.counts.indptr, "<i8"))
        for array, dtype in (*arrays, (self.library_sizes, "<f8")):
            for first in range(0, len(array), HASHED_AT_ONCE):
                digest.update(np.ascontiguousarray(array[first : first + HASHED_AT_ONCE], dtype=dtype).data)
        columns = {name: [str(value) for value in values] for name, values in sorted(self.obs.items())}
        for value in (self.genes, list(self.cell_ids), columns):
            digest.update(json.dumps(value).encode())
        return digest.hexdigest()


def read_table(
    source: CellSource,
    rows: np.ndarray,
    genes: list[str],
    library: str = "chosen",
    folder: Path | None = None,
    max_skipped_fraction: float = 0.05,
) -> CellTable:
    """The cells of some rows (ascending) with counts of `genes`, found by name and put in this order. Library sizes
    are sums over these genes ('chosen') or over all genes of the source ('all'). With `folder` the counts lie there,
    in files that the next call with the same arguments reuses. Cells without counts in these genes are left out.
    Raises UserError if these are more than `max_skipped_fraction`, and for genes that the source does not have."""
    if library not in LIBRARIES:
        raise ValueError(f"library {library!r}; expected one of {', '.join(LIBRARIES)}")
    if len(set(genes)) < len(genes) or not genes:
        raise ValueError("genes must be named once each, and one at least")
    rows, columns = np.asarray(rows, dtype=np.int64), find_genes(source, genes)
    of_all = library == "all"
    if folder is None:
        stored = counts_in_memory(source, rows, columns, of_all)
    else:
        stored = counts_in_folder(source, rows, columns, of_all, folder)
    left_out = source.cell_ids[np.setdiff1d(rows, stored.rows)]
    if len(rows) and (not len(stored.rows) or len(left_out) > max_skipped_fraction * len(rows)):
        raise UserError(
            f"{source.flag}: {len(left_out)} of {len(rows)} cells of {source.name} have no counts in the {len(genes)} "
            f"chosen genes ({shortened(list(left_out))}), and at most {max_skipped_fraction:.0%} may be left out; "
            "give more genes by --num_genes, or take empty cells out of the file"
        )
    reason = f"no counts in the {len(genes)} chosen genes"
    if len(left_out):
        logger.warning("%s: %d of %d cells are skipped: %s", source.name, len(left_out), len(rows), reason)
    return CellTable(
        stored.counts,
        stored.library_sizes,
        list(genes),
        source.cell_ids[stored.rows],
        {name: values[stored.rows] for name, values in source.obs.items()},
        skipped=[{"cell": cell, "reason": reason} for cell in left_out],
    )


def check_labels(source: CellSource | CellTable, column: str, flag: str) -> np.ndarray:
    """(R,) labels (object, of str) of a column of obs; whole numbers become text. Raises UserError, which names the
    flag, unless each cell has one, there are two types at least, and each of them has MIN_CELLS_OF_A_TYPE cells.
    """
    if column not in source.obs:
        there = ", ".join(source.obs) or "none"
        raise UserError(f"{flag}: there is no column {column} in adata.obs; there are {there}")
    labels = complete_labels(source.obs[column], column, flag)
    found = Counter(labels)
    if len(found) < 2:
        raise UserError(f"{flag}: all cells have one {column} ({', '.join(found)}); give a column with two or more")
    rare = sorted((number, label) for label, number in found.items() if number < MIN_CELLS_OF_A_TYPE)
    if rare:
        named = shortened([f"{label}: {number}" for number, label in rare])
        raise UserError(
            f"{flag}: {len(rare)} of {len(found)} types in {column} have fewer than {MIN_CELLS_OF_A_TYPE} cells "
            f"({named}); merge them with others, or take them out of the file"
        )
    return labels


def complete_labels(values: np.ndarray, column: str, flag: str) -> np.ndarray:
    """`text_labels` of a column in which each cell has one. Raises UserError where some have none."""
    labels = text_labels(values, column, flag)
    if without := sum(label is None or not label.strip() for label in labels):
        raise UserError(
            f"{flag}: {without} of {len(labels)} cells have no {column}; name their type, or take them out of the file"
        )
    return labels


def text_labels(values: np.ndarray, column: str, flag: str) -> np.ndarray:
    """A column of obs as text (object) with None where there is none. Raises UserError for numbers that are no whole
    ones.
    """
    if values.dtype == object:
        return values
    present = values[~np.isnan(values)]
    if (present != np.rint(present)).any():
        raise UserError(
            f"{flag}: {column} holds numbers from {present.min():g} to {present.max():g}, no types; name a column of "
            "labels"
        )
    return np.array([None if np.isnan(value) else f"{value:.0f}" for value in values], dtype=object)


def stratified_split(
    labels: np.ndarray | None, num_cells: int, validation_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """(R,) of "train", "val" and "test". Each type is divided in these proportions as nearly as whole cells allow (by
    the largest remainder; ties at random), and keeps a training cell; without labels all cells are of one type. The
    same for the same seed. Raises UserError for fractions that leave nothing to train on, or nothing where they ask
    for something.
    """
    fractions = {"--validation_fraction": validation_fraction, "--test_fraction": test_fraction}
    for flag, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise UserError(f"{flag}: {fraction} is no fraction; give one from 0 to below 1")
    if validation_fraction + test_fraction >= 1:
        raise UserError(
            f"--validation_fraction, --test_fraction: {validation_fraction} and {test_fraction} leave no cells to "
            "train on; give less"
        )
    types = np.zeros(num_cells, dtype=np.int64)
    if labels is not None:
        if len(labels) != num_cells:
            raise ValueError(f"{len(labels)} labels for {num_cells} cells")
        types = np.unique(labels.astype(str), return_inverse=True)[1]
    shares = np.array([1 - validation_fraction - test_fraction, validation_fraction, test_fraction])
    generator = np.random.default_rng(seed)
    split = np.full(num_cells, "train", dtype="<U5")
    for each in range(types.max(initial=-1) + 1):
        cells = generator.permutation(np.flatnonzero(types == each))
        train, val, _ = apportioned(len(cells), shares, generator)
        split[cells[train : train + val]] = "val"
        split[cells[train + val :]] = "test"
    for (flag, fraction), name in zip(fractions.items(), SPLITS[1:], strict=True):
        if fraction and not (split == name).any():
            raise UserError(
                f"{flag}: {fraction} of {num_cells} cells in {types.max(initial=0) + 1} types is not one cell of any; "
                "give more"
            )
    return split


def apportioned(number: int, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(3,) how many of `number` cells each split gets, at least one of them the first (the method of Hamilton)."""
    quotas = np.round(number * shares, 9)  # 0.29 * 100 is below 29
    parts = np.floor(quotas).astype(np.int64)
    order = np.lexsort((generator.random(len(shares)), -np.round(quotas - parts, 9)))
    parts[order[: number - parts.sum()]] += 1
    if parts[0] == 0:
        parts[np.argmax(parts - quotas)] -= 1
        parts[0] = 1
    return parts
