"""Small cells in memory and in files of every layout."""

import logging
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix, issparse

from tests.support.data import DATA
from utils.errors import UserError
from utils.expression.data.source import open_cells

FACS = DATA / "cells" / "pbmc_facs.h5ad"
needs_real_data = pytest.mark.skipif(not FACS.is_file(), reason="real data is not here")
LOGGED = logging.getLogger("utils").name


def counts(cells: int = 30, genes: int = 12, seed: int = 0) -> np.ndarray:
    """Small counts, many of them zero, at least one in each row."""
    drawn = np.random.default_rng(seed).poisson(0.7, (cells, genes)).astype(np.float32)
    drawn[:, 0] += 1
    return drawn


def make(values=None, names=None, ids=None, **columns):
    """An AnnData with X (30 cells of 12 genes, unless given) and columns of obs."""
    values = csr_matrix(counts()) if values is None else values
    adata = pytest.importorskip("anndata").AnnData(values)
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


def with_layers():
    """X is log-normalised; counts are in a layer, and in raw, which has more genes."""
    full = make(csr_matrix(counts()))
    adata = full[:, :8].copy()
    adata.layers["counts"] = adata.X.copy()
    sc = pytest.importorskip("scanpy")
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata.layers["scaled"] = adata.X.toarray() - 1
    adata.raw = full
    return adata


def changed(folder: Path, change, matrix=csr_matrix) -> str:
    """What is said of a file after a change to it, when it is opened or read."""
    make(matrix(counts())).write_h5ad(folder / "cells.h5ad")
    with pytest.importorskip("h5py").File(folder / "cells.h5ad", "r+") as file:
        change(file)
    return said(lambda: whole(open_cells(str(folder / "cells.h5ad"))))


def set_first(name: str, value: int, place: int = 0):
    def change(file):
        file["X"][name][place] = value

    return change


def by_scanpy(adata, rows, num_genes: int, flavor: str, min_cells: int = 3) -> list[str]:
    """What scanpy chooses, in memory."""
    subset = adata[rows].copy()
    sc = pytest.importorskip("scanpy")
    sc.pp.filter_genes(subset, min_cells=min_cells)
    package = sc.experimental.pp if flavor == "pearson_residuals" else sc.pp
    package.highly_variable_genes(subset, flavor=flavor, n_top_genes=num_genes)
    return list(subset.var_names[subset.var["highly_variable"]])


GENES = ["G3", "G1", "G2"]
