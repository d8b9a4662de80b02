"""Pixels of images of any kind: decoding, whatever files hold, and the square that a model sees."""

import io
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError, short_reason

# EPS is absent on purpose: Pillow hands it to Ghostscript. Some builds of Pillow lack AVIF or JPEG2000.
Image.init()
FORMATS = tuple(
    name
    for name in ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "PCX")
    if name in Image.OPEN
)
BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}


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
