"""Cells as batches: an endless stream to train on, and in order to measure on. Counts are densified per batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.data_expression import CellTable
from utils.draws import StreamOrder
from utils.likelihoods import Likelihood

MOMENT_ROWS = 4096


def cell_batch(table: CellTable, rows: np.ndarray, batch_index: np.ndarray | None = None) -> dict[str, Tensor]:
    """What `ExpressionVAE.forward` takes, of the rows (B,); `batch_index` (R,) is that of every row of the table."""
    batch = {
        "counts": torch.from_numpy(table.dense(rows)),  # (B, G)
        "library_size": torch.from_numpy(table.library_sizes[rows]).float(),  # (B,)
    }
    return batch if batch_index is None else batch | {"batch_index": torch.from_numpy(batch_index[rows])}


def cell_batches(
    table: CellTable, batch_size: int, batch_index: np.ndarray | None = None
) -> Iterator[dict[str, Tensor]]:
    """All cells, in order."""
    for first in range(0, len(table), batch_size):
        yield cell_batch(table, np.arange(first, min(first + batch_size, len(table))), batch_index)


class CellStream(torch.utils.data.Dataset):
    """The endless stream of training cells: position -> cell, a pure function of (seed, position)."""

    def __init__(self, table: CellTable, seed: int, batch_index: np.ndarray | None = None):
        self.table, self.batch_index, self.order = table, batch_index, StreamOrder(seed, len(table))

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """The batch at `positions`, with the positions in it."""
        where = np.asarray(positions, dtype=np.int64)
        batch = cell_batch(self.table, self.order.rows(where), self.batch_index)
        return batch | {"positions": torch.from_numpy(where)}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


def blocks(table: CellTable) -> Iterator[tuple[Any, np.ndarray]]:
    """Counts (B, G), sparse, and library sizes (B,) of some cells at a time, in fp64: in fp32 the counts of a gene in
    a million cells would no longer add up.
    """
    for first in range(0, len(table), MOMENT_ROWS):
        rows = slice(first, first + MOMENT_ROWS)
        yield table.counts[rows].astype(np.float64), table.library_sizes[rows]


def gene_shares(table: CellTable) -> np.ndarray:
    """(G,) each gene's share of all counts of all libraries; a gene without counts has as much as half of one."""
    totals = np.zeros(len(table.genes))
    for counts, _ in blocks(table):
        totals += np.asarray(counts.sum(axis=0)).ravel()
    return np.maximum(totals, 0.5) / table.library_sizes.sum()


def theta_of_moments(table: CellTable, likelihood: Likelihood) -> np.ndarray:
    """(G,) `theta` of a model in which all cells share their libraries out alike: where training begins."""
    shares = gene_shares(table)
    squares, products = np.zeros(len(shares)), np.zeros(len(shares))
    for counts, library_sizes in blocks(table):
        squares += np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
        products += counts.T @ library_sizes
    library_squares = float(np.square(table.library_sizes).mean())
    mu_squares = shares**2 * library_squares
    residual_squares = squares / len(table) - 2 * shares * products / len(table) + mu_squares
    return likelihood.initial_theta(mu_squares, residual_squares, shares * table.library_sizes.mean())
