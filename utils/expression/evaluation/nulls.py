"""What cells are compared with: real training cells, what the autoencoder makes of them, and what can be had without a
denoiser: Gaussian latents, independent negative binomials, latents of the prior. The nulls know of a cell what samples
are told of it, and no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from utils.evaluation.regressors import number_names
from utils.expression.codec import batch_numbers, draw_cells, encode_cells
from utils.expression.data.stream import cell_batches, second_moments, shares_of
from utils.expression.data.table import CellTable
from utils.expression.evaluation.real import Real, cells_of
from utils.expression.evaluation.samples import (
    BINOMIALS,
    CEILING,
    CONTROL,
    GAUSSIAN,
    PRIOR,
    Requests,
    SampleSet,
    asked_labels,
    asked_numbers,
)
from utils.expression.vae.network import ExpressionVAE

AT_ONCE = 1024
MIN_ALIKE = 5  # training cells, for a law of their own
MAX_THETA = 1e6  # inverse dispersion of a gene that varies no more than a Poisson distribution
ROWS, POSTERIOR, LATENTS, COUNTS, BINOMIAL = range(3, 8)  # streams of a seed; samples have those before
# Places (k,) of cells that were asked for the same classes, and the rows (m,) of the training cells that are of them.
Groups = list[tuple[np.ndarray, np.ndarray]]


def class_keys(requests: Requests) -> np.ndarray:
    """(n,) the classes that each request names, as one text."""
    texts = [" | ".join(str(v) for _, v in sorted(each.items()) if isinstance(v, str)) for each in requests]
    return np.array(texts, dtype=object)


def groups_alike(asked: Requests, training: Requests) -> Groups:
    """Those that were asked for the same classes with the training cells of these classes; with all of them, where
    fewer than 5 are.
    """
    wanted, known = class_keys(asked), class_keys(training)
    groups = []
    for key in sorted(set(wanted)):
        rows = np.flatnonzero(known == key)
        groups.append((np.flatnonzero(wanted == key), rows if len(rows) >= MIN_ALIKE else np.arange(len(known))))
    return groups


def rows_of_groups(groups: Groups, seed: int) -> np.ndarray:
    """(n,) for each asked cell a training cell of its classes, drawn at random with the others put back."""
    generator = np.random.default_rng([seed, ROWS])
    found = np.zeros(sum(len(places) for places, _ in groups), dtype=np.int64)
    for places, rows in groups:
        found[places] = rows[generator.integers(len(rows), size=len(places))]
    return found


def rows_of_types(wanted: np.ndarray, types: np.ndarray, seed: int) -> np.ndarray:
    """(m,) rows of training cells with the types (n,) that are wanted, none twice where there are enough of a type;
    those of a type without training cells are left out.
    """
    generator = np.random.default_rng([seed, ROWS])
    found = np.full(len(wanted), -1)
    for kind in sorted(set(wanted)):
        places, rows = np.flatnonzero(wanted == kind), np.flatnonzero(types == kind)
        if len(rows):
            rounds = [generator.permutation(rows) for _ in range(-(-len(places) // len(rows)))]
            found[places] = np.concatenate(rounds)[: len(places)]
    return found[found >= 0]


# ---- latents


@dataclass(frozen=True, eq=False)
class Posterior:
    """Training cells in an autoencoder: mean and standard deviation (R, D + 1) of each latent, and batches (R,)."""

    vae: ExpressionVAE
    mean: np.ndarray
    std: np.ndarray
    batches: np.ndarray | None

    @classmethod
    def of(cls, vae: ExpressionVAE, table: CellTable) -> "Posterior":
        """Encodes all cells. Raises UserError for batches that the autoencoder never saw."""
        batches = batch_numbers(vae, table, "--training_data")
        moments = [
            encode_cells(vae, {name: values.to(vae.device) for name, values in batch.items()})
            for batch in cell_batches(table, AT_ONCE, batches)
        ]
        mean, std = (torch.cat(part).double().cpu().numpy() for part in zip(*moments, strict=True))
        return cls(vae, mean, std, batches)

    def draw(self, seed: int) -> np.ndarray:
        """A latent (R, D + 1) of each cell; the last is the logarithm of its library size."""
        noise = np.random.default_rng([seed, POSTERIOR]).standard_normal(self.mean.shape)
        return self.mean + self.std * noise

    def decode(self, latents: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
        """Latents (n, D + 1) -> counts (n, G), drawn from the likelihood, in the batches of the training cells `rows`
        (n,).
        """
        found = []
        for first in range(0, len(latents), AT_ONCE):
            some = torch.from_numpy(latents[first : first + AT_ONCE]).float().to(self.vae.device)
            index = None
            if self.batches is not None:
                index = torch.from_numpy(self.batches[rows[first : first + AT_ONCE]]).to(self.vae.device)
            generators = [np.random.default_rng([seed + first + i, COUNTS]) for i in range(len(some))]
            found.append(draw_cells(self.vae, some, index, generators)[0])
        return np.concatenate(found)


def as_matrix(numbers: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Columns (n,), perhaps none, as (n, P)."""
    return np.array(list(numbers.values()), dtype=np.float64).reshape(len(numbers), count).T


def standardised(training: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (R, P) and (n, P) over the mean and the spread of the first; 0 where there is none."""
    mean, std = np.nanmean(training, axis=0), np.nanstd(training, axis=0)
    first, second = ((each - mean) / np.maximum(std, 1e-12) for each in (training, asked))
    return np.nan_to_num(first), np.nan_to_num(second)


def gaussian_latents(
    latents: np.ndarray, known: np.ndarray, asked: np.ndarray, groups: Groups, seed: int
) -> np.ndarray:
    """(n, D) draws of a normal distribution for each group, fitted to the latents (R, D) of its training cells. The
    mean is linear in the numbers `known` (R, P) of them and `asked` (n, P), which are `standardised`: least squares.
    Covariances are full, and shrunk a little: as if each group had D cells more, of the mean covariance of all groups.
    Of sorted blood cells, held-out ones were likelier so than without, or than with a shrinkage towards a sphere.
    """
    generator = np.random.default_rng([seed, LATENTS])
    dim = latents.shape[1]
    fits = []
    for _, rows in groups:
        inputs = np.column_stack([np.ones(len(rows)), known[rows]])  # (m, P + 1)
        if len(rows) < 2 * inputs.shape[1]:
            inputs[:, 1:] = 0  # too few to tell a slope
        slopes = np.linalg.lstsq(inputs, latents[rows], rcond=None)[0]
        residuals = latents[rows] - inputs @ slopes
        fits.append((slopes, residuals.T @ residuals))
    total = sum(len(rows) for _, rows in groups)
    shared = sum(scatter for _, scatter in fits) / total
    drawn = np.zeros((sum(len(places) for places, _ in groups), dim))
    for (places, rows), (slopes, scatter) in zip(groups, fits, strict=True):
        covariance = (scatter + dim * shared) / (len(rows) + dim)
        covariance += 1e-9 * np.trace(covariance) / dim * np.eye(dim)
        noise = generator.standard_normal((len(places), dim))
        inputs = np.column_stack([np.ones(len(places)), asked[places]])
        drawn[places] = inputs @ slopes + noise @ np.linalg.cholesky(covariance).T
    return drawn


def prior_latents(log_library: np.ndarray, seed: int, dim: int) -> np.ndarray:
    """(n, D + 1) standard normal latents, which the autoencoder was trained towards, with these library sizes."""
    noise = np.random.default_rng([seed, LATENTS]).standard_normal((len(log_library), dim))
    return np.column_stack([noise, log_library])


# ---- counts


def binomial_counts(counts: csr_matrix, library_sizes: np.ndarray, groups: Groups, seed: int) -> np.ndarray:
    """(n, G) counts of which each gene is drawn for itself, given the library size of some training cell of the group:
    negative binomials whose shares and dispersions are those of the group's training cells (R, G), by moments
    (variance = mu + mu^2 / theta).
    """
    generator = np.random.default_rng([seed, BINOMIAL])
    drawn = np.zeros((sum(len(places) for places, _ in groups), counts.shape[1]), dtype=np.float32)
    for places, rows in groups:
        some, sizes = counts[rows], library_sizes[rows]
        shares = shares_of(some, sizes)
        mu_squares, residual_squares, mus = second_moments(some, sizes, shares)
        excess = np.maximum(residual_squares - mus, mu_squares / MAX_THETA)
        theta = mu_squares / np.maximum(excess, 1e-12) + 1e-12  # a gene that is not there has neither
        mu = sizes[generator.integers(len(rows), size=len(places))][:, None] * shares
        drawn[places] = generator.negative_binomial(theta, theta / (theta + mu))
    return drawn


# ---- sets of cells


def sets_beside(
    real: Real, *, asked: Requests, known: Requests, wanted: np.ndarray, posterior: Posterior | None, seed: int
) -> Iterator[SampleSet]:
    """The sets that stand beside samples which were `asked` for (n,): control, ceiling and nulls, where it is known
    which cells were trained on and what they are (`known` (R,)); `wanted` (m,) are the types of as many test cells,
    all the same where there are none. What needs an autoencoder is left out without one.
    """
    training, cells = real.training, real.training_cells
    if training is None or cells is None:
        return
    names, types, labels = number_names(known), cells.labels, asked_labels(asked, real.label_column)
    rows = rows_of_types(wanted, np.full(len(cells), wanted[0]) if types is None else types, seed)
    of_test = {name: real.test.obs[name] for name in names}
    yield SampleSet(CONTROL, CONTROL, cells.take(rows), of_test, real.test_cells)
    groups, numbers = groups_alike(asked, known), asked_numbers(asked, names)
    if posterior is not None:
        latents = posterior.draw(seed)
        its = None if types is None else types[rows]
        of_rows = {name: training.obs[name][rows] for name in names}
        yield SampleSet(CEILING, CEILING, cells_of(posterior.decode(latents[rows], rows, seed), its), of_rows)
        inputs = standardised(as_matrix(asked_numbers(known, names), len(known)), as_matrix(numbers, len(asked)))
        drawn = gaussian_latents(latents, *inputs, groups, seed)
        counts = posterior.decode(drawn, rows_of_groups(groups, seed), seed)
        yield SampleSet(GAUSSIAN, GAUSSIAN, cells_of(counts, labels), numbers)
    counts = binomial_counts(training.counts, training.library_sizes, groups, seed)
    yield SampleSet(BINOMIALS, BINOMIALS, cells_of(counts, labels), numbers)
    if posterior is not None:
        anyone = rows_of_groups([(np.arange(len(asked)), np.arange(len(known)))], seed)
        drawn = prior_latents(posterior.mean[anyone, -1], seed, latents.shape[1] - 1)
        yield SampleSet(PRIOR, PRIOR, cells_of(posterior.decode(drawn, anyone, seed), labels), numbers)


def laws_of_nulls(known: Requests, with_latents: bool) -> dict[str, str]:
    """What each null knows of a cell, in words."""
    classes = sorted({name for each in known for name, value in each.items() if isinstance(value, str)})
    of_each = f"of each {' and '.join(classes)} by itself" if classes else "of all training cells together"
    laws = {BINOMIALS: f"genes independent, by their moments {of_each}; library sizes are those of training cells"}
    if not with_latents:
        return laws
    linear = f", the mean linear in {' and '.join(number_names(known))}" if number_names(known) else ""
    gaussian = f"mean and full covariance of latents and log library size {of_each}{linear}; decoded and drawn"
    prior = "standard normal latents, library sizes of training cells; decoded and drawn"
    return {GAUSSIAN: gaussian} | laws | {PRIOR: prior}
