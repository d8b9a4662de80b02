"""Cells that every installation has: the 700 that scanpy brings along, with their counts recovered."""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from utils.expression.data.h5ad import write_h5ad

DECIMALS = 3  # of the logarithms in scanpy's file


def recovered_counts(adata) -> np.ndarray:
    """(700, 765) float64, whole numbers but for rounding, of `scanpy.datasets.pbmc68k_reduced()`: its raw.X is
    log(1 + 10,000 counts / n_counts)."""
    return np.expm1(adata.raw.X.toarray().astype(np.float64)) * adata.obs["n_counts"].to_numpy()[:, None] / 1e4


def pbmc68k():
    """An AnnData of 700 blood cells: X counts (700, 765), obs cell_type (10 types, the rarest with 8 cells) and
    percent_mito (a number)."""
    import anndata
    import scanpy

    original = scanpy.datasets.pbmc68k_reduced()
    adata = anndata.AnnData(csr_matrix(np.rint(recovered_counts(original)).astype(np.float32)))
    adata.obs_names = list(original.obs_names)
    adata.var_names = list(original.raw.var_names)
    adata.obs["cell_type"] = original.obs["bulk_labels"].astype(str).astype("category").to_numpy()
    adata.obs["percent_mito"] = original.obs["percent_mito"].to_numpy()
    return adata


def write_pbmc68k(path: Path):
    """Writes it to an .h5ad file, and returns it."""
    adata = pbmc68k()
    write_h5ad(adata, path)
    return adata
