"""Figures of generated cells that need the types: whether they are of the type that was asked for, whether they teach
it, and whether each type's marker genes are those of the real cells.
"""

import numpy as np

from utils.errors import UserError
from utils.evaluation.figures import (
    NUM_HALVES,
    Figure,
    half_sampling_figure,
    random_halves,
    rows_at_most,
)
from utils.expression.evaluation.metrics import correlation, total_least_squares_slope
from utils.expression.evaluation.real import Cells, check_alike

MIN_OF_TYPE = 5  # cells on either side, for the markers of a type
EXPRESSED = 0.1  # share of the cells of a type, or of the others, that have the gene


# ---- markers


def matched_by_type(real: Cells, generated: Cells) -> tuple[Cells, Cells, list[str]]:
    """As many real as generated cells of each type, drawn at random where there are more, since both the overlap and
    the slope depend on the numbers; and the types that are left out because either side has fewer than 5.
    """
    of_real, of_generated = real.types(), generated.types()
    rows: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    left_out = []
    for kind in sorted(set(of_real) | set(of_generated)):
        found = [np.flatnonzero(labels == kind) for labels in (of_real, of_generated)]
        count = min(map(len, found))
        if count < MIN_OF_TYPE:
            left_out.append(str(kind))
            continue
        for chosen, mine in zip(rows, found, strict=True):
            chosen.append(mine[rows_at_most(len(mine), count).numpy()])
    if len(rows[0]) < 2:
        raise UserError(f"{len(rows[0])} types with {MIN_OF_TYPE} real and as many generated cells; markers need two")
    first, second = (cells.take(np.concatenate(part)) for cells, part in zip((real, generated), rows, strict=True))
    return first, second, left_out


def welch(values: np.ndarray, members: np.ndarray, everyone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, G) of values (n, G), members of each type (K, n) bool and those who count (n,) bool: each type's mean minus
    the mean of the rest, and Welch's t of that difference; 0 for a gene that never changes.
    """
    sides = (members & everyone, ~members & everyone)
    means, errors = [], []
    for side in sides:
        count = side.sum(axis=1, keepdims=True)
        weights = side / count
        mean = weights @ values
        variance = np.maximum(weights @ values**2 - mean**2, 0) * count / (count - 1)
        means.append(mean)
        errors.append(variance / count)
    difference, error = means[0] - means[1], np.sqrt(errors[0] + errors[1])
    return difference, difference / np.maximum(error, 1e-12)


def shares_expressed(cells: Cells, members: np.ndarray) -> np.ndarray:
    """(K, G): share of cells that have the gene, in the type (K, n) or in the rest, whichever is larger."""
    found = (cells.counts > 0).astype(np.float64)
    shares = [(side / side.sum(axis=1, keepdims=True)) @ found for side in (members, ~members)]
    return np.maximum(*shares)


def top_genes(t: np.ndarray, count: int) -> np.ndarray:
    """(K, G) bool: the `count` genes with the largest t of each type, the first ones where some are equal."""
    top = np.zeros(t.shape, dtype=bool)
    np.put_along_axis(top, np.argsort(-t, axis=1, kind="stable")[:, :count], True, axis=1)
    return top


def halves_of_types(members: np.ndarray) -> np.ndarray:
    """(30, n) bool: random halves with half the cells of each type, for the figures that need some of each."""
    halves = np.zeros((NUM_HALVES, members.shape[1]), dtype=bool)
    for seed, rows in enumerate(members):
        halves[:, rows] = random_halves(int(rows.sum()), seed=seed).numpy()
    return halves


def marker_figures(real: Cells, generated: Cells, num_markers: int = 50) -> dict[str, Figure]:
    """Marker genes of generated against real cells of each type; intervals over the draw of generated cells.
    `marker_overlap`: the share of a type's real markers, the 50 genes with the largest Welch's t against all other
    cells, that are generated markers too, averaged over types. `lfc_slope`: of generated against real log-fold changes
    (differences of mean log-normalised values, type against the rest) over all types and genes that a tenth of the
    cells have, by `total_least_squares_slope`; below 1 where types are too much alike. `lfc_correlation`: Pearson's.
    As many cells of both are taken for each type; types with fewer than 5 are left out, as the note says. Raises
    UserError without labels, for other genes, and for fewer than two types.
    """
    check_alike(real, generated)
    real, generated, left_out = matched_by_type(real, generated)
    note = f"fewer than {MIN_OF_TYPE} cells, left out: {', '.join(left_out)}" if left_out else ""
    kinds = np.array(sorted(set(real.types())), dtype=object)[:, None]
    of_real, of_generated = kinds == real.types(), kinds == generated.types()  # (K, n) each
    change, t = welch(real.log_normalised().astype(np.float64), of_real, np.ones(len(real), dtype=bool))
    num_markers = min(num_markers, t.shape[1])
    markers = top_genes(t, num_markers)
    expressed = np.maximum(shares_expressed(real, of_real), shares_expressed(generated, of_generated)) >= EXPRESSED

    values = generated.log_normalised().astype(np.float64)
    found: dict[str, list[float]] = {"marker_overlap": [], "lfc_slope": [], "lfc_correlation": []}
    for part in [np.ones(len(generated), dtype=bool), *halves_of_types(of_generated)]:
        its_change, its_t = welch(values, of_generated, part)
        found["marker_overlap"].append(
            float((markers & top_genes(its_t, num_markers)).sum(axis=1).mean()) / num_markers
        )
        found["lfc_slope"].append(total_least_squares_slope(change[expressed], its_change[expressed]))
        found["lfc_correlation"].append(correlation(change[expressed], its_change[expressed]))
    ranges = {"marker_overlap": (0, 1), "lfc_slope": (-np.inf, np.inf), "lfc_correlation": (-1, 1)}
    return {
        name: half_sampling_figure(
            value, of_halves, len(generated), note, lowest=ranges[name][0], highest=ranges[name][1]
        )
        for name, (value, *of_halves) in found.items()
    }
