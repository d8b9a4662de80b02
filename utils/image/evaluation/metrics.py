"""Figures of images, computed from features: FID, KID, CMMD, Inception Score, CLIP score and accuracy.

torch-fidelity computes FID, KID and the Inception Score; what it has not, and what intervals need faster than it has
it, is written here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.figures import (
    HALF_SAMPLING,
    MAX_PAIRED,
    Figure,
    at_most,
    half_sampling_figure,
    mean_figure,
    random_halves,
    share_figure,
)

ENOUGH_FOR_LIMIT = 5  # samples for each feature
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


# ---- FID


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features: all that FID knows of a set of images."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    count: int  # 0 where it is not known
    features: str = ""  # name of what made the features; empty where it is not known

    @classmethod
    def of(cls, features: Tensor, name: str = "") -> "Statistics":
        """Mean and unbiased covariance of features (N, D), N at least 2. Raises ValueError for anything else."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"expected features (N, D) of at least two samples, found {tuple(features.shape)}")
        values = features.double().cpu()
        mean = values.mean(dim=0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (len(values) - 1), len(values), name)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        metadata = {"count": str(self.count), "features": self.features}
        save_file({"mean": self.mean, "covariance": self.covariance}, str(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote, whatever else the file holds. Raises UserError for another file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                mean, covariance = (file.get_tensor(name).double() for name in ("mean", "covariance"))
        except Exception as error:  # safetensors has its own error, which is no OSError
            raise UserError(f"{path} holds no saved statistics (mean and covariance): {error}") from error
        return cls(mean, covariance, int(metadata.get("count", 0)), metadata.get("features", ""))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)): the FID of two sets, by torch-fidelity.

    Source: Heusel et al. 2017, arXiv 1706.08500, equation 6. Raises ValueError for statistics of different features.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.mean.shape != b.mean.shape or (a.features and b.features and a.features != b.features):
        raise ValueError(
            f"statistics of different features: {a.features or 'unknown'} ({len(a.mean)}) and "
            f"{b.features or 'unknown'} ({len(b.mean)}) cannot be compared"
        )
    first, second = ({"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (a, b))
    return float(fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID])


def frechet_of_parts(features: Tensor, reference: Statistics, parts: Tensor) -> list[float]:
    """FIDs of parts (R, N) bool of features (N, D) against one reference, faster than one by one.

    With S the root of the reference's covariance C, tr (cov C)^(1/2) is the sum of the roots of the eigenvalues of
    S cov S, which is symmetric and is the covariance of features S; of m < D samples, their (m, m) Gram matrix has
    the same ones.
    """
    values = features.double()
    eigenvalues, vectors = torch.linalg.eigh(reference.covariance)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    turned = values @ root  # (N, D)
    trace = reference.covariance.trace()
    distances = []
    for part in parts:
        own, seen = values[part], turned[part]  # (m, D)
        seen = (seen - seen.mean(dim=0)) / (len(seen) - 1) ** 0.5
        gram = seen @ seen.T if len(seen) < seen.shape[1] else seen.T @ seen
        overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        shift = (own.mean(dim=0) - reference.mean).square().sum()
        distances.append(float(shift + own.var(dim=0).sum() + trace - 2 * overlap))
    return distances


def fid_figures(features: Tensor, reference: Statistics) -> dict[str, Figure]:
    """FID at this number of samples and, from `ENOUGH_FOR_LIMIT` for each feature on, extrapolated to infinitely many.

    The bias of FID falls as 1 / N (Chong and Forsyth 2020, arXiv 1911.07023), so that 2 FID_N - FID_(N/2) is free of
    its first order; FID_(N/2) is the mean over the halves that give the interval.
    """
    value = frechet_distance(Statistics.of(features, reference.features), reference)
    halves = frechet_of_parts(features, reference, random_halves(len(features)))
    bias = float(np.mean(halves)) - value
    if len(features) < ENOUGH_FOR_LIMIT * features.shape[1]:
        few = "biased upwards by too few samples"
        return {"fid": half_sampling_figure(value, halves, len(features), few, lowest=0)}
    note = f"biased upwards by about {max(bias, 0):.2g}"
    return {
        "fid": half_sampling_figure(value, halves, len(features), note, lowest=0),
        "fid_infinity": half_sampling_figure(value - bias, halves, len(features), "the limit of many samples"),
    }


# ---- maximum mean discrepancy: KID and CMMD

Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x y / D + 1)^3 of features (N, D) and (M, D): KID's (Binkowski et al. 2018, arXiv 1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), sigma = 10: CMMD's (Jayasumana et al. 2023, arXiv 2401.09603, section 4)."""
    return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * CMMD_SIGMA**2))


def squared_mmd(
    samples: Tensor, reference: Tensor, kernel: Kernel, parts: Tensor, *, unbiased: bool, block: int = 1000
) -> list[float]:
    """Squared MMD between each of the parts (R, N) bool of the samples (N, D) and the reference (M, D).

    One pass over blocks of the kernel matrix serves all parts: with membership z, the sum over pairs is z K z. The
    diagonal is left out where it is to be unbiased (Gretton et al. 2012, equations 3 and 5).
    """
    x, y, members = samples.double(), reference.double(), parts.double()  # members (R, N)
    counts = members.sum(dim=1)
    own, cross = torch.zeros_like(counts), torch.zeros_like(counts)
    for first in range(0, len(x), block):
        rows, z = x[first : first + block], members[:, first : first + block]
        matrix = kernel(rows, x)  # (B, N)
        own += ((z @ matrix) * members).sum(dim=1)
        if unbiased:
            own -= z @ matrix.diagonal(first)
        cross += z @ kernel(rows, y).mean(dim=1)
    among = 0.0
    for first in range(0, len(y), block):
        matrix = kernel(y[first : first + block], y)
        among += float(matrix.sum() - (matrix.diagonal(first).sum() if unbiased else 0))
    left_out = 1 if unbiased else 0
    of_reference = among / (len(y) * (len(y) - left_out))
    return (own / (counts * (counts - left_out)) + of_reference - 2 * cross / counts).tolist()


def kid_figure(samples: Tensor, reference: Tensor) -> Figure:
    """KID by torch-fidelity: the mean over random subsets of the unbiased squared MMD with KID's kernel. The interval
    is that of the samples, and of the choice of subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    measured = kid_features_to_metric(
        samples.double(), reference.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    samples, reference = at_most(samples, MAX_PAIRED), at_most(reference, MAX_PAIRED)
    halves = squared_mmd(samples, reference, polynomial_kernel, random_halves(len(samples)), unbiased=True)
    figure = half_sampling_figure(float(measured[KEY_METRIC_KID_MEAN]), halves, len(samples))
    of_subsets = 1.96 * float(measured[KEY_METRIC_KID_STD]) / KID_SUBSETS**0.5
    reach = float(np.hypot(figure.high - figure.value, of_subsets))
    note = f"{KID_SUBSETS} subsets of {size}"
    return Figure(figure.value, figure.value - reach, figure.value + reach, len(samples), HALF_SAMPLING, note=note)


def cmmd_figure(samples: Tensor, reference: Tensor) -> Figure:
    """CMMD: squared MMD, with its diagonal, of CLIP's embeddings at length 1, times 1000."""
    chosen = (at_most(each, MAX_PAIRED) for each in (samples, reference))
    samples, reference = (torch.nn.functional.normalize(each, dim=1) for each in chosen)
    whole = torch.ones(1, len(samples), dtype=torch.bool)
    parts = torch.cat([whole, random_halves(len(samples))])
    distances = squared_mmd(samples, reference, gaussian_kernel, parts, unbiased=False)
    value, *halves = (CMMD_SCALE * each for each in distances)
    return half_sampling_figure(value, halves, len(samples), f"against {len(reference)}", lowest=0)


# ---- classes and captions


def inception_score_figure(logits: Tensor) -> Figure:
    """exp E KL(p(y|x) | p(y)), the mean of ten parts, by torch-fidelity (Salimans et al. 2016, arXiv 1606.03498)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    def score(part: Tensor) -> float:
        return float(isc_features_to_metric(part, splits=10)[KEY_METRIC_ISC_MEAN])

    halves = [score(logits[part]) for part in random_halves(len(logits))]
    return half_sampling_figure(score(logits), halves, len(logits), lowest=1)


def clip_score_figure(image_embeddings: Tensor, text_embeddings: Tensor) -> Figure:
    """100 max(cos, 0) of the embeddings (N, D) of images and their captions (Hessel et al. 2021, arXiv 2104.08718,
    with torchmetrics' factor)."""
    return mean_figure(100 * torch.cosine_similarity(image_embeddings, text_embeddings).clamp(min=0))


def accuracy_figure(logits: Tensor, class_labels: Tensor) -> Figure:
    """Share of samples whose most likely class (N, K) is the one asked for (N,)."""
    return share_figure(logits.argmax(dim=1) == class_labels)
