"""Flags of captions and labels. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction

from utils.args.parsing import fraction


def add_condition_args(parser: ArgumentParser) -> None:
    """Adds the flags of captions and labels, and of how the data set is read for them."""
    group = parser.add_argument_group("captions and labels")
    group.add_argument(
        "--caption_column",
        default=None,
        help="Column with the caption, or with a list of captions of which one is drawn per epoch.",
    )
    group.add_argument("--label_column", default=None, help="Column with the class label, an integer.")
    group.add_argument(
        "--streaming",
        action=BooleanOptionalAction,
        default=False,
        help="Stream the dataset instead of downloading it first.",
    )
    group.add_argument(
        "--max_skipped_fraction",
        type=fraction,
        default=0.05,
        help="Stop if more than this fraction of the images cannot be read.",
    )
