"""The genes that are modelled: highly variable ones of the training split, or those of a trained model in a new
source."""

import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from utils.errors import UserError
from utils.expression.data.h5ad import expression_package
from utils.expression.data.source import CellSource, shortened

logger = logging.getLogger(__name__)
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?")  # ENSG00000139618.15, ENSMUSG00000041147


def pearson_residuals(adata: Any, num_genes: int) -> None:
    """Variance of analytic Pearson residuals (Lause, Berens and Kobak 2021)."""
    function = expression_package("scanpy").experimental.pp.highly_variable_genes
    function(adata, flavor="pearson_residuals", n_top_genes=num_genes)


def seurat_v3(adata: Any, num_genes: int) -> None:
    """Variance after a fit of its trend (Stuart et al. 2019)."""
    expression_package("skmisc.loess")
    expression_package("scanpy").pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=num_genes)


FLAVORS: dict[str, Callable[[Any, int], None]] = {"pearson_residuals": pearson_residuals, "seurat_v3": seurat_v3}


def choose_genes(
    source: CellSource,
    rows: np.ndarray,
    num_genes: int,
    flavor: str = "pearson_residuals",
    min_cells: int = 3,
    max_cells: int = 50_000,
    seed: int = 0,
) -> list[str]:
    """The `num_genes` most variable genes, by scanpy, among those with counts in at least `min_cells` of the rows
    (ascending), in the order of the source; all of them if there are no more. `rows` must be the training split: no
    other cell is read. More than `max_cells` rows are replaced by a random subset. Raises UserError if no genes are
    left or scanpy fails."""
    if num_genes < 1:
        raise UserError(f"--num_genes: {num_genes} is too few; give at least 1")
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) > max_cells:
        logger.info("genes are chosen by a random %d of %d cells", max_cells, len(rows))
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
    counts = vstack([csr_matrix((0, len(source.genes)), dtype=np.float32), *(each for _, each in source.chunks(rows))])
    adata = expression_package("anndata").AnnData(counts.tocsr())
    adata.var_names = source.genes
    scanpy = expression_package("scanpy")
    scanpy.pp.filter_genes(adata, min_cells=min_cells)
    if adata.n_vars <= num_genes:
        if not adata.n_vars:
            raise UserError(
                f"--num_genes: no gene of {source.name} has counts in at least {min_cells} of {len(rows)} cells; "
                "give more cells"
            )
        logger.info("all %d genes with counts in at least %d cells are taken", adata.n_vars, min_cells)
        return [str(name) for name in adata.var_names]
    scanpy.pp.filter_cells(adata, min_counts=1)  # scanpy would divide by their sum
    try:
        FLAVORS[flavor](adata, num_genes)
    except ValueError as error:  # of the fit in seurat_v3, where too few genes or cells are alike
        reason = " ".join(str(error).split())
        others = ", ".join(name for name in FLAVORS if name != flavor)
        raise UserError(
            f"{source.flag}: {flavor} cannot choose among {adata.n_vars} genes of {adata.n_obs} cells of "
            f"{source.name}: {reason}; take another one ({others}), or all genes by a larger --num_genes"
        ) from error
    return [str(name) for name in adata.var_names[adata.var["highly_variable"].to_numpy()]]


def find_genes(source: CellSource, genes: list[str]) -> np.ndarray:
    """(G,) columns of the source that hold `genes`, by name. Raises UserError, with a guess at the reason, if some are
    missing."""
    columns = {name: column for column, name in enumerate(source.genes)}
    if missing := [name for name in genes if name not in columns]:
        hint = other_case(missing, source) or other_identifier(missing, source)
        raise UserError(
            f"{source.flag}: {len(missing)} of {len(genes)} genes are not in {source.name} ({shortened(missing)}), "
            f"which has {len(source.genes)} ({shortened(source.genes)}); "
            + (hint or "give a file with all genes that the model was trained on, with zeros where nothing is known")
        )
    return np.array([columns[name] for name in genes], dtype=np.int64)


def other_case(missing: list[str], source: CellSource) -> str | None:
    """A hint for names that differ in case, as those of mouse (Cd3e) and man (CD3E) do."""
    there = {name.upper(): name for name in source.genes}
    found = [(name, there[name.upper()]) for name in missing if name.upper() in there]
    if not found:
        return None
    return (
        f"{len(found)} of them are there in another case ({found[0][1]} for {found[0][0]}): cells of another species? "
        "If not, rename them in adata.var_names"
    )


def other_identifier(missing: list[str], source: CellSource) -> str | None:
    """A hint for names of another kind: Ensembl's, with or without a version, against symbols."""
    wanted, there = set(missing), set(source.genes)
    for name, values in source.gene_columns().items():
        if found := len(wanted & set(values)):
            return (
                f"column {name} of adata.var has {found} of them: adata.var_names = adata.var['{name}'], then write "
                "the file again"
            )
    if found := len({name.partition(".")[0] for name in wanted} & {name.partition(".")[0] for name in there}):
        return f"{found} of them differ in the version after the dot only: rename them in adata.var_names"
    wanted_kind, kind = kind_of(missing), kind_of(source.genes)
    if wanted_kind != kind:
        return f"wanted are {wanted_kind}, and the file has {kind}: translate adata.var_names"
    return None


def kind_of(names: list[str]) -> str:
    """The kind of most of some gene names."""
    matches = sum(ENSEMBL.fullmatch(name) is not None for name in names)
    return "Ensembl identifiers" if 2 * matches > len(names) else "gene symbols"
