""".h5ad files: opened with an error that says what is wrong with them, their tables as arrays, and written complete or
not at all."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import replace_durably, temporary_path

logger = logging.getLogger(__name__)
GZIP_MAGIC = b"\x1f\x8b"


def expression_package(name: str) -> Any:
    """A module of requirements-expression.txt. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"gene expression needs the package {package}: pip install -r requirements-expression.txt ({error})"
        ) from error


def check_file(path: str, flag: str) -> Path:
    """The path of an .h5ad file. Raises UserError, which names the flag, for anything else."""
    file = Path(path)
    if file.is_dir():
        raise UserError(
            f"{flag}: {path} is a folder; give one .h5ad file (of zarr: anndata.read_zarr(...).write_h5ad(...))"
        )
    if not file.exists():
        raise UserError(f"{flag}: {path} does not exist; give an .h5ad file")
    h5py = expression_package("h5py")
    try:
        with file.open("rb") as content:
            is_gzip = content.read(2) == GZIP_MAGIC
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read: {error}") from error
    if is_gzip:
        raise UserError(f"{flag}: {path} is compressed as a whole; unpack it with gunzip first")
    if not h5py.is_hdf5(file):
        raise UserError(f"{flag}: {path} is no .h5ad file (not HDF5 at all); write one with adata.write_h5ad(...)")
    return file


@contextlib.contextmanager
def opened(path: Path, flag: str) -> Iterator[Any]:
    """An .h5ad file as h5py reads it. Raises UserError where it is damaged; inside, do nothing but read."""
    try:
        with expression_package("h5py").File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:  # h5py's, for files cut short and filters that are not there
        reason = " ".join(str(error).split())
        raise UserError(f"{flag}: {path} cannot be read: {reason}; write it again with adata.write_h5ad") from error


def read_frame(file: Any, key: str, flag: str) -> Any:
    """A table (obs, var) as a pandas DataFrame. Raises UserError where there is none."""
    if key not in file:
        raise UserError(
            f"{flag}: {file.filename} is HDF5, but not of AnnData: it has no {key} (but {', '.join(file) or 'nothing'}"
            "); of a 10x file: scanpy.read_10x_h5(...).write_h5ad(...)"
        )
    try:
        frame = expression_package("anndata").io.read_elem(file[key])
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag}: {key} of {file.filename} cannot be read: {reason}") from error
    if not hasattr(frame, "columns"):
        raise UserError(
            f"{flag}: {key} of {file.filename} is no table as anndata writes it since 0.7; read the file with the "
            "version that wrote it, and write it again with a newer one"
        )
    return frame


def names_of(frame: Any) -> list[str]:
    """The names of a table's rows, as text."""
    return [str(name) for name in frame.index]


def columns_of(frame: Any, what: str) -> dict[str, np.ndarray]:
    """The columns of a table by `column_array`, (R,) each. Columns that it cannot take are left out, with a note in
    the log."""
    columns = {str(name): column_array(frame[name]) for name in frame.columns}
    if left_out := [name for name, values in columns.items() if values is None]:
        logger.warning("%s: columns that are neither numbers nor text are left out: %s", what, ", ".join(left_out))
    return {name: values for name, values in columns.items() if values is not None}


def column_array(series: Any) -> np.ndarray | None:
    """A pandas column as float64 with NaN where there is no number, or as text (object) with None where there is none:
    categories and booleans become text. None for anything else.
    """
    if hasattr(series, "cat"):
        categories = [str(value) for value in series.cat.categories]
        return np.array([*categories, None], dtype=object)[series.cat.codes.to_numpy()]  # code -1 is none: the last
    if getattr(series.dtype, "kind", "O") in "iuf":
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    values = series.to_numpy(dtype=object)
    missing = series.isna().to_numpy()
    present = values[~missing]
    if all(isinstance(value, str | bool | np.bool_) for value in present):
        texts = [None if gone else str(value) for value, gone in zip(values, missing, strict=True)]
        return np.array(texts, dtype=object)
    if all(isinstance(value, int | float | np.integer | np.floating) for value in present):
        return np.array([np.nan if gone else float(value) for value, gone in zip(values, missing, strict=True)])
    return None


def write_h5ad(adata: Any, path: Path) -> None:
    """Writes an AnnData to a file that is complete or absent, with pandas 2 and 3."""
    settings = expression_package("anndata").settings
    temporary = temporary_path(path)
    # pandas 3 keeps text in arrays of its own, which anndata writes only where it is told that they may be written.
    allowed = {"allow_write_nullable_strings": True} if hasattr(settings, "allow_write_nullable_strings") else {}
    try:
        with settings.override(**allowed):
            adata.write_h5ad(temporary)
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
