"""Cells as users have them, against anndata and scanpy in memory: every bad-input case is a real file built here."""

import gzip
import itertools
import logging
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix, issparse, random_array

from tests.support.data import DATA
from tests.support.processes import ROOT
from utils.errors import UserError
from utils.expression.data import counts as data_counts
from utils.expression.data import source as data_cells
from utils.expression.data import store as data_store
from utils.expression.data.genes import FLAVORS, choose_genes, find_genes
from utils.expression.data.h5ad import column_array, write_h5ad
from utils.expression.data.source import open_cells
from utils.expression.data.table import CellTable, apportioned, check_labels, read_table, stratified_split

anndata = pytest.importorskip("anndata")
h5py = pytest.importorskip("h5py")
pd = pytest.importorskip("pandas")
sc = pytest.importorskip("scanpy")

from tests.support.pbmc import DECIMALS, pbmc68k, recovered_counts, write_pbmc68k  # noqa: E402

FACS = DATA / "cells" / "pbmc_facs.h5ad"
needs_real_data = pytest.mark.skipif(not FACS.is_file(), reason="real data is not here")
LOGGED = logging.getLogger("utils").name


@pytest.fixture(autouse=True)
def _all_is_logged(caplog):
    caplog.set_level(logging.INFO, logger=LOGGED)


@pytest.fixture(scope="session")
def blood(tmp_path_factory):
    """The 700 cells in memory, and in a file."""
    path = tmp_path_factory.mktemp("cells") / "pbmc68k.h5ad"
    return SimpleNamespace(adata=write_pbmc68k(path), path=path)


def counts(cells: int = 30, genes: int = 12, seed: int = 0) -> np.ndarray:
    """Small counts, many of them zero, at least one in each row."""
    drawn = np.random.default_rng(seed).poisson(0.7, (cells, genes)).astype(np.float32)
    drawn[:, 0] += 1
    return drawn


def make(values=None, names=None, ids=None, **columns):
    """An AnnData with X (30 cells of 12 genes, unless given) and columns of obs."""
    values = csr_matrix(counts()) if values is None else values
    adata = anndata.AnnData(values)
    adata.var_names = names or [f"G{i}" for i in range(adata.n_vars)]
    adata.obs_names = ids or [f"cell-{i}" for i in range(adata.n_obs)]
    for name, column in columns.items():
        adata.obs[name] = column
    return adata


def opened(adata, folder: Path, layer: str | None = None, **how):
    """It, by way of a file."""
    adata.write_h5ad(folder / "cells.h5ad", **how)
    return open_cells(str(folder / "cells.h5ad"), layer)


def all_rows(source) -> np.ndarray:
    return np.arange(len(source))


def whole(source, rows=None, size: int = 7) -> np.ndarray:
    """All counts, dense, put together from the chunks."""
    rows = all_rows(source) if rows is None else rows
    found = np.full((len(rows), len(source.genes)), np.nan, dtype=np.float32)
    for places, block in source.chunks(rows, size):
        assert issparse(block)
        assert block.format == "csr"
        assert block.dtype == np.float32
        assert len(places) <= size
        assert (block.data != 0).all()
        found[places] = block.toarray()
    return found


def said(function, *arguments, **named) -> str:
    """What a UserError says."""
    with pytest.raises(UserError) as raised:
        function(*arguments, **named)
    message = str(raised.value)
    assert "\n" not in message
    return message


def refused(adata, folder: Path, layer: str | None = None) -> str:
    return said(opened, adata, folder, layer)


# ---- the fixture ----------------------------------------------------------------------------------------------------


def test_the_counts_of_the_fixture_are_recovered(blood):
    """Logarithms of three decimals leave the counts unambiguous: all are within 0.1 % of a whole number, those up to
    19 within 0.01, and the logarithms of these are the stored ones, all 700 x 765 of them, to the last decimal."""
    original = sc.datasets.pbmc68k_reduced()
    recovered = recovered_counts(original)
    rounded = np.rint(recovered)
    deviation = np.abs(recovered - rounded)
    assert deviation[rounded < 20].max() < 1e-2
    assert (deviation / np.maximum(rounded, 1)).max() < 1e-3
    again = np.log1p(rounded / original.obs["n_counts"].to_numpy(dtype=np.float64)[:, None] * 1e4)
    assert np.abs(again - original.raw.X.toarray()).max() < 0.51 * 10**-DECIMALS
    assert np.array_equal(blood.adata.X.toarray(), rounded)
    assert (pbmc68k().obs["cell_type"].astype(str).to_numpy() == original.obs["bulk_labels"].astype(str)).all()


# ---- a source of cells ----------------------------------------------------------------------------------------------


def test_a_source_is_what_anndata_reads(blood):
    source = open_cells(str(blood.path))
    assert len(source) == 700
    assert source.genes == list(blood.adata.var_names)
    assert list(source.cell_ids) == list(blood.adata.obs_names)
    assert source.obs["cell_type"].dtype == object
    assert list(source.obs["cell_type"]) == list(blood.adata.obs["cell_type"])
    assert source.obs["percent_mito"] == pytest.approx(blood.adata.obs["percent_mito"].to_numpy())
    assert np.array_equal(whole(source, size=64), blood.adata.X.toarray())


LAYOUTS = {
    "csr": csr_matrix,
    "csc": csc_matrix,
    "dense": np.asarray,
    "csr of float64": lambda values: csr_matrix(values.astype(np.float64)),
    "csr of int64": lambda values: csr_matrix(values.astype(np.int64)),
    "csc of uint16": lambda values: csc_matrix(values.astype(np.uint16)),
    "dense of int32": lambda values: values.astype(np.int32),
    "dense of float64": lambda values: values.astype(np.float64),
    "dense of uint8": lambda values: values.astype(np.uint8),
}


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


# ---- layers, raw, X -------------------------------------------------------------------------------------------------


def with_layers():
    """X is log-normalised; counts are in a layer, and in raw, which has more genes."""
    full = make(csr_matrix(counts()))
    adata = full[:, :8].copy()
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata.layers["scaled"] = adata.X.toarray() - 1
    adata.raw = full
    return adata


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


# ---- values that are no counts --------------------------------------------------------------------------------------


def test_normalised_values_are_named_and_so_are_the_layers_with_counts(tmp_path):
    adata = with_layers()
    message = refused(adata, tmp_path)
    values = adata.X.toarray()
    stored = values[values != 0]
    fractions = int((stored != np.rint(stored)).sum())
    assert f"to {values.max():g}, and {fractions:,} of {len(stored):,} ({fractions / len(stored):.1%})" in message
    assert "--counts_layer counts does" in message
    assert "--counts_layer raw does" in message
    assert "scaled does" not in message


def test_counts_that_are_in_x_are_named_for_a_layer_without(tmp_path):
    adata = make()
    adata.layers["log"] = np.log1p(adata.X.toarray())
    message = refused(adata, tmp_path, "log")
    assert "layers/log" in message
    assert "X does: leave --counts_layer out" in message


def test_normalised_values_without_counts_anywhere(tmp_path):
    adata = make(csr_matrix(np.log1p(counts())))
    adata.layers["scaled"] = adata.X.toarray() - 1
    assert "--counts_layer counts (nor do scaled)" in refused(adata, tmp_path)


@pytest.mark.parametrize("layout", [csr_matrix, csc_matrix, np.asarray])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "its values go from 0 to 5, and 1 of "),
        (-1, "its values go from -1 to 5, and 0 of "),
        (np.nan, "1 of "),
        (np.inf, "are NaN or infinite"),
        (-np.inf, "are NaN or infinite"),
        (2**24 + 2, "its maximum is 16,777,218, and fp32 holds whole numbers up to 16,777,216 only"),
    ],
)
def test_a_single_value_that_is_no_count_is_found(tmp_path, monkeypatch, layout, value, expected):
    """Whichever it is: all are looked at, in steps."""
    monkeypatch.setattr(data_counts, "MAX_VALUES", 50)
    values = np.minimum(counts(), 5)
    values[np.unravel_index(values.argmax(), values.shape)] = 5
    place = np.argwhere(values == 1)[-1]
    values[tuple(place)] = value
    message = refused(make(layout(values)), tmp_path)
    assert message.startswith("--dataset_name: X of ")
    assert expected in message
    assert "--counts_layer counts" in message


def test_integers_are_looked_at_too(tmp_path):
    values = counts().astype(np.int64)
    values[3, 3] = -2
    assert "from -2 to" in refused(make(csr_matrix(values)), tmp_path)
    values[3, 3] = 2**24
    assert np.array_equal(whole(opened(make(csr_matrix(values)), tmp_path)), values)
    values[3, 3] = 2**24 + 1
    assert "its maximum is 16,777,217" in refused(make(csr_matrix(values)), tmp_path)


def test_zeros_alone_are_no_counts(tmp_path):
    assert "every value is zero" in refused(make(np.zeros((30, 12), dtype=np.float32)), tmp_path)
    assert "every value is zero" in refused(make(csr_matrix((30, 12), dtype=np.float32)), tmp_path)


def test_values_that_are_no_numbers(tmp_path):
    assert "values of type complex64" in refused(make(counts().astype(np.complex64)), tmp_path)


# ---- files that are none --------------------------------------------------------------------------------------------


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    assert "does not exist; give an .h5ad file" in said(open_cells, str(tmp_path / "none.h5ad"))
    assert said(open_cells, str(tmp_path / "none.h5ad"), flag="--reference").startswith("--reference: ")
    assert "is a folder; give one .h5ad file" in said(open_cells, str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"gene,cell\nA,1\n", b"\x89HD"])
def test_a_file_that_is_no_h5ad(tmp_path, content):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(content)
    assert "is no .h5ad file (not HDF5 at all)" in said(open_cells, str(path))


def test_a_file_that_is_compressed_as_a_whole(tmp_path):
    make().write_h5ad(tmp_path / "cells.h5ad")
    packed = tmp_path / "cells.h5ad.gz"
    packed.write_bytes(gzip.compress((tmp_path / "cells.h5ad").read_bytes()))
    assert "unpack it with gunzip" in said(open_cells, str(packed))


def test_hdf5_of_something_else(tmp_path):
    path = tmp_path / "cells.h5"
    with h5py.File(path, "w") as file:
        file["matrix/data"] = [1]
    message = said(open_cells, str(path))
    assert "it has no obs (but matrix)" in message
    assert "read_10x_h5" in message


def test_a_file_that_was_cut_short(tmp_path):
    make().write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    (tmp_path / "cells.h5ad").write_bytes(content[: len(content) // 2])
    assert "cannot be read" in said(open_cells, str(tmp_path / "cells.h5ad"))


def changed(folder: Path, change, matrix=csr_matrix) -> str:
    """What is said of a file after a change to it, when it is opened or read."""
    make(matrix(counts())).write_h5ad(folder / "cells.h5ad")
    with h5py.File(folder / "cells.h5ad", "r+") as file:
        change(file)
    return said(lambda: whole(open_cells(str(folder / "cells.h5ad"))))


def set_first(name: str, value: int, place: int = 0):
    def change(file):
        file["X"][name][place] = value

    return change


@pytest.mark.parametrize("matrix", [csr_matrix, csc_matrix])
@pytest.mark.parametrize(
    "change",
    [
        set_first("indices", 10_000),
        set_first("indices", -3),
        set_first("indptr", 10_000, 4),
        set_first("indptr", -1, 4),
    ],
)
def test_a_damaged_matrix_is_no_counts(tmp_path, change, matrix):
    assert "X of " in (message := changed(tmp_path, change, matrix))
    assert "is damaged" in message


def replace_x(file, values):
    del file["X"]
    file["X"] = values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: replace_x(file, np.ones(5)), "an array of shape (5,); expected a matrix"),
        (lambda file: replace_x(file, np.ones((4, 12))), "X of CELLS is 4 x 12, but there are 30 cells and 12 genes"),
        (lambda file: file["X"].attrs.update({"encoding-type": "coo_matrix"}), "is a coo_matrix; expected a matrix"),
        (lambda file: file["X"].attrs.pop("encoding-type"), "is a group; expected a matrix"),
        (lambda file: file["obs"].attrs.update({"encoding-type": "martian"}), "obs of CELLS cannot be read"),
        (lambda file: file.__delitem__("var"), "it has no var"),
        (lambda file: file["X"].__delitem__("data"), "cannot be read"),
    ],
)
def test_a_file_that_is_no_anndata(tmp_path, change, expected):
    assert expected.replace("CELLS", str(tmp_path / "cells.h5ad")) in changed(tmp_path, change)


def test_tables_as_they_were_written_before_0_7(tmp_path):
    def change(file):
        del file["obs"]
        file["obs"] = np.array([(b"a", 1)] * 30, dtype=[("index", "S1"), ("n", "i4")])

    assert "no table as anndata writes it since 0.7" in changed(tmp_path, change)


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


@pytest.mark.parametrize("package", ["h5py", "anndata", "scanpy", "skmisc"])
def test_a_package_that_is_missing_is_named(blood, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # the import fails
    monkeypatch.delitem(sys.modules, f"{package}.loess", raising=False)

    def all_of_it():
        choose_genes(open_cells(str(blood.path)), np.arange(700), 50, "seurat_v3")

    assert f"needs the package {package}: pip install -r requirements-expression.txt" in said(all_of_it)


def test_the_packages_are_imported_where_they_are_used():
    program = (
        "import sys, utils.data_expression; print(sorted({'anndata', 'scanpy', 'h5py', 'pandas'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- obs ------------------------------------------------------------------------------------------------------------


def test_columns_become_text_or_numbers(tmp_path, caplog):
    third = [0, 1, 2] * 10
    adata = make(
        category=pd.Categorical.from_codes(np.array(third) - 1, ["B", "T"]),
        numbered=pd.Categorical(third),
        text=pd.array(["B", None, "T"] * 10, dtype="string"),
        integer=np.array(third),
        nullable_integer=pd.array([1, None, 3] * 10, dtype="Int64"),
        number=np.array([0.5, np.nan, 2] * 10, dtype=np.float32),
        boolean=np.array(third) > 0,
        nullable_boolean=pd.array([True, None, False] * 10, dtype="boolean"),
        complex=np.array(third) * 1j,
    )
    write_h5ad(adata, tmp_path / "cells.h5ad")
    obs = open_cells(str(tmp_path / "cells.h5ad")).obs
    texts = {
        "category": [None, "B", "T"],
        "numbered": ["0", "1", "2"],
        "text": ["B", None, "T"],
        "boolean": ["False", "True", "True"],
        "nullable_boolean": ["True", None, "False"],
    }
    numbers = {
        "integer": [0, 1, 2],
        "nullable_integer": [1, np.nan, 3],
        "number": [0.5, np.nan, 2],
    }
    assert set(obs) == {*texts, *numbers}
    for name, values in texts.items():
        assert obs[name].dtype == object
        assert obs[name].tolist() == values * 10
    for name, values in numbers.items():
        assert obs[name].dtype == np.float64
        assert np.array_equal(obs[name], values * 10, equal_nan=True)
    assert "neither numbers nor text are left out: complex" in caplog.text


def test_nullable_floats():
    """anndata has no way to write them yet."""
    found = column_array(pd.Series(pd.array([1.5, None, 3], dtype="Float64")))
    assert np.array_equal(found, [1.5, np.nan, 3], equal_nan=True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", None, np.nan, pd.NA], ["a", None, None, None]),
        ([1, None, 2.5, np.int32(3)], [1.0, np.nan, 2.5, 3.0]),
        ([True, None, np.False_], ["True", None, "False"]),
        (["a", 1, None], None),
        ([["a"], None], None),
        ([b"a", None], None),
        ([None, np.nan], [None, None]),
        ([], []),
    ],
)
def test_columns_of_objects(values, expected):
    found = column_array(pd.Series(values, dtype=object))
    if expected is None:
        assert found is None
    elif found.dtype == object:
        assert found.tolist() == expected
    else:
        assert np.array_equal(found, expected, equal_nan=True)


# ---- writing --------------------------------------------------------------------------------------------------------


def test_text_arrays_of_pandas_are_written_and_the_setting_is_left_as_it_was(tmp_path):
    adata = make(text=pd.array(["B", None] * 15, dtype="string"))
    with pytest.raises(RuntimeError, match="allow_write_nullable_strings"):
        adata.write_h5ad(tmp_path / "plain.h5ad", convert_strings_to_categoricals=False)
    before = anndata.settings.allow_write_nullable_strings
    write_h5ad(adata, tmp_path / "cells.h5ad")
    assert anndata.settings.allow_write_nullable_strings == before
    assert [value if isinstance(value, str) else None for value in anndata.read_h5ad(tmp_path / "cells.h5ad").obs["text"]] == ["B", None] * 15  # fmt: skip


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    write_h5ad(make(), path)
    before = path.read_bytes()

    def fails(self, name):
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", fails)
    with pytest.raises(OSError, match="no space"):
        write_h5ad(make(), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["cells.h5ad"]


# ---- genes ----------------------------------------------------------------------------------------------------------


def by_scanpy(adata, rows, num_genes: int, flavor: str, min_cells: int = 3) -> list[str]:
    """What scanpy chooses, in memory."""
    subset = adata[rows].copy()
    sc.pp.filter_genes(subset, min_cells=min_cells)
    package = sc.experimental.pp if flavor == "pearson_residuals" else sc.pp
    package.highly_variable_genes(subset, flavor=flavor, n_top_genes=num_genes)
    return list(subset.var_names[subset.var["highly_variable"]])


@pytest.mark.parametrize("flavor", FLAVORS)
def test_genes_are_those_that_scanpy_chooses_of_the_training_cells(blood, flavor):
    source = open_cells(str(blood.path))
    split = stratified_split(source.obs["cell_type"], 700, 0.1, 0.1, seed=0)
    rows = np.flatnonzero(split == "train")
    found = choose_genes(source, rows, 200, flavor)
    assert found == by_scanpy(blood.adata, rows, 200, flavor)
    assert len(found) == 200
    assert found != by_scanpy(blood.adata, np.arange(700), 200, flavor)  # so the rows do matter
    assert found == [gene for gene in source.genes if gene in set(found)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """300 cells; in the last 100 alone, the gene "planted" varies more than any other."""
    generator = np.random.default_rng(0)
    values = generator.poisson(generator.gamma(2, 1, 60), (300, 60)).astype(np.float32)
    values[:200, 17] = generator.poisson(2, 200)
    values[200:, 17] = 20 * (generator.random(100) < 0.1)
    values[:, 30] = 0
    values[[3, 90, 250, 251, 252], 30] = 1
    names = [f"G{i}" for i in range(60)]
    names[17], names[30] = "planted", "rare"
    return opened(make(csr_matrix(values), names=names), tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_what_varies_in_other_rows_only_is_not_chosen(planted, flavor):
    assert "planted" in choose_genes(planted, np.arange(300), 3, flavor)
    assert "planted" not in choose_genes(planted, np.arange(200), 3, flavor)


def test_genes_of_too_few_of_the_rows_are_left_out(planted, caplog):
    train = choose_genes(planted, np.arange(200), 1000)
    assert train == [gene for gene in planted.genes if gene != "rare"]  # in two of these rows, and in five of all
    assert "all 59 genes with counts in at least 3 cells are taken" in caplog.text
    assert choose_genes(planted, np.arange(300), 60) == planted.genes
    assert choose_genes(planted, np.arange(200), 60, min_cells=2) == planted.genes


def test_no_genes_at_all_is_an_error(planted):
    message = said(choose_genes, planted, np.arange(2), 10)
    assert "no gene of" in message
    assert "at least 3 of 2 cells" in message
    assert "--num_genes: 0 is too few" in said(choose_genes, planted, np.arange(200), 0)


def test_of_many_cells_a_random_subset_is_used(blood, caplog):
    source = open_cells(str(blood.path))
    rows = np.arange(0, 700, 2)
    seen = []

    class Spy:
        genes, name = source.genes, source.name

        def chunks(self, some):
            seen.append(some)
            return source.chunks(some)

    found = [choose_genes(Spy(), rows, 100, max_cells=200, seed=seed) for seed in (0, 0, 1)]
    assert "genes are chosen by a random 200 of 350 cells" in caplog.text
    assert [len(set(each)) for each in seen] == [200, 200, 200]
    assert set(seen[0]) < set(rows)
    assert found[0] == found[1] == by_scanpy(blood.adata, seen[0], 100, "pearson_residuals")
    assert found[0] != found[2]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_cells_without_counts_change_no_genes(tmp_path, blood, flavor):
    values = blood.adata.X.toarray()
    empty = anndata.AnnData(csr_matrix(np.concatenate([values, np.zeros((5, 765), dtype=np.float32)])))
    empty.var_names = list(blood.adata.var_names)
    source = opened(empty, tmp_path)
    assert choose_genes(source, np.arange(705), 100, flavor) == by_scanpy(blood.adata, np.arange(700), 100, flavor)


def test_a_fit_that_fails_says_what_to_do(tmp_path):
    values = np.ones((30, 12), dtype=np.float32)
    values[0] = 2
    message = said(choose_genes, opened(make(csr_matrix(values)), tmp_path), np.arange(30), 4, "seurat_v3")
    assert message.startswith("--dataset_name: seurat_v3 cannot choose among 12 genes of 30 cells")
    assert "pearson_residuals" in message


# ---- genes by name --------------------------------------------------------------------------------------------------


def test_genes_are_found_by_name_in_any_order(tmp_path):
    source = opened(make(), tmp_path)
    genes = ["G7", "G0", "G11"]
    table = read_table(source, all_rows(source), genes)
    assert table.genes == genes
    assert np.array_equal(table.dense(all_rows(source)), counts()[:, [7, 0, 11]])
    assert table.library_sizes.tolist() == counts()[:, [7, 0, 11]].sum(axis=1).tolist()


ENSEMBL = [f"ENSG{i:011}" for i in range(12)]


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        (None, ["G0", "A", "B", "C", "D", "E", "F"], "6 of 7 genes are not in "),
        (None, ["G0", "A", "B", "C", "D", "E", "F"], "(A, B, C, D, E, ...), which has 12 (G0, G1, "),
        (None, ["G0", "A"], "give a file with all genes that the model was trained on"),
        ([f"Cd{i}e" for i in range(12)], ["CD3E", "CD4E", "X"], "2 of them are there in another case (Cd3e for CD3E)"),
        ([f"CD{i}" for i in range(12)], ENSEMBL[:3], "wanted are Ensembl identifiers, and the file has gene symbols"),
        (ENSEMBL, ["CD3", "CD4"], "wanted are gene symbols, and the file has Ensembl identifiers"),
        ([f"{name}.4" for name in ENSEMBL], ENSEMBL[:3], "3 of them differ in the version after the dot only"),
    ],
)
def test_genes_that_are_missing_are_counted_and_the_reason_guessed(tmp_path, there, wanted, expected):
    source = opened(make(names=there), tmp_path)
    message = said(read_table, source, all_rows(source), wanted)
    assert message.startswith("--dataset_name: ")
    assert expected in message


def test_a_column_that_has_the_missing_names_is_named(tmp_path):
    adata = make(names=[f"CD{i}" for i in range(12)])
    adata.var["gene_ids"] = ENSEMBL
    adata.var["length"] = 1.0
    source = opened(adata, tmp_path)
    assert "column gene_ids of adata.var has 4 of them: adata.var_names = adata.var['gene_ids']" in said(
        find_genes, source, ENSEMBL[:4]
    )


@pytest.mark.parametrize("genes", [["G0", "G0"], []])
def test_genes_must_be_named_once(tmp_path, genes):
    source = opened(make(), tmp_path)
    with pytest.raises(ValueError, match="once each"):
        read_table(source, all_rows(source), genes)
    with pytest.raises(ValueError, match="chosen, all"):
        read_table(source, all_rows(source), ["G0"], library="some")


# ---- tables ---------------------------------------------------------------------------------------------------------

GENES = ["G3", "G1", "G2"]


@pytest.fixture
def cells(tmp_path):
    """200 cells, of which three have no counts in GENES, and one has none at all."""
    values = counts(200, 12)
    values[:, 1] += 1
    values[np.ix_([5, 77, 130], [1, 2, 3])] = 0
    values[77] = 0
    columns = {"cell_type": ["B", "T"] * 100, "score": np.linspace(0, 1, 200)}
    source = opened(make(csr_matrix(values), **columns), tmp_path)
    return SimpleNamespace(source=source, values=values, rows=np.arange(200), folder=tmp_path / "table")


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("library", ["chosen", "all"])
def test_a_table_is_the_counts_of_its_cells(cells, library, in_folder, caplog):
    rows = np.flatnonzero(np.arange(200) % 4 != 3)
    folder = cells.folder if in_folder else None
    table = read_table(cells.source, rows, GENES, library, folder)
    kept = np.setdiff1d(rows, [5, 77, 130])
    chosen = cells.values[:, [3, 1, 2]]
    assert len(table) == len(kept) == table.counts.shape[0]
    assert table.counts.dtype == np.float32
    assert np.array_equal(table.counts.toarray(), chosen[kept])
    assert list(table.cell_ids) == [f"cell-{i}" for i in kept]
    assert table.obs["cell_type"].tolist() == [["B", "T"][i % 2] for i in kept]
    assert table.obs["score"] == pytest.approx(kept / 199)
    assert table.library_sizes.dtype == np.float64
    assert np.array_equal(table.library_sizes, (chosen if library == "chosen" else cells.values)[kept].sum(axis=1))
    assert table.skipped == [{"cell": f"cell-{i}", "reason": "no counts in the 3 chosen genes"} for i in (5, 77, 130)]
    assert "3 of 150 cells are skipped" in caplog.text


def test_counts_of_some_cells_are_dense(cells):
    table = read_table(cells.source, cells.rows, GENES)
    expected = cells.values[np.setdiff1d(cells.rows, [5, 77, 130])][:, [3, 1, 2]]
    mask = np.arange(len(table)) % 3 == 0
    for rows in ([4, 4, 0], np.array([9, 2]), mask, slice(0, 5)):
        batch = table.dense(rows)
        assert batch.dtype == np.float32
        assert batch.flags["C_CONTIGUOUS"]
        assert np.array_equal(batch, expected[rows])


@pytest.mark.parametrize("in_folder", [False, True])
def test_some_cells_of_a_table(cells, in_folder):
    table = read_table(cells.source, cells.rows, GENES, folder=cells.folder if in_folder else None)
    for rows in (np.array([7, 3, 100]), np.arange(len(table)) < 50):
        some = table.take(rows)
        assert np.array_equal(some.counts.toarray(), table.counts.toarray()[rows])
        assert np.array_equal(some.library_sizes, table.library_sizes[rows])
        assert list(some.cell_ids) == list(table.cell_ids[rows])
        assert some.obs["score"].tolist() == table.obs["score"][rows].tolist()
        assert some.genes == GENES
    assert table.take(np.arange(len(table))).identity() == table.identity()


def test_too_many_cells_without_counts_are_an_error(cells):
    message = said(read_table, cells.source, cells.rows, GENES, max_skipped_fraction=0.01)
    assert message.startswith("--dataset_name: 3 of 200 cells")
    assert "(cell-5, cell-77, cell-130), and at most 1% may be left out" in message
    assert len(read_table(cells.source, cells.rows, GENES, max_skipped_fraction=0.015)) == 197
    assert "1 of 1 cells" in said(read_table, cells.source, np.array([77]), GENES, max_skipped_fraction=1.0)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_split_without_cells_is_an_empty_table(cells, in_folder):
    table = read_table(cells.source, np.array([], dtype=int), GENES, folder=cells.folder if in_folder else None)
    assert len(table) == 0
    assert table.counts.shape == (0, 3)
    assert table.skipped == []
    assert len(read_table(cells.source, [], GENES)) == 0


def test_the_identity_is_of_all_that_is_in_a_table(cells):
    table = read_table(cells.source, cells.rows, GENES)
    others = [
        read_table(cells.source, cells.rows[:-1], GENES),
        read_table(cells.source, cells.rows, GENES, "all"),
        read_table(cells.source, cells.rows, sorted(GENES)),
        table.take(np.arange(len(table))[::-1]),
    ]
    for name, value in (
        ("genes", ["G3", "G1", "G4"]),
        ("cell_ids", np.array([*table.cell_ids[:-1], "other"], dtype=object)),
        ("obs", table.obs | {"score": table.obs["score"] + 1}),
        ("obs", {"cell_type": table.obs["cell_type"]}),
        ("counts", table.counts * 2),
        ("counts", csr_matrix((table.counts.data, table.counts.indices[::-1], table.counts.indptr), table.counts.shape)),
    ):  # fmt: skip
        others.append(CellTable(**(vars(table) | {name: value})))
    identities = {each.identity() for each in [table, *others]}
    assert len(identities) == 1 + len(others)
    assert read_table(cells.source, cells.rows, GENES).identity() == table.identity()
    assert read_table(cells.source, cells.rows, GENES, folder=cells.folder).identity() == table.identity()


# ---- tables in folders ----------------------------------------------------------------------------------------------


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


# ---- labels ---------------------------------------------------------------------------------------------------------


def labelled(values) -> SimpleNamespace:
    return SimpleNamespace(
        obs={"cell_type": np.array(values, dtype=object), "batch": np.array(["a"] * 20, dtype=object)}
    )


def test_labels_are_those_of_the_column(blood):
    source = open_cells(str(blood.path))
    assert list(check_labels(source, "cell_type", "--cell_type_column")) == list(blood.adata.obs["cell_type"])
    table = read_table(source, np.arange(700), source.genes)
    assert list(check_labels(table, "cell_type", "--cell_type_column")) == list(blood.adata.obs["cell_type"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["B"] * 10 + ["T"] * 5 + [None] * 3, "3 of 18 cells have no cell_type"),
        (["B"] * 10 + ["T"] * 5 + ["", " "], "2 of 17 cells have no cell_type"),
        (["B"] * 10, "all cells have one cell_type (B)"),
        (["B"] * 10 + ["T"] * 4 + ["NK"] * 2, "2 of 3 types in cell_type have fewer than 5 cells (NK: 2, T: 4)"),
    ],
)
def test_labels_that_cannot_be_used(values, expected):
    message = said(check_labels, labelled(values), "cell_type", "--cell_type_column")
    assert message.startswith(f"--cell_type_column: {expected}")


def test_a_column_that_is_missing_lists_those_there_are():
    message = said(check_labels, labelled(["B"] * 20), "type", "--cell_type_column")
    assert message == "--cell_type_column: there is no column type in adata.obs; there are cell_type, batch"
    assert "there are none" in said(check_labels, SimpleNamespace(obs={}), "type", "--label_column")


def test_numbers_as_labels():
    obs = {"cluster": np.array([0.0, 1, 2] * 5), "score": np.linspace(0, 1, 15), "some": np.array([np.nan, 1, 2] * 5)}
    cells = SimpleNamespace(obs=obs)
    assert check_labels(cells, "cluster", "--label_column").tolist() == ["0", "1", "2"] * 5
    assert "score holds numbers from 0 to 1, no types" in said(check_labels, cells, "score", "--label_column")
    assert "5 of 15 cells have no some" in said(check_labels, cells, "some", "--label_column")


# ---- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.05, 0.5, 0.45), (0.9, 0, 0.1), (0.71, 0.29, 0), (1, 0, 0)])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 10, 29, 100])
def test_types_are_divided_as_nearly_as_whole_cells_allow(shares, number):
    """No other division with a training cell is nearer to the proportions: all of them are tried."""
    quotas = number * np.array(shares)
    divisions = [(a, b, number - a - b) for a in range(1, number + 1) for b in range(number - a + 1)]
    nearest = min(((np.array(each) - quotas) ** 2).sum() for each in divisions)
    for seed in range(3):
        parts = apportioned(number, np.array(shares), np.random.default_rng(seed))
        assert parts.sum() == number
        assert parts[0] >= 1
        assert ((parts - quotas) ** 2).sum() == pytest.approx(nearest)
        assert (parts[np.array(shares) == 0] == 0).all()


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.25, 0), (0, 0.3), (0, 0), (0.5, 0.45)])
def test_a_split_keeps_the_proportions_of_every_type(blood, fractions):
    labels = blood.adata.obs["cell_type"].astype(str).to_numpy(dtype=object)
    split = stratified_split(labels, 700, *fractions, seed=3)
    assert split.shape == (700,)
    assert set(split) == {"train"} | {n for n, fraction in zip(("val", "test"), fractions, strict=True) if fraction}
    for label in set(labels):
        of_type = split[labels == label]
        assert (of_type == "train").any()
        for name, fraction in zip(("val", "test"), fractions, strict=True):
            assert abs((of_type == name).sum() - fraction * len(of_type)) < 1
    assert np.array_equal(split, stratified_split(labels, 700, *fractions, seed=3))
    if any(fractions):
        assert not np.array_equal(split, stratified_split(labels, 700, *fractions, seed=4))


def test_ties_do_not_all_fall_to_one_split():
    """5 cells of each of 200 types in 8 : 1 : 1: half a cell each for validation and test."""
    split = stratified_split(np.repeat(np.arange(200).astype(str), 5), 1000, 0.1, 0.1, seed=0)
    assert (split == "train").sum() == 800
    assert abs((split == "val").sum() - 100) < 40


def test_a_split_without_labels_is_random():
    split = stratified_split(None, 1000, 0.1, 0.2, seed=0)
    assert [(split == name).sum() for name in ("train", "val", "test")] == [700, 100, 200]
    middles = [np.flatnonzero(split == name).mean() for name in ("train", "val", "test")]
    assert middles == pytest.approx([500] * 3, abs=90)


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [
        (-0.1, 0.1, "--validation_fraction: -0.1 is no fraction"),
        (0.1, 1.0, "--test_fraction: 1.0 is no fraction"),
        (float("nan"), 0.1, "--validation_fraction: nan is no fraction"),
        (0.5, 0.5, "--validation_fraction, --test_fraction: 0.5 and 0.5 leave no cells to train on"),
        (0.01, 0.2, "--validation_fraction: 0.01 of 20 cells in 2 types is not one cell of any"),
        (0.2, 0.01, "--test_fraction: 0.01 of 20 cells in 2 types is not one cell of any"),
    ],
)
def test_fractions_that_make_no_split(validation, test, expected):
    assert expected in said(stratified_split, np.array(["B", "T"] * 10, dtype=object), 20, validation, test, 0)


def test_labels_of_other_cells_are_a_mistake():
    with pytest.raises(ValueError, match="3 labels for 4 cells"):
        stratified_split(np.array(["a"] * 3), 4, 0.1, 0.1, 0)


# ---- real data ------------------------------------------------------------------------------------------------------


@needs_real_data
def test_sorted_blood_cells_from_file_to_table():
    """3,874 cells of ten sorted types: genes as scanpy chooses them, and library sizes as the file has them."""
    source = open_cells(str(FACS))
    adata = anndata.read_h5ad(FACS)
    assert len(source) == adata.n_obs == 3874
    labels = check_labels(source, "cell_type", "--cell_type_column")
    split = stratified_split(labels, len(source), 0.1, 0.1, seed=0)
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    genes = choose_genes(source, train, 2000)
    assert genes == by_scanpy(adata, train, 2000, "pearson_residuals")
    table = read_table(source, test, genes, library="all")
    kept = [name in set(table.cell_ids) for name in adata.obs_names[test]]
    assert np.array_equal(table.library_sizes, adata.obs["n_counts"].to_numpy()[test][kept])
    assert np.array_equal(table.counts.toarray(), adata[test, genes].X.toarray()[kept])
    assert len(table) + len(table.skipped) == len(test)
    assert "column ensembl of adata.var has 2 of them" in said(find_genes, source, list(adata.var["ensembl"][:2]))
