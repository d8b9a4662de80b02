"""Figures against truths that share no code with them: closed forms, scipy, scikit-learn, brute force, torch-fidelity
and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from tests.support.features import gaussian
from utils.errors import UserError
from utils.evaluation import figures as metrics_intervals
from utils.evaluation import neighbours as metrics_neighbours
from utils.image.evaluation import metrics as metrics_images
from utils.image.evaluation.metrics import Statistics, frechet_distance


def skewed(count: int, dim: int, seed: int) -> Tensor:
    """Features whose covariance is not diagonal."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7))
    return gaussian(count, dim, seed) @ mix


class Identity(nn.Module):
    """Features that are handed to torchmetrics as if they were images."""

    num_features = 8

    def forward(self, features: Tensor) -> Tensor:
        return features


# ---- Frechet distance


def test_distance_of_two_gaussians_has_a_closed_form() -> None:
    # Of diagonal Gaussians: the squared distance of the means plus that of the standard deviations.
    mean, first, second = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    a = Statistics(torch.zeros(3).double(), torch.diag(first**2).double(), 0)
    b = Statistics(mean.double(), torch.diag(second**2).double(), 0)
    expected = float(mean.square().sum() + (first - second).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_distance_is_scipys_and_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = skewed(300, 8, 1), skewed(400, 8, 2) * 1.2 + 0.3
    ours = frechet_distance(Statistics.of(x), Statistics.of(y))
    root = scipy.linalg.sqrtm(np.cov(x.double().numpy().T) @ np.cov(y.double().numpy().T))
    shift = x.double().mean(0) - y.double().mean(0)
    traces = np.trace(np.cov(x.double().numpy().T)) + np.trace(np.cov(y.double().numpy().T))
    assert ours == pytest.approx(float(shift.square().sum() + traces - 2 * np.trace(root.real)), rel=1e-6)
    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.parametrize(("count", "dim"), [(60, 8), (12, 8)])  # parts with more samples than features, and with fewer
def test_distances_of_parts_are_those_one_by_one(count: int, dim: int) -> None:
    x, reference = skewed(count, dim, 1), Statistics.of(skewed(200, dim, 2))
    parts = metrics_intervals.random_halves(count, 5)
    assert parts.sum(dim=1).tolist() == [count // 2] * 5
    expected = [frechet_distance(Statistics.of(x[part]), reference) for part in parts]
    # Of fewer samples than features the product of covariances has zero eigenvalues: roots of rounding in the library.
    assert metrics_images.frechet_of_parts(x, reference, parts) == pytest.approx(expected, rel=1e-4)


def test_statistics_are_numpys_and_survive_saving(tmp_path) -> None:
    x = skewed(50, 8, 0)
    statistics = Statistics.of(x, "some features")
    np.testing.assert_allclose(statistics.covariance, np.cov(x.double().numpy().T), rtol=1e-8)
    statistics.save(tmp_path / "file.safetensors")
    loaded = Statistics.load(tmp_path / "file.safetensors")
    torch.testing.assert_close(loaded.mean, statistics.mean)
    torch.testing.assert_close(loaded.covariance, statistics.covariance)
    assert (loaded.count, loaded.features) == (50, "some features")
    (tmp_path / "other").write_text("no statistics")
    with pytest.raises(UserError, match="no saved statistics"):
        Statistics.load(tmp_path / "other")


def test_statistics_of_different_features_are_not_compared() -> None:
    a, b = Statistics.of(skewed(50, 8, 0), "inception"), Statistics.of(skewed(50, 8, 0), "clip")
    with pytest.raises(ValueError, match="different features: inception"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="different features"):
        frechet_distance(a, Statistics.of(skewed(50, 7, 0)))


# ---- kernels


def polynomial(a: Tensor, b: Tensor) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def brute_force_mmd(x: Tensor, y: Tensor, kernel, unbiased: bool) -> float:
    def mean(first: Tensor, second: Tensor, skip: bool) -> float:
        return float(
            np.mean([kernel(a, b) for i, a in enumerate(first) for j, b in enumerate(second) if not (skip and i == j)])
        )

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("unbiased", [True, False])
def test_squared_mmd_of_parts_is_brute_force(unbiased: bool) -> None:
    x, y = gaussian(14, 3, 0).double(), gaussian(11, 3, 1, shift=0.5).double()
    parts = metrics_intervals.random_halves(14, 2)
    found = metrics_images.squared_mmd(x, y, metrics_images.polynomial_kernel, parts, unbiased, block=4)
    expected = [brute_force_mmd(x[part], y, polynomial, unbiased) for part in parts]
    assert found == pytest.approx(expected, rel=1e-9)


def test_kid_is_torchmetrics_and_unbiased() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = skewed(120, 8, 1), skewed(120, 8, 2) + 0.4
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=120)
    metric.update(y, real=True)
    metric.update(x, real=False)
    figure = metrics_images.kid_figure(x, y)
    assert figure.value == pytest.approx(float(metric.compute()[0]), rel=1e-4)
    whole = torch.ones(1, 120, dtype=torch.bool)
    (streamed,) = metrics_images.squared_mmd(x, y, metrics_images.polynomial_kernel, whole, unbiased=True)
    assert figure.value == pytest.approx(streamed, rel=1e-5)
    assert figure.low < figure.value < figure.high
    whole, kernel = torch.ones(1, 40, dtype=torch.bool), metrics_images.polynomial_kernel
    same = [
        metrics_images.squared_mmd(gaussian(40, 4, i), gaussian(40, 4, 1000 + i), kernel, whole, unbiased=True)[0]
        for i in range(200)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5  # no difference is 0, whatever the number
    x, y = gaussian(100, 4, 0), gaussian(5000, 4, 1)  # a reference so large that it is known
    assert metrics_images.kid_figure(x, y).low < 0 < metrics_images.kid_figure(x, y).high


def test_cmmd_is_the_papers() -> None:
    x, y = skewed(40, 6, 1), skewed(30, 6, 2) + 0.5
    figure = metrics_images.cmmd_figure(x, y)
    # https://github.com/google-research/google-research/blob/master/cmmd/distance.py, in numpy
    a, b = (each.double().numpy() / np.linalg.norm(each.double().numpy(), axis=1, keepdims=True) for each in (x, y))
    gamma = 1 / (2 * 10**2)

    def mean_kernel(first: np.ndarray, second: np.ndarray) -> float:
        squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
        return float(np.exp(-gamma * squares).mean())

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert figure.value == pytest.approx(expected, rel=1e-6)
    assert metrics_images.cmmd_figure(x, 3 * x).value == pytest.approx(0, abs=1e-6)  # lengths do not count


# ---- classes and captions


def test_inception_score_is_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * gaussian(200, 8, 0)
    metric = InceptionScore(feature=Identity(), splits=10)
    metric.update(logits)
    figure = metrics_images.inception_score_figure(logits)
    assert figure.value == pytest.approx(float(metric.compute()[0]), rel=0.05)  # another shuffle into ten parts
    certain = 100 * torch.eye(5)[torch.arange(200) % 5]
    # Of five classes, all equally often and without doubt, it is 5 in parts that hold all of them as often.
    assert metrics_images.inception_score_figure(certain).value == pytest.approx(5, rel=0.15)
    assert metrics_images.inception_score_figure(torch.zeros(200, 5)).value == pytest.approx(1)


def test_clip_score_is_torchmetrics_formula() -> None:
    images, texts = skewed(30, 6, 1), skewed(30, 6, 2)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(images, texts, strict=True)]
    figure = metrics_images.clip_score_figure(images, texts)
    assert figure.value == pytest.approx(np.mean([100 * max(cosine, 0) for cosine in cosines]), rel=1e-5)


def test_accuracy() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    assert metrics_images.accuracy_figure(logits, torch.tensor([0, 1, 1])).value == pytest.approx(2 / 3)


# ---- neighbours


def brute_force_manifold(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The papers' sums, with scikit-learn's neighbours."""
    from sklearn.neighbors import NearestNeighbors

    def radius(points: np.ndarray, k: int) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, k]

    distance = np.linalg.norm(samples[:, None] - reference[None], axis=2)  # (N, M)
    real_3, real_5, own_3 = radius(reference, 3), radius(reference, 5), radius(samples, 3)
    return {
        "precision": np.mean([any(distance[i] <= real_3) for i in range(len(samples))]),
        "recall": np.mean([any(distance[:, j] <= own_3) for j in range(len(reference))]),
        "density": np.sum(distance < real_5) / (5 * len(samples)),
        "coverage": np.mean([any(distance[:, j] < real_5[j]) for j in range(len(reference))]),
    }


def test_manifold_figures_are_brute_force_and_torch_fidelitys() -> None:
    samples, reference = 0.7 * gaussian(90, 4, 0), gaussian(130, 4, 1)
    figures = metrics_neighbours.manifold_figures(samples, reference)
    expected = brute_force_manifold(samples.numpy(), reference.numpy())
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-6), name
        assert figures[name].low <= figures[name].value <= figures[name].high
        assert figures[name].num_samples == 90
    radii = [metrics_neighbours.radii(torch.cdist(reference, reference), k) for k in (3, 5)]
    own = metrics_neighbours.manifold_values(
        torch.cdist(samples, reference), torch.cdist(samples, samples), radii[0], radii[1]
    )
    assert own == pytest.approx(expected, abs=1e-6)  # what the intervals are made with is the same


def test_manifold_figures_tell_collapse_from_noise() -> None:
    reference = gaussian(200, 4, 1)
    collapsed = metrics_neighbours.manifold_figures(0.05 * gaussian(200, 4, 0), reference)
    noise = metrics_neighbours.manifold_figures(5 * gaussian(200, 4, 0), reference)
    assert collapsed["precision"].value > 0.95
    assert collapsed["recall"].value < 0.1
    assert collapsed["coverage"].value < 0.5
    assert noise["precision"].value < 0.3
