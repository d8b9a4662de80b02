"""What figures of cells need, fitted to the training cells: a classifier of types, and regressors of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.evaluation.figures import rows_at_most
from utils.expression.evaluation.cells import Cells, principal_components
from utils.expression.evaluation.markers import MAX_TRAINED, Classifier
from utils.expression.evaluation.real import Real

MIN_TO_LEARN = 20  # cells with a value, for a regressor
PENALTIES = tuple(10.0**power for power in range(-1, 5))  # of the ridge, among which cross-validation chooses


class Regressor:
    """A number of cells from their log-normalised genes, by ridge regression on principal components of real training
    cells. How far it can be believed shows on held-out cells, and must stand beside whatever it says.
    """

    def __init__(self, training: Cells, values: np.ndarray):
        """Fitted to the cells whose value (R,) is finite. Raises UserError for fewer than 20."""
        from sklearn.linear_model import RidgeCV

        known = np.flatnonzero(np.isfinite(values))
        if len(known) < MIN_TO_LEARN:
            raise UserError(f"{len(known)} training cells have a value; a regressor needs at least {MIN_TO_LEARN}")
        rows = known[rows_at_most(len(known), MAX_TRAINED).numpy()]
        genes = training.log_normalised()[rows]
        self.components = principal_components(genes)
        self.model: Any = RidgeCV(alphas=PENALTIES).fit(self.components.transform(genes), values[rows])

    def predict(self, cells: Cells) -> np.ndarray:
        """(n,)."""
        return self.model.predict(self.components.transform(cells.log_normalised()))


@dataclass
class Judge:
    """What all columns are judged by, and why some of it cannot be had."""

    real: Real
    why_unlabelled: str  # of samples without types
    classifier: Classifier | None = None
    regressors: dict[str, Regressor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of numbers that cannot be predicted

    @classmethod
    def learn(cls, real: Real, numbers: Sequence[str], why_unlabelled: str) -> "Judge":
        """Fits the classifier, where there are types, and a regressor of each of the numbers."""
        judge = cls(real, why_unlabelled)
        if real.training is None or real.training_cells is None:
            judge.reasons = dict.fromkeys(numbers, "needs --training_data, which a regressor learns it from")
            return judge
        if real.label_column is not None:
            judge.classifier = Classifier.fit(real.training_cells, seed=0)
        for name in numbers:
            try:
                judge.regressors[name] = Regressor(real.training_cells, real.training.obs[name])
            except UserError as error:
                judge.reasons[name] = str(error)
        return judge

    def tells_types_of(self, cells: Cells) -> bool:
        """Whether cells have no types but those that the classifier takes them for."""
        return cells.labels is None and self.classifier is not None

    def types_of(self, cells: Cells) -> np.ndarray | None:
        """The types of cells, or those that the classifier takes them for; None where there is none either."""
        if self.classifier is None or not self.tells_types_of(cells):
            return cells.labels
        return self.classifier.model.predict(cells.log_normalised())
