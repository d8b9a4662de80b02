"""Flags that say what a run of images is asked for. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from utils.args.parsing import non_negative_int, positive_int
from utils.errors import UserError


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of images is asked for."""
    group = parser.add_argument_group("request of images")
    group.add_argument("--prompt", action="append", default=None, help="What to draw; may be repeated.")
    group.add_argument("--prompts_file", default=None, help="Text file with one prompt a line.")
    group.add_argument(
        "--negative_prompt", default=None, help="What guidance leads away from, instead of from nothing."
    )
    group.add_argument("--class_labels", nargs="+", type=non_negative_int, default=None, help="Default: every class.")


def add_count_args(parser: ArgumentParser) -> None:
    """How many images `sample.py` makes, and what makes only them faster."""
    group = parser.add_argument_group("sampling of images")
    group.add_argument(
        "--num_images_per_prompt", type=positive_int, default=4, help="Images for each prompt or label."
    )
    group.add_argument(
        "--fuse_qkv_projections",
        action=BooleanOptionalAction,
        default=False,
        help="Of a U-Net: queries, keys and values by one product of matrices. Changes rounding only.",
    )


def check_request_args(args: Namespace) -> None:
    """Refuses a file of prompts that is not there."""
    if args.prompts_file and not Path(args.prompts_file).is_file():
        raise UserError(f"--prompts_file: the file {args.prompts_file} does not exist")
