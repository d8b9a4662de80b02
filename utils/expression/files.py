"""Cells that were made, as an .h5ad file that scanpy opens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from utils.expression.data.h5ad import expression_package, write_h5ad
from utils.files import remove_unfinished

CELLS_FILE = "cells.h5ad"
PROVENANCE = "latent_diffusion"  # in uns


def save_cells(
    output_dir: Path,
    counts: np.ndarray,
    library_sizes: np.ndarray,
    genes: Sequence[str],
    requests: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    seed: int,
) -> None:
    """Writes `cells.h5ad`: counts (n, G) in X, what each cell was asked to be in obs (missing where nothing was), and
    how they were made in uns. What else is in obs gives way to a condition of its name.
    """
    anndata, pandas = expression_package("anndata"), expression_package("pandas")
    obs: dict[str, Any] = {}
    for name in sorted({name for request in requests for name in request}):
        values = [request.get(name) for request in requests]
        is_text = any(isinstance(value, str) for value in values)
        obs[name] = pandas.Categorical(values) if is_text else np.array([np.nan if v is None else v for v in values])
    made = {"library_size": library_sizes, "n_counts": counts.sum(axis=1), "seed": seed + np.arange(len(counts))}
    obs |= {f"generated_{name}" if name in obs else name: values for name, values in made.items()}
    names = [f"generated-{i:06d}" for i in range(len(counts))]
    adata = anndata.AnnData(
        X=csr_matrix(counts),
        obs=pandas.DataFrame(obs, index=names),
        var=pandas.DataFrame(index=list(genes)),
        uns={PROVENANCE: {name: plain(value) for name, value in settings.items()} | {"seed": seed}},
    )
    remove_unfinished(output_dir)
    write_h5ad(adata, output_dir / CELLS_FILE)


def plain(value: Any) -> Any:
    """A setting as the format takes it: text, numbers, truth, or text of anything else."""
    return value if isinstance(value, str | int | float | bool) else str(value)
