"""The rows of the dataset that a latent cache is made of, from its arguments."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from utils.image.data.rows import ImageColumns, resolve_columns, undecoded
from utils.image.data.sources import dataset_identity, open_image_dataset


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
