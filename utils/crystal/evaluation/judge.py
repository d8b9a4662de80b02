"""What figures of crystals need: regressors of properties, a hull of energies, and facts about each crystal."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from utils.crystal.evaluation.samples import Real, SampleSet, number_columns
from utils.crystal.matching import is_structurally_valid, novel, unique
from utils.crystal.structure import Crystal, counts_of
from utils.errors import UserError
from utils.evaluation.regressors import Regressor, Regressors, number_names


def property_regressor(real: Real, name: str) -> Regressor:
    """A regressor of a property from the fingerprints of crystals, by gradient-boosted trees. Raises UserError where
    the property is not known of training crystals and of held-out ones.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    training = real.training
    if training is None:
        raise UserError("needs --training_data, which a regressor learns it from")
    if name not in number_columns(training):
        raise UserError(f"--training_data has no column of numbers {name}")
    if name not in number_columns(real.held_out):
        raise UserError(f"--reference has no column of numbers {name}: what its error is, nobody knows")
    return Regressor.fit(
        HistGradientBoostingRegressor(random_state=0),
        number_columns(training)[name],
        features_of=lambda rows: fingerprints(training.take(rows).crystals()),
        max_rows=MAX_COMPARED,
    )


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


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What every set of crystals is judged by."""

    real: Real
    held_out: SampleSet
    regressors: Regressors
    hull: Hull | None
    calculator: Any  # of ASE; None without --calculator
    num_processes: int
    timeout_s: float

    @classmethod
    def learn(
        cls,
        real: Real,
        held_out: SampleSet,
        requests: Sequence[dict[str, Any]],
        *,
        calculator: Any,
        num_processes: int,
        timeout_s: float,
    ) -> "Judge":
        """Fits a regressor to each property that is asked for; the hull needs training crystals and a calculator."""
        return cls(
            real=real,
            held_out=held_out,
            regressors=Regressors.learn(number_names(requests), partial(property_regressor, real)),
            hull=None if real.training is None or calculator is None else Hull(real.training, calculator),
            calculator=calculator,
            num_processes=num_processes,
            timeout_s=timeout_s,
        )


@dataclass
class Evidence:
    """What is found out about each crystal of a set, once, when it is needed."""

    samples: SampleSet
    judge: Judge

    @cached_property
    def structural(self) -> np.ndarray:
        """(n,) bool: valid in structure."""
        return np.array([is_structurally_valid(each) for each in self.samples.crystals])

    @cached_property
    def valid(self) -> np.ndarray:
        """(n,) bool: valid in structure and composition."""
        return self.structural & self.compositional

    @cached_property
    def compositional(self) -> np.ndarray:
        """(n,) bool: valid in composition."""
        return np.array([is_compositionally_valid(each.atomic_numbers) for each in self.samples.crystals])

    @cached_property
    def is_unique(self) -> np.ndarray:
        """(n,) bool, False where the structure is not valid."""
        return self.structural & unique(self.samples.crystals, self.judge.num_processes, self.judge.timeout_s)

    @cached_property
    def is_novel(self) -> np.ndarray | None:
        """(n,) bool, False where the structure is not valid; None without training crystals."""
        training = self.judge.real.training
        if training is None:
            return None
        how = (self.judge.num_processes, self.judge.timeout_s)
        return self.structural & novel(self.samples.crystals, training.crystals(), *how)
