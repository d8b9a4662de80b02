"""The latent cache of crystals: sets of latents (N, D) with the columns that can become conditions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.crystals import MAX_ATOMIC_NUMBER
from utils.errors import UserError
from utils.latent_cache import LatentCache, RowGatherer

CONDITION_KINDS = ("property", "composition", "chemical_system", "class")
OF_ATOMS = ("composition", "chemical_system")  # which follow from the atoms, and need no column
TAKEN = ("latents", "attention_mask", "positions")  # names of a batch's own values


class SetCache(LatentCache):
    """An open cache of sets. A batch has `attention_mask` (B, N), True = atom, and the values of the conditions that
    were asked for with `use_conditions`.
    """

    def __init__(self, cache_dir: str | Path, normalisation: str = "vae"):
        super().__init__(cache_dir, normalisation)
        if self.spec.kind != "set":
            raise UserError(f"--latents_dir: {cache_dir} holds {self.spec.kind} latents; give a cache of crystals")
        self.atomic_numbers = RowGatherer(self.table, "atomic_numbers", self.spec.shape[:1])
        self.conditions: dict[str, dict[str, Any]] = {}
        self.values: dict[str, np.ndarray] = {}  # (R,) of each condition but those of the atoms

    def use_conditions(self, conditions: dict[str, dict[str, Any]]) -> None:
        """Makes `gather` give the values of `conditions` (name -> kind and settings, see `ConditionSum`). Raises
        UserError where this cache has no such column.
        """
        self.conditions = conditions
        for name, settings in conditions.items():
            if settings["kind"] not in OF_ATOMS:
                column = self.column(name, settings["kind"])
                self.values[name] = category_numbers(column, settings["names"]) if "names" in settings else column

    def like(self, cache_dir: str | Path) -> "SetCache":
        """The cache of another split, with the same conditions."""
        other = super().like(cache_dir)
        assert isinstance(other, SetCache)
        other.use_conditions(self.conditions)
        return other

    def column(self, name: str, kind: str) -> np.ndarray:
        """A column of the source (R,), for a `kind` of condition: float64 with NaN, or text with None where there is
        none.
        """
        known = self.spec.columns or {}
        if name in TAKEN:
            raise UserError(f"--condition {kind}:{name}: batches have something else of that name; rename the column")
        if name not in known:
            raise UserError(f"--condition: the latent cache has no column {name}; it has {', '.join(known) or 'none'}")
        if kind == "property" and known[name] != "number":
            raise UserError(f"--condition property:{name}: it holds text; use class:{name}")
        values = self.table.data.column(f"column.{name}").to_numpy()
        return values.astype(np.float64 if known[name] == "number" else object)

    def gather(
        self, rows: np.ndarray, variant_draw: np.ndarray | None = None, caption_draw: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """A batch of rows (B,), as `LatentCache.gather`."""
        batch = super().gather(rows, variant_draw, caption_draw)
        atomic_numbers = self.atomic_numbers(rows)  # (B, N)
        batch["attention_mask"] = atomic_numbers > 0
        for name, settings in self.conditions.items():
            if settings["kind"] in OF_ATOMS:
                batch[name] = elements_of(atomic_numbers, settings["kind"])
            else:
                batch[name] = torch.from_numpy(self.values[name][rows])
                batch[name] = batch[name].float() if batch[name].is_floating_point() else batch[name]
        return batch


def elements_of(atomic_numbers: Tensor, kind: str) -> Tensor:
    """Atomic numbers (B, N), 0 = padding -> (B, elements): shares of the atoms, or 1 for each element there is."""
    counts = torch.zeros(len(atomic_numbers), MAX_ATOMIC_NUMBER + 1)
    numbers = atomic_numbers.long()
    counts.scatter_add_(1, numbers, torch.ones(numbers.shape))
    counts = counts[:, 1:]
    return (counts > 0).float() if kind == "chemical_system" else counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def category_name(value: Any) -> str | None:
    """A value of a column as the name of its category: 225.0 is 225. None where there is none: of "" too."""
    if value is None or value == "" or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def category_numbers(column: np.ndarray, names: list[str]) -> np.ndarray:
    """The places (R,) of a column's values among the names of categories, -1 = missing or none of them."""
    places = {name: place for place, name in enumerate(names)}
    return np.array([places.get(category_name(value) or "", -1) for value in column], dtype=np.int64)


def describe_condition(cache: SetCache, kind: str, name: str) -> dict[str, Any]:
    """What `ConditionSum` must know of a condition, measured on a training cache. Raises UserError for a column that
    is not there, that says nothing, or is of another kind.
    """
    if kind in OF_ATOMS:
        return {"kind": kind, "num_elements": MAX_ATOMIC_NUMBER}
    column = cache.column(name, kind)
    if kind == "class":
        names = sorted({found for value in column if (found := category_name(value)) is not None})
        if len(names) < 2:
            raise UserError(f"--condition class:{name}: it has {len(names)} different values; a condition needs two")
        return {"kind": kind, "names": names}
    known = column[np.isfinite(column)]
    if len(known) < 2 or np.ptp(known) == 0:  # the std of equal numbers may be 1e-17
        what = "is the same everywhere" if len(known) else "holds no number"
        raise UserError(f"--condition property:{name}: the column {what}; a condition needs different values")
    return {"kind": kind, "mean": float(known.mean()), "std": float(known.std())}
