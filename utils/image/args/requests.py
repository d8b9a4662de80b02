"""Flags that say what to sample from a run of images. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from utils.args.parsing import non_negative_int, positive_int
from utils.errors import UserError


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of images is asked for."""
    group = parser.add_argument_group("request of images")
    group.add_argument("--prompt", action="append", default=None, help="Prompt; may be given several times.")
    group.add_argument("--prompts_file", default=None, help="Text file with one prompt per line.")
    group.add_argument("--negative_prompt", default=None, help="Prompt to guide away from, instead of the empty one.")
    group.add_argument(
        "--class_labels",
        nargs="+",
        type=non_negative_int,
        default=None,
        help="Class labels to sample. Default: every class.",
    )


def add_count_args(parser: ArgumentParser) -> None:
    """How many images `sample.py` makes, and what makes only them faster."""
    group = parser.add_argument_group("sampling of images")
    group.add_argument(
        "--num_images_per_prompt", type=positive_int, default=4, help="Number of images per prompt or label."
    )
    group.add_argument(
        "--fuse_qkv_projections",
        action=BooleanOptionalAction,
        default=False,
        help="Compute the queries, keys and values of a U-Net in one matrix product. Changes rounding only.",
    )


def check_request_args(args: Namespace) -> None:
    """Refuses a file of prompts that is not there."""
    if args.prompts_file and not Path(args.prompts_file).is_file():
        raise UserError(f"--prompts_file: the file {args.prompts_file} does not exist")
