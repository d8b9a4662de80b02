"""Files that are no .h5ad, columns of obs, and writing."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix

from tests.support.cells.data import changed, make, said, set_first
from tests.support.processes import ROOT
from utils.expression.data.genes import choose_genes
from utils.expression.data.h5ad import column_array, write_h5ad
from utils.expression.data.source import open_cells

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")
h5py = pytest.importorskip("h5py")
pd = pytest.importorskip("pandas")


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


@pytest.mark.parametrize("package", ["h5py", "anndata", "scanpy", "skmisc"])
def test_a_package_that_is_missing_is_named(blood, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # the import fails
    monkeypatch.delitem(sys.modules, f"{package}.loess", raising=False)

    def all_of_it():
        choose_genes(open_cells(str(blood.path)), np.arange(700), 50, "seurat_v3")

    assert f"needs the package {package}: pip install -r requirements-expression.txt" in said(all_of_it)


def test_the_packages_are_imported_where_they_are_used():
    program = "import sys, utils.expression.data.genes, utils.expression.data.table; print(sorted({'anndata', 'scanpy', 'h5py', 'pandas'} & {*sys.modules}))"
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
