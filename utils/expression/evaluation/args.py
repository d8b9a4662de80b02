"""Arguments of `evaluate.py --modality expression`. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args import sampling as sample_args
from utils.args.checks import check_new_folder
from utils.args.parsing import positive_int, required
from utils.args.sampling import SWEEPS, check_sweep
from utils.errors import UserError
from utils.expression.args import CELLS_AT_ONCE

SPLITS = ("train", "val", "test", "all")
OF_SAMPLING = (
    *("model", "sweep", "seeds", "guidance_scale", "guidance_interval", "guidance_rescale", "guide_model"),
    *("num_inference_steps", "scheduler", "ema_sigma_rel", "mixed_precision", "batch_size"),
)


def add_evaluation_args(parser: ArgumentParser) -> None:
    """All flags of an evaluation of cells."""
    add_comparison_args(parser)
    add_measurement_args(parser)
    sample_args.add_sampler_args(parser, batch_size=CELLS_AT_ONCE)


def add_comparison_args(parser: ArgumentParser) -> None:
    """Which cells are compared with which."""
    group = parser.add_argument_group("cells; without --samples, --model is sampled")
    group.add_argument("--model", default=None, help="A run's folder or a checkpoint, which is sampled.")
    group.add_argument(
        "--samples", default=None, help="What is judged instead: a folder of sample.py, or an .h5ad file with counts."
    )
    group.add_argument("--samples_layer", default=None, help="Layer with the counts of --samples. Default: X.")
    group.add_argument(
        "--reference", default=None, help="An .h5ad file with real cells that the run never saw. Required."
    )
    group.add_argument(
        "--reference_split",
        choices=SPLITS,
        default="test",
        help="Which cells of --reference: those that the autoencoder of --model, or --split_of, knows as that split, "
        "or all.",
    )
    group.add_argument(
        "--training_data",
        default=None,
        help="An .h5ad file with the cells that the run was trained on: for the control, the nulls, the classifier "
        "and copies. Default: --reference, of which --model or --split_of says which cells those are.",
    )
    group.add_argument(
        "--training_data_split",
        choices=SPLITS,
        default="train",
        help="Which cells of --training_data, likewise.",
    )
    group.add_argument(
        "--split_of",
        default=None,
        help="With --samples: a run or an autoencoder whose training, test and other cells are told apart. Default: "
        "all cells of each file.",
    )
    group.add_argument(
        "--counts_layer",
        default=None,
        help="Layer with the raw counts of --reference and --training_data; raw for adata.raw. Default: X.",
    )
    group.add_argument(
        "--label_column",
        default=None,
        help="Column of obs with the types by which cells are judged. Default: the class that the run is conditioned "
        "on; of --samples, the one column of text that --reference has too.",
    )
    group.add_argument(
        "--num_samples",
        type=positive_int,
        default=None,
        help="Cells in all. Default: all there are; of a run, as many as test cells. Each is asked for what a test "
        "cell is, drawn at random where the numbers differ.",
    )


def add_measurement_args(parser: ArgumentParser) -> None:
    """How often the run is sampled, and what is left out."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--seeds",
        type=positive_int,
        default=1,
        help="Draw everything, samples, control and nulls, that many times, and show the mean and the spread.",
    )
    group.add_argument(
        "--sweep",
        nargs="+",
        metavar=("NAME", "VALUE"),
        default=None,
        help=f"Sample --model once for each value: {', '.join(SWEEPS)}; 'guidance_scale 1 1.5 2', say.",
    )
    group.add_argument(
        "--umap",
        action=BooleanOptionalAction,
        default=True,
        help="Draw a UMAP of real cells, samples and the Gaussian null; takes half a minute or more.",
    )
    group.add_argument(
        "--output_dir", default=None, help="New or empty folder. Default: MODEL/evaluated/NUMBER or runs/evaluated/..."
    )


def check_evaluation_args(args: Namespace) -> None:
    """Refuses combinations that make no sense, with the reason. A file that gives one value sets it alike."""
    required(args, "reference")
    if args.samples is not None:
        for name in OF_SAMPLING:
            if name in args.given:
                raise UserError(f"--{name} with --samples: those cells are made already; leave one out")
        for name in ("reference_split", "training_data_split"):
            if name in args.given and args.split_of is None:
                raise UserError(
                    f"--{name} with --samples: nothing says which cells are of which split; add --split_of (a run, or "
                    "its autoencoder), or give a file with those cells alone"
                )
    elif args.model is None:
        raise UserError("give --model (a run of cells, which is sampled) or --samples (cells that are there)")
    for name, reason in (("samples_layer", "a run makes its counts itself"), ("split_of", "--model says it")):
        if args.samples is None and getattr(args, name) is not None:
            raise UserError(f"--{name} without --samples: {reason}; leave it out")
    if args.sweep:
        check_sweep(args)
    check_new_folder(args.output_dir)
