"""Images and folders of them, made in memory and on disk."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from utils.image.data.rows import undecoded
from utils.image.data.sources import dataset_identity


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def solid(mode, colour, size=(8, 6)) -> Image.Image:
    return Image.new(mode, size, colour)


def noise(height=48, width=64, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---- decoding -------------------------------------------------------------------------------------------------------


ORANGE, WHITE = (240, 120, 10), (255, 255, 255)


# ---- captions -------------------------------------------------------------------------------------------------------


LONG = "a very long caption " * 500

EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 ok 🤷🏽‍♀️"


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


def rows_of(dataset, column="image") -> list[dict]:
    return [dict(row) for row in undecoded(dataset, column)]


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


# ---- columns --------------------------------------------------------------------------------------------------------


IMAGES = [{"bytes": encode(noise(8, 8, seed)), "path": None} for seed in range(2)]


# ---- identity -------------------------------------------------------------------------------------------------------


def identity(name=None, folder=None, split="train", dataset=None, config=None, revision=None):
    found = dataset_identity(dataset, name and str(name), config, folder and str(folder), split, revision)
    return json.loads(json.dumps(found))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
