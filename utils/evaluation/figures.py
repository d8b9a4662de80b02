"""Figures with intervals: a property of a finite number of samples carries that number, and a 95 % interval over the
draw of the samples. What they are compared with counts as given.

Half-sampling gives the intervals of figures that are no mean over samples: the delete-d jackknife with d = n / 2 (Shao
and Wu 1989, "A general theory for jackknife variance estimation"). A bootstrap would not do: it repeats samples, and
duplicates narrow a covariance, put zeros into distances of neighbours and ones onto the diagonal of kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

NUM_HALVES = 30
MIN_FOR_HALVES = 4  # samples with a value, for a figure of them
CONFIDENCE = 0.95
HALF_SAMPLING, BOOTSTRAP, WILSON = "half-sampling", "bootstrap", "Wilson"


@dataclass(frozen=True)
class Figure:
    """A measured number, its 95 % interval, how many samples it was measured on, and how the interval was made."""

    value: float
    low: float
    high: float
    num_samples: int
    interval: str
    note: str = ""


def at_most(values: Tensor, count: int, seed: int = 0) -> Tensor:
    """At most `count` rows, drawn at random: samples may stand in the order of their classes."""
    return values[rows_at_most(len(values), count, seed)]


def rows_at_most(total: int, count: int, seed: int = 0) -> Tensor:
    """The rows that `at_most` draws, in order."""
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def random_halves(num_samples: int, count: int = NUM_HALVES, seed: int = 0) -> Tensor:
    """Membership (count, N) bool of `count` random halves of N samples, N // 2 in each, none twice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, num_samples, generator=generator).argsort(dim=1)
    return order < num_samples // 2


def half_sampling_figure(
    value: float,
    of_halves: list[float],
    num_samples: int,
    note: str = "",
    lowest: float = -np.inf,
    highest: float = np.inf,
) -> Figure:
    """`value` and the interval that its spread over random halves tells, within what is possible. Halves are biased as
    small samples are; only their spread is used: with d of n left out, Var(value) = (n - d) / d Var(value of a part).
    """
    from scipy.stats import t

    kept = num_samples // 2
    error = float(np.std(of_halves, ddof=1)) * (kept / (num_samples - kept)) ** 0.5
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(of_halves) - 1)) * error
    low, high = max(value - reach, lowest), min(value + reach, highest)
    return Figure(value, low, high, num_samples, HALF_SAMPLING, note)


def halves_figure(
    statistic: Callable[[np.ndarray], Any],
    values: np.ndarray,
    note: str = "",
    lowest: float = -np.inf,
    highest: float = np.inf,
) -> Figure:
    """A statistic of rows with the interval of half-sampling."""
    of_halves = [float(statistic(values[half])) for half in random_halves(len(values)).numpy()]
    return half_sampling_figure(float(statistic(values)), of_halves, len(values), note, lowest, highest)


def mean_figure(values: Tensor, note: str = "") -> Figure:
    """Mean of a value for each sample (N,), with its bootstrap interval over samples."""
    from scipy.stats import bootstrap

    array = values.double().numpy()
    if len(array) < 2 or array.std() == 0:
        return Figure(float(array.mean()), float(array.mean()), float(array.mean()), len(array), BOOTSTRAP, note)
    generator = np.random.default_rng(0)
    interval = bootstrap(
        (array,), np.mean, n_resamples=1000, batch=100, confidence_level=CONFIDENCE, method="percentile", rng=generator
    ).confidence_interval
    return Figure(float(array.mean()), float(interval.low), float(interval.high), len(array), BOOTSTRAP, note)


def share_figure(hits: Tensor, note: str = "") -> Figure:
    """Share of true values among (N,) bool, with Wilson's interval, which is right near 0 and 1 too."""
    from scipy.stats import binomtest

    count = int(hits.sum())
    interval = binomtest(count, len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return Figure(count / len(hits), float(interval.low), float(interval.high), len(hits), WILSON, note)


def spearman(pairs: np.ndarray) -> float:
    """Rank correlation of pairs (n, 2); 0 where one of the two never changes."""
    from scipy.stats import spearmanr

    if len(pairs) < 2 or (pairs == pairs[0]).all(axis=0).any():
        return 0.0
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


# ---- groups of figures

LOWER, HIGHER, NEITHER = "lower", "higher", ""


class Found(NamedTuple):
    """Figures by name, and the reason why others could not be measured, by name."""

    figures: dict[str, Figure]
    not_measured: dict[str, str]


@dataclass
class Group:
    """Figures that stand in one table: of the same features, or of the same subject."""

    features: str  # their title
    figures: dict[str, Figure]
    not_measured: dict[str, str]


def missing(*names: str, why: str) -> Found:
    """No figures, and the reason why those of these names could not be measured."""
    return Found({}, dict.fromkeys(names, why))


def attempt(names: Sequence[str], function: Callable[[], dict[str, Figure]]) -> Found:
    """The figures that a function measures; where it raises UserError, its message is the reason why those of these
    names could not be measured.
    """
    try:
        return Found(function(), {})
    except UserError as error:
        return missing(*names, why=str(error))


def merged(*parts: Found) -> Found:
    """Figures and reasons of several parts together; of one name the last part's."""
    figures = {name: figure for part in parts for name, figure in part.figures.items()}
    return Found(figures, {name: why for part in parts for name, why in part.not_measured.items()})


def measured_groups(table: Mapping[str, Callable[..., Found]], *evidence: Any, with_reasons: bool) -> list[Group]:
    """A group for each row of a table, title -> function of the evidence, that has figures; `with_reasons`, those that
    have none too, and why.
    """
    found = {title: measure(*evidence) for title, measure in table.items()}
    groups = [Group(title, each.figures, each.not_measured if with_reasons else {}) for title, each in found.items()]
    return [group for group in groups if group.figures or group.not_measured]


# ---- seeds


def over_seeds(trials: Sequence[list[Group]]) -> list[Group]:
    """The mean of each figure over seeds, with the lowest and the highest of them in place of the interval; a single
    seed's figures as they are. A figure that some seed is without is not measured.
    """
    if len(trials) == 1:
        return trials[0]
    found = []
    for title in dict.fromkeys(group.features for groups in trials for group in groups):
        of_title = [group for groups in trials for group in groups if group.features == title]
        names = dict.fromkeys(name for group in of_title for name in group.figures)
        lists = {name: [group.figures[name] for group in of_title if name in group.figures] for name in names}
        figures = {name: mean_of(each) for name, each in lists.items() if len(each) == len(trials)}
        reasons = {name: why for group in of_title for name, why in group.not_measured.items() if name not in figures}
        found.append(Group(title, figures, reasons))
    return found


def mean_of(figures: Sequence[Figure]) -> Figure:
    """One figure of several seeds; the note has their standard deviation and the mean interval of one."""
    values = np.array([figure.value for figure in figures])
    low, high = (float(np.mean([getattr(figure, side) for figure in figures])) for side in ("low", "high"))
    note = f"std {values.std(ddof=1):.2g}; of one seed {low:.4g} to {high:.4g} by {figures[0].interval}"
    note += f"; {figures[0].note}" if figures[0].note else ""
    spread = (float(values.mean()), float(values.min()), float(values.max()))
    return Figure(*spread, figures[0].num_samples, f"lowest and highest of {len(figures)} seeds", note)


MAX_PAIRED = 10_000  # images of either side, drawn at random, where every pair of them counts
