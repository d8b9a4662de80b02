"""Which figures there are, what each needs, and why one cannot be had: chosen by table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.figures import HIGHER, LOWER, NEITHER, Figure, Group, at_most, rows_at_most
from utils.evaluation.neighbours import (
    COPY_QUANTILE,
    MAX_QUERIES,
    MIN_HELD_OUT,
    copy_figures,
    manifold_figures,
    nearest,
)
from utils.image.evaluation.features import ClipFeatures, Features
from utils.image.evaluation.images import Images
from utils.image.evaluation.measured import Measured, RealImages
from utils.image.evaluation.metrics import (
    accuracy_figure,
    clip_score_figure,
    cmmd_figure,
    fid_figures,
    inception_score_figure,
    kid_figure,
)

MIN_SAMPLES = 20  # fewer have no halves to speak of


@dataclass(frozen=True)
class Evidence:
    """All that a metric may look at, in the features of one extractor."""

    extractor: Features
    samples: Measured
    reference: Measured | None
    class_labels: Tensor | None  # (N,) that the samples were asked to show
    captions: list[str] | None  # that the samples were made for
    training: Measured | None = None
    held_out: Measured | None = None


def gather(images: Images, found: Measured, extractor: Features, real: RealImages) -> Evidence:
    """The evidence of samples in the features of one extractor."""
    sides = (real.of(name, extractor) for name in ("reference", "training_data", "held_out_data"))
    reference, training, held_out = sides
    return Evidence(extractor, found, reference, images.class_labels, images.captions, training, held_out)


@dataclass(frozen=True)
class Metric:
    """`lacks` says what is missing for it, None where nothing is; `figures` computes it."""

    lacks: Callable[[Evidence], str | None]
    figures: Callable[[Evidence], dict[str, Figure]]


def check_counts(names: list[str], extractor: Features, num_samples: int, num_reference: int | None) -> None:
    """Raises UserError where there is too little to measure: for FID both sides need more images than features, or a
    covariance has no full rank and FID tells the number of samples. None is a number that is not known."""
    if num_samples < MIN_SAMPLES:
        raise UserError(f"{num_samples} samples: at least {MIN_SAMPLES} are needed to measure anything; give more")
    sides = [("samples", num_samples)] + ([("reference images", num_reference)] if num_reference else [])
    for side, count in sides if "fid" in names else []:
        if count <= extractor.dim:
            raise UserError(
                f"--metrics fid: {count} {side}, but {extractor.name} has {extractor.dim} features, and their "
                f"covariance needs at least {extractor.dim + 1} images ({5 * extractor.dim} for a small bias); give "
                "more images, features of fewer dimensions, or --metrics without fid: kid does not mind"
            )


def check_held_out(held_out: Images | None, training: Images | None) -> None:
    """Raises UserError for real images that cannot tell what is near: too few, or the training images themselves."""
    if held_out is None or training is None:
        return
    if len(held_out) < MIN_HELD_OUT:
        raise UserError(
            f"--held_out_data: {len(held_out)} images, but the nearest {COPY_QUANTILE:.0%} of them are the measure of "
            f"a copy; give at least {MIN_HELD_OUT}"
        )
    if held_out.identity["data"] == training.identity["data"]:
        raise UserError(
            f"--held_out_data: {held_out.title} is --training_data; give images that the run never saw, such as "
            "another --held_out_data_split"
        )


def lacks_statistics(evidence: Evidence) -> str | None:
    if evidence.reference is None or evidence.reference.statistics is None:
        return "a reference (--reference)"
    return None


def fid(evidence: Evidence) -> dict[str, Figure]:
    assert evidence.samples.features is not None
    assert evidence.reference is not None
    assert evidence.reference.statistics is not None
    return fid_figures(evidence.samples.features, evidence.reference.statistics)


def lacks_features(evidence: Evidence) -> str | None:
    if evidence.reference is None:
        return "a reference (--reference)"
    return "the reference's images: its file holds statistics alone" if evidence.reference.features is None else None


def lacks_clip(evidence: Evidence) -> str | None:
    is_clip = isinstance(evidence.extractor, ClipFeatures)
    return lacks_features(evidence) if is_clip else "CLIP features (--features clip:... or open_clip:...)"


def lacks_logits(evidence: Evidence) -> str | None:
    return "features of a classifier or Inception: CLIP has no classes" if evidence.samples.logits is None else None


def lacks_captions(evidence: Evidence) -> str | None:
    if not isinstance(evidence.extractor, ClipFeatures):
        return "CLIP features (--features clip:... or open_clip:...)"
    if not evidence.captions:
        return "captions of the samples (samples.jsonl of sample.py, or --caption_column)"
    return None


def lacks_labels(evidence: Evidence) -> str | None:
    if evidence.class_labels is None:
        return "labels of the samples (samples.jsonl of sample.py, or --label_column)"
    return lacks_logits(evidence)


def inception_score(evidence: Evidence) -> dict[str, Figure]:
    assert evidence.samples.logits is not None
    return {"inception_score": inception_score_figure(evidence.samples.logits)}


def clip_score(evidence: Evidence) -> dict[str, Figure]:
    assert isinstance(evidence.extractor, ClipFeatures)
    assert evidence.captions is not None
    assert evidence.samples.features is not None
    captions = list(dict.fromkeys(evidence.captions))
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = [row_of[caption] for caption in evidence.captions]
    embeddings = torch.cat([evidence.extractor.text(captions[i : i + 64]) for i in range(0, len(captions), 64)])
    return {"clip_score": clip_score_figure(evidence.samples.features, embeddings[rows])}


def accuracy(evidence: Evidence) -> dict[str, Figure]:
    logits, labels = evidence.samples.logits, evidence.class_labels
    assert logits is not None
    assert labels is not None
    if int(labels.max()) >= logits.shape[1]:
        raise UserError(
            f"--classifier: it knows {logits.shape[1]} classes, but a sample was asked to show class "
            f"{int(labels.max())}; give a classifier of the same classes"
        )
    return {"accuracy": accuracy_figure(logits, labels)}


def lacks_training(evidence: Evidence) -> str | None:
    return None if evidence.training and evidence.held_out else "--training_data and --held_out_data"


def copies(evidence: Evidence) -> dict[str, Figure]:
    """Whether samples lie nearer to the training images than real images do that the run never saw."""
    assert evidence.training is not None
    assert evidence.held_out is not None
    parts = (evidence.samples.features, evidence.training.features, evidence.held_out.features)
    queries, base, unseen = (part for part in parts if part is not None)
    return copy_figures(*(nearest(at_most(part, MAX_QUERIES), base)[0] for part in (queries, unseen)))


def pair(figure: Callable[..., dict[str, Figure]]) -> Callable[[Evidence], dict[str, Figure]]:
    """A figure of two sets of features as one of the evidence."""
    return lambda evidence: figure(evidence.samples.features, evidence.reference and evidence.reference.features)


METRICS: dict[str, Metric] = {
    "fid": Metric(lacks_statistics, fid),
    "kid": Metric(lacks_features, pair(lambda samples, reference: {"kid": kid_figure(samples, reference)})),
    "cmmd": Metric(lacks_clip, pair(lambda samples, reference: {"cmmd": cmmd_figure(samples, reference)})),
    "inception_score": Metric(lacks_logits, inception_score),
    "prdc": Metric(lacks_features, pair(manifold_figures)),
    "clip_score": Metric(lacks_captions, clip_score),
    "accuracy": Metric(lacks_labels, accuracy),
    "copies": Metric(lacks_training, copies),
}

# name -> what stands in tables, and which way is better
TITLES: dict[str, tuple[str, str]] = {
    "fid": ("FID", LOWER),
    "fid_infinity": ("FID, extrapolated", LOWER),
    "kid": ("KID", LOWER),
    "cmmd": ("CMMD", LOWER),
    "inception_score": ("Inception Score", HIGHER),
    "precision": ("precision", HIGHER),
    "recall": ("recall", HIGHER),
    "density": ("density", HIGHER),
    "coverage": ("coverage", HIGHER),
    "clip_score": ("CLIP score", HIGHER),
    "accuracy": ("class accuracy", HIGHER),
    "copies": ("share of copies", LOWER),
    "nearest_ratio": ("distance to training images", NEITHER),
}


def refuse_impossible(names: list[str], evidences: list[Evidence]) -> None:
    """Raises UserError for a metric that was asked for by name and that none of the features can give."""
    for name in names:
        reasons = {METRICS[name].lacks(evidence) for evidence in evidences}
        if None not in reasons:
            raise UserError(f"--metrics {name}: needs {' and '.join(sorted(filter(None, reasons)))}")


def figures_of(evidence: Evidence, names: list[str]) -> Group:
    """The metrics `names`; one that cannot be had is listed with the reason."""
    group = Group(evidence.extractor.name, {}, {})
    for name in names:
        missing = METRICS[name].lacks(evidence)
        if missing:
            group.not_measured[name] = f"needs {missing}"
        else:
            group.figures |= METRICS[name].figures(evidence)
    return group


@dataclass
class Neighbours:
    """Samples beside the real images that they are nearest to, the nearest first."""

    source: str  # "training_data" or "reference"
    features: str
    sample_rows: list[int]
    real_rows: list[int]
    distances: list[float]

    def caption(self) -> str:
        where = "training images" if self.source == "training_data" else "images of the reference"
        reach = f"{self.distances[0]:.3g} to {self.distances[-1]:.3g}"
        return f"samples nearest to {where}, at distances of {reach} in {self.features}"


def neighbours_of(evidence: Evidence, count: int = 10) -> Neighbours | None:
    """The `count` samples, of at most MAX_QUERIES, that lie nearest to a training image, or else to one of the
    reference; None where there are no features of either."""
    source = "training_data" if evidence.training else "reference"
    real, samples = evidence.training or evidence.reference, evidence.samples.features
    if real is None or real.features is None or samples is None:
        return None
    asked = rows_at_most(len(samples), MAX_QUERIES)
    distances, rows = nearest(samples[asked], real.features)
    first = distances.argsort()[:count]
    return Neighbours(
        source, evidence.extractor.name, asked[first].tolist(), rows[first].tolist(), distances[first].tolist()
    )
