"""Where image datasets come from: opening them, and what identifies their content."""

import glob
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from utils.errors import UserError, short_reason
from utils.image.data.folders import IMAGE_SUFFIXES, SPLIT_NAMES, folder_files, open_image_folder
from utils.image.data.rows import ImageDataset

logger = logging.getLogger(__name__)

MAX_WHOLE_FILES = 10_000  # with more files than this, `dataset_identity` reads only both ends of each
END_BYTES = 64 * 1024


@dataclass(frozen=True)
class _Source:
    kind: str  # hub, hub_layout (a local folder), parquet, image_folder
    path: str
    flag: str


def _source(
    dataset_name: str | None, dataset_config_name: str | None, train_data_dir: str | None, revision: str | None
) -> _Source:
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else "both"
        raise UserError(f"give exactly one of --dataset_name and --train_data_dir, found {given}")
    flag, name = ("--dataset_name", dataset_name) if train_data_dir is None else ("--train_data_dir", train_data_dir)
    path = os.path.abspath(os.path.expanduser(str(name)))
    if train_data_dir is not None and not os.path.isdir(path):
        found = "a file" if os.path.exists(path) else "nothing"
        raise UserError(f"{flag} {name}: found {found} there; give a folder of images")
    if train_data_dir is not None:
        source = _Source("image_folder", path, flag)
    elif os.path.isdir(path):
        suffixes = {Path(file).suffix.lower() for *_, names in os.walk(path) for file in names}
        only_images = suffixes.intersection(IMAGE_SUFFIXES) and not suffixes & {".parquet", ".arrow", ".tar", ".zip"}
        source = _Source("image_folder" if only_images else "hub_layout", path, flag)
    elif str(name).endswith(".parquet") or glob.has_magic(str(name)):
        source = _Source("parquet", path, flag)
    elif os.path.exists(path):
        raise UserError(f"{flag} {name}: is a file, but not .parquet; give a .parquet file, a folder or a hub name")
    elif re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)):
        return _Source("hub", str(name), flag)
    else:
        raise UserError(f"{flag} {name}: no such file or folder, and not a hub name (owner/name)")
    if revision is not None or (dataset_config_name is not None and source.kind != "hub_layout"):
        option = (
            f"--dataset_revision {revision}"
            if revision is not None
            else f"--dataset_config_name {dataset_config_name}"
        )
        raise UserError(f"{flag} {name}: {option} means nothing for local files; leave it out")
    return source


def _parquet_files(pattern: str, split: str) -> list[str]:
    """The files of `split`, which the hub's layout writes in front of the name (test-00000-of-00001.parquet) or as the
    folder; a file without one is training data, and for `train` a single kind of file is what the user asked for."""
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    found = sorted(file for file in matches if file.endswith(".parquet") and os.path.isfile(file))
    if not found:
        raise UserError(f"--dataset_name {pattern}: no such parquet file; check the path")
    groups: dict[str, list[str]] = {}
    for file in found:
        hints = re.split(r"[-_.]", os.path.basename(file))[0].lower(), os.path.basename(os.path.dirname(file)).lower()
        groups.setdefault(next((hint for hint in hints if hint in SPLIT_NAMES), "train"), []).append(file)
    if len(groups) == 1 and split == "train":
        return found
    if split not in groups:
        raise UserError(
            f"--dataset_name {pattern}: no --dataset_split {split} there; found {', '.join(sorted(groups))}"
        )
    return groups[split]


def open_image_dataset(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    *,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> ImageDataset:
    """Open a hub dataset, a local folder in the hub's layout, parquet files (a path or a glob), or an image folder
    with metadata.jsonl, .csv or .parquet, or with class folders. Image files are not read. UserError if nothing is
    there."""
    source = _source(dataset_name, dataset_config_name, train_data_dir, revision)
    if source.kind == "image_folder":
        dataset = open_image_folder(source.path, split, source.flag)
        return dataset.to_iterable_dataset() if streaming else dataset
    options: dict[str, Any] = {"split": split, "streaming": streaming, "cache_dir": cache_dir, "revision": revision}
    base_split = split.split("[")[0]  # "train[:100]" is a part of "train"
    if source.kind == "parquet":
        options["data_files"] = {base_split: [glob.escape(file) for file in _parquet_files(source.path, base_split)]}
    try:
        path = "parquet" if source.kind == "parquet" else source.path
        return datasets.load_dataset(path, dataset_config_name, **options)
    except Exception as error:  # the library, Arrow and the hub client share no base class
        advice = "check the path, the split and the configuration"
        if source.kind == "hub":
            advice = (
                "check the name (there is no such local folder either), the network, and `hf auth login` if private"
            )
        raise UserError(
            f"{source.flag} {dataset_name} --dataset_split {split}: {short_reason(error)}; {advice}"
        ) from error


def dataset_identity(
    dataset: ImageDataset,
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    revision: str | None,
) -> dict[str, Any]:
    """What the data is, as JSON. Local files: a sha256 over relative names, sizes and contents (`covers` says how
    much of them; of a folder in the hub's layout, every file), so that moving the folder changes nothing and editing
    an image or caption does. Hub: the resolved commit."""
    source = _source(dataset_name, dataset_config_name, train_data_dir, revision)
    if source.kind == "hub":
        commit = _hub_commit(dataset, source.path, revision)
        return {"source": "hub", "name": source.path, "config": dataset_config_name, "split": split, "commit": commit}
    if source.kind == "image_folder":
        root, files, metadata = folder_files(source.path, split, source.flag)
        base, files = str(root), sorted({*files, *metadata})
    elif source.kind == "parquet":
        files = [Path(file) for file in _parquet_files(source.path, split.split("[")[0])]
        base = os.path.commonpath([file.parent for file in files])
    else:
        base = source.path
        files = [Path(parent, name) for parent, _, names in os.walk(base, followlinks=True) for name in names]
        files = [file for file in files if not re.search(r"(^|/)(\.|__)", os.path.relpath(file, base))]
    return {"source": "files", "config": dataset_config_name, "split": split, **_content_identity(files, base)}


def _content_identity(files: list[Path], base: str) -> dict[str, Any]:
    whole = len(files) <= MAX_WHOLE_FILES
    digest, num_bytes = hashlib.sha256(), 0
    for name, path in sorted((os.path.relpath(path, base), path) for path in files):
        size = path.stat().st_size
        num_bytes += size
        digest.update(json.dumps([name, size]).encode())
        with path.open("rb") as file:
            if whole or size <= 2 * END_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(file.read(END_BYTES))
                file.seek(-END_BYTES, os.SEEK_END)
                digest.update(file.read(END_BYTES))
    covers = "whole files" if whole else f"the first and last {END_BYTES} bytes of each file"
    return {"num_files": len(files), "num_bytes": num_bytes, "covers": covers, "sha256": digest.hexdigest()}


def _hub_commit(dataset: ImageDataset, name: str, revision: str | None) -> str | None:
    """The 40 hex digits of the commit: `datasets` puts them into the names of its cache files; a streamed dataset has
    none, and the hub is asked. Without an answer, the revision that was asked for."""
    for cache_file in getattr(dataset, "cache_files", None) or []:
        commits = re.findall(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", cache_file["filename"])
        if commits:
            return commits[-1]
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # offline, private, another server: the client shares no base class
        logger.warning("--dataset_name %s: its commit could not be resolved (%s)", name, short_reason(error))
        return revision
