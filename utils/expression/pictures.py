"""Pictures of cells: points in two dimensions, side by side."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError
from utils.evaluation.figures import rows_at_most
from utils.expression.data.h5ad import expression_package
from utils.expression.evaluation.markers import MIN_OF_TYPE, welch
from utils.expression.evaluation.real import Cells, principal_components

SIDE, MARGIN, RADIUS = 420, 24, 2
# Twelve colours that can be told apart (Paul Tol's muted and bright), then they begin again.
COLOURS = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77"),
    *("#cc6677", "#882255", "#aa4499", "#4477aa", "#ee6677", "#bbbbbb"),
)


def scatter_grid(panels: Sequence[tuple[str, np.ndarray, np.ndarray | None]]) -> Image.Image:
    """Panels of a title, points (n, 2) and their labels (n,), or None, on the same axes, with a legend."""
    everything = np.concatenate([points for _, points, _ in panels])
    low, high = np.quantile(everything, [0.002, 0.998], axis=0)
    names = sorted({str(label) for _, _, labels in panels if labels is not None for label in labels})
    legend = 14 * len(names) + MARGIN if names else 0
    canvas = Image.new("RGB", (len(panels) * SIDE, SIDE + MARGIN + legend), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for i, (title, points, labels) in enumerate(panels):
        draw.text((i * SIDE + MARGIN, 6), f"{title} (n = {len(points)})", fill="black", font=font)
        placed = (points - low) / np.maximum(high - low, 1e-9) * (SIDE - 2 * MARGIN) + MARGIN
        inside = np.isfinite(placed).all(axis=1) & (placed > 0).all(axis=1) & (placed < SIDE).all(axis=1)
        for row in np.random.default_rng(0).permutation(np.flatnonzero(inside)):  # no type lies above all others
            x, y = placed[row, 0] + i * SIDE, SIDE - placed[row, 1] + MARGIN
            colour = COLOURS[names.index(str(labels[row])) % len(COLOURS)] if labels is not None else "#4477aa"
            draw.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), fill=colour)
    for i, name in enumerate(names):
        y = SIDE + MARGIN + 14 * i
        draw.rectangle((MARGIN, y + 3, MARGIN + 8, y + 11), fill=COLOURS[i % len(COLOURS)])
        draw.text((MARGIN + 14, y), name, fill="black", font=font)
    return canvas


def principal_plane(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and first two principal axes (2, D) of values (n, D)."""
    mean = values.mean(axis=0)
    centred = values - mean
    return mean, np.linalg.eigh(centred.T @ centred)[1].T[:-3:-1]  # ascending; there are D of them, however few values


MAX_SHOWN = 2_000  # cells in a panel
MARKERS_SHOWN = 3  # of each type
CELL, FONT = 20, 12  # pixels
DARKEST = np.array([8, 48, 107])  # of white to blue


# ---- UMAP


def check_umap() -> None:
    """Raises UserError where there is no umap-learn, without the time that it takes to load it."""
    if find_spec("umap") is None:
        raise UserError("--umap needs umap-learn: pip install -r requirements-expression.txt; or give --no-umap")


def umap_points(sets: Sequence[Cells]) -> list[np.ndarray]:
    """(n, 2) of each: a UMAP that is fitted to all together, in 50 principal components of all. Cells that it was not
    fitted to would lie in rings around the others, as if they were worse.
    """
    values = np.concatenate([cells.log_normalised() for cells in sets])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numba, and of threads that a fixed seed leaves unused
        umap = expression_package("umap").UMAP(random_state=0, n_jobs=1)
        points = umap.fit_transform(principal_components(values).transform(values))
    return np.split(points, np.cumsum([len(cells) for cells in sets])[:-1])


def shown(cells: Cells) -> Cells:
    """At most 2,000 of them, drawn at random."""
    return cells.take(rows_at_most(len(cells), MAX_SHOWN).numpy())


# ---- markers


def marker_columns(cells: Cells, kinds: Sequence[str]) -> list[int]:
    """The genes with the largest Welch's t of each type against the rest, three of each, none twice."""
    members = np.array([cells.types() == kind for kind in kinds])
    _, t = welch(cells.log_normalised().astype(np.float64), members, np.ones(len(cells), dtype=bool))
    chosen: list[int] = []
    for of_kind in t:
        ranked = [int(gene) for gene in np.argsort(-of_kind, kind="stable") if int(gene) not in chosen]
        chosen += ranked[:MARKERS_SHOWN]
    return chosen


def dots_of(cells: Cells, labels: np.ndarray, kinds: Sequence[str], columns: Sequence[int]) -> np.ndarray:
    """(2, K, M): of each type and gene the share of cells that have it, and the mean log-normalised value; 0 for a
    type without cells.
    """
    found = np.zeros((2, len(kinds), len(columns)))
    for row, kind in enumerate(kinds):
        mine = labels == kind
        if mine.any():
            found[0, row] = (cells.counts[mine][:, columns] > 0).mean(axis=0)
            found[1, row] = cells.log_normalised()[mine][:, columns].mean(axis=0)
    return found


def marker_plot(
    real: Cells, generated: Cells, labels: np.ndarray, genes: Sequence[str], titles: Sequence[str]
) -> Image.Image | None:
    """Types of real cells by their markers, beside the same of generated cells of the types `labels` (n,): the size of
    a dot is the share of cells that have the gene, its colour the mean, from none to the largest of the gene in either
    panel. None for fewer than two types that have 5 real cells.
    """
    kinds = [str(kind) for kind in sorted(set(real.types())) if (real.types() == kind).sum() >= MIN_OF_TYPE]
    if len(kinds) < 2:
        return None
    columns = marker_columns(real, kinds)
    dots = [dots_of(cells, of, kinds, columns) for cells, of in ((real, real.types()), (generated, labels))]
    largest = np.maximum(np.max([each[1] for each in dots], axis=(0, 1)), 1e-12)  # (M,)
    font = ImageFont.load_default(FONT)
    names = [genes[column] for column in columns]
    left = int(max(font.getlength(kind) for kind in kinds)) + 16
    top = int(max(font.getlength(name) for name in names)) + 36
    width = len(columns) * CELL + CELL
    canvas = Image.new("RGB", (left + 2 * width, top + len(kinds) * CELL + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for row, kind in enumerate(kinds):
        draw.text((left - 8, top + (row + 0.5) * CELL), kind, fill="black", font=font, anchor="rm")
    for panel, (title, (shares, means)) in enumerate(zip(titles, dots, strict=True)):
        start = left + panel * width
        draw.text((start, 4), title, fill="black", font=font)
        for column, name in enumerate(names):
            canvas.paste(upright(name, font, top - 30), (start + column * CELL + 2, 24))
        for row, column in np.ndindex(shares.shape):
            radius = 0.45 * CELL * shares[row, column] ** 0.5  # the area is the share
            x, y = start + (column + 0.5) * CELL, top + (row + 0.5) * CELL
            colour = 255 + (DARKEST - 255) * means[row, column] / largest[column]
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=tuple(int(c) for c in colour), outline="#888888")
    return canvas


def upright(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, length: int) -> Image.Image:
    """A line of text that runs upwards and ends at the bottom of a column of `length` pixels."""
    line = Image.new("RGB", (length, CELL - 4), "white")
    ImageDraw.Draw(line).text((0, (CELL - 4) / 2), text, fill="black", font=font, anchor="lm")
    return line.rotate(90, expand=True)
