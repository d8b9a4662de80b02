"""An evaluation of images from its arguments: real ones, samples of each point of a sweep, report."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from PIL import Image

from utils.args.parsing import saved_arguments
from utils.args.sampling import sweep_points
from utils.diffusion import sampling
from utils.evaluation.report import Point, Report, described
from utils.image import pictures
from utils.image.codec import measure_shape
from utils.image.evaluation.args import DEFAULT_SAMPLES_OF_A_RUN, is_statistics_file
from utils.image.evaluation.features import ClassifierFeatures, Features, PixelFeatures, load_features
from utils.image.evaluation.figures import (
    TITLES,
    Evidence,
    check_counts,
    check_held_out,
    gather,
    groups_of,
    neighbours_of,
)
from utils.image.evaluation.images import Columns, Images, conversions, open_images
from utils.image.evaluation.measured import RealImages, measure
from utils.image.sampler import Sampler, read_prompts, requested_images, save_images
from utils.runs.load import next_folder


def load_extractors(args: Namespace) -> dict[Features, list[str]]:
    """The extractors of the flags, each with the metrics that are measured in its features."""
    device = sampling.usable_device(args.device)
    metrics_of = {load_features(spec, device): args.metrics for spec in args.features}
    if args.training_data and "copies" in args.metrics:
        metrics_of[PixelFeatures()] = ["copies"]
    if args.classifier:
        classifier = ClassifierFeatures.load(args.classifier, device, "--classifier")
        same = next((each for each in metrics_of if each.identity == classifier.identity), classifier)
        metrics_of[same] = [*metrics_of.get(same, []), "accuracy"]
    return metrics_of


def open_real(args: Namespace, metrics_of: dict[Features, list[str]], num_samples: int) -> RealImages:
    """The real images that the flags name, and what is known of them; refuses too few of them for the metrics."""
    is_file = is_statistics_file(args.reference)
    captions_of = args.caption_column if args.samples is None else None  # the reference's become prompts
    wanted = {  # name -> what, split, column of captions, and how many: a copy could be of any training image
        "reference": (None if is_file else args.reference, args.reference_split, captions_of, args.num_reference),
        "training_data": (args.training_data, args.training_data_split, None, None),
        "held_out_data": (args.held_out_data, args.held_out_data_split, None, args.num_reference),
    }
    sources = {}
    for name, (what, split, caption_column, limit) in wanted.items():
        if what is not None:
            columns = Columns(args.image_column, None, caption_column)
            sources[name] = open_images(what, split, f"--{name}", columns, limit)
    num_reference = len(sources["reference"]) if "reference" in sources else None
    extractors = [each for each, names in metrics_of.items() if names != ["accuracy"]]  # real images are of no request
    for extractor in extractors:
        check_counts(metrics_of[extractor], extractor, num_samples, num_reference)
    check_held_out(sources.get("held_out_data"), sources.get("training_data"))
    statistics_file = args.reference if is_file else None
    return RealImages(sources, statistics_file, extractors, args.feature_batch_size, Path(args.statistics_dir))


def sample_point(args: Namespace, real: RealImages, folder: Path) -> tuple[Images, dict[str, Any]]:
    """Samples the run as the flags of one point say, as sample.py does -> the samples, which lie in `folder`, and the
    settings.
    """
    run_dir = Path(args.model)
    sampler = Sampler.of(args, run_dir)
    captions = real.sources["reference"].captions or [] if "reference" in real.sources else []
    prompts = (args.prompt or []) + read_prompts(args.prompts_file) + captions
    asked = requested_images(sampler.pipeline, run_dir, prompts, args.class_labels, args.negative_prompt)
    requests = [asked[i % len(asked)] for i in range(args.num_samples)]
    settings = sampler.settings(requests)
    size = sampler.pipeline.denoiser.config.sample_size * measure_shape(sampler.pipeline.vae)[1]
    real.measure(args.resolution or size)  # before the samples: what does not fit shows at once
    images = sampler.sample_all(requests, args.seed, args.batch_size, args.mixed_precision)
    folder.mkdir(parents=True)
    save_images(folder, images, requests, settings, args.seed)
    return open_images(str(folder), "train", "--model", Columns()), settings


def pictures_of(
    samples: Images, evidences: list[Evidence], real: RealImages, resolution: int
) -> list[tuple[str, Image.Image]]:
    """Samples by themselves, and beside the real images that they are nearest to in each kind of features."""
    shown = [("samples", pictures.grid_of_samples(samples, resolution))]
    for evidence in evidences:
        near = neighbours_of(evidence)
        if near is not None and near.source in real.sources:
            source = real.sources[near.source]
            shown.append((near.caption(), pictures.grid_of_neighbours(samples, source, near, resolution)))
    return shown


def evaluate(args: Namespace) -> None:
    """`evaluate.py --modality image`."""
    # Load
    metrics_of = load_extractors(args)
    given = None
    if args.samples is not None:
        columns = Columns(args.image_column, args.label_column, args.caption_column)
        given = open_images(args.samples, args.samples_split, "--samples", columns, args.num_samples)
        args.num_samples = len(given)
    else:
        args.num_samples = args.num_samples or DEFAULT_SAMPLES_OF_A_RUN
    real = open_real(args, metrics_of, args.num_samples)
    output_dir = Path(args.output_dir) if args.output_dir else None
    output_dir = output_dir or next_folder((Path(args.model) if args.model else Path("runs")) / "evaluated")

    # Measure
    points, notes = [], []
    settings: dict[str, Any] = {}
    swept: dict[str, Any] = {}
    for swept in sweep_points(args):
        name = " ".join(f"{key} {value:g}" for key, value in swept.items())
        if given is None:
            chosen = Namespace(**(vars(args) | swept))
            folder = output_dir / "samples" / (name.replace(" ", "_") or "all")
            samples, settings = sample_point(chosen, real, folder)
        else:
            samples = given
        resolution = args.resolution or samples.side()
        real.measure(resolution)
        extractors, same_size = [*metrics_of], args.resolution is None
        measured = measure(samples, extractors, resolution, args.feature_batch_size, same_size=same_size)
        notes += conversions(f"{name} samples".strip(), len(samples), samples.seen)
        evidences = [
            gather(samples, each, extractor, real) for each, extractor in zip(measured, extractors, strict=True)
        ]
        groups = groups_of(evidences, metrics_of, required=args.metrics if "metrics" in args.given else [])
        points.append(Point(name, groups, pictures_of(samples, evidences, real, resolution)))

    # Report
    facts = {
        "samples": f"{args.samples or args.model} ({args.num_samples} images of {resolution} x {resolution})",
        **{name: f"{images.title} ({len(images)} images)" for name, images in real.sources.items()},
    }
    if settings:
        facts["sampling"] = described(settings, without=swept)
    if real.statistics_file:
        facts["reference"] = f"statistics in {real.statistics_file}"
    report = Report(
        facts=facts,
        points=points,
        titles=TITLES,
        notes=list(dict.fromkeys(real.notes() + notes)),
        sweep=args.sweep[0] if args.sweep else None,
        arguments=saved_arguments(args),
    )
    report.write(output_dir)
    print(report.text())
    print(f"metrics.json and report.html in {output_dir}")
