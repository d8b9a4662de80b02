"""Arguments about crystals: which ones, their autoencoder, their conditions. Imports no torch."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.columns import add_column_condition_args
from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_int, refuse_together, required
from utils.errors import UserError


def add_crystal_data_args(parser: ArgumentParser) -> None:
    """Which crystals."""
    group = parser.add_argument_group("crystals")
    group.add_argument(
        "--dataset_name",
        default=None,
        help="Folder of CIF files, .parquet or .csv file (with a column cif, or atomic_numbers, frac_coords and "
        "lattice), or hub dataset.",
    )
    group.add_argument(
        "--dataset_split",
        default="train",
        help="Of a hub dataset, or of files with a column split: the rows that say so. Other files are read whole.",
    )
    group.add_argument("--max_atoms", type=positive_int, default=20, help="Crystals with more are left out.")
    group.add_argument("--max_samples", type=positive_int, default=None, help="Use the first N crystals only.")
    group.add_argument(
        "--max_skipped_fraction",
        type=fraction,
        default=0.05,
        help="Stop if more than this share of crystals cannot be used.",
    )


def add_kept_out_args(parser: ArgumentParser) -> None:
    """Which crystals are not trained on."""
    group = parser.add_argument_group("crystals that are kept out")
    group.add_argument(
        "--validation_dataset_name", default=None, help="A source of its own, instead of a split of --dataset_name."
    )
    group.add_argument(
        "--validation_split",
        default="val",
        help="Split of --dataset_name. Where there is none of any name, a tenth of the formulas is kept out.",
    )


def add_crystal_vae_args(parser: ArgumentParser) -> None:
    """The autoencoder and its losses."""
    group = parser.add_argument_group("autoencoder")
    group.add_argument(
        "--vae_size", choices=["small", "base", "large"], default="small", help="1.3M, 6.7M or 51M parameters."
    )
    group.add_argument("--latent_channels", type=positive_int, default=8, help="Numbers in the latent of an atom.")
    group.add_argument(
        "--random_translation",
        action=BooleanOptionalAction,
        default=True,
        help="Move each crystal by a random vector each time it is seen; a cell has no origin.",
    )
    group.add_argument("--element_weight", type=non_negative_float, default=1.0, help="Of the cross-entropy.")
    group.add_argument(
        "--coordinate_weight", type=non_negative_float, default=10.0, help="Of coordinates, on the circle."
    )
    group.add_argument("--length_weight", type=non_negative_float, default=1.0, help="Of lengths over n^(1/3).")
    group.add_argument("--angle_weight", type=non_negative_float, default=10.0, help="Of angles, in radians.")
    group.add_argument(
        "--kl_weight", type=non_negative_float, default=1e-5, help="Of the KL divergence per latent value, in nats."
    )
    group.add_argument(
        "--kl_warmup_steps", type=non_negative_int, default=0, help="Steps in which that weight rises from zero."
    )


def add_crystal_validation_args(parser: ArgumentParser) -> None:
    """Crystals that are looked at and not trained on."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps", type=positive_int, default=1000, help="Steps between looks at reconstructions."
    )
    group.add_argument(
        "--num_validation_crystals", type=positive_int, default=200, help="How many are reconstructed and matched."
    )
    group.add_argument(
        "--num_match_processes",
        type=positive_int,
        default=min(8, os.cpu_count() or 1),
        help="Processes that match structures.",
    )


def add_crystal_cache_args(parser: ArgumentParser) -> None:
    """The frozen autoencoder and what is stored of what it gives."""
    group = parser.add_argument_group("latent cache")
    group.add_argument(
        "--pretrained_vae_model_name_or_path", default=None, help="A run of train_crystal_vae.py, or its vae/."
    )
    group.add_argument(
        "--num_translations",
        type=positive_int,
        default=8,
        help="Latents of each crystal, moved by a random vector each; one is drawn per epoch. 1: of none moved.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=256, help="Crystals per VAE call.")
    group.add_argument("--rows_per_shard", type=positive_int, default=8192, help="Crystals per shard.")


def add_precompute_args(parser: ArgumentParser) -> None:
    """All flags of a latent cache of crystals."""
    add_crystal_data_args(parser)
    add_crystal_cache_args(parser)


def check_precompute_args(args: Namespace) -> None:
    """Refuses a cache of nothing."""
    required(args, "dataset_name", "pretrained_vae_model_name_or_path")
    args.mixed_precision = "no"  # half precision would move atoms


def check_learned_variance(args: Namespace) -> None:
    """Refuses a variance that the objective has not, or of which the bound would not be one."""
    if not args.learned_variance:
        return
    if args.prediction_type == "flow":
        raise UserError("--learned_variance with --prediction_type flow: its reverse process has none; leave it out")
    if args.rescale_betas_zero_snr:
        raise UserError("--learned_variance with --rescale_betas_zero_snr: the last timestep has no log-variance")


def check_crystal_data_args(args: Namespace) -> None:
    """Refuses a run without crystals, and two ways of keeping some out."""
    if args.dataset_name is None:
        raise UserError("--dataset_name is required: a folder of CIF files, a .parquet or .csv file, or a hub dataset")
    if args.validation_dataset_name and "validation_split" in args.typed:
        refuse_together(args, "validation_dataset_name", "validation_split", "both say what is kept out; use one")


def add_crystal_model_args(parser: ArgumentParser) -> None:
    """The denoiser and what it is told."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_size", choices=["S", "B", "L", "XL"], default=None, help="A DiT by its name in the paper. Default: S."
    )
    group.add_argument(
        "--model_config",
        default=None,
        metavar="FILE",
        help="JSON or YAML of the model's own arguments, over --model_size.",
    )
    group.add_argument(
        "--gradient_checkpointing", action=BooleanOptionalAction, default=False, help="Less memory, slower."
    )
    group.add_argument(
        "--learned_variance",
        action=BooleanOptionalAction,
        default=False,
        help="Learn the variance of the reverse process too (DDPM), which --scheduler ddpm then samples with.",
    )
    add_column_condition_args(
        parser, "composition, chemical_system, property:COLUMN (a number), class:COLUMN (anything)"
    )


def add_crystal_samples_args(parser: ArgumentParser) -> None:
    """Samples on the way."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps", type=positive_int, default=1000, help="Steps between pictures of samples."
    )
    group.add_argument("--num_validation_crystals", type=positive_int, default=16, help="How many are sampled.")
    group.add_argument(
        "--validation_guidance_scale", type=non_negative_float, default=2.0, help="Their guidance; 1 is off."
    )
    group.add_argument("--validation_inference_steps", type=positive_int, default=25, help="Steps of their sampler.")


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of crystals is asked for, beside --num_samples and --property."""
    group = parser.add_argument_group("request of crystals")
    group.add_argument(
        "--num_atoms", type=positive_int, default=None, help="Of each. Default: drawn as in the training set."
    )
    group.add_argument(
        "--composition",
        nargs="+",
        default=None,
        help="Formulas such as LiFePO4 or Ca(OH)2, as a condition: the run is told, and may give something else.",
    )
    group.add_argument(
        "--clamp_composition",
        action=BooleanOptionalAction,
        default=False,
        help="Also hand the atoms of --composition to the sites, the likeliest way: nothing else can come out.",
    )
    group.add_argument("--chemical_system", nargs="+", default=None, help="Sets of elements such as Li-Fe-O.")
