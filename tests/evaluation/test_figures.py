"""Intervals that hold the truth as often as they say, and groups of figures with the reasons why some are missing."""

import numpy as np
import pytest
import torch

from tests.support.features import gaussian
from utils.errors import UserError
from utils.evaluation import figures as metrics_intervals
from utils.evaluation.figures import (
    Figure,
    Found,
    Group,
    attempt,
    mean_of,
    measured_groups,
    merged,
    missing,
    over_seeds,
)
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


# ---- groups of figures


def test_what_raises_is_a_reason_and_what_does_not_is_a_figure() -> None:
    figure = Figure(1, 0, 2, 10, "Wilson")

    def fails() -> dict[str, Figure]:
        raise UserError("too few")

    assert attempt(("x",), lambda: {"x": figure}) == Found({"x": figure}, {})
    assert (
        attempt(("y", "z"), fails) == missing("y", "z", why="too few") == Found({}, {"y": "too few", "z": "too few"})
    )
    both = merged(attempt(("x",), lambda: {"x": figure}), attempt(("y",), fails))
    assert both == Found({"x": figure}, {"y": "too few"})


def test_groups_of_a_table_are_those_that_have_something_to_say() -> None:
    figure = Figure(1, 0, 2, 10, "Wilson")
    table = {
        "Figures": lambda count, name: Found({name: figure}, {"a": "x"}) if count else missing(name, why="none"),
        "Reasons": lambda count, name: missing(name, why="y"),
        "Nothing": lambda count, name: Found({}, {}),
    }
    with_reasons = [Group("Figures", {"f": figure}, {"a": "x"}), Group("Reasons", {}, {"f": "y"})]
    assert measured_groups(table, 3, "f", with_reasons=True) == with_reasons
    assert measured_groups(table, 3, "f", with_reasons=False) == [Group("Figures", {"f": figure}, {})]
    assert measured_groups(table, 0, "f", with_reasons=False) == []


def test_mean_over_seeds() -> None:
    figures = [Figure(value, value - 0.1, value + 0.3, 50, "DeLong", "against 50") for value in (0.5, 0.7, 0.9)]
    mean = mean_of(figures)
    assert (mean.value, mean.low, mean.high, mean.num_samples) == (pytest.approx(0.7), 0.5, 0.9, 50)
    assert mean.interval == "lowest and highest of 3 seeds"
    assert mean.note == "std 0.2; of one seed 0.6 to 1 by DeLong; against 50"
    trials = [[Group("A", {"x": figures[0], "y": figures[0]}, {})], [Group("A", {"x": figures[2]}, {"y": "too few"})]]
    (group,) = over_seeds(trials)
    assert group.figures["x"].value == pytest.approx(0.7)
    assert set(group.figures) == {"x"}
    assert group.not_measured == {"y": "too few"}
    assert over_seeds(trials[:1]) == trials[0]
