"""Arguments of `evaluate.py --modality crystal`. Imports no torch."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args import sampling as sample_args
from utils.args.checks import check_new_folder
from utils.args.columns import add_column_request_args
from utils.args.parsing import positive_float, positive_int, refuse_together, required
from utils.args.sampling import check_sweep
from utils.crystal import args as crystal_args
from utils.errors import UserError

DEFAULT_CRYSTALS_OF_A_RUN = 500
OF_SAMPLING = (
    *("model", "sweep", "composition", "clamp_composition", "chemical_system", "property", "num_atoms"),
    *("compositions_from_reference", "property_targets", "guidance_scale", "guidance_interval", "guidance_rescale"),
    *("guide_model", "num_inference_steps", "scheduler", "ema_sigma_rel", "mixed_precision", "batch_size", "seed"),
)
REQUESTS = ("composition", "chemical_system", "compositions_from_reference", "property_targets")


def add_evaluation_args(parser: ArgumentParser) -> None:
    """All flags of an evaluation of crystals."""
    add_comparison_args(parser)
    add_measurement_args(parser)
    help_of_number = f"Crystals in all. Default: all there are; {DEFAULT_CRYSTALS_OF_A_RUN} of a run."
    add_column_request_args(parser, num_samples=None, help_of_number=help_of_number)
    crystal_args.add_request_args(parser)
    add_reference_request_args(parser)
    sample_args.add_sampler_args(parser)


def add_comparison_args(parser: ArgumentParser) -> None:
    """Which crystals are compared with which."""
    group = parser.add_argument_group("crystals; without --samples, --model is sampled")
    sources = "a folder of CIF files, .parquet or .csv file, or hub dataset"
    group.add_argument("--model", default=None, help="A run's folder or a checkpoint, which is sampled.")
    group.add_argument("--samples", default=None, help=f"What is judged: a folder of sample.py, {sources}.")
    group.add_argument("--samples_split", default=None, help="Split of --samples, if it has some.")
    group.add_argument("--reference", default=None, help=f"Real crystals that the run never saw: {sources}. Required.")
    group.add_argument("--reference_split", default="test", help="Split of --reference, if it has some.")
    group.add_argument(
        "--training_data",
        default=None,
        help="Crystals the run was trained on: for novelty, coverage, distributions, the regressor of properties and "
        "the hull of energies.",
    )
    group.add_argument("--training_data_split", default="train", help="Split of --training_data, if it has some.")
    group.add_argument("--max_atoms", type=positive_int, default=20, help="Real crystals with more are left out.")


def add_measurement_args(parser: ArgumentParser) -> None:
    """What is measured, and with what effort."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--calculator",
        default=None,
        metavar="PACKAGE.MODULE:FACTORY",
        help="A function of yours that returns an ASE calculator: energies above the hull of the training crystals.",
    )
    group.add_argument(
        "--num_match_processes",
        type=positive_int,
        default=min(8, os.cpu_count() or 1),
        help="Processes that match structures.",
    )
    group.add_argument(
        "--match_timeout",
        type=positive_float,
        default=30.0,
        help="Seconds for a pair of structures; what takes longer counts as different.",
    )
    group.add_argument(
        "--sweep",
        nargs="+",
        metavar=("NAME", "VALUE"),
        default=None,
        help="Sample --model once for each value: guidance_scale, num_inference_steps or ema_sigma_rel.",
    )
    group.add_argument(
        "--output_dir", default=None, help="New or empty folder. Default: MODEL/evaluated/NUMBER or runs/evaluated/..."
    )


def add_reference_request_args(parser: ArgumentParser) -> None:
    """Requests that only an evaluation can judge."""
    group = parser.add_argument_group("requests that are judged by real crystals")
    group.add_argument(
        "--compositions_from_reference",
        action=BooleanOptionalAction,
        default=False,
        help="Ask for the formula and the number of atoms of each reference crystal, once, and match the two.",
    )
    group.add_argument(
        "--property_targets",
        nargs="+",
        default=None,
        metavar=("NAME", "VALUE"),
        help="Ask for these values of a property, as many samples each: 'band_gap 0.5 1 2'. What the samples have is "
        "predicted by a regressor trained on --training_data.",
    )


def check_evaluation_args(args: Namespace) -> None:
    """Refuses combinations that make no sense, with the reason. A file that gives one value sets it alike."""
    required(args, "reference")
    if args.samples is not None:
        reason = "those crystals are made already; leave one out"
        for name in OF_SAMPLING:
            if name in args.given:
                raise UserError(f"--{name} with --samples: {reason}")
    elif args.model is None:
        raise UserError("give --model (a crystal run, which is sampled) or --samples (crystals that are there)")
    for name in ("samples", "training_data"):
        if f"{name}_split" in args.typed and getattr(args, name) is None:
            raise UserError(f"--{name}_split without --{name}: there is nothing to split; leave it out")
    for i, first in enumerate(REQUESTS):
        for second in REQUESTS[i + 1 :]:
            if first != "property_targets" and second != "property_targets":
                refuse_together(args, first, second, "both say which elements are asked for; use one")
    if args.compositions_from_reference and args.num_atoms is not None:
        raise UserError("--num_atoms with --compositions_from_reference: the reference's have theirs; leave it out")
    if args.compositions_from_reference and args.property_targets:
        raise UserError(
            "--property_targets with --compositions_from_reference: a composition all but decides the property; "
            "measure one at a time"
        )
    if args.property_targets:
        parse_targets(args.property_targets)
        if args.training_data is None:
            raise UserError(
                "--property_targets without --training_data: there is nothing to train the regressor on that says "
                "which values the samples have; give the run's training crystals"
            )
    if args.sweep:
        check_sweep(args)
    check_new_folder(args.output_dir)


def parse_targets(words: list[str]) -> tuple[str, list[float]]:
    """NAME and the values of --property_targets. Raises UserError for fewer than two different numbers."""
    name, *texts = words
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--property_targets {name}: {error}; write numbers after the name") from error
    if len(values) < 2 or len(set(values)) < len(values) or not all(abs(value) < float("inf") for value in values):
        raise UserError(
            f"--property_targets {name}: expected at least two numbers, each once, found {' '.join(texts) or 'none'}"
        )
    return name, values
