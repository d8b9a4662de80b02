"""Where data sets come from, and what identifies them."""

import logging
import os
import shutil

import pytest

from tests.support.images import captions_folder, encode, identity, make_folder, noise, rows_of, write_parquet
from utils.errors import UserError
from utils.image.data import sources as image_sources
from utils.image.data.sources import open_image_dataset

# ---- parquet, hub layout, hub ---------------------------------------------------------------------------------------


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


# ---- identity -------------------------------------------------------------------------------------------------------


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
