"""Numbers that samples were asked for, as a regressor predicts them, which is fitted to real training data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.evaluation.figures import HIGHER, Figure, halves_figure, rows_at_most, spearman

MIN_TO_LEARN = 20  # training rows with a value, for a regressor


def number_names(requests: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of the numbers that are asked for, in the order of their first appearance."""
    names = (
        name
        for request in requests
        for name, value in request.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Regressor:
    """Predicts a number from features. It stands for a measurement that nobody has made of samples; its own error, on
    held-out data, must be shown beside whatever it says.
    """

    model: Any  # of scikit-learn, fitted

    @classmethod
    def fit(
        cls, model: Any, values: np.ndarray, features_of: Callable[[np.ndarray], np.ndarray], max_rows: int
    ) -> "Regressor":
        """Fitted to at most `max_rows` training rows, drawn at random of those whose value (R,) is finite, and whose
        features (n, D), as `features_of` the rows (n,) says them, are finite too. Raises UserError for fewer than 20.
        """
        known = np.flatnonzero(np.isfinite(values))
        rows = known[rows_at_most(len(known), max_rows).numpy()]
        check_enough(len(rows))
        features = features_of(rows)
        sound = np.isfinite(features).all(axis=1)
        check_enough(int(sound.sum()))
        return cls(model.fit(features[sound], values[rows][sound]))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Features (n, D) -> (n,), NaN where features are not finite."""
        predicted = np.full(len(features), np.nan)
        sound = np.isfinite(features).all(axis=1)
        if sound.any():
            predicted[sound] = self.model.predict(features[sound])
        return predicted


def check_enough(count: int) -> None:
    """Raises UserError for too few training rows."""
    if count < MIN_TO_LEARN:
        raise UserError(f"--training_data: {count} have a value; a regressor needs at least {MIN_TO_LEARN}")


@dataclass(frozen=True)
class Regressors:
    """A regressor for each number that samples were asked for, and the reason why there is none for the others."""

    by_name: dict[str, Regressor]
    reasons: dict[str, str]

    @classmethod
    def learn(cls, names: Sequence[str], learn: Callable[[str], Regressor]) -> "Regressors":
        """Learns each of the numbers; what raises UserError cannot be learned, and its message is the reason."""
        found, reasons = {}, {}
        for name in names:
            try:
                found[name] = learn(name)
            except UserError as error:
                reasons[name] = str(error)
        return cls(found, reasons)

    def not_measured(self) -> dict[str, str]:
        """Why the rank correlation of some numbers cannot be measured."""
        return {f"{name}_spearman": why for name, why in self.reasons.items()}


def spearman_figure(name: str, asked: np.ndarray, predicted: np.ndarray, note: str = "") -> dict[str, Figure]:
    """Rank correlation of what was asked (n,) and what is predicted (n,) of a number."""
    pairs = np.stack([asked, predicted], axis=1)
    return {f"{name}_spearman": halves_figure(spearman, pairs, note, lowest=-1, highest=1)}


def spearman_titles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Titles of `spearman_figure`."""
    return {f"{name}_spearman": (f"{name}: Spearman of asked and predicted", HIGHER) for name in names}
