"""Pictures of cells: points in two dimensions, side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
