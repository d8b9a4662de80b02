"""What figures of cells need, fitted to the training cells: a classifier of types, and regressors of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.evaluation.figures import Figure, rows_at_most, share_figure
from utils.evaluation.regressors import Regressor, Regressors
from utils.expression.evaluation.real import Cells, Real, principal_components

PENALTIES = tuple(10.0**power for power in range(-1, 5))  # of the ridge, among which cross-validation chooses
MAX_TRAINED = 20_000  # cells that a classifier or a regressor is trained on, drawn at random
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


class RidgeOnComponents:
    """Ridge regression on principal components, as scikit-learn's estimators are called."""

    def fit(self, genes: np.ndarray, values: np.ndarray) -> "RidgeOnComponents":
        """Fits both to log-normalised genes (n, G) and values (n,)."""
        from sklearn.linear_model import RidgeCV

        self.components = principal_components(genes)
        self.ridge: Any = RidgeCV(alphas=PENALTIES).fit(self.components.transform(genes), values)
        return self

    def predict(self, genes: np.ndarray) -> np.ndarray:
        """Log-normalised genes (n, G) -> (n,)."""
        return self.ridge.predict(self.components.transform(genes))


def number_regressor(real: Real, name: str) -> Regressor:
    """A regressor of a number from the log-normalised genes of cells. Raises UserError without training cells, and for
    fewer than 20 with a value.
    """
    if real.training is None or real.training_cells is None:
        raise UserError("needs --training_data, which a regressor learns it from")
    genes = real.training_cells.log_normalised()
    return Regressor.fit(
        RidgeOnComponents(), real.training.obs[name], features_of=lambda rows: genes[rows], max_rows=MAX_TRAINED
    )


@dataclass(frozen=True)
class Judge:
    """What every set of cells is judged by."""

    real: Real
    why_unlabelled: str  # of samples without types
    classifier: Classifier | None  # None without types or without training cells
    regressors: Regressors

    @classmethod
    def learn(cls, real: Real, numbers: Sequence[str], why_unlabelled: str) -> "Judge":
        """Fits the classifier, where there are types, and a regressor of each of the numbers."""
        classifier = None
        if real.training_cells is not None and real.label_column is not None:
            classifier = Classifier.fit(real.training_cells, seed=0)
        return cls(real, why_unlabelled, classifier, Regressors.learn(numbers, partial(number_regressor, real)))

    def tells_types_of(self, cells: Cells) -> bool:
        """Whether cells have no types but those that the classifier takes them for."""
        return cells.labels is None and self.classifier is not None

    def types_of(self, cells: Cells) -> np.ndarray | None:
        """The types of cells, or those that the classifier takes them for; None where there is none either."""
        if self.classifier is None or not self.tells_types_of(cells):
            return cells.labels
        return self.classifier.model.predict(cells.log_normalised())
