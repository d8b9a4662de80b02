"""Image folders are read here, in the layout of the `imagefolder` builder of `datasets` but not by it: the builder
follows links out of the folder, drops images that the metadata does not list, moves a file named `test_1.png` to
another split, and refuses a caption column that mixes text, numbers and lists.
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from utils.errors import UserError
from utils.image.data.rows import normalise_captions

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".pcx"),
)
SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def folder_files(folder: str, split: str, flag: str) -> tuple[Path, list[Path], list[Path]]:
    """The split's root, every visible file below it, sorted, and its metadata files. Links that leave the folder are
    refused; links to folders too, since the walk does not enter them and their images would be lost."""
    files: list[Path] = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        for entry in (Path(parent, name) for name in [*subfolders, *names]):
            if entry.is_symlink() and (entry.is_dir() or not _is_inside(entry, folder)):
                raise UserError(
                    f"{flag} {folder}: {entry.relative_to(folder)} is a link to {os.readlink(entry)}; links to "
                    "folders and links out of the folder are not followed: replace it by a copy"
                )
        files += [Path(parent, name) for name in sorted(names) if not name.startswith((".", "__"))]
    metadata = [file for file in files if file.name in METADATA_READERS]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = f"{len(files)} files without an image, such as {files[0].name}" if files else "nothing"
        raise UserError(f"{flag} {folder}: found {found}; give a folder of images (parquet goes to --dataset_name)")
    tops = {file.relative_to(folder).parts[0] for file in images}
    splits = sorted(tops) if tops.issubset(SPLIT_NAMES) else ["train"]
    if split not in splits:
        raise UserError(f"{flag} {folder}: no --dataset_split {split} there; found {', '.join(splits)}")
    root = Path(folder, split) if tops.issubset(SPLIT_NAMES) else Path(folder)
    below = [file for file in files if root in file.parents]
    own_metadata = [file for file in metadata if root in file.parents]
    return root, below, own_metadata or [file for file in metadata if file.parent == Path(folder)]


def _is_inside(path: Path, folder: str | Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def open_image_folder(folder: str, split: str, flag: str) -> datasets.Dataset:
    root, files, metadata = folder_files(folder, split, flag)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if metadata:
        rows = _metadata_rows(Path(folder), root, metadata, flag)
        unlisted = sorted({str(image) for image in images} - {row["image"] for row in rows})
        if unlisted:
            logger.warning(
                "%s %s: %d of %d images are not listed in %s and are left out, such as %s",
                *(flag, folder, len(unlisted), len(images), metadata[0].name, os.path.relpath(unlisted[0], root)),
            )
        names = dict.fromkeys(key for row in rows for key in row)
        columns = {name: _column([row.get(name) for row in rows]) for name in names}
        return datasets.Dataset(pa.table(columns)).cast_column("image", datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": [str(image) for image in images]})
    classes = sorted({image.parent.name for image in images})
    depths = {len(image.parents) for image in images}
    if len(classes) > 1 and len(depths) == 1:  # the rule of `imagefolder`
        labels = pa.array([classes.index(image.parent.name) for image in images], pa.int64())
        dataset = dataset.add_column("label", labels).cast_column("label", datasets.ClassLabel(names=classes))
    elif len(classes) > 1:
        stray = min(images, key=lambda image: len(image.parents))
        logger.warning("%s %s: no labels, since images such as %s lie beside class folders", flag, folder, stray.name)
    return dataset.cast_column("image", datasets.Image())


def _metadata_rows(folder: Path, root: Path, metadata: list[Path], flag: str) -> list[dict[str, Any]]:
    rows, missing = [], []
    for file in metadata:
        for where, row in METADATA_READERS[file.name](file):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise UserError(f"{flag}: {file} {where}: no file_name; every entry names its image there")
            path = Path(os.path.normpath(file.parent / name))
            if not _is_inside(path, folder):
                raise UserError(f"{flag}: {file} {where}: {name} lies outside the folder; copy the image into it")
            if root not in path.parents:
                continue  # a list at the top, for all splits
            if not path.is_file():
                missing.append(f"{name} ({where})")
            rows.append({**row, "image": str(path)})
    if missing:
        raise UserError(
            f"{flag}: {metadata[0]} lists {len(missing)} images that do not exist, such as {missing[0]}; "
            "add the files or remove their entries"
        )
    if not rows:
        raise UserError(f"{flag}: {metadata[0]} lists no image of {root}; add one entry per image, with file_name")
    return rows


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{file} line {number}: not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number}: found {type(row).__name__}; write one object per line")
        yield f"line {number}", row


def _read_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error}); save it again as one") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise UserError(f'{file} entry {number}: more values than the header; put captions with commas in "..."')
    whole = {
        name
        for name in (rows[0] if rows else {})
        if name != "file_name" and all(re.fullmatch(r"(0|-?[1-9]\d{0,17})?", row[name] or "") for row in rows)
    }
    for number, row in enumerate(rows, start=1):
        yield f"entry {number}", {k: (int(v) if v else None) if k in whole else v for k, v in row.items()}


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(pq.read_table(file).to_pylist(), start=1):
        yield f"row {number}", row


METADATA_READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    "metadata.jsonl": _read_jsonl,
    "metadata.csv": _read_csv,
    "metadata.parquet": _read_parquet,
}


def _column(values: list[Any]) -> pa.Array:
    """An Arrow column; values of several types become strings, or lists of strings if there is a list among them."""
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
        if any(isinstance(value, list) for value in values):
            return pa.array([normalise_captions(value) for value in values], pa.list_(pa.string()))
        return pa.array([normalise_captions(value)[0] for value in values], pa.string())
