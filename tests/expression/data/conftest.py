"""The 700 cells in a file, a few cells with labels, and a log that keeps everything."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.support.cells.data import LOGGED, counts, make, opened
from tests.support.cells.pbmc import write_pbmc68k


@pytest.fixture(autouse=True)
def _all_is_logged(caplog):
    caplog.set_level(logging.INFO, logger=LOGGED)


@pytest.fixture(scope="session")
def blood(tmp_path_factory):
    """The 700 cells in memory, and in a file."""
    path = tmp_path_factory.mktemp("cells") / "pbmc68k.h5ad"
    return SimpleNamespace(adata=write_pbmc68k(path), path=path)


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
