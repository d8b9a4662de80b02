"""Flags of image grids and of samples that are evaluated during training. Imports no torch."""

from argparse import ArgumentParser, Namespace

from utils.args.groups import add_validation_loss_args
from utils.args.parsing import non_negative_float, positive_int
from utils.errors import UserError


def check_validation_args(args: Namespace) -> None:
    """Refuses flags of image grids if no grid is drawn."""
    names = ("validation_steps", "validation_guidance_scale", "num_validation_images", "validation_inference_steps")
    for name in names:
        if name == "validation_inference_steps" and args.eval_features:
            continue  # evaluations sample too
        if name in args.typed and not args.validation_prompts:
            raise UserError(f"--{name} without --validation_prompts: there is nothing to sample; give some prompts")


NEEDS_EVAL_FEATURES = ("eval_metric", "num_eval_images", "eval_guidance_scale")


def check_sample_metric_args(args: Namespace) -> None:
    """Refuses flags of samples that are not compared with anything."""
    for name in NEEDS_EVAL_FEATURES:
        if name in args.given and args.eval_features is None:
            raise UserError(f"--{name} without --eval_features: nothing is sampled; name the features to compare in")
    if args.best_metric == "samples" and not args.eval_features:
        raise UserError("--best_metric samples without --eval_features: no samples are drawn; name the features")
    if args.num_eval_images == 1:
        raise UserError("--num_eval_images 1: one image has no distribution; 512 is usual")


DEFAULT_EVAL_IMAGES = 512


def add_validation_args(parser: ArgumentParser, what: str) -> None:
    """Adds the flags of image grids; `what` is prompts or labels."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps",
        type=positive_int,
        default=1000,
        help=f"Steps between image grids of the validation {what}.",
    )
    group.add_argument(
        "--validation_guidance_scale", type=non_negative_float, default=4.0, help="Guidance scale of these grids."
    )
    group.add_argument(
        "--num_validation_images", type=positive_int, default=4, help=f"Number of images for each of the {what}."
    )
    group.add_argument(
        "--validation_inference_steps", type=positive_int, default=25, help="Number of denoising steps of these grids."
    )


def add_evaluation_args(parser: ArgumentParser) -> None:
    """Adds the flags of evaluations on held-out latents, and of samples compared with them."""
    add_validation_loss_args(parser)
    group = parser.add_argument_group("evaluation of samples")
    group.add_argument(
        "--eval_features",
        default=None,
        metavar="SPEC",
        help="Also sample in evaluations, and compare with the held-out images in these features: inception, "
        "inception:FILE, clip:NAME_OR_FOLDER, open_clip:NAME_OR_FILE or classifier:FOLDER.",
    )
    group.add_argument(
        "--eval_metric",
        choices=["kid", "fid"],
        default="kid",
        help="Distance between samples and held-out images; KID is unbiased for any number of samples.",
    )
    group.add_argument(
        "--num_eval_images",
        type=positive_int,
        default=None,
        help=f"Number of samples to compare. Default: as many as held-out images, at most {DEFAULT_EVAL_IMAGES}.",
    )
    group.add_argument(
        "--eval_guidance_scale",
        type=non_negative_float,
        default=1.0,
        help="Guidance scale of these samples; 1 is off.",
    )
    group.add_argument(
        "--best_metric",
        choices=["loss", "samples"],
        default="loss",
        help="Metric whose lowest value selects the checkpoint in OUTPUT_DIR/best: the validation loss, or the "
        "--eval_metric of samples.",
    )
