"""Sets of cells: what they hold, what is no cell, and the space of components."""

from functools import partial

import numpy as np
import pytest

from tests.support.cells.typed import control, real, relabelled
from utils.errors import UserError
from utils.expression.evaluation.judge import Classifier, train_on_synthetic_test_on_real
from utils.expression.evaluation.markers import marker_figures
from utils.expression.evaluation.metrics import (
    distance_figures,
    gene_figures,
    lisi_figure,
    memorising_figures,
    random_forest_figures,
)
from utils.expression.evaluation.real import Cells, per_type, pooled_space, principal_components


def test_log_normalised_values_and_empty_cells() -> None:
    counts = np.array([[1, 0, 3], [2, 2, 0], [0, 0, 0]], dtype=np.float32)
    cells = Cells(counts, np.array([8, 4, 0]))  # integers, and a library that has more than the chosen genes
    expected = [[np.log1p(1250), 0, np.log1p(3750)], [np.log1p(5000)] * 2 + [0], [0, 0, 0]]
    np.testing.assert_allclose(cells.log_normalised(), expected, rtol=1e-6)
    assert cells.log_normalised().dtype == np.float32
    assert cells.log_normalised() is cells.log_normalised()
    np.testing.assert_array_equal(cells.take(np.array([2, 0])).log_normalised(), cells.log_normalised()[[2, 0]])
    assert cells.take(np.array([True, False, True])).labels is None
    with pytest.raises(ValueError, match="read-only"):
        cells.log_normalised()[0, 0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": -np.ones((12, 3))}, "counts of cells are negative"),
        ({"counts": np.full((12, 3), np.nan)}, "counts of cells are negative or not finite"),
        ({"library_sizes": np.full(12, np.inf)}, "library sizes of cells are negative or not finite"),
        ({"counts": np.zeros((0, 3)), "library_sizes": np.zeros(0), "labels": None}, "at least one cell"),
        ({"counts": np.zeros((12, 0))}, "at least one cell and one gene"),
        ({"counts": np.zeros(12)}, "at least one cell and one gene"),
        ({"library_sizes": np.ones(11)}, "12 cells need one each"),
        ({"labels": np.array(["B"] * 11, dtype=object)}, "12 cells need one each"),
        ({"labels": np.array(["B"] * 11 + [np.nan], dtype=object)}, "no text"),
    ],
)
def test_what_are_no_cells_is_refused(change: dict, message: str) -> None:
    good = {"counts": np.ones((12, 3)), "library_sizes": np.ones(12), "labels": np.array(["B"] * 12, dtype=object)}
    Cells(**good)
    with pytest.raises(UserError, match=message):
        Cells(**(good | change))


PAIRS = {
    "forests": partial(random_forest_figures, seed=0),
    "distances": partial(distance_figures, seed=0),
    "genes": gene_figures,
    "lisi": lisi_figure,
    "markers": marker_figures,
    "memorising": lambda real, generated: memorising_figures(generated, real, real),
}


@pytest.mark.parametrize("name", PAIRS)
def test_sets_that_do_not_go_together_are_refused(name: str) -> None:
    fewer_genes = Cells(control().counts[:, 1:], control().library_sizes, control().labels)
    with pytest.raises(UserError, match=r"(240|239) and .*(240|239) genes"):
        PAIRS[name](real(), fewer_genes)
    with pytest.raises(UserError, match="9 cells; figures need at least 10"):
        PAIRS[name](real(), control().take(np.arange(9)))


def test_what_labels_must_be() -> None:
    none = relabelled(real(), None)
    single = relabelled(real(), np.full(len(real()), "B", dtype=object))
    for function in (lambda cells: Classifier.fit(cells, 0), lambda cells: marker_figures(real(), cells)):
        with pytest.raises(UserError, match="no labels"):
            function(none)
        with pytest.raises(UserError, match=r"single type|markers need two"):
            function(single)
    with pytest.raises(UserError, match="no labels"):
        per_type(lisi_figure, real(), none)
    with pytest.raises(UserError, match="no labels"):
        train_on_synthetic_test_on_real(real(), none, 0)
    with pytest.raises(UserError, match="3 genes, and the classifier knows 240"):
        Classifier.fit(real(), 0).accuracy(Cells(real().counts[:, :3], real().library_sizes, real().labels))


def test_pooled_components_keep_what_an_svd_keeps() -> None:
    values = np.concatenate([real().log_normalised(), control().log_normalised()]).astype(np.float64)
    left, sizes, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    expected = left[:, :50] * sizes[:50]
    found = np.concatenate(pooled_space(real(), control()))
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3 * np.abs(expected).max() ** 2)
    assert principal_components(values[:20]).n_components_ == 19
    assert principal_components(values[:, :2]).n_components_ == 2
