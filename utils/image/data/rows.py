"""Rows of image datasets: their columns and captions. Pixels are made by `utils/image/data/pixels.py`."""

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
from PIL import Image

from utils.errors import UserError, short_reason

ImageDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class ImageColumns:
    """Names of the columns; `num_classes` and `label_names` are known for ClassLabel columns only."""

    image: str
    caption: str | None
    label: str | None
    num_classes: int | None
    label_names: list[str] | None


def resolve_columns(
    dataset: ImageDataset, image_column: str | None, caption_column: str | None, label_column: str | None
) -> ImageColumns:
    """Check the named columns; without `image_column`, the only image column, else `image` or `img`. UserError for an
    empty dataset, a column that is not there, labels that are not integers."""
    row = _first_row(dataset)
    if row is None:
        raise UserError("the dataset (--dataset_name, --train_data_dir) is empty: 0 rows; choose another one or split")
    features: dict[str, Any] = dict(dataset.features or {name: _guess_feature(value) for name, value in row.items()})
    have = f"the columns are {', '.join(features)}"
    asked = (("--image_column", image_column), ("--caption_column", caption_column), ("--label_column", label_column))
    for flag, column in asked:
        if column is not None and column not in features:
            raise UserError(f"{flag} {column}: no such column; {have}")

    images = [name for name, feature in features.items() if _holds_images(feature)]
    if image_column is None:
        candidates = images if len(images) == 1 else [name for name in ("image", "img") if name in features]
        if not candidates:
            raise UserError(f"name the column of images with --image_column; {have}")
        image_column = candidates[0]
    dtype = getattr(features[image_column], "dtype", "")
    if isinstance(features[image_column], datasets.ClassLabel) or re.match(r"u?int|float|bool", dtype):
        raise UserError(f"--image_column {image_column}: holds {dtype}, not images; {have}")
    if caption_column in images:
        raise UserError(f"--caption_column {caption_column}: holds images, not text; {have}")

    if label_column is None:
        return ImageColumns(image_column, caption_column, None, None, None)
    label = features[label_column]
    if isinstance(label, datasets.ClassLabel):
        return ImageColumns(image_column, caption_column, label_column, label.num_classes, list(label.names))
    if not re.fullmatch(r"u?int\d+|bool", str(getattr(label, "dtype", ""))):
        raise UserError(f"--label_column {label_column}: holds {label}, not integers from 0 on; {have}")
    return ImageColumns(image_column, caption_column, label_column, None, None)


def _first_row(dataset: ImageDataset) -> dict[str, Any] | None:
    if isinstance(dataset, datasets.Dataset):
        return dict.fromkeys(dataset.column_names) if len(dataset) else None
    try:
        return next(iter(dataset if dataset.features is None else dataset.decode(False)), None)
    except Exception as error:  # Arrow, the hub client or a reader: they share no base class
        raise UserError(f"the dataset's first row cannot be read: {short_reason(error)}; check the files") from error


def _guess_feature(value: Any) -> Any:
    """The feature of a stream that declares none; None and numpy integers count as what they may be."""
    if isinstance(value, Image.Image) or (isinstance(value, dict) and "bytes" in value):
        return datasets.Image()
    if value is None or isinstance(value, bool | int | np.integer):
        return datasets.Value("int64")
    return datasets.Value("float64" if isinstance(value, float) else "string")


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def undecoded(dataset: ImageDataset, image_column: str) -> ImageDataset:
    """The dataset with rows whose image is {"bytes", "path"}, so that reading never decodes. Arrays, and streams
    without declared features, come as they are; `decode_image` takes those too."""
    feature = (dataset.features or {}).get(image_column)
    encoded = isinstance(feature, datasets.Value) and re.fullmatch(r"(large_)?(string|binary)", feature.dtype)
    if encoded or _holds_images(feature):
        return dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def normalise_captions(value: Any) -> list[str]:
    """The captions of one row, at least one; "" where there is none. Takes text, bytes, numbers, None, NaN, and lists
    of those (in one more level of lists too), whose empty entries are dropped. UserError for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return [_clean(value)]
    entries = [entry for item in value for entry in (item if isinstance(item, list | tuple | np.ndarray) else [item])]
    return [text for text in map(_clean, entries) if text] or [""]


def _clean(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str | int | float):
        raise UserError(
            f"--caption_column: found {type(value).__name__} ({str(value)[:60]}); expected text or a list of it"
        )
    # Half an emoji (a lone surrogate, as broken JSON has) can neither be stored nor tokenized.
    text = str(value).encode("utf-8", errors="replace").decode("utf-8")
    return " ".join(text.split())
