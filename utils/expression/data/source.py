"""A source of cells: an .h5ad file whose counts are read by rows, some at a time, and never as a whole."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from utils.errors import UserError
from utils.expression.data.counts import RowReader, StoredMatrix, stored_matrix
from utils.expression.data.h5ad import check_file, columns_of, expression_package, names_of, opened, read_frame

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 4096
EXAMPLES = 5  # of names in a message


@dataclass(frozen=True, eq=False, repr=False)
class CellSource:
    """R cells of a file with counts of all its genes."""

    path: Path
    name: str  # for messages: the file and, where it is not X, the layer
    genes: list[str]  # no two the same
    cell_ids: np.ndarray  # (R,) of str, no two the same
    obs: dict[str, np.ndarray]  # (R,) each: text (object, None = none) or float64 (NaN = none)
    key: str  # of the counts in the file
    flag: str
    counts: RowReader

    def __len__(self) -> int:
        return len(self.cell_ids)

    def chunks(self, rows: np.ndarray, size: int = ROWS_AT_ONCE) -> Iterator[tuple[np.ndarray, csr_matrix]]:
        """Places in `rows` (B,) and the counts of all genes there (B, G), fp32, for at most `size` rows of the file at
        a time. `rows` ascend; raises ValueError if they do not.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self) or (np.diff(rows) <= 0).any()):
            raise ValueError(f"rows must ascend from 0 to at most {len(self) - 1}, none of them twice")
        for first in range(0, len(self), size):
            low, high = np.searchsorted(rows, [first, first + size])
            if low < high:
                block = self.counts.read(int(rows[low]), int(rows[high - 1]) + 1)
                yield np.arange(low, high), block[rows[low:high] - rows[low]]

    def gene_columns(self) -> dict[str, np.ndarray]:
        """All other columns of the file's table of genes, (G,) each, in the form of `obs`. Reads the file."""
        with opened(self.path, self.flag) as file:
            return columns_of(read_frame(file, var_key(self.key), self.flag), f"var of {self.name}")


def open_cells(
    path: str, counts_layer: str | None = None, flag: str = "--dataset_name", layer_flag: str = "--counts_layer"
) -> CellSource:
    """The cells of an .h5ad file, with counts from X, from a layer, or, for 'raw', from adata.raw.X. All values are
    checked. Raises UserError, which names the flags, for a file of another kind and for values that are not counts."""
    file_path = check_file(path, flag)
    with opened(file_path, flag) as file:
        frame = read_frame(file, "obs", flag)
        key = counts_key(file, counts_layer, flag, layer_flag)
        genes = names_of(read_frame(file, var_key(key), flag))
        stored = stored_matrix(file, key, flag)
    name = path if counts_layer is None else f"{path}, {counts_layer}"
    if not len(frame) or not genes:
        raise UserError(f"{flag}: {path} has {len(frame)} cells and {len(genes)} genes; give one that is not empty")
    if stored.shape != (len(frame), len(genes)):
        shape = " x ".join(map(str, stored.shape))
        raise UserError(
            f"{flag}: {key} of {path} is {shape}, but there are {len(frame)} cells and {len(genes)} genes; "
            "write the file again"
        )
    check_genes(genes, name, flag)
    check_counts(stored, layer_flag)
    cell_ids = unique_ids(names_of(frame), name)
    return CellSource(
        file_path, name, genes, cell_ids, columns_of(frame, name), key=key, flag=flag, counts=stored.by_rows()
    )


def matrices_of(file: Any) -> dict[str, str]:
    """The values that --counts_layer may have for an open file, and where each matrix lies. A layer named raw comes
    before adata.raw."""
    options = {"X": "X", "raw": "raw/X"} | {name: f"layers/{name}" for name in file.get("layers", ())}
    return {
        option: key
        for option, key in options.items()
        if key in file and str(file[key].attrs.get("encoding-type")) != "null"  # X = None
    }


def counts_key(file: Any, counts_layer: str | None, flag: str, layer_flag: str) -> str:
    """Where the counts lie in an open file. Raises UserError that lists what there is."""
    options = matrices_of(file)
    if (counts_layer or "X") in options:
        return options[counts_layer or "X"]
    there = f"it has {', '.join(options)}" if options else "it has no matrix at all"
    if counts_layer is None:
        raise UserError(f"{flag}: {file.filename} has no X; {there}: name the one with counts by {layer_flag}")
    raise UserError(
        f"{layer_flag}: {file.filename} has no layer {counts_layer}; {there} (raw is adata.raw, X needs no flag)"
    )


def var_key(key: str) -> str:
    """Where the genes of a matrix lie: adata.raw has its own, often more."""
    return "raw/var" if key == "raw/X" else "var"


def check_genes(genes: list[str], name: str, flag: str) -> None:
    """Raises UserError for duplicate gene names, and for genes without a name."""
    names, numbers = np.unique(np.array(genes, dtype=object), return_counts=True)
    if twice := [str(each) for each in names[numbers > 1]]:
        raise UserError(
            f"{flag}: {name} has {len(twice)} gene names more than once ({shortened(twice)}); make them unique: "
            "adata.var_names_make_unique(), or take identifiers: adata.var_names = adata.var[...]"
        )
    if "" in genes:
        raise UserError(f"{flag}: {name} has a gene without a name; name it in adata.var_names")


def unique_ids(names: list[str], name: str) -> np.ndarray:
    """(R,) names of cells. Repeated names get -1, -2, ... appended, with a note in the log: the same barcode in two
    samples is common and does no harm."""
    ids = np.array(names, dtype=object)
    repeated = len(ids) - len(set(names))
    if repeated:
        pandas, anndata = expression_package("pandas"), expression_package("anndata")
        ids = np.array(anndata.utils.make_index_unique(pandas.Index(ids, dtype=object)), dtype=object)
        logger.warning("%s: %d cells have the name of another; -1, -2, ... are appended to theirs", name, repeated)
    return ids


def check_counts(stored: StoredMatrix, layer_flag: str) -> None:
    """Raises UserError if the values are not counts. It says what they are, and which matrix of the file does hold
    counts."""
    fault = stored.scan().fault()
    if fault is None:
        return
    with opened(stored.path, stored.flag) as file:
        others = {option: key for option, key in matrices_of(file).items() if key != stored.key}
    sound = [option for option, key in others.items() if holds_counts(stored.path, key, stored.flag)]
    advice = "; ".join(f"X does: leave {layer_flag} out" if s == "X" else f"{layer_flag} {s} does" for s in sound)
    if not sound:
        looked_at = f" (nor do {', '.join(others)})" if others else ""
        advice = f"store the raw counts, say in adata.layers['counts'], for {layer_flag} counts{looked_at}"
    raise UserError(f"{stored.flag}: {stored.key} of {stored.path} does not hold counts: {fault}; {advice}")


def holds_counts(path: Path, key: str, flag: str) -> bool:
    """Whether another matrix of a file holds counts."""
    try:
        with opened(path, flag) as file:
            stored = stored_matrix(file, key, flag)
        return stored.scan(stop_at_fault=True).fault() is None
    except UserError:  # no matrix, or damaged: the one that was asked for is what the message is about
        return False


def shortened(names: list[str]) -> str:
    """The first few names, as text."""
    return ", ".join(names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")
