"""Cells that are judged: read as they are, or asked of a run for what test cells are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from utils.errors import UserError
from utils.evaluation.figures import rows_at_most
from utils.evaluation.regressors import number_names
from utils.expression.data.source import open_cells, shortened
from utils.expression.data.table import CellTable, text_labels
from utils.expression.evaluation.real import MIN_CELLS, Cells, Real, cells_of
from utils.expression.files import CELLS_FILE
from utils.latents.columns import category_name
from utils.runs.requests import Columns

SAMPLES, CONTROL, CEILING = "samples", "control: real cells", "ceiling: reconstructions"
GAUSSIAN, BINOMIALS, PRIOR = "null: Gaussian", "null: negative binomials", "null: prior"
MADE = ("library_size", "n_counts", "seed")  # columns of sample.py that say how a cell was made, not what was asked
Requests = Sequence[Mapping[str, Any]]


@dataclass
class SampleSet:
    """Cells that are judged together, and what each of them was asked to be."""

    name: str
    kind: str  # one of the six above
    cells: Cells
    asked: dict[str, np.ndarray] = field(default_factory=dict)  # numbers (n,) of those that are told, NaN = none
    held_out: Cells | None = None  # real cells that are told in place of `cells`, which are known

    @property
    def told(self) -> Cells:
        """The cells whose type or number a classifier or regressor tells, which was fitted to the training cells."""
        return self.cells if self.held_out is None else self.held_out


# ---- samples that are there


def read_given(path: str, layer: str | None, num_samples: int | None) -> CellTable:
    """The cells of --samples, none left out. Raises UserError for what is no file of counts, and for too few."""
    file = Path(path)
    if file.is_dir():
        file = file / CELLS_FILE
        if not file.is_file():
            raise UserError(f"--samples: {path} has no {CELLS_FILE}; give a folder of sample.py, or an .h5ad file")
    source = open_cells(str(file), layer, "--samples", "--samples_layer")
    rows = rows_at_most(len(source), num_samples or len(source)).numpy()
    if len(rows) < MIN_CELLS:
        raise UserError(f"--samples: {len(rows)} cells; figures need at least {MIN_CELLS}: give more")
    counts = csr_matrix(vstack([block for _, block in source.chunks(rows)]))
    sums = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    obs = {name: values[rows] for name, values in source.obs.items()}
    return CellTable(counts, sums, source.genes, source.cell_ids[rows], obs)


def text_columns_of(given: CellTable) -> list[str]:
    """The columns of samples that may name their type."""
    return [name for name, values in given.obs.items() if values.dtype == object]


def given_requests(given: CellTable, real: Real) -> list[dict[str, Any]]:
    """What the samples of --samples say that they are, of what is known of real cells too: a type and numbers. Raises
    UserError for types that are missing, or that no test cell has.
    """
    columns: dict[str, np.ndarray] = {}
    column = real.label_column
    if column is not None and column in given.obs:
        labels = columns[column] = text_labels(given.obs[column], column, "--samples")
        if without := sum(label is None or not label.strip() for label in labels):
            raise UserError(f"--samples: {without} of {len(labels)} cells have no {column}; name the type of each")
        known = set(real.labels_of(real.test))  # type: ignore[arg-type]
        if not set(labels) & known:
            raise UserError(
                f"--samples: no {column} of theirs ({shortened(sorted(set(labels)))}) is one of the test cells "
                f"({shortened(sorted(known))}); rename one of the two, or give another --label_column"
            )
    for name, values in given.obs.items():
        is_asked = name != column and (name not in MADE or f"generated_{name}" in given.obs)
        if is_asked and all(is_number(each, name) for each in (given, real.test, real.training)):
            columns[name] = values
    return [{name: values[i] for name, values in columns.items()} for i in range(len(given))]


def known_by_columns(requests: Requests, real: Real) -> list[dict[str, Any]]:
    """What the training cells are (R,), in the columns in which samples say what they are."""
    if real.training is None:
        return []
    columns = {name: real.training.obs[name] for name in dict.fromkeys(name for each in requests for name in each)}
    if real.label_column in columns:
        columns[real.label_column] = real.labels_of(real.training)  # type: ignore[assignment]
    return [{name: values[i] for name, values in columns.items()} for i in range(len(real.training))]


def is_number(table: CellTable | None, name: str) -> bool:
    """Whether a table has a column of numbers that differ."""
    if table is None or name not in table.obs or table.obs[name].dtype == object:
        return False
    known = table.obs[name][np.isfinite(table.obs[name])]
    return len(known) > 1 and bool(np.ptp(known) > 0)


# ---- what a run is asked for


def label_column_of(columns: Columns, given: str | None) -> str | None:
    """By which types cells are judged: as --label_column says, or by the one class that a run is conditioned on; None
    where there is none. Raises UserError where there are several.
    """
    classes = [name for name, settings in columns.items() if settings["kind"] == "class"]
    if given is None and len(classes) > 1:
        raise UserError(f"--label_column: the run has the classes {', '.join(classes)}; name the one to judge by")
    return given or (classes[0] if classes else None)


def requests_of(columns: Columns, table: CellTable, flag: str) -> list[dict[str, Any]]:
    """What each cell (R,) is, of all that a run is conditioned on and that is known of it. Raises UserError for a
    column that is not there or of another kind, and for categories that the run never saw.
    """
    requests: list[dict[str, Any]] = [{} for _ in range(len(table))]
    for name, settings in columns.items():
        if name not in table.obs:
            there = ", ".join(table.obs) or "none"
            raise UserError(f"{flag}: the run is conditioned on {name}, which adata.obs has not; there are {there}")
        column: Any = table.obs[name]
        if settings["kind"] == "class":
            column = [category_name(value) for value in column]
            if strange := sorted({value for value in column if value is not None} - set(settings["names"])):
                raise UserError(
                    f"{flag}: the run never saw the {name} {shortened(strange)}; it knows "
                    f"{shortened(settings['names'])}; take those cells out, or rename them as the run does"
                )
        elif column.dtype == object:
            raise UserError(f"{flag}: {name} holds text, and the run is conditioned on numbers; give numbers")
        for request, value in zip(requests, column, strict=True):
            request |= {} if is_missing(value) else {name: value}
    return requests


def is_missing(value: Any) -> bool:
    """Whether nothing is known: None, or a number that is not finite."""
    return value is None or (isinstance(value, float) and not np.isfinite(value))


def asked_numbers(requests: Requests, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The numbers (n,) that were asked for, NaN where nothing was."""
    return {name: np.array([each.get(name, np.nan) for each in requests], dtype=np.float64) for name in names}


def asked_labels(requests: Requests, label_column: str | None) -> np.ndarray | None:
    """The types (n,) that were asked for; None where not every cell was asked for one."""
    labels = [each.get(label_column or "") for each in requests]
    return np.array(labels, dtype=object) if all(isinstance(label, str) for label in labels) else None


def draw_rows(total: int, count: int, seed: int) -> np.ndarray:
    """`count` of `total` rows at random, in order: each of them as often as any other, to within one."""
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(total) for _ in range(-(-count // total))]
    return np.sort(np.concatenate(rounds)[:count])


def sampled_set(name: str, counts: np.ndarray, requests: Requests, label_column: str | None) -> SampleSet:
    """Samples (n, G) with what they were asked to be."""
    labels = asked_labels(requests, label_column)
    return SampleSet(name, SAMPLES, cells_of(counts, labels), asked_numbers(requests, number_names(requests)))
