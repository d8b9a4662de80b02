"""Folders of images as users have them: every bad-input case is a real file built here."""

import csv
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.support.images import (
    EMOJI,
    LONG,
    captions_folder,
    encode,
    identity,
    make_folder,
    noise,
    rows_of,
    values,
    write_jsonl,
)
from utils.errors import UserError
from utils.image.data.pixels import BadImage, decode_image
from utils.image.data.rows import normalise_captions, resolve_columns
from utils.image.data.sources import open_image_dataset


def open_folder(folder, **options):
    return open_image_dataset(None, None, str(folder), **options)


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
