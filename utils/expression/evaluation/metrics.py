"""Figures of generated cells against real ones: whether they can be told apart, how far apart they lie, what their
genes do, how well they mix, and whether they copy training cells. None of them needs labels.

Most of them are not 0 or 1 for real cells: read them beside a control, other real cells in the same number.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from utils.errors import UserError
from utils.evaluation.figures import CONFIDENCE, Figure, half_sampling_figure, mean_figure, random_halves
from utils.evaluation.neighbours import MIN_HELD_OUT, copy_figures, nearest
from utils.expression.evaluation.real import Cells, check_alike, equal_numbers, pooled_space, principal_components

MAX_JUDGED = 2_000  # of each set, drawn at random: by forests and for the mixing
MAX_PAIRED = 1_000  # of each set, for the distances: the optimal assignment takes the cube of it
NUM_FOLDS, NUM_TREES = 5, 100
BANDWIDTHS = (0.5, 1.0, 2.0)  # of the kernels, in median distances
PERPLEXITY = 30  # of the neighbourhoods of LISI
DELONG = "DeLong"


def halves_of_both(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of a random half of the real and of the generated cells, `count` each: for figures that want equal numbers
    of both. Their intervals are over the draw of both.
    """
    for pair in zip(random_halves(count, seed=0).numpy(), random_halves(count, seed=1).numpy(), strict=True):
        yield np.flatnonzero(pair[0]), np.flatnonzero(pair[1])


# ---- told apart


def placements(of_generated: np.ndarray, of_real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each generated score (n,) the share of the real ones (m,) below it, of each real one the share of the
    generated ones above it; ties count half. The mean of either is the area under the ROC curve.
    """
    above = (of_generated[:, None] > of_real) + 0.5 * (of_generated[:, None] == of_real)
    return above.mean(axis=1), above.mean(axis=0)


def auc_figure(of_generated: np.ndarray, of_real: np.ndarray, note: str = "") -> Figure:
    """Area under the ROC curve from the placements (n,) and (m,), with the interval over the draw of both. Source:
    DeLong, DeLong and Clarke-Pearson 1988, "Comparing the areas under two or more correlated ROC curves".
    """
    from scipy.stats import norm

    value = float(of_generated.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (of_generated, of_real))
    reach = float(norm.ppf((1 + CONFIDENCE) / 2)) * variance**0.5
    return Figure(value, max(value - reach, 0.0), min(value + reach, 1.0), len(of_generated), DELONG, note=note)


def forest_figure(of_real: np.ndarray, of_generated: np.ndarray, seed: int) -> Figure:
    """How well a random forest tells rows (n, D) from rows (n, D): the AUC of cross-validation, in which no row is
    judged by a forest that saw it. Scores are compared within a fold, whose forest made them all.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold

    features = np.concatenate([of_real, of_generated])
    is_generated = np.arange(len(features)) >= len(of_real)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for seen, judged in StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(features, is_generated):
        forest = RandomForestClassifier(NUM_TREES, random_state=seed).fit(features[seen], is_generated[seen])
        scores, truth = forest.predict_proba(features[judged])[:, 1], is_generated[judged]
        found.append(placements(scores[truth], scores[~truth]))
    generated, real = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return auc_figure(generated, real, f"against {len(of_real)}")


def random_forest_figures(real: Cells, generated: Cells, seed: int) -> dict[str, Figure]:
    """AUC in [0, 1] with which random forests tell real from generated cells, on genes (`rf_auc`) and on principal
    components of both together (`rf_auc_pca50`): 0.5 where they cannot be told apart, 1 where every cell can. It falls
    below 0.5 by chance, and where each cell has a twin in the other set, a reconstruction say. As many of both are
    taken, at most 2,000. Raises UserError for other genes or fewer than 10 cells. Source of two-sample tests by
    classifiers: Lopez-Paz and Oquab 2017, arXiv 1610.06545.
    """
    real, generated = equal_numbers(real, generated, MAX_JUDGED, seed)
    return {
        "rf_auc": forest_figure(real.log_normalised(), generated.log_normalised(), seed),
        "rf_auc_pca50": forest_figure(*pooled_space(real, generated), seed),
    }


# ---- distances


def wasserstein_2(squared: np.ndarray) -> float:
    """Wasserstein-2 distance of two sets of n points, from their squared distances (n, n)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(squared)
    return float(squared[rows, columns].mean()) ** 0.5


def mmd_squared(real: np.ndarray, generated: np.ndarray, between: np.ndarray) -> float:
    """Unbiased estimate of MMD^2, from kernels among real (n, n), among generated (m, m) and between them (n, m).
    About 0 where the two are alike, and below it by chance. Source: Gretton et al. 2012, JMLR 13, equation 3.
    """
    within = sum((part.sum() - np.trace(part)) / (len(part) * (len(part) - 1)) for part in (real, generated))
    return float(within - 2 * between.mean())


def rbf_kernel(squared: np.ndarray, median_squared: float) -> np.ndarray:
    """Mean of Gaussian kernels whose bandwidths are 0.5, 1 and 2 median distances."""
    exponents = [-squared / (2 * width**2 * median_squared) for width in BANDWIDTHS]
    return np.mean([np.exp(exponent) for exponent in exponents], axis=0)


def distance_figures(real: Cells, generated: Cells, seed: int) -> dict[str, Figure]:
    """Wasserstein-2 (`w2`) and unbiased MMD^2 (`mmd`) of at most 1,000 cells of each, in principal components of both
    together. W2 is divided by the root of the real cells' total variance there: 1 is what cells that are all the mean
    real cell would have. It is far from 0 for real cells too, about 0.75 for hundreds of them, since no two cells have
    the same noise; MMD^2 is 0 for them, and below it by chance. Raises as `random_forest_figures` does.
    """
    from scipy.spatial.distance import cdist

    points = pooled_space(*equal_numbers(real, generated, MAX_PAIRED, seed))
    count, spread = len(points[0]), float(points[0].var(axis=0).sum()) ** 0.5
    pooled = np.concatenate(points)
    squared = cdist(pooled, pooled, "sqeuclidean")
    kernel = rbf_kernel(squared, float(np.median(squared[np.triu_indices(2 * count, k=1)])) or 1.0)

    def w2(mine: np.ndarray, other: np.ndarray) -> float:
        return wasserstein_2(squared[np.ix_(mine, count + other)]) / max(spread, 1e-12)

    def mmd(mine: np.ndarray, other: np.ndarray) -> float:
        other = count + other
        return mmd_squared(kernel[np.ix_(mine, mine)], kernel[np.ix_(other, other)], kernel[np.ix_(mine, other)])

    everyone, note, halves = np.arange(count), f"against {count}", list(halves_of_both(count))
    values = [w2(*half) for half in halves], [mmd(*half) for half in halves]
    return {
        "w2": half_sampling_figure(w2(everyone, everyone), values[0], count, note, lowest=0),
        "mmd": half_sampling_figure(mmd(everyone, everyone), values[1], count, note),
    }


# ---- genes


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, of two (G,); 0 where one of them never changes."""
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale > 0 else 0.0


def total_least_squares_slope(first: np.ndarray, second: np.ndarray) -> float:
    """Slope of the line through the origin that lies nearest to the points (x, y), measured at right angles. Both may
    be noisy: exchanged, they give the inverse, so two draws of the same have a slope about 1, which ordinary least
    squares would pull towards 0 for the noise in x.
    """
    angle = 0.5 * np.arctan2(2 * float(first @ second), float(first @ first - second @ second))
    return float(np.tan(angle))


def gene_statistics(values: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """(H, 3, G) of values (n, G) in each of the halves (H, n) bool: mean, variance and share of zeros of each gene."""
    weights = halves / halves.sum(axis=1, keepdims=True)
    means = weights @ values
    variances = np.maximum(weights @ values**2 - means**2, 0)
    return np.stack([means, variances, weights @ (values == 0)], axis=1)


def gene_figures(real: Cells, generated: Cells) -> dict[str, Figure]:
    """What the genes of generated cells have in common with those of real ones; intervals over the draw of generated
    cells. Of log-normalised values: Pearson correlation of the genes' means, which is 0.999 for anything that was
    trained at all and no headline; correlation of their variances, and the slope of total least squares of generated
    on real variances, below 1 where cells are too much alike. Of counts: the share of zeros, that share minus the real
    one (signed), and the mean absolute difference over genes. Raises UserError for other genes or too few cells.
    """
    check_alike(real, generated)
    count = len(generated)
    everyone, halves = np.ones((1, count), dtype=bool), random_halves(count).numpy()
    of_real = gene_statistics(real.log_normalised().astype(np.float64), np.ones((1, len(real)), dtype=bool))[0]
    of_generated = gene_statistics(generated.log_normalised().astype(np.float64), np.concatenate([everyone, halves]))
    zeros, real_zeros = (generated.counts == 0).mean(axis=1), float((real.counts == 0).mean())
    measures = {
        "gene_mean_correlation": (lambda it: correlation(of_real[0], it[0]), -1.0, 1.0),
        "gene_variance_correlation": (lambda it: correlation(of_real[1], it[1]), -1.0, 1.0),
        "gene_variance_slope": (lambda it: total_least_squares_slope(of_real[1], it[1]), 0.0, np.inf),
        "zero_fraction_per_gene_error": (lambda it: float(np.abs(of_real[2] - it[2]).mean()), 0.0, 1.0),
    }
    figures = {
        "zero_fraction": mean_figure(torch.as_tensor(zeros), f"{real_zeros:.4f} of real cells"),
        "zero_fraction_error": mean_figure(torch.as_tensor(zeros - real_zeros), f"real cells have {real_zeros:.4f}"),
    }
    for name, (measure, lowest, highest) in measures.items():
        value, *of_halves = (measure(each) for each in of_generated)
        figures[name] = half_sampling_figure(
            value, of_halves, count, f"against {len(real)}", lowest=lowest, highest=highest
        )
    return figures


# ---- neighbours


def perplexity_weights(squared: np.ndarray, perplexity: float) -> np.ndarray:
    """(n, k) Gaussian weights of neighbours at squared distances (n, k), of a width such that each row has the wanted
    perplexity, found by bisection. Source: van der Maaten and Hinton 2008, "Visualizing data using t-SNE".
    """
    squared = squared - squared.min(axis=1, keepdims=True)
    squared = squared / np.maximum(squared.mean(axis=1, keepdims=True), 1e-300)
    low, high = np.full((len(squared), 1), -10.0), np.full((len(squared), 1), 20.0)  # log of the precision
    for _ in range(40):
        middle = (low + high) / 2
        weights = np.exp(-np.exp(middle) * squared)
        weights /= weights.sum(axis=1, keepdims=True)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1, keepdims=True)
        too_wide = entropy > np.log(perplexity)
        low, high = np.where(too_wide, middle, low), np.where(too_wide, high, middle)
    return weights


def lisi_scores(squared: np.ndarray, is_generated: np.ndarray) -> np.ndarray:
    """(n,) from squared distances (n, n) and which are generated: the local inverse Simpson's index of each cell."""
    k = min(3 * PERPLEXITY, len(squared) - 1)
    squared = squared.copy()
    np.fill_diagonal(squared, np.inf)  # a cell is not among its own neighbours
    near = np.argpartition(squared, k - 1, axis=1)[:, :k]
    weights = perplexity_weights(np.take_along_axis(squared, near, axis=1), min(PERPLEXITY, k / 3))
    share = (weights * is_generated[near]).sum(axis=1)
    return 1 / (share**2 + (1 - share) ** 2)


def lisi_figure(real: Cells, generated: Cells) -> dict[str, Figure]:
    """`lisi`: mean local inverse Simpson's index of (real, generated) among a cell's 90 nearest, with Gaussian weights
    of perplexity 30, in principal components of both together. From 1, apart, to 2; perfectly mixed cells have about
    1.9, because neighbours are few. As many of both are taken, at most 2,000. Source: Korsunsky et al. 2019, "Fast,
    sensitive and accurate integration of single-cell data with Harmony".
    """
    from scipy.spatial.distance import cdist

    points = np.concatenate(pooled_space(*equal_numbers(real, generated, MAX_JUDGED, seed=0)))
    count, squared = len(points) // 2, cdist(points, points, "sqeuclidean")
    is_generated = np.arange(len(points)) >= count
    value = float(lisi_scores(squared, is_generated).mean())
    of_halves = []
    for mine, other in halves_of_both(count):
        rows = np.concatenate([mine, count + other])
        of_halves.append(float(lisi_scores(squared[np.ix_(rows, rows)], is_generated[rows]).mean()))
    return {"lisi": half_sampling_figure(value, of_halves, count, f"against {count}", lowest=1, highest=2)}


def memorising_figures(generated: Cells, test: Cells, training: Cells) -> dict[str, Figure]:
    """`metrics_neighbours.copy_figures` in components of the training cells: `copies`, the share of generated cells
    that lie nearer to a training cell than all but 1 % of held-out real cells, which is 1 % where nothing is
    memorised; and `nearest_ratio`, of the median distances, 1 where nothing is. Raises UserError for other genes and
    for fewer than 100 held-out cells, which have no such per cent.
    """
    check_alike(generated, test, training)
    if len(test) < MIN_HELD_OUT:
        raise UserError(f"{len(test)} held-out cells; give at least {MIN_HELD_OUT} to tell what is a copy")
    components = principal_components(training.log_normalised())
    points = [
        torch.as_tensor(components.transform(each.log_normalised()), dtype=torch.float64)
        for each in (generated, test, training)
    ]
    of_generated, of_test = (nearest(queries, points[2])[0] for queries in points[:2])
    figures = copy_figures(of_generated, of_test)
    return {name: replace(figure, note=figure.note.replace("images", "cells")) for name, figure in figures.items()}
