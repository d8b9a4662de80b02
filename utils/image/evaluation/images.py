"""The images that evaluation compares: read from anywhere, brought to one size, and what was converted on the way."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.figures import rows_at_most
from utils.image.data.pixels import BadImage, decode_image
from utils.image.data.rows import normalise_captions, resolve_columns, undecoded
from utils.image.data.sources import dataset_identity, open_image_dataset
from utils.image.evaluation.features import clean_resize

BACKGROUND = (255, 255, 255)  # what transparent images are laid on, as in training by default


@dataclass
class Images:
    """Images that can be read by row, with what was asked for beside each, where that is known."""

    title: str  # for the reader
    flag: str  # what errors name
    identity: dict[str, Any]  # of their content, for the cache
    values: Sequence[Any]  # what decode_image takes
    class_labels: Tensor | None = None  # (N,) int64
    captions: list[str] | None = None
    seen: dict[str, int] = field(default_factory=dict)  # counts of what was converted while reading

    def __len__(self) -> int:
        return len(self.values)

    def decoded(self, row: int) -> np.ndarray:
        """uint8 (H, W, 3) of a row. Raises UserError for an image that cannot be read: none is left out silently."""
        try:
            return np.asarray(decode_image(self.values[row], BACKGROUND))
        except BadImage as reason:
            raise UserError(
                f"{self.flag} {self.title}: image {self.name(row)} cannot be read: {reason}; repair or remove it"
            ) from reason

    def name(self, row: int) -> str:
        """The name of a row's file, or the number of the row."""
        value = self.values[row]
        path = value.get("path") if isinstance(value, dict) else value
        return os.path.basename(path) if isinstance(path, str | Path) else f"number {row}"

    def read(self, rows: Sequence[int], resolution: int, same_size: bool) -> Tensor:
        """Images (B, R, R, 3) uint8. Others than R x R are cropped to their centre and resized by clean-fid's filter,
        and counted; with `same_size`, and where they would be enlarged, UserError is raised instead."""
        images = []
        for row in rows:
            image = self.decoded(row)
            height, width = image.shape[:2]
            if (height, width) != (resolution, resolution):
                if same_size or min(height, width) < resolution:
                    raise UserError(self.fault_of_size(row, width, height, resolution, same_size))
                image = cropped_and_resized(image, resolution)
                self.count("resized")
            if (image == image[:, :, :1]).all():
                self.count("grey")
            images.append(torch.from_numpy(np.array(image)))
        return torch.stack(images)

    def side(self) -> int:
        """Pixels of a side of the first image, which the others are expected to have. Raises UserError for one that
        is not square."""
        height, width = self.decoded(0).shape[:2]
        if height != width:
            raise UserError(
                f"{self.flag} {self.title}: image {self.name(0)} is {width} x {height}; add --resolution "
                f"{min(width, height)} to crop all images to squares of that size"
            )
        return height

    def count(self, what: str) -> None:
        """Counts one more image that was converted so."""
        self.seen[what] = self.seen.get(what, 0) + 1

    def fault_of_size(self, row: int, width: int, height: int, resolution: int, same_size: bool) -> str:
        """What to do about an image that is not of the resolution."""
        found = f"{self.flag} {self.title}: image {self.name(row)} is {width} x {height}"
        smallest = min(width, height)
        if same_size and smallest >= resolution:
            return f"{found}, others are {resolution} x {resolution}; add --resolution {resolution} to resize them all"
        if same_size:
            return f"{found}, others are {resolution} x {resolution}; add --resolution {smallest} or remove it"
        return (
            f"{found}, but the comparison is at {resolution} x {resolution}, and enlarging blurs: give larger images, "
            f"or --resolution {smallest} to compare at that size"
        )


def cropped_and_resized(image: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (H, W, 3) -> the largest centred square, as uint8 (R, R, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(np.ascontiguousarray(image[top : top + side, left : left + side]))[None]
    return clean_resize(square, resolution)[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset to read; None for one that is not wanted, and for the only column of images."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None


def open_images(what: str, split: str, flag: str, columns: Columns, max_images: int | None = None) -> Images:
    """A folder that sample.py made, any folder of images, parquet files or a hub dataset; at most `max_images` of
    them, drawn at random. Raises UserError, which names `flag`, where there are none."""
    if (Path(what) / "samples.jsonl").is_file():
        return open_samples(Path(what), flag, max_images)
    if Path(what).is_dir() and not any(Path(what).iterdir()):
        raise UserError(f"{flag} {what}: found nothing in the folder; give one with images")
    try:
        dataset = open_image_dataset(what, None, None, split=split)
        found = resolve_columns(dataset, columns.image, columns.caption, columns.label)
        identity = dataset_identity(dataset, what, None, None, split, revision=None)
    except UserError as error:  # the readers know the flags of training
        message = str(error).replace("--dataset_name", flag).replace("--dataset_split", f"{flag}_split")
        raise UserError(message.replace("--train_data_dir", flag)) from error
    rows = rows_at_most(len(dataset), max_images or len(dataset))
    chosen = undecoded(dataset, found.image).select(rows.tolist())
    labels = captions = None
    if found.label:
        labels = torch.tensor(chosen[found.label][:], dtype=torch.int64)
    if found.caption:
        captions = [normalise_captions(value)[0] for value in chosen[found.caption]]
    identity = {"data": identity, "column": found.image, "rows": [len(rows), len(dataset)]}
    return Images(f"{what} ({split})", flag, identity, chosen[found.image], class_labels=labels, captions=captions)


def open_samples(folder: Path, flag: str, max_images: int | None) -> Images:
    """The images that `samples.jsonl` of sample.py lists, with the labels or prompts they were made for."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise UserError(f"{flag} {folder}: its samples.jsonl lists no images; sample again")
    lines = [lines[row] for row in rows_at_most(len(lines), max_images or len(lines)).tolist()]
    paths = [folder / Path(line["file_name"]).name for line in lines]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{flag} {folder}: samples.jsonl lists {missing[0]}, which is not there; sample again")
    labels = [line.get("class_labels") for line in lines]
    prompts = [line.get("prompt") for line in lines]
    return Images(
        str(folder),
        flag,
        {"data": lines},
        list(map(str, paths)),
        class_labels=None if None in labels else torch.tensor(labels),
        captions=None if None in prompts else prompts,
    )


def conversions(what: str, total: int, seen: dict[str, int]) -> list[str]:
    """Sentences about what `Images.read` converted, for the report; none where nothing was."""
    said = []
    if seen.get("resized"):
        how = "cropped to their centre and resized by an anti-aliased bicubic filter (clean-fid's)"
        said.append(f"{what}: {seen['resized']} of {total} images were {how}")
    if seen.get("grey"):
        said.append(f"{what}: {seen['grey']} of {total} images are grey, read as colour with three equal channels")
    return said
