"""Flags of the denoisers of images. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.checks import check_denoiser_args
from utils.args.parsing import fraction
from utils.errors import UserError
from utils.image.args.validation import check_sample_metric_args


def check_image_denoiser_args(args: Namespace) -> None:
    """All checks that the trainers of image denoisers share. Their order matters: some set what later ones read."""
    check_denoiser_args(args)
    check_routing_args(args)
    check_sample_metric_args(args)


def check_routing_args(args: Namespace) -> None:
    """Refuses --tread_ratio for a model without tokens, and a ratio that leaves no token."""
    if args.tread_ratio and args.model != "dit":
        raise UserError(
            f"--tread_ratio with --model {args.model}: the tokens of a transformer can skip blocks, but convolutions "
            "need the whole grid; use --model dit or leave it out"
        )
    if args.tread_ratio == 1:
        raise UserError("--tread_ratio 1: no token would be left for the middle blocks; 0.5 is usual")


def add_model_args(parser: ArgumentParser) -> None:
    """Adds the flags of the denoiser."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=["unet", "dit"], default="unet", help="Denoiser: UNet2DConditionModel (unet) or DiT (dit)."
    )
    group.add_argument(
        "--model_size",
        default=None,
        help="Preset. unet: tiny, cifar10, base (314M), sd-v1, sd-v2, ldm-kl-8. dit: S/2, B/4, XL/8, ... "
        "(size/patch), or plain-S/2, ... with the blocks of the DiT paper. Default: base or B/2.",
    )
    group.add_argument(
        "--model_config",
        default=None,
        metavar="FILE",
        help="YAML or JSON file of the model's own arguments, which override --model_size.",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="Recompute activations in the backward pass: less memory, slower steps.",
    )
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action=BooleanOptionalAction,
        default=False,
        help="Use the memory-efficient attention of xformers (CUDA only).",
    )
    group.add_argument(
        "--tread_ratio",
        type=fraction,
        default=0.0,
        help="Fraction of a DiT's tokens that skip the middle blocks in training (TREAD); 0.5 is usual, 0 is off.",
    )
