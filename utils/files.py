"""Files that are complete or absent, whatever moment the process is killed at."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

BEING_WRITTEN = ".tmp-"  # how the name of a file or folder begins while it is written


def fsync_path(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: Path, final: Path) -> None:
    """Renames a fully written file to its final name, so that a reader sees the whole of it or nothing."""
    fsync_path(temporary)
    temporary.replace(final)
    fsync_path(final.parent)


def temporary_path(path: Path) -> Path:
    """A name that no other process has, also on another machine, for what will be `path` or was."""
    return path.with_name(f"{BEING_WRITTEN}{uuid4().hex[:12]}-{path.name}")


def names_in(folder: Path) -> set[str]:
    """What stands in a folder, apart from what was being written there when a process was killed; nothing stands in
    one that does not exist.
    """
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name for name in names if not name.startswith(BEING_WRITTEN)}


def remove_unfinished(folder: Path) -> None:
    """Deletes the files that killed processes were writing into a folder. Only where no process writes now."""
    for path in folder.glob(f"{BEING_WRITTEN}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder that this process alone writes to, or takes from it what killed ones had begun there."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)


def remove_folder(folder: Path) -> None:
    """Deletes a folder such that no half of it ever has its name. What a disk does not let go yet stays aside."""
    aside = temporary_path(folder)
    folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = temporary_path(path)
    temporary.write_text(text, encoding="utf-8")
    replace_durably(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, readable by a person."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a JSON value in its canonical form, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
