"""What figures of cells need, fitted to the training cells: a classifier of types, and regressors of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.evaluation.figures import Figure, rows_at_most, share_figure
from utils.expression.evaluation.real import Cells, Real, principal_components

MIN_TO_LEARN = 20  # cells with a value, for a regressor
PENALTIES = tuple(10.0**power for power in range(-1, 5))  # of the ridge, among which cross-validation chooses

MAX_TRAINED = 20_000  # cells that a classifier is trained on, drawn at random
STRENGTH = 0.03  # scikit-learn's C


# ---- classifier


@dataclass(frozen=True)
class Classifier:
    """Tells the type of a cell: multinomial logistic regression on log-normalised genes. They are centred and not
    standardised: that would give genes which few cells have as much weight as any, and costs 2 to 3 % of accuracy.
    """

    model: Any
    num_genes: int

    @classmethod
    def fit(cls, train: Cells, seed: int) -> "Classifier":
        """Trained on at most 20,000 cells, drawn at random. Raises UserError without labels or with a single type."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = train.types()
        if len(set(labels)) < 2:
            raise UserError("cells of a single type; a classifier of cell types needs at least two")
        rows = rows_at_most(len(train), MAX_TRAINED, seed).numpy()
        regression = LogisticRegression(C=STRENGTH, max_iter=1000)
        model = make_pipeline(StandardScaler(with_std=False), regression)
        return cls(model.fit(train.log_normalised()[rows], labels[rows]), train.counts.shape[1])

    def accuracy(self, cells: Cells) -> Figure:
        """Share of the cells whose type it tells; the note has the mean over types, in which rare ones count alike.
        Cells that it was trained on say nothing: its own control is held-out real cells.
        Raises UserError without labels and for other genes.
        """
        if cells.counts.shape[1] != self.num_genes:
            raise UserError(f"cells have {cells.counts.shape[1]} genes, and the classifier knows {self.num_genes}")
        labels = cells.types()
        hits = self.model.predict(cells.log_normalised()) == labels
        balanced = np.mean([hits[labels == kind].mean() for kind in sorted(set(labels))])
        return share_figure(torch.as_tensor(hits), f"{balanced:.3f} as the mean over types")


def train_on_synthetic_test_on_real(generated: Cells, test: Cells, seed: int) -> Figure:
    """Accuracy on held-out real cells of a `Classifier` that is trained on generated ones: beside that of one trained
    on as many real cells, what generated cells are worth. Raises UserError as the classifier does. Source: Esteban et
    al. 2017, arXiv 1706.02633.
    """
    return Classifier.fit(generated, seed).accuracy(test)


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
