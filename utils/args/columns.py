"""Arguments of runs on columns of their data set: the conditions, and what is asked for. Imports no torch."""

from argparse import ArgumentParser, Namespace

from utils.args.parsing import fraction, positive_int
from utils.errors import UserError


def add_column_condition_args(parser: ArgumentParser, help_of_condition: str) -> None:
    """What the denoiser is told."""
    group = parser.add_argument_group("conditions")
    group.add_argument(
        "--condition",
        nargs="+",
        default=None,
        metavar="KIND[:COLUMN]",
        help=f"{help_of_condition}; several at once. Default: unconditional.",
    )
    group.add_argument(
        "--cond_drop_prob",
        type=fraction,
        default=0.1,
        help="Share of samples that are told nothing; of several conditions each is dropped by itself as often too.",
    )


def check_column_condition_args(args: Namespace) -> None:
    """Refuses settings of conditions that are not there."""
    for name in ("cond_drop_prob", "validation_guidance_scale"):
        if name in args.typed and not args.condition:
            raise UserError(f"--{name} without --condition: the denoiser is told nothing; leave it out")


def parse_conditions(
    texts: list[str] | None, kinds: tuple[str, ...], of_atoms: tuple[str, ...] = (), example: str = "band_gap"
) -> dict[str, str]:
    """What --condition asks for: name -> kind, in a fixed order. Raises UserError for anything else."""
    found: dict[str, str] = {}
    for text in texts or []:
        kind, _, column = text.partition(":")
        if kind not in kinds:
            raise UserError(f"--condition {text}: the kinds are {', '.join(kinds)}")
        if kind in of_atoms and column:
            raise UserError(f"--condition {text}: {kind} follows from the atoms; write {kind} alone")
        if kind not in of_atoms and not column:
            raise UserError(f"--condition {text}: name the column, as in {kind}:{example}")
        if column in of_atoms:
            raise UserError(f"--condition {text}: {column} is a condition of the atoms; rename the column")
        name = column or kind
        if name in found:
            raise UserError(f"--condition {text}: {name} is named twice; name it once")
        found[name] = kind
    return dict(sorted(found.items()))


def add_column_request_args(
    parser: ArgumentParser,
    num_samples: int | None = 16,
    help_of_number: str = "Samples of each composition, chemical system or class.",
) -> None:
    """What a run on columns is asked for; `num_samples` is the default number."""
    group = parser.add_argument_group("request of crystals or cells")
    group.add_argument("--num_samples", type=positive_int, default=num_samples, help=help_of_number)
    group.add_argument(
        "--property", nargs="+", default=None, metavar="NAME=VALUE", help="Properties and classes: band_gap=1.5."
    )
