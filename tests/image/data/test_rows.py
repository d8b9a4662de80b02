"""Captions and columns of data sets as users have them."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.images import EMOJI, IMAGES, LONG, noise, rows_of, values
from utils.errors import UserError
from utils.image.data.pixels import BadImage, decode_image
from utils.image.data.rows import ImageColumns, normalise_captions, resolve_columns
from utils.image.data.sources import open_image_dataset

# ---- captions -------------------------------------------------------------------------------------------------------


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
