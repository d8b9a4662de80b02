"""A source of cells, against anndata in memory: layouts, layers, raw, and genes or cells of one name."""

import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix, random_array

from tests.support.cells.data import LAYOUTS, all_rows, counts, make, opened, refused, whole, with_layers
from utils.expression.data import counts as data_counts
from utils.expression.data import source as data_cells
from utils.expression.data.source import open_cells
from utils.expression.data.table import CellTable, read_table

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")
h5py = pytest.importorskip("h5py")


def test_a_source_is_what_anndata_reads(blood):
    source = open_cells(str(blood.path))
    assert len(source) == 700
    assert source.genes == list(blood.adata.var_names)
    assert list(source.cell_ids) == list(blood.adata.obs_names)
    assert source.obs["cell_type"].dtype == object
    assert list(source.obs["cell_type"]) == list(blood.adata.obs["cell_type"])
    assert source.obs["percent_mito"] == pytest.approx(blood.adata.obs["percent_mito"].to_numpy())
    assert np.array_equal(whole(source, size=64), blood.adata.X.toarray())


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_counts(tmp_path, monkeypatch, layout, compression):
    monkeypatch.setattr(data_counts, "MAX_VALUES", 40)  # several steps through the 360 values
    values = counts()
    source = opened(make(LAYOUTS[layout](values)), tmp_path, compression=compression)
    assert np.array_equal(whole(source), values)
    some = np.array([0, 6, 7, 20, 29])
    assert np.array_equal(whole(source, some), values[some])


@pytest.mark.parametrize("layout", [csr_matrix, csc_matrix, np.asarray])
def test_booleans_are_counts_of_one(tmp_path, layout):
    values = counts() > 1
    assert np.array_equal(whole(opened(make(layout(values)), tmp_path)), values.astype(np.float32))


def test_columns_are_turned_to_rows_and_the_log_says_so(tmp_path, caplog):
    opened(make(csc_matrix(counts())), tmp_path)
    assert "stored by columns (CSC) and copied by rows to a temporary file" in caplog.text


def test_columns_without_room_for_their_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    message = refused(make(csc_matrix(counts())), tmp_path)
    assert message.startswith("--dataset_name: ")
    assert "adata.X = adata.X.tocsr()" in message


def test_zeros_that_are_stored_and_values_in_parts_are_no_counts_of_their_own(tmp_path):
    adata = make(csr_matrix(counts()))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        group = file["X"]
        rows = [([2, 0, 2, 5], [1, 2, 3, 0])] + [([0], [1])] * 29  # out of order, one twice, one zero
        for name, values in (("indices", [r[0] for r in rows]), ("data", [r[1] for r in rows])):
            dtype = group[name].dtype
            del group[name]
            group[name] = np.concatenate(values).astype(dtype)
        group["indptr"][:] = np.concatenate([[0], np.cumsum([len(r[0]) for r in rows])])
    source = open_cells(str(tmp_path / "cells.h5ad"))
    assert whole(source)[0].tolist() == [2, 0, 4, *[0] * 9]


@pytest.mark.parametrize("seed", range(5))
def test_scattered_rows_come_in_order(tmp_path, seed):
    generator = np.random.default_rng(seed)
    values = counts(200, 5, seed)
    source = opened(make(csr_matrix(values)), tmp_path)
    rows = np.flatnonzero(generator.random(200) < generator.choice([0.02, 0.5, 0.95]))
    for size in (1, 3, 50, 1000):
        assert np.array_equal(whole(source, rows, size), values[rows])


@pytest.mark.parametrize("rows", [[3, 1], [1, 1], [-1, 2], [5, 30]])
def test_rows_must_ascend(tmp_path, rows):
    with pytest.raises(ValueError, match="must ascend"):
        list(opened(make(), tmp_path).chunks(np.array(rows)))


def test_no_rows_give_no_chunks(tmp_path):
    assert list(opened(make(), tmp_path).chunks(np.array([], dtype=int))) == []


@pytest.mark.parametrize("layout", [csr_matrix, csc_matrix, np.asarray])
def test_the_whole_matrix_is_never_in_memory(tmp_path, monkeypatch, layout):
    """Of 30 MB of counts at most a third is held at a time, while all of them are looked at, turned to rows and read;
    numpy reports to tracemalloc what it takes (but not what is mapped from a file)."""
    values = random_array((20_000, 400), density=0.48, rng=np.random.default_rng(0), dtype=np.float32, format="csr")
    values.data[:] = np.rint(values.data * 9 + 1)
    matrix = layout(values.toarray()) if layout is np.asarray else layout(values)
    size = matrix.nbytes if layout is np.asarray else 8 * matrix.nnz
    assert size > 30e6
    total, genes = values.sum(dtype=np.float64), [f"G{i}" for i in range(0, 400, 20)]
    expected = values[:, ::20].toarray()
    adata = make(matrix)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    del adata, matrix, values

    monkeypatch.setattr(data_counts, "MAX_VALUES", 2**17)
    monkeypatch.setattr(data_cells.CellSource.chunks, "__defaults__", (1024,))
    tracemalloc.start()
    try:
        source = open_cells(str(tmp_path / "cells.h5ad"))
        read = sum(block.sum(dtype=np.float64) for _, block in source.chunks(all_rows(source)))
        table = read_table(source, all_rows(source), genes, folder=tmp_path / "table")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == total
    assert peak < size / 3
    assert np.array_equal(table.dense(slice(None)), expected[np.isin(np.arange(20_000), table_rows(table))])


def table_rows(table: CellTable) -> list[int]:
    return [int(name.removeprefix("cell-")) for name in table.cell_ids]


@pytest.mark.parametrize(("layer", "genes"), [("counts", 8), ("raw", 12)])
def test_counts_from_a_layer_and_from_raw(tmp_path, layer, genes):
    source = opened(with_layers(), tmp_path, layer)
    assert source.genes == [f"G{i}" for i in range(genes)]
    assert source.name.endswith(f"cells.h5ad, {layer}")
    assert np.array_equal(whole(source), counts()[:, :genes])


def test_x_may_be_named(tmp_path):
    assert np.array_equal(whole(opened(make(), tmp_path, "X")), counts())


def test_a_layer_that_is_called_raw_comes_first(tmp_path):
    adata = with_layers()
    adata.layers["raw"] = 2 * adata.layers["counts"]
    assert np.array_equal(whole(opened(adata, tmp_path, "raw")), 2 * counts()[:, :8])


def test_a_missing_layer_lists_those_there_are(tmp_path):
    message = refused(with_layers(), tmp_path, "umi")
    assert message.startswith("--counts_layer: ")
    assert "has no layer umi" in message
    for name in ("X", "raw", "counts", "scaled"):
        assert name in message.partition("it has")[2]


def test_raw_that_is_not_there(tmp_path):
    assert "has no layer raw; it has X (" in refused(make(), tmp_path, "raw")


def test_x_that_is_none(tmp_path):
    adata = make()
    adata.layers["counts"] = adata.X
    adata.X = None
    message = refused(adata, tmp_path)
    assert "has no X; it has counts" in message
    assert "--counts_layer" in message
    assert np.array_equal(whole(opened(adata, tmp_path, "counts")), counts())


def test_no_matrix_at_all(tmp_path):
    adata = make()
    adata.X = None
    assert "has no X; it has no matrix at all" in refused(adata, tmp_path)


@pytest.mark.parametrize("shape", [(0, 12), (30, 0)])
def test_a_file_without_cells_or_genes(tmp_path, shape):
    message = refused(make(np.zeros(shape, dtype=np.float32)), tmp_path)
    assert f"has {shape[0]} cells and {shape[1]} genes; give one that is not empty" in message
    assert f"has {shape[0]} cells and" in refused(make(csr_matrix(shape, dtype=np.float32)), tmp_path)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_of_the_same_name_are_refused(tmp_path):
    names = [*("CD3E", "CD4", "CD3E", "CD4", "CD4"), *(f"G{i}" for i in range(7))]
    message = refused(make(names=names), tmp_path)
    assert "has 2 gene names more than once (CD3E, CD4)" in message
    assert "var_names_make_unique" in message


def test_a_gene_without_a_name_is_refused(tmp_path):
    assert "a gene without a name" in refused(make(names=["", *(f"G{i}" for i in range(11))]), tmp_path)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_of_the_same_name_are_told_apart(tmp_path, caplog):
    ids = ["AAAC", "AAAC", "TTTG", "AAAC", *(f"cell-{i}" for i in range(26))]
    source = opened(make(ids=ids), tmp_path)
    assert list(source.cell_ids) == ["AAAC", "AAAC-1", "TTTG", "AAAC-2", *ids[4:]]
    assert "2 cells have the name of another" in caplog.text
