"""Which metrics of images can be measured in which features, and what is said of the others."""

from dataclasses import replace

import pytest
import torch

from tests.support.features import gaussian
from utils.errors import UserError
from utils.image.evaluation.features import Features
from utils.image.evaluation.figures import METRICS, Evidence, groups_of
from utils.image.evaluation.measured import Measured
from utils.image.evaluation.metrics import Statistics


def extractor(name: str) -> Features:
    """Features of a name, without a network."""
    found = Features.__new__(Features)
    found.name = name
    return found


def measured(count: int, seed: int = 0, **others) -> Measured:
    features = gaussian(count, 4, seed)
    return Measured("x", "F", 16, count, features=features, statistics=Statistics.of(features), **others)


def evidence(of: Features, **changes) -> Evidence:
    known = {"reference": None, "class_labels": None, "captions": None, "training": None, "held_out": None}
    return Evidence(**({"extractor": of, "samples": measured(60)} | known | changes))


def test_every_metric_without_anything_says_what_it_needs():
    ours = extractor("F")
    (group,) = groups_of([evidence(ours)], {ours: list(METRICS)}, required=[])
    assert group.features == "F"
    assert group.figures == {}
    assert list(group.not_measured) == list(METRICS)
    assert all(why.startswith("needs ") for why in group.not_measured.values())


def test_statistics_alone_give_fid_and_nothing_that_needs_images():
    ours = extractor("F")
    of_file = replace(measured(80, seed=1), features=None)
    (group,) = groups_of([evidence(ours, reference=of_file)], {ours: ["fid", "kid", "prdc"]}, required=["fid"])
    assert set(group.figures) == {"fid", "fid_infinity"}
    assert set(group.not_measured) == {"kid", "prdc"}
    assert "statistics alone" in group.not_measured["kid"]


def test_each_extractor_has_the_metrics_that_are_its_own():
    ours, others = extractor("F"), extractor("G")
    known = {"reference": measured(80, seed=1)}
    groups = groups_of(
        [evidence(ours, **known), evidence(others, **known)], {ours: ["kid"], others: ["fid"]}, required=["kid", "fid"]
    )
    assert [(group.features, set(group.figures)) for group in groups] == [
        ("F", {"kid"}),
        ("G", {"fid", "fid_infinity"}),
    ]


def test_a_metric_that_was_asked_for_and_that_no_features_give_is_refused():
    ours, others = extractor("F"), extractor("G")
    evidences = [evidence(ours), evidence(others, reference=measured(80, seed=1))]
    metrics_of = {ours: ["kid", "cmmd"], others: ["kid", "cmmd"]}
    assert "kid" in groups_of(evidences, metrics_of, required=["kid"])[1].figures  # one of the two gives it
    with pytest.raises(UserError, match="--metrics cmmd: needs CLIP features"):
        groups_of(evidences, metrics_of, required=["kid", "cmmd"])


def test_a_classifier_of_fewer_classes_is_refused():
    ours = extractor("F")
    logits = torch.eye(3).repeat(20, 1)
    labels = torch.arange(3).repeat(20)
    asked = {"samples": measured(60, logits=logits), "class_labels": labels}
    (group,) = groups_of([evidence(ours, **asked)], {ours: ["accuracy"]}, required=[])
    assert group.figures["accuracy"].value == 1
    with pytest.raises(UserError, match=r"--classifier: it knows 3 classes, but .* class 3"):
        groups_of([evidence(ours, **asked | {"class_labels": labels + 1})], {ours: ["accuracy"]}, required=[])
