"""Tables in folders: mapped, used again, and written anew where they are not whole."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.support.cells.data import GENES, make, said
from utils.expression.data import source as data_cells
from utils.expression.data import store as data_store
from utils.expression.data.source import open_cells
from utils.expression.data.table import read_table

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


def is_mapped(array: np.ndarray) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


@pytest.fixture
def reads(monkeypatch):
    """How often a source was read."""
    calls = []
    original = data_store.collect
    monkeypatch.setattr(data_store, "collect", lambda *rest: calls.append(1) or original(*rest))
    return calls


def test_a_table_in_a_folder_is_mapped_and_used_again(cells, reads, caplog):
    first = read_table(cells.source, cells.rows, GENES, folder=cells.folder)
    assert is_mapped(first.counts.data)
    assert is_mapped(first.counts.indices)
    assert sorted(each.name for each in cells.folder.iterdir()) == [
        "data.npy", "found.npy", "indices.npy", "library_sizes.npy", "rows.npy", "table.json",
    ]  # fmt: skip
    assert np.array_equal(np.load(cells.folder / "data.npy"), first.counts.data)  # any reader of .npy can read it
    second = read_table(open_cells(str(cells.source.path)), cells.rows, GENES, folder=cells.folder)
    assert len(reads) == 1
    assert f"counts are taken from {cells.folder}" in caplog.text
    assert second.identity() == first.identity()
    assert second.skipped == first.skipped


def test_a_table_of_something_else_is_written_anew(cells, reads):
    read_table(cells.source, cells.rows, GENES, folder=cells.folder)
    other = cells.source.path.with_name("other.h5ad")
    shutil.copy(cells.source.path, other)
    for arguments in (
        (cells.source, cells.rows[:100], GENES),
        (cells.source, cells.rows, GENES[::-1]),
        (cells.source, cells.rows, GENES, "all"),
        (open_cells(str(other)), cells.rows, GENES),
    ):
        before = len(reads)
        table = read_table(*arguments, folder=cells.folder)
        assert len(reads) == before + 1
        assert table.identity() == read_table(*arguments).identity()
    make(csr_matrix(cells.values + 1)).write_h5ad(other)  # the same file, with other counts
    table = read_table(open_cells(str(other)), cells.rows, GENES, folder=cells.folder)
    assert np.array_equal(table.counts.toarray(), cells.values[:, [3, 1, 2]] + 1)


def spoiled(name: str, content: bytes | None):
    def spoil(folder: Path):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled("table.json", b"{"),
        spoiled("table.json", None),
        spoiled("data.npy", None),
        spoiled("indices.npy", b""),
        lambda folder: (folder / "data.npy").write_bytes((folder / "data.npy").read_bytes()[:-40]),
    ],
)
def test_a_folder_that_is_not_whole_is_written_anew(cells, reads, spoil):
    first = read_table(cells.source, cells.rows, GENES).identity()
    read_table(cells.source, cells.rows, GENES, folder=cells.folder)
    spoil(cells.folder)
    assert read_table(cells.source, cells.rows, GENES, folder=cells.folder).identity() == first
    assert len(reads) == 3
    assert read_table(cells.source, cells.rows, GENES, folder=cells.folder).identity() == first
    assert len(reads) == 3


def test_a_table_whose_writing_was_cut_short_is_not_used(cells, monkeypatch):
    read_table(cells.source, cells.rows, GENES, folder=cells.folder)
    monkeypatch.setattr(data_cells.CellSource.chunks, "__defaults__", (16,))
    original, count = data_store.GrowingFile.append, itertools.count()

    def fails(self, values):
        if next(count) == 20:
            raise OSError(28, "No space left on device")
        original(self, values)

    monkeypatch.setattr(data_store.GrowingFile, "append", fails)
    message = said(read_table, cells.source, cells.rows, GENES[:2], folder=cells.folder)
    assert f"{cells.folder} cannot be written" in message
    assert "No space left" in message
    assert not list(cells.folder.glob(".tmp-*"))
    assert not (cells.folder / "table.json").exists()
    expected = read_table(cells.source, cells.rows, GENES).identity()
    assert read_table(cells.source, cells.rows, GENES, folder=cells.folder).identity() == expected


def test_a_folder_that_is_a_file_is_refused(cells):
    cells.folder.write_text("here")
    assert "cannot be written" in said(read_table, cells.source, cells.rows, GENES, folder=cells.folder)


@pytest.mark.parametrize("in_folder", [False, True])
def test_columns_are_counted_in_64_bits_where_there_are_many_values(cells, in_folder):
    """scipy would make copies if columns and their starts were of two types."""
    folder = cells.folder if in_folder else None
    small = read_table(cells.source, cells.rows, GENES)
    cells.source.counts.max_values = 2**31
    table = read_table(cells.source, cells.rows, GENES, folder=folder)
    assert table.counts.indices.dtype == table.counts.indptr.dtype == np.int64
    assert small.counts.indices.dtype == small.counts.indptr.dtype == np.int32
    assert table.identity() == small.identity()
    assert np.array_equal(table.dense([3, 1]), small.dense([3, 1]))


def test_a_growing_file_is_an_npy_file_of_any_size(tmp_path):
    for sizes in ([], [0], [3], [5] * 300):
        growing = data_store.GrowingFile(tmp_path / "a.npy", np.dtype(np.int64))
        parts = [np.arange(size) for size in sizes]
        for part in parts:
            growing.append(part)
        assert np.array_equal(growing.finish(), np.concatenate([np.zeros(0), *parts]))
        assert np.array_equal(np.load(tmp_path / "a.npy"), np.concatenate([np.zeros(0), *parts]))
