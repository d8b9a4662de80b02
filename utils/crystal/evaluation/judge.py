"""What figures of crystals need: a regressor of properties, a hull of energies, and what is found of each crystal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from utils.crystal.data.table import CrystalTable
from utils.crystal.evaluation.metrics import (
    MAX_COMPARED,
    energies,
    energy_above_hull,
    fingerprints,
    is_compositionally_valid,
)
from utils.crystal.evaluation.samples import Column, Real, number_columns
from utils.crystal.matching import is_structurally_valid, novel, unique
from utils.crystal.structure import Crystal, counts_of
from utils.errors import UserError
from utils.evaluation.figures import rows_at_most

MIN_TO_LEARN = 20  # crystals with a value, for a regressor


class Regressor:
    """A property of crystals from their fingerprints, by gradient-boosted trees fitted to real training crystals. It
    stands for a calculation that nobody has made of samples; its own error must be shown beside whatever it says.
    """

    def __init__(self, training: CrystalTable, name: str):
        """Raises UserError for fewer than 20 training crystals that have a value."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        known = np.flatnonzero(np.isfinite(number_columns(training)[name]))
        rows = known[rows_at_most(len(known), MAX_COMPARED).numpy()]
        features, values = fingerprints(training.take(rows).crystals()), training.columns[name][rows]
        sound = np.isfinite(features).all(axis=1)
        if sound.sum() < MIN_TO_LEARN:
            raise UserError(
                f"--training_data: {int(sound.sum())} crystals with a value of {name}; a regressor needs at least "
                f"{MIN_TO_LEARN}"
            )
        self.model = HistGradientBoostingRegressor(random_state=0).fit(features[sound], values[sound])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Fingerprints (n, D) -> (n,), NaN for what has none."""
        predicted = np.full(len(features), np.nan)
        sound = np.isfinite(features).all(axis=1)
        if sound.any():
            predicted[sound] = self.model.predict(features[sound])
        return predicted


def all_fingerprints(crystals: Sequence[Crystal]) -> np.ndarray:
    """`fingerprints` of any number of crystals, in their order."""
    parts = [crystals[i : i + MAX_COMPARED] for i in range(0, len(crystals), MAX_COMPARED)]
    return np.concatenate([fingerprints(part) for part in parts])


class Hull:
    """Energies above the convex hull of training crystals, all by one calculator: those that a column e_above_hull
    calls stable, or all of them where there is none.
    """

    def __init__(self, training: CrystalTable, calculator: Any):
        self.training, self.calculator = training, calculator
        above = number_columns(training).get("e_above_hull")
        rows = range(len(training)) if above is None else np.flatnonzero(above <= 1e-6)
        self.elements = {row: set(training.crystal(row).atomic_numbers.tolist()) for row in map(int, rows)}
        self.known: dict[int, float | None] = {}  # by row, computed when it is needed

    def above(self, crystals: Sequence[Crystal]) -> np.ndarray:
        """(n,) in eV per atom; NaN where the calculator fails, or the hull lacks an element."""
        found = np.full(len(crystals), np.nan)
        for i, energy in enumerate(energies(crystals, self.calculator)):
            if energy is not None:
                counts = counts_of(crystals[i].atomic_numbers)
                above = energy_above_hull(counts, energy, self.entries(set(counts)))
                found[i] = np.nan if above is None else above
        return found

    def entries(self, elements: set[int]) -> list[tuple[dict[int, int], float]]:
        """The crystals that consist of these elements alone, with their energies."""
        rows = [row for row, its in self.elements.items() if its <= elements]
        new = [row for row in rows if row not in self.known]
        of_new = energies([self.training.crystal(row) for row in new], self.calculator)
        self.known |= dict(zip(new, of_new, strict=True))
        energy_of = {row: energy for row in rows if (energy := self.known[row]) is not None}
        return [(counts_of(self.training.crystal(row).atomic_numbers), energy) for row, energy in energy_of.items()]


@dataclass
class Judge:
    """What all columns are judged by."""

    real: Real
    held_out: Column
    num_processes: int
    timeout_s: float
    calculator: Any = None
    regressors: dict[str, Regressor] = field(init=False)
    reasons: dict[str, str] = field(init=False)  # of asked properties that cannot be predicted
    hull: Hull | None = field(init=False)

    def __post_init__(self) -> None:
        self.regressors, self.reasons = {}, {}
        training = self.real.training
        self.hull = Hull(training, self.calculator) if training is not None and self.calculator is not None else None

    def learn(self, requests: Sequence[dict[str, Any]]) -> None:
        """Fits a regressor to each property that is asked for."""
        for name in properties_of(requests):
            if self.real.training is None:
                self.reasons[name] = "needs --training_data, which a regressor learns it from"
            elif name not in number_columns(self.real.training):
                self.reasons[name] = f"--training_data has no column of numbers {name}"
            elif name not in number_columns(self.real.held_out):
                self.reasons[name] = f"--reference has no column of numbers {name}: what its error is, nobody knows"
            elif name not in self.regressors:
                self.regressors[name] = Regressor(self.real.training, name)


def properties_of(requests: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the numbers that are asked for."""
    return list(
        dict.fromkeys(
            name
            for request in requests
            for name, value in request.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        )
    )


@dataclass
class Evidence:
    """What is found of each crystal of a column, once, when it is needed."""

    column: Column
    judge: Judge

    @cached_property
    def structural(self) -> np.ndarray:
        """(n,) bool."""
        return np.array([is_structurally_valid(each) for each in self.column.crystals])

    @cached_property
    def valid(self) -> np.ndarray:
        """(n,) bool: in structure and composition."""
        return self.structural & self.compositional

    @cached_property
    def compositional(self) -> np.ndarray:
        """(n,) bool."""
        return np.array([is_compositionally_valid(each.atomic_numbers) for each in self.column.crystals])

    @cached_property
    def is_unique(self) -> np.ndarray:
        """(n,) bool, False where the structure is not valid."""
        return self.structural & unique(self.column.crystals, self.judge.num_processes, self.judge.timeout_s)

    @cached_property
    def is_novel(self) -> np.ndarray | None:
        """(n,) bool, False where the structure is not valid; None without training crystals."""
        training = self.judge.real.training
        if training is None:
            return None
        how = (self.judge.num_processes, self.judge.timeout_s)
        return self.structural & novel(self.column.crystals, training.crystals(), *how)
