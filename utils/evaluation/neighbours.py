"""Figures of nearest neighbours: precision, recall, density, coverage, and whether samples copy training images."""

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.figures import (
    BOOTSTRAP,
    CONFIDENCE,
    MAX_PAIRED,
    Figure,
    at_most,
    half_sampling_figure,
    random_halves,
    share_figure,
)

NEIGHBOURHOOD = 3  # of precision and recall: k = 3, section 3 of arXiv 1904.06991
DENSITY_NEIGHBOURHOOD = 5  # of density and coverage: k = 5, section 3 of arXiv 2002.09797
MAX_QUERIES = 2_000  # samples and held-out images that are looked up among all the training images
COPY_QUANTILE = 0.01  # a sample is a copy if it lies nearer to a training image than all but 1 % of held-out ones do
MIN_HELD_OUT = 100  # fewer have no such quantile


def radii(distances: Tensor, k: int) -> Tensor:
    """Distance of each row (N,) to its k-th neighbour, itself not counted, in the matrix (N, N) of its own set."""
    return distances.kthvalue(k + 1, dim=1).values


def manifold_values(to_reference: Tensor, among: Tensor, radius_3: Tensor, radius_5: Tensor) -> dict[str, float]:
    """The four figures, from distances of samples to reference (N, M), among samples (N, N), and the reference's
    radii (M,).

    Sources: precision and recall, Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 2; density and coverage, Naeem
    et al. 2020, arXiv 2002.09797, equations 4 and 5.
    """
    inside = to_reference < radius_5
    return {
        "precision": (to_reference <= radius_3).any(dim=1).double().mean().item(),
        "recall": (to_reference <= radii(among, NEIGHBOURHOOD)[:, None]).any(dim=0).double().mean().item(),
        "density": inside.sum().item() / (DENSITY_NEIGHBOURHOOD * len(to_reference)),
        "coverage": inside.any(dim=0).double().mean().item(),
    }


def manifold_figures(samples: Tensor, reference: Tensor) -> dict[str, Figure]:
    """Precision and recall by torch-fidelity, density and coverage; features (N, D) and (M, D)."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    samples, reference = at_most(samples, MAX_PAIRED), at_most(reference, MAX_PAIRED)
    measured = prc_features_to_metric(samples, reference, prc_neighborhood=NEIGHBOURHOOD, verbose=False)
    among_reference = torch.cdist(reference, reference)
    radius_3, radius_5 = (radii(among_reference, k) for k in (NEIGHBOURHOOD, DENSITY_NEIGHBOURHOOD))
    del among_reference
    to_reference, among = torch.cdist(samples, reference), torch.cdist(samples, samples)
    values = manifold_values(to_reference, among, radius_3, radius_5)
    values |= {"precision": measured[KEY_METRIC_PRECISION], "recall": measured[KEY_METRIC_RECALL]}
    halves = [
        manifold_values(to_reference[part], among[part][:, part], radius_3, radius_5)
        for part in random_halves(len(samples))
    ]
    note = f"against {len(reference)}"
    return {
        name: half_sampling_figure(
            value,
            [half[name] for half in halves],
            len(samples),
            note,
            lowest=0,
            highest=np.inf if name == "density" else 1,
        )
        for name, value in values.items()
    }


def nearest(queries: Tensor, base: Tensor, block: int = 10_000) -> tuple[Tensor, Tensor]:
    """Distance (N,) of each query (N, D) to the nearest row of `base` (M, D), and which row that is (N,)."""
    distance = torch.full((len(queries),), float("inf"))
    row = torch.zeros(len(queries), dtype=torch.long)
    for first in range(0, len(base), block):
        found = torch.cdist(queries, base[first : first + block]).min(dim=1)
        closer = found.values < distance
        distance = torch.where(closer, found.values, distance)
        row = torch.where(closer, found.indices + first, row)
    return distance, row


def copy_figures(of_samples: Tensor, of_held_out: Tensor) -> dict[str, Figure]:
    """Distances (N,) to the nearest training image, of samples beside those of real images the model never saw, (H,).

    The share of samples that are nearer than all but 1 % of the held-out images, which is 1 % where nothing is
    memorised; and the ratio of the medians, 1 where samples are as far from the training images as new real ones are.
    """
    threshold = torch.quantile(of_held_out, COPY_QUANTILE)
    note = f"{COPY_QUANTILE:.0%} of {len(of_held_out)} held-out images"
    return {
        "copies": share_figure(of_samples < threshold, note),
        "nearest_ratio": ratio_figure(of_samples, of_held_out),
    }


def ratio_figure(of_samples: Tensor, of_held_out: Tensor) -> Figure:
    """Median over median, with its bootstrap interval over both."""
    from scipy.stats import bootstrap

    def ratio(first, second, axis):
        return np.median(first, axis=axis) / np.maximum(np.median(second, axis=axis), 1e-12)

    values = (of_samples.double().numpy(), of_held_out.double().numpy())
    value = float(ratio(*values, axis=-1))
    generator = np.random.default_rng(0)
    interval = bootstrap(
        values, ratio, n_resamples=1000, batch=100, confidence_level=CONFIDENCE, method="percentile", rng=generator
    ).confidence_interval
    note = f"{len(of_held_out)} held-out images are 1"
    return Figure(value, float(interval.low), float(interval.high), len(of_samples), BOOTSTRAP, note=note)
