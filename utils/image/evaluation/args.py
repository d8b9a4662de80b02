"""Arguments of `evaluate.py --modality image`. Imports no torch."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from utils.args.checks import check_new_folder
from utils.args.parsing import positive_int, refuse_together
from utils.args.sampling import SWEEPS, add_sampler_args, check_sweep
from utils.errors import UserError
from utils.image.args.requests import add_request_args, check_request_args

METRIC_NAMES = ("fid", "kid", "cmmd", "inception_score", "prdc", "clip_score", "copies")
DEFAULT_SAMPLES_OF_A_RUN = 5000
OF_SAMPLING = (
    *("prompt", "prompts_file", "negative_prompt", "class_labels", "guidance_scale", "guidance_interval"),
    *("guidance_rescale", "guide_model", "num_inference_steps", "scheduler", "ema_sigma_rel", "mixed_precision"),
)


def add_evaluation_args(parser: ArgumentParser) -> None:
    """All flags of an evaluation of images."""
    add_comparison_args(parser)
    add_measurement_args(parser)
    add_request_args(parser)
    add_sampler_args(parser)


def add_comparison_args(parser: ArgumentParser) -> None:
    """Which images are compared with which."""
    group = parser.add_argument_group("images; without --samples, --model is sampled")
    sources = "a folder, .parquet files or a hub dataset"
    group.add_argument(
        "--model", default=None, help="A run's folder or a checkpoint. Default: the newest run below runs/."
    )
    group.add_argument("--samples", default=None, help=f"What is judged: a folder of sample.py, {sources}.")
    group.add_argument("--samples_split", default="train", help="Split of --samples, if it is a dataset.")
    group.add_argument(
        "--reference",
        default=None,
        help=f"Real images to compare with: {sources}, or statistics of an earlier evaluation (.safetensors) or of "
        "another tool (.npz with mu and sigma).",
    )
    group.add_argument("--reference_split", default="train", help="Split of --reference.")
    group.add_argument(
        "--training_data",
        default=None,
        help="Images the run was trained on: with --held_out_data, samples are looked up among them for copies.",
    )
    group.add_argument("--training_data_split", default="train", help="Split of --training_data.")
    group.add_argument("--held_out_data", default=None, help="Real images like them that the run never saw.")
    group.add_argument("--held_out_data_split", default="test", help="Split of --held_out_data.")
    group.add_argument("--image_column", default=None, help="Of datasets. Default: the only image column.")
    group.add_argument("--label_column", default=None, help="Class labels of --samples, if it is a dataset.")
    group.add_argument(
        "--caption_column", default=None, help="Captions of --samples; with --model, of --reference, as prompts."
    )
    group.add_argument(
        "--resolution",
        type=positive_int,
        default=None,
        help="Crop and resize everything to this size. Default: samples must have one size, real images follow it.",
    )
    group.add_argument(
        "--num_samples",
        type=positive_int,
        default=None,
        help=f"Default: all there are; {DEFAULT_SAMPLES_OF_A_RUN} of a run.",
    )
    group.add_argument(
        "--num_reference",
        type=positive_int,
        default=None,
        help="At most so many images of --reference and of --held_out_data.",
    )


def add_measurement_args(parser: ArgumentParser) -> None:
    """What is measured, in which features."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--features",
        nargs="+",
        default=["inception"],
        help="inception (downloads FID's weights), inception:FILE, clip:NAME_OR_FOLDER, open_clip:NAME_OR_FILE, "
        "classifier:FOLDER; several give a table each.",
    )
    group.add_argument(
        "--metrics", nargs="+", choices=METRIC_NAMES, default=list(METRIC_NAMES), help="Default: all that can be had."
    )
    group.add_argument(
        "--classifier", default=None, help="Folder of a classifier that reads whether samples show what was asked for."
    )
    group.add_argument(
        "--sweep",
        nargs="+",
        metavar=("NAME", "VALUE"),
        default=None,
        help=f"Sample --model once for each value: {', '.join(SWEEPS)}; 'guidance_scale 1 2 3 5 7.5', say.",
    )
    group.add_argument("--feature_batch_size", type=positive_int, default=64, help="Images measured at once.")
    group.add_argument(
        "--statistics_dir", default="runs/statistics", help="Where features of real images are kept for next time."
    )
    group.add_argument(
        "--output_dir",
        default=None,
        help="New or empty folder. Default: MODEL/evaluated/NUMBER, or runs/evaluated/...",
    )


def check_evaluation_args(args: Namespace) -> None:
    """Refuses combinations that make no sense, with the reason."""
    check_request_args(args)
    check_new_folder(args.output_dir)
    if args.samples is not None:
        for name in ("model", "sweep", *OF_SAMPLING):
            if name in args.given:
                raise UserError(f"--{name} with --samples: those images are made already; leave one out")
    elif args.label_column:
        raise UserError(
            "--label_column without --samples: a run's labels are those that it is asked for; leave it out"
        )
    for name in ("samples", "reference", "training_data", "held_out_data"):
        if f"{name}_split" in args.typed and getattr(args, name) is None:
            raise UserError(f"--{name}_split without --{name}: there is nothing to split; leave it out")
    if (args.training_data is None) != (args.held_out_data is None):
        raise UserError(
            "--training_data and --held_out_data go together: how near samples lie to training images says something "
            "only beside real images that the run never saw"
        )
    if args.caption_column and args.samples is None and args.reference is None:
        raise UserError("--caption_column without --reference: there are no captions to take prompts from")
    refuse_together(args, "caption_column", "prompts_file", "both say what the prompts are; leave one out")
    refuse_together(args, "caption_column", "prompt", "both say what the prompts are; leave one out")
    if len(set(args.features)) < len(args.features):
        raise UserError("--features: the same features are named twice; name them once")
    if args.sweep:
        check_sweep(args)


def is_statistics_file(what: str | None) -> bool:
    """Whether --reference names a file of statistics rather than images."""
    return what is not None and Path(what).suffix in (".safetensors", ".npz")
