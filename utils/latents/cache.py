"""Reading the latent cache: a `datasets` dataset in Arrow shards, and the spec that says what is in it.

    CACHE/latent_spec.json    written last: a cache without it is not finished
    CACHE/latents/            one row a sample: raw latents, and what else is known of it
    CACHE/captions/           of images with captions: one row a distinct caption
    CACHE/skipped.jsonl       the samples that could not be read, and why

The folders open with `datasets.load_from_disk`. Raw latents are stored and normalised when read.
`utils/latents/writer.py` writes it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
from torch import Tensor

from utils.draws import PartReader, SampleDraws, StreamOrder, uniform_draws
from utils.errors import UserError
from utils.files import read_json, sha256_file
from utils.latents.spec import SPEC_FILE, LatentSpec, Normalisation


def open_table(folder: Path) -> datasets.Dataset:
    """A table of the cache. Raises UserError unless each shard is there with the bytes that were written: Arrow itself
    would read a zeroed page without a word.
    """
    state = folder / "state.json"
    shards = [folder / file["filename"] for file in read_json(state)["_data_files"]] if state.is_file() else []
    for path in (state, *shards, *(shard.with_suffix(".json") for shard in shards)):
        if not path.is_file():
            raise UserError(f"--latents_dir: {path} is missing; precompute again, into another folder")
    with ThreadPoolExecutor() as pool:
        for shard, digest in zip(shards, pool.map(sha256_file, shards), strict=True):
            if digest != read_json(shard.with_suffix(".json"))["sha256"]:
                raise UserError(
                    f"--latents_dir: {shard} is damaged (its sha256 is not that of its manifest); precompute again, "
                    "into another folder"
                )
    return datasets.load_from_disk(str(folder))


def column_views(table: datasets.Dataset, column: str) -> list[np.ndarray]:
    """A column of fixed-size lists as arrays (rows, n), one for each record batch, straight on the memory-mapped
    file.
    """
    return [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in table.data.column(column).chunks]


class RowGatherer:
    """Copies rows of a fixed-size column into one batch: one memory copy a row, no Python object in between."""

    def __init__(self, table: datasets.Dataset, column: str, shape: tuple[int, ...]):
        self.views = column_views(table, column)
        self.starts = np.cumsum([0] + [len(view) for view in self.views])
        self.shape = shape

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Rows (B,) -> tensor (B, *shape) in the stored dtype."""
        if not len(rows):
            return torch.from_numpy(self.views[0][:0].copy()).view(0, *self.shape)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        places = zip(shards.tolist(), (rows - self.starts[shards]).tolist(), strict=True)
        batch = np.concatenate([self.views[shard][offset : offset + 1] for shard, offset in places])
        return torch.from_numpy(batch).view(len(rows), *self.shape)


Draw = Callable[[str], np.ndarray]  # the name of a draw -> a number in [0, 1) for each row (B,) of a batch


class LatentCache:
    """An open latent cache: `gather(rows, draw)` and `normalise(batch, draws)`. What a modality stores beside the
    latents is read by its subclass.
    """

    reader: PartReader | None = None  # of a whole cache there is none

    def __init__(self, cache_dir: str | Path, normalisation: str = "vae"):
        """`normalisation`: "vae" (its scaling and shift) or "measured" (mean and std per channel of this data)."""
        self.spec = LatentSpec.read(cache_dir)
        self.normalisation = Normalisation(**{k: tuple(v) for k, v in self.spec.normalisation[normalisation].items()})
        self.table = table = open_table(Path(cache_dir) / "latents")
        if len(table) != self.spec.num_rows:
            raise UserError(
                f"{cache_dir}: {len(table)} rows on disk, {self.spec.num_rows} in {SPEC_FILE}; precompute again"
            )
        planes = 2 if self.spec.content == "moments" else 1
        shape = (planes, *self.spec.shape)
        self.latents = [RowGatherer(table, column, shape) for column in self.spec.variants()]
        self.num_rows = len(table)  # here; `spec.num_rows` counts all parts

    def join_parts(self, whole: LatentSpec, normalisation: str, reader: PartReader) -> None:
        """Makes this one part of the cache that `whole` describes, of which `reader` says who else reads."""
        self.spec, self.reader = whole, reader
        self.normalisation = Normalisation(**{k: tuple(v) for k, v in whole.normalisation[normalisation].items()})

    def like(self, cache_dir: str | Path, **more: Any) -> Self:
        """The cache of another split of the same data, normalised as this one; `more` is what its class takes."""
        other = type(self)(cache_dir, **more)
        other.normalisation = self.normalisation
        return other

    def __len__(self) -> int:
        return self.num_rows

    def identity(self) -> str:
        """What a checkpoint remembers of the data: a hash of the fingerprint, and how parts are read."""
        if self.reader is None:
            return self.spec.identity()
        return f"{self.spec.identity()}, in parts, by {self.reader.num_processes} x {self.reader.batch_size}"

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, Tensor]:
        """A batch of rows (B,). Where more than one encode of each is stored (mirrored, translated), `draw("flip")`
        picks one; without `draw` it is the first.
        """
        moments = self.latents[0](rows)  # (B, planes, ...)
        if draw is not None and len(self.latents) > 1:
            share = 1 - 2.0**-53 - draw("flip")  # below a half of the draw: mirrored
            variants = (share * len(self.latents)).astype(np.int64)
            for variant, latents in enumerate(self.latents[1:], start=1):
                moments[torch.from_numpy(variants == variant)] = latents(rows[variants == variant])
        return {"latents": moments}

    def normalise(self, batch: dict[str, Tensor], draws: SampleDraws) -> Tensor:
        """The latents (B, ...) that the denoiser sees; of moments a fresh sample of the posterior each time."""
        moments = batch["latents"].float()
        raw_latents = moments[:, 0]
        if self.spec.content == "moments":
            raw_latents = raw_latents + moments[:, 1] * draws.normal("posterior", raw_latents.shape)
        return self.normalisation.normalise(raw_latents)


class LatentStream(torch.utils.data.Dataset):
    """The endless stream of training samples: position -> sample, a pure function of (seed, position).

    What a cache draws (a flip, a caption) is drawn for each position, so it differs between epochs.
    """

    def __init__(self, cache: LatentCache, seed: int, rows: np.ndarray | None = None):
        """`rows`: those of the cache that are trained on, by default all."""
        self.cache, self.rows = cache, rows
        self.seed = seed
        self.order = StreamOrder(seed, len(cache) if rows is None else len(rows))

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """The batch at `positions`, with the positions in it."""
        where = np.asarray(positions, dtype=np.int64)
        where, in_part = (where, where) if self.cache.reader is None else self.cache.reader.positions(where)
        picked = self.order.rows(in_part)
        rows = picked if self.rows is None else self.rows[picked]
        batch = self.cache.gather(rows, partial(uniform_draws, self.seed, positions=where))
        return batch | {"positions": torch.from_numpy(where)}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}
