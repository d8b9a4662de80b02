"""Cells of four types whose law is known, real ones, and all their figures."""

from functools import cache

import numpy as np
import pytest

from tests.support.data import DATA
from utils.evaluation.figures import Figure
from utils.expression.evaluation.markers import marker_figures
from utils.expression.evaluation.metrics import distance_figures, gene_figures, lisi_figure, random_forest_figures
from utils.expression.evaluation.real import Cells

KINDS = ("B", "CD14+", "NK", "T")
NUM_GENES, MARKERS = 240, 24  # genes, and those of them that each type has six times as much of


def shares(strength: float = 1.0) -> dict[str, np.ndarray]:
    """type -> share of each gene in its counts; `strength` 0 takes the types apart no more."""
    base = np.random.default_rng(7).lognormal(0, 1.5, NUM_GENES)
    found = {}
    for i, kind in enumerate(KINDS):
        raised = base.copy()
        raised[i * MARKERS : (i + 1) * MARKERS] *= 6**strength
        found[kind] = raised / raised.sum()
    return found


def draw(seed: int, of_each: int = 60, strength: float = 1.0, noise: bool = True) -> Cells:
    """Cells of every type: negative binomial counts, or their means rounded where there is no `noise`."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.array(KINDS, dtype=object), of_each)
    depths = generator.lognormal(6, 0.3, len(labels))
    means = np.stack([shares(strength)[kind] for kind in labels]) * depths[:, None]
    counts = generator.poisson(means * generator.gamma(2.0, 0.5, means.shape)) if noise else np.round(means)
    counts = counts.astype(np.float32)
    return Cells(counts, counts.sum(axis=1), labels)


@cache
def real() -> Cells:
    return draw(0)


@cache
def control() -> Cells:
    return draw(1)


@cache
def pbmc() -> tuple[Cells, Cells, Cells]:
    """Training, held-out and control cells: a fifth held out at random, the control drawn from the training cells with
    the held-out ones' types; 2,000 genes whose variance is large for their mean, chosen on the training cells."""
    path = DATA / "cells" / "pbmc_facs.h5ad"
    if not path.exists():
        pytest.skip(f"no {path}")
    table = pytest.importorskip("anndata").read_h5ad(path)
    generator = np.random.default_rng(0)
    labels = table.obs["cell_type"].astype(str).to_numpy(dtype=object)
    order = generator.permutation(len(labels))
    test, train = np.split(order, [len(order) // 5])
    among, means = table.X[train], np.asarray(table.X[train].mean(axis=0)).ravel()
    variances = np.asarray(among.multiply(among).mean(axis=0)).ravel() - means**2
    genes = np.argsort(-variances / (means + means**2 / 100 + 1e-3))[:2000]
    library_sizes = np.asarray(table.X.sum(axis=1)).ravel()
    cells = Cells(table.X[:, genes].toarray(), library_sizes, labels)
    chosen = [
        generator.choice(train[labels[train] == kind], (labels[test] == kind).sum(), replace=False)
        for kind in sorted(set(labels))
    ]
    return cells.take(train), cells.take(test), cells.take(np.concatenate(chosen))


def relabelled(cells: Cells, labels: np.ndarray) -> Cells:
    return Cells(cells.counts, cells.library_sizes, labels)


def all_figures(of_real: Cells, generated: Cells) -> dict[str, Figure]:
    """Those of two sets, each function once."""
    return (
        random_forest_figures(of_real, generated, 0)
        | distance_figures(of_real, generated, 0)
        | gene_figures(of_real, generated)
        | lisi_figure(of_real, generated)
        | marker_figures(of_real, generated)
    )


@cache
def control_figures() -> dict[str, Figure]:
    return all_figures(real(), control())
