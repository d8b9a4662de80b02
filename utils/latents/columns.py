"""Latent caches with the columns of their source, which can become conditions."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.latents.cache import Draw, LatentCache

TAKEN = ("latents", "attention_mask", "positions")  # names of a batch's own values


class ColumnCache(LatentCache):
    """An open cache of one `kind` of latents. A batch has the values of the conditions that were asked for with
    `use_conditions`.
    """

    kind, title = "", ""  # of the latents, and of what they are of
    derived: tuple[str, ...] = ()  # kinds of conditions that follow from something else than a column

    def __init__(self, cache_dir: str | Path, normalisation: str = "vae"):
        super().__init__(cache_dir, normalisation)
        if self.spec.kind != self.kind:
            raise UserError(f"--latents_dir: {cache_dir} holds {self.spec.kind} latents; give a cache of {self.title}")
        self.conditions: dict[str, dict[str, Any]] = {}
        self.values: dict[str, np.ndarray] = {}  # (R,) of each condition that is a column

    def use_conditions(self, conditions: dict[str, dict[str, Any]]) -> None:
        """Makes `gather` give the values of `conditions` (name -> kind and settings, see `ConditionSum`). Raises
        UserError where this cache has no such column.
        """
        self.conditions = conditions
        for name, settings in conditions.items():
            if settings["kind"] not in self.derived:
                column = self.column(name, settings["kind"])
                self.values[name] = category_numbers(column, settings["names"]) if "names" in settings else column

    def like(self, cache_dir: str | Path, **more: Any) -> Self:
        """The cache of another split, with the same conditions."""
        other = super().like(cache_dir, **more)
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

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, Tensor]:
        """A batch of rows (B,), as `LatentCache.gather`."""
        batch = super().gather(rows, draw)
        for name, values in self.values.items():
            value = torch.from_numpy(values[rows])
            batch[name] = value.float() if value.is_floating_point() else value
        return batch


def category_name(value: Any) -> str | None:
    """A value of a column as the name of its category: 225.0 is 225. None where there is none: of "" too."""
    if value is None or value == "" or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def category_numbers(column: np.ndarray, names: list[str]) -> np.ndarray:
    """The places (R,) of a column's values among the names of categories, -1 = missing or none of them."""
    places = {name: place for place, name in enumerate(names)}
    return np.array([places.get(category_name(value) or "", -1) for value in column], dtype=np.int64)


def describe_column(cache: ColumnCache, kind: str, name: str) -> dict[str, Any]:
    """What `ConditionSum` must know of a condition, measured on a training cache. Raises UserError for a column that
    is not there, that says nothing, or is of another kind.
    """
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
