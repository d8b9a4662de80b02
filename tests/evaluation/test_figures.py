"""Intervals that hold the truth as often as they say."""

import numpy as np
import pytest
import torch

from tests.support.features import gaussian
from utils.evaluation import figures as metrics_intervals
from utils.image.evaluation import metrics as metrics_images
from utils.image.evaluation.metrics import Statistics, frechet_distance


def test_intervals_of_fid_hold_its_expectation_and_the_extrapolation_the_truth() -> None:
    dim, count = 8, 160
    reference = Statistics(torch.full((dim,), 0.1).double(), 1.21 * torch.eye(dim).double(), 0)
    truth = dim * (0.1**2 + 0.1**2)
    runs = [metrics_images.fid_figures(gaussian(count, dim, seed), reference) for seed in range(40)]
    at_n = [run["fid"] for run in runs]
    expectation = float(np.mean([figure.value for figure in at_n]))
    assert expectation > 1.5 * truth  # the bias of few samples, which every report states
    assert np.mean([figure.low <= expectation <= figure.high for figure in at_n]) > 0.92
    limits = [run["fid_infinity"] for run in runs]
    assert np.mean([figure.low <= truth <= figure.high for figure in limits]) > 0.85
    assert np.mean([figure.value for figure in limits]) == pytest.approx(truth, abs=0.03)
    # Why no bootstrap: samples drawn twice narrow the covariance, and most of its FIDs lie above the interval's figure.
    x = gaussian(count, dim, 0)
    drawn = torch.randint(count, (50, count), generator=torch.Generator().manual_seed(0))
    repeated = [frechet_distance(Statistics.of(x[rows]), reference) for rows in drawn]
    assert np.mean([value > at_n[0].value for value in repeated]) > 0.9


def test_few_samples_are_not_extrapolated() -> None:
    reference = Statistics(torch.zeros(30).double(), torch.eye(30).double(), 0)
    figures = metrics_images.fid_figures(gaussian(100, 30, 0), reference)
    assert list(figures) == ["fid"]
    assert "biased" in figures["fid"].note


def test_intervals_of_a_share_and_of_a_mean_hold_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = [metrics_intervals.share_figure(torch.rand(100, generator=generator) < 0.05) for _ in range(200)]
    assert np.mean([figure.low <= 0.05 <= figure.high for figure in shares]) > 0.9
    means = [metrics_intervals.mean_figure(torch.rand(60, generator=generator)) for _ in range(60)]
    assert np.mean([figure.low <= 0.5 <= figure.high for figure in means]) > 0.85
    none = metrics_intervals.share_figure(torch.zeros(100, dtype=torch.bool))
    assert none.value == 0
    assert 0.03 < none.high < 0.05  # nothing in 100 does not prove that there is nothing


def test_half_sampling_is_exact_for_a_mean() -> None:
    # The variance of a half's mean is s^2 / n, whatever the values; odd numbers leave one more out than in.
    for count in (400, 401):
        values = gaussian(count, 1, 3)[:, 0].double()
        halves = [float(values[part].mean()) for part in metrics_intervals.random_halves(count, 2000)]
        figure = metrics_intervals.half_sampling_figure(float(values.mean()), halves, count)
        expected = 1.96 * float(values.std()) / count**0.5
        assert figure.high - figure.value == pytest.approx(expected, rel=0.05)
