"""Flags of crystals: data, autoencoder, cache, denoiser, samples. Imports no torch."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.columns import add_column_condition_args
from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_int, refuse_together, required
from utils.errors import UserError


def add_crystal_data_args(parser: ArgumentParser) -> None:
    """Adds the flags of the data set."""
    group = parser.add_argument_group("crystals")
    group.add_argument(
        "--dataset_name",
        default=None,
        help="Crystals: folder of CIF files, .parquet or .csv file (with a column cif, or atomic_numbers, "
        "frac_coords and lattice), or dataset on the hub.",
    )
    group.add_argument(
        "--dataset_split",
        default="train",
        help="Split to read, of a dataset on the hub or of a file with a column named split; other files are read "
        "whole.",
    )
    group.add_argument("--max_atoms", type=positive_int, default=20, help="Leave out crystals with more atoms.")
    group.add_argument("--max_samples", type=positive_int, default=None, help="Use only the first N crystals.")
    group.add_argument(
        "--max_skipped_fraction",
        type=fraction,
        default=0.05,
        help="Stop if more than this fraction of the crystals cannot be used.",
    )


def add_kept_out_args(parser: ArgumentParser) -> None:
    """Adds the flags of the held-out crystals."""
    group = parser.add_argument_group("held-out crystals")
    group.add_argument(
        "--validation_dataset_name",
        default=None,
        help="Separate source of held-out crystals, instead of a split of --dataset_name.",
    )
    group.add_argument(
        "--validation_split",
        default="val",
        help="Held-out split of --dataset_name. If it has no splits, a tenth of the formulas is held out.",
    )


def add_crystal_vae_args(parser: ArgumentParser) -> None:
    """Adds the flags of the autoencoder and its losses."""
    group = parser.add_argument_group("autoencoder")
    group.add_argument(
        "--vae_size",
        choices=["small", "base", "large"],
        default="small",
        help="Size of the autoencoder: 1.3M, 6.7M or 51M parameters.",
    )
    group.add_argument("--latent_channels", type=positive_int, default=8, help="Number of latent channels per atom.")
    group.add_argument(
        "--random_translation",
        action=BooleanOptionalAction,
        default=True,
        help="Translate each crystal by a new random vector in every epoch, since a unit cell has no origin.",
    )
    group.add_argument(
        "--element_weight", type=non_negative_float, default=1.0, help="Weight of the cross-entropy of elements."
    )
    group.add_argument(
        "--coordinate_weight",
        type=non_negative_float,
        default=10.0,
        help="Weight of the error of fractional coordinates, as points on a circle.",
    )
    group.add_argument(
        "--length_weight",
        type=non_negative_float,
        default=1.0,
        help="Weight of the error of lattice lengths, divided by n^(1/3) for n atoms.",
    )
    group.add_argument(
        "--angle_weight",
        type=non_negative_float,
        default=10.0,
        help="Weight of the error of lattice angles, in radians.",
    )
    group.add_argument(
        "--kl_weight",
        type=non_negative_float,
        default=1e-5,
        help="Weight of the KL divergence per latent value, in nats.",
    )
    group.add_argument(
        "--kl_warmup_steps", type=non_negative_int, default=0, help="Steps in which the KL weight rises from zero."
    )


def add_crystal_validation_args(parser: ArgumentParser) -> None:
    """Adds the flags of the autoencoder's validation on held-out crystals."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps", type=positive_int, default=1000, help="Steps between validations of the reconstructions."
    )
    group.add_argument(
        "--num_validation_crystals",
        type=positive_int,
        default=200,
        help="Number of held-out crystals to reconstruct and match.",
    )
    group.add_argument(
        "--num_match_processes",
        type=positive_int,
        default=min(8, os.cpu_count() or 1),
        help="Number of processes that match structures.",
    )


def add_crystal_cache_args(parser: ArgumentParser) -> None:
    """Adds the flags of the latent cache."""
    group = parser.add_argument_group("latent cache")
    group.add_argument(
        "--pretrained_vae_model_name_or_path", default=None, help="Run of train_crystal_vae.py, or its folder vae/."
    )
    group.add_argument(
        "--num_translations",
        type=positive_int,
        default=8,
        help="Latents to cache per crystal, each of a copy translated by a random vector; training draws one per "
        "epoch. 1: one latent, not translated.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=256, help="Batch size of the VAE's encoder.")
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
    """Refuses --learned_variance for objectives without a variance of the reverse process, or without a finite one."""
    if not args.learned_variance:
        return
    if args.prediction_type == "flow":
        raise UserError("--learned_variance with --prediction_type flow: its reverse process has none; leave it out")
    if args.rescale_betas_zero_snr:
        raise UserError("--learned_variance with --rescale_betas_zero_snr: the last timestep has no log-variance")


def check_crystal_data_args(args: Namespace) -> None:
    """Refuses a missing data set, and two sources of held-out crystals."""
    if args.dataset_name is None:
        raise UserError("--dataset_name is required: a folder of CIF files, a .parquet or .csv file, or a hub dataset")
    if args.validation_dataset_name and "validation_split" in args.typed:
        refuse_together(args, "validation_dataset_name", "validation_split", "both say what is kept out; use one")


def add_crystal_model_args(parser: ArgumentParser) -> None:
    """Adds the flags of the denoiser and its conditions."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_size", choices=["S", "B", "L", "XL"], default=None, help="DiT size of the paper. Default: S."
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
        "--learned_variance",
        action=BooleanOptionalAction,
        default=False,
        help="Also learn the variance of the reverse process (DDPM), with which --scheduler ddpm then samples.",
    )
    add_column_condition_args(
        parser, "composition, chemical_system, property:COLUMN (a number), class:COLUMN (any values)"
    )


def add_crystal_samples_args(parser: ArgumentParser) -> None:
    """Adds the flags of the samples that are drawn during training."""
    group = parser.add_argument_group("validation")
    group.add_argument("--validation_steps", type=positive_int, default=1000, help="Steps between validation samples.")
    group.add_argument(
        "--num_validation_crystals", type=positive_int, default=16, help="Number of crystals to sample."
    )
    group.add_argument(
        "--validation_guidance_scale",
        type=non_negative_float,
        default=2.0,
        help="Guidance scale of validation samples; 1 is off.",
    )
    group.add_argument(
        "--validation_inference_steps",
        type=positive_int,
        default=25,
        help="Number of denoising steps of validation samples.",
    )


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of crystals is asked for, beside --num_samples and --property."""
    group = parser.add_argument_group("conditions of crystals")
    group.add_argument(
        "--num_atoms",
        type=positive_int,
        default=None,
        help="Number of atoms per crystal. Default: drawn from their distribution in the training set.",
    )
    group.add_argument(
        "--composition",
        nargs="+",
        default=None,
        help="Formulas to condition on, such as LiFePO4 or Ca(OH)2; samples may deviate from the condition.",
    )
    group.add_argument(
        "--clamp_composition",
        action=BooleanOptionalAction,
        default=False,
        help="Also assign the atoms of --composition to the sites, in the likeliest way: the formula then always "
        "holds.",
    )
    group.add_argument(
        "--chemical_system", nargs="+", default=None, help="Chemical systems to condition on, such as Li-Fe-O."
    )
