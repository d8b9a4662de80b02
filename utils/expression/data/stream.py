"""Cells as batches: an endless stream to train on, and in order to measure on. Counts are densified per batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from utils.draws import StreamOrder
from utils.expression.data.table import CellTable
from utils.expression.vae.likelihoods import Likelihood

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


def blocks(counts: csr_matrix, library_sizes: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Counts (B, G), sparse, and library sizes (B,) of some cells at a time, in fp64: in fp32 the counts of a gene in
    a million cells would no longer add up.
    """
    for first in range(0, len(library_sizes), MOMENT_ROWS):
        rows = slice(first, first + MOMENT_ROWS)
        yield counts[rows].astype(np.float64), library_sizes[rows]


def shares_of(counts: csr_matrix, library_sizes: np.ndarray) -> np.ndarray:
    """(G,) each gene's share of all libraries."""
    totals = np.zeros(counts.shape[1])
    for some, _ in blocks(counts, library_sizes):
        totals += np.asarray(some.sum(axis=0)).ravel()
    return totals / library_sizes.sum()


def second_moments(
    counts: csr_matrix, library_sizes: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over cells of mu^2, (count - mu)^2 and mu, (G,) each, where all cells share their libraries out alike:
    mu = library x share.
    """
    squares, products = np.zeros(len(shares)), np.zeros(len(shares))
    for some, sizes in blocks(counts, library_sizes):
        squares += np.asarray(some.multiply(some).sum(axis=0)).ravel()
        products += some.T @ sizes
    mu_squares = shares**2 * np.square(library_sizes).mean()
    residual_squares = (squares - 2 * shares * products) / len(library_sizes) + mu_squares
    return mu_squares, residual_squares, shares * library_sizes.mean()


def gene_shares(table: CellTable) -> np.ndarray:
    """(G,) `shares_of`; a gene without counts has as much as half of one."""
    return np.maximum(shares_of(table.counts, table.library_sizes), 0.5 / table.library_sizes.sum())


def theta_of_moments(table: CellTable, likelihood: Likelihood) -> np.ndarray:
    """(G,) `theta` of a model in which all cells share their libraries out alike: where training begins."""
    moments = second_moments(table.counts, table.library_sizes, gene_shares(table))
    return likelihood.initial_theta(*moments)
