"""The latent cache of crystals: sets of latents (N, D) with the columns that can become conditions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.crystal.structure import MAX_ATOMIC_NUMBER
from utils.latents.cache import Draw, RowGatherer
from utils.latents.columns import ColumnCache, describe_column

CONDITION_KINDS = ("property", "composition", "chemical_system", "class")
OF_ATOMS = ("composition", "chemical_system")  # which follow from the atoms, and need no column


class SetCache(ColumnCache):
    """An open cache of sets. A batch has `attention_mask` (B, N), True = atom, beside what a `ColumnCache` gives."""

    kind, title, derived = "set", "crystals", OF_ATOMS

    def __init__(self, cache_dir: str | Path, normalisation: str = "vae"):
        super().__init__(cache_dir, normalisation)
        self.atomic_numbers = RowGatherer(self.table, "atomic_numbers", self.spec.shape[:1])

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, Tensor]:
        """A batch of rows (B,), as `LatentCache.gather`."""
        batch = super().gather(rows, draw)
        atomic_numbers = self.atomic_numbers(rows)  # (B, N)
        batch["attention_mask"] = atomic_numbers > 0
        for name, settings in self.conditions.items():
            if settings["kind"] in OF_ATOMS:
                batch[name] = elements_of(atomic_numbers, settings["kind"])
        return batch


def elements_of(atomic_numbers: Tensor, kind: str) -> Tensor:
    """Atomic numbers (B, N), 0 = padding -> (B, elements): shares of the atoms, or 1 for each element there is."""
    counts = torch.zeros(len(atomic_numbers), MAX_ATOMIC_NUMBER + 1)
    numbers = atomic_numbers.long()
    counts.scatter_add_(1, numbers, torch.ones(numbers.shape))
    counts = counts[:, 1:]
    return (counts > 0).float() if kind == "chemical_system" else counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def describe_condition(cache: SetCache, kind: str, name: str) -> dict[str, Any]:
    """As `describe_column`, of what follows from the atoms too."""
    if kind in OF_ATOMS:
        return {"kind": kind, "num_elements": MAX_ATOMIC_NUMBER}
    return describe_column(cache, kind, name)
