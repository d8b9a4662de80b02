"""Rows of a dataset -> columns of the latent cache: decoding in threads, encoding by the frozen models."""

import itertools
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.diffusion.conditions import encode_text, tokenize
from utils.errors import UserError
from utils.image import codec as codecs
from utils.image.data.pixels import BadImage, Framing
from utils.image.data.rows import ImageColumns, normalise_captions, resolve_columns, undecoded
from utils.image.data.sources import dataset_identity, open_image_dataset
from utils.latents.writer import ChannelSums, caption_id

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class RowReader:
    """How a row of the dataset becomes an image, its captions and its label."""

    columns: ImageColumns
    framing: Framing
    seed: int

    def __call__(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        """`image` uint8 (R, R, 3), `captions`, `label` of row `index`; or `skipped`, the reason why it cannot be
        used.
        """
        columns = self.columns
        label = None if columns.label is None else row[columns.label]
        if columns.label is not None and label is None:
            return {"row": index, "skipped": f"no label in column {columns.label}"}
        # Keyed by the row, so that a restart, or another number of processes, cuts the same crop.
        generator = np.random.default_rng([self.seed, index])
        try:
            pixels = self.framing(row[columns.image], generator)
        except BadImage as reason:
            return {"row": index, "skipped": str(reason)}
        captions = None if columns.caption is None else normalise_captions(row[columns.caption])
        return {"row": index, "image": pixels, "captions": captions, "label": label}


class LatentEncoder:
    """A frozen VAE on its device, and what is kept of its latents: `content` "moments" or "mean", mirrored too with
    `flips`.
    """

    def __init__(self, vae, content: str, flips: bool, batch_size: int, autocast: Autocast):
        self.vae, self.content, self.flips, self.batch_size, self.autocast = vae, content, flips, batch_size, autocast
        self.planes = 2 if content == "moments" else 1

    def encode(self, images: np.ndarray, sums: ChannelSums) -> np.ndarray:
        """Images (B, R, R, 3) uint8 -> float16 (B, planes * C * H * W), counted into `sums`."""
        pixels = torch.from_numpy(images).to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self.autocast():
            mean, std = codecs.encode(self.vae, pixels)
        if not torch.isfinite(mean).all():
            raise UserError(
                "--mixed_precision: the VAE's latents are not finite in this precision; use --mixed_precision no"
            )
        planes = [mean.float().cpu().numpy()]
        if self.content == "moments" and std is not None:
            planes.append(std.float().cpu().numpy())
        sums.add(*planes)
        return np.stack(planes, axis=1).reshape(len(images), -1).astype(np.float16)


class Shard:
    """The columns of one shard of latents, as they grow."""

    def __init__(self, encoder: LatentEncoder, shape: tuple[int, ...], columns: ImageColumns):
        self.encoder, self.columns = encoder, columns
        self.sums = ChannelSums(shape[0])
        empty = np.zeros((0, encoder.planes * int(np.prod(shape))), np.float16)
        self.latents = {"latents": [empty]} | ({"latents_flipped": [empty]} if encoder.flips else {})
        self.values: dict[str, list[Any]] = {"row": [], "label": [], "caption": [], "caption_id": []}
        self.skipped: list[dict[str, Any]] = []
        self.waiting: list[np.ndarray] = []

    def add(self, read: dict[str, Any], source_row: dict[str, Any]) -> None:
        """Takes one row as `RowReader` gave it."""
        if "skipped" in read:
            value = source_row[self.columns.image]
            path = value.get("path") if isinstance(value, dict) else None
            self.skipped.append({"row": read["row"], "path": path, "reason": read["skipped"]})
            return
        self.values["row"].append(read["row"])
        if self.columns.label is not None:
            self.values["label"].append(checked_label(read["label"], read["row"], self.columns))
        if self.columns.caption is not None:
            self.values["caption"].append(read["captions"])
            self.values["caption_id"].append([caption_id(text) for text in read["captions"]])
        self.waiting.append(read["image"])
        if len(self.waiting) == self.encoder.batch_size:
            self.encode_waiting()

    def encode_waiting(self) -> None:
        """Encodes the images that wait for a full batch."""
        if not self.waiting:
            return
        images = np.stack(self.waiting)
        for name, oriented in zip(self.latents, (images, images[:, :, ::-1].copy())):
            self.latents[name].append(self.encoder.encode(oriented, self.sums))
        self.waiting = []

    def columns_and_manifest(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `ShardFolder.write` takes."""
        self.encode_waiting()
        columns = {name: np.concatenate(parts) for name, parts in self.latents.items()}
        manifest = {
            "skipped": self.skipped,
            "sums": self.sums.to_json(),
            "max_label": max(self.values["label"], default=-1),
        }
        return columns | self.values, manifest


def checked_label(label: Any, row: int, columns: ImageColumns) -> int:
    """A label counted from 0 and, where the dataset names its classes, below their number. Raises UserError
    otherwise.
    """
    limit = columns.num_classes
    if int(label) < 0 or (limit is not None and int(label) >= limit):
        expected = "0 or more" if limit is None else f"0 to {limit - 1}"
        raise UserError(f"--label_column {columns.label}: row {row} has the label {label}, expected {expected}")
    return int(label)


def decode_ahead(
    chunks: Iterable[tuple[int, int, list[dict[str, Any]]]], reader: RowReader, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(index of its chunk, row, what `reader` made of it) of every row, in order. `chunks` are (index, number of the
    first row, rows). Threads have read up to `ahead` rows more than were taken, of the next chunks too: the VAE need
    not wait for them, and memory does not grow with the size of a chunk.
    """
    waiting: deque[tuple[int, dict[str, Any], Future]] = deque()

    def oldest():
        index, row, read = waiting.popleft()
        return index, row, read.result()

    for index, first, rows in chunks:
        for number, row in enumerate(rows, start=first):
            waiting.append((index, row, pool.submit(reader, number, row)))
            if len(waiting) > ahead:
                yield oldest()
    while waiting:
        yield oldest()


def encode_captions(tokenizer, text_encoder, texts: list[str], content: str, batch_size: int) -> dict[str, Any]:
    """Columns of a shard of captions: `num_tokens`, and states (M, S * D) float16 or token ids (M, S) int32."""
    if content == "input_ids":
        input_ids, counts = tokenize(tokenizer, texts)
        return {"num_tokens": counts.tolist(), content: input_ids.numpy().astype(np.int32)}
    states, num_tokens = [], []
    for first in range(0, len(texts), batch_size):
        values = encode_text(tokenizer, text_encoder, texts[first : first + batch_size])
        states.append(values["encoder_hidden_states"].flatten(1).cpu().numpy().astype(np.float16))
        num_tokens += values["num_tokens"].tolist()
    return {"num_tokens": num_tokens, content: np.concatenate(states)}


class Source:
    """The rows of a dataset in chunks of consecutive rows; a row is a dict with the image still encoded. Of `part`,
    (index, count), every count-th chunk; of a stream of `count` files or more some files, and no others are read.
    """

    def __init__(self, args: Namespace, part: tuple[int, int] = (0, 1)):
        self.max_samples, self.rows_per_shard = args.max_samples, args.rows_per_shard
        self.part_index, self.num_parts = part
        where = (args.dataset_name, args.dataset_config_name, args.train_data_dir)
        dataset = open_image_dataset(
            *where, split=args.dataset_split, revision=args.dataset_revision, streaming=args.streaming
        )
        self.columns: ImageColumns = resolve_columns(
            dataset, args.image_column, args.caption_column, args.label_column
        )
        self.identity = dataset_identity(dataset, *where, args.dataset_split, args.dataset_revision)
        wanted = [self.columns.image, self.columns.caption, self.columns.label]
        dataset = dataset.select_columns([name for name in dict.fromkeys(wanted) if name])
        self.dataset: Any = undecoded(dataset, self.columns.image)
        self.num_rows = None if args.streaming else min(len(self.dataset), args.max_samples or len(self.dataset))
        # The first rows of a dataset (--max_samples) are not the first rows of each file.
        self.by_files = args.streaming and args.max_samples is None and 1 < self.num_parts <= self.dataset.num_shards
        if self.by_files:
            self.dataset = self.dataset.shard(self.num_parts, self.part_index)

    def first_row(self, index: int) -> int:
        """The row of the dataset that the chunk `index` of this part begins with. In a part of the files nobody knows
        it: then a number that no other chunk has, in this part or another.
        """
        return (index * self.num_parts + self.part_index) * self.rows_per_shard

    def num_part_rows(self) -> int | None:
        """Rows of this part; None where a stream does not tell."""
        if self.num_rows is None:
            return None
        return sum(min(self.rows_per_shard, self.num_rows - first) for first in self._first_rows(self.num_rows))

    def _first_rows(self, num_rows: int) -> range:
        return range(self.first_row(0), num_rows, self.num_parts * self.rows_per_shard)

    def chunks(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(index, rows) of every chunk of this part for which `wanted(index)`. A stream is read through, but decoded
        only where wanted.
        """
        if self.num_rows is None:
            yield from self._streamed_chunks(wanted)
            return
        for index, first in enumerate(self._first_rows(self.num_rows)):
            if wanted(index):
                columns = self.dataset[first : min(first + self.rows_per_shard, self.num_rows)]
                rows = zip(*columns.values(), strict=True)
                yield index, [dict(zip(columns, row, strict=True)) for row in rows]

    def _streamed_chunks(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        stream = iter(self.dataset if self.max_samples is None else self.dataset.take(self.max_samples))
        for chunk in itertools.count():
            rows = list(itertools.islice(stream, self.rows_per_shard))
            if not rows:
                return
            index, part = (chunk, self.part_index) if self.by_files else divmod(chunk, self.num_parts)
            if part == self.part_index and wanted(index):
                yield index, rows

    def part(self) -> dict[str, Any]:
        """The entry of a fingerprint that says which part of a cache this is; none for a whole one."""
        if self.num_parts == 1:
            return {}
        cut = {"cut": "by files" if self.by_files else "by chunks", "rows_per_shard": self.rows_per_shard}
        return {"part": {"index": self.part_index, "of": self.num_parts} | cut}
