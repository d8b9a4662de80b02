"""Files that are complete or absent, whatever moment the process is killed at."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
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
