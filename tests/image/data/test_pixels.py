"""Every kind of image becomes the right RGB, at the right size, or is told with a reason."""

import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.support.images import ORANGE, WHITE, encode, noise, solid, values
from utils.errors import UserError
from utils.image.data.pixels import BadImage, Framing, decode_image, resize_and_crop


def raw_png(bit_depth: int, colour_type: int, pixels: list[tuple[int, ...]], transparent: bytes = b"") -> bytes:
    """A PNG of one row written by hand: Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"".join(struct.pack(">" + "H" * len(pixel), *pixel) for pixel in pixels)
    header = struct.pack(">IIBBBBB", len(pixels), 1, bit_depth, colour_type, 0, 0, 0)
    middle = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + data + chunk(b"IEND", b"")


# ---- decoding -------------------------------------------------------------------------------------------------------


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (8, 6), 0)
    image.putpalette([*ORANGE, 0, 0, 200])
    image.paste(1, (4, 0, 8, 6))
    return encode(image, transparency=1) if transparent else encode(image)


def partly_clear(mode: str, colour: tuple[int, ...]) -> bytes:
    image = Image.new(mode, (8, 6), (*colour, 255))
    image.paste((*colour, 0), (4, 0, 8, 6))
    return encode(image)


LEFT_AND_RIGHT = {  # what: (bytes, colour of the left half, colour of the right half)
    "rgb": (encode(solid("RGB", ORANGE)), ORANGE, ORANGE),
    "grey": (encode(solid("L", 77)), (77,) * 3, (77,) * 3),
    "bilevel": (encode(solid("1", 1)), WHITE, WHITE),
    "cmyk tiff": (encode(solid("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), (255, 0, 0)),
    "cmyk jpeg": (encode(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0), (255, 0, 0)),
    "palette": (palette(False), ORANGE, (0, 0, 200)),
    "palette with transparency": (palette(True), ORANGE, WHITE),
    "rgba": (partly_clear("RGBA", ORANGE), ORANGE, WHITE),
    "grey with alpha": (partly_clear("LA", (60,)), (60,) * 3, WHITE),
    "half transparent": (encode(solid("RGBA", (0, 0, 0, 128))), (127,) * 3, (127,) * 3),
    "16-bit grey png": (encode(Image.fromarray(np.full((6, 8), 32768, np.uint16))), (128,) * 3, (128,) * 3),
    "16-bit grey tiff": (encode(Image.fromarray(np.full((6, 8), 32768, np.uint16)), "TIFF"), (128,) * 3, (128,) * 3),
    "mode I tiff": (encode(Image.fromarray(np.full((6, 8), 32768, np.int32)), "TIFF"), (128,) * 3, (128,) * 3),
    "16-bit pgm": (b"P5 2 1 65535\n" + struct.pack(">2H", 32768, 65535), (128,) * 3, WHITE),
    "float 0..1": (encode(Image.fromarray(np.full((6, 8), 0.5, np.float32)), "TIFF"), (128,) * 3, (128,) * 3),
    "float 0..255": (encode(Image.fromarray(np.full((6, 8), 200, np.float32)), "TIFF"), (200,) * 3, (200,) * 3),
    "16-bit grey, one clear": (raw_png(16, 0, [(32768,), (5,)], struct.pack(">H", 5)), (128,) * 3, WHITE),
    "16-bit rgb": (raw_png(16, 2, [(65535, 0, 32768), (0, 32768, 0)]), (255, 0, 128), (0, 128, 0)),
    "16-bit rgba": (raw_png(16, 6, [(65535, 0, 0, 65535), (0, 65535, 0, 0)]), (255, 0, 0), WHITE),
    "16-bit grey with alpha": (raw_png(16, 4, [(32768, 65535), (32768, 0)]), (128,) * 3, WHITE),
    "rgb, one colour clear": (encode(solid("RGB", (9, 9, 9)), transparency=(9, 9, 9)), WHITE, WHITE),
}


@pytest.mark.parametrize("name", LEFT_AND_RIGHT)
def test_every_kind_of_pixel_becomes_the_right_rgb(name):
    data, left, right = LEFT_AND_RIGHT[name]
    pixels = values(decode_image(data))
    assert np.abs(pixels[0, 0] - left).max() <= 1
    assert np.abs(pixels[-1, -1] - right).max() <= 1


def test_16_bit_is_linear():
    grey = np.linspace(0, 65535, 300).astype(np.uint16)[None]
    pixels = values(decode_image(encode(Image.fromarray(grey))))
    assert np.abs(pixels[0, :, 0] - grey[0] / 257).max() <= 0.5


def test_alpha_shows_the_background_that_was_asked_for():
    assert tuple(values(decode_image(partly_clear("RGBA", ORANGE), background=(1, 2, 3)))[0, -1]) == (1, 2, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(format):
    frames = [solid("RGB", colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.abs(values(decode_image(data))[0, 0] - (200, 0, 0)).max() <= 2


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, corner, format):
    image = solid("RGB", (0, 0, 0), size=(64, 32))
    image.paste(WHITE, (0, 0, 16, 16))  # where the stored top left corner goes, by the EXIF standard
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = values(decode_image(encode(image, format, exif=exif)))
    assert pixels.shape == ((64, 32, 3) if orientation >= 5 else (32, 64, 3))
    assert pixels[corner].min() > 250
    assert (pixels > 128).mean() == pytest.approx(1 / 8, abs=0.01)


def test_broken_exif_does_not_cost_the_image():
    data = encode(solid("RGB", ORANGE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.abs(values(decode_image(data))[0, 0] - ORANGE).max() <= 1


@pytest.mark.parametrize("as_what", ["bytes", "bytes dict", "path dict", "path", "pil", "array", "list", "url"])
def test_every_way_to_hand_over_an_image(as_what, tmp_path):
    data = encode(noise())
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("in/a b.png", data)
    value = {
        "bytes": data,
        "bytes dict": {"bytes": data, "path": "elsewhere.png"},
        "path dict": {"bytes": None, "path": str(path)},
        "path": str(path),
        "pil": noise(),
        "array": np.asarray(noise()),
        "list": np.asarray(noise()).tolist(),
        "url": f"zip://in/a b.png::{tmp_path / 'images.zip'}",
    }[as_what]
    assert (values(decode_image(value)) == np.asarray(noise())).all()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 4)])
def test_arrays_of_other_channels(shape):
    array = np.full(shape, 50, np.uint8)
    array[..., -1:] = 255 if shape[2:] == (4,) else 50
    assert values(decode_image(array)).tolist() == np.full((5, 7, 3), 50).tolist()


JPEG = encode(noise(), "JPEG")

BAD_VALUES = {
    "none": (None, "None"),
    "empty dict": ({"bytes": None, "path": None}, "None"),
    "zero bytes": (b"", "zero bytes"),
    "zero bytes in a dict": ({"bytes": b"", "path": "a.png"}, "zero bytes"),
    "text": (b"this is no image, but text", "known format"),
    "html": (b"<html>404</html>" * 50, "known format"),
    "truncated header": (JPEG[:20], ""),
    "corrupt png": (encode(noise())[:40] + bytes(2000), ""),
    "missing file": ("/no/such/file.png", "no such file"),
    "missing url": ("file:///no/such/file.png", "no such file"),
    "a folder": ("/", ""),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "known format"),
    "not finite": (encode(Image.fromarray(np.full((6, 8), np.nan, np.float32)), "TIFF"), "finite"),
    "float array": (np.zeros((4, 4, 3)), "float64"),
    "channels first": (np.zeros((3, 9, 9), np.uint8), "expected uint8"),
    "empty array": (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
    "ragged list": ([[1, 2], [3]], ""),
    "a number": (3, "int"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_images_are_told_with_a_short_reason(name):
    value, reason = BAD_VALUES[name]
    with pytest.raises(BadImage) as caught:
        decode_image(value)
    assert reason in str(caught.value)
    assert 5 <= len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore")
def test_truncated_files_are_bad(format, share):
    data = encode(noise(), format)
    decode_image(data)
    with pytest.raises(BadImage):
        decode_image(data[: int(share * len(data))])


def test_a_lost_connection_is_not_a_bad_image(monkeypatch):
    """Rows must not be skipped because the network was away."""
    monkeypatch.setattr("datasets.utils.file_utils.xopen", lambda *_: (_ for _ in ()).throw(TimeoutError("timed out")))
    with pytest.raises(UserError, match=r"hf://datasets/a/b\.png cannot be read: timed out"):
        decode_image({"bytes": None, "path": "hf://datasets/a/b.png"})


def test_zero_byte_file(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(BadImage, match="zero bytes"):
        decode_image({"bytes": None, "path": str(tmp_path / "a.png")})


@pytest.mark.parametrize("side", [10_050, 13_000, 60_000])  # below, above and far above Pillow's own two limits
def test_bombs_are_refused_from_the_header(side, monkeypatch):
    bomb = bytearray(encode(solid("1", 0)))
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded before the size was checked")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="pixels, more than 100000000" if side < 20_000 else "pixels"):
            decode_image(bytes(bomb))


def test_max_pixels_is_the_limit():
    assert decode_image(encode(solid("L", 0, (10, 10))), max_pixels=100).size == (10, 10)
    with pytest.raises(BadImage, match="11 x 10 pixels, more than 100"):
        decode_image(encode(solid("L", 0, (11, 10))), max_pixels=100)


# ---- resizing and cropping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (16, 24)])
def test_centre_crop_is_resize_then_crop(size):
    image, resolution = noise(size[1], size[0]), 32
    width, height = (side * resolution // min(size) for side in size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    expected = np.asarray(resized.crop((left, top, left + resolution, top + resolution))).astype(int)
    result = resize_and_crop(image, resolution, True, None)
    assert result.shape == (resolution, resolution, 3)
    assert result.dtype == np.uint8
    assert result.flags.writeable
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (333, 100), (101, 100), (31, 97)])
def test_any_shape_is_filled_to_its_edges(size):
    for center in (True, False):
        result = resize_and_crop(solid("RGB", ORANGE, size), 32, center, np.random.default_rng(1))
        assert (result == ORANGE).all()


def test_downscaling_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    result = resize_and_crop(Image.fromarray(stripes), 32, True, None).astype(int)
    assert np.abs(result[:, 2:-2] - 127.5).max() < 6  # nearest or plain bilinear would give 0 or 255


def test_random_crop_follows_its_generator_and_covers_the_image():
    ramp = np.zeros((8, 32, 3), np.uint8)
    ramp[:] = np.arange(0, 256, 8, dtype=np.uint8)[None, :, None]
    image = Image.fromarray(ramp)

    def first_pixel(key):
        return int(resize_and_crop(image, 8, False, np.random.default_rng(key))[4, 0, 0])

    starts = [first_pixel((7, row)) for row in range(400)]
    assert starts == [first_pixel((7, row)) for row in range(400)]
    assert {round(start / 8) for start in starts} == set(range(25))  # offsets 0..24, both ends included
    with pytest.raises(ValueError, match="generator"):
        resize_and_crop(image, 8, False, None)


def photo(height: int, width: int) -> Image.Image:
    """Smooth colours with edges and some noise: what a camera gives."""
    small = np.random.default_rng(0).integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(large).astype(int) + np.random.default_rng(1).integers(-8, 9, (height, width, 1))
    pixels[height // 3 : height // 2, width // 3 : width // 2] = 20
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("side", "decoded"), [(64, (150, 100)), (51, (150, 100)), (50, (150, 100)), (101, (300, 200)), (401, (1200, 800))]
)
def test_a_jpeg_is_decoded_at_the_size_that_is_needed(side, decoded):
    """By 2, 4 or 8, and never below the side that is asked for; what is no JPEG comes whole."""
    image = photo(800, 1200)
    assert decode_image(encode(image, "JPEG"), smallest_side=side).size == decoded
    assert decode_image(encode(image, "JPEG")).size == (1200, 800)
    assert decode_image(encode(image, "PNG"), smallest_side=side).size == (1200, 800)
    assert decode_image(encode(image.crop((0, 0, 1200, 799)), "JPEG"), smallest_side=side).size == (1200, 799)


@pytest.mark.parametrize("size", [(1200, 1600), (1204, 1606), (1201, 1607), (1999, 1336)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_a_large_jpeg_is_framed_as_if_it_were_decoded_whole(center_crop, size):
    """Not stretched by what libjpeg adds to sides that a power of two does not divide."""
    data, frame = encode(photo(*size), "JPEG", quality=95), Framing(64, center_crop, (255, 255, 255))
    quick = frame(data, np.random.default_rng(3)).astype(float)
    whole = resize_and_crop(decode_image(data), 64, center_crop, np.random.default_rng(3)).astype(float)
    assert ((quick - whole) ** 2).mean() ** 0.5 < 1.5


def test_a_jpeg_that_is_hardly_larger_is_framed_to_the_bit():
    data = encode(photo(240, 400), "JPEG")  # below twice the side that Lanczos is left with
    framed = Framing(64, True, (255, 255, 255))(data, np.random.default_rng(3))
    assert (framed == resize_and_crop(decode_image(data), 64, True, None)).all()


def test_an_upright_jpeg_of_a_camera_is_upright_at_any_size():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = encode(photo(800, 1200), "JPEG", exif=exif)
    assert decode_image(data, smallest_side=100).size == (100, 150)
