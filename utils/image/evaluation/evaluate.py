"""An evaluation of images from its arguments: real ones, samples of each point of a sweep, report."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from utils.args.parsing import saved_arguments
from utils.args.sampling import sweep_points
from utils.diffusion import sampling
from utils.evaluation.report import Point, Report, described
from utils.image import pictures
from utils.image import sampler as requests
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
from utils.image.pipeline import load_run
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
    folder = Path(args.statistics_dir)
    return RealImages(sources, statistics_file, extractors, batch_size=args.feature_batch_size, folder=folder)


def prepare_sampling(args: Namespace, run_dir: Path, captions: list[str]):
    """The run with its sampler, and what it is asked for: (pipeline, requests, settings, guide), as in sample.py."""
    pipeline = load_run(run_dir, args.ema_sigma_rel)
    guide = requests.load_guide(args.guide_model, pipeline) if args.guide_model else None
    pipeline.scheduler = sampling.sampling_scheduler(pipeline.scheduler, args.scheduler, args.num_inference_steps)
    device = sampling.usable_device(args.device)
    pipeline.to(device)
    if guide is not None:
        guide.to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = (args.prompt or []) + requests.read_prompts(args.prompts_file) + captions
    asked = requests.requested_images(pipeline, run_dir, prompts, args.class_labels, args.negative_prompt)
    settings = requests.guidance_settings(
        pipeline,
        args.guidance_scale,
        args.guidance_interval,
        args.guidance_rescale,
        args.num_inference_steps,
        with_guide=guide is not None,
        with_negative_prompt=args.negative_prompt is not None,
    )
    return pipeline, [asked[i % len(asked)] for i in range(args.num_samples)], settings, guide


def sample_into(folder: Path, args: Namespace, run_dir: Path, pipeline, wanted, settings, guide) -> None:
    """Samples as sample.py does, and leaves what it leaves."""
    images = []
    with tqdm(total=len(wanted), unit=" images", desc="samples", leave=False) as progress:
        for batch in requests.sample(
            pipeline, wanted, settings, args.seed, args.batch_size, args.mixed_precision, guide_model=guide
        ):
            images += batch
            progress.update(len(batch))
    settings |= {name: getattr(args, name) for name in ("guide_model", "ema_sigma_rel") if getattr(args, name)}
    settings |= {"model": str(run_dir), "scheduler": type(pipeline.scheduler).__name__}
    folder.mkdir(parents=True)
    requests.save_images(folder, images, wanted, settings, args.seed)


def sample_point(args: Namespace, real: RealImages, folder: Path) -> tuple[Images, dict[str, Any]]:
    """Samples the run as the flags of one point say -> the samples, which lie in `folder`, and the settings."""
    captions = real.sources["reference"].captions or [] if "reference" in real.sources else []
    run_dir = Path(args.model)
    pipeline, wanted, settings, guide = prepare_sampling(args, run_dir, captions)
    size = pipeline.denoiser.config.sample_size * measure_shape(pipeline.vae)[1]
    real.measure(args.resolution or size)  # before the samples: what does not fit shows at once
    sample_into(folder, args, run_dir, pipeline, wanted, settings, guide)
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
