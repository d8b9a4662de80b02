"""The accuracy of a judge."""

import numpy as np
import pytest

from tests.support.cells.typed import control, real, relabelled
from utils.expression.evaluation.judge import Classifier


def test_accuracy_is_the_share_of_hits() -> None:
    classifier = Classifier.fit(real(), 0)
    figure = classifier.accuracy(control())
    hits = classifier.model.predict(control().log_normalised()) == control().labels
    assert (figure.value, figure.num_samples) == (hits.mean(), 240)
    few = np.concatenate([np.arange(60), [60, 120, 180]])  # of the other types one each
    labels = control().labels[few].copy()
    labels[60:] = "B"
    labels[0] = "unheard of"  # a type that it was not taught
    figure = classifier.accuracy(relabelled(control().take(few), labels))
    assert figure.value == pytest.approx(59 / 63, abs=2 / 63)
    assert float(figure.note.split()[0]) == pytest.approx(0.5 * 59 / 62, abs=0.02)
