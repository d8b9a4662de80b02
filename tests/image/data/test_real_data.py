"""Real data sets, where they are present."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.data import DATA
from tests.support.images import identity, values
from utils.image.data.pixels import decode_image, resize_and_crop
from utils.image.data.rows import normalise_captions, resolve_columns, undecoded
from utils.image.data.sources import open_image_dataset

needs_real_data = pytest.mark.skipif(not (DATA / "emoji").is_dir(), reason="real data is not here")


@needs_real_data
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["emoji", "emoji/test-*.parquet"])
def test_emoji(streaming, name):
    dataset = open_image_dataset(str(DATA / name), None, None, split="test", streaming=streaming)
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
    path = DATA / "cifar10" / "test-00000-of-00001.parquet"
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
