"""Reading the latent cache: a `datasets` dataset in Arrow shards, and the spec that says what is in it.

    CACHE/latent_spec.json    written last: a cache without it is not finished
    CACHE/latents/            one row an image: raw latents, label, captions and their ids
    CACHE/captions/           one row a distinct caption: text-encoder states or token ids
    CACHE/skipped.jsonl       the images that could not be read, and why

Both folders open with `datasets.load_from_disk`. Raw latents are stored and normalised when read.
`utils/latents/writer.py` writes it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


class LatentCache:
    """An open latent cache: `gather(rows, ...)` and `normalise(batch, draws)`."""

    reader: PartReader | None = None  # None for a whole cache

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
        self.class_labels = table.data.column("label").to_numpy() if self.spec.labels else None
        if self.spec.captions:
            self._open_captions(table, Path(cache_dir) / "captions")
        self.num_rows = len(table)  # here; `spec.num_rows` counts all parts

    def join_parts(self, whole: LatentSpec, normalisation: str, reader: PartReader) -> None:
        """Makes this one part of the cache that `whole` describes, of which `reader` says who else reads."""
        self.spec, self.reader = whole, reader
        self.normalisation = Normalisation(**{k: tuple(v) for k, v in whole.normalisation[normalisation].items()})

    def like(self, cache_dir: str | Path) -> "LatentCache":
        """The cache of another split of the same data, normalised as this one."""
        other = type(self)(cache_dir)
        other.normalisation = self.normalisation
        return other

    def _open_captions(self, table: datasets.Dataset, folder: Path) -> None:
        assert self.spec.captions is not None
        ids = table.data.column("caption_id").combine_chunks()
        captions = open_table(folder)
        known = captions.data.column("caption_id").to_numpy()
        order = np.argsort(known)
        # Row of the caption table for each (image, caption) pair, and where each image's captions begin.
        self.caption_rows = order[np.searchsorted(known[order], ids.flatten().to_numpy())]
        self.caption_starts = ids.offsets.to_numpy().astype(np.int64)
        self.caption_starts -= self.caption_starts[0]
        self.num_tokens = captions.data.column("num_tokens").to_numpy()
        self.caption_texts = captions.data.column("caption")
        self.caption_content = self.spec.captions["content"]
        self.caption_states = RowGatherer(captions, self.caption_content, tuple(self.spec.captions["shape"]))

    def __len__(self) -> int:
        return self.num_rows

    def identity(self) -> str:
        """What a checkpoint remembers of the data: a hash of the fingerprint, and how parts are read."""
        if self.reader is None:
            return self.spec.identity()
        return f"{self.spec.identity()}, in parts, by {self.reader.num_processes} x {self.reader.batch_size}"

    def gather(
        self, rows: np.ndarray, variant_draw: np.ndarray | None = None, caption_draw: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """A batch of rows (B,). `variant_draw` (B,) in [0, 1) picks a mirrored or translated encode of each (the first
        without it), `caption_draw` (B,) in [0, 1) a caption.
        """
        moments = self.latents[0](rows)  # (B, planes, C, H, W)
        if variant_draw is not None and len(self.latents) > 1:
            variants = (variant_draw * len(self.latents)).astype(np.int64)
            for variant, latents in enumerate(self.latents[1:], start=1):
                moments[torch.from_numpy(variants == variant)] = latents(rows[variants == variant])
        batch = {"latents": moments}
        if self.class_labels is not None:
            batch["class_labels"] = torch.from_numpy(self.class_labels[rows])
        if self.spec.captions:
            counts = self.caption_starts[rows + 1] - self.caption_starts[rows]
            chosen = 0 if caption_draw is None else (caption_draw * counts).astype(np.int64)
            captions = self.caption_rows[self.caption_starts[rows] + chosen]
            name = "input_ids" if self.caption_content == "input_ids" else "encoder_hidden_states"
            batch[name] = self.caption_states(captions)
            batch["num_tokens"] = torch.from_numpy(self.num_tokens[captions])
        return batch

    def first_captions(self, rows: np.ndarray) -> list[str]:
        """The text of the first caption of each of the rows (B,)."""
        return self.caption_texts.take(self.caption_rows[self.caption_starts[rows]]).to_pylist()

    def null_caption(self) -> tuple[Tensor, int]:
        """What is stored for the empty caption, (S, D) states or (S,) token ids, and its count of real tokens. Always
        row 0.
        """
        return self.caption_states(np.array([0]))[0], int(self.num_tokens[0])

    def normalise(self, batch: dict[str, Tensor], draws: SampleDraws) -> Tensor:
        """The latents (B, C, H, W) that the denoiser sees; of moments a fresh sample of the posterior each time."""
        moments = batch["latents"].float()
        raw_latents = moments[:, 0]
        if self.spec.content == "moments":
            raw_latents = raw_latents + moments[:, 1] * draws.normal("posterior", raw_latents.shape)
        return self.normalisation.normalise(raw_latents)


class LatentStream(torch.utils.data.Dataset):
    """The endless stream of training samples: position -> sample, a pure function of (seed, position).

    A flip and a caption are drawn for each position, so they differ between epochs.
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
        variant = 1 - 2.0**-53 - uniform_draws(self.seed, "flip", where)  # below a half of the draw: mirrored
        picked = self.order.rows(in_part)
        rows = picked if self.rows is None else self.rows[picked]
        batch = self.cache.gather(rows, variant, uniform_draws(self.seed, "caption", where))
        return batch | {"positions": torch.from_numpy(where)}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}
