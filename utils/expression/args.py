"""Arguments about cells: which ones, which genes, their autoencoder. Imports no torch."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_float, positive_int, required
from utils.errors import UserError

MIN_GENES = 2
CELLS_AT_ONCE = 1024  # that are sampled: they are small


def add_cell_data_args(parser: ArgumentParser) -> None:
    """Which cells."""
    group = parser.add_argument_group("cells")
    group.add_argument("--dataset_name", default=None, help="An .h5ad file with raw counts.")
    group.add_argument(
        "--counts_layer",
        default=None,
        help="Layer with the raw counts; raw for adata.raw. Default: X.",
    )
    group.add_argument(
        "--max_skipped_fraction",
        type=fraction,
        default=0.05,
        help="Stop if more than this share of cells has no counts in the chosen genes.",
    )


def add_gene_args(parser: ArgumentParser) -> None:
    """Which genes, chosen on the cells that are trained on, and where their counts are kept."""
    group = parser.add_argument_group("genes")
    group.add_argument("--num_genes", type=positive_int, default=2000, help="Highly variable genes that are modelled.")
    group.add_argument(
        "--gene_selection",
        choices=["pearson_residuals", "seurat_v3"],
        default="pearson_residuals",
        help="How they are chosen, by scanpy.",
    )
    group.add_argument(
        "--min_cells", type=positive_int, default=3, help="Genes that fewer cells express are not looked at."
    )
    group.add_argument(
        "--low_memory",
        action=BooleanOptionalAction,
        default=False,
        help="Keep the counts in files under --output_dir, for more cells than memory.",
    )
    group.add_argument(
        "--library",
        choices=["chosen", "all"],
        default="chosen",
        help="What a cell's library size is the sum over: these genes, or the whole transcriptome.",
    )


def add_split_args(parser: ArgumentParser) -> None:
    """Which cells are kept out."""
    group = parser.add_argument_group("cells that are kept out")
    group.add_argument("--label_column", default=None, help="Column of obs by which the split is stratified.")
    group.add_argument(
        "--split_column", default=None, help="Column of obs that says train, val or test of each cell, instead."
    )
    group.add_argument("--validation_fraction", type=fraction, default=0.1, help="Of the cells, to watch training.")
    group.add_argument(
        "--test_fraction", type=fraction, default=0.2, help="Of the cells, never looked at before evaluate.py."
    )
    group.add_argument("--split_seed", type=non_negative_int, default=0, help="Of the split alone.")


def add_expression_vae_args(parser: ArgumentParser) -> None:
    """The autoencoder and its bound."""
    group = parser.add_argument_group("autoencoder")
    group.add_argument(
        "--likelihood", choices=["nb", "zinb", "gaussian"], default="nb", help="Of raw counts, in the decoder."
    )
    group.add_argument("--latent_channels", type=positive_int, default=16, help="Dimensions of a cell's latent.")
    group.add_argument("--hidden_size", type=positive_int, default=256, help="Width of encoder and decoder.")
    group.add_argument("--num_layers", type=positive_int, default=2, help="Hidden layers of each.")
    group.add_argument("--dropout", type=fraction, default=0.1, help="In encoder and decoder.")
    group.add_argument(
        "--batch_column",
        default=None,
        help="Column of obs that encoder and decoder are told, so that latents need not.",
    )
    group.add_argument(
        "--kl_weight", type=non_negative_float, default=1.0, help="Of the KL divergence; 1 is the ELBO."
    )
    group.add_argument(
        "--kl_warmup_steps", type=non_negative_int, default=300, help="Steps in which that weight rises from zero."
    )
    group.add_argument(
        "--dispersion_learning_rate",
        type=positive_float,
        default=1e-2,
        help="Peak learning rate of the likelihood's theta, which has one number a gene.",
    )
    group.add_argument(
        "--validation_steps", type=positive_int, default=250, help="Steps between looks at held-out cells."
    )


def check_cell_data_args(args: Namespace) -> None:
    """Refuses a run without cells, and splits that contradict each other."""
    if args.dataset_name is None:
        raise UserError("--dataset_name is required: an .h5ad file with raw counts")
    if args.num_genes < MIN_GENES:
        raise UserError(f"--num_genes {args.num_genes}: a cell of one gene has nothing to share out; give more")
    if args.split_column:
        for name in ("validation_fraction", "test_fraction", "split_seed", "label_column"):
            if name in args.typed:
                raise UserError(f"--{name} with --split_column: the column says which cells are kept out; use one")


def add_expression_cache_args(parser: ArgumentParser) -> None:
    """The frozen autoencoder and which cells it encodes."""
    group = parser.add_argument_group("latent cache")
    group.add_argument(
        "--pretrained_vae_model_name_or_path", default=None, help="A run of train_expression_vae.py, or its vae/."
    )
    group.add_argument(
        "--split",
        choices=["train", "val", "test", "all"],
        default="train",
        help="Cells of that split of the autoencoder's training; all: every cell of the file.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=1024, help="Cells per VAE call.")
    group.add_argument("--rows_per_shard", type=positive_int, default=65536, help="Cells per shard.")


def add_precompute_args(parser: ArgumentParser) -> None:
    """All flags of a latent cache of cells."""
    add_cell_data_args(parser)
    add_expression_cache_args(parser)


def check_precompute_args(args: Namespace) -> None:
    """Refuses a cache of nothing, and a seed, which nothing would read."""
    required(args, "dataset_name", "pretrained_vae_model_name_or_path")
    if "seed" in args.typed:
        raise UserError("--seed with --modality expression: nothing about encoding cells is random; leave it out")
    args.mixed_precision = "no"  # latents of cells are small, and encoding them takes no time


JOINT_FLAGS = ("dataset_name", "counts_layer", "vae_learning_rate", "joint_latents", "kl_weight")


def add_joint_args(parser: ArgumentParser) -> None:
    """The autoencoder, trained on together with its denoiser."""
    group = parser.add_argument_group("joint fine-tuning of the autoencoder")
    group.add_argument(
        "--joint_vae",
        action=BooleanOptionalAction,
        default=False,
        help="Train the autoencoder of the cache too, by the ELBO. The run then has an autoencoder of its own.",
    )
    group.add_argument("--dataset_name", default=None, help="The .h5ad file that the cache was made of.")
    group.add_argument(
        "--counts_layer", default=None, help="Layer with the raw counts; raw for adata.raw. Default: X."
    )
    group.add_argument(
        "--vae_learning_rate", type=positive_float, default=1e-5, help="Peak learning rate of the autoencoder."
    )
    group.add_argument(
        "--joint_latents",
        choices=["detached", "live"],
        default="detached",
        help="live: the loss of the denoiser moves the encoder too; detached: the ELBO alone does.",
    )
    group.add_argument("--kl_weight", type=non_negative_float, default=1.0, help="Of the KL divergence in the ELBO.")


def check_joint_args(args: Namespace) -> None:
    """Refuses flags of a joint training that is none, and what cannot be trained jointly."""
    if not args.joint_vae:
        for name in JOINT_FLAGS:
            if name in args.typed:
                raise UserError(f"--{name} without --joint_vae: the autoencoder stays as it is; leave it out")
        return
    if args.dataset_name is None:
        raise UserError("--joint_vae needs --dataset_name: the .h5ad file that the cache was made of")
    for name in ("lora_rank", "ema_sigma_rels"):
        if getattr(args, name):
            raise UserError(f"--{name} with --joint_vae: it is of the denoiser alone; leave one out")
    if args.optimizer == "muon":
        raise UserError("--optimizer muon with --joint_vae: it has one learning rate for all; use adamw")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise UserError(
            "--joint_vae under FSDP: the whole copies that are exported there have no autoencoder; use "
            "configs/accelerate/multi_gpu.yaml"
        )


def add_expression_samples_args(parser: ArgumentParser) -> None:
    """Samples on the way."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps", type=positive_int, default=1000, help="Steps between pictures of samples."
    )
    group.add_argument("--num_validation_cells", type=positive_int, default=500, help="How many are sampled.")
    group.add_argument(
        "--validation_guidance_scale", type=non_negative_float, default=1.0, help="Their guidance; 1 is off."
    )
    group.add_argument("--validation_inference_steps", type=positive_int, default=25, help="Steps of their sampler.")


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of cells is asked for, beside --num_samples and --property."""
    group = parser.add_argument_group("request of cells")
    group.add_argument(
        "--class_label",
        nargs="+",
        default=None,
        help="Names of types; --num_samples cells of each. Default: in the proportions of the training set.",
    )


def add_vector_model_args(parser: ArgumentParser) -> None:
    """A denoiser of latent vectors."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--architecture",
        choices=["mlp", "dit"],
        default="mlp",
        help="Residual MLP blocks with adaLN-zero, or a DiT whose tokens are pieces of the vector.",
    )
    group.add_argument(
        "--model_size", choices=["S", "B", "L", "XL"], default=None, help="MLP: 3.2M to 319M. DiT: of the paper."
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
