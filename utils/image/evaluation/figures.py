"""Which figures there are, what each needs, and why one cannot be had: chosen by table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.figures import (
    HIGHER,
    LOWER,
    NEITHER,
    Figure,
    Found,
    Group,
    at_most,
    merged,
    missing,
    rows_at_most,
)
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
NO_REFERENCE = "needs a reference (--reference)"
NO_CLIP = "needs CLIP features (--features clip:... or open_clip:...)"
NO_CLASSES = "needs features of a classifier or Inception: CLIP has no classes"


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

    @property
    def features(self) -> Tensor:
        """Features (N, D) of the samples."""
        assert self.samples.features is not None
        return self.samples.features


Metric = Callable[[Evidence], Found]


def gather(images: Images, found: Measured, extractor: Features, real: RealImages) -> Evidence:
    """The evidence of samples in the features of one extractor."""
    sides = (real.of(name, extractor) for name in ("reference", "training_data", "held_out_data"))
    reference, training, held_out = sides
    return Evidence(extractor, found, reference, images.class_labels, images.captions, training, held_out)


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


def fid(evidence: Evidence) -> Found:
    """FID, against images or against statistics alone."""
    if evidence.reference is None or evidence.reference.statistics is None:
        return missing("fid", why=NO_REFERENCE)
    return Found(fid_figures(evidence.features, evidence.reference.statistics), {})


def against_reference(name: str, figures: Callable[[Tensor, Tensor], dict[str, Figure]]) -> Metric:
    """A metric that compares the features (N, D) of samples with those of the reference (M, D)."""

    def metric(evidence: Evidence) -> Found:
        if evidence.reference is None:
            return missing(name, why=NO_REFERENCE)
        if evidence.reference.features is None:
            return missing(name, why="needs the reference's images: its file holds statistics alone")
        return Found(figures(evidence.features, evidence.reference.features), {})

    return metric


def of_clip(name: str, metric: Metric) -> Metric:
    """A metric that is defined in CLIP features only."""
    return lambda evidence: (
        metric(evidence) if isinstance(evidence.extractor, ClipFeatures) else missing(name, why=NO_CLIP)
    )


def inception_score(evidence: Evidence) -> Found:
    """Inception Score, by the classes of the extractor."""
    if evidence.samples.logits is None:
        return missing("inception_score", why=NO_CLASSES)
    return Found({"inception_score": inception_score_figure(evidence.samples.logits)}, {})


def clip_score(evidence: Evidence) -> Found:
    """CLIP score: how near each sample lies to its own caption."""
    if not evidence.captions:
        why = "needs captions of the samples (samples.jsonl of sample.py, or --caption_column)"
        return missing("clip_score", why=why)
    assert isinstance(evidence.extractor, ClipFeatures)
    captions = list(dict.fromkeys(evidence.captions))
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = [row_of[caption] for caption in evidence.captions]
    embeddings = torch.cat([evidence.extractor.text(captions[i : i + 64]) for i in range(0, len(captions), 64)])
    return Found({"clip_score": clip_score_figure(evidence.features, embeddings[rows])}, {})


def accuracy(evidence: Evidence) -> Found:
    """Share of samples that a classifier takes for their class. Raises UserError for a classifier of fewer classes."""
    logits, labels = evidence.samples.logits, evidence.class_labels
    if labels is None:
        return missing("accuracy", why="needs labels of the samples (samples.jsonl of sample.py, or --label_column)")
    if logits is None:
        return missing("accuracy", why=NO_CLASSES)
    if int(labels.max()) >= logits.shape[1]:
        raise UserError(
            f"--classifier: it knows {logits.shape[1]} classes, but a sample was asked to show class "
            f"{int(labels.max())}; give a classifier of the same classes"
        )
    return Found({"accuracy": accuracy_figure(logits, labels)}, {})


def copies(evidence: Evidence) -> Found:
    """Whether samples lie nearer to the training images than real images do that the run never saw."""
    if evidence.training is None or evidence.held_out is None:
        return missing("copies", why="needs --training_data and --held_out_data")
    base, unseen = evidence.training.features, evidence.held_out.features
    assert base is not None
    assert unseen is not None
    distances = (nearest(at_most(part, MAX_QUERIES), base)[0] for part in (evidence.features, unseen))
    return Found(copy_figures(*distances), {})


METRICS: dict[str, Metric] = {
    "fid": fid,
    "kid": against_reference("kid", lambda samples, reference: {"kid": kid_figure(samples, reference)}),
    "cmmd": of_clip(
        "cmmd", against_reference("cmmd", lambda samples, reference: {"cmmd": cmmd_figure(samples, reference)})
    ),
    "inception_score": inception_score,
    "prdc": against_reference("prdc", manifold_figures),
    "clip_score": of_clip("clip_score", clip_score),
    "accuracy": accuracy,
    "copies": copies,
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


def groups_of(
    evidences: Sequence[Evidence], metrics_of: Mapping[Features, Sequence[str]], required: Sequence[str]
) -> list[Group]:
    """The metrics of each extractor as a group; one that cannot be measured is listed with the reason. Raises
    UserError for a metric of `required` that none of the features can give.
    """
    by_metric = [{name: METRICS[name](each) for name in metrics_of[each.extractor]} for each in evidences]
    for name in required:
        tried = [found[name] for found in by_metric if name in found]
        if not any(each.figures for each in tried):
            reasons = {why for each in tried for why in each.not_measured.values()}
            raise UserError(f"--metrics {name}: {' and '.join(sorted(reasons))}")
    return [
        Group(each.extractor.name, *merged(*found.values())) for each, found in zip(evidences, by_metric, strict=True)
    ]


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
