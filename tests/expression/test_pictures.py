"""Pictures of cells: odd points, principal axes, and the dots of markers."""

import numpy as np
import pytest

from tests.support.cells.models import normals
from utils.expression.evaluation.real import Cells
from utils.expression.pictures import dots_of, marker_columns, marker_plot, principal_plane, scatter_grid


def coloured(picture) -> float:
    return (np.asarray(picture) != 255).any(axis=2).mean()


def test_pictures_of_odd_points():
    """One label, none, more than there are colours, a single cell, cells that all lie in one place or are not finite."""
    points = normals(50, 2).numpy()
    blank = coloured(scatter_grid([("none", np.full((50, 2), 1e9), None), ("none", points + 1e10, None)]))
    for labels in (None, np.array(["B cell"] * 50), np.array([f"type {i}" for i in range(50)])):
        picture = scatter_grid([("real", points, labels), ("samples", -points, labels)])
        assert picture.size[0] == 2 * scatter_grid([("real", points, labels)]).size[0]
        assert coloured(picture) > blank
    broken = points.copy()
    broken[::2] = np.nan
    broken[1] = np.inf
    assert coloured(scatter_grid([("real", points, None), ("samples", broken, None)])) > blank
    scatter_grid([("one", points[:1], np.array(["B"])), ("same", np.zeros((4, 2)), np.array(["B"] * 4))])


def test_principal_axes():
    values = normals(300, 5).numpy() @ np.diag([0.1, 3, 0.2, 2, 0.3]) + 7
    mean, axes = principal_plane(values)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    assert np.abs(axes @ axes.T - np.eye(2)).max() < 1e-5
    vectors = np.linalg.eigh(np.cov(values.T))[1]
    np.testing.assert_allclose(np.abs(axes), np.abs(vectors.T[[4, 3]]), atol=1e-4)
    assert principal_plane(values[:1])[1].shape == (2, 5)  # of a single cell too


def test_dots_of_markers():
    counts = np.array([[4, 0, 1], [0, 0, 1], [0, 3, 1], [0, 5, 1]], dtype=np.float32)
    labels = np.array(["A", "A", "B", "B"], dtype=object)
    cells = Cells(counts, counts.sum(axis=1), labels)
    shares, means = dots_of(cells, labels, ["A", "B", "C"], [0, 1])
    assert shares.tolist() == [[0.5, 0], [0, 1], [0, 0]]
    assert means[0, 0] == pytest.approx(np.log1p(8000) / 2)
    many = Cells(np.tile(counts, (5, 1)), np.tile(counts.sum(axis=1), 5), np.tile(labels, 5))
    assert marker_columns(many, ["A", "B"])[0] == 0
    assert set(marker_columns(many, ["A", "B"])) == {0, 1, 2}  # none twice
    picture = marker_plot(many, many, many.types(), ["a", "b", "c"], ("real", "samples"))
    assert np.asarray(picture).min() < 100
    assert marker_plot(cells, cells, labels, ["a", "b", "c"], ("real", "samples")) is None  # two cells of each
