"""Images, captions and datasets as users have them: every bad-input case is a real file built here."""

import csv
import io
import json
import logging
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from utils.errors import UserError
from utils.image.data import sources as image_sources
from utils.image.data.pixels import BadImage, Framing, decode_image, resize_and_crop
from utils.image.data.rows import ImageColumns, normalise_captions, resolve_columns, undecoded
from utils.image.data.sources import dataset_identity, open_image_dataset

REAL_DATA = Path(os.environ.get("LDM_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(not (REAL_DATA / "emoji").is_dir(), reason="real data is not here")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """No test talks to the hub or writes to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def solid(mode, colour, size=(8, 6)) -> Image.Image:
    return Image.new(mode, size, colour)


def noise(height=48, width=64, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def raw_png(bit_depth: int, colour_type: int, pixels: list[tuple[int, ...]], transparent: bytes = b"") -> bytes:
    """A PNG of one row written by hand: Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"".join(struct.pack(">" + "H" * len(pixel), *pixel) for pixel in pixels)
    header = struct.pack(">IIBBBBB", len(pixels), 1, bit_depth, colour_type, 0, 0, 0)
    middle = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + data + chunk(b"IEND", b"")


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---- decoding -------------------------------------------------------------------------------------------------------

ORANGE, WHITE = (240, 120, 10), (255, 255, 255)


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


# ---- captions -------------------------------------------------------------------------------------------------------

LONG = "a very long caption " * 500
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 ok 🤷🏽‍♀️"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [""]),
        ("", [""]),
        (" \n\t ", [""]),
        (7, ["7"]),
        (0, ["0"]),
        (2.5, ["2.5"]),
        (float("nan"), [""]),
        (np.float32("nan"), [""]),
        (np.int64(3), ["3"]),
        (np.str_("word"), ["word"]),
        (b"caf\xc3\xa9", ["café"]),
        (b"\xff", ["\ufffd"]),
        ("  two \n words\u00a0here ", ["two words here"]),
        ([], [""]),
        ([None, "", "  "], [""]),
        (["a", None, "b ", 3, float("nan")], ["a", "b", "3"]),
        ([["a", "b"], ["c"], []], ["a", "b", "c"]),
        (("a", "b"), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array(["a", None], dtype=object), ["a"]),
        (EMOJI, [EMOJI]),
        (LONG, [LONG.strip()]),
        ("half \ud83d", ["half ?"]),
    ],
)
def test_captions(value, expected):
    assert normalise_captions(value) == expected
    pa.array(expected).to_pylist()  # Arrow can store them


def test_a_caption_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"--caption_column.*dict"):
        normalise_captions({"en": "a cat"})


# ---- image folders --------------------------------------------------------------------------------------------------


def make_folder(folder: Path, names=("a.png", "b.png", "c.png")) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(8, 8, seed)))
    return folder


def write_jsonl(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def captions_folder(folder: Path, **changes) -> Path:
    make_folder(folder)
    write_jsonl(folder, [{"file_name": f"{n}.png", "text": changes.get(n, f"caption {n}")} for n in "abc"])
    return folder


def open_folder(folder, **options):
    return open_image_dataset(None, None, str(folder), **options)


def rows_of(dataset, column="image") -> list[dict]:
    return [dict(row) for row in undecoded(dataset, column)]


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_jsonl(tmp_path, streaming):
    dataset = open_folder(captions_folder(tmp_path / "d"), streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = rows_of(dataset)
    assert [row["text"] for row in rows] == ["caption a", "caption b", "caption c"]
    for seed, row in enumerate(rows):
        assert (values(decode_image(row["image"])) == np.asarray(noise(8, 8, seed))).all()
    columns = resolve_columns(dataset, None, "text", None)
    assert (columns.image, columns.caption, columns.label) == ("image", "text", None)


@pytest.mark.parametrize("layout", ["metadata.jsonl", "metadata.csv", "classes"])
def test_the_folder_reads_as_the_imagefolder_builder_reads_it(tmp_path, layout):
    folder = make_folder(tmp_path / "d", ["dog/x.png", "dog/y.png", "cat/x.png"])
    listed = [{"file_name": "dog/x.png", "text": "one, two", "n": 1}, {"file_name": "cat/x.png", "text": "2", "n": 2}]
    if layout == "metadata.jsonl":
        write_jsonl(folder, listed)
    elif layout == "metadata.csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "n"])
            writer.writeheader()
            writer.writerows(listed)
    ours = open_folder(folder)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    large = datasets.Value("large_string")  # what the newer pandas makes of text
    expected = {k: datasets.Value("string") if v == large else v for k, v in theirs.features.items()}
    assert dict(ours.features) == expected

    def comparable(dataset):
        rows = [{**row, "image": os.path.relpath(row["image"]["path"], folder)} for row in rows_of(dataset)]
        return sorted(json.dumps(row, sort_keys=True) for row in rows)

    assert comparable(ours) == comparable(theirs)


def test_class_folders_give_names_and_labels(tmp_path):
    dataset = open_folder(make_folder(tmp_path / "d", ["zebra/1.png", "ant/test_1.png", "ant/val-2.png", "cow/a.png"]))
    columns = resolve_columns(dataset, "image", None, "label")
    assert columns.label_names == ["ant", "cow", "zebra"]
    assert columns.num_classes == 3
    assert sorted(dataset["label"]) == [0, 0, 1, 2]
    for row in rows_of(dataset):
        assert Path(row["image"]["path"]).parent.name == columns.label_names[row["label"]]


def test_split_folders(tmp_path):
    folder = make_folder(tmp_path / "d", ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png"])
    names = {
        split: {Path(r["image"]["path"]).name for r in rows_of(open_folder(folder, split=split))}
        for split in ("train", "test")
    }
    assert names == {"train": {"1.png", "2.png"}, "test": {"3.png", "4.png"}}
    with pytest.raises(UserError, match=r"--train_data_dir.*--dataset_split validation.*test, train"):
        open_folder(folder, split="validation")
    write_jsonl(folder, [{"file_name": f"{f}.png", "text": f} for f in ("train/cat/1", "train/dog/2", "test/cat/3")])
    assert open_folder(folder)["text"][:] == ["train/cat/1", "train/dog/2"]
    assert open_folder(folder, split="test")["text"][:] == ["test/cat/3"]


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    dataset = open_folder(make_folder(tmp_path / "d", ["train/1.png", "car/2.png"]))
    assert resolve_columns(dataset, None, None, "label").label_names == ["car", "train"]


def test_captions_of_mixed_types(tmp_path):
    dataset = open_folder(captions_folder(tmp_path / "text", a=7, b=None))
    assert [normalise_captions(text) for text in dataset["text"]] == [["7"], [""], ["caption c"]]
    dataset = open_folder(captions_folder(tmp_path / "list", a=["x", "y"], b=5))
    assert [normalise_captions(text) for text in dataset["text"]] == [["x", "y"], ["5"], ["caption c"]]
    dataset = open_folder(captions_folder(tmp_path / "odd", a=LONG, b=EMOJI, c="half \ud83d"))
    assert [normalise_captions(text) for text in dataset["text"]] == [[LONG.strip()], [EMOJI], ["half ?"]]


def test_csv_keeps_words_that_pandas_would_lose(tmp_path):
    folder = make_folder(tmp_path / "d")
    (folder / "metadata.csv").write_text('file_name,text,label\na.png,None,3\nb.png,"NA, or null",\nc.png,007,0\n')
    dataset = open_folder(folder)
    assert dataset["text"][:] == ["None", "NA, or null", "007"]
    assert dataset["label"][:] == [3, None, 0]


@pytest.mark.parametrize("content", [b"", b"not an image", encode(noise())[:60]])
def test_a_broken_image_does_not_break_opening(tmp_path, content):
    folder = captions_folder(tmp_path / "d")
    (folder / "b.png").write_bytes(content)
    for streaming in (False, True):
        rows = rows_of(open_folder(folder, streaming=streaming))
        assert len(rows) == 3
        decode_image(rows[0]["image"])
        with pytest.raises(BadImage):
            decode_image(rows[1]["image"])


def test_unlisted_images_are_told(tmp_path, caplog):
    folder = captions_folder(tmp_path / "d")
    make_folder(folder, ["more/x.png", "more/y.png"])
    with caplog.at_level(logging.WARNING):
        assert len(open_folder(folder)) == 3
    assert "2 of 5 images are not listed" in caplog.text
    assert "more/x.png" in caplog.text


def test_a_complete_folder_warns_of_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        open_folder(captions_folder(tmp_path / "d"))
        open_folder(make_folder(tmp_path / "e", ["cat/1.png", "dog/2.png"]))
    assert not caplog.records


def test_a_stray_image_that_costs_the_labels_is_told(tmp_path, caplog):
    folder = make_folder(tmp_path / "d", ["cat/1.png", "dog/2.png", "stray.png"])
    with caplog.at_level(logging.WARNING):
        assert "label" not in open_folder(folder).column_names
    assert "stray.png" in caplog.text


METADATA_FAULTS = {
    "missing file": (
        '{"file_name": "a.png"}\n{"file_name": "gone.png"}\n',
        "1 images that do not exist.*gone.png.*line 2",
    ),
    "outside": ('{"file_name": "../secret.png"}\n', r"line 1: \.\./secret.png lies outside"),
    "absolute": ('{"file_name": "/etc/x.png"}\n', "lies outside"),
    "no name": ('{"text": "x"}\n', "line 1: no file_name"),
    "broken json": ('{"file_name": "a.png"}\n\n{"file_name": \n', "line 3: not JSON"),
    "not an object": ("[1]\n", "line 1: found list"),
    "empty": ("\n", "lists no image"),
}


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_faulty_metadata(tmp_path, fault):
    text, expected = METADATA_FAULTS[fault]
    folder = make_folder(tmp_path / "d")
    (tmp_path / "secret.png").write_bytes(encode(noise()))
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        open_folder(folder)
    assert "metadata.jsonl" in str(caught.value)


def test_csv_with_an_unquoted_comma(tmp_path):
    (make_folder(tmp_path / "d") / "metadata.csv").write_text("file_name,text\na.png,red, and green\n")
    with pytest.raises(UserError, match=r"metadata.csv entry 1: more values"):
        open_folder(tmp_path / "d")


@pytest.mark.parametrize("what", ["file", "folder", "dangling"])
def test_links_out_of_the_folder_are_refused(tmp_path, what):
    folder = captions_folder(tmp_path / "d")
    outside = make_folder(tmp_path / "outside")
    target = {"file": outside / "a.png", "folder": outside, "dangling": tmp_path / "nothing"}[what]
    (folder / "leak.png").symlink_to(target)
    for call in (lambda: open_folder(folder), lambda: identity(folder=folder)):
        with pytest.raises(UserError, match=r"--train_data_dir.*leak.png is a link to"):
            call()


def test_links_inside_and_a_linked_folder_itself_are_fine(tmp_path):
    folder = make_folder(tmp_path / "d")
    (folder / "again.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(folder)
    assert len(open_folder(folder)) == 4
    assert len(open_folder(tmp_path / "alias")) == 4


def test_odd_folder_names_and_hidden_files(tmp_path):
    folder = make_folder(tmp_path / "[1] a*b?", ["x y.png", ".hidden.png", "__MACOSX/x.png", "ö.JPG"])
    assert [Path(row["image"]["path"]).name for row in rows_of(open_folder(folder))] == ["x y.png", "ö.JPG"]


def test_folders_with_nothing_to_train_on(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.parquet").touch()
    (tmp_path / "file.png").write_bytes(encode(noise()))
    for name, expected in {
        "empty": "found nothing.*folder of images",
        "other": "without an image, such as x.parquet.*--dataset_name",
        "file.png": "found a file",
        "missing": "found nothing",
    }.items():
        with pytest.raises(UserError, match=rf"--train_data_dir .*{name}: .*{expected}"):
            open_folder(tmp_path / name)


# ---- parquet, hub layout, hub ---------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: int = 4, first: int = 0, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encode(noise(8, 8, first + row)), "path": None} for row in range(rows)]
    data = {"image": images, "text": [f"row {first + row}" for row in range(rows)], **columns}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    if columns:
        datasets.Dataset.from_dict(data).cast_column("image", datasets.Image()).to_parquet(str(path))
    else:
        datasets.Dataset.from_dict(data, features=features).to_parquet(str(path))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_folders_and_globs(tmp_path, streaming):
    write_parquet(tmp_path / "d" / "data" / "train-00000-of-00002.parquet", 3)
    write_parquet(tmp_path / "d" / "data" / "train-00001-of-00002.parquet", 2, first=3)
    write_parquet(tmp_path / "d" / "data" / "test-00000-of-00001.parquet", 1, first=9)

    def texts(name, split="train"):
        return [
            row["text"] for row in rows_of(open_image_dataset(str(name), None, None, split=split, streaming=streaming))
        ]

    train, test = [f"row {row}" for row in range(5)], ["row 9"]
    assert texts(tmp_path / "d") == train
    assert texts(tmp_path / "d", "test") == test
    assert texts(tmp_path / "d" / "data" / "*.parquet") == train  # not the test rows
    assert texts(tmp_path / "**" / "*.parquet", "test") == test
    assert texts(tmp_path / "d" / "data" / "test-00000-of-00001.parquet") == test  # named, so meant
    shutil.copytree(tmp_path / "d", tmp_path / "[x]")
    assert texts(tmp_path / "[x]" / "data" / "test-00000-of-00001.parquet") == test


def test_a_local_folder_of_images_given_as_dataset_name_is_read_as_one(tmp_path):
    folder = captions_folder(tmp_path / "d")
    assert open_image_dataset(str(folder), None, None)["text"][:] == ["caption a", "caption b", "caption c"]
    (folder / "leak.png").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"--dataset_name.*leak.png is a link"):
        open_image_dataset(str(folder), None, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_opened(tmp_path, streaming):
    write_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"garbage" * 100)
    (tmp_path / "x.txt").write_text("hello")
    cases = [
        ((tmp_path / "d", None), "nope", r"--dataset_name.*nope.*train"),
        ((tmp_path / "d", "cfg"), "train", r"--dataset_name.*cfg.*default"),
        ((tmp_path / "d" / "*.parquet", None), "nope", r"--dataset_name.*--dataset_split nope.*found train"),
        ((tmp_path / "d" / "*.parquet", "cfg"), "train", r"--dataset_config_name cfg means nothing"),
        ((tmp_path / "empty", None), "train", r"--dataset_name.*empty"),
        ((tmp_path / "bad.parquet", None), "train", r"--dataset_name.*bad.parquet.*magic bytes"),
        ((tmp_path / "gone.parquet", None), "train", r"--dataset_name.*gone.parquet: no such parquet file"),
        ((tmp_path / "gone", None), "train", r"--dataset_name.*gone: no such file or folder"),
        ((tmp_path / "x.txt", None), "train", r"--dataset_name.*x.txt: is a file, but not .parquet"),
        (("./relative", None), "train", r"--dataset_name ./relative: no such file or folder"),
        (("no-such/dataset", None), "train", r"--dataset_name no-such/dataset.*no such local folder either"),
    ]
    for (name, config), split, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            open_image_dataset(str(name), config, None, split=split, streaming=streaming)
        assert "\n" not in str(caught.value)


def test_exactly_one_source():
    for name, folder in ((None, None), ("a", "b")):
        with pytest.raises(UserError, match=r"--dataset_name and --train_data_dir"):
            open_image_dataset(name, None, folder)
    with pytest.raises(UserError, match="--dataset_revision main means nothing"):
        open_image_dataset(None, None, "/tmp", revision="main")


# ---- columns --------------------------------------------------------------------------------------------------------


def table(**columns) -> datasets.Dataset:
    return datasets.Dataset(pa.table({name: pa.array(column) for name, column in columns.items()}))


def stream(**columns) -> datasets.IterableDataset:
    """A stream that declares no features."""
    names = list(columns)
    rows = [dict(zip(names, row)) for row in zip(*columns.values())]
    dataset = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert dataset.features is None
    return dataset


IMAGES = [{"bytes": encode(noise(8, 8, seed)), "path": None} for seed in range(2)]


@pytest.mark.parametrize("make", [table, stream])
def test_columns_of_both_kinds_of_dataset(make):
    dataset = make(photo=IMAGES, text=["a", "b"], label=[0, 4])
    columns = resolve_columns(dataset, None, "text", "label")
    assert columns == ImageColumns("photo", "text", "label", None, None)
    for flag, names in {
        "--image_column": ("wrong", None, None),
        "--caption_column": ("photo", "wrong", None),
        "--label_column": ("photo", None, "wrong"),
    }.items():
        with pytest.raises(UserError, match=rf"{flag} wrong: no such column; the columns are photo, text, label"):
            resolve_columns(dataset, *names)
    with pytest.raises(UserError, match=r"--label_column text: .*not integers"):
        resolve_columns(dataset, None, None, "text")
    with pytest.raises(UserError, match=r"--caption_column photo: holds images"):
        resolve_columns(dataset, "photo", "photo", None)
    with pytest.raises(UserError, match=r"--image_column label: holds int64, not images"):
        resolve_columns(dataset, "label", None, None)


@pytest.mark.parametrize("make", [table, stream])
def test_the_image_column_is_found_or_asked_for(make):
    assert resolve_columns(make(a=["x"], img=["y.png"]), None, None, None).image == "img"
    assert resolve_columns(make(other=IMAGES[:1], image=IMAGES[:1]), None, None, None).image == "image"
    with pytest.raises(UserError, match=r"--image_column; the columns are left, right"):
        resolve_columns(make(left=IMAGES[:1], right=IMAGES[:1]), None, None, None)


def test_class_label_columns(tmp_path):
    dataset = table(img=IMAGES, label=[1, 0]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    for kind in (dataset, dataset.to_iterable_dataset()):
        columns = resolve_columns(kind, None, None, "label")
        assert (columns.num_classes, columns.label_names) == (2, ["cat", "dog"])
    with pytest.raises(UserError, match="--label_column score"):
        resolve_columns(table(img=IMAGES, score=[1.0, 2.0]), None, None, "score")


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_datasets(tmp_path, streaming):
    for dataset in (table(image=[]), datasets.IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(UserError, match=r"empty: 0 rows"):
            resolve_columns(dataset, None, None, None)
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "d" / "train.parquet")
    for name in (tmp_path / "d", tmp_path / "d" / "train.parquet"):
        with pytest.raises(UserError, match=r"parquet file is empty \(0 rows\)"):
            resolve_columns(open_image_dataset(str(name), None, None, streaming=streaming), None, None, None)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["image", "struct", "bytes", "path", "array"])
def test_undecoded_rows_of_every_kind_decode(tmp_path, streaming, kind):
    path = tmp_path / "a.png"
    path.write_bytes(IMAGES[1]["bytes"])
    array = np.asarray(noise(8, 8, 1))
    second = {"bytes": IMAGES[1]["bytes"], "path": str(path), "array": array.tolist()}.get(kind, IMAGES[1])
    dataset = table(image=[None, second])
    dataset = dataset.cast_column("image", datasets.Image()) if kind == "image" else dataset
    rows = rows_of(dataset.to_iterable_dataset() if streaming else dataset)
    assert (values(decode_image(rows[1]["image"])) == array).all()
    with pytest.raises(BadImage, match="None"):
        decode_image(rows[0]["image"])


@pytest.mark.parametrize("kind", [bytes, str, np.ndarray])
def test_undecoded_streams_without_features(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(IMAGES[0]["bytes"])
    value = {bytes: IMAGES[0]["bytes"], str: str(tmp_path / "a.png"), np.ndarray: np.asarray(noise(8, 8))}[kind]
    (row,) = rows_of(stream(image=[value]))
    assert (values(decode_image(row["image"])) == np.asarray(noise(8, 8))).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_in_parquet_do_not_raise_on_reading(tmp_path, streaming):
    dataset = table(image=[{"bytes": b"junk", "path": None}, IMAGES[1]]).cast_column("image", datasets.Image())
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset = open_image_dataset(str(tmp_path / "a.parquet"), None, None, streaming=streaming)
    assert resolve_columns(dataset, None, None, None).image == "image"
    rows = rows_of(dataset)
    with pytest.raises(BadImage):
        decode_image(rows[0]["image"])
    decode_image(rows[1]["image"])


# ---- identity -------------------------------------------------------------------------------------------------------


def identity(name=None, folder=None, split="train", dataset=None, config=None, revision=None):
    found = dataset_identity(dataset, name and str(name), config, folder and str(folder), split, revision)
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("whole", [True, False])
def test_folder_identity_is_its_content(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(image_sources, "MAX_WHOLE_FILES", 10_000 if whole else 1)
    folder = captions_folder(tmp_path / "d")
    before = identity(folder=folder)
    assert before["covers"] == ("whole files" if whole else "the first and last 65536 bytes of each file")
    assert before["num_files"] == 4
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    (folder / ".DS_Store").touch()
    shutil.move(folder, tmp_path / "moved")
    folder = tmp_path / "moved"
    assert identity(folder=folder) == before

    (folder / "b.png").write_bytes(encode(noise(8, 8, 99)))
    changed_image = identity(folder=folder)
    captions_folder(folder, b="caption B")  # the same length
    changed_caption = identity(folder=folder)
    make_folder(folder, ["d.png"])
    added = identity(folder=folder)
    (folder / "d.png").rename(folder / "e.png")
    renamed = identity(folder=folder)
    assert len({entry["sha256"] for entry in (before, changed_image, changed_caption, added, renamed)}) == 5


def test_a_change_at_either_end_of_a_big_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "MAX_WHOLE_FILES", 0)
    folder = make_folder(tmp_path / "d")
    seen = set()
    for place in (None, 0, 70_000, -1):
        content = bytearray(140_000)
        if place is not None:
            content[place] = 1
        (folder / "a.png").write_bytes(content)
        seen.add(identity(folder=folder)["sha256"])
    assert len(seen) == 3  # the middle is not covered, as `covers` says


def test_parquet_identity_covers_the_split_only(tmp_path):
    write_parquet(tmp_path / "d" / "train-0.parquet")
    write_parquet(tmp_path / "d" / "test-0.parquet", first=7)
    pattern = tmp_path / "d" / "*.parquet"
    train, test = identity(pattern), identity(pattern, split="test")
    assert train["sha256"] != test["sha256"]
    write_parquet(tmp_path / "d" / "test-0.parquet", first=8)
    assert identity(pattern) == train
    assert identity(pattern, split="test") != test
    whole = identity(tmp_path / "d")
    shutil.move(tmp_path / "d", tmp_path / "e")
    assert identity(tmp_path / "e" / "*.parquet") == train
    assert identity(tmp_path / "e") == whole
    write_parquet(tmp_path / "e" / "train-0.parquet", first=1)
    assert identity(tmp_path / "e" / "*.parquet") != train
    assert identity(tmp_path / "e") != whole


def test_hub_identity_is_the_commit(monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Cached:
        cache_files = ({"filename": f"/home/x/.cache/owner___name/default/0.0.0/{commit}/name-train.arrow"},)

    expected = {"source": "hub", "name": "owner/name", "config": "en", "split": "train", "commit": commit}
    assert identity("owner/name", dataset=Cached(), config="en") == expected
    assert identity("owner/name", dataset=object(), config="en", revision=commit) == expected
    asked = []

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            return type("Info", (), {"sha": commit})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert identity("owner/name", dataset=object(), config="en", revision="v1") == expected
    assert asked == [("owner/name", "v1")]


def test_hub_identity_without_an_answer_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert identity("owner/name", dataset=object(), revision="v1")["commit"] == "v1"
    assert "could not be resolved" in caplog.text


# ---- real data ------------------------------------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["emoji", "emoji/test-*.parquet"])
def test_emoji(streaming, name):
    dataset = open_image_dataset(str(REAL_DATA / name), None, None, split="test", streaming=streaming)
    columns = resolve_columns(dataset, None, "keywords", None)
    assert columns.image == "image"
    rows = list(undecoded(dataset, "image").take(30))
    for row in rows:
        image = decode_image(row["image"])
        assert image.size == (128, 128)
        assert all(normalise_captions(row["keywords"]))
        stored = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA"))
        clear = stored[..., 3] == 0
        assert clear.any()
        assert (values(image)[clear] == 255).all()
        solid_pixels = stored[..., 3] == 255
        assert (values(image)[solid_pixels] == stored[solid_pixels][:, :3]).all()
        assert resize_and_crop(image, 64, True, None).shape == (64, 64, 3)


@needs_real_data
@pytest.mark.parametrize("streaming", [False, True])
def test_cifar10(streaming):
    path = REAL_DATA / "cifar10" / "test-00000-of-00001.parquet"
    dataset = open_image_dataset(str(path), None, None, split="test", streaming=streaming)
    columns = resolve_columns(dataset, None, None, "label")
    assert columns.image == "img"
    assert columns.num_classes in (None, 10)
    stored = pq.ParquetFile(path).read_row_group(0).slice(0, 20).to_pylist()
    for row, expected in zip(undecoded(dataset, "img").take(20), stored):
        assert row["label"] == expected["label"]
        pixels = resize_and_crop(decode_image(row["img"]), 32, True, None)
        assert (pixels == np.asarray(Image.open(io.BytesIO(expected["img"]["bytes"])))).all()
    assert identity(path, split="test")["num_bytes"] == path.stat().st_size
