"""Flags that say what to sample from a run of images. Imports no torch."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from utils.args.checks import check_new_folder
from utils.args.parsing import non_negative_int
from utils.errors import UserError


def add_request_args(parser: ArgumentParser) -> None:
    """Adds the flags of the run and of its prompts or labels."""
    group = parser.add_argument_group("model, prompts and labels")
    group.add_argument(
        "--model", default=None, help="Folder of a run, or a checkpoint. Default: the newest run in runs/."
    )
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


def check_request_args(args: Namespace) -> None:
    """Refuses a missing file of prompts, and an --output_dir that is not empty."""
    if args.prompts_file and not Path(args.prompts_file).is_file():
        raise UserError(f"--prompts_file: the file {args.prompts_file} does not exist")
    check_new_folder(args.output_dir)
