"""Crystals as batches: an endless stream to train on, and in order to measure on."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from utils.crystal.data.table import CrystalTable
from utils.draws import SampleDraws, StreamOrder

BATCH_COLUMNS = ("atomic_numbers", "frac_coords", "lengths", "angles")


def crystal_batch(table: CrystalTable, rows: np.ndarray) -> dict[str, Tensor]:
    """What `CrystalVAE.encode` takes, of the rows (B,)."""
    batch = {name: torch.from_numpy(getattr(table, name)[rows]) for name in BATCH_COLUMNS}
    return batch | {"attention_mask": batch["atomic_numbers"] > 0}


def crystal_batches(table: CrystalTable, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All crystals, in order."""
    for first in range(0, len(table), batch_size):
        yield crystal_batch(table, np.arange(first, min(first + batch_size, len(table))))


def translated(frac_coords: Tensor, draws: SampleDraws) -> Tensor:
    """Crystals (B, N, 3) moved by a vector each, uniform in the cell: the same crystals, for a cell has no origin."""
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
