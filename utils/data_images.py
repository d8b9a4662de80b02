"""Rows of image datasets: their columns, and how they become pixels and captions."""

import io
import os
import re
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError

ImageDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

# EPS is absent on purpose: Pillow hands it to Ghostscript. Some builds of Pillow lack AVIF or JPEG2000.
Image.init()
FORMATS = tuple(
    name
    for name in ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "PCX")
    if name in Image.OPEN
)


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


def short_reason(error: BaseException) -> str:
    cause = error.__cause__ or error  # DatasetGenerationError hides what happened in its cause
    if "BatchSize must be greater than 0" in str(cause):
        return "a parquet file is empty (0 rows)"
    lines = str(cause).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(cause).__name__)[:200]


# ---- pixels ---------------------------------------------------------------------------------------------------------


class BadImage(Exception):
    """An image that cannot be used; the message is a short reason."""


def decode_image(
    value: Any,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 100_000_000,
    smallest_side: int | None = None,
) -> Image.Image:
    """RGB image, upright, from {"bytes", "path"}, bytes, a path or URL, a PIL image, or a uint8 array (H, W) or
    (H, W, 1 to 4). Transparency shows `background`; 16-bit and float greys are scaled to 0..255; colour profiles are
    not applied. With `smallest_side` a JPEG may come 2, 4 or 8 times smaller, with sides no shorter than that.
    BadImage if it cannot be decoded or has more than `max_pixels` (178 million at most) in its header."""
    try:
        image = _open(value)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width} x {height} pixels, more than {max_pixels}")
        if smallest_side is not None:
            _decode_smaller(image, smallest_side)
        image.load()  # the first frame
        return _to_rgb(_upright(image), background)
    except (BadImage, UserError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image in a known format") from error
    except FileNotFoundError as error:
        raise BadImage(f"no such file: {error.filename or value}") from error
    except Exception as error:  # on corrupt bytes Pillow's decoders raise nearly anything
        raise BadImage(f"{type(error).__name__}: {error}"[:200]) from error


def _decode_smaller(image: Image.Image, smallest_side: int) -> None:
    """Has a JPEG that was opened and not yet read decoded at a fraction of its size, at a fraction of the cost. Only
    where that divides its sides: libjpeg rounds up what it decodes, and the picture would be stretched.
    """
    divisors = [d for d in (8, 4, 2) if all(side % d == 0 and side // d >= smallest_side for side in image.size)]
    if divisors:  # `draft` does nothing to other formats
        image.draft(None, (image.width // divisors[0], image.height // divisors[0]))


def _open(value: Any) -> Image.Image:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray | list):
        return _from_array(np.asarray(value, dtype=np.uint8 if isinstance(value, list) else None))
    if isinstance(value, str) and "://" in value:
        value = _read_url(value)
    if value is None:
        raise BadImage("no image (None)")
    if not isinstance(value, bytes | bytearray | memoryview | str | os.PathLike):
        raise BadImage(f"found {type(value).__name__}, not an image")
    if not (os.path.getsize(value) if isinstance(value, str | os.PathLike) else len(value)):
        raise BadImage("zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller checks the size
        return Image.open(value if isinstance(value, str | os.PathLike) else io.BytesIO(value), formats=FORMATS)


def _read_url(url: str) -> bytes:
    """A file of a streamed dataset. A lost connection stops the run: it says nothing about the image."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadImage(f"no such file: {url}"[:200]) from error
    except Exception as error:  # the file systems behind it share no base class
        raise UserError(f"{url} cannot be read: {short_reason(error)}; check the network and start again") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels > 4 or not array.size:
        raise BadImage(f"array of {array.dtype} {array.shape}; expected uint8 (H, W) or (H, W, 1 to 4)")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF: the pixels are still good
        return image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _wide_grey(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _wide_grey(image: Image.Image) -> Image.Image:
    """16-bit (also in mode I), 32-bit or float grey to L or LA. Pillow's own convert clips: 32768 becomes white. The
    range is the smallest usual one that holds the values: floats may be 0..1 or 0..255."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if not np.isfinite(values).all():
        raise BadImage("holds values that are not finite")
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((top for top in ranges if values.max() <= top), max(2.0**31 - 1, values.max()))
    grey = Image.fromarray(np.rint(values.clip(0) * (255 / white)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the one grey value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def resize_and_crop(
    image: Image.Image, resolution: int, center_crop: bool, generator: np.random.Generator | None
) -> np.ndarray:
    """uint8 (resolution, resolution, 3): shorter side resized to `resolution`, then the centre, or a crop at a place
    that one draw from `generator` decides. Lanczos, since Pillow widens its kernel with the scale: no aliasing, and
    sharper than bicubic. Only the crop's pixels are computed, so a 1 x 60,000 image costs no more than a square."""
    width, height = image.size
    scale = min(width, height) / resolution  # source pixels per target pixel
    room = max(width, height) * resolution // min(width, height) - resolution  # target pixels beside the crop
    if center_crop:
        offset = room // 2
    elif generator is None:
        raise ValueError("a random crop needs a generator")
    else:
        offset = int(generator.integers(room + 1))
    left, top = (offset * scale, 0.0) if width > height else (0.0, offset * scale)
    side = min(width, height)
    box = (left, top, min(left + side, width), min(top + side, height))
    return np.array(image.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))


# ---- captions -------------------------------------------------------------------------------------------------------


BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}


@dataclass(frozen=True)
class Framing:
    """How an image of any kind becomes a square of pixels."""

    resolution: int
    center_crop: bool
    background: tuple[int, int, int]  # what transparent images are laid on

    def __call__(self, value: Any, generator: np.random.Generator) -> np.ndarray:
        """uint8 (R, R, 3) of what `decode_image` takes; `generator` draws the crop. Raises BadImage."""
        # Lanczos has a factor of two left, as in Pillow's thumbnails. A JPEG of 4000 x 3000 to 256: 45 ms, not 222.
        image = decode_image(value, self.background, smallest_side=2 * self.resolution)
        return resize_and_crop(image, self.resolution, self.center_crop, generator)


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
