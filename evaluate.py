"""Measures images against real ones (FID, KID, CMMD, precision, recall, CLIP score, accuracy, copies), or crystals, or
cells.

    python evaluate.py --samples runs/mine/sampled/0000 --reference photos --features inception
    python evaluate.py --model runs/mine --reference uoft-cs/cifar10 --num_samples 10000 --classifier runs/classifier
    python evaluate.py --model runs/mine --reference photos --sweep guidance_scale 1 2 3 5 7.5

    python evaluate.py --modality crystal --model runs/crystals/ldm --reference mp.parquet --training_data mp.parquet
    python evaluate.py --modality expression --model runs/pbmc/ldm --reference pbmc.h5ad

--help shows the flags of images, --modality crystal --help those of crystals, --modality expression --help those of
cells. Writes metrics.json and report.html.
docs/evaluation.md says what each figure means and what it hides.
"""

import argparse
from pathlib import Path

from utils.args import sampling as args_sampling
from utils.args import sampling as sample_args
from utils.args.parsing import parse_with_config, peek, run_script
from utils.crystal.evaluation import args as eval_crystal_args
from utils.expression.evaluation import args as eval_expression_args
from utils.image.args import requests as args_requests
from utils.image.evaluation import args as eval_args


def add_image_args(parser: argparse.ArgumentParser) -> None:
    eval_args.add_comparison_args(parser)
    eval_args.add_measurement_args(parser)
    args_requests.add_request_args(parser)
    sample_args.add_sampler_args(parser)


def check_image_args(args: argparse.Namespace) -> None:
    args_requests.check_request_args(args)
    eval_args.check_eval_args(args)


# Flags and their checks; further modalities are further rows, here and in `main`.
MODALITIES = {
    "image": (add_image_args, check_image_args),
    "crystal": (eval_crystal_args.add_crystal_evaluation_args, eval_crystal_args.check_crystal_eval_args),
    "expression": (eval_expression_args.add_cell_evaluation_args, eval_expression_args.check_cell_eval_args),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=list(MODALITIES), default="image", help="Kind of samples to evaluate.")
    add_args, check_args = MODALITIES[peek(parser, "modality")]
    add_args(parser)
    args = parse_with_config(parser)
    check_args(args)
    return args


def prepare_sampling(args: argparse.Namespace, run_dir: Path, captions: list[str]):
    """The run with its sampler, and what it is asked for: (pipeline, requests, settings, guide), as in sample.py."""
    from utils.diffusion import sampling
    from utils.image import sampler as requests
    from utils.image.pipeline import load_run

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


def sample_into(folder: Path, args: argparse.Namespace, run_dir: Path, pipeline, wanted, settings, guide) -> None:
    """Samples as sample.py does, and leaves what it leaves."""
    from tqdm.auto import tqdm

    from utils.image import sampler as requests

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


def open_real(args: argparse.Namespace, extractors: list, num_samples: int):
    """The real images that the flags name, and what is known of them; refuses too few of them for the metrics."""
    from utils.image.evaluation import figures as eval_figures
    from utils.image.evaluation import images as eval_images
    from utils.image.evaluation.measured import RealImages

    is_file = eval_args.is_statistics_file(args.reference)
    captions_of = args.caption_column if args.samples is None else None  # the reference's become prompts
    wanted = {  # name -> what, split, column of captions, and how many: a copy could be of any training image
        "reference": (None if is_file else args.reference, args.reference_split, captions_of, args.num_reference),
        "training_data": (args.training_data, args.training_data_split, None, None),
        "held_out_data": (args.held_out_data, args.held_out_data_split, None, args.num_reference),
    }
    sources = {}
    for name, (what, split, caption_column, limit) in wanted.items():
        if what is not None:
            columns = eval_images.Columns(args.image_column, None, caption_column)
            sources[name] = eval_images.open_images(what, split, f"--{name}", columns, limit)
    counts = {name: len(images) for name, images in sources.items()}
    for extractor in extractors:
        metrics = args.metrics if extractor.kind != "pixels" else []
        eval_figures.check_counts(metrics, extractor, num_samples, counts.get("reference"))
    eval_figures.check_held_out(sources.get("held_out_data"), sources.get("training_data"))
    statistics_file = args.reference if is_file else None
    return RealImages(sources, statistics_file, extractors, args.feature_batch_size, Path(args.statistics_dir))


def evaluate_images(args: argparse.Namespace) -> None:
    from utils.diffusion import sampling
    from utils.evaluation import report
    from utils.image import pictures
    from utils.image.codec import measure_shape
    from utils.image.evaluation import figures as eval_figures
    from utils.image.evaluation import images as eval_images
    from utils.image.evaluation.features import ClassifierFeatures, PixelFeatures, load_features
    from utils.image.evaluation.measured import measure
    from utils.modalities import check_modality
    from utils.runs import load

    # Load
    device = sampling.usable_device(args.device)
    extractors = [load_features(spec, device) for spec in args.features]
    metrics_of = dict.fromkeys(extractors, args.metrics)
    if args.training_data and "copies" in args.metrics:
        extractors.append(PixelFeatures())
        metrics_of[extractors[-1]] = ["copies"]
    if args.classifier:
        classifier = ClassifierFeatures.load(args.classifier, device, "--classifier")
        same = next((each for each in extractors if each.identity == classifier.identity), classifier)
        metrics_of[same] = [*metrics_of.get(same, []), "accuracy"]
    samples, run_dir = None, None
    if args.samples:
        columns = eval_images.Columns(args.image_column, args.label_column, args.caption_column)
        samples = eval_images.open_images(args.samples, args.samples_split, "--samples", columns, args.num_samples)
        args.num_samples = len(samples)
    else:
        run_dir = Path(args.model) if args.model else load.newest_run(Path("runs"))
        check_modality(run_dir, "image")
        args.num_samples = args.num_samples or eval_args.DEFAULT_SAMPLES_OF_A_RUN
    real = open_real(args, extractors, args.num_samples)
    output_dir = Path(args.output_dir) if args.output_dir else None
    output_dir = output_dir or load.next_folder((run_dir or Path("runs")) / "evaluated")

    # Measure
    points, notes = [], []
    for swept in args_sampling.sweep_points(args):
        name = " ".join(f"{key} {value:g}" for key, value in swept.items())
        if run_dir is not None:
            chosen = argparse.Namespace(**(vars(args) | swept))
            captions = real.sources["reference"].captions or [] if "reference" in real.sources else []
            pipeline, wanted, settings, guide = prepare_sampling(chosen, run_dir, captions)
            size = pipeline.denoiser.config.sample_size * measure_shape(pipeline.vae)[1]
            real.measure(args.resolution or size)  # before the samples: what does not fit shows at once
            folder = output_dir / "samples" / (name.replace(" ", "_") or "all")
            sample_into(folder, chosen, run_dir, pipeline, wanted, settings, guide)
            samples = eval_images.open_images(str(folder), "train", "--model", eval_images.Columns())
        resolution = args.resolution or samples.side()
        real.measure(resolution)
        found = measure(samples, [*metrics_of], resolution, args.feature_batch_size, same_size=args.resolution is None)
        notes += eval_images.conversions(f"{name} samples".strip(), len(samples), samples.seen)
        evidences = [
            eval_figures.gather(samples, each, extractor, real)
            for each, extractor in zip(found, metrics_of, strict=True)
        ]
        eval_figures.refuse_impossible(args.metrics if "metrics" in args.given else [], evidences)
        groups = [eval_figures.figures_of(evidence, metrics_of[evidence.extractor]) for evidence in evidences]
        shown = [("samples", pictures.grid_of_samples(samples, resolution))]
        for evidence in evidences:
            near = eval_figures.neighbours_of(evidence)
            if near is not None and near.source in real.sources:
                source = real.sources[near.source]
                shown.append((near.caption(), pictures.grid_of_neighbours(samples, source, near, resolution)))
        points.append(report.Point(name, groups, shown))

    # Report
    facts = {
        "samples": f"{args.samples or run_dir} ({args.num_samples} images of {resolution} x {resolution})",
        **{name: f"{images.title} ({len(images)} images)" for name, images in real.sources.items()},
    }
    if run_dir is not None:
        facts["sampling"] = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in swept)
    if real.statistics_file:
        facts["reference"] = f"statistics in {real.statistics_file}"
    notes = list(dict.fromkeys(real.notes() + notes))
    arguments = {name: value for name, value in sorted(vars(args).items()) if name not in ("given", "typed", "config")}
    sweep = args.sweep[0] if args.sweep else None
    report.write(output_dir, facts, notes, points, eval_figures.TITLES, sweep, arguments)
    print(report.terminal_tables(points, eval_figures.TITLES))
    print("\n".join(["", *notes, f"metrics.json and report.html in {output_dir}"]))


def main(args: argparse.Namespace) -> None:
    from utils.modalities import check_modality

    if args.model:
        check_modality(Path(args.model), args.modality)
    if args.modality == "crystal":
        from utils.crystal.evaluation.evaluate import evaluate_crystals

        evaluate_crystals(args)
    elif args.modality == "expression":
        from utils.expression.evaluation.evaluate import evaluate_expression

        evaluate_expression(args)
    else:
        evaluate_images(args)


if __name__ == "__main__":
    run_script(main, parse_args)
