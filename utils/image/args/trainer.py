"""Flags of the trainers of denoisers of images. Imports no torch."""

from argparse import ArgumentParser, Namespace

from utils.args.groups import add_denoiser_args
from utils.args.parsing import fraction, required
from utils.image.args.data import add_cache_args, add_dataset_args, check_codec_args
from utils.image.args.model import add_model_args, check_image_denoiser_args
from utils.image.args.text import add_condition_args
from utils.image.args.validation import add_evaluation_args, add_validation_args


def add_image_trainer_args(parser: ArgumentParser, condition: str, samples: str) -> None:
    """Flags of every trainer of a denoiser of images. `condition` is the word for what a sample is told, `samples` for
    what validation grids are made of.
    """
    parser.add_argument(
        "--latents_dir", default=None, help="Latent cache. Default with a dataset: OUTPUT_DIR/latents."
    )
    parser.add_argument(
        "--cond_drop_prob",
        type=fraction,
        default=0.1,
        help=f"Probability of dropping the {condition}, for classifier-free guidance.",
    )
    add_model_args(parser)
    add_denoiser_args(parser)
    add_evaluation_args(parser)
    add_validation_args(parser, samples)
    add_dataset_args(parser)
    add_condition_args(parser)
    add_cache_args(parser)


def check_image_trainer_args(args: Namespace) -> None:
    """Refuses flags that make no sense together, and settles those that follow from others."""
    required(args, "output_dir")
    check_codec_args(args)
    check_image_denoiser_args(args)
